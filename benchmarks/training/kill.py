"""Kill a run at every point, go on, and compare: weights to the bit, samples one by one.

    python benchmarks/training/kill.py [--out outputs/kill] [--each 5]

Each run is a process of its own that gets SIGKILL, which no program can see coming, inside one phase: while
it waits for data, in the forward pass, half-way back, in the optimizer, while a checkpoint is written,
between epochs. Then `--ckpt_path=auto` goes on, is killed once more in one of its first forward passes, if it
comes to that, and goes on. In the end there must be the same bytes in model.safetensors as without any kill,
and every step must have trained on the same samples. The run has a LoRA with dropout, accumulates gradients,
validates within epochs, mixes two sets by weight, groups by length; every second one has two workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning  # noqa: F401 (loaded once, here: the runs are forks)
import torch
import transformers  # noqa: F401
from material import make, options
from tqdm import tqdm
from trained_on import TrainedOn, read

from merv.cli.fit import run
from merv.demo.run import machine
from merv.features.reader import Reader
from merv.models.video_llm import VideoLLM

RESULTS = Path(__file__).parent.parent / "results"


def die() -> None:
    """SIGKILL, to the run even where one of its workers is here."""
    os.kill(RUN, signal.SIGKILL)
    os._exit(1)  # a worker; the run itself does not come here


RUN = 0  # the process of the run


def at(count: int, work: Callable[..., Any], after: bool = True) -> Callable[..., Any]:
    """`work`, that kills the run at its count-th call: when it is done, or before it begins."""
    calls = Counter[str]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["now"] += 1
        if calls["now"] == count and not after:
            die()
        done = work(*args, **kwargs)
        if calls["now"] == count:
            die()
        return done

    return counted


def half_saved(count: int) -> Callable[..., Any]:
    """torch.save that at its count-th call writes half of the file and kills the run."""
    calls, save = Counter[str](), torch.save

    def saving(what: Any, to: Any) -> None:
        calls["now"] += 1
        save(what, to)
        if calls["now"] == count:
            to.truncate(to.tell() // 2)
            die()

    return saving


def arm(phase: str, count: int) -> None:
    """Set the trap in this process."""
    if phase == "data":
        Reader.__call__ = at(count, Reader.__call__, after=count % 2 == 0)  # type: ignore[method-assign]
    elif phase == "forward":
        VideoLLM.logits = at(count, VideoLLM.logits)  # type: ignore[method-assign]
    elif phase == "backward":
        forward, kill = VideoLLM.forward, at(count, lambda gradient: None)

        def hooked(self: VideoLLM, *args: Any, **options: Any) -> Any:
            weight = self.fusion.projectors["fake"].linear.weight
            if not getattr(weight, "hooked", False):
                weight.register_hook(kill)
                weight.hooked = True  # type: ignore[attr-defined]
            return forward(self, *args, **options)

        VideoLLM.forward = hooked  # type: ignore[method-assign]
    elif phase == "optimizer":
        torch.optim.AdamW.step = at(count, torch.optim.AdamW.step)  # type: ignore[method-assign]
    elif phase == "checkpoint":
        if count % 3 == 0:
            torch.save = half_saved(count // 3)  # type: ignore[assignment]
        else:  # before or after the folder gets its name
            os.replace = at(1 + count // 3, os.replace, after=count % 3 == 1)  # type: ignore[assignment]
    elif phase == "epoch":
        TrainedOn.on_train_epoch_end = at(count, lambda *_: None)  # type: ignore[method-assign]


def child(out: Path, arguments: list[str], trap: tuple[str, int] | None = None) -> int:
    """`merv fit` in a fork of its own; its exit status, -9 where it was killed."""
    pid = os.fork()
    if pid == 0:
        global RUN
        RUN = os.getpid()
        log = os.open(out / "log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            if trap is not None:
                arm(*trap)
            status = run(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def arguments(data: Path, out: Path, workers: int) -> list[str]:
    """The run: everything that a resumed one could get wrong is on."""
    log = {"class_path": "trained_on.TrainedOn", "init_args": {"path": str(out / "trained.jsonl")}}
    sets = {str(data / "data.jsonl"): 2.0, str(data / "more.jsonl"): 1.0}
    return options(
        data,
        out,
        data__train=json.dumps(sets),
        data__val=data / "more.jsonl",
        data__batch_size=2,
        data__group_by_length="true",
        data__num_workers=workers,
        model__lora="{r: 2, lora_dropout: 0.1}",
        trainer__max_epochs=3,
        trainer__accumulate_grad_batches=2,
        trainer__callbacks=json.dumps([log]),
        trainer__num_sanity_val_steps=0,
        trainer__val_check_interval=5,
        checkpoints__every_n_steps=2,
        ckpt_path="auto",
    )


def main() -> None:
    """Once without a kill, then kill after kill; a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/kill"))
    parser.add_argument("--each", type=int, default=5, help="kills in each phase (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args()
    base = args.out.resolve()
    shutil.rmtree(base, ignore_errors=True)
    make(base / "data")
    whole = base / "whole"
    whole.mkdir()
    if child(whole, arguments(base / "data", whole, 0)):
        raise SystemExit(f"The run without a kill failed: see {whole / 'log.txt'}")
    weights = (whole / "model/model.safetensors").read_bytes()
    samples = read(whole / "trained.jsonl")
    table = {phase: Counter[str]() for phase in PHASES}
    for phase, number in tqdm([(p, n) for p in PHASES for n in range(args.each)], "Kills"):
        out = base / f"{phase}-{number}"
        out.mkdir()
        run_of = arguments(base / "data", out, workers=2 * (number % 2))
        count = 1 + (number * max(1, PHASES[phase] // args.each)) % PHASES[phase]
        row = table[phase]
        row["killed"] += child(out, run_of, (phase, count)) == -signal.SIGKILL
        ended = child(out, run_of, ("forward", 2 + number % 4))
        row["killed again"] += ended == -signal.SIGKILL
        row["went on"] += (child(out, run_of) if ended else ended) == 0
        if (out / "model/model.safetensors").is_file():
            row["equal weights"] += (out / "model/model.safetensors").read_bytes() == weights
            row["equal samples"] += read(out / "trained.jsonl") == samples
    columns = ("killed", "killed again", "went on", "equal weights", "equal samples")
    lines = [f"| phase | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {phase} | " + " | ".join(str(row[c]) for c in columns) + " |" for phase, row in table.items()
    ]
    total = sum(table.values(), Counter())
    lines += ["| all | " + " | ".join(str(total[c]) for c in columns) + " |"]
    steps = f"{len(samples)} batches in 3 epochs"
    text = "\n".join(
        [
            f"`python benchmarks/training/kill.py`, {machine()}; {steps}, a checkpoint every 2 steps.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if args.publish:
        (RESULTS / "kill.md").write_text(text)


# Phase → how often a run comes there, at least; the kills are spread over that.
PHASES = {"data": 20, "forward": 48, "backward": 48, "optimizer": 24, "checkpoint": 24, "epoch": 3}

if __name__ == "__main__":
    main()
