"""Check that damaged copies of real clips are read, refused or partly read; count wrong and missing frames.

    python benchmarks/robustness/torn.py FOLDER [COPIES]

The clips of FOLDER are damaged as they are, and in other containers and codecs (MADE). Each of about 1,000
seeded copies is read in its own process with a time limit: the whole copy, in six parts, with
on_error="raise" and, where that raises an error, with "partial". If the machine has two CPUs, the copy is
read again with one, which must give the same frames.

Returned frames are averaged to 24×32 cells and compared with those of the undamaged clip. A frame is "wrong"
if a cell is more than 8 levels of 255 off, or if another frame of the clip is closer, by more than 1 level.
A frame of the clip is "missing" if the copy has no frame at its time, and returns the frame before it, which
is what a caller gets for that time, without an error. A copy that lost its start counts time from its first
readable frame, so all its times may be off by the same amount.

Wrong and missing frames are counted apart if FFmpeg, with one thread and log level "error", reports anything
about their packet, an earlier one back to the last keyframe, or, for missing frames, the next one. It decodes
the part that was read, and the pictures before that others may refer to. The exit status is 1 if there is
such a frame under "raise", after a hang or a crash, if the number of CPUs makes a difference, or if an error
does not name the file and on_error.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from burned import QUICK
from confined import Outcome, confined
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from merv.errors import VideoError
from merv.video.open import open_video

LIMIT_S = 30
PARTS = 6
CELLS = (24, 32)
MAX_DIFFERENCE = 8.0  # levels of 255
MADE = {  # suffix → codecs; None copies the packets of an H.264 clip
    ".mp4": ("libx265", "mpeg4", "libsvtav1", "libvpx-vp9"),
    ".mkv": (None, "libx264", "libx265", "mjpeg", "libvpx"),
    ".webm": ("libvpx", "libvpx-vp9", "libsvtav1"),
    ".avi": ("libx264", "mpeg4", "mjpeg", "libvpx"),
    ".ogv": ("libvpx",),
    ".mov": (None, "libx265", "mjpeg", "prores_ks"),
}
MADE_FRAMES, MADE_WIDTH = 120, 320
COUNTS = ("read", "damaged", "unreadable", "hang", "crash")
FRAMES = ("frames", "wrong", "missing", "wrong", "missing")
ROW = "{:16} {:>6} {:>5} {:>8} {:>11} {:>5} {:>6} {:>8}  {:>7} {:>6} {:>8}   {:>6} {:>8}    {:>7} {:>6} {:>9}"


# Material


def make(source: Path, target: Path, codec: str | None) -> None:
    """Write the first frames of a clip with another codec, or copy its packets, into another container."""
    with av.open(str(source)) as clip, av.open(str(target), "w") as file:
        video = clip.streams.video[0]
        if codec is None:
            stream = file.add_stream_from_template(video)
            for packet in clip.demux(video):
                if packet.dts is not None:
                    packet.stream = stream
                    file.mux(packet)
            return
        rate = Fraction(video.average_rate or 25)
        stream = file.add_stream(codec, rate=rate, options=QUICK.get(codec, {}) | {"g": "24"})
        stream.width = MADE_WIDTH
        stream.height = round(MADE_WIDTH * video.height / video.width / 2) * 2
        formats = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}
        stream.pix_fmt = formats.get(codec, "yuv420p")
        stream.bit_rate = 500_000
        for index, frame in enumerate(islice(clip.decode(video), MADE_FRAMES)):
            frame = frame.reformat(stream.width, stream.height, stream.pix_fmt, threads=1)
            frame.pts, frame.time_base, frame.pict_type = index, 1 / rate, 0
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def material(folder: Path, made: Path) -> list[tuple[Path, str]]:
    """Return the path and the codec of every clip: those in `folder`, and two of each kind in MADE."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    h264 = [p for p in paths if codec_of(p) == "h264" and p.stat().st_size > 100_000]
    number = 0
    for suffix, codecs in MADE.items():
        for codec in codecs:
            for _ in range(2):
                source = h264[number % len(h264)]
                target = made / f"{source.stem}_{number}{suffix}"
                make(source, target, codec)
                paths.append(target)
                number += 1
    return [(path, codec_of(path)) for path in paths]


def codec_of(path: Path) -> str:
    """Return FFmpeg's name of the codec of a clip."""
    with av.open(str(path)) as clip:
        return str(clip.streams.video[0].codec_context.codec.canonical_name)


# Harm


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
    "10 bytes": flips(10),
    "100 bytes": flips(100),
    "part zeroed": zeros,
    "part removed": removed,
}


# Reading


@dataclass
class Copy:
    """What was read of a damaged copy: indices of frames → their cells [3, 24, 32]."""

    times_s: tuple[float, ...]
    under_raise: dict[int, Tensor]
    under_partial: dict[int, Tensor]
    errors: list[str]
    digest: str  # of all pixels

    @classmethod
    def read(cls, data: bytes, name: str) -> Copy:
        """Read a copy in parts."""
        under_raise: dict[int, Tensor] = {}
        under_partial: dict[int, Tensor] = {}
        errors, digest = [], hashlib.sha256()
        with open_video(BytesIO(data), name=name) as video:
            for part in np.array_split(range(video.info.num_frames), min(video.info.num_frames, PARTS)):
                for on_error, frames in (("raise", under_raise), ("partial", under_partial)):
                    video.missing.clear()
                    try:
                        pixels = video.read(part.tolist(), on_error=on_error)
                    except VideoError as error:
                        errors.append(str(error))
                        continue
                    came = [index for index in part.tolist() if index not in video.missing]
                    frames.update(zip(came, cells(pixels), strict=True))
                    digest.update(repr(came).encode() + pixels.numpy().tobytes())
                    break
            return cls(video.info.times_s, under_raise, under_partial, errors, digest.hexdigest())


def cells(pixels: Tensor) -> Tensor:
    """Average [T, 3, H, W] to [T, 3, 24, 32]."""
    return torch.stack([adaptive_avg_pool2d(picture.float(), CELLS) for picture in pixels])


def lag_of(copy: Copy, clip: Copy) -> float:
    """Return the time in the clip of the first frame of the copy."""
    both = list((copy.under_raise | copy.under_partial).items())[:64]
    pictures = torch.stack(list(clip.under_raise.values()))
    closest = [int((pictures - cells).abs().mean((1, 2, 3)).argmin()) for _, cells in both]
    lags = [clip.times_s[j] - copy.times_s[i] for (i, _), j in zip(both, closest, strict=True)]
    return float(np.median(lags)) if lags else 0.0


def wrong(frames: dict[int, Tensor], copy: Copy, clip: Copy, lag_s: float) -> list[int]:
    """Return the indices of wrong frames."""
    pictures, times_s = torch.stack(list(clip.under_raise.values())), np.array(clip.times_s)
    found = []
    for index, picture in frames.items():
        expected = int(np.abs(times_s - copy.times_s[index] - lag_s).argmin())
        distance = (pictures - picture).abs().mean((1, 2, 3))
        differs = (pictures[expected] - picture).abs().max() > MAX_DIFFERENCE
        if differs or distance[expected] > distance.min() + 1:
            found.append(index)
    return found


def missing(copy: Copy, clip: Copy, lag_s: float) -> list[int]:
    """Return, for each missing frame, the index of the frame that a caller gets instead."""
    times_s = np.array(copy.times_s) + lag_s
    slack_s = float(np.median(np.diff(clip.times_s))) * 0.6 if len(clip.times_s) > 1 else 1.0
    absent = [time_s for time_s in clip.times_s if np.abs(times_s - time_s).min() > slack_s]
    instead = [max(int(np.searchsorted(times_s, time_s)) - 1, 0) for time_s in absent]
    return [index for index in instead if index in copy.under_raise]


# What FFmpeg reports


@dataclass
class Packet:
    """A packet in storage order."""

    time_s: float | None  # of its frame; None if frames are numbered in storage order
    keyframe: bool
    reported: bool
    leads: bool  # stored after a keyframe but shown before it


@cache
def reports(data: bytes, begin_s: float, end_s: float) -> list[Packet]:
    """Decode frames of a copy with one thread, and return for each packet whether FFmpeg reports anything.

    Of the frames before `begin_s` and after `end_s`, from the first one that can be decoded, only those are
    decoded that others may refer to. What FFmpeg reports when it opens the file or stops reading counts for
    the first or the last packet. So does an index that announces more frames than there are.
    """
    packets: list[Packet] = []
    keyframe_s, start_s = -float("inf"), start_of(data)
    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as log, suppress(av.error.FFmpegError), av.open(BytesIO(data)) as file:
        stream = next(s for s in file.streams.video if s.codec_context)
        stream.codec_context.thread_count = 1
        demuxer = file.demux(stream)
        while True:
            packet, frames, failed = None, [], False
            try:
                packet = next(demuxer, None)
                time_s = packet and packet.size and time_of(packet, file, start_s)
                chosen = time_s is None or begin_s - 0.001 <= time_s <= end_s + 0.001
                stream.codec_context.skip_frame = "DEFAULT" if chosen else "NONREF"
                if packet is not None and (packet.size or packet.dts is None):  # others repeat a frame
                    frames = packet.decode()
            except av.error.FFmpegError:
                failed = True
            failed = failed or bool(log) or any(frame.is_corrupt for frame in frames)
            log.clear()
            if packet is not None and packet.size:
                keyframe_s = time_s if packet.is_keyframe and time_s is not None else keyframe_s
                leads = time_s is not None and time_s < keyframe_s
                packets.append(Packet(time_s, packet.is_keyframe, failed or packet.is_corrupt, leads))
            elif packets:
                packets[-1].reported |= failed
            if packet is None or (not packet.size and packet.dts is None):
                break
        if packets:
            packets[-1].reported |= len(packets) < stream.frames
    return packets


def start_of(data: bytes) -> float | None:
    """Return the time of the first frame that can be decoded."""
    with suppress(av.error.FFmpegError), av.open(BytesIO(data)) as file:
        for packet in file.demux(video=0):
            with suppress(av.error.FFmpegError):
                for frame in packet.decode():
                    if not frame.is_corrupt:
                        return frame.time
    return None


def time_of(packet: Any, file: Any, start_s: float | None) -> float | None:
    """Return the time of a packet, or None if the copy numbers its frames in storage order."""
    if file.format.name == "avi" or packet.pts is None or start_s is None:
        return None
    return float(packet.pts * packet.time_base) - start_s


def reported(index: int, copy: Copy, data: bytes, through_next: bool) -> bool:
    """Return whether FFmpeg reports anything about a frame, back to the last keyframe, or about the next one.

    What it reports about a packet that leads concerns damage before the keyframe, and no later frame.
    """
    parts = np.array_split(range(len(copy.times_s)), min(len(copy.times_s), PARTS))
    part = next(part for part in parts if index in part)
    last = min(part[-1] + through_next, len(copy.times_s) - 1)
    packets = reports(data, copy.times_s[part[0]], copy.times_s[last])
    if not packets:
        return True

    def position(index: int) -> int:
        if index >= len(copy.times_s):
            return len(packets) - 1
        if any(packet.time_s is None for packet in packets):
            return min(index, len(packets) - 1)
        return int(np.abs(np.array([packet.time_s for packet in packets]) - copy.times_s[index]).argmin())

    end = position(index + 1) if through_next else position(index)
    begin = keyframe = min(position(index), end)
    while keyframe and not packets[keyframe].keyframe:
        keyframe -= 1
    earlier, own = packets[keyframe:begin], packets[begin : end + 1]
    return any(p.reported and not p.leads for p in earlier) or any(p.reported for p in own)


# Tables


def verdict(data: bytes, name: str, clip: Copy) -> dict[str, Any]:
    """Read a copy and return the result."""
    try:
        copy = Copy.read(data, name)
    except VideoError as error:
        return {"outcome": "unreadable", "wrong": unhelpful([str(error)], name)}
    lag_s = lag_of(copy, clip)
    bad, absent = wrong(copy.under_raise, copy, clip, lag_s), missing(copy, clip, lag_s)
    counts = [len(copy.under_raise)]
    for known in (True, False):
        counts.append(sum(reported(i, copy, data, False) == known for i in bad))
        counts.append(sum(reported(i, copy, data, True) == known for i in absent))
    counts += [len(copy.under_partial), len(wrong(copy.under_partial, copy, clip, lag_s))]
    outcome = "damaged" if copy.errors else "read"
    more = {"counts": counts, "digest": copy.digest}
    return {"outcome": outcome, "wrong": unhelpful(copy.errors, name), "more": more}


def unhelpful(errors: list[str], name: str) -> list[str]:
    """Return the errors that do not name the file or what to do."""
    return [error for error in errors if not (error.startswith(name) and "on_error=" in error)]


def digest_on_one_cpu(data: bytes, name: str) -> dict[str, Any]:
    """Read a copy with one CPU and return the digest of its pixels."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with suppress(VideoError):
        return {"outcome": "read", "more": {"digest": Copy.read(data, name).digest}}
    return {"outcome": "unreadable"}


def row(label: str, outcomes: list[Outcome]) -> str:
    """Return a line of the table."""
    kinds = [sum(o.outcome == kind for o in outcomes) for kind in COUNTS]
    slowest = max((outcome.seconds for outcome in outcomes), default=0.0)
    sums = [sum(o.more.get("counts", [0] * 7)[i] for o in outcomes) for i in range(7)]
    differ = sum(bool(o.more.get("cpus_differ")) for o in outcomes)
    return ROW.format(label, len(outcomes), *kinds, f"{slowest:.2f} s", *sums, differ)


def main(folder: Path, count: int) -> int:
    """Print the table and return the exit status."""
    torch.set_num_threads(1)
    av.logging.set_skip_repeated(False)
    outcomes: list[tuple[str, str, str, Outcome]] = []  # harm, suffix, codec, result
    with tempfile.TemporaryDirectory() as made:
        clips = material(folder, Path(made))
        suffixes = sorted({path.suffix for path, _ in clips})
        noise = np.random.default_rng(0)
        todo = []
        for seed in range(count):
            of_suffix = [
                clip for clip in clips if clip[0].suffix == suffixes[seed // len(HARMS) % len(suffixes)]
            ]
            todo.append((seed, list(HARMS)[seed % len(HARMS)], *of_suffix[noise.integers(len(of_suffix))]))
        for path, codec in clips:
            data, clip = path.read_bytes(), Copy.read(path.read_bytes(), path.name)
            assert len(clip.under_raise) == len(clip.times_s), path
            for seed, harm, of, _ in todo:
                if of != path:
                    continue
                torn = bytes(HARMS[harm](bytearray(data), np.random.default_rng(seed)))
                name = f"{path.stem}-{seed}{path.suffix}"
                outcome = confined(lambda t=torn, n=name, c=clip: verdict(t, n, c), LIMIT_S)
                if len(os.sched_getaffinity(0)) > 1:
                    again = confined(lambda t=torn, n=name: digest_on_one_cpu(t, n), LIMIT_S)
                    outcome.more["cpus_differ"] = again.more.get("digest") != outcome.more.get("digest")
                outcomes.append((harm, path.suffix, codec, outcome))
                print(f"\r{len(outcomes)} of {count}", end="", file=sys.stderr)
                counts = outcome.more.get("counts", [0] * 7)
                if outcome.wrong or outcome.more.get("cpus_differ") or counts[1] or counts[2]:
                    print(name, harm, codec, counts, *outcome.wrong, flush=True)
    print(f"{'':71} {'under raise':>24}   {'not reported':>15}    {'under partial':>14}")
    print(ROW.format("", "copies", *COUNTS, "slowest", *FRAMES, "frames", "wrong", "1≠2 CPUs"))
    for column in range(3):
        for label in sorted({outcome[column] for outcome in outcomes}):
            print(row(label, [outcome[3] for outcome in outcomes if outcome[column] == label]))
    every = [outcome[3] for outcome in outcomes]
    print(row("all", every))
    bad = [o for o in every if o.outcome in ("hang", "crash") or o.wrong or o.more.get("cpus_differ")]
    return int(bool(bad) or any(sum(o.more.get("counts", [0] * 7)[1:3]) for o in every))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of valid clips")
    parser.add_argument("copies", type=int, nargs="?", default=1008, metavar="COPIES", help="(default: 1008)")
    args = parser.parse_args()
    sys.exit(main(args.folder, args.copies))
