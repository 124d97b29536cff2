"""Small videos with known content: each frame shows its own index as eight bars, one per bit."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from torch import Tensor

HEIGHT, WIDTH = 32, 64


def picture(index: int) -> np.ndarray:
    """Return uint8 [32, 64, 3]: bars for the bits of `index` at the top (lowest bit left), black below."""
    bars = np.repeat([255 * (index >> bit & 1) for bit in range(8)], WIDTH // 8)
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[: HEIGHT // 2] = bars[None, :, None]
    return rgb


def index_of(rgb: Tensor) -> int:
    """Return the index that an upright picture [3, 32, 64] shows."""
    bars = rgb[:, : HEIGHT // 2].float().reshape(3, HEIGHT // 2, 8, -1).mean((0, 1, 3))
    return sum(1 << bit for bit, level in enumerate(bars.tolist()) if level > 127)


def indices_of(pixels: Tensor) -> list[int]:
    """Return the indices that pictures [T, 3, 32, 64] show."""
    return [index_of(rgb) for rgb in pixels]


def make_video(
    path: Path,
    frames: int = 20,
    *,
    fps: int = 25,
    times_ms: Sequence[int] | None = None,
    start_s: float = 0.0,
    codec: str = "libx264",
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Write a video of `picture(0)`, `picture(1)`, …; the suffix of `path` selects the container.

    Args:
        path: Where to write it.
        frames: Number of frames.
        fps: Frames per second.
        times_ms: When each frame is shown, instead of a constant `fps`.
        start_s: Time of the first frame.
        codec: FFmpeg's name of the encoder.
        rotation: Degrees by which a player must rotate the frames clockwise; they are stored rotated back.
        pixel_aspect: Width of a pixel over its height.
        options: Options of the codec.
        container: Options of the file format.
    """
    tick = Fraction(1, fps if times_ms is None else 1000)
    all_pts = range(frames) if times_ms is None else times_ms
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=1 / tick, options=options or {})
        sideways = rotation % 180 != 0
        stream.width, stream.height = (HEIGHT, WIDTH) if sideways else (WIDTH, HEIGHT)
        stream.pix_fmt = "yuv420p"
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.time_base = stream.codec_context.time_base = tick
        for index, pts in enumerate(all_pts):
            stored = np.ascontiguousarray(np.rot90(picture(index), rotation // 90))
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            frame.pts, frame.time_base = pts + round(start_s / tick), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    if rotation:
        _set_rotation(path, rotation)
    return path


def make_gif(path: Path, durations_ms: Sequence[int]) -> Path:
    """Write an animated GIF or WebP of `picture(0)`, `picture(1)`, …"""
    images = [Image.fromarray(picture(i)) for i in range(len(durations_ms))]
    images[0].save(path, save_all=True, append_images=images[1:], duration=list(durations_ms), lossless=True)
    return path


def make_folder(path: Path, names: Sequence[str]) -> Path:
    """Write `picture(0)`, `picture(1)`, … as images of these names into a new folder."""
    path.mkdir()
    for index, name in enumerate(names):
        Image.fromarray(picture(index)).save(path / name)
    return path


def overwrite(path: Path, begin: float, end: float, seed: int = 0) -> Path:
    """Replace the bytes from `begin` to `end`, as fractions of the file, with noise."""
    data = bytearray(path.read_bytes())
    part = slice(int(begin * len(data)), int(end * len(data)))
    data[part] = np.random.default_rng(seed).bytes(part.stop - part.start)
    path.write_bytes(data)
    return path


def _set_rotation(path: Path, degrees: int) -> None:
    """Set the display matrix of the first track of an mp4, as a phone does."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    offset = data.index(b"tkhd") + 44
    path.write_bytes(data[:offset] + matrix + data[offset + len(matrix) :])
