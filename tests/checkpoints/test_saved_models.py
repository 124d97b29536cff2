"""Folders of models where they are used: to start a stage from, to join an encoder to, to take code from."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from merv.cli.main import main
from merv.errors import CheckpointError, PluginError, TrainingError, WeightsError
from merv.features.store import FeatureStore
from merv.models.llm import load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm
from merv.training.module import Training


@pytest.fixture
def saved(tmp_path):
    """A model of `fake` that is a folder, beside its language model."""
    tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm")
    vision = MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size)
    VideoLLM(llm, tokenizer, vision).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stage(folder, encoders=("fake",), **options) -> Training:
    """What `merv fit` makes of a recipe that starts from a folder."""
    options = {"llm": str(folder.parent / "llm"), "grid": (2, 1, 1), "init_from": str(folder), **options}
    module = Training(encoders=list(encoders), **options)
    module.configure_model()
    return module


@pytest.fixture
def clip():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


# Kept features ------------------------------------------------------------------------------


def test_features_of_an_encoder_that_was_trained_are_not_taken_for_those_of_its_source(saved, clip):
    store, first = FeatureStore(), VideoLLM.from_pretrained(saved)
    untrained = first.vision.features(clip, store=store)["fake"].values
    first.train_only(["fake"])
    with torch.no_grad():
        first.vision.encoder("fake").net.bias[-1] += 1.0
    first.save_pretrained(saved)
    second = VideoLLM.from_pretrained(saved)
    second.train_only(["projector"])
    kept = second.vision.features(clip, store=store)["fake"].values
    assert torch.equal(kept, second.vision.features(clip)["fake"].values)
    assert not torch.equal(kept, untrained)


def test_each_step_of_training_has_features_of_its_own_and_a_loaded_model_those_of_the_last(saved, clip):
    model = VideoLLM.from_pretrained(saved)
    model.train_only(["fake"])
    keys = [model.vision.key(clip, "fake")]
    for parameter in model.vision.encoder("fake").parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6  # too small to be seen in bf16
        keys.append(model.vision.key(clip, "fake"))
    assert len(set(keys)) == len(keys)
    model.save_pretrained(saved)
    assert VideoLLM.from_pretrained(saved).vision.key(clip, "fake") == keys[-1]


def test_weights_are_hashed_once(saved, clip, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "merv.features.reader.values_digest", lambda encoder: calls.append(encoder) or "a hash"
    )
    model = VideoLLM.from_pretrained(saved)
    model.vision.key(clip, "fake")
    assert not calls  # its source tells what they are
    model.train_only(["fake"])
    model.vision.key(clip, "fake")
    model.vision.key(clip, "fake")
    assert len(calls) == 1


# Start --------------------------------------------------------------------------------------


def test_a_start_that_is_no_checkpoint_is_named(saved):
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model is no checkpoint of merv: it needs config\.json"):
        stage(saved)


def test_a_start_of_another_kind_is_named(saved):
    MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=32).save_pretrained(saved.parent / "encoders")
    with pytest.raises(TrainingError, match="holds a 'MultiEncoder'; wanted a 'VideoLLM'"):
        stage(saved.parent / "encoders")


# Encoders that join -------------------------------------------------------------------------

JOINED = {"encoders": ("fake", "fake/video"), "trainable": ("mixer.fake", "mixer.fake_video")}


def test_what_two_encoders_that_join_have_in_common_is_trained_once(saved):
    module = stage(saved, **JOINED)
    placed = [p for group in module.parameter_groups() for p in group["params"]]
    assert {id(p) for p in placed} == {id(p) for p in module.parameters() if p.requires_grad}
    torch.optim.AdamW(module.parameter_groups())  # refuses a parameter that is in two groups


def test_what_two_encoders_have_in_common_has_one_rate(saved):
    module = stage(saved, **JOINED, lr=1e-3, lr_overrides={"mixer.fake_video": 1e-4})
    said = r"mixer\.fake_video shares parameters .*at 0\.001 there and 0\.0001 here\. Set them equal"
    with pytest.raises(TrainingError, match=said):
        module.parameter_groups()


# Code ---------------------------------------------------------------------------------------

MINE = "from merv.encoders.fake import Fake\nclass Plugin(Fake):\n    pass\n"


def rename(folder, path) -> None:
    """Let a saved model say that its encoder is of the class `path`."""
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["encoders"]["fake"]["class"] = path
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file on the path, or elsewhere, that says when it is imported, and whose class is Plugin."""

    def write(name: str, on_path: bool = True) -> Path:
        ran = tmp_path / f"{name}.ran"
        (tmp_path / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n{MINE}")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path] if on_path else list(sys.path))
        importlib.invalidate_caches()
        return ran

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_model_does_not_get_code_imported(saved, file):
    ran = file("stranger_in_a_folder")
    rename(saved, "stranger_in_a_folder:Plugin")
    said = r"import stranger_in_a_folder` before .*merv ask --trust stranger_in_a_folder:Plugin"
    with pytest.raises(PluginError, match=said):
        VideoLLM.from_pretrained(saved)
    assert not ran.exists()


def test_a_plug_in_that_lies_in_the_folder_of_the_model_is_none(saved, file, plant, monkeypatch, capsys):
    ran = file("lies_beside", on_path=False)
    plant("lies-beside", {"beside": "lies_beside:Plugin"})
    rename(saved, "lies_beside:Plugin")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(saved.parent)])
    monkeypatch.chdir(saved.parent)
    assert main(["ask", "", "What?", "--model", "model"]) == 2
    assert "no installed distribution registers" in capsys.readouterr().err
    assert not ran.exists()


def test_weights_out_of_a_package_do_not_get_it_imported(saved, tmp_path, monkeypatch):
    (tmp_path / "brought_along" / "inner").mkdir(parents=True)
    (tmp_path / "brought_along" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=r"in the package brought_along\.inner are not on this machine"):
        VideoLLM.from_pretrained(saved, weights={"fake": "package:brought_along.inner/*.safetensors"})


def test_a_class_that_is_imported_already_is_taken(saved, file):
    ran = file("imported_before")
    rename(saved, "imported_before:Plugin")
    importlib.import_module("imported_before")
    assert type(VideoLLM.from_pretrained(saved).vision.encoder("fake")).__module__ == "imported_before"
    assert ran.exists()


def test_a_class_that_is_typed_is_taken_for_an_answer(saved, file, monkeypatch, capsys):
    file("typed_to_ask", on_path=False)
    rename(saved, "typed_to_ask:Plugin")
    monkeypatch.chdir(saved.parent)
    ask = ["ask", "", "What?", "--model", str(saved), "--max-new-tokens", "1"]
    assert main(ask) == 2
    assert "merv ask --trust typed_to_ask:Plugin" in capsys.readouterr().err
    assert main([*ask, "--trust", "typed_to_ask:Plugin"]) == 0


def test_a_class_that_is_typed_is_taken_for_a_stage(saved, file):
    file("typed_in_a_recipe")
    first = stage(saved, ["typed_in_a_recipe:Plugin"], init_from=None)
    first.model.save_pretrained(saved)
    del sys.modules["typed_in_a_recipe"]
    second = stage(saved, ["typed_in_a_recipe:Plugin"])
    assert list(second.model.vision.encoders) == ["Plugin"]


def test_a_class_that_a_distribution_registers_is_taken(saved, plant):
    plant("sunny-encoders", {"sunny": "sunny:Plugin"}, sunny=MINE)
    rename(saved, "sunny:Plugin")
    assert type(VideoLLM.from_pretrained(saved).vision.encoder("fake")).__module__ == "sunny"


def test_a_registered_class_is_taken_by_the_path_where_it_is_defined(saved, plant, tmp_path):
    plant("rainy-encoders", {"rainy": "rainy:Plugin", "wet": "rainy:nothing"})
    (tmp_path / "rainy").mkdir()
    (tmp_path / "rainy/__init__.py").write_text("from rainy.inside import Plugin")
    (tmp_path / "rainy/inside.py").write_text(MINE)
    rename(saved, "rainy.inside:Plugin")
    assert type(VideoLLM.from_pretrained(saved).vision.encoder("fake")).__module__ == "rainy.inside"
    rename(saved, "rainy.outside:Plugin")
    with pytest.raises(PluginError, match=r"saved as rainy\.outside:Plugin"):
        VideoLLM.from_pretrained(saved)


def test_a_trained_encoder_is_not_lost_with_the_model_that_it_was_trained_in():
    vision = MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=8)
    with torch.no_grad():
        next(vision.encoders["fake"].parameters()).add_(1)
    with pytest.raises(CheckpointError, match="fake"):
        vision.trainable_state_dict()
