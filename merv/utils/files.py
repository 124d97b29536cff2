"""Files: merv's cache, folders of installed packages, content hashes, and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, cast

from merv.errors import UnreadableVideo

OTHER_MACHINES_DAYS = 7  # after which a temporary path of another machine counts as abandoned
CLOCK_TOLERANCE_S = 60  # between the clock of a file system and that of this machine
INITIAL_NAMESPACE = "4026531836"  # of process numbers, outside of containers
_ACTIVE: set[str] = set()  # temporary names that this process is using
_TEMPORARY = re.compile(
    r"\.(?P<target>.+)\.(?P<machine>[\w-]+)\.(?P<process>\d{1,7})\.[0-9a-f]{8}(?P<old>\.old)?", re.DOTALL
)

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


# Reading --------------------------------------------------------------------------------------


def check_regular(path: Path) -> None:
    """Raise OSError for a path that is a pipe or a device: opening it could block forever."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.ESPIPE, "it is a pipe or a device, not a file", str(path))


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; raise OSError if it is a pipe or a device.

    >>> with open_file(Path(__file__)) as file:
    ...     file.seek(-1, 2) > 0
    True
    """
    check_regular(path)
    return path.open("rb")


def view_of(file: BinaryIO, *, owned: bool = False) -> BinaryIO:
    """Return a file object over an open, seekable file, with a position of its own and a fixed size.

    Forked processes can read it at the same time, if `file` is a file of the file system or in memory. If
    `owned`, closing the view closes `file`.
    """
    return cast(BinaryIO, io.BufferedReader(_View(file, owned)))


class PositionedFile(io.RawIOBase):
    """A file object that keeps its own position. The operating system keeps that of an ordinary one.

    Processes share what the operating system keeps if one is forked from the other: each would move the
    position of the others while they read.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._position = 0

    def _read_at(self, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._position)
        data = self._read_at(self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _View(PositionedFile):
    def __init__(self, file: BinaryIO, owned: bool) -> None:
        self._file, self._owned, self._process = file, owned, os.getpid()
        raw = getattr(file, "raw", file)  # a file of gzip or zipfile has no FileIO there
        self._has_pread = type(raw) is io.FileIO and hasattr(os, "pread")  # Windows has no pread and no fork
        self._is_copied_by_fork = isinstance(raw, (io.BytesIO, PositionedFile))
        if self._has_pread and raw.writable():
            file.flush()
        super().__init__(os.fstat(raw.fileno()).st_size if self._has_pread else file.seek(0, io.SEEK_END))

    def _read_at(self, offset: int, size: int) -> bytes:
        if self._has_pread:
            return os.pread(self._file.fileno(), size, offset)
        if not self._is_copied_by_fork and os.getpid() != self._process:
            raise UnreadableVideo(
                f"{getattr(self._file, 'name', '<open file>')}: the file was opened before this process was "
                "forked, and both would move its position. Pass its path, or open it in each process."
            )
        self._file.seek(offset)
        return self._file.read(size)

    def close(self) -> None:
        if self._owned:
            self._file.close()
        super().close()


# Content hashes -------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file. A process reads the file again only if its size or modification time changes."""
    check_regular(path)
    status = path.stat()
    return _digest(str(path.absolute()), status.st_size, status.st_mtime_ns)


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of one file; for several files, the SHA-256 of their digests in the given order."""
    digests = [file_digest(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@cache
def _digest(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return stream_digest(file)


def files_below(folder: Path) -> list[str]:
    """The paths of all files in a folder and in its subfolders, relative to the folder.

    >>> files_below(Path(__file__).parent)[0]
    '__init__.py'
    """
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def folder_digests(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files of a folder, by their path in the folder."""
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        digests = pool.map(lambda name: _read_digest(folder / name), files)
        return dict(zip(files, digests, strict=True))


def changed_files(folder: Path, sha256: Mapping[str, str], max_bytes: float = float("inf")) -> list[str]:
    """The files of a folder that are missing or have another SHA-256. Each file is read.

    Args:
        folder: The folder.
        sha256: Path in the folder → SHA-256.
        max_bytes: Larger files are not read.
    """

    def is_changed(name: str) -> bool:
        path = folder / name
        if not path.is_file():
            return True
        return path.stat().st_size <= max_bytes and _read_digest(path) != sha256[name]

    with ThreadPoolExecutor() as pool:
        return [name for name, changed in zip(sha256, pool.map(is_changed, sha256), strict=True) if changed]


def _read_digest(path: Path) -> str:
    with open_file(path) as file:
        return stream_digest(file)


def stream_digest(file: BinaryIO) -> str:
    """SHA-256 of what a file object still has to read."""
    digest = hashlib.sha256()
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
    remove_leftovers(folder.parent, folder.name)


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
    process, temporary = os.getpid(), new_temporary(path)
    try:
        yield temporary
    finally:
        if os.getpid() == process:  # a forked process that ends inside the block must not remove it
            discard(temporary)


def new_temporary(path: Path) -> Path:
    """Return a temporary path as `temporary_beside` does, which this process uses until `discard`."""
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{token_hex(4)}")
    _ACTIVE.add(temporary.name)
    return temporary


def discard(temporary: Path) -> None:
    """Remove a temporary path, if it is still there."""
    _ACTIVE.discard(temporary.name)
    _remove(temporary)


def temporaries_beside(path: Path) -> list[Path]:
    """Existing temporary paths of `path`, of any machine, including the `.old` ones of `replace_folder`."""
    return [temporary for temporary, match in _temporaries(path.parent) if match["target"] == path.name]


def remove_leftovers(folder: Path, target: str | None = None) -> None:
    """Remove the temporary files and folders in `folder` that killed processes left.

    An `.old` folder is kept if the folder that it belongs to is missing, because its content is all there is.

    Args:
        folder: The folder.
        target: Name of the file or folder that they belong to. None: any; the folder must then be merv's own.
    """
    for temporary, match in _temporaries(folder):
        is_needed = match["old"] and not (folder / match["target"]).exists()
        if target in (None, match["target"]) and not is_needed and is_abandoned(temporary):
            with suppress(OSError):
                _remove(temporary)


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody can still be writing a temporary path.

    On this machine, the process that created it has ended. Of another machine, or another container, that is
    not known: there, nothing in it has changed for a week.
    """
    match = _TEMPORARY.fullmatch(temporary.name)
    if match is None:
        return False
    try:
        changed_s = max(path.stat().st_mtime for path in (temporary, *temporary.rglob("*")))
    except OSError:  # someone is removing or renaming it
        return False
    if match["machine"] != _host():
        return time.time() - changed_s > OTHER_MACHINES_DAYS * 86400
    process = int(match["process"])
    if process == os.getpid():  # in a container, every process may have the same number
        return temporary.name.removesuffix(".old") not in _ACTIVE
    try:
        os.kill(process, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return True
    except OSError:
        return False
    started_s = _start_time(process)
    return started_s is not None and started_s > changed_s + CLOCK_TOLERANCE_S  # its number was given again


def _temporaries(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [(folder / name, match) for name in names if (match := _TEMPORARY.fullmatch(name))]


def _start_time(process: int) -> float | None:
    """When a process was started, in seconds since 1970; None if the system does not tell."""
    try:
        # After the name of the program, which may contain spaces; field 22 is the start in ticks
        ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[22 - 3]
    except (OSError, IndexError):
        return None
    uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)  # /proc/uptime may be that of a container
    return time.time() - uptime_s + int(ticks) / os.sysconf("SC_CLK_TCK")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def _host() -> str:
    """The name of this machine, and the namespace of its process numbers if it is that of a container.

    Containers may share the host's name.
    """
    try:
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = ""
    parts = [re.sub(r"[^\w-]", "-", socket.gethostname()) or "localhost", namespace]
    return "-".join(part for part in parts if part not in ("", INITIAL_NAMESPACE))
