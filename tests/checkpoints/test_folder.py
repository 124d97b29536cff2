"""The folder of a saved model: atomic writes, leftovers of killed processes, and errors."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from merv.checkpoints.config_schema import KINDS
from merv.checkpoints.folder import fill_exactly, load_folder, save_folder
from merv.errors import CheckpointError
from merv.utils.files import _host, temporary_beside


@pytest.fixture(autouse=True)
def thing(monkeypatch):
    """A kind of model whose config can be any JSON value."""
    monkeypatch.setitem(KINDS, "Thing", Any)
    monkeypatch.setitem(KINDS, "VideoLLM", Any)


def test_saved_folder_loads(tmp_path):
    save_folder(tmp_path / "a", "Thing", {"x": 1}, {"w": torch.ones(2)})
    config, state = load_folder(tmp_path / "a", "Thing")
    assert config == {"x": 1}
    assert state["w"].tolist() == [1, 1]


def test_saving_again_replaces_the_folder(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.ones(2)})
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.zeros(2)})
    assert load_folder(tmp_path / "a", "Thing")[1]["w"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


DEAD_PID = 9999999  # higher than any process id


def leftover(folder, name, process=DEAD_PID, host=None, old=False) -> Path:
    """Write a temporary folder of `name`, like a process that is killed while it saves."""
    path = folder / f".{name}.{host or _host()}.{process}.0123abcd{'.old' if old else ''}"
    save_folder(path, "Thing", {"saved_as": path.name}, {})
    return path


def snapshot(folder) -> dict[str, int]:
    """Paths and modification times of a folder and everything in it."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_leftovers_of_killed_processes_are_removed_on_save(tmp_path):
    leftover(tmp_path, "a")
    leftover(tmp_path, "a", old=True)
    running = leftover(tmp_path, "a", process=os.getppid())
    other = leftover(tmp_path, "a.b")
    save_folder(tmp_path / "a", "Thing", {}, {})
    assert set(tmp_path.iterdir()) == {tmp_path / "a", running, other}


@pytest.mark.parametrize("old", [True, False])
def test_temporary_folder_of_another_machine_is_kept(tmp_path, old):
    theirs = leftover(tmp_path, "a", host="elsewhere", old=old)
    save_folder(tmp_path / "a", "Thing", {}, {})
    assert theirs.is_dir()


@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_interrupted_replacement_is_read_from_the_old_folder(tmp_path, host):
    old = leftover(tmp_path, "a", host=host, old=True)
    before = snapshot(tmp_path)
    assert load_folder(tmp_path / "a", "Thing")[0] == {"saved_as": old.name}
    assert snapshot(tmp_path) == before


def test_interrupted_replacement_is_kept_when_saving_fails(tmp_path):
    old = leftover(tmp_path, "b", old=True)
    with pytest.raises(TypeError):
        save_folder(tmp_path / "b", "Thing", {"x": object()}, {})
    assert load_folder(tmp_path / "b", "Thing")[0] == {"saved_as": old.name}
    assert list(tmp_path.iterdir()) == [old]


def test_reading_writes_nothing(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.ones(2)})
    leftover(tmp_path, "a")
    leftover(tmp_path, "a", old=True)
    before = snapshot(tmp_path)
    load_folder(tmp_path / "a", "Thing")
    with pytest.raises(CheckpointError):
        load_folder(tmp_path / "none", "Thing")
    assert snapshot(tmp_path) == before


def test_temporary_names_are_unique(tmp_path):
    with temporary_beside(tmp_path / "a") as one, temporary_beside(tmp_path / "a") as other:
        assert one != other


def test_leftover_with_our_own_process_id_is_removed(tmp_path):
    """In a container, every process may have the id 1."""
    leftover(tmp_path, "a", process=os.getpid())
    with temporary_beside(tmp_path / "a") as active:
        active.mkdir()
        save_folder(tmp_path / "a", "Thing", {}, {})
        assert set(tmp_path.iterdir()) == {tmp_path / "a", active}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    save_folder(tmp_path / "a", "Thing", {"x": 1}, {})
    replace, calls = os.replace, []

    def second_fails(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError("no room")
        replace(*paths)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(CheckpointError, match="no room"):
        save_folder(tmp_path / "a", "Thing", {"x": 2}, {})
    assert load_folder(tmp_path / "a", "Thing")[0] == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_newest_of_several_old_folders_is_read(tmp_path):
    newer, older = leftover(tmp_path, "a", old=True), leftover(tmp_path, "a", host="elsewhere", old=True)
    for path, time_s in ((newer, 2_000_000_000), (older, 1_000_000_000)):
        os.utime(path, (time_s, time_s))
    assert load_folder(tmp_path / "a", "Thing")[0] == {"saved_as": newer.name}


def test_failed_save_keeps_the_old_folder(tmp_path):
    save_folder(tmp_path / "a", "Thing", {"x": 1}, {})
    with pytest.raises(TypeError):
        save_folder(tmp_path / "a", "Thing", {"x": object()}, {})
    assert load_folder(tmp_path / "a", "Thing")[0] == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="mine"):
        save_folder(tmp_path / "mine", "Thing", {}, {})
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_folder_of_another_library_is_not_overwritten(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="llm"):
        save_folder(tmp_path / "llm", "Thing", {}, {})
    assert (tmp_path / "llm/config.json").is_file()


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="none"):
        load_folder(tmp_path / "none", "Thing")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"config\.json.*model\.safetensors.*other\.txt"):
        load_folder(tmp_path, "Thing")


def test_another_kind_is_an_error(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {})
    with pytest.raises(CheckpointError, match=r"'Thing'.*'VideoLLM'"):
        load_folder(tmp_path / "a", "VideoLLM")


def test_config_of_another_library_is_an_error(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {})
    (tmp_path / "a/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_folder(tmp_path / "a", "Thing")


def test_differing_tensors_are_named():
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"\(a\).*\(c\).*\(b "):
        fill_exactly(tensors, {"b": torch.ones(3), "c": torch.ones(1)}, "folder")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_folder_is_named(tmp_path, file):
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.ones(2)})
    (tmp_path / "a" / file).write_bytes((tmp_path / "a" / file).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
        load_folder(tmp_path / "a", "Thing")


def test_config_and_weights_have_the_same_permissions(tmp_path):
    save_folder(tmp_path / "a", "VideoLLM", {}, {"w": torch.zeros(1)})
    modes = {(tmp_path / "a" / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_misspelled_folder_suggests_the_nearest(tmp_path):
    save_folder(tmp_path / "run/model", "VideoLLM", {}, {"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"modle.*'model'"):
        load_folder(tmp_path / "run/modle", "VideoLLM")
    with pytest.raises(CheckpointError, match=r"'model'"):
        load_folder(tmp_path / "run", "VideoLLM")


def test_unfinished_run_names_its_last_checkpoint(tmp_path):
    save_folder(tmp_path / "run/checkpoints/step=3", "VideoLLM", {}, {"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"checkpoints/step=3"):
        load_folder(tmp_path / "run/model", "VideoLLM")
