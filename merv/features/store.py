"""Store: aligned features, kept so that frozen encoders run once per video.

Keyed by content: the bytes of the video and everything that the features depend on. What comes
out is what went in, bit for bit. In memory, or one safetensors file per video and encoder.
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

from merv.errors import DataError, ShapeError, UnreadableVideo
from merv.types import Grid
from merv.utils.files import file_digest, write_whole
from merv.video.open import open_video, path_of

logger = logging.getLogger(__name__)


class FeatureStore:
    """A dictionary of Grids, in memory or in a folder.

    folder: where to keep them; None keeps them in memory. An entry is written whole or not at all, so
    that an interrupted run goes on where it stopped. One that cannot be read counts as not there,
    with a warning in the log. What is in memory stays in its process: a pickled store arrives empty.

    >>> store = FeatureStore()
    >>> store.get("nothing") is None
    True
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.memory: dict[str, Grid] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "memory": {}}

    def get(self, key: str) -> Grid | None:
        """The grid of `key`, or None."""
        if self.folder is None:
            return self.memory.get(key)
        path = self.folder / _place(key)
        return _read(path) if path.is_file() else None

    def put(self, key: str, grid: Grid) -> Grid:
        """Keep `grid` under `key`, on the CPU; returns what `get` will."""
        with torch.inference_mode(False):  # or training could not use what validation put here
            grid = Grid(**{name: tensor.detach().cpu().clone() for name, tensor in vars(grid).items()})
        if self.folder is None:
            self.memory[key] = grid
        else:
            _write(self.folder / _place(key), grid)
        return grid


def video_key(video: Any, cache_key: str) -> str:
    """Hash of a video's content and of the cache_key that makes features of it.

    Raises UnreadableVideo for a path that cannot be read, DataError for what has no content.
    """
    return hashlib.sha256(f"{cache_key}{_content(video)}".encode()).hexdigest()


def _content(video: Any) -> str:
    """Hash of what `video` holds: the bytes of files, of tensors and arrays."""
    if isinstance(video, (bytes, bytearray, memoryview)):
        return hashlib.sha256(video).hexdigest()
    if isinstance(video, (str, os.PathLike)):
        return _path_content(path_of(video))
    if isinstance(video, np.ndarray):
        video = torch.from_numpy(np.array(video, order="C"))  # which knows no negative strides
    if isinstance(video, Tensor):
        pixels = video.cpu().contiguous()
        kind = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
        return hashlib.sha256(kind + pixels.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    if hasattr(type(video), "__array_interface__"):  # a PIL image: its palette and orientation count too
        with open_video(video) as reader:
            return _content(reader.read([0]))
    binary = hasattr(video, "read") and not isinstance(video, TextIOBase)
    if binary and getattr(video, "seekable", lambda: False)():
        where = video.tell()
        video.seek(0)
        content = hashlib.sha256(video.read()).hexdigest()
        video.seek(where)
        return content
    raise DataError(
        f"Features of a {type(video).__name__} cannot be stored: it has no content to key them by, or none "
        "that can be read twice. Give a path, or the bytes."
    )


def _path_content(path: Path) -> str:
    """Hash of a file's bytes, or of the names and bytes of the files in a folder."""
    try:
        if not path.is_dir():
            return file_digest(path)
        files = sorted(p for p in path.iterdir() if p.is_file())
        named = [f"{file.name} {file_digest(file)}" for file in files]
    except OSError as error:
        raise UnreadableVideo(f"{path}: {error.strerror or error}.") from error
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _place(key: str) -> Path:
    return Path(key[:2]) / f"{key}.safetensors"


def _write(path: Path, grid: Grid) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({name: tensor.contiguous() for name, tensor in vars(grid).items()}))


def _read(path: Path) -> Grid | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Grid(**load_file(path))
    except (SafetensorError, OSError, TypeError, ShapeError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None
