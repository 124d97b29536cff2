"""The same 20 steps in other arrangements: by how much do the trained weights differ?

    python benchmarks/training/equal.py [--out outputs/equal] [--publish]

One process with batches of 4, against: micro-batches of 2 or 1 that are accumulated; DDP with two processes;
DDP that accumulates too; FSDP2 with two processes (gloo). Samples have answers of unequal length, so a mean
of means would show. fp32, on the CPU; the largest difference of any trained weight, relative to how far the
weights have moved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from material import make, options
from safetensors.torch import load_file

from merv.demo.run import machine

RESULTS = Path(__file__).parent.parent / "results"
ARRANGEMENTS: dict[str, dict[str, object]] = {
    "one process, batch 4": {},
    "accumulated, 2 × 2": {"data__batch_size": 2, "trainer__accumulate_grad_batches": 2},
    "accumulated, 4 × 1": {"data__batch_size": 1, "trainer__accumulate_grad_batches": 4},
    "two rows packed into one": {"model__packed_length": 200},
    "gradient checkpointing": {"model__gradient_checkpointing": "true"},
    "DDP, 2 processes × 2": {"data__batch_size": 2, "trainer__devices": 2, "trainer__strategy": "ddp"},
    "DDP, 2 × 1, accumulated 2": {
        "data__batch_size": 1,
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
        "trainer__accumulate_grad_batches": 2,
    },
    "FSDP2, 2 processes × 2": {"data__batch_size": 2, "trainer__devices": 2, "trainer__strategy": "sharded"},
}


def main() -> None:
    """Run all of them, print and keep a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/equal"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--publish", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args()
    base = args.out.resolve()
    make(base / "data")
    trained = {}
    for number, (name, more) in enumerate(
        {"start": {"trainer__max_steps": 1, "model__lr": 0}, **ARRANGEMENTS}.items()
    ):
        out = base / f"{number}"
        shutil.rmtree(out, ignore_errors=True)
        steps = {
            "trainer__max_steps": args.steps,
            "data__batch_size": 4,
            "checkpoints__every_n_steps": args.steps,
        }
        command = [
            sys.executable,
            "-m",
            "merv.cli.main",
            "fit",
            *options(base / "data", out, **{**steps, **more}),
        ]
        print(f"{name} …", flush=True)
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        trained[name] = load_file(out / "model/model.safetensors")
    start, one = trained.pop("start"), next(iter(trained.values()))
    moved = max(float((one[n] - start[n]).abs().max()) for n in one)
    lines = ["| arrangement | largest difference of a weight |", "|---|---|"]
    for name, state in trained.items():
        worst = max(float((state[n] - one[n]).abs().max()) for n in one)
        lines.append(f"| {name} | {worst:.1e} |")
    ran = f"`python benchmarks/training/equal.py`, {machine()}"
    head = f"{ran}. {args.steps} steps moved weights by up to {moved:.2g}."
    text = "\n".join([head, "", *lines, ""])
    print(text)
    if args.publish:
        (RESULTS / "equal.md").write_text(text)


if __name__ == "__main__":
    main()
