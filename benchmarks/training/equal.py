"""Train the same steps in several arrangements and compare the trained weights.

    python benchmarks/training/equal.py [--out outputs/equal] [--steps 20] [--publish]

The reference is one process with batches of 4. It is compared with accumulated micro-batches of 2 or 1,
packing, gradient checkpointing, DDP with two processes, DDP with accumulation, and FSDP2 with two processes
(gloo). The answers have unequal lengths, so averaging the means of micro-batches would show as a difference.
All runs are in fp32 on the CPU. The table has the largest absolute difference of any trained weight; the line
above it says how far training moved the weights.
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
    """Run all arrangements and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/equal"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--publish", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args()
    base = args.out.resolve()
    make(base / "data")
    trained = {}
    for number, (name, changes) in enumerate(
        {"start": {"trainer__max_steps": 1, "model__lr": 0}, **ARRANGEMENTS}.items()
    ):
        out = base / f"{number}"
        shutil.rmtree(out, ignore_errors=True)
        common = {
            "trainer__max_steps": args.steps,
            "data__batch_size": 4,
            "checkpoints__every_n_steps": args.steps,
        }
        command = [
            sys.executable,
            "-m",
            "merv.cli.main",
            "fit",
            *options(base / "data", out, **{**common, **changes}),
        ]
        print(f"{name} …", flush=True)
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
        )
        if result.returncode:
            raise SystemExit(f"{name} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
        trained[name] = load_file(out / "model/model.safetensors")
    start, reference = trained.pop("start"), next(iter(trained.values()))
    moved = max(float((reference[n] - start[n]).abs().max()) for n in reference)
    lines = ["| arrangement | largest difference of a weight |", "|---|---|"]
    for name, state in trained.items():
        worst = max(float((state[n] - reference[n]).abs().max()) for n in reference)
        lines.append(f"| {name} | {worst:.1e} |")
    command_line = f"`python benchmarks/training/equal.py`, {machine()}"
    head = f"{command_line}. {args.steps} steps moved the weights by up to {moved:.2g}."
    text = "\n".join([head, "", *lines, ""])
    print(text)
    if args.publish:
        (RESULTS / "equal.md").write_text(text)


if __name__ == "__main__":
    main()
