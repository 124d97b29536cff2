"""Check that every hard input is read, or refused with a helpful error.

    python benchmarks/robustness/hard.py [--keep FOLDER] [NAME ...]

Each case is generated and read in its own process with a time limit. A case that is read must return the
requested frames in any order, identified by the index that they show, with the right times, size and
colors. An error must be the expected one, name the file and suggest what to do. The frames of a damaged
file that on_error="partial" returns must have the right indices and times. Nothing that a file refers to
may be opened. NAMEs select the cases whose names contain one of them. --keep writes the files into a new
folder and keeps them. The script prints a table. The exit status is 1 if a result is not as expected, or if a
case takes more than 10 s.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from awkward import awkward
from broken import TOUCHED, damaged, no_video, pointers
from burned import index_of, picture
from confined import Outcome, confined
from material import Case, valid_videos
from odd import odd_files
from stills import pictures

from merv.errors import VideoError
from merv.video.open import open_video

LIMIT_S = 30
SLOW_S = 10.0
ADVICE = ("on_error=", "Pass ", "max_pixels=", "download it", "Save it", "load_video(", "Check ")
ROW = "{:17} {:28} {:16} {:>7} {:>7} {:>6}  {}"


def cases() -> list[Case]:
    """Return all cases."""
    return [*valid_videos(), *awkward(), *pictures(), *damaged(), *no_video(), *pointers(), *odd_files()]


def orders(frames: int) -> list[list[int]]:
    """Return lists of indices: all forward, all backward, and random ones; only the latter for long clips."""
    some = sorted(random.Random(0).sample(range(frames), min(frames, 40)))
    scattered = [some[i] for i in np.random.default_rng(1).permutation(len(some))]
    if frames > 2000:
        return [some, scattered]
    every = list(range(frames))
    return [every, every[::-1], scattered, some[::7]] if frames > 1 else [every]


def misread(case: Case, source: Any) -> list[str]:
    """Return what is wrong with a case that should be readable; errors of reading are raised."""
    wrong = []
    with open_video(source, **dict(case.reading)) as video:
        info = video.info
        if (info.width, info.height) != case.size:
            wrong.append(f"size {info.width}×{info.height}")
        for order in orders(info.num_frames):
            pixels = video.read(order)
            if case.pixels:
                wrong += misplaced(case, [info.times_s[i] for i in order], pixels)
    if case.whole and len(info.times_s) != len(case.times_s):
        wrong.append(f"{info.num_frames} frames instead of {len(case.times_s)}")
    elif case.whole and max(abs(a - b) for a, b in zip(info.times_s, case.times_s, strict=True)) > 0.0011:
        wrong.append("times")
    return list(dict.fromkeys(wrong))


def misplaced(case: Case, times_s: list[float], pixels: torch.Tensor) -> list[str]:
    """Return what is wrong with frames, given their times according to merv.

    If a damaged file has lost its start, all times are early by the same amount.
    """
    wrong, lags = [], []
    for time_s, rgb in zip(times_s, pixels.numpy(), strict=True):
        index = index_of(rgb, case.gray)
        if index not in case.indices:
            wrong.append("rotated, miscolored or garbled" if index == -1 else f"unexpected frame {index}")
            continue
        lags.append(case.times_s[case.indices.index(index)] - time_s)
        if not case.gray and rgb.shape[1:] == case.size[::-1]:
            burned = picture(index, *case.size).transpose(2, 0, 1)[:, ::7, ::5]
            error = np.quantile(np.abs(rgb[:, ::7, ::5] - burned.astype(int)).max(0), 0.8)
            if error > case.color:
                wrong.append(f"colors off by {error:.0f}")
    if lags and (max(lags) - min(lags) > 0.0022 or (case.whole and abs(lags[0]) > 0.0011)):
        wrong.append("frames at wrong times")
    return wrong


def salvaged(case: Case, source: Any) -> tuple[int, list[str]]:
    """Return how many frames of a damaged file `partial` returns, and what is wrong with them."""
    with open_video(source, **dict(case.reading)) as video:
        pixels = video.read(range(video.info.num_frames), on_error="partial")
        times_s = [t for i, t in enumerate(video.info.times_s) if i not in video.missing]
        return len(pixels), misplaced(case, times_s, pixels) if case.indices and case.pixels else []


def verdict(case: Case, path: Path) -> dict[str, Any]:
    """Generate and read a case in this process, and return the result."""
    source = case.make(path)
    source = path if source is None else source
    if os.geteuid() == os.getuid():
        Path("/proc/self/clear_refs").write_text("5")  # peak memory is measured from here
    file_name = path.name if isinstance(source, Path) else None
    begin_s = time.process_time()
    outcome, frames, wrong = "read", len(case.indices), []
    try:
        wrong = misread(case, source)
    except VideoError as error:
        outcome, message = type(error).__name__, str(error)
        wrong = [] if any(word in message for word in ADVICE) else [f"no advice in {message!r}"]
        if file_name not in (None, *message.split(":")[0].split("/")):
            wrong.append(f"file not named in {message!r}")
        if outcome == "DamagedVideo":
            frames, garbled = salvaged(case, source)
            wrong += garbled
        else:
            frames = 0
    expected = case.error or ("read",)
    if outcome not in expected and not (case.error is None and not case.whole and outcome == "DamagedVideo"):
        wrong.append(f"expected {' or '.join(expected)}")
    wrong += [f"opened {what}" for what in TOUCHED]
    seconds = time.process_time() - begin_s
    return {"outcome": outcome, "frames": frames, "wrong": wrong, "seconds": seconds}


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the files into this new folder")
    args = parser.parse_args()
    chosen = [case for case in cases() if not args.names or any(part in case.name for part in args.names)]
    if not chosen:
        parser.error(f"no case has a name that contains one of {args.names}")
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if args.keep:
            folder = args.keep
            folder.mkdir(parents=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(ROW.format("kind", "input", "outcome", "frames", "seconds", "MB", "wrong"))
        with tempfile.TemporaryDirectory() as scratch:  # so that lazy imports happen before forking
            for case in (valid_videos()[0], pictures()[0]):
                verdict(case, Path(scratch) / case.name)
        outcomes: list[Outcome] = []
        for case in chosen:
            outcome = confined(lambda case=case: verdict(case, folder / case.name), LIMIT_S)
            outcomes.append(outcome)
            cells = (outcome.frames, f"{outcome.seconds:.2f}", outcome.megabytes, "; ".join(outcome.wrong))
            print(ROW.format(case.kind, case.name, outcome.outcome, *cells).rstrip(), flush=True)
    return summary(outcomes)


def summary(outcomes: list[Outcome]) -> int:
    """Print the counts; return 1 if a result is not as expected or a case took more than SLOW_S, else 0."""
    count = {kind: sum(o.outcome == kind for o in outcomes) for kind in ("read", "hang", "crash")}
    errors = len(outcomes) - sum(count.values())
    wrong = sum(bool(o.wrong) for o in outcomes)
    slowest = max(o.seconds for o in outcomes)
    print(
        f"{len(outcomes)} inputs: {count['read']} read, {errors} named errors, {count['hang']} hangs, "
        f"{count['crash']} crashes; {wrong} not as expected; slowest {slowest:.2f} s"
    )
    return int(bool(wrong or count["hang"] or count["crash"] or slowest > SLOW_S))


if __name__ == "__main__":
    sys.exit(main())
