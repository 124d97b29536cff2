"""Side effects: what importing, creating or running an encoder changes outside of it.

`python -m merv.testing.side_effects MODULE FILE` imports a module and writes to a file, as JSON, what that
did besides defining things. Nothing of the kind may happen at import, nor may a setting of the process be
another one afterwards: the program that uses an encoder has chosen them.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from merv.utils.plugins import SLOW_S

TIMEOUT_S = 600.0  # only against what never ends: a busy machine may take minutes


def _flag(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _set_root_logger(level_and_handlers: tuple[Any, ...]) -> None:
    logging.root.level, *logging.root.handlers = level_and_handlers


# What belongs to the process: how it is read, how it is put back.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, torch.set_default_device),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.backends.cudnn.benchmark": _flag(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": _flag(torch.backends.cudnn, "deterministic"),
    "torch's seed": (torch.initial_seed, torch.manual_seed),  # not its state: random weights move that
    "the state of random": (random.getstate, random.setstate),
    "the state of numpy.random": (
        lambda: pickle.dumps(np.random.get_state()),  # noqa: NPY002 — the global one is what is guarded
        lambda state: np.random.set_state(pickle.loads(state)),  # noqa: NPY002
    ),
    "the root logger": (lambda: (logging.root.level, *logging.root.handlers), _set_root_logger),
    "the current folder": (os.getcwd, os.chdir),
}


def settings() -> dict[str, Any]:
    """All SETTINGS as they are now.

    >>> settings()["torch's grad mode"]
    True
    """
    return {name: read() for name, (read, _) in SETTINGS.items()}


def put_back(before: dict[str, Any]) -> list[str]:
    """Names of the settings that are no longer as in `before`; they are put back.

    >>> before = settings()
    >>> _ = torch.set_grad_enabled(False)
    >>> put_back(before), torch.is_grad_enabled()
    (["torch's grad mode"], True)
    """
    after = settings()
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        SETTINGS[name][1](before[name])
    return changed


@functools.cache
def of_import(module: str) -> tuple[str, ...] | None:
    """What importing `module` does, in words, seen in an interpreter of its own.

    None where another interpreter does not find it: a notebook's class, say.
    Costs as long as importing torch does; each module is imported once.

    >>> of_import("__main__") is None
    True
    """
    if module == "__main__" or (module in sys.modules and sys.modules[module].__spec__ is None):
        return None
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with TemporaryDirectory() as folder:
        report = Path(folder, "found.json")  # not on stdout, which the module may write to at any time
        try:
            done = subprocess.run(
                [sys.executable, "-B", "-m", __name__, module, str(report)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                env={**os.environ, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            return (f"does not come to an end within {TIMEOUT_S:g} s",)
        if done.returncode or not report.is_file():
            last = (done.stderr.strip().splitlines() or ["nothing is said"])[-1]
            return (f"ends the interpreter with exit status {done.returncode}: {last}",)
        found = json.loads(report.read_text())
    if found is None:
        return None
    return (*found, *([f"prints {done.stdout[:80]!r}"] if done.stdout else []))


def _watched_import(module: str) -> list[str]:
    """Import `module` and say what that did. For a process of its own: the watch never ends."""
    import_module("merv.encoding.base")  # what an encoder has to import is not its own work
    work: list[str] = []
    sys.addaudithook(lambda event, arguments: _note(event, arguments, work))
    before, state = settings(), torch.get_rng_state()
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings(record=True) as warned:
        start = time.perf_counter()
        import_module(module)
        took_s = time.perf_counter() - start
    moved = not torch.equal(state, torch.get_rng_state())
    found = list(dict.fromkeys(work))
    found += [f"changes {name}" for name in put_back(before)]
    if moved:
        found.append("moves torch's random state")
    if torch.cuda.is_initialized():
        found.append("initializes CUDA")
    if printed.getvalue():
        found.append(f"prints {printed.getvalue()[:80]!r}")
    found += [f"warns: {warning.category.__name__}: {warning.message}" for warning in warned]
    if took_s > SLOW_S:
        found.append(f"takes {took_s:.1f} s; wanted: under {SLOW_S:g} s")
    return found


def _note(event: str, arguments: tuple[Any, ...], work: list[str]) -> None:
    """Add to `work` what the event of the interpreter (see sys.addaudithook) is, if it is any."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        work.append("uses the network")
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path, _, flags = arguments
        name = os.fsdecode(path)
        if flags & (os.O_WRONLY | os.O_RDWR) and not name.startswith("/dev/"):
            work.append(f"writes {name}")


if __name__ == "__main__":
    name, report = sys.argv[1:]
    found = find_spec(name.partition(".")[0])  # the outermost package: to find what is inside imports it
    Path(report).write_text(json.dumps(_watched_import(name) if found else None))
