"""Folders of models where they are used: to start a stage from, to join an encoder to, to take code from."""

import pytest
import torch

from merv.errors import CheckpointError, TrainingError
from merv.llm import load_llm
from merv.multi_encoder import MultiEncoder
from merv.store import FeatureStore
from merv.testing import tiny_llm
from merv.train import Training
from merv.video_llm import VideoLLM


@pytest.fixture
def saved(tmp_path):
    """A model of `fake` that is a folder, beside its language model."""
    tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm")
    vision = MultiEncoder(["fake"], grid=(2, 1, 1), width=llm.config.hidden_size)
    VideoLLM(llm, tokenizer, vision).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stage(folder, encoders=("fake",), **options) -> Training:
    """What `merv fit` makes of a recipe that starts from a folder."""
    options = {"llm": str(folder.parent / "llm"), "grid": (2, 1, 1), "start": str(folder), **options}
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
    monkeypatch.setattr("merv.reader.values_digest", lambda encoder: calls.append(encoder) or "a hash")
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
    MultiEncoder(["fake"], grid=(2, 1, 1), width=32).save_pretrained(saved.parent / "encoders")
    with pytest.raises(TrainingError, match="holds a 'MultiEncoder'; wanted a 'VideoLLM'"):
        stage(saved.parent / "encoders")
