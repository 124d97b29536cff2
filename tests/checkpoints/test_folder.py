import json
import os
from pathlib import Path

import pytest
import torch

from merv.checkpoints.folder import fill_exactly, load_folder, save_folder
from merv.errors import CheckpointError
from merv.utils.files import _host, temporary_beside


def test_what_is_saved_is_loaded(tmp_path):
    save_folder(tmp_path / "a", "Thing", {"x": 1}, {"w": torch.ones(2)})
    config, state = load_folder(tmp_path / "a", "Thing")
    assert config == {"x": 1}
    assert state["w"].tolist() == [1, 1]


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.ones(2)})
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.zeros(2)})
    assert load_folder(tmp_path / "a", "Thing")[1]["w"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


ENDED = 9999999  # no process has a number so high


def left(folder, name, process=ENDED, host=None, old=False) -> Path:
    """A folder as a process leaves it beside `name` when it is killed while it writes that."""
    beside = folder / f".{name}.{host or _host()}.{process}.0123abcd{'.old' if old else ''}"
    save_folder(beside, "Thing", {"of": beside.name}, {})
    return beside


def snapshot(folder) -> dict[str, int]:
    """Names and times of change of all that is in a folder."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_what_killed_processes_left_is_removed_when_the_folder_is_written(tmp_path):
    left(tmp_path, "a")
    left(tmp_path, "a", old=True)
    running = left(tmp_path, "a", process=os.getppid())
    other = left(tmp_path, "a.b")
    save_folder(tmp_path / "a", "Thing", {}, {})
    assert set(tmp_path.iterdir()) == {tmp_path / "a", running, other}


@pytest.mark.parametrize("old", [True, False])
def test_what_another_machine_may_be_writing_is_never_removed(tmp_path, old):
    """Its process has a number that means nothing here."""
    theirs = left(tmp_path, "a", host="elsewhere", old=old)
    save_folder(tmp_path / "a", "Thing", {}, {})
    assert theirs.is_dir()


@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_a_folder_that_was_about_to_be_replaced_is_read_where_it_lies(tmp_path, host):
    old = left(tmp_path, "a", host=host, old=True)
    before = snapshot(tmp_path)
    assert load_folder(tmp_path / "a", "Thing")[0] == {"of": old.name}
    assert snapshot(tmp_path) == before


def test_a_folder_that_was_about_to_be_replaced_is_put_back_when_writing_fails(tmp_path):
    old = left(tmp_path, "b", old=True)
    with pytest.raises(TypeError):
        save_folder(tmp_path / "b", "Thing", {"x": object()}, {})
    assert load_folder(tmp_path / "b", "Thing")[0] == {"of": old.name}
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_reading_changes_nothing(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.ones(2)})
    left(tmp_path, "a")
    left(tmp_path, "a", old=True)
    before = snapshot(tmp_path)
    load_folder(tmp_path / "a", "Thing")
    with pytest.raises(CheckpointError):
        load_folder(tmp_path / "none", "Thing")
    assert snapshot(tmp_path) == before


def test_two_temporary_names_are_never_the_same(tmp_path):
    with temporary_beside(tmp_path / "a") as one, temporary_beside(tmp_path / "a") as other:
        assert one != other


def test_what_an_earlier_process_of_the_same_number_left_is_removed(tmp_path):
    """As in a container, where every process may be number 1."""
    left(tmp_path, "a", process=os.getpid())
    with temporary_beside(tmp_path / "a") as mine:
        mine.mkdir()
        save_folder(tmp_path / "a", "Thing", {}, {})
        assert set(tmp_path.iterdir()) == {tmp_path / "a", mine}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_whose_replacement_fails_is_put_back(tmp_path, monkeypatch):
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


def test_of_several_old_folders_the_newest_is_read(tmp_path):
    one, other = left(tmp_path, "a", old=True), left(tmp_path, "a", host="elsewhere", old=True)
    for path, time_s in ((one, 2_000_000_000), (other, 1_000_000_000)):
        os.utime(path, (time_s, time_s))
    assert load_folder(tmp_path / "a", "Thing")[0] == {"of": one.name}


def test_a_failed_save_keeps_the_old_one(tmp_path):
    save_folder(tmp_path / "a", "Thing", {"x": 1}, {})
    with pytest.raises(TypeError):
        save_folder(tmp_path / "a", "Thing", {"x": object()}, {})
    assert load_folder(tmp_path / "a", "Thing")[0] == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no checkpoint of merv; it is left as it is"):
        save_folder(tmp_path / "mine", "Thing", {}, {})
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_a_folder_of_another_library_is_not_overwritten(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is no checkpoint of merv; it is left as it is"):
        save_folder(tmp_path / "llm", "Thing", {}, {})
    assert (tmp_path / "llm/config.json").is_file()


def test_a_folder_of_something_else_is_not_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        load_folder(tmp_path / "none", "Thing")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(
        CheckpointError, match=r"needs config\.json and model\.safetensors; there is .*other\.txt"
    ):
        load_folder(tmp_path, "Thing")


def test_another_kind_is_named(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {})
    with pytest.raises(CheckpointError, match="holds a 'Thing'; wanted a 'VideoLLM'"):
        load_folder(tmp_path / "a", "VideoLLM")


def test_a_foreign_config_is_refused(tmp_path):
    save_folder(tmp_path / "a", "Thing", {}, {})
    (tmp_path / "a/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="was written not by merv"):
        load_folder(tmp_path / "a", "Thing")


def test_missing_left_over_and_misshapen_tensors_are_named():
    own = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(
        CheckpointError, match=r"1 missing \(a\); 1 left over \(c\); 1 of another shape \(b\)"
    ):
        fill_exactly(own, {"b": torch.ones(3), "c": torch.ones(1)}, "folder")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_named(tmp_path, file):
    save_folder(tmp_path / "a", "Thing", {}, {"w": torch.ones(2)})
    (tmp_path / "a" / file).write_bytes((tmp_path / "a" / file).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="a is damaged"):
        load_folder(tmp_path / "a", "Thing")


def test_what_is_saved_can_be_read_by_whoever_reads_its_config(tmp_path):
    save_folder(tmp_path / "a", "VideoLLM", {}, {"w": torch.zeros(1)})
    modes = {(tmp_path / "a" / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_a_misspelt_folder_names_what_is_there(tmp_path):
    save_folder(tmp_path / "run/model", "VideoLLM", {}, {"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no folder .*modle\. Did you mean 'model'"):
        load_folder(tmp_path / "run/modle", "VideoLLM")
    with pytest.raises(CheckpointError, match=r"is no checkpoint of merv: .*Did you mean 'model'"):
        load_folder(tmp_path / "run", "VideoLLM")
