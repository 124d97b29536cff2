"""Readers for sources that consist of images: images, animations, folders of frames, arrays."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from merv.errors import ShapeError, UnreadableVideo
from merv.types import VideoInfo
from merv.utils.files import open_file
from merv.video.reader import VideoReader, check_size, unreadable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "ICO")
ORIENTATION = 0x0112  # EXIF tag
TURNS: dict[Any, Image.Transpose] = {  # EXIF orientation → what makes a picture upright; else: as stored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PIL_ERRORS = (  # what PIL raises for a broken image
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


class ImagesReader(VideoReader):
    """Reads images with `load(index)`, which returns uint8 [3, H, W] or raises one of PIL_ERRORS.

    Images are never scaled: `load` must return the size in `info`.
    """

    def __init__(
        self,
        info: VideoInfo,
        load: Callable[[int], Tensor],
        file: BinaryIO | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(file)
        self.info, self._load, self.max_pixels = info, load, max_pixels

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        for index in indices:
            try:
                pixels = self._load(index)
                if pixels.shape[1:] != (self.info.height, self.info.width):
                    raise ValueError(
                        f"frame {index} has another size than the first: {pixels.shape[2]}×{pixels.shape[1]}"
                    )
            except PIL_ERRORS as error:
                self._frame_error = self._frame_error or _message(error)
            else:
                yield index, pixels


# Arrays


def array_reader(source: Any, name: str, fps: float) -> ImagesReader:
    """Return a reader of a uint8 array or tensor: [T, 3, H, W] or [T, H, W, 3], or one image without T."""
    if isinstance(source, Image.Image):
        try:
            image = _upright_pixels(source, _turn(source))
        except ValueError as error:
            raise ShapeError(f"{name}: {error}.") from error
        except PIL_ERRORS as error:
            raise unreadable(name, _message(error)) from error
        return ImagesReader(_constant_rate_info(name, (1, *image.shape), fps, "array"), lambda _: image)
    array = source.detach().cpu() if isinstance(source, Tensor) else np.array(source)
    if array.dtype not in (torch.uint8, np.uint8):
        raise ShapeError(
            f"{name}: expected uint8 pixels in 0 to 255; got {array.dtype}. Convert floats in [0, 1] with "
            "(pixels * 255).round().to(torch.uint8)."
        )
    pixels = torch.as_tensor(array, dtype=torch.uint8, device="cpu")
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
        with open_file(paths[index]) as file:
            image = _open_image(file)
            check_size(str(paths[index]), image.width, image.height, max_pixels)
            turn = _turn(image)
            height, width = _upright_size(image, turn)
            if (height, width) != size:
                raise UnreadableVideo(
                    f"{paths[index]} has {width}×{height} pixels, the first readable image "
                    f"{size[1]}×{size[0]}. All frames of a clip must have the same size."
                )
            return _upright_pixels(image, turn)

    info = _constant_rate_info(name, (len(paths), 3, *size), fps, "images")
    return ImagesReader(info, load, max_pixels=max_pixels)


def _natural_order(path: Path) -> list[tuple[bool, int | str]]:
    """Sort key that compares digits as numbers and puts them before text."""
    parts = [part for part in re.split(r"(\d+)", path.name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts]


def _size(path: Path) -> tuple[int, int] | None:
    """Return the upright (height, width) of an image file, or None if it cannot be read."""
    try:
        with open_file(path) as file:
            image = _open_image(file)
            return _upright_size(image, _turn(image))
    except PIL_ERRORS:
        return None


def _constant_rate_info(name: str, shape: Sequence[int], fps: float, codec: str) -> VideoInfo:
    """Return the VideoInfo of images [T, 3, H, W] that are shown at a constant rate."""
    frames, _, height, width = shape
    times_s = tuple(i / fps for i in range(frames))
    return VideoInfo(name, frames / fps if frames > 1 else 0.0, times_s, width, height, codec=codec)


# Image files and animations


def image_reader(file: BinaryIO, name: str, max_pixels: int) -> ImagesReader | None:
    """Return a reader of an image or animation, or None if PIL does not recognize the file."""
    try:
        image = _open_image(file)
        check_size(name, image.width, image.height, max_pixels)
        _check_canvas(image, name, max_pixels)
        turn = _turn(image)
        starts_s, damage = _starts_s(image, file)
    except UnidentifiedImageError:
        file.seek(0)
        return None
    except PIL_ERRORS as error:
        raise unreadable(name, _message(error)) from error
    *times_s, end_s = starts_s
    if not times_s:
        raise unreadable(name, damage or "it contains no frame")
    height, width = _upright_size(image, turn)
    animation = Animation(image, file)

    def load(index: int) -> Tensor:
        return _upright_pixels(animation.frame(index), turn)

    codec = str(image.format).lower()
    duration_s = 0.0 if len(times_s) == 1 else end_s
    info = VideoInfo(name, duration_s, tuple(times_s), width, height, codec=codec, backend="pillow")
    reader = ImagesReader(info, load, file, max_pixels)
    reader.damage = damage
    return reader


def _check_canvas(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuse large images of formats that PIL draws over older frames, with up to 19 bytes per pixel."""
    has_canvas = image.format in ("GIF", "WEBP") or (image.format == "PNG" and _is_animated(image))
    needed = 2 * image.width * image.height
    if has_canvas and needed > max_pixels:
        raise unreadable(
            name,
            f"it has {image.width}×{image.height} pixels; GIF, WebP and animated PNG may have half of "
            f"max_pixels={max_pixels}, because decoding them takes several copies of a frame",
            f"If you trust the file: open_video(…, max_pixels={needed}).",
        )


def _is_animated(image: Image.Image) -> bool:
    return getattr(image, "is_animated", False)


class Animation:
    """Decodes the frames of an image file in order, because each is drawn over the one before.

    Only one frame is in memory. A frame that cannot be read ends the animation.
    """

    def __init__(self, image: Image.Image, file: BinaryIO) -> None:
        self._image: Image.Image | None = image
        self._file, self._size, self._first = file, image.size, _first_frame(image)
        self._end: int | None = None
        self._reason = ""

    def frame(self, index: int) -> Image.Image:
        """Return the PIL image after loading frame `index`."""
        target = self._first + index
        if self._end is not None and target >= self._end:
            raise ValueError(self._reason)
        if self._image is None or target < self._image.tell():
            self._image = _open_image(self._file)  # rewinding would keep traces of later frames
        image = self._image
        for position in range(image.tell(), target + 1):
            try:
                image.seek(position)
                if image.size != self._size:
                    width, height = image.size
                    raise ValueError(f"frame {position} has another size than the first: {width}×{height}")
                _load_frame(image)
            except PIL_ERRORS as error:
                self._image, self._end, self._reason = None, position, _message(error)
                raise
        return image


def _load_frame(image: Image.Image) -> None:
    """Decode the current frame. PIL draws an APNG into the copy of the canvas that it restores later."""
    canvas: Any = getattr(image, "_prev_im", None)
    canvas = canvas and canvas.copy()
    image.load()
    if canvas:
        image._prev_im = canvas  # type: ignore[attr-defined]


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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright; size and pixels both follow from it."""
    if image.format == "TIFF":  # PIL turns it, in its size and in its pixels
        return None
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # EXIF data may follow the pixels
    with suppress(*PIL_ERRORS):  # damaged EXIF data
        return TURNS.get(image.getexif().get(ORIENTATION))
    return None


def _upright_size(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    """Return (height, width) after `turn`."""
    swapped = turn in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return (image.width, image.height) if swapped else (image.height, image.width)


def _upright_pixels(image: Image.Image, turn: Image.Transpose | None) -> Tensor:
    """Apply `turn` and convert to 8-bit RGB, [3, H, W]; the alpha channel is dropped."""
    image.load()  # may change the mode
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError("its 32-bit pixels have no known range; convert it to 8 or 16 bits")
    upright = image if turn is None else image.transpose(turn)
    pixels = torch.empty((upright.height, upright.width, 3), dtype=torch.uint8, device="cpu")
    for top in range(0, upright.height, 512):  # in strips, because PIL makes several copies
        bottom = min(top + 512, upright.height)
        strip = _rgb(upright.crop((0, top, upright.width, bottom)))
        pixels[top:bottom] = torch.from_numpy(np.array(strip))
    return pixels.permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] == "I":  # 16 bits, which `convert` would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if isinstance(image.info.get("transparency"), bytes):  # `convert("RGB")` would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


# Times of animations, from the structure of the file: nothing is decoded


def _starts_s(image: Image.Image, file: BinaryIO) -> tuple[list[float], str]:
    """Return (times in seconds, damage): when each frame starts, and when the last one ends."""
    parsers = {"GIF": _gif_durations, "PNG": _png_durations, "WEBP": _webp_durations, "AVIF": _avif_durations}
    limit = None  # PIL counts the frames of a GIF by reading it
    if image.format != "GIF":
        if image.format not in parsers or not _is_animated(image):
            return [0.0, 0.0], ""
        limit = image.n_frames - _first_frame(image)  # type: ignore[attr-defined]
    starts_ms, damage, position = [0.0], "", file.tell()
    try:
        for duration_ms in islice(parsers[image.format](file), limit):
            # Like browsers, show a frame for 100 ms if its duration is 10 ms or less.
            starts_ms.append(starts_ms[-1] + (duration_ms if duration_ms > 10 else 100))
    except EOFError:
        damage = f"the file is cut off after {len(starts_ms) - 1} frames"
    file.seek(position)  # PIL continues from here
    return [start_ms / 1000 for start_ms in starts_ms], damage


def _first_frame(image: Image.Image) -> int:
    """Return 1 for an APNG that begins with an image for viewers without support for animation, else 0."""
    return int(getattr(image, "default_image", False))


def _gif_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the duration of each frame in ms; raise EOFError where the file is cut off.

    A GIF is a header and blocks: "!" and a kind start an extension, "," a frame, ";" the end.
    """
    file.seek(10)
    _skip_colors(file, _read(file, 3)[0])
    duration_ms = 0
    while (block := file.read(1)) not in (b"", b";"):
        if block == b"!":
            kind, content = _read(file, 1), _read_subblock(file)
            if kind == b"\xf9" and len(content) >= 3:
                duration_ms = 10 * int.from_bytes(content[1:3], "little")
            while content:
                content = _read_subblock(file)
        elif block == b",":
            _skip_colors(file, _read(file, 9)[8])
            _read(file, 1)
            while _read_subblock(file):
                pass
            yield duration_ms
            duration_ms = 0


def _skip_colors(file: BinaryIO, flags: int) -> None:
    """Skip the color table of a GIF, if the flags announce one."""
    if flags & 128:
        _read(file, 6 << (flags & 7))


def _read_subblock(file: BinaryIO) -> bytes:
    """Read up to 255 bytes that follow their number; the last subblock of a block is empty."""
    return _read(file, _read(file, 1)[0])


def _png_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the duration of each frame in ms; raise EOFError where the file is cut off.

    A frame begins with a chunk fcTL, whose bytes 20 to 24 are its duration: a fraction, in seconds.
    """
    file.seek(8)
    duration_ms: float | None = None
    while True:
        length, kind = struct.unpack(">I4s", _read(file, 8))
        if kind in (b"fcTL", b"IEND"):
            if duration_ms is not None:
                yield duration_ms  # the frame before is complete
            if kind == b"IEND":
                return
            numerator, denominator = struct.unpack(">20x2H", _read(file, 24))
            duration_ms = 1000 * numerator / (denominator or 100)
            length -= 24
        file.seek(length + 4, 1)  # 4 bytes of checksum


def _webp_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the duration of each frame in ms: bytes 12 to 15 of each chunk ANMF."""
    file.seek(12)
    while True:
        kind, length = struct.unpack("<4sI", _read(file, 8))
        length += length % 2  # chunks are padded
        if kind == b"ANMF":
            yield int.from_bytes(_read(file, 16)[12:15], "little")
            length -= 16
        file.seek(length, 1)


def _avif_durations(file: BinaryIO) -> Iterator[float]:
    """Yield the duration of each frame in ms, from the first track of the file."""
    file.seek(0)
    track = _box(file.read(), b"moov", b"trak", b"mdia")
    header = _box(track, b"mdhd")
    ticks_per_s = int.from_bytes(header[20:24] if header[0] else header[12:16], "big")
    table = _box(track, b"minf", b"stbl", b"stts")  # runs: number of frames, ticks of each
    for count, ticks in struct.iter_unpack(">2I", table[8 : 8 + 8 * int.from_bytes(table[4:8], "big")]):
        yield from repeat(1000 * ticks / ticks_per_s, count)


def _box(data: bytes, *path: bytes) -> bytes:
    """Return the content of the first box of each of these nested kinds in an MP4 file."""
    for kind in path:
        while data[4:8] != kind:
            length = int.from_bytes(data[:4], "big")
            if length < 8:
                raise EOFError
            data = data[length:]
        data = data[8 : int.from_bytes(data[:4], "big")]
    return data


def _read(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes; raise EOFError if the file is shorter."""
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data
