"""`merv average` writes folders that load, and accepts only checkpoints."""

import shutil
from typing import Any

import pytest
import torch

from merv.checkpoints.average import average
from merv.checkpoints.config_schema import KINDS
from merv.checkpoints.folder import load_folder, read_config, save_folder, write_config
from merv.cli.main import main
from merv.errors import CheckpointError
from merv.models.llm import load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm


@pytest.fixture(autouse=True)
def thing(monkeypatch):
    """Kinds of models whose config can be any JSON value."""
    for kind in ("Thing", "Other"):
        monkeypatch.setitem(KINDS, kind, Any)


def save_thing(folder, value, config=None, kind="Thing", **tensors) -> str:
    """Save a bf16 tensor with this value, and further tensors."""
    tensors = {"w": torch.full((2,), value, dtype=torch.bfloat16), **tensors}
    save_folder(folder, kind, config or {"x": {"y": 1}}, tensors)
    return str(folder)


def save_multi_encoder(folder) -> MultiEncoder:
    encoders = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2), output_dim=16)
    for parameter in encoders.fusion.parameters():
        torch.nn.init.normal_(parameter)
    encoders.save_pretrained(folder)
    return encoders


# Average ------------------------------------------------------------------------------------


def test_mean_of_multi_encoders_loads(tmp_path):
    one, other = save_multi_encoder(tmp_path / "one"), save_multi_encoder(tmp_path / "other")
    assert (
        main(["average", str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(tmp_path / "mean")])
        == 0
    )
    mean = MultiEncoder.from_pretrained(tmp_path / "mean").trainable_state_dict()
    expected = {
        name: (tensor + other.trainable_state_dict()[name]) / 2
        for name, tensor in one.trainable_state_dict().items()
    }
    assert all(torch.allclose(mean[name], expected[name]) for name in expected)
    assert mean.keys() == expected.keys()


def test_only_ratios_of_coefficients_matter(tmp_path):
    folders = [save_thing(tmp_path / name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 5.0))]
    assert main(["average", *folders, "--out", str(tmp_path / "mean"), "--coefficients", "1", "2", "1"]) == 0
    assert load_folder(tmp_path / "mean", "Thing")[1]["w"].tolist() == [2.5, 2.5]


def test_sums_are_fp32_and_the_mean_has_the_first_dtype(tmp_path):
    values = (1.0, *[2**-9] * 4)  # in bf16, 1 + 2**-9 is 1
    average([save_thing(tmp_path / str(i), value * 5) for i, value in enumerate(values)], tmp_path / "mean")
    mean = load_folder(tmp_path / "mean", "Thing")[1]["w"]
    assert mean.dtype == torch.bfloat16
    assert mean[0] == 1 + 2**-7


def test_training_state_is_left_out(tmp_path):
    folders = [save_thing(tmp_path / name, 1.0) for name in "ab"]
    for folder in folders:
        torch.save({"optimizer": 1}, f"{folder}/training.pt")
    average(folders, tmp_path / "mean")
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == ["config.json", "model.safetensors"]


def test_bundled_language_model_is_copied(tmp_path):
    tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm")
    model = VideoLLM(llm, tokenizer, MultiEncoder(["fake"], output_dim=llm.config.hidden_size))
    for name in "ab":
        model.save_pretrained(tmp_path / name)
        shutil.copytree(tmp_path / "llm", tmp_path / name / "llm")
        kind, config = read_config(tmp_path / name)
        config["llm"]["source"] = "llm"
        write_config(tmp_path / name, kind, config)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    assert VideoLLM.from_pretrained(tmp_path / "mean").llm_identity["source"] == str(tmp_path / "mean/llm")


@pytest.mark.parametrize("source", ["", ".", "../elsewhere"])
def test_only_a_folder_inside_the_model_is_copied(tmp_path, source):
    (tmp_path / "elsewhere").mkdir()
    folders = [save_thing(tmp_path / name, 1.0, {"llm": {"source": source}}) for name in "ab"]
    average(folders, tmp_path / "mean")
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "elsewhere", "mean"]


def test_mean_may_replace_a_checkpoint(tmp_path):
    folders = [save_thing(tmp_path / name, value) for name, value in (("a", 1.0), ("b", 3.0))]
    average(folders, folders[0])
    assert load_folder(folders[0], "Thing")[1]["w"].tolist() == [2, 2]


def test_sources_of_parts_may_differ(tmp_path):
    configs = {"a": {"source": "/x", "sha256": "1"}, "b": {"source": "/y", "revision": "main", "sha256": "1"}}
    average([save_thing(tmp_path / name, 1.0, config) for name, config in configs.items()], tmp_path / "mean")
    assert load_folder(tmp_path / "mean", "Thing")[0]["source"] == "/x"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"config": {"x": {"y": 2}}}, r"a and .*b .*x\.y is 1 .* 2 "),
        ({"kind": "Other"}, "b .*'Other'.*'Thing'"),
        ({"v": torch.ones(1)}, r"a and .*b .*\(v\)"),
        ({"w": torch.ones(3)}, r"a and .*b .*\(w \[3\]"),
    ],
)
def test_different_models_are_not_averaged(tmp_path, other, difference):
    folders = [save_thing(tmp_path / "a", 1.0), save_thing(tmp_path / "b", 1.0, **other)]
    with pytest.raises(CheckpointError, match=difference):
        average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_integer_tensors_must_be_equal(tmp_path):
    folders = [save_thing(tmp_path / name, 1.0, n=torch.tensor([7])) for name in "ab"]
    average(folders, tmp_path / "mean")
    assert load_folder(tmp_path / "mean", "Thing")[1]["n"].tolist() == [7]
    save_thing(tmp_path / "b", 1.0, n=torch.tensor([8]))
    with pytest.raises(CheckpointError, match=r"n: .*torch\.int64"):
        average(folders, tmp_path / "mean")


@pytest.mark.parametrize(
    ("count", "coefficients", "values"),
    [
        (1, None, "got 1 "),
        (2, [1.0], r"got 2 .*\[1\.0\]"),
        (2, [1.0, -1.0], r"\[1\.0, -1\.0\]"),
        (2, [0.0, 0.0], r"\[0\.0, 0\.0\]"),
        (2, [1.0, float("nan")], "nan"),
    ],
)
def test_invalid_coefficients_are_an_error(tmp_path, count, coefficients, values):
    folders = [save_thing(tmp_path / name, 1.0) for name in "ab"[:count]]
    with pytest.raises(CheckpointError, match=values):
        average(folders, tmp_path / "mean", coefficients)


def test_damaged_checkpoint_is_named(tmp_path):
    folders = [save_thing(tmp_path / name, 1.0) for name in "ab"]
    (tmp_path / "b/model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=str(tmp_path / "b")):
        average(folders, tmp_path / "mean")


def test_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="mine"):
        average([save_thing(tmp_path / name, 1.0) for name in "ab"], tmp_path / "mine")
