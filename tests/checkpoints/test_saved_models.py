"""Loading saved models: stored features, later training stages, added encoders, and untrusted code."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from merv.checkpoints.folder import read_config, write_config
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
    """The folder of a saved model with the encoder `fake`, beside its language model."""
    tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm")
    vision = MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size)
    VideoLLM(llm, tokenizer, vision).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stage(folder, encoders=("fake",), **options) -> Training:
    """Build the Training of a recipe whose `init_from` is the folder."""
    options = {"llm": str(folder.parent / "llm"), "grid": (2, 1, 1), "init_from": str(folder), **options}
    module = Training(encoders=list(encoders), **options)
    module.configure_model()
    return module


@pytest.fixture
def clip():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


# Stored features ----------------------------------------------------------------------------


def test_trained_encoder_does_not_use_stored_features_of_its_source(saved, clip):
    store, first = FeatureStore(), VideoLLM.from_pretrained(saved)
    untrained = first.vision.features(clip, store=store)["fake"].values
    first.train_only(["fake"])
    with torch.no_grad():
        first.vision.encoder("fake").net.bias[-1] += 1.0
    first.save_pretrained(saved)
    second = VideoLLM.from_pretrained(saved)
    second.train_only(["projector"])
    features = second.vision.features(clip, store=store)["fake"].values
    assert torch.equal(features, second.vision.features(clip)["fake"].values)
    assert not torch.equal(features, untrained)


def test_feature_key_changes_with_every_training_step_and_survives_saving(saved, clip):
    model = VideoLLM.from_pretrained(saved)
    model.train_only(["fake"])
    keys = [model.vision.key(clip, "fake")]
    for parameter in model.vision.encoder("fake").parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6  # vanishes in bf16
        keys.append(model.vision.key(clip, "fake"))
    assert len(set(keys)) == len(keys)
    model.save_pretrained(saved)
    assert VideoLLM.from_pretrained(saved).vision.key(clip, "fake") == keys[-1]


def test_weights_are_hashed_once(saved, clip, monkeypatch):
    calls = []
    monkeypatch.setattr("merv.features.keys.values_digest", lambda encoder: calls.append(encoder) or "a hash")
    model = VideoLLM.from_pretrained(saved)
    model.vision.key(clip, "fake")
    assert not calls  # the source identifies the weights
    model.train_only(["fake"])
    model.vision.key(clip, "fake")
    model.vision.key(clip, "fake")
    assert len(calls) == 1


# init_from ----------------------------------------------------------------------------------


def test_init_from_must_be_a_checkpoint(saved):
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model .*config\.json"):
        stage(saved)


def test_init_from_must_be_a_video_llm(saved):
    MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=32).save_pretrained(saved.parent / "encoders")
    with pytest.raises(TrainingError, match=r"'MultiEncoder'.*'VideoLLM'"):
        stage(saved.parent / "encoders")


# Added encoders -----------------------------------------------------------------------------

JOINED = {"encoders": ("fake", "fake/video"), "trainable": ("mixer.fake", "mixer.fake_video")}


def test_parameters_shared_by_added_encoders_are_in_one_group(saved):
    module = stage(saved, **JOINED)
    placed = [p for group in module.parameter_groups() for p in group["params"]]
    assert {id(p) for p in placed} == {id(p) for p in module.parameters() if p.requires_grad}
    torch.optim.AdamW(module.parameter_groups())  # raises if a parameter is in two groups


def test_shared_parameters_need_one_learning_rate(saved):
    module = stage(saved, **JOINED, lr=1e-3, lr_overrides={"mixer.fake_video": 1e-4})
    with pytest.raises(TrainingError, match=r"mixer\.fake_video.*0\.001.*0\.0001"):
        module.parameter_groups()


# Code of plug-ins ---------------------------------------------------------------------------

MINE = "from merv.encoders.fake import Fake\nclass Plugin(Fake):\n    pass\n"


def set_encoder_class(folder, path) -> None:
    """Change the class of the encoder in a saved model's config."""
    kind, config = read_config(folder)
    config["vision"]["encoders"]["fake"]["class"] = path
    write_config(folder, kind, config)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a module with a class Plugin; importing it touches the returned file."""

    def write(name: str, on_path: bool = True) -> Path:
        ran = tmp_path / f"{name}.ran"
        (tmp_path / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n{MINE}")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path] if on_path else list(sys.path))
        importlib.invalidate_caches()
        return ran

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_loading_imports_no_code(saved, file):
    ran = file("stranger_in_a_folder")
    set_encoder_class(saved, "stranger_in_a_folder:Plugin")
    with pytest.raises(PluginError, match="stranger_in_a_folder:Plugin"):
        VideoLLM.from_pretrained(saved)
    assert not ran.exists()


@pytest.mark.parametrize("file_of_auto_map", ["config.json", "tokenizer_config.json"])
def test_code_of_a_language_model_is_not_run(saved, tmp_path, monkeypatch, file_of_auto_map):
    ran = tmp_path / "ran"
    (tmp_path / "llm/code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()")
    config = json.loads((tmp_path / "llm" / file_of_auto_map).read_text())
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    config |= {"auto_map": names, "model_type": "unheard_of", "tokenizer_class": "T"}
    (tmp_path / "llm" / file_of_auto_map).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("it asks whether to run the code"))
    with pytest.raises(WeightsError, match="llm"):
        VideoLLM.from_pretrained(saved)
    assert not ran.exists()


def test_plug_in_beside_the_model_is_not_imported(saved, file, plant, monkeypatch, capsys):
    ran = file("lies_beside", on_path=False)
    plant("lies-beside", {"beside": "lies_beside:Plugin"})
    set_encoder_class(saved, "lies_beside:Plugin")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(saved.parent)])
    monkeypatch.chdir(saved.parent)
    assert main(["ask", "", "What?", "--model", "model"]) == 2
    assert "lies_beside" in capsys.readouterr().err
    assert not ran.exists()


def test_weights_in_a_package_do_not_import_it(saved, tmp_path, monkeypatch):
    (tmp_path / "brought_along" / "inner").mkdir(parents=True)
    (tmp_path / "brought_along" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=r"brought_along\.inner"):
        VideoLLM.from_pretrained(saved, weights={"fake": "package:brought_along.inner/*.safetensors"})


def test_imported_class_is_accepted(saved, file):
    ran = file("imported_before")
    set_encoder_class(saved, "imported_before:Plugin")
    importlib.import_module("imported_before")
    assert type(VideoLLM.from_pretrained(saved).vision.encoder("fake")).__module__ == "imported_before"
    assert ran.exists()


def test_ask_accepts_a_trusted_class(saved, file, monkeypatch, capsys):
    file("typed_to_ask", on_path=False)
    set_encoder_class(saved, "typed_to_ask:Plugin")
    monkeypatch.chdir(saved.parent)
    ask = ["ask", "", "What?", "--model", str(saved), "--max-new-tokens", "1"]
    assert main(ask) == 2
    assert "--trust typed_to_ask:Plugin" in capsys.readouterr().err
    assert main([*ask, "--trust", "typed_to_ask:Plugin"]) == 0


def test_recipe_accepts_the_class_that_it_names(saved, file):
    file("typed_in_a_recipe")
    first = stage(saved, ["typed_in_a_recipe:Plugin"], init_from=None)
    first.model.save_pretrained(saved)
    del sys.modules["typed_in_a_recipe"]
    second = stage(saved, ["typed_in_a_recipe:Plugin"])
    assert list(second.model.vision.encoders) == ["Plugin"]


def test_registered_class_is_accepted(saved, plant):
    plant("sunny-encoders", {"sunny": "sunny:Plugin"}, sunny=MINE)
    set_encoder_class(saved, "sunny:Plugin")
    assert type(VideoLLM.from_pretrained(saved).vision.encoder("fake")).__module__ == "sunny"


def test_registered_class_is_accepted_by_its_defining_module(saved, plant, tmp_path):
    plant("rainy-encoders", {"rainy": "rainy:Plugin", "wet": "rainy:nothing"})
    (tmp_path / "rainy").mkdir()
    (tmp_path / "rainy/__init__.py").write_text("from rainy.inside import Plugin")
    (tmp_path / "rainy/inside.py").write_text(MINE)
    set_encoder_class(saved, "rainy.inside:Plugin")
    assert type(VideoLLM.from_pretrained(saved).vision.encoder("fake")).__module__ == "rainy.inside"
    set_encoder_class(saved, "rainy.outside:Plugin")
    with pytest.raises(PluginError, match=r"rainy\.outside:Plugin"):
        VideoLLM.from_pretrained(saved)


def test_multi_encoder_with_a_trained_encoder_is_not_saved():
    vision = MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=8)
    with torch.no_grad():
        next(vision.encoders["fake"].parameters()).add_(1)
    with pytest.raises(CheckpointError, match="fake"):
        vision.trainable_state_dict()
