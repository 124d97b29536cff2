"""Compare the frames and the speed of the decoding backends.

    python benchmarks/robustness/backends.py FOLDER

The script reads every valid video of material.py, which it generates, and every file in FOLDER with PyAV
and with torchcodec: all frames (64 of long clips) in random order. The generated frames show their own index:
"carried" is the number of frames that show the same index with both. "max" and "mean" are differences between
pixels in levels of 255. Then it measures the time for 16 uniformly spaced frames of each file in FOLDER,
including opening, scanning and decoding. The time is the minimum of 7 runs; the backends alternate.

Why pixels differ: both backends convert with libswscale, and do so equally if it has a direct conversion.
Otherwise (more than 8 bits, 4:1:0, 4:1:1, odd sizes) PyAV upsamples the color planes bilinearly and uses
the chroma location of the frame, while torchcodec upsamples bicubically and ignores it. PyAV's FFmpeg
converts the two fields of an interlaced frame separately, FFmpeg 5 converts the whole frame. Without this
metadata, and with bicubic upsampling, PyAV returns the same pixels as torchcodec.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from burned import index_of
from material import generate
from torchcodec import ffmpeg_major_version

from merv.errors import VideoError
from merv.video.load import load_video
from merv.video.open import open_video
from merv.video.reader import VideoReader

ROW = "{:28} {:>6} {:>6} {:>8} {:>4} {:>6}  {}"
TIMED = "{:28} {:>8} {:>10} {:>6}"


@dataclass
class Outcome:
    """The result for one file: a line of the table, and whether it was equal or refused."""

    line: str
    equal: bool = False
    refused: bool = False


def compare(name: str, path: Path, shows_index: bool = False, gray: bool = False) -> Outcome:
    """Read a file with both backends and compare; `gray`: its index is shown without colors."""
    with open_video(path) as ours:
        try:
            with open_video(path, backend="torchcodec") as theirs:
                return compared(name, ours, theirs, shows_index, gray)
        except VideoError as error:
            reason = str(error).partition(": ")[2].removeprefix("torchcodec cannot read it: ")
            # Either torchcodec's reader or PyAV's scan refused the file.
            reason = f"refused: {reason.partition('. Try backend=')[0]}"
            return Outcome(ROW.format(name, ours.info.num_frames, "", "", "", "", reason), refused=True)


def compared(name: str, ours: VideoReader, theirs: VideoReader, shows_index: bool, gray: bool) -> Outcome:
    """Compare two readers of one file frame by frame."""
    frames = ours.info.num_frames
    chosen = random.Random(0).sample(range(frames), min(frames, 64))
    same_times = ours.info.times_s == theirs.info.times_s
    pixels, others = ours.read(chosen), theirs.read(chosen)
    difference = (pixels.int() - others.int()).abs()
    same = len(chosen)
    if shows_index:
        carried, found = ([index_of(p.numpy(), gray) for p in read] for read in (pixels, others))
        same = sum(a == b for a, b in zip(carried, found, strict=True))
    line = ROW.format(
        name,
        frames,
        "equal" if same_times else "DIFFER",
        f"{same}/{len(chosen)}" if shows_index else "",
        difference.max().item(),
        f"{difference.float().mean().item():.3f}",
        "" if not difference.any() else color(ours),
    )
    return Outcome(line, equal=same_times and same == len(chosen))


def color(reader: VideoReader) -> str:
    """Describe how the frames of a video are stored."""
    first = reader._first_frame  # type: ignore[attr-defined]
    return f"{first.format.name}, range {first.color_range}, matrix {first.colorspace}, {first.width} wide"


def seconds(path: Path, repeats: int = 7) -> dict[str, float]:
    """Return backend → the minimum time for 16 frames."""
    took: dict[str, list[float]] = {"pyav": [], "torchcodec": []}
    for _ in range(repeats):
        for backend, times in took.items():
            begin = time.perf_counter()
            load_video(path, num_frames=16, backend=backend)
            times.append(time.perf_counter() - begin)
    return {backend: min(times) for backend, times in took.items()}


def main(folder: Path) -> None:
    """Print the tables of frames and of times."""
    torch.set_num_threads(1)
    clips = sorted(path for path in folder.iterdir() if path.is_file())
    print(f"PyAV {version('av')}, torchcodec {version('torchcodec')} with FFmpeg {ffmpeg_major_version}\n")
    print(ROW.format("file", "frames", "times", "carried", "max", "mean", ""))
    with tempfile.TemporaryDirectory() as scratch:
        made = generate(Path(scratch))
        work = [partial(compare, case.name, path, case.pixels, case.gray) for case, path in made]
        outcomes = []
        for one in [*work, *(partial(compare, path.name, path) for path in clips)]:
            outcomes.append(one())
            print(outcomes[-1].line, flush=True)
    equal, refused = sum(o.equal for o in outcomes), sum(o.refused for o in outcomes)
    print(f"{equal} of {len(outcomes)} files equal in times and frames, {refused} refused\n")
    print(TIMED.format("16 frames of", "PyAV ms", "torchcodec", "ratio"))
    ratios = []
    for path in clips:
        ours, theirs = seconds(path).values()
        ratios.append(ours / theirs)
        print(TIMED.format(path.name, f"{ours * 1e3:.1f}", f"{theirs * 1e3:.1f}", f"{ours / theirs:.2f}"))
    mean = torch.tensor(ratios).log().mean().exp().item()
    print(f"torchcodec is {mean:.2f} times as fast as PyAV (geometric mean of {len(ratios)} clips)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    main(parser.parse_args().folder)
