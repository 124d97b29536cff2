"""Readers for sources that consist of images: images, animations, folders of frames, arrays."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from merv.errors import ShapeError, UnreadableVideo
from merv.types import VideoInfo
from merv.video.reader import VideoReader, check_size, unreadable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
ORIENTATION = 0x0112  # EXIF tag
PIL_ERRORS = (  # what PIL raises for a broken image
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


class ImagesReader(VideoReader):
    """Reads images with `load(index)`, which returns uint8 [3, H, W] or raises one of PIL_ERRORS."""

    def __init__(self, info: VideoInfo, load: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.info, self._load = info, load

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        for index in indices:
            try:
                yield index, self._load(index)
            except PIL_ERRORS as error:
                self._frame_error = self._frame_error or _message(error)


# Arrays


def array_reader(source: Any, name: str, fps: float) -> ImagesReader:
    """Return a reader of a uint8 array or tensor: [T, 3, H, W] or [T, H, W, 3], or one image without T."""
    if isinstance(source, Image.Image):
        try:
            source = _upright_rgb(source)
        except ValueError as error:
            raise ShapeError(f"{name}: {error}.") from error
        except PIL_ERRORS as error:
            raise unreadable(name, _message(error)) from error
    array = source.detach().cpu() if isinstance(source, Tensor) else np.array(source)
    if array.dtype not in (torch.uint8, np.uint8):
        raise ShapeError(
            f"{name}: expected uint8 pixels in 0 to 255; got {array.dtype}. Convert floats in [0, 1] with "
            "(pixels * 255).round().to(torch.uint8)."
        )
    pixels = torch.as_tensor(array)
    channels_first = pixels.ndim in (3, 4) and pixels.shape[-3] == 3
    channels_last = pixels.ndim in (3, 4) and pixels.shape[-1] == 3
    if channels_first == channels_last or not pixels.numel():
        raise ShapeError(
            f"{name}: expected shape [T, 3, H, W] or [T, H, W, 3], or one image without T; got "
            f"{list(pixels.shape)}. No axis may be empty, and exactly one of axes -3 and -1 must "
            "have size 3. Pass a batch of videos as a list: list(batch)."
        )
    if channels_last:
        pixels = pixels.movedim(-1, -3)
    if pixels.ndim == 3:
        pixels = pixels[None]
    return ImagesReader(_constant_rate_info(name, pixels.shape, fps, "array"), lambda index: pixels[index])


# Folders of frames


def folder_reader(folder: Path, name: str, fps: float, max_pixels: int) -> ImagesReader:
    """Return a reader of a folder of images, in natural order: frame2.png before frame10.png."""
    paths = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")),
        key=_natural_order,
    )
    if not paths:
        raise unreadable(name, f"the folder contains no images ({', '.join(SUFFIXES)})")
    size = next((size for size in map(_size, paths) if size), None)
    if size is None:
        raise unreadable(name, f"none of the {len(paths)} images in the folder could be read")

    def load(index: int) -> Tensor:
        with paths[index].open("rb") as file:
            image = _open_image(file)
            check_size(str(paths[index]), image.width, image.height, max_pixels)
            pixels = _tensor(_upright_rgb(image))
        if pixels.shape[1:] != size:
            raise UnreadableVideo(
                f"{paths[index]} has {pixels.shape[2]}×{pixels.shape[1]} pixels, the first readable image "
                f"{size[1]}×{size[0]}. All frames of a clip must have the same size."
            )
        return pixels

    return ImagesReader(_constant_rate_info(name, (len(paths), 3, *size), fps, "images"), load)


def _natural_order(path: Path) -> list[tuple[bool, int | str]]:
    """Sort key that compares digits as numbers and puts them before text."""
    parts = [part for part in re.split(r"(\d+)", path.name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts]


def _size(path: Path) -> tuple[int, int] | None:
    """Return the upright (height, width) of an image file, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return _upright_size(_open_image(file))
    except PIL_ERRORS:
        return None


def _constant_rate_info(name: str, shape: Sequence[int], fps: float, codec: str) -> VideoInfo:
    """Return the VideoInfo of images [T, 3, H, W] that are shown at a constant rate."""
    frames, _, height, width = shape
    times_s = tuple(i / fps for i in range(frames))
    return VideoInfo(name, frames / fps if frames > 1 else 0.0, times_s, width, height, codec=codec)


# Image files and animations


def image_reader(file: BinaryIO, name: str, *, owned: bool, max_pixels: int) -> ImagesReader | None:
    """Return a reader of an image or animation, or None if PIL does not recognize the file.

    If `owned`, the reader closes the file. Images of more than `max_pixels` are refused.
    """
    try:
        image = _open_image(file)
    except UnidentifiedImageError:
        file.seek(0)
        return None
    except PIL_ERRORS as error:
        raise unreadable(name, _message(error)) from error
    check_size(name, image.width, image.height, max_pixels)
    animated = image.format in ("GIF", "WEBP") or (
        image.format == "PNG" and getattr(image, "is_animated", False)
    )
    # An APNG may begin with an image that only viewers without support for animation show.
    first = int(getattr(image, "default_image", False))
    starts_s, damage = _frame_starts(image, first) if animated else ([0.0, 0.0], "")
    *times_s, end_s = starts_s
    if not times_s:
        raise unreadable(name, f"its first frame cannot be read{damage and '; ' + damage}")
    height, width = _upright_size(image)

    def load(index: int) -> Tensor:
        image.seek(first + index)
        return _tensor(_upright_rgb(image))

    codec = str(image.format).lower()
    duration_s = 0.0 if len(times_s) == 1 else end_s
    info = VideoInfo(name, duration_s, tuple(times_s), width, height, codec=codec, backend="pillow")
    reader = ImagesReader(info, load)
    reader.damage = damage
    if owned:
        reader.close = file.close  # type: ignore[method-assign]
    return reader


def _frame_starts(image: Image.Image, first: int) -> tuple[list[float], str]:
    """Return (times in seconds, damage) of an animation: when each frame starts, and when the last one ends.

    The list stops before the first frame that cannot be read, because later frames depend on it.
    """
    starts_ms = [0.0]
    while True:
        try:
            image.seek(first + len(starts_ms) - 1)
            image.load()  # WebP sets the duration of a frame only here
        except EOFError:  # there is no next frame
            return [ms / 1000 for ms in starts_ms], ""
        except PIL_ERRORS as error:
            damage = f"the file is damaged after {len(starts_ms) - 1} frames ({_message(error)})"
            return [ms / 1000 for ms in starts_ms], damage
        duration_ms = image.info.get("duration", 0)
        # Like browsers, show a frame for 100 ms if its duration is 10 ms or less.
        starts_ms.append(starts_ms[-1] + (duration_ms if duration_ms > 10 else 100))


def _open_image(file: BinaryIO) -> Image.Image:
    """Open an image with PIL without decoding it.

    `Image.open` is not used: its limit on the size is global, so `max_pixels` could not raise it.
    """
    file.seek(0)
    start = file.read(16)
    Image.init()
    for name in FORMATS:
        create, accepts = Image.OPEN[name]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # another format, or a broken file
            if accepts and accepts(start) is True:
                file.seek(0)
                return create(file, "")
    raise UnidentifiedImageError(f"cannot identify image file {getattr(file, 'name', '')}".rstrip())


def _message(error: Exception) -> str:
    """Return PIL's message without the final period. If PIL refused the size, name its limit."""
    is_limit = isinstance(error, Image.DecompressionBombError)
    return str(error).rstrip(".") + is_limit * "; the limit is PIL's own: 2 * PIL.Image.MAX_IMAGE_PIXELS"


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) after the EXIF orientation is applied."""
    swapped = image.getexif().get(ORIENTATION, 1) >= 5  # orientations 5 to 8 swap the axes
    return (image.width, image.height) if swapped else (image.height, image.width)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and convert to 8-bit RGB; the alpha channel is dropped."""
    upright = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError("its 32-bit pixels have no known range; convert it to 8 or 16 bits")
    if image.mode[0] == "I":  # 16 bits, which `convert` would clip at 255
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    return upright.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
