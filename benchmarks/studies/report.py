"""Tables, numbers and picture of the fusion study, from the saved results of its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merv.data.samples import Sample
from merv.demo.questions import KINDS
from merv.demo.run import machine

SINGLE = ("efficientnet_lite", "transnetv2")
FUSED = ("gate", "cross_attention", "concat_channels")
TITLES = {"readout": "Linear probe of the tokens", "llm": "Answers of SmolLM2-135M"}


def report(out: Path, test: Sequence[Sample], arms: Sequence[str]) -> None:
    """Print the tables; write fusion.md, fusion.json and fusion.png to `out`."""
    kinds = np.array([kind for sample in test for kind in sample.kinds])
    clip = np.array([i for i, sample in enumerate(test) for _ in sample.kinds])
    results: dict[str, Any] = {"machine": machine(), "clips": len(test), "questions": len(kinds)}
    for measure in TITLES:
        runs = load(out / measure, arms)
        if runs:
            results[measure] = {
                "accuracy": {row: by_kind(right, kinds) for row, right in runs.items()},
                "differences": differences(runs, clip),
            }
    times = [json.loads(path.read_text()) for path in (*out.glob("clips.json"), *out.glob("*/* *.json"))]
    results["hours"] = round(sum(run["seconds"] for run in times) / 3600, 2)
    results["core_hours"] = round(sum(run["core_seconds"] for run in times) / 3600, 2)
    (out / "fusion.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "fusion.md").write_text(markdown(results))
    print(markdown(results))
    draw(results, out / "fusion.png")


def load(folder: Path, arms: Sequence[str]) -> dict[str, np.ndarray]:
    """Return row of the table → [seeds, questions], 1 for a right answer."""
    rows: dict[str, np.ndarray] = {}
    for arm in arms:
        runs = [json.loads(path.read_text())["right"] for path in sorted(folder.glob(f"{arm} *.json"))]
        if not runs:
            continue
        rows[arm] = np.array([run["video"] for run in runs], dtype=float)
        if arm == "cross_attention":
            labels = {"shuffled": "frames shuffled", "blind": "asked without video"}
            for condition in (name for name in labels if name in runs[0]):
                rows[f"{arm}, {labels[condition]}"] = np.array([run[condition] for run in runs], dtype=float)
    return rows


def by_kind(right: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    """Return the percentage of right answers by kind, for all, and for all by seed."""
    of_kinds = {kind: round(100 * right[:, kinds == kind].mean(), 1) for kind in KINDS}
    return {
        **of_kinds,
        "all": round(100 * right.mean(), 1),
        "seeds": (100 * right.mean(axis=1)).round(1).tolist(),
    }


def differences(runs: dict[str, np.ndarray], clip: np.ndarray) -> dict[str, dict[str, Any]]:
    """Compare the best fused arm with the best single one and others: percentage points, 95 % interval."""
    mean = {name: right.mean() for name, right in runs.items()}
    fused = max((name for name in FUSED if name in mean), key=mean.__getitem__, default=None)
    single = max((name for name in SINGLE if name in mean), key=mean.__getitem__, default=None)
    rivals = [single, *(name for name in runs if name not in SINGLE and name not in FUSED)]
    return {
        f"{fused} − {rival}": interval(runs[fused], runs[rival], clip)
        for rival in rivals
        if fused is not None and rival is not None
    }


def interval(one: np.ndarray, other: np.ndarray, clip: np.ndarray, draws: int = 10_000) -> dict[str, Any]:
    """Return the difference in points and its 95 % interval, by a paired bootstrap over clips and seeds."""
    both = min(len(one), len(other))
    count = np.bincount(clip)
    won = np.stack([np.bincount(clip, weights=one[s] - other[s]) for s in range(both)])  # [seeds, clips]
    rng = np.random.default_rng(0)
    points = []
    for _ in range(draws):
        seeds, clips = rng.integers(both, size=both), rng.integers(len(count), size=len(count))
        points.append(100 * won[seeds][:, clips].sum() / (both * count[clips].sum()))
    low, high = np.percentile(points, [2.5, 97.5])
    return {
        "points": round(100 * float(won.sum() / (both * count.sum())), 1),
        "interval": [round(float(low), 1), round(float(high), 1)],
    }


def markdown(results: dict[str, Any]) -> str:
    """Return one table per measure, followed by the differences."""
    lines = []
    for measure, title in TITLES.items():
        if measure not in results:
            continue
        lines += [f"**{title}**, % right", "", f"| arm | {' | '.join(KINDS)} | all | all, by seed |"]
        lines.append("|---|" + "---:|" * (len(KINDS) + 1) + "---|")
        for arm, row in results[measure]["accuracy"].items():
            cells = [f"{row[column]:.1f}" for column in (*KINDS, "all")]
            lines.append(f"| {arm} | {' | '.join(cells)} | {', '.join(map(str, row['seeds']))} |")
        lines += ["", "| difference | points | 95 % interval |", "|---|---:|---|"]
        for name, difference in results[measure]["differences"].items():
            low, high = difference["interval"]
            lines.append(f"| {name} | {difference['points']:+.1f} | {low:+.1f} to {high:+.1f} |")
        lines.append("")
    asked = f"{results['questions']} questions about {results['clips']} held-out clips"
    lines.append(f"{asked}; {results['core_hours']} core hours on {results['machine']}.")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw one panel per measure: arms by kinds of question, colored by accuracy."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measures = [measure for measure in TITLES if measure in results]
    heights = [len(results[measure]["accuracy"]) for measure in measures]
    figure, panels = plt.subplots(
        len(measures),
        1,
        figsize=(8, 1.3 * len(measures) + 0.36 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    columns = (*KINDS, "all")
    for measure, panel in zip(measures, panels[:, 0], strict=True):
        accuracy = results[measure]["accuracy"]
        values = np.array([[row[column] for column in columns] for row in accuracy.values()])
        panel.imshow(values, cmap="YlGnBu", vmin=0, vmax=130, aspect="auto")
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(accuracy)), list(accuracy))
        panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        panel.axvline(len(KINDS) - 0.5, color="white", linewidth=4)
        for (i, j), value in np.ndenumerate(values):
            weight, color = "bold" if j == len(KINDS) else None, "white" if value > 75 else "black"
            panel.text(j, i, f"{value:.0f}", ha="center", va="center", weight=weight, color=color)
        panel.set_title(
            f"{TITLES[measure]}: % right on held-out clips", loc="left", fontsize=11, weight="bold"
        )
        panel.spines[:].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
