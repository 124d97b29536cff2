"""Measure how much time a feature store saves in training, and compare with what the arithmetic predicts.

    merv download
    python benchmarks/features/training.py [--passes 10] [--clips 12] [--write]
    python benchmarks/features/training.py --quick

N passes over the same clips are trained twice: (a) encoders run in each pass, on videos that are decoded
each time, as users without a store do; (b) features come from a new store on disk, which the first pass
fills. Both see the same samples in the same order from the same initial weights. With e seconds to decode
and encode a clip and s seconds of training on its features, (a) takes N(e + s) a clip and (b) takes e +
N·s.

Clips (3 to 5 s, 224×160, H.264) and questions are those of `merv demo`. Encoders with their trained
weights, number of frames, grid and mixer are those of the recipe cpu_small. Everything is in float32 on one
thread.

Without an LLM: fusion to 256 channels, the mean over the tokens and a linear layer, which classifies the
number of shots; AdamW, 4 clips a step. The prediction uses e and s that are measured alone: e by `features`
of one clip after the other, s by steps on features that are in memory. Keys and reads from disk are not
part of s; the time that they take is printed.

With SmolLM2-135M: `merv fit` of projector and mixer, half as many passes over half as many clips, 2 clips a
step. There is one question per clip. With the six of the recipe the LLM would take most of the time in (a)
and in (b), so that any prediction would be right. Seconds are those of Lightning's `fit`, without loading
weights. The first prediction is that of `merv plan`: the FLOPs of encoders and LLM, at the same FLOPs per
second. It knows nothing of decoding. The second one uses e and s, measured alone as above.

Losses of all steps must be equal bit for bit in (a), (b) and all repetitions, and so must every feature in
the stores and a new one from the encoders: values, mask, times and extent. The script stops if they are
not.

(a) and (b) alternate, and so do the measurements of e and s. Ratios are those of a repetition; numbers are
medians over the repetitions, with the range of the ratios. All is given by the clock and in seconds of the
CPU, which other load on the machine changes less.

Expected before the first run: without an LLM, e of 0.5 s, s of 5 ms and a ratio of 9 at 10 passes; with
SmolLM2, a ratio of up to 30 % above that of `merv plan`, because convolutions on a CPU run fewer FLOPs per
second than the LLM's matrix products and decoding has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merv import FeatureStore, MultiEncoder
from merv.data.module import ChatData
from merv.demo.questions import read_rows
from merv.demo.run import make_data
from merv.training.module import Training
from merv.training.plan import Setup, make_plan
from merv.training.recipes import recipes
from merv.types import Grid

RECIPE = yaml.safe_load(recipes()["cpu_small"].read_text(encoding="utf-8"))
MULTI_ENCODER = {name: RECIPE["model"][name] for name in ("encoders", "num_frames", "grid", "mixer")}
CLASSES = 4  # a clip of the demo has one to four shots
OUTPUT_DIM = 256
BATCH, LLM_BATCH = 4, 2
STORE, NO_STORE = "from the store", "encoders in each pass"


class Seconds(NamedTuple):
    """A duration by the clock, and in seconds of the CPU."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """The present time."""
        return cls(time.perf_counter(), time.process_time())

    def passed(self, count: int = 1) -> Seconds:
        """The time since this one, divided by `count`."""
        now = Seconds.now()
        return Seconds((now.wall - self.wall) / count, (now.cpu - self.cpu) / count)


CLOCKS = {"wall": "by the clock", "cpu": "of the CPU"}


@dataclass
class Runs:
    """The runs of one part, in the order of the repetitions.

    Attributes:
        seconds: (a) or (b) → for each run, the time from its start to the end of each pass.
        losses: The losses of all steps of each run.
        alone: What was measured alone → time per clip in each repetition.
    """

    seconds: dict[str, list[list[Seconds]]] = field(default_factory=lambda: {NO_STORE: [], STORE: []})
    losses: list[list[float]] = field(default_factory=list)
    alone: dict[str, list[Seconds]] = field(default_factory=dict)

    def add(self, name: str, seconds: list[Seconds], losses: list[float]) -> None:
        """Add one run of (a) or (b)."""
        self.seconds[name].append(seconds)
        self.losses.append(losses)

    def add_alone(self, **seconds: Seconds) -> None:
        """Add what was measured alone in this repetition."""
        for name, each in seconds.items():
            self.alone.setdefault(name, []).append(each)

    def totals(self, name: str, number: int, clock: str) -> list[float]:
        """The seconds of (a) or (b) after `number` passes, in each repetition."""
        return [getattr(run[number - 1], clock) for run in self.seconds[name]]

    def ratios(self, number: int, clock: str) -> list[float]:
        """How many times as long (a) takes as (b) after `number` passes, in each repetition."""
        without, stored = (self.totals(name, number, clock) for name in (NO_STORE, STORE))
        return [one / other for one, other in zip(without, stored, strict=True)]

    def median(self, name: str, clock: str) -> float:
        """The median of what was measured alone."""
        return statistics.median(getattr(each, clock) for each in self.alone[name])

    def predicted(self, number: int, clock: str) -> float:
        """The ratio that follows from e and s."""
        e, s = self.median("e", clock), self.median("s", clock)
        return number * (e + s) / (e + number * s)

    def check_losses(self) -> str:
        """Raise an error unless the losses of all runs are equal."""
        first = self.losses[0]
        assert first
        assert all(losses == first for losses in self.losses), "losses differ"
        return f"losses: all {len(first)} of {len(self.losses)} runs are equal bit for bit"


def encode_alone(encoders: MultiEncoder, clips: Sequence[Path]) -> Seconds:
    """Time to decode and encode a clip."""
    start = Seconds.now()
    for clip in clips:
        encoders.features(clip)
    return start.passed(len(clips))


def read_alone(encoders: MultiEncoder, clips: Sequence[Path], folder: Path) -> Seconds:
    """Time to find and read the features of a clip in a store on disk."""
    start = Seconds.now()
    encoders.features(clips, store=FeatureStore(folder, read_only=True))
    return start.passed(len(clips))


def both(repeat: int) -> tuple[str, ...]:
    """(a) and (b), in an order that alternates."""
    return (NO_STORE, STORE) if repeat % 2 == 0 else (STORE, NO_STORE)


# Without an LLM ---------------------------------------------------------------------------------


class Classifier:
    """The fusion of a MultiEncoder, from given weights, and a linear layer on the mean of its tokens."""

    def __init__(self, encoders: MultiEncoder, labels: Tensor, initial: dict[str, Any]) -> None:
        assert encoders.fusion is not None
        encoders.fusion.load_state_dict(initial)
        torch.manual_seed(0)
        self.encoders, self.labels, self.head = encoders, labels, nn.Linear(OUTPUT_DIM, CLASSES)
        encoders.train()
        parameters = [*encoders.fusion.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(self, features: dict[str, Grid], indices: Tensor) -> float:
        """Take one step on the features of these clips and return the loss."""
        encoded = self.encoders.fuse(features)
        mask = encoded.mask[..., None]
        pooled = (encoded.tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        loss = cross_entropy(self.head(pooled), self.labels[indices])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def train(
        self, clips: Sequence[Path], passes: int, store: FeatureStore | None
    ) -> tuple[list[Seconds], list[float]]:
        """Return the time from the start to the end of each pass, and the losses."""
        seconds, losses, start = [], [], Seconds.now()
        for number in range(passes):
            order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(number))
            for indices in order.split(BATCH):
                features = self.encoders.features([clips[i] for i in indices], store=store)
                losses.append(self.step(features, indices))
            if store is not None:
                store.flush()
            seconds.append(start.passed())
        return seconds, losses

    def step_alone(self, clips: Sequence[Path], store: FeatureStore) -> Seconds:
        """Time of a step, a clip, with features in memory."""
        batches = torch.arange(len(clips)).split(BATCH)
        in_memory = [self.encoders.features([clips[i] for i in batch], store=store) for batch in batches]

        def steps() -> None:
            for features, batch in zip(in_memory, batches, strict=True):
                self.step(features, batch)

        steps()
        start = Seconds.now()
        steps()
        return start.passed(len(clips))


def classify(data: Path, folder: Path, passes: int, repeats: int) -> tuple[list[str], int]:
    """Train without an LLM; return the lines of the table, and how many features were compared."""
    rows = read_rows(data / "train.jsonl")
    clips = [data / row["video"] for row in rows]
    labels = torch.tensor([len(row["shots"]) - 1 for row in rows])
    torch.manual_seed(0)
    encoders = MultiEncoder(**MULTI_ENCODER, output_dim=OUTPUT_DIM)
    assert encoders.fusion is not None
    initial = {name: tensor.clone() for name, tensor in encoders.fusion.state_dict().items()}
    runs = Runs()
    encoders.features(clips[0])  # the first one is slower
    for repeat in range(repeats):
        for name in both(repeat):
            store = FeatureStore(folder / str(repeat)) if name == STORE else None
            runs.add(name, *Classifier(encoders, labels, initial).train(clips, passes, store))
        filled = FeatureStore(folder / str(repeat), read_only=True)
        runs.add_alone(
            e=encode_alone(encoders, clips),
            s=Classifier(encoders, labels, initial).step_alone(clips, filled),
            read=read_alone(encoders, clips, folder / str(repeat)),
        )
    lines = [
        f"Without an LLM: {len(clips)} clips × {passes} passes × {repeats} repetitions",
        *table(runs, sorted({1, min(2, passes), passes})),
        runs.check_losses(),
    ]
    return lines, compare(encoders, clips, folder)


def row(name: str, values: Sequence[str]) -> str:
    """A row of the table."""
    return f"{name:32}" + "".join(f"{value:>22}" for value in values)


def table(runs: Runs, numbers: Sequence[int], planned: float | None = None) -> list[str]:
    """Seconds and ratios after these numbers of passes; `planned` is the last ratio by `merv plan`."""
    lines = []
    for clock, title in CLOCKS.items():
        lines.append(row(f"seconds {title}", [f"{number} pass{'es' * (number > 1)}" for number in numbers]))
        for name in runs.seconds:
            medians = [statistics.median(runs.totals(name, number, clock)) for number in numbers]
            lines.append(row(f"  {name}", [f"{median:.2f}" for median in medians]))
        measured = [runs.ratios(number, clock) for number in numbers]
        texts = [f"{statistics.median(m):.2f} ({min(m):.2f} – {max(m):.2f})" for m in measured]
        predicted = [runs.predicted(number, clock) for number in numbers]
        off = [statistics.median(m) / p - 1 for m, p in zip(measured, predicted, strict=True)]
        lines += [
            row("  ratio", texts),
            row("  predicted from e and s", [f"{each:.2f}" for each in predicted]),
            row("  measured against it", [f"{each:+.1%}" for each in off]),
        ]
        if planned is not None:
            blank = [""] * (len(numbers) - 1)
            lines += [
                row("  predicted by merv plan", [*blank, f"{planned:.2f}"]),
                row(
                    "  measured against it", [*blank, f"{statistics.median(measured[-1]) / planned - 1:+.1%}"]
                ),
            ]
        e, s, read = (runs.median(name, clock) * 1e3 for name in ("e", "s", "read"))
        lines.append(
            f"  a clip alone: e {e:.0f} ms, s {s:.2f} ms; keys and reads from the store {read:.2f} ms"
        )
    return lines


def compare(encoders: MultiEncoder, clips: Sequence[Path], folder: Path) -> int:
    """Compare all stores in a folder with new features of the encoders; return the number of features."""
    count = 0
    stores = [FeatureStore(each, read_only=True) for each in sorted(folder.iterdir())]
    for clip in clips:
        for name, grid in encoders.features(clip).items():
            for store in stores:
                stored = store.get(encoders.key(clip, name))
                assert stored is not None, f"{clip.name}, {name}: not stored"
                assert stored.values.dtype == torch.float32
                for each in ("values", "mask", "times_s", "extent"):
                    equal = torch.equal(getattr(stored, each), getattr(grid, each))
                    assert equal, f"{clip.name}, {name}: {each} differ"
                count += 1
    return count


# With SmolLM2 -----------------------------------------------------------------------------------


class Watch(Callback):
    """Notes the loss of each step and the time from the start to the end of each pass."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[Seconds] = []
        self.start = Seconds.now()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds.append(self.start.passed())


def module(store: str | None) -> Training:
    """The Training of the recipe, which trains projector and mixer in float32."""
    options = {
        **RECIPE["model"],
        "trainable": ["projector", "mixer"],
        "dtype": "fp32",
        "feature_store": store,
    }
    del options["lora"], options["lr_overrides"]
    return Training(**options)


def fit(questions: Path, passes: int, store: Path | None) -> tuple[Training, Watch]:
    """Train as `merv fit` does."""
    torch.manual_seed(0)
    training = module(None if store is None else str(store))
    training.configure_model()
    data = ChatData(str(questions), batch_size=LLM_BATCH, num_workers=0)
    watch = Watch()
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_epochs=passes,
        callbacks=[watch],
        default_root_dir=questions.parent,
    )
    with contextlib.redirect_stdout(sys.stderr):  # a table of the parts
        watch.start = Seconds.now()
        trainer.fit(training, data)
    return training, watch


def step_alone(training: Training, questions: Path) -> Seconds:
    """Time of a step of the LLM, a clip, with features in memory."""
    data = ChatData(str(questions), batch_size=LLM_BATCH, num_workers=0)
    data.open_files()
    groups = [sample.conversations for sample in data.train]
    model = training.train().model
    assert model is not None
    optimizer = torch.optim.AdamW(training.parameter_groups(), lr=1e-4)
    store, model.feature_store = model.feature_store, FeatureStore()
    assert store is not None
    for clip in {path for _, path in data.videos()}:
        for name, _ in model.vision.named():
            key = model.vision.key(clip, name)
            grid = store.get(key)
            assert grid is not None
            model.feature_store.put(key, grid)

    def steps() -> None:
        for i in range(0, len(groups), LLM_BATCH):
            out = model(groups[i : i + LLM_BATCH])
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps()
    start = Seconds.now()
    steps()
    return start.passed(len(groups))


def planned(questions: Path, passes: int) -> tuple[float, float, float]:
    """What `merv plan` predicts: the ratio, and FLOPs of encoders and LLM for a clip."""
    plans = [
        make_plan(
            module(store),
            ChatData(str(questions), batch_size=LLM_BATCH, num_workers=0),
            Setup(max_epochs=passes),
            gpu=False,
        )
        for store in (None, "features")
    ]
    without, stored = (plan.hours(1.0, 1.0) for plan in plans)
    assert without
    assert stored
    return without / stored, plans[1].encode_flops, sum(plans[1].flops.values()) / LLM_BATCH


def answer(data: Path, folder: Path, passes: int, clips: int, repeats: int) -> tuple[list[str], int]:
    """Train with SmolLM2; return the lines of the table, and how many features were compared."""
    rows = read_rows(data / "train.jsonl")[:clips]
    questions = data / "one_question.jsonl"
    shorter = [{"video": row["video"], "questions": row["questions"][:1]} for row in rows]
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in shorter), encoding="utf-8")
    paths = [data / row["video"] for row in rows]
    flops_ratio, encoders_flops, llm_flops = planned(questions, passes)
    runs = Runs()
    for repeat in range(repeats):
        with_store: Training | None = None
        for name in both(repeat):
            stored_in = folder / str(repeat) if name == STORE else None
            training, watch = fit(questions, passes, stored_in)
            runs.add(name, watch.seconds, watch.losses)
            with_store = training if name == STORE else with_store
        assert with_store is not None
        assert with_store.model is not None
        vision = with_store.model.vision
        read = read_alone(vision, paths, folder / str(repeat))
        runs.add_alone(e=encode_alone(vision, paths), s=step_alone(with_store, questions), read=read)
    e, s = (runs.median(name, "cpu") * 1e9 for name in ("e", "s"))
    lines = [
        f"With SmolLM2: {clips} clips with one question × {passes} passes × {repeats} repetitions",
        *table(runs, sorted({1, passes}), flops_ratio),
        f"GFLOP a clip: encoders {encoders_flops / 1e9:.1f} ({encoders_flops / e:.0f} a second of the CPU, "
        f"decoding included), LLM {llm_flops / 1e9:.1f} ({llm_flops / s:.0f} a second)",
        runs.check_losses(),
    ]
    return lines, compare(vision, paths, folder)


def main() -> None:
    """Measure, print, and write the results if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--passes", type=int, default=10, help="without an LLM; half as many with it")
    parser.add_argument(
        "--clips", type=int, default=12, help="without an LLM; half as many with it, in pairs"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repetitions")
    parser.add_argument("--quick", action="store_true", help="2 clips, 4 passes, 1 repetition: a test")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/store_training.txt")
    args = parser.parse_args()
    if args.quick:
        args.passes, args.clips, args.repeats = 4, 2, 1
    if args.passes < 1 or args.clips < LLM_BATCH or args.repeats < 1:
        parser.error(f"expected at least 1 pass, {LLM_BATCH} clips and 1 repetition")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Lightning: few workers, no logger
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp())
    try:
        data = folder / "data"
        make_data(data, {"train": args.clips}, seed=0)
        without, count = classify(data, folder / "classify", args.passes, args.repeats)
        print("\n".join(without), flush=True)
        llm_passes = max(1, args.passes // 2)
        llm_clips = LLM_BATCH * max(1, args.clips // 2 // LLM_BATCH)  # whole batches, as plans assume
        with_llm, more = answer(data, folder / "answer", llm_passes, llm_clips, args.repeats)
        equal = f"Features: all {count + more} in the stores equal those of the encoders bit for bit"
    finally:
        shutil.rmtree(folder)
    text = "\n".join([f"python {' '.join(sys.argv)}", "", *without, "", *with_llm, "", equal, ""])
    print("", text, sep="\n")
    if args.write:
        (Path(__file__).parents[1] / "results" / "store_training.txt").write_text(text)


if __name__ == "__main__":
    main()
