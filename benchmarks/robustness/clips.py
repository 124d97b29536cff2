"""Check times and orientation of the clips in a folder.

    python benchmarks/robustness/clips.py FOLDER

The script prints a table. "error" is the maximum difference, in ms, between merv's times, which need no
decoding, and the times of all frames decoded in sequence by PyAV. "pixels" is the maximum difference
between a frame that merv reads out of order and the same frame decoded in sequence.
"""

import argparse
from pathlib import Path

import av
import torch
from torch.nn.functional import interpolate

from merv.errors import VideoError
from merv.video.open import open_video

ROW = "{:28} {:>6} {:>10} {:>8} {:>9} {:>9} {:>7}"


def reference(path: Path) -> tuple[list[float], list[torch.Tensor]]:
    """Decode in sequence; return times in seconds from the first frame, and every 16th frame [H, W, 3]."""
    times_s, pictures = [], []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            times_s.append(frame.time)
            if index % 16 == 0:
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                pictures.append(torch.rot90(picture, frame.rotation // 90))  # counter-clockwise
    return [time_s - times_s[0] for time_s in times_s], pictures


def row(path: Path) -> tuple[str, float]:
    """Return a line of the table and the maximum error of the times in ms."""
    times_s, pictures = reference(path)
    with open_video(path) as video:
        info = video.info
        if info.num_frames != len(times_s):
            return f"{path.name}: merv counts {info.num_frames} frames, decoding gives {len(times_s)}", float(
                "inf"
            )
        error_ms = 1000 * max(abs(a - b) for a, b in zip(info.times_s, times_s, strict=True))
        read = video.read(list(range(0, info.num_frames, 16))[::-1]).flip(0)
    plain = torch.stack(pictures).permute(0, 3, 1, 2)
    if plain.shape != read.shape:  # non-square pixels
        plain = interpolate(plain, read.shape[2:], mode="bilinear", antialias=True)
    pixels = (read.int() - plain.int()).abs().max().item()
    size = f"{info.width}×{info.height}"
    cells = (
        path.name,
        info.num_frames,
        size,
        info.rotation,
        f"{info.duration_s:.3f}",
        f"{error_ms:.6f}",
        pixels,
    )
    return ROW.format(*cells), error_ms


def main(folder: Path) -> None:
    """Print the table for all files in a folder."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    worst, read = 0.0, 0
    print(ROW.format("file", "frames", "size", "rotation", "seconds", "error ms", "pixels"))
    for path in paths:
        try:
            line, error_ms = row(path)
        except VideoError as problem:
            line, error_ms = str(problem), float("inf")
        print(line)
        worst, read = max(worst, error_ms), read + (error_ms < 1)
    print(f"{read} of {len(paths)} files read with the right times; worst error {worst:.6f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    main(parser.parse_args().folder)
