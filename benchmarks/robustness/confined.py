"""Run a function in its own process with a time limit, so that the caller survives a hang or a crash.

The limit is CPU time, which does not depend on the load of the machine. A process that blocks forever is
killed after `PATIENCE` times the limit.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 12


@dataclass
class Outcome:
    """The result: `read`, the name of an error, `hang` or `crash`."""

    outcome: str
    seconds: float  # CPU time
    frames: int = 0
    wrong: list[str] = field(default_factory=list)
    megabytes: int = 0
    more: dict[str, Any] = field(default_factory=dict)


def confined(work: Callable[[], dict[str, Any]], limit_s: int) -> Outcome:
    """Run `work`, which returns fields of Outcome. Its CPU time and peak memory are added if not set."""
    until_s = time.monotonic() + PATIENCE * limit_s
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        os._exit(_inside(work, writing))
    os.close(writing)
    data = b""
    while select.select([reading], [], [], max(until_s - time.monotonic(), 0))[0]:
        part = os.read(reading, 1 << 16)
        data += part
        if not part:
            break
    os.close(reading)
    timed_out = time.monotonic() >= until_s
    if timed_out:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if timed_out or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return Outcome("hang", float(limit_s), wrong=[f"not done after {limit_s} s"])
    if status or not data:
        return Outcome("crash", 0.0, wrong=[data.decode(errors="replace") or f"status {status}"])
    return Outcome(**json.loads(data))


def _inside(work: Callable[[], dict[str, Any]], writing: int) -> int:
    try:
        result = work()
        result = {"megabytes": _peak_megabytes(), "seconds": time.process_time()} | result
        os.write(writing, json.dumps(result).encode())
        return 0
    except BaseException:
        os.write(writing, traceback.format_exc(limit=-4).encode())
        return 1


def _peak_megabytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
