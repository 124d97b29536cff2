"""Write to a file past the page cache of the system (O_DIRECT), where that is possible.

Features are written once and read much later. Through the page cache, the system would copy them, drop other
pages for them, and write them out with threads that compete with the encoders for the cores.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS  # a forked process has a copy
BLOCK = 4096  # bytes; direct writes start and end at a multiple of it, in the file and in memory


class Appender:
    """Appends to an existing file, from an offset that is a multiple of BLOCK.

    The file is longer than what was appended, by a part of a block; the owner cuts it off at the end.

    Args:
        path: The file.
        file: Its number. It is used where direct writes are not possible.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.file, self._direct = file, _open_direct(path)
        self._buffer = mmap(-1, BLOCK, PRIVATE)  # starts at a page
        # Offset where the next call may start → what the last block holds before it
        self._rests: dict[int, bytes] = {}

    def append(self, pieces: Sequence[Any], offset: int) -> None:
        """Write some pieces one after another.

        Args:
            pieces: Arrays of bytes.
            offset: Where the last call ended; or where it started, to replace what it wrote.

        Raises:
            OSError: There is no space, for example. The same offset may be used again.
        """
        if self._direct is None:
            write_all(self.file, pieces, offset)
            return
        rest = self._rests.get(offset, b"")
        first, size = offset - len(rest), len(rest) + sum(map(len, pieces))
        padded = -(-size // BLOCK) * BLOCK
        if len(self._buffer) < padded:
            self._buffer = mmap(-1, padded, PRIVATE)
        position = 0
        for piece in (rest, *pieces):
            self._buffer[position : position + len(piece)] = memoryview(piece)
            position += len(piece)
        with memoryview(self._buffer) as view:
            try:
                write_all(self._direct, [view[:padded]], first, BLOCK)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.close()  # this file system allows no direct writes after all
                write_all(self.file, [view[:size]], first)
            self._rests = {offset: rest, first + size: bytes(view[size - size % BLOCK : size])}

    def close(self) -> None:
        """Close the second opening of the file."""
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)

    __del__ = close


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):  # not on this system, or not on this file system
        return None


def write_all(file: int, pieces: Sequence[Any], offset: int, multiple: int = 1) -> None:
    """Write some pieces one after another. Each write ends at a multiple of some bytes. Raises OSError."""
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            written = os.pwrite(file, view, offset)
            written -= written % multiple
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view, offset = view[written:], offset + written
