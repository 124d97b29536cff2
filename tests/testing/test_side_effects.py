"""Side effects of an import are seen, those of a run are put back."""

import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from merv.testing.side_effects import _note, of_import, put_back, settings

WORK = """
import atexit, logging, os, random, socket, sys, warnings
import torch
os.write(1, b"past Python \\xff, ")
atexit.register(print, "at the end")
torch.manual_seed(7)
torch.rand(1)
torch.set_num_threads(3)
random.random()
logging.basicConfig()
warnings.warn("hear me")
print("hello")
open({path!r}, "w").close()
try:
    socket.create_connection(("127.0.0.1", 1), timeout=0.1)
except OSError:
    pass
"""


def test_all_that_an_import_does_is_seen(tmp_path, monkeypatch):
    path = str(tmp_path / "written.txt")
    (tmp_path / "busy_package").mkdir()
    (tmp_path / "busy_package" / "__init__.py").write_text(WORK.format(path=path))
    (tmp_path / "busy_package" / "idle.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = [fault for fault in of_import("busy_package.idle") if not fault.startswith("takes ")]
    assert found == [
        f"writes {path}",
        "uses the network",
        "changes torch's number of threads",
        "changes torch's seed",
        "changes the state of random",
        "changes the root logger",
        "moves torch's random state",
        "prints 'hello\\n'",
        "warns: UserWarning: hear me",
        "prints 'past Python \ufffd, at the end\\n'",
    ]


@pytest.mark.parametrize("status", [-11, 0])
def test_an_import_that_ends_the_interpreter_is_told(monkeypatch, status):
    done = subprocess.CompletedProcess([], status, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert of_import(f"a_module_that_ends_it_with_{status}") == (
        f"ends the interpreter with exit status {status}: nothing is said",
    )


def test_an_import_without_end_is_told(monkeypatch):
    def run(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert of_import("a_module_that_hangs") == ("does not come to an end within 600 s",)


def test_a_class_that_was_typed_in_cannot_be_looked_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "typed_in", ModuleType("typed_in"))
    assert of_import("typed_in") is None
    assert of_import("__main__") is None


@pytest.mark.parametrize(
    ("event", "arguments", "found"),
    [
        ("open", ("a.txt", "w", os.O_WRONLY | os.O_CREAT), ["writes a.txt"]),
        ("open", (Path("a.txt"), None, os.O_RDWR), ["writes a.txt"]),
        ("open", ("a.txt", "r", os.O_RDONLY), []),
        ("open", ("/dev/null", "w", os.O_WRONLY), []),
        ("open", (3, "w", os.O_WRONLY), []),  # a file that is open already
        ("socket.getaddrinfo", ("localhost", 80, 0, 0, 0), ["uses the network"]),
        ("import", ("json", None, None, None, None), []),
    ],
)
def test_an_event_of_the_interpreter_is_work_or_not(event, arguments, found):
    work = []
    _note(event, arguments, work)
    assert work == found


def test_settings_are_put_back():
    before = settings()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    random.random()
    assert put_back(before) == [
        "torch's deterministic algorithms",
        "torch's float32 matmul precision",
        "torch.backends.cudnn.benchmark",
        "the state of random",
    ]
    assert settings() == before
