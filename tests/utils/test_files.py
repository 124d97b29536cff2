"""Leftovers of killed processes: which of them are removed, and when."""

import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from merv.utils.files import _host, _start_time, new_folder, remove_leftovers, temporary_beside

NOBODY = 9999999  # higher than any process number
DAY_S = 86400


def leftover(
    folder: Path, target: str, process: int = NOBODY, host: str | None = None, age_s: float = 0, end: str = ""
) -> Path:
    path = folder / f".{target}.{host or _host()}.{process}.0123abcd{end}"
    path.mkdir(parents=True)
    (path / "file").touch()
    for changed in path / "file", path:
        os.utime(changed, (time.time() - age_s,) * 2)
    return path


@pytest.fixture
def sleeper():
    """A process that runs during the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def test_leftovers_of_ended_processes_are_removed(tmp_path, sleeper):
    leftover(tmp_path, "a")
    leftover(tmp_path, "b", os.getpid())  # in a container, another process may have had our number
    leftover(tmp_path, "c", sleeper, age_s=DAY_S)  # written before the process with this number was started
    (tmp_path / f".d.{_host()}.{NOBODY}.0123abcd").touch()
    running = leftover(tmp_path, "e", sleeper)
    with temporary_beside(tmp_path / "f") as own:
        own.touch()
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {running, own}


def test_leftovers_of_another_machine_are_removed_after_a_week(tmp_path):
    young = leftover(tmp_path, "a", host="elsewhere", age_s=6 * DAY_S)
    leftover(tmp_path, "b", host="elsewhere", age_s=8 * DAY_S)
    growing = leftover(tmp_path, "c", host="elsewhere", age_s=8 * DAY_S)
    os.utime(growing / "file")
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {young, growing}


def test_only_copy_of_a_folder_and_files_of_others_are_kept(tmp_path):
    only_copy = leftover(tmp_path, "a", end=".old")
    others = [
        tmp_path / name for name in (".a.b", f".a.{_host()}.20261128.0123abcd", f"a.{_host()}.1.0123abcd")
    ]
    for path in others:
        path.touch()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {only_copy, *others}
    (tmp_path / "a").mkdir()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {tmp_path / "a", *others}


def test_writing_a_folder_removes_only_its_own_leftovers(tmp_path):
    leftover(tmp_path, "a")
    other = leftover(tmp_path, "a.b")
    with new_folder(tmp_path / "a"):
        pass
    assert set(tmp_path.iterdir()) == {tmp_path / "a", other}


def test_forked_process_does_not_remove_the_file_of_its_parent(tmp_path):
    with ExitStack() as stack:
        temporary = stack.enter_context(temporary_beside(tmp_path / "a"))
        temporary.touch()
        child = multiprocessing.get_context("fork").Process(target=stack.close)
        child.start()
        child.join()
        assert temporary.exists()
    assert not temporary.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_start_time_of_a_process(sleeper):
    assert abs(_start_time(sleeper) - time.time()) < 30
    assert _start_time(NOBODY) is None
