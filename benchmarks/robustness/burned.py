"""Write videos whose frames show their own index, with PyAV."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder prints a lot

WIDTH, HEIGHT = 96, 64
BITS, ROWS = 8, 3  # of the pattern: low bits, high bits, red next to blue

QUICK: dict[str, dict[str, str]] = {  # fast, silent encoders whose frames stay readable
    "libx264": {"preset": "ultrafast", "x264-params": "threads=1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "1M"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "1M"},
}


def picture(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [height, width, 3]: the 16 bits of `index` as 2×8 black or white blocks, red and blue below."""
    blocks = np.zeros((ROWS, BITS, 3), np.uint8)
    blocks[:2] = [[[255 * (index >> (row * BITS + bit) & 1)] * 3 for bit in range(BITS)] for row in (0, 1)]
    blocks[2, : BITS // 2, 0] = blocks[2, BITS // 2 :, 2] = 255
    rows, columns = np.arange(height) * ROWS // height, np.arange(width) * BITS // width
    return blocks[rows][:, columns]


def index_of(rgb: np.ndarray, gray: bool = False) -> int:
    """Return the index that a picture [3, H, W] shows; -1 if it is rotated, mirrored or miscolored."""
    _, height, width = rgb.shape
    levels = np.zeros((3, ROWS, BITS))
    for row in range(ROWS):
        for bit in range(BITS):  # the middle of each block
            y, x = (2 * row + 1) * height // (2 * ROWS), (2 * bit + 1) * width // (2 * BITS)
            dy, dx = height // (5 * ROWS), width // (5 * BITS)
            levels[:, row, bit] = rgb[:, y - dy : y + dy + 1, x - dx : x + dx + 1].mean((1, 2))
    left = levels[:, 2, : BITS // 2].mean(1)
    right = levels[:, 2, BITS // 2 :].mean(1)
    upright = left.mean() > right.mean() if gray else left[0] - left[2] > 60 and right[2] - right[0] > 60
    bits = levels[:, :2].mean(0).reshape(-1) > 127
    return sum(1 << i for i, bit in enumerate(bits) if bit) if upright else -1


def video(
    target: Path | Any,
    frames: int | Sequence[int] = 12,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    fps: float = 25,
    pts: Sequence[int] | None = None,
    tick: Fraction | None = None,
    shift: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    format: str | None = None,
    stored: Callable[[np.ndarray], np.ndarray] = lambda rgb: rgb,
    setup: Callable[[Any], None] = lambda stream: None,
    levels: dict[str, str] | None = None,
    sound: str = "",
    streams: int = 1,
) -> None:
    """Write `picture(i)` for all `frames` to a path or an open file.

    Args:
        target: Path or open file.
        frames: Number of frames, or the indices that they show.
        codec: FFmpeg's name of the encoder.
        pix_fmt: Pixel format.
        size: (width, height) as stored.
        fps: Frames per second.
        pts: When each frame is shown, in ticks, instead of a constant rate.
        tick: Duration of a tick in seconds; one frame by default.
        shift: Ticks to add to all stored times.
        options: Options of the encoder.
        container: Options of the container.
        format: Container; by default from the suffix of the path.
        stored: Transforms a picture before it is stored.
        setup: Configures the stream.
        levels: Matrix and range of the conversion from RGB, as arguments of `VideoFrame.reformat`.
        sound: Adds an audio stream "before" or "after" the video stream.
        streams: Number of video streams; the frames of further ones show 100, 101, …
    """
    indices = range(frames) if isinstance(frames, int) else frames
    rate = Fraction(fps).limit_denominator(1001)
    tick = tick or 1 / rate
    path = target if hasattr(target, "write") else str(target)
    with av.open(path, "w", format=format, options=container or {}) as file:
        audio = add_sound(file) if sound == "before" else None
        videos = [
            file.add_stream(codec, rate=rate, options=QUICK.get(codec, {}) | (options or {}))
            for _ in range(streams)
        ]
        for stream in videos:
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            stream.bit_rate = 2_000_000
            stream.time_base = stream.codec_context.time_base = tick
            setup(stream)
        audio = add_sound(file) if sound == "after" else audio
        if audio:
            mux_sound(file, audio, len(indices) / fps)
        turned = stored(np.zeros((1, 2, 3))).shape[:2] == (2, 1)
        for position, index in enumerate(indices):
            for number, stream in enumerate(videos):
                rgb = stored(picture(index + 100 * number, *(size[::-1] if turned else size)))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                frame = frame.reformat(format=pix_fmt, **levels) if levels else frame
                frame.pts, frame.time_base = pts[position] if pts else position, tick
                mux(file, stream.encode(frame), shift)
        for stream in videos:
            mux(file, stream.encode(), shift)


def mux(file: Any, packets: Iterable[Any], shift: int) -> None:
    """Write packets with their times shifted by `shift` ticks."""
    for packet in packets:
        packet.pts += shift
        packet.dts += shift
        file.mux(packet)


def add_sound(file: Any) -> Any:
    """Add an audio stream with a codec that the container supports."""
    codec = {"webm": "libopus", "flv": "aac", "mp4": "aac", "mov": "aac"}.get(file.format.name, "mp2")
    return file.add_stream(codec, rate=48000, layout="mono")


def mux_sound(file: Any, stream: Any, seconds: float) -> None:
    """Write quiet noise of this length."""
    noise = np.random.default_rng(0)
    for begin in range(0, round(seconds * 48000), 960):
        samples = (noise.standard_normal((1, 960)) * 300).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, begin
        file.mux(stream.encode(frame))
    file.mux(stream.encode())
