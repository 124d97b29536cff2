"""Store: aligned features, kept so that frozen encoders run once per video.

Keyed by content: the bytes of the video and everything that the features depend on. What comes
out is what went in, bit for bit. In memory, or one safetensors file per video and encoder.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merv.errors import DataError
from merv.types import Grid


class FeatureStore:
    """A dictionary of Grids, in memory or in a folder.

    folder: where to keep them; None keeps them in memory. bytes written are atomic per entry, so
    that an interrupted run goes on where it stopped.

    >>> store = FeatureStore()
    >>> store.get("nothing") is None
    True
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.memory: dict[str, Grid] = {}

    def get(self, key: str) -> Grid | None:
        """The grid of `key`, or None."""
        if self.folder is None:
            return self.memory.get(key)
        path = self._path(key)
        return _read(path) if path.is_file() else None

    def put(self, key: str, grid: Grid) -> None:
        """Keep `grid` under `key`, on the CPU."""
        grid = grid.to("cpu")
        if self.folder is None:
            self.memory[key] = grid
        else:
            _write(self._path(key), grid)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


def video_key(video: Any, recipe: str) -> str:
    """Hash of a video's content and of the recipe that makes features of it."""
    digest = hashlib.sha256(recipe.encode())
    _update(digest, video)
    return digest.hexdigest()


def _update(digest: Any, video: Any) -> None:
    """Feed what `video` holds to the hash: bytes of files, of tensors and arrays."""
    if isinstance(video, (bytes, bytearray, memoryview)):
        digest.update(video)
    elif isinstance(video, (str, os.PathLike)):
        path = Path(video).expanduser()
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(file.name.encode() if path.is_dir() else b"")
            if file.is_file():
                with file.open("rb") as opened:
                    while block := opened.read(1 << 20):
                        digest.update(block)
    elif isinstance(video, Tensor) or hasattr(video, "__array__"):
        pixels = torch.as_tensor(video).cpu().contiguous()
        digest.update(f"{pixels.dtype}{tuple(pixels.shape)}".encode())
        digest.update(pixels.view(torch.uint8).numpy().tobytes() if pixels.numel() else b"")
    elif hasattr(video, "read") and hasattr(video, "seek"):
        where = video.tell()
        video.seek(0)
        digest.update(video.read())
        video.seek(where)
    else:
        raise DataError(
            f"Features of a {type(video).__name__} cannot be stored: it has no content to key them by."
        )


def _write(path: Path, grid: Grid) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in vars(grid).items()}, fresh)
    os.replace(fresh, path)


def _read(path: Path) -> Grid:
    from safetensors.torch import load_file

    return Grid(**load_file(path))
