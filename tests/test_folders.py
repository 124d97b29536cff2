"""Folders of models where they are used: to start a stage from, to join an encoder to, to take code from."""

import pytest

from merv.errors import CheckpointError, TrainingError
from merv.llm import load_llm
from merv.multi_encoder import MultiEncoder
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


# Start --------------------------------------------------------------------------------------


def test_a_start_that_is_no_checkpoint_is_named(saved):
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model is no checkpoint of merv: it needs config\.json"):
        stage(saved)


def test_a_start_of_another_kind_is_named(saved):
    MultiEncoder(["fake"], grid=(2, 1, 1), width=32).save_pretrained(saved.parent / "encoders")
    with pytest.raises(TrainingError, match="holds a 'MultiEncoder'; wanted a 'VideoLLM'"):
        stage(saved.parent / "encoders")
