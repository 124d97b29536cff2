"""Where the shards of a store are: a local folder, or any address that fsspec knows, such as s3://….

Both offer the same few functions, so the store does not care which it has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from merv.errors import MissingDependency
from merv.features.shard import SUFFIX
from merv.utils.files import discard, new_temporary

SHARD_NAME = 32 + len(SUFFIX)  # characters
LISTING_S = 30.0  # how long a remote listing counts as fresh
OPEN_FILES = 64  # files of a local folder that stay open


class Place(Protocol):
    """A folder of shards."""

    address: str

    def version(self) -> Any:
        """A value that changes when shards come or go; None if the folder does not exist."""

    def names(self) -> dict[str, int]:
        """Name → size in bytes of each shard."""

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        """Read some bytes of a shard; raises OSError if there are fewer."""

    def temporary(self) -> Path:
        """A new path for a temporary file on this machine."""

    def publish(self, temporary: Path, name: str) -> None:
        """Make a finished file a shard, all at once. If that fails, the file stays."""

    def discard(self, temporary: Path) -> None:
        """Delete a temporary file, if it is still there."""

    def remove(self, name: str) -> None:
        """Delete a shard."""


class LocalFolder:
    """A folder of the file system, perhaps a shared one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)
        self._files = lru_cache(OPEN_FILES)(_OpenFile)

    def version(self) -> int | None:
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def names(self) -> dict[str, int]:
        sizes = {}
        for name in filter(is_shard_name, os.listdir(self.folder)):
            with suppress(FileNotFoundError):  # it has just been merged into another one
                sizes[name] = (self.folder / name).stat().st_size
        return sizes

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        view, file = memoryview(data.data), self._files(self.folder / name)
        while len(view):
            count = os.preadv(file.number, [view], offset)
            if not count:
                raise OSError(f"{self.folder / name} is cut short")
            view, offset = view[count:], offset + count
        return data

    def temporary(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return new_temporary(self.folder / "shard")

    def publish(self, temporary: Path, name: str) -> None:
        if temporary.exists() or name not in self.names():  # else, an interrupted call did it
            os.replace(temporary, self.folder / name)
        self._files.cache_clear()  # the same shard may have been open, and damaged
        discard(temporary)

    def discard(self, temporary: Path) -> None:
        discard(temporary)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class _OpenFile:
    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Any = os.close) -> None:  # at the end of Python, `os` may be gone
        if hasattr(self, "number"):
            close(self.number)


class RemoteFolder:
    """An address of fsspec. Shards are written to a local temporary file, and uploaded when they are full."""

    def __init__(self, address: str) -> None:
        self.address, self._process = address, 0
        self._connect()

    @property
    def files(self) -> Any:
        """The file system of fsspec. A forked process needs one of its own."""
        if self._process != os.getpid():
            self._connect()
        return self._files

    def _connect(self) -> None:
        from fsspec.core import url_to_fs

        try:
            self._files, self.folder = url_to_fs(self.address, skip_instance_cache=True)
        except ImportError as error:
            raise MissingDependency(f"{self.address}: {error}") from error
        self._process = os.getpid()

    def version(self) -> int | None:
        return int(time.monotonic() / LISTING_S)

    def names(self) -> dict[str, int]:
        self.files.invalidate_cache()
        if not self.files.isdir(self.folder):
            return {}
        files = self.files.ls(self.folder, detail=True)
        named = {file["name"].rsplit("/", 1)[-1]: file["size"] for file in files}
        return {name: size for name, size in named.items() if is_shard_name(name)}

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        data = self.files.cat_file(f"{self.folder}/{name}", start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(f"{self.address}/{name} is cut short")
        return np.frombuffer(bytearray(data), np.uint8)

    def temporary(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="merv-"), "shard")

    def publish(self, temporary: Path, name: str) -> None:
        self.files.makedirs(self.folder, exist_ok=True)
        self.files.put_file(str(temporary), f"{self.folder}/{name}.part")
        self.files.mv(f"{self.folder}/{name}.part", f"{self.folder}/{name}")
        self.discard(temporary)

    def discard(self, temporary: Path) -> None:
        shutil.rmtree(temporary.parent, ignore_errors=True)

    def remove(self, name: str) -> None:
        self.files.rm_file(f"{self.folder}/{name}")


def place_at(address: str | Path) -> LocalFolder | RemoteFolder:
    """The folder at a path or an address with "://"."""
    if "://" in str(address):
        return RemoteFolder(str(address).rstrip("/"))
    return LocalFolder(Path(address).expanduser().absolute())


def is_shard_name(name: str) -> bool:
    """Whether a file of a store is a shard.

    >>> is_shard_name("0123456789abcdef0123456789abcdef.safetensors"), is_shard_name("model.safetensors")
    (True, False)
    """
    stem = name.removesuffix(SUFFIX)
    return len(name) == SHARD_NAME and len(stem) == 32 and not set(stem) - set("0123456789abcdef")
