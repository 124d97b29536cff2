"""Files: where merv keeps what it fetched, where packages have theirs, what a file holds."""

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

IN_USE: set[str] = set()  # temporary names of this process


def cache_folder() -> Path:
    """Where merv keeps what it fetched: $MERV_CACHE, or ~/.cache/merv."""
    return Path(os.environ.get("MERV_CACHE") or "~/.cache/merv").expanduser()


def fetched_folder(module: str) -> Path:
    """Where the files of a package are kept that was fetched and not installed."""
    return cache_folder() / "parts" / module


def package_folders(module: str) -> list[Path]:
    """The folders of a package, where it is installed; neither it nor what it is in is imported.

    >>> package_folders("no_such_package")
    []
    """
    top, *inner = module.split(".")
    spec = find_spec(top)
    return [Path(folder, *inner) for folder in (spec.submodule_search_locations or ())] if spec else []


def file_digest(path: Path) -> str:
    """SHA-256 of a file; in one process it is read again only when its size or time has changed."""
    about = path.stat()
    return _digest(str(path.absolute()), about.st_size, about.st_mtime_ns)


def files_digest(paths: Iterable[Path]) -> str:
    """That of one file; of several the hash of their hashes, in that order."""
    digests = [file_digest(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name beside `path` for what is not whole yet: of this machine, this process and no other call.

    A file or folder that still has it afterwards is removed.

    >>> with temporary_beside(Path("out/model")) as fresh:
    ...     fresh.name.startswith(".model.")
    True
    """
    fresh = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{token_hex(4)}")
    IN_USE.add(fresh.name)
    try:
        yield fresh
    finally:
        IN_USE.discard(fresh.name)
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)


def temporaries_beside(path: Path) -> list[Path]:
    """What lies beside `path` under such names, by whichever machine, or with `.old` behind them."""
    own = re.compile(rf"\.{re.escape(path.name)}\.[\w-]+\.\d+\.[0-9a-f]{{8}}(\.old)?")
    beside = path.absolute().parent.glob(f".{glob.escape(path.name)}.*")
    return sorted(found for found in beside if own.fullmatch(found.name))


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody uses a temporary name any more, which is never known of another machine's."""
    host, process, *_ = temporary.name.removesuffix(".old").rsplit(".", 3)[1:]
    if host != _host():
        return False
    if int(process) == os.getpid():  # a container may give every process the same number
        return temporary.name.removesuffix(".old") not in IN_USE
    try:
        os.kill(int(process), 0)  # only asks
    except OSError as error:
        return not isinstance(error, PermissionError)
    return False


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "localhost"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all, whichever threads and machines write it too."""
    with temporary_beside(path) as fresh:
        fresh.write_bytes(data)
        os.replace(fresh, path)


@cache
def _digest(path: str, size: int, changed_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
