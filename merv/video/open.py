"""Open: anything that holds pictures, as a reader of uint8 RGB frames with true times.

`open_video` finds the reader for a source; a reader (`merv.video.reader`) tells what it knows (`info`)
and decodes the frames that are asked for, each once. Audio is ignored.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from copy import copy
from io import BytesIO, TextIOBase
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from merv.errors import UnreadableVideo, VideoError
from merv.types import VideoInfo
from merv.video.images import array_reader, folder_reader, image_reader
from merv.video.reader import BACKENDS, MAX_PIXELS, SKIP, VideoReader, unreadable

MAX_STREAM = 1 << 30  # bytes that are taken from what cannot be wound back
FRAMES_PER_SECOND = 25.0  # of what has no clock of its own: folders of frames, arrays


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
        return array_reader(source, name or "<array>", fps)
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
        from merv.video.torchcodec import TorchcodecReader

        return TorchcodecReader
    from merv.video.pyav import PyAVReader

    return PyAVReader
