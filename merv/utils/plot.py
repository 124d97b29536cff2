"""Plots: the loss of a run, and the frames, mix weights and answers of one clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

COLORS = ("#3b6fb6", "#d9772b", "#4f9d69", "#a0508f", "#8c7853", "#6b7280")


def draw_loss(losses: Sequence[tuple[int, float]], path: str | Path) -> None:
    """Draw the loss and its running mean.

    Args:
        losses: Pairs (step, loss).
        path: The image file to write.
    """
    figure, axes = _figure(8, 4)
    steps, values = np.array(losses).T
    window = max(1, len(values) // 25)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps, values, color=COLORS[0], alpha=0.25, linewidth=1)
    axes.plot(steps[window - 1 :], smooth, color=COLORS[0], linewidth=2)
    axes.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
    _save(figure, path)


def draw_clip(
    pictures: Sequence[np.ndarray],
    picture_times_s: Sequence[float],
    weights: Tensor | None,
    times_s: Sequence[float],
    encoders: Sequence[str],
    answers: Sequence[tuple[str, str, str]],
    path: str | Path,
    title: str = "",
) -> None:
    """Draw one clip: its frames, the mix weight of each encoder over time, questions and answers.

    Args:
        pictures: RGB arrays [H, W, 3].
        picture_times_s: Time of each picture, in seconds.
        weights: Mix weights [E, t], which sum to 1 over the encoders; None if the mixer has none.
        times_s: Time of each step of `weights`, in seconds.
        encoders: Names of the encoders.
        answers: Triples (question, answer, expected answer).
        path: The image file to write.
        title: Title of the figure.
    """
    heights = [1.6, 1.8, 0.35 + 0.28 * len(answers)]
    figure, (frames, curve, text) = _figure(11, 5.6, rows=3, height_ratios=heights)
    frames.set_title(title, loc="left", fontsize=11)
    _draw_frames(frames, pictures, picture_times_s)
    curve.axis("off")
    if weights is not None:
        curve.axis("on")
        curve.stackplot(times_s, *weights.tolist(), labels=encoders, colors=COLORS, step="mid", alpha=0.85)
        curve.set(xlim=(times_s[0], times_s[-1]), ylim=(0, 1), xlabel="time (s)", ylabel="weight in the mix")
        curve.legend(loc="upper right", ncols=len(encoders), fontsize=9)
    text.axis("off")
    for i, (question, answer, expected) in enumerate(answers):
        height = 1 - (i + 0.5) / len(answers)
        verdict = "" if answer.lower().strip(" .") == expected else f"   (expected: {expected})"
        text.text(0, height, question, fontsize=10, va="center")
        text.text(0.62, height, f"{answer}{verdict}", fontsize=10, va="center", weight="bold")
    _save(figure, path)


def _draw_frames(axes: Any, pictures: Sequence[np.ndarray], times_s: Sequence[float]) -> None:
    """Draw pictures side by side, with their times below."""
    gap = ((0, 0), (0, 4), (0, 0))
    axes.imshow(np.concatenate([np.pad(picture, gap, constant_values=255) for picture in pictures], axis=1))
    width = pictures[0].shape[1] + 4
    centers = [width * (i + 0.5) for i in range(len(pictures))]
    axes.set_xticks(centers, [f"{time:.1f} s" for time in times_s])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _figure(width: float, height: float, rows: int = 1, **grid: Any) -> Any:
    from matplotlib.figure import Figure  # unlike pyplot, needs no display and no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, gridspec_kw=grid or None)


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
