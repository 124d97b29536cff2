"""Files: merv's cache, folders of installed packages, content hashes, and atomic writes."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex

_ACTIVE: set[str] = set()  # temporary names that this process is using

# Where files are ------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder for downloaded and converted files: $MERV_CACHE, or ~/.cache/merv."""
    return Path(os.environ.get("MERV_CACHE") or "~/.cache/merv").expanduser()


def downloaded_folder(module: str) -> Path:
    """The cache folder of a package whose files were downloaded without installing the package."""
    return cache_folder() / "parts" / module


def package_folders(module: str) -> list[Path]:
    """The folders of an installed package; empty if it is not installed. Nothing is imported.

    >>> package_folders("no_such_package")
    []
    """
    top, *inner = module.split(".")
    spec = find_spec(top)
    return [Path(folder, *inner) for folder in (spec.submodule_search_locations or ())] if spec else []


# Content hashes -------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file. A process reads the file again only if its size or modification time changes."""
    stat = path.stat()
    return _digest(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of one file; for several files, the SHA-256 of their digests in the given order."""
    digests = [file_digest(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@cache
def _digest(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Atomic writes --------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: other threads, processes and machines see all of it or none of it."""
    with temporary_beside(path) as temporary:
        temporary.write_bytes(data)
        os.replace(temporary, path)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` if the block succeeds."""
    with temporary_beside(folder) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(temporary, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Move `new` to `folder`. An existing folder is deleted last, and restored if the move fails."""
    old = new.with_name(f"{new.name}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, unique to this machine, process and call.

    A file or folder that still exists there after the block is removed.

    >>> with temporary_beside(Path("out/model")) as temporary:
    ...     temporary.name.startswith(".model.")
    True
    """
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{token_hex(4)}")
    _ACTIVE.add(temporary.name)
    try:
        yield temporary
    finally:
        _ACTIVE.discard(temporary.name)
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def temporaries_beside(path: Path) -> list[Path]:
    """Existing temporary paths of `path`, of any machine, including the `.old` ones of `replace_folder`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[\w-]+\.\d+\.[0-9a-f]{{8}}(\.old)?")
    candidates = path.absolute().parent.glob(f".{glob.escape(path.name)}.*")
    return sorted(candidate for candidate in candidates if pattern.fullmatch(candidate.name))


def is_abandoned(temporary: Path) -> bool:
    """Whether the process that created a temporary path has ended. False if another machine created it."""
    host, process, *_ = temporary.name.removesuffix(".old").rsplit(".", 3)[1:]
    if host != _host():
        return False
    if int(process) == os.getpid():  # in a container, every process may have the same number
        return temporary.name.removesuffix(".old") not in _ACTIVE
    try:
        os.kill(int(process), 0)  # signal 0 only checks whether the process exists
    except OSError as error:
        return not isinstance(error, PermissionError)
    return False


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "localhost"
