import json

import pytest
import torch

from merv.checkpoint import fill_exactly, load_folder, save_folder
from merv.errors import CheckpointError


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
    with pytest.raises(CheckpointError, match="was not written by merv"):
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
