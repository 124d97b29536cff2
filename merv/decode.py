"""Decode: from anything that holds pictures to uint8 RGB frames with true times.

`open_video` finds the reader for a source; a reader tells what it knows (`info`) and
decodes the frames that are asked for, each once. Audio is ignored.
"""

from __future__ import annotations

import operator
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from io import BytesIO, TextIOBase
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from merv.errors import DamagedVideo, UnreadableVideo, VideoError
from merv.types import VideoInfo

BACKENDS = {"pyav": ("av",), "torchcodec": ("av", "torchcodec")}  # and the packages that decode
MAX_PIXELS = 8192 * 8192  # of a frame: 200 MB as RGB
MAX_STREAM = 1 << 30  # bytes that are taken from what cannot be wound back
SKIP = "load_video(…, on_error='skip') passes over such files."
FRAMES_PER_SECOND = 25.0  # of what has no clock of its own: folders of frames, arrays


class VideoReader:
    """Reads frames of one source by index; what `open_video` returns.

    info: what is known without decoding. missing: indices that turned out to be unreadable.
    damage: what is wrong with the source as a whole, or "".

    A subclass sets `info` and yields upright pictures in `_decode`, of any size: they are scaled
    to that of `info`, which counts in square pixels.
    """

    info: VideoInfo
    damage: str = ""
    _met: str = ""  # what was wrong with a frame of the last read

    def __init__(self) -> None:
        self.missing: set[int] = set()

    def read(self, indices: Iterable[int], on_error: Literal["raise", "partial"] = "raise") -> Tensor:
        """Frames of these indices, in this order: uint8 RGB [len(indices), 3, H, W], upright.

        An index may come twice. With `partial`, unreadable frames are left out (see
        `missing`); with `raise`, they raise DamagedVideo. Raises UnreadableVideo where no
        frame could be read at all, IndexError for an index that the clip does not have.
        """
        if on_error not in ("raise", "partial"):
            raise VideoError(f"on_error is 'raise' or 'partial' here; got {on_error!r}.")
        indices = [operator.index(index) for index in indices]  # tensors are not equal to their like
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.info.frames:
            raise IndexError(f"{self.info.name} has frames 0 to {self.info.frames - 1}; asked for {indices}.")
        pixels = torch.empty(len(wanted), 3, self.info.height, self.info.width, dtype=torch.uint8)
        place = {index: i for i, index in enumerate(wanted)}
        got = set()
        self._met = ""
        for index, picture in self._decode(wanted):  # picture: [3, H, W]
            pixels[place[index]] = _scaled(picture, self.info.height, self.info.width)
            got.add(index)
        self.missing |= set(wanted) - got
        self._check(len(got), len(wanted), on_error)
        if indices == wanted and len(got) == len(wanted):
            return pixels
        return pixels[[place[index] for index in indices if index in got]]

    def close(self) -> None:
        """Close what was opened; a file that was handed over open stays open."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        """(index, uint8 [3, H, W]) of those of `wanted` (ascending) that can be read."""
        raise NotImplementedError

    def _check(self, got: int, wanted: int, on_error: str) -> None:
        fault = self.damage or self._met
        fault = fault and f"; {fault}"
        if not got:
            raise unreadable(self.info.name, f"none of the {wanted} wanted frames could be decoded{fault}")
        if on_error == "partial" or (got == wanted and not self.damage):
            return
        raise DamagedVideo(
            f"{self.info.name}: {got} of the {wanted} wanted frames could be decoded{fault}. "
            "load_video(…, on_error='partial') takes what is readable, 'skip' passes over such files."
        )


def open_video(
    source: Any,
    *,
    name: str | None = None,
    backend: str = "pyav",
    fps: float = FRAMES_PER_SECOND,
    max_pixels: int = MAX_PIXELS,
) -> VideoReader:
    """A reader for anything that holds pictures; use it in a `with` statement.

    source: path of a video, an image, an animated GIF or WebP, or a folder of frame images
        (in natural order); the bytes or the open binary file of one of these files (read from
        its beginning); a uint8 array or tensor, RGB, [T, 3, H, W] or [T, H, W, 3], without T
        for a still; a PIL image; an open reader. What came open stays open.
    name: what to call it in errors; by default the path.
    backend: `pyav`, which brings its own FFmpeg, or `torchcodec`, which has to be installed and to
        find FFmpeg's libraries. They give the same frames at the same times; only `pyav` reads
        AVI and damaged files. Of videos only: pictures and arrays need neither.
    fps: frames per second of arrays, tensors and folders, which have no clock of their own.
    max_pixels: larger pictures are refused, so that a small file cannot fill the memory. Of TIFF and WebP,
        PIL's own bound holds besides: twice PIL.Image.MAX_IMAGE_PIXELS, 179 megapixels.

    Raises UnreadableVideo for a source that is missing or holds no picture, ShapeError for an
    array that is not one of the above, MissingDependency for a backend that does not load. Sound is
    ignored. Only local files are opened, and never a file that another file points to.

    >>> with open_video(np.zeros((50, 32, 48, 3), dtype=np.uint8)) as video:
    ...     video.info.duration_s, video.read([0, 49]).shape
    (2.0, torch.Size([2, 3, 32, 48]))
    """
    check_backend(backend)
    if not fps > 0:
        raise VideoError(f"fps={fps} is no rate: wanted frames per second, more than 0.")
    from merv import decode_pictures as pictures

    if isinstance(source, VideoReader):
        lent = copy(source)
        lent.close = lambda: None  # type: ignore[method-assign]  # who opened it closes it
        return lent
    if isinstance(source, (str, os.PathLike)):
        return _open_path(path_of(source), name or os.fspath(source), backend, fps, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_file(BytesIO(source), name or f"<{len(source)} bytes>", backend, max_pixels, owned=True)
    if hasattr(source, "read") and not isinstance(source, TextIOBase):
        called = name or str(getattr(source, "name", "<open file>"))
        if getattr(source, "closed", False):
            raise UnreadableVideo(f"{called}: the file is closed. Open it again, or give its path.")
        seekable = getattr(source, "seekable", lambda: False)()
        file = source if seekable else _copy(source, called)
        return _open_file(file, called, backend, max_pixels, owned=not seekable)
    if isinstance(source, Tensor) or hasattr(type(source), "__array_interface__"):
        return pictures.array_reader(source, name or "<array>", fps)
    raise VideoError(
        f"Cannot read a video from {type(source).__name__}. Give a path, bytes, an open binary file, a "
        "folder of frames, a uint8 array or tensor, or a PIL image."
    )


def check_backend(backend: str) -> None:
    """Raise VideoError where there is no decoding backend of that name."""
    if backend not in BACKENDS:
        raise VideoError(f"Unknown decoding backend {backend!r}. There are: {', '.join(BACKENDS)}.")


def probe(source: Any, **options: Any) -> VideoInfo:
    """What is known of a source before its pictures are decoded; options as of `open_video`.

    >>> probe(torch.zeros(3, 32, 48, dtype=torch.uint8)).is_still
    True
    """
    with open_video(source, **options) as reader:
        return reader.info


def path_of(source: str | os.PathLike[str]) -> Path:
    """The path of a source; raises UnreadableVideo for an empty one, which would be the current folder."""
    if not os.fspath(source):
        raise unreadable("''", "the path is empty", "Give that of a file or a folder. " + SKIP)
    return Path(source)


def unreadable(name: str, why: str, advice: str = SKIP) -> UnreadableVideo:
    """The error for a source that cannot be used: what it is, why, and what to do about it."""
    return UnreadableVideo(f"{name}: {why}. {advice}")


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise UnreadableVideo for pictures of more than `max_pixels`."""
    if width * height > max_pixels:
        raise unreadable(
            name,
            f"its pictures have {width}×{height} pixels, more than max_pixels={max_pixels}",
            f"If the file is to be trusted: open_video(…, max_pixels={width * height}).",
        )


def display_size(width: int, height: int, pixel_aspect: float) -> tuple[int, int]:
    """(width, height) of a picture as it is to be seen, whose pixels are `pixel_aspect` as wide as high.

    It is enlarged, never shrunk. Pixels within 5 % of a square count as square, because encoders
    that round sizes write aspects such as 640:639; 0 is unknown; beyond 1:8 or 8:1 it is an error
    of the file.

    >>> display_size(720, 576, 16 / 11), display_size(720, 480, 8 / 9), display_size(426, 320, 640 / 639)
    ((1047, 576), (720, 540), (426, 320))
    """
    if not 1 / 8 <= pixel_aspect <= 8 or abs(pixel_aspect - 1) < 0.05:
        return width, height
    return round(width * max(pixel_aspect, 1)), round(height / min(pixel_aspect, 1))


def _scaled(picture: Tensor, height: int, width: int) -> Tensor:
    """[3, H, W] in the size of its clip, where its own is another."""
    if picture.shape[1:] == (height, width):
        return picture
    return interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]


def _copy(source: Any, name: str) -> BytesIO:
    """All that comes out of what cannot be wound back."""
    copy = BytesIO()
    while part := source.read(1 << 20):
        copy.write(part)
        if copy.tell() > MAX_STREAM:
            raise unreadable(
                name, f"more than {MAX_STREAM >> 20} MiB came from it", "Save it as a file and give its path."
            )
    return copy


def _open_path(path: Path, name: str, backend: str, fps: float, max_pixels: int) -> VideoReader:
    from merv.decode_pictures import folder_reader

    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            return folder_reader(path, name, fps, max_pixels)
        if not stat.S_ISREG(kind):  # opening it could wait for ever
            raise unreadable(name, "a pipe or a device, not a file", "Give it as an open file.")
        file = path.open("rb")
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        address = "://" in name
        advice = "Only local files are read: download it first." if address else "Check the path. " + SKIP
        raise unreadable(name, getattr(error, "strerror", None) or str(error), advice) from error
    return _open_file(file, name, backend, max_pixels, owned=True)


def _open_file(file: BinaryIO, name: str, backend: str, max_pixels: int, *, owned: bool) -> VideoReader:
    from merv.decode_pictures import image_reader

    bounds: dict[str, Any] = {"owned": owned, "max_pixels": max_pixels}
    try:
        return image_reader(file, name, **bounds) or _video_reader(backend)(file, name, **bounds)
    except BaseException as error:
        if owned:
            file.close()
        if isinstance(error, OSError):  # the file object's own
            raise unreadable(name, str(error)) from error
        raise


def _video_reader(backend: str) -> Callable[..., VideoReader]:
    if backend == "torchcodec":
        from merv.decode_torchcodec import TorchcodecReader

        return TorchcodecReader
    from merv.decode_pyav import PyAVReader

    return PyAVReader
