"""Cases of unusual files: not readable, deleted, growing, endless, pipes, too large."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from burned import HEIGHT, WIDTH, video
from material import DAMAGED, EITHER, UNREADABLE, Case, clip, resized, steady


class Endless(io.RawIOBase):
    """A file that never ends: a valid start that repeats forever."""

    def __init__(self, data: bytes, seekable: bool) -> None:
        self.data, self.position, self.is_seekable = data * 100, 0, seekable

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.is_seekable

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, 600_000)[whence]  # a device reports some size
        return self.position

    def readinto(self, buffer: Any) -> int:
        begin = self.position % len(self.data)
        part = self.data[begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


class Failing(io.BytesIO):
    """A file on a network drive that becomes unavailable after a few reads."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > 4:
            raise OSError(5, "Input/output error")
        return super().read(size)


def handed_over(name: str, wrap: Callable[[bytes, Path], Any], **details: Any) -> Case:
    """A case that opens the result of `wrap`, such as an open file, instead of the path."""

    def make(path: Path) -> Any:
        video(path, 50, options={"g": "10"})
        return wrap(path.read_bytes(), path)

    how: dict[str, Any] = {"times_s": steady(50), "indices": tuple(range(50))} | details
    return Case(name, "odd file", make, **how)


def denied(data: bytes, path: Path) -> Path:
    """Make a file unreadable, even for root, which switches to the user nobody."""
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    return path


def deleted(data: bytes, path: Path) -> Any:
    """Open a file, then delete it."""
    file = path.open("rb")
    path.unlink()
    return file


def growing(data: bytes, path: Path) -> Path:
    """Write the second half of a file while it is read."""
    path.write_bytes(data[: len(data) // 2])

    def write() -> None:
        with path.open("ab") as file:
            for begin in range(len(data) // 2, len(data), 512):
                file.write(data[begin : begin + 512])
                file.flush()

    threading.Thread(target=write).start()
    return path


def pipe(path: Path) -> None:
    """Create a named pipe without a writer."""
    os.mkfifo(path)


def link(target: str, path: Path) -> None:
    """Create a symbolic link."""
    path.symlink_to(target)


def odd_files() -> list[Case]:
    """Files that are not readable, deleted, growing, endless or too large, and things that are not files."""
    kind = "odd file"
    small = (("max_pixels", WIDTH * HEIGHT),)
    return [
        handed_over("deleted.mp4", deleted),
        handed_over("growing.ts", growing, whole=False),
        handed_over("denied.mp4", denied, error=UNREADABLE),
        handed_over("failing.mkv", lambda data, path: Failing(data), error=EITHER, whole=False),
        handed_over(
            "endless.ts", lambda data, path: Endless(data, True), error=EITHER, pixels=False, whole=False
        ),
        handed_over("endless_pipe.ts", lambda data, path: Endless(data, False), error=UNREADABLE),
        handed_over("bytes.mp4", lambda data, path: data),
        handed_over("nowhere.mp4", lambda data, path: path.parent / "no" / path.name, error=UNREADABLE),
        Case("pipe.mp4", kind, pipe, error=UNREADABLE),
        Case("zeros_device.mp4", kind, partial(link, "/dev/zero"), error=UNREADABLE),
        Case("broken_link.mp4", kind, partial(link, "nowhere"), error=UNREADABLE),
        Case("link_to_itself.mp4", kind, partial(link, "link_to_itself.mp4"), error=UNREADABLE),
        clip("too_large.mp4", kind, error=UNREADABLE, reading=(("max_pixels", 6000),)),
        clip("as_large_as_allowed.mp4", kind, reading=small),
        Case(
            "grows_too_large.h264",
            kind,
            partial(resized, format="h264"),
            steady(24),
            tuple(range(24)),
            whole=False,
            error=DAMAGED,
            reading=small,
        ),
        clip(
            "huge_16384x8192.avi",
            kind,
            1,
            codec="mjpeg",
            pix_fmt="yuvj420p",
            size=(16384, 8192),
            error=UNREADABLE,
        ),
    ]
