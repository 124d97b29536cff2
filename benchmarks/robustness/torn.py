"""Check that damaged copies of real clips are read, refused or partly read, and count the wrong frames.

    python benchmarks/robustness/torn.py FOLDER [COPIES]

Each of about 1,000 seeded copies is read in its own process with a time limit: 16 frames, spread over the
length that it claims, with on_error="raise" and, if that raises an error, with "partial". The returned
frames are averaged to 24×32 cells and compared with those of the undamaged clip. A frame "differs" if a
cell is more than 8 levels of 255 off. It is "misplaced" if another frame of the clip is closer, by more
than 1 level, than the frame at that time. A copy that lost its start counts time from its first readable
frame, so all its times may be off by the same amount. The exit status is 1 after a hang, a crash, or an
error that does not name the file and on_error.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confined import Outcome, confined
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from merv.errors import VideoError
from merv.video.open import open_video
from merv.video.reader import VideoReader

LIMIT_S = 20
FRAMES = 16
CELLS = (24, 32)
MAX_DIFFERENCE = 8.0  # levels of 255; a frame "differs" if one of its cells is further off
ROW = "{:16} {:>6} {:>6} {:>9} {:>11} {:>5} {:>6} {:>8}  {:>8} {:>8} {:>10}   {:>8} {:>8} {:>10}"


def cut(data: bytearray, noise: np.random.Generator) -> bytearray:
    """Keep a start of random length."""
    return data[: int(noise.integers(1, len(data)))]


def flips(count: int) -> Callable[[bytearray, np.random.Generator], bytearray]:
    """Replace random bytes with random values."""

    def flip(data: bytearray, noise: np.random.Generator) -> bytearray:
        for offset, value in zip(noise.integers(0, len(data), count), noise.bytes(count), strict=True):
            data[offset] = value
        return data

    return flip


def part(data: bytearray, noise: np.random.Generator) -> slice:
    """Return a random slice of up to a tenth of the file."""
    begin = int(noise.integers(0, len(data)))
    return slice(begin, begin + int(noise.integers(1, len(data) // 10)))


def zeros(data: bytearray, noise: np.random.Generator) -> bytearray:
    """Replace a random part with zeros."""
    where = part(data, noise)
    data[where] = bytes(len(data[where]))
    return data


def removed(data: bytearray, noise: np.random.Generator) -> bytearray:
    """Remove a random part."""
    del data[part(data, noise)]
    return data


HARMS = {
    "cut": cut,
    "1 byte": flips(1),
    "100 bytes": flips(100),
    "10,000 bytes": flips(10_000),
    "part zeroed": zeros,
    "part removed": removed,
}


def cells(pixels: Tensor) -> Tensor:
    """Average [T, 3, H, W] to [T, 3, 24, 32]."""
    return torch.stack([adaptive_avg_pool2d(picture.float(), CELLS) for picture in pixels])


def reference(path: Path) -> tuple[Tensor, Tensor]:
    """Return the times and cells of all frames of an undamaged clip."""
    with open_video(path) as video:
        parts = np.array_split(range(video.info.frames), min(video.info.frames, 10))
        pictures = [cells(video.read(part.tolist())) for part in parts]
        return torch.tensor(video.info.times_s), torch.cat(pictures)


def compared(
    video: VideoReader, indices: list[int], pixels: Tensor, clip: tuple[Tensor, Tensor]
) -> list[int]:
    """Return how many frames were returned, differ, and are misplaced."""
    times_s, pictures = clip
    returned = cells(pixels)
    claimed_s = torch.tensor([video.info.times_s[i] for i in indices if i not in video.missing])
    # distance: [returned frames, frames of the clip]
    distance = torch.stack([(pictures - picture).abs().mean((1, 2, 3)) for picture in returned])
    lag_s = (times_s[distance.argmin(1)] - claimed_s).median()
    # expected: index in the clip of each frame that should have been returned
    expected = (times_s - (claimed_s + lag_s)[:, None]).abs().argmin(1)
    differs = (returned - pictures[expected]).abs().amax((1, 2, 3)) > MAX_DIFFERENCE
    misplaced = distance.gather(1, expected[:, None])[:, 0] > distance.amin(1) + 1
    return [len(returned), int(differs.sum()), int(misplaced.sum())]


def verdict(data: bytes, name: str, clip: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Read a copy and return the result."""
    more: dict[str, Any] = {"raise": [0, 0, 0], "partial": [0, 0, 0]}
    outcome, wrong = "read", []
    try:
        with open_video(BytesIO(data), name=name) as video:
            last = video.info.frames - 1
            indices = sorted({round(i * last / (FRAMES - 1)) for i in range(FRAMES)})
            try:
                more["raise"] = compared(video, indices, video.read(indices), clip)
            except VideoError as error:
                outcome = type(error).__name__
                video.missing.clear()
                more["partial"] = compared(video, indices, video.read(indices, on_error="partial"), clip)
    except VideoError as error:
        outcome = outcome if outcome != "read" else type(error).__name__
        wrong = [] if str(error).startswith(name) and "on_error=" in str(error) else [str(error)]
    return {"outcome": outcome, "more": more, "wrong": wrong}


def copies(folder: Path, count: int) -> list[tuple[str, Path, int]]:
    """Return (harm, clip, seed) of every copy; short clips occur more often, because they are read faster."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    often = np.array([1 / path.stat().st_size for path in paths]) ** 0.5
    chosen = np.random.default_rng(0).choice(len(paths), count, p=often / often.sum())
    return [(list(HARMS)[i % len(HARMS)], paths[which], i) for i, which in enumerate(chosen)]


def main(folder: Path, count: int) -> int:
    """Print the table, one row per kind of damage, and return the exit status."""
    torch.set_num_threads(1)
    todo = copies(folder, count)
    outcomes: dict[str, list[Outcome]] = {harm: [] for harm in HARMS}
    for path in sorted({path for _, path, _ in todo}):
        clip, data = reference(path), path.read_bytes()
        for harm, of, seed in todo:
            if of == path:
                torn = bytes(HARMS[harm](bytearray(data), np.random.default_rng(seed)))
                name = f"{path.stem}-{seed}{path.suffix}"
                outcomes[harm].append(confined(lambda t=torn, n=name, c=clip: verdict(t, n, c), LIMIT_S))
                print(f"\r{sum(map(len, outcomes.values()))} of {count}", end="", file=sys.stderr)
                for line in outcomes[harm][-1].wrong:
                    print(f"{name} ({harm}): {line}", flush=True)
    print(f"{'':69} {'returned under raise':>29}   {'returned under partial':>28}")
    counts = ("copies", "read", "damaged", "unreadable", "hang", "crash", "slowest")
    print(ROW.format("harm", *counts, *2 * ("frames", "differ", "misplaced")))
    for harm, of in outcomes.items():
        print(row(harm, of))
    every = [outcome for of in outcomes.values() for outcome in of]
    print(row("all", every))
    return int(any(outcome.outcome in ("hang", "crash") or outcome.wrong for outcome in every))


def row(harm: str, outcomes: list[Outcome]) -> str:
    """Return a line of the table."""
    kinds = Counter(outcome.outcome for outcome in outcomes)
    sums = [
        sum(outcome.more.get(mode, [0, 0, 0])[i] for outcome in outcomes)
        for mode in ("raise", "partial")
        for i in range(3)
    ]
    counts = [kinds[kind] for kind in ("read", "DamagedVideo", "UnreadableVideo", "hang", "crash")]
    slowest = max((outcome.seconds for outcome in outcomes), default=0.0)
    return ROW.format(harm, len(outcomes), *counts, f"{slowest:.2f} s", *sums)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of valid clips")
    parser.add_argument("copies", type=int, nargs="?", default=1002, metavar="COPIES", help="(default: 1002)")
    args = parser.parse_args()
    sys.exit(main(args.folder, args.copies))
