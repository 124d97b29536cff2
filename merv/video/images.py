"""Readers of what is already a row of pictures: images, GIFs, folders of frames, arrays."""

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
BROKEN = (  # what PIL raises
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


class PicturesReader(VideoReader):
    """Reads pictures that `picture(index)` gives, as uint8 [3, H, W] or raising one of BROKEN."""

    def __init__(
        self,
        info: VideoInfo,
        picture: Callable[[int], Tensor],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.info = info
        self._picture = picture
        self.close = close  # type: ignore[method-assign]

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        for index in wanted:
            try:
                yield index, self._picture(index)
            except BROKEN as error:
                self._met = self._met or _why(error)


def array_reader(source: Any, name: str, fps: float) -> PicturesReader:
    """Reader of a uint8 array or tensor, [T, 3, H, W] or [T, H, W, 3], without T for a still."""
    if isinstance(source, Image.Image):
        try:
            source = _upright_rgb(source)
        except ValueError as error:
            raise ShapeError(f"{name}: {error}.") from error
        except BROKEN as error:
            raise unreadable(name, _why(error)) from error
    given = source.detach().cpu() if isinstance(source, Tensor) else np.array(source)
    if given.dtype not in (torch.uint8, np.uint8):
        raise ShapeError(
            f"{name}: pixels are uint8, 0 to 255; got {given.dtype}. For floats in [0, 1]: "
            "(pixels * 255).round().to(torch.uint8)."
        )
    pixels = torch.as_tensor(given)
    first = pixels.ndim in (3, 4) and pixels.shape[-3] == 3
    last = pixels.ndim in (3, 4) and pixels.shape[-1] == 3
    if first == last or not pixels.numel():
        why = "both could be the channels" if first and last else "no axis is 3 channels"
        if not pixels.numel():
            why = "one axis is 0: there are no frames"
        elif pixels.ndim == 5:
            why = "five axes are several videos: pass them as a list, list(batch)"
        raise ShapeError(
            f"{name}: wanted [T, 3, H, W] or [T, H, W, 3], or one picture without T; got "
            f"{list(pixels.shape)}, where {why}."
        )
    if last:
        pixels = pixels.movedim(-1, -3)
    if pixels.ndim == 3:
        pixels = pixels[None]
    return PicturesReader(_clocked(name, pixels.shape, fps, "array"), lambda index: pixels[index])


def folder_reader(folder: Path, name: str, fps: float, max_pixels: int) -> PicturesReader:
    """Reader of a folder of frame images, in natural order: frame2.png before frame10.png."""
    paths = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")),
        key=lambda p: [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in _parts(p)],
    )
    if not paths:
        raise unreadable(name, f"the folder holds no images ({', '.join(SUFFIXES)})")
    size = next((size for size in map(_size, paths) if size), None)
    if size is None:
        raise unreadable(name, f"none of the folder's {len(paths)} images could be read")

    def picture(index: int) -> Tensor:
        with paths[index].open("rb") as file:
            image = _image(file)
            check_size(str(paths[index]), image.width, image.height, max_pixels)
            pixels = _tensor(_upright_rgb(image))
        if pixels.shape[1:] != size:
            raise UnreadableVideo(
                f"{paths[index]} is {pixels.shape[2]}×{pixels.shape[1]} pixels, frames before it "
                f"{size[1]}×{size[0]}. Frames of one clip have one size."
            )
        return pixels

    return PicturesReader(_clocked(name, (len(paths), 3, *size), fps, "images"), picture)


def image_reader(file: BinaryIO, name: str, *, owned: bool, max_pixels: int) -> PicturesReader | None:
    """Reader of an image or an animated one, or None if the file is no image that PIL knows."""
    try:
        image = _image(file)
    except UnidentifiedImageError:
        file.seek(0)
        return None
    except BROKEN as error:
        raise unreadable(name, _why(error)) from error
    check_size(name, image.width, image.height, max_pixels)
    animated = image.format in ("GIF", "WEBP") or (
        image.format == "PNG" and getattr(image, "is_animated", False)
    )
    first = int(getattr(image, "default_image", False))  # an APNG's picture for who cannot animate it
    begins_s, damage = _clock(image, first) if animated else ([0.0, 0.0], "")
    *times_s, end_s = begins_s
    if not times_s:
        raise unreadable(name, f"its first picture cannot be read{damage and '; ' + damage}")
    height, width = _upright_size(image)

    def picture(index: int) -> Tensor:
        image.seek(first + index)
        return _tensor(_upright_rgb(image))

    codec = str(image.format).lower()
    duration_s = 0.0 if len(times_s) == 1 else end_s
    info = VideoInfo(name, duration_s, tuple(times_s), width, height, codec=codec, backend="pillow")
    reader = PicturesReader(info, picture, close=file.close if owned else lambda: None)
    reader.damage = damage
    return reader


def _clock(image: Image.Image, first: int) -> tuple[list[float], str]:
    """When each frame of an animated image begins and the last one ends, in seconds; what is damaged.

    It ends before the first frame that cannot be read: others build on it.
    """
    begins_ms = [0.0]
    while True:
        try:
            image.seek(first + len(begins_ms) - 1)
            image.load()  # WebP knows a frame's duration only now
        except EOFError:  # there is no next frame
            return [ms / 1000 for ms in begins_ms], ""
        except BROKEN as error:
            damage = f"the file is broken after {len(begins_ms) - 1} of its pictures ({_why(error)})"
            return [ms / 1000 for ms in begins_ms], damage
        duration_ms = image.info.get("duration", 0)
        begins_ms.append(begins_ms[-1] + (duration_ms if duration_ms > 10 else 100))  # as browsers do


def _clocked(name: str, shape: Sequence[int], fps: float, codec: str) -> VideoInfo:
    frames, _, height, width = shape
    times_s = tuple(i / fps for i in range(frames))
    return VideoInfo(name, frames / fps if frames > 1 else 0.0, times_s, width, height, codec=codec)


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with path.open("rb") as file:
            return _upright_size(_image(file))
    except BROKEN:
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after the picture has been turned upright."""
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the axes
    return (image.width, image.height) if turned else (image.height, image.width)


def _image(file: BinaryIO) -> Image.Image:
    """Opened, not yet decoded; by PIL, but not by Image.open, whose bound on the size no caller can raise."""
    file.seek(0)
    start = file.read(16)
    Image.init()
    for name in FORMATS:
        create, accepts = Image.OPEN[name]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # broken, or not of that format
            if accepts and accepts(start) is True:
                file.seek(0)
                return create(file, "")
    raise UnidentifiedImageError(f"cannot identify image file {getattr(file, 'name', '')}".rstrip())


def _why(error: Exception) -> str:
    """What PIL says, without a full stop, and whose bound it is that a picture exceeds."""
    bound = isinstance(error, Image.DecompressionBombError)
    return str(error).rstrip(".") + bound * "; the limit is PIL's own: 2 * PIL.Image.MAX_IMAGE_PIXELS"


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, in 8 bits; transparency is left out."""
    upright = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError("its levels are 32-bit numbers of no known range; convert it to 8 or 16 bits")
    if image.mode[0] == "I":  # 16 bits, which `convert` would cut at 255
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    return upright.convert("RGB")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _parts(path: Path) -> list[str]:
    return [part for part in re.split(r"(\d+)", path.name) if part]
