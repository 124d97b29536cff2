"""Store aligned features, so that frozen encoders run once per video.

A key is a hash of the content of the video and of everything else that the features depend on. The features
that are read back equal those that were stored, bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import os
from io import TextIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merv.errors import DataError, UnreadableVideo
from merv.types import Grid
from merv.utils.files import file_digest, remove_leftovers, stream_digest, view_of, write_whole
from merv.video.open import open_video, original_of, path_of

logger = logging.getLogger(__name__)


class FeatureStore:
    """A dictionary of features, in memory or as one safetensors file per video and encoder.

    Entries are written atomically, so an interrupted run can be continued. An entry that cannot be read
    counts as missing, and a warning is logged. A folder that cannot be written, such as a shared one or one
    on a full disk, is still read: from the first failure on, features are returned but not stored, and one
    warning is logged. Pickling a store in memory drops its entries.

    Args:
        folder: Where to store features; it is created. None stores them in memory.

    Attributes:
        read_only: Whether the folder could not be written.

    Raises:
        DataError: The folder cannot be created or listed.

    Example:
        >>> store = FeatureStore()
        >>> store.get("unknown key") is None
        True
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(os.path.expanduser(folder))
        self.memory: dict[str, Grid] = {}
        self.read_only = False
        self.cleaned: set[Path] = set()  # folders without the leftovers of killed processes
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                os.scandir(self.folder).close()
            except (OSError, ValueError) as error:  # ValueError: a null byte or half of a surrogate pair
                raise DataError(
                    f"The folder {self.folder} cannot be used as a feature store: {error}. Choose another "
                    "folder for feature_store."
                ) from error

    def _write(self, path: Path, grid: Grid) -> None:
        from safetensors.torch import save

        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in self.cleaned:
            self.cleaned.add(path.parent)
            remove_leftovers(path.parent)
        write_whole(path, save({name: tensor.contiguous() for name, tensor in vars(grid).items()}))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "memory": {}}

    def get(self, key: str) -> Grid | None:
        """Return the features stored under `key`, or None."""
        return self.memory.get(key) if self.folder is None else _read(_entry_path(self.folder, key))

    def put(self, key: str, grid: Grid) -> Grid:
        """Store `grid` under `key` and return it on the CPU, as `get` will."""
        with torch.inference_mode(False):  # training cannot use tensors made in inference mode
            grid = Grid(**{name: tensor.detach().cpu().clone() for name, tensor in vars(grid).items()})
        if self.folder is None:
            self.memory[key] = grid
        elif not self.read_only:
            try:
                self._write(_entry_path(self.folder, key), grid)
            except OSError as error:
                self.read_only = True
                logger.warning(
                    "The feature store %s cannot be written: %s. Features that it lacks are computed each "
                    "time that they are needed. To store them, free space or choose another folder, and "
                    "start again.",
                    self.folder,
                    error,
                )
        return grid


def video_key(video: Any, cache_key: str) -> str:
    """Return a hash of a video's content and of `cache_key`.

    Raises UnreadableVideo for a path that cannot be read, and DataError for an object that has no content or
    can be read only once.
    """
    return hashlib.sha256(f"{cache_key}{_content_digest(video)}".encode()).hexdigest()


def _content_digest(video: Any) -> str:
    """Return a hash of the bytes of a file, tensor or array."""
    video = original_of(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return hashlib.sha256(video).hexdigest()
    if isinstance(video, (str, os.PathLike)):
        return _path_digest(path_of(video))
    if isinstance(video, np.ndarray):
        video = torch.from_numpy(np.array(video, order="C"))  # torch does not support negative strides
    if isinstance(video, Tensor):
        pixels = video.cpu().contiguous()
        header = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
        return hashlib.sha256(header + pixels.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    # A PIL image, as decoded with its palette and orientation.
    if hasattr(type(video), "__array_interface__"):
        with open_video(video) as reader:
            return _content_digest(reader.read([0]))
    if getattr(video, "seekable", lambda: False)() and not isinstance(video, TextIOBase):
        return stream_digest(view_of(video))
    raise DataError(
        f"Cannot store features of a {type(video).__name__}: its content cannot be hashed, or can be "
        "read only once. Pass a path or bytes."
    )


def _path_digest(path: Path) -> str:
    """Return a hash of the bytes of a file, or of the names and bytes of the files in a folder."""
    try:
        if not path.is_dir():
            return file_digest(path)
        files = sorted(p for p in path.iterdir() if p.is_file())
        digests = [f"{file.name} {file_digest(file)}" for file in files]
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        raise UnreadableVideo(f"{path}: {getattr(error, 'strerror', None) or error}.") from error
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _entry_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _read(path: Path) -> Grid | None:
    from safetensors.torch import load

    try:
        # Not load_file: it maps the file into memory, and a disk error would then kill the process
        return Grid(**load(path.read_bytes()))
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files raise errors of many types
        logger.warning("%s could not be read; its features will be recomputed: %s", path, error)
        return None
