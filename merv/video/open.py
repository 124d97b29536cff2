"""Open any video source as a reader of uint8 RGB frames with true times.

`open_video` chooses the reader for a source. The reader knows the clip's properties (`info`) and decodes
only the requested frames, each once. Audio is ignored.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from copy import copy
from io import BytesIO, TextIOBase
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from merv.errors import UnreadableVideo, VideoError
from merv.types import VideoInfo
from merv.utils.files import open_file, view_of
from merv.video.images import array_reader, folder_reader, image_reader
from merv.video.reader import BACKENDS, MAX_PIXELS, SKIP, VideoReader, unreadable

MAX_STREAM = 1 << 30  # bytes; limit for sources that are not seekable
DEFAULT_FPS = 25.0  # for sources without times: folders of images and arrays


def open_video(
    source: Any,
    *,
    name: str | None = None,
    backend: str = "pyav",
    fps: float = DEFAULT_FPS,
    max_pixels: int = MAX_PIXELS,
) -> VideoReader:
    """Open a video source; use the result in a `with` statement.

    Only local files are opened, and never a file that another file refers to. A file or reader that was
    already open stays open. Audio is ignored.

    Args:
        source: One of

            - the path of a video, an image, an animation (GIF, WebP, PNG), or a folder of images, which are
              read in natural order;
            - the content of such a file as bytes, or the open binary file, which is read from its start;
            - a uint8 RGB array or tensor of shape [T, 3, H, W] or [T, H, W, 3], without T for a still;
            - a PIL image;
            - a row of datasets' Video or Image feature: {"bytes": …, "path": …}, or its VideoDecoder;
            - another VideoDecoder of torchcodec, which decodes all frames once when it is opened, to learn
              their times;
            - an open reader.
        name: Name of the source in error messages; the path by default.
        backend: Decoder for videos: "pyav" includes its own FFmpeg; "torchcodec" must be installed and needs
            the system's FFmpeg libraries. Both return the same frames at the same times, but only "pyav"
            reads AVI and damaged files. Images and arrays need neither.
        fps: Frames per second of folders, arrays and tensors, which have no times of their own.
        max_pixels: Maximum number of pixels of a frame; larger ones are refused so that a small file cannot
            fill the memory. For TIFF and WebP, PIL's own limit also applies: twice
            PIL.Image.MAX_IMAGE_PIXELS, 179 megapixels.

    Returns:
        A reader of the frames.

    Raises:
        UnreadableVideo: The source is missing, is not a local file, or contains no frame that can be decoded.
        ShapeError: The array has another dtype or shape.
        MissingDependency: The backend cannot be loaded.
        VideoError: The source is of another type, or `backend` or `fps` is invalid.

    Example:
        >>> with open_video(np.zeros((50, 32, 48, 3), dtype=np.uint8)) as video:
        ...     video.info.duration_s, video.read([0, 49]).shape
        (2.0, torch.Size([2, 3, 32, 48]))
    """
    check_backend(backend)
    if not fps > 0:
        raise VideoError(f"fps must be greater than 0; got {fps}.")
    if isinstance(source, VideoReader):
        borrowed = copy(source)
        borrowed.close = lambda: None  # type: ignore[method-assign]  # its owner closes it
        return borrowed
    if (original := original_of(source)) is not source:
        return open_video(original, name=name, backend=backend, fps=fps, max_pixels=max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(path_of(source), name or os.fspath(source), backend, fps, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_file(BytesIO(source), name or f"<{len(source)} bytes>", backend, max_pixels, owned=True)
    if hasattr(source, "read") and not isinstance(source, TextIOBase):
        name = name or str(getattr(source, "name", "<open file>"))
        if getattr(source, "closed", False):
            raise UnreadableVideo(f"{name}: the file is closed. Open it again or pass its path.")
        seekable = getattr(source, "seekable", lambda: False)()
        file = source if seekable else _read_stream(source, name)
        return _open_file(file, name, backend, max_pixels, owned=not seekable)
    if isinstance(source, Tensor) or hasattr(type(source), "__array_interface__"):
        return array_reader(source, name or "<array>", fps)
    if is_decoder(source):
        from merv.video.torchcodec import DecoderReader

        return DecoderReader(source, name or "<VideoDecoder>", max_pixels)
    raise VideoError(
        f"Cannot read a video from {type(source).__name__}. Pass a path, bytes, an open binary file, a "
        "folder of images, a uint8 array or tensor, or a PIL image."
    )


def original_of(source: Any) -> Any:
    """Return the bytes or the path in a row of datasets' Video or Image feature; other sources as they are.

    datasets remembers the row of a VideoDecoder that it created.

    >>> original_of({"bytes": None, "path": "a.mp4"}), original_of("b.mp4")
    ('a.mp4', 'b.mp4')
    """
    row = getattr(source, "_hf_encoded", source)
    if not isinstance(row, Mapping) or not {"bytes", "path"} & set(row):
        return source
    original = row.get("path") if row.get("bytes") is None else row["bytes"]
    if original is None:
        raise VideoError("A row of datasets has neither bytes nor a path.")
    return original


def is_decoder(source: Any) -> bool:
    """Return whether `source` is a VideoDecoder of torchcodec, which need not be imported for that."""
    return hasattr(source, "get_frames_in_range") and hasattr(source, "metadata")


def check_backend(backend: str) -> None:
    """Raise VideoError if `backend` is not the name of a decoding backend."""
    if backend not in BACKENDS:
        raise VideoError(f"Unknown decoding backend {backend!r}. Available: {', '.join(BACKENDS)}.")


def probe(source: Any, **options: Any) -> VideoInfo:
    """Return the properties of a source without decoding its frames; `options` are those of `open_video`.

    >>> probe(torch.zeros(3, 32, 48, dtype=torch.uint8)).is_still
    True
    """
    with open_video(source, **options) as reader:
        return reader.info


def path_of(source: str | os.PathLike[str]) -> Path:
    """Return `source` as a Path; raise UnreadableVideo if it is empty, which would be the current folder."""
    if not os.fspath(source):
        raise unreadable("''", "the path is empty", "Pass the path of a file or a folder. " + SKIP)
    return Path(source)


def _read_stream(source: Any, name: str) -> BytesIO:
    """Read a file that is not seekable into memory."""
    content = BytesIO()
    while block := source.read(1 << 20):
        content.write(block)
        if content.tell() > MAX_STREAM:
            raise unreadable(
                name,
                f"the stream is longer than {MAX_STREAM >> 20} MiB",
                "Save it to a file and pass its path.",
            )
    return content


def _open_path(path: Path, name: str, backend: str, fps: float, max_pixels: int) -> VideoReader:
    try:
        if path.is_dir():
            return folder_reader(path, name, fps, max_pixels)
        file = open_file(path)
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        is_url = "://" in name
        advice = "Only local files can be read; download it first." if is_url else "Check the path. " + SKIP
        if getattr(error, "errno", None) == errno.ESPIPE:
            advice = "Pass it as an open file."
        raise unreadable(name, getattr(error, "strerror", None) or str(error), advice) from error
    return _open_file(file, name, backend, max_pixels, owned=True)


def _open_file(file: BinaryIO, name: str, backend: str, max_pixels: int, *, owned: bool) -> VideoReader:
    try:
        view = view_of(file, owned=owned)
        return image_reader(view, name, max_pixels) or _video_reader(backend)(view, name, max_pixels)
    except BaseException as error:
        if owned:
            file.close()
        if isinstance(error, OSError):  # raised by the file object
            raise unreadable(name, str(error)) from error
        raise


def _video_reader(backend: str) -> Callable[..., VideoReader]:
    if backend == "torchcodec":
        from merv.video.torchcodec import TorchcodecReader

        return TorchcodecReader
    from merv.video.pyav import PyAVReader

    return PyAVReader
