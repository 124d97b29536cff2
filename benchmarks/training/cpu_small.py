"""Run the recipe cpu_small and report its time, loss curve and accuracy per kind of question.

    merv download
    python benchmarks/training/cpu_small.py [--out outputs/cpu_small] [--publish]

Clips and questions are those of the demo. The plot shows what the run logged: the loss, the accuracy on
held-out clips, and the weight of each encoder in the mixer.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from merv.demo.run import machine

RESULTS = Path(__file__).parent.parent / "results"


def column(rows: Sequence[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a column has a value, and the values."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]


def accuracies(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the columns of exact matches, and what each is about: a kind of question, or "all"."""
    columns = sorted(name for name in rows[0] if name.startswith("val/exact_match"))
    return {name: name.removeprefix("val/exact_match").lstrip("/") or "all" for name in columns}


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Plot loss, accuracies and mixer weights over the steps."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    left.plot(*column(rows, "loss"), linewidth=1)
    left.set(title="Loss (nats per answer token)", xlabel="step", ylim=(0, None))
    for name, label in accuracies(rows).items():
        steps, values = column(rows, name)
        width = 3 if label == "all" else 1.5
        middle.plot(steps, [100 * v for v in values], marker="o", linewidth=width, label=label)
    middle.set(title="Held-out questions answered exactly (%)", xlabel="step", ylim=(0, 102))
    middle.legend(fontsize=8)
    for name in sorted(name for name in rows[0] if name.startswith("mix_weight/")):
        right.plot(*column(rows, name), linewidth=1, label=name.removeprefix("mix_weight/"))
    right.set(title="Mean weight in the mixer", xlabel="step", ylim=(0, 1))
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make the data, train, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/cpu_small"))
    parser.add_argument(
        "--publish", action="store_true", help="copy the table and the plot to benchmarks/results"
    )
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out / "logs", ignore_errors=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    merv = [sys.executable, "-m", "merv.cli.main"]
    subprocess.run([*merv, "demo", "--only-data", "--out", out], check=True)
    start_s = time.monotonic()
    options = {
        "model.feature_store": out / "features",
        "data.train": out / "train.jsonl",
        "data.val": out / "held_out.jsonl",
        "trainer.default_root_dir": out,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([*merv, "fit", "--config", "cpu_small", *arguments], check=True)
    minutes = (time.monotonic() - start_s) / 60
    (table,) = out.rglob("metrics.csv")
    rows = list(csv.DictReader(table.open()))
    draw(rows, out / "cpu_small.png")
    last = {label: column(rows, name)[1][-1] for name, label in accuracies(rows).items()}
    size = (out / "model/model.safetensors").stat().st_size / 1e6
    steps = column(rows, "val/exact_match")[0][-1] + 1
    peak = max(column(rows, "memory_gb")[1])
    lines = [
        f"`python benchmarks/training/cpu_small.py`, {machine()}: {steps} steps in {minutes:.1f} minutes,",
        f"including encoding, validation and checkpoints; peak memory {peak:.1f} GB; {size:.1f} MB trained.",
        "",
        "| held-out questions | answered exactly |",
        "|---|---|",
        *(f"| {label} | {100 * value:.1f} % |" for label, value in last.items()),
        "",
        "![Loss, accuracy and weights over the steps](cpu_small.png)",
        "",
    ]
    (out / "cpu_small.md").write_text("\n".join(lines))
    print("\n".join(lines))
    if args.publish:
        for name in ("cpu_small.md", "cpu_small.png"):
            shutil.copy(out / name, RESULTS / name)


if __name__ == "__main__":
    main()
