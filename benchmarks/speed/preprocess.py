"""Measure how much `resample="fast"` differs from PIL, and how much time it saves.

    python benchmarks/speed/preprocess.py [VIDEO ...] [--frames 8] [--threads 1]

Frames of the videos, or generated ones (waves, edges, noise), are squashed to 224×224. For each
interpolation, the script prints the maximum and the mean difference from the installed Pillow in levels of
255, the percentage of values that differ, and the CPU milliseconds per frame (the minimum of five runs; the
methods alternate). `bytes` is what "fast" does on a CPU. `floats` is what it does on other devices; here it
runs on the CPU to measure its error, so its time on a GPU is not measured. `columns` makes Pillow resample
columns before rows, as it always did before version 13.

Before the first run, we expected "fast" to be three times as fast on one thread, and no value to differ by
more than 1. Measured on an AMD EPYC (Zen 4) with Pillow 13: 2.4 to 7.2 times as fast, mostly 4 to 5 times. If
Pillow starts with the columns, as torch does, values differ by up to 2, in less than 1 % of cases (floats:
7 %). We did not expect that Pillow 13 starts with the rows if the height shrinks much more than the width.
Then "fast" and older Pillow versions differ by up to 7, in 5 to 21 % of cases. Floats in a single pass would
differ in 10 to 20 % (Pillow rounds after each pass).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from merv import load_video
from merv.types import Preset
from merv.video.transforms import _two_passes, resize

SIZES = ((240, 320), (256, 256), (640, 360), (720, 1280))
ROW = "{:24} {:9} {:9} {:7} {:>4} {:>9} {:>9} {:>9} {:>7}"


def main() -> None:
    """Print one row for each material, interpolation and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="VIDEO")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, Pillow {version('pillow')}, {args.threads} threads, to 224×224")
    print(ROW.format("material", "size", "filter", "method", "max", "mean", "differ %", "ms/frame", "ratio"))
    for name, pixels in material(args.videos, args.frames):
        for interpolation in ("bicubic", "bilinear"):
            for row in compare(pixels, Preset("squash", (224, 224), interpolation)):  # type: ignore[arg-type]
                height, width = pixels.shape[2:]
                print(ROW.format(name[:24], f"{width}×{height}", interpolation, *row), flush=True)


def material(videos: list[str], frames: int):
    """Yield names and frames, uint8 [T, 3, H, W]."""
    for video in videos:
        loaded = load_video(video, num_frames=frames)
        assert loaded is not None
        yield video.rpartition("/")[2], loaded.pixels[0]
    if not videos:
        for height, width in SIZES:
            yield "generated", generated(frames, height, width)


def generated(frames: int, height: int, width: int) -> Tensor:
    """Generate smooth waves, hard edges and a little noise, different in each frame and channel."""
    seed = torch.Generator().manual_seed(0)
    waves = interpolate(torch.rand(frames, 3, 9, 16, generator=seed), (height, width), mode="bicubic")
    edges = torch.rand(frames, 3, height // 16, width // 16, generator=seed).round()
    noise = torch.randn(frames, 3, height, width, generator=seed)
    pixels = 150 * waves + 80 * interpolate(edges, (height, width)) + 6 * noise
    return pixels.round().clamp(0, 255).to(torch.uint8)


def compare(pixels: Tensor, preset: Preset):
    """Yield method, maximum and mean difference, percentage that differs, milliseconds, and speedup."""
    columns = replace(preset, input_size=(pixels.shape[2], preset.input_size[1]))
    methods: dict[str, Callable[[], Tensor]] = {
        "exact": lambda: resize(pixels, preset)[0],
        "bytes": lambda: resize(pixels, preset, "fast")[0],
        "columns": lambda: resize(resize(pixels, columns)[0], preset)[0],
        "floats": lambda: _two_passes(pixels, preset.input_size, preset),
    }
    seconds = {method: float("inf") for method in methods}
    results = {}
    for _ in range(5):
        for method, run in methods.items():
            started = time.process_time()
            results[method] = run()
            seconds[method] = min(seconds[method], time.process_time() - started)
    for method in methods:
        off = (results[method].int() - results["exact"].int()).abs()
        yield (
            method,
            int(off.max()),
            f"{off.float().mean():.5f}",
            f"{100 * (off > 0).float().mean():.3f}",
            f"{1000 * seconds[method] / len(pixels):.2f}",
            f"{seconds['exact'] / seconds[method]:.2f}",
        )


if __name__ == "__main__":
    main()
