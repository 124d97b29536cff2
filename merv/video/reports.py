"""What FFmpeg reports while merv reads a file. It conceals much damage and mentions it only in its log."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from av import logging

Report = tuple[int, str, str]  # level, name of the demuxer or decoder, message

_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_levels: list[int] = []  # of those who collect reports now
_before: tuple[int | None, bool] = (None, True)  # settings of PyAV's log to restore


@contextmanager
def reports(level: int = logging.ERROR) -> Iterator[list[Report]]:
    """Collect what FFmpeg logs in this thread, down to `level`; see `errors_of`.

    FFmpeg has one log per process. PyAV ignores it by default, because a thread that FFmpeg started waits
    for Python's lock to log, and deadlocks if Python waits for that thread. So decode with one thread, and
    collect only while FFmpeg works. Other threads can do the same at the same time. Meanwhile, what other
    users of PyAV cause FFmpeg to log is dropped as before, unless they have set a level for the log.

    >>> with reports() as log:
    ...     logging.log(logging.ERROR, "h264", "error while decoding MB 3 1")
    >>> errors_of(log, "h264"), errors_of(log, "ogg")
    (['error while decoding MB 3 1'], [])
    """
    global _before
    with _lock:
        if not _levels:
            _before = logging.get_level(), logging.get_skip_repeated()
            logging.set_skip_repeated(False)
        _levels.append(level)
        _set_level()
        ignored = _before[0] is None
    try:
        others = logging.Capture(local=False) if ignored else nullcontext()
        with others, logging.Capture() as log:
            yield log
    finally:
        with _lock:
            _levels.remove(level)
            if _levels:
                _set_level()
            else:
                logging.set_level(_before[0])
                logging.set_skip_repeated(_before[1])


def _set_level() -> None:
    logging.set_level(max(*_levels, logging.PANIC if _before[0] is None else _before[0]))


def errors_of(log: list[Report], *names: str) -> list[str]:
    """Return the errors in a log; with `names`, only those of these demuxers or decoders, or of none."""
    return [
        message.strip()
        for level, name, message in log
        if level <= logging.ERROR and (not names or name in ("", "NULL", *names))
    ]
