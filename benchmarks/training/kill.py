"""Kill runs in every phase, resume them, and compare weights and samples with an uninterrupted run.

    python benchmarks/training/kill.py [--out outputs/kill] [--each 5] [--publish]

Each run is a process that gets SIGKILL, which it cannot catch, in one phase: while it waits for data, in the
forward pass, in the middle of the backward pass, in the optimizer, while it writes a checkpoint, or between
epochs. `--ckpt_path=auto` resumes it. It is killed again in one of its first forward passes, if there are any
left, and resumed again. At the end, model.safetensors must have the same bytes as without a kill, and every
step must have trained on the same samples. The run has a LoRA with dropout, accumulates gradients, validates
within epochs, mixes two data sets by weight, and groups by length; every second run has two workers.
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

import lightning  # noqa: F401 (imported once for all runs, which are forks)
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
    """Send SIGKILL to the run, also from one of its workers."""
    os.kill(RUN, signal.SIGKILL)
    os._exit(1)  # only a worker gets here


RUN = 0  # process id of the run


def dying_at(count: int, function: Callable[..., Any], after: bool = True) -> Callable[..., Any]:
    """Wrap a function so that its count-th call kills the run; if not `after`, before it does its work."""
    calls = Counter[str]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["now"] += 1
        if calls["now"] == count and not after:
            die()
        result = function(*args, **kwargs)
        if calls["now"] == count:
            die()
        return result

    return counted


def half_saved(count: int) -> Callable[..., Any]:
    """Return a torch.save that writes half of the file at its count-th call and kills the run."""
    calls, save = Counter[str](), torch.save

    def saving(value: Any, file: Any) -> None:
        calls["now"] += 1
        save(value, file)
        if calls["now"] == count:
            file.truncate(file.tell() // 2)
            die()

    return saving


def arm(phase: str, count: int) -> None:
    """Make this process kill itself when it reaches a phase for the count-th time."""
    if phase == "data":
        Reader.__call__ = dying_at(count, Reader.__call__, after=count % 2 == 0)  # type: ignore[method-assign]
    elif phase == "forward":
        VideoLLM.logits = dying_at(count, VideoLLM.logits)  # type: ignore[method-assign]
    elif phase == "backward":
        forward, kill = VideoLLM.forward, dying_at(count, lambda gradient: None)

        def hooked(self: VideoLLM, *args: Any, **options: Any) -> Any:
            weight = self.fusion.projectors["fake"].linear.weight
            if not getattr(weight, "hooked", False):
                weight.register_hook(kill)
                weight.hooked = True  # type: ignore[attr-defined]
            return forward(self, *args, **options)

        VideoLLM.forward = hooked  # type: ignore[method-assign]
    elif phase == "optimizer":
        torch.optim.AdamW.step = dying_at(count, torch.optim.AdamW.step)  # type: ignore[method-assign]
    elif phase == "checkpoint":
        if count % 3 == 0:
            torch.save = half_saved(count // 3)  # type: ignore[assignment]
        else:  # before or after the folder is renamed to its final name
            os.replace = dying_at(1 + count // 3, os.replace, after=count % 3 == 1)  # type: ignore[assignment]
    elif phase == "epoch":
        TrainedOn.on_train_epoch_end = dying_at(count, lambda *_: None)  # type: ignore[method-assign]


def child(out: Path, arguments: list[str], trap: tuple[str, int] | None = None) -> int:
    """Run `merv fit` in a fork; return its exit status, which is -9 if it was killed."""
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
    """Return the arguments of a run, with every option that could break resuming."""
    callback = {"class_path": "trained_on.TrainedOn", "init_args": {"path": str(out / "trained.jsonl")}}
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
        trainer__callbacks=json.dumps([callback]),
        trainer__num_sanity_val_steps=0,
        trainer__val_check_interval=5,
        checkpoints__every_n_steps=2,
        ckpt_path="auto",
    )


def main() -> None:
    """Run once without a kill, then with kills, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/kill"))
    parser.add_argument(
        "--each", type=int, default=5, help="runs killed in each phase (default: %(default)s)"
    )
    parser.add_argument("--publish", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args()
    base = args.out.resolve()
    shutil.rmtree(base, ignore_errors=True)
    make(base / "data")
    whole = base / "whole"
    whole.mkdir()
    if child(whole, arguments(base / "data", whole, 0)):
        raise SystemExit(f"The run without a kill failed. See {whole / 'log.txt'}")
    weights = (whole / "model/model.safetensors").read_bytes()
    samples = read(whole / "trained.jsonl")
    table = {phase: Counter[str]() for phase in PHASES}
    for phase, number in tqdm([(p, n) for p in PHASES for n in range(args.each)], "Kills"):
        out = base / f"{phase}-{number}"
        out.mkdir()
        run_arguments = arguments(base / "data", out, workers=2 * (number % 2))
        count = 1 + (number * max(1, PHASES[phase] // args.each)) % PHASES[phase]
        row = table[phase]
        row["killed"] += child(out, run_arguments, (phase, count)) == -signal.SIGKILL
        status = child(out, run_arguments, ("forward", 2 + number % 4))
        row["killed again"] += status == -signal.SIGKILL
        row["completed"] += (child(out, run_arguments) if status else status) == 0
        if (out / "model/model.safetensors").is_file():
            row["equal weights"] += (out / "model/model.safetensors").read_bytes() == weights
            row["equal samples"] += read(out / "trained.jsonl") == samples
    columns = ("killed", "killed again", "completed", "equal weights", "equal samples")
    lines = [f"| phase | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {phase} | " + " | ".join(str(row[c]) for c in columns) + " |" for phase, row in table.items()
    ]
    total = sum(table.values(), Counter())
    lines += ["| total | " + " | ".join(str(total[c]) for c in columns) + " |"]
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


# Phase → a number of times that every run reaches it. The kills are spread over them.
PHASES = {"data": 20, "forward": 48, "backward": 48, "optimizer": 24, "checkpoint": 24, "epoch": 3}

if __name__ == "__main__":
    main()
