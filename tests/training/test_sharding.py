"""Sharded runs of `merv fit`, in one process."""

import pytest
import torch
from running import QUIET, difference, fit, make_material, weights

from merv.training.sharding import full_state_dict

pytestmark = [*QUIET, pytest.mark.usefixtures("no_process_group"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def no_process_group():
    """Destroy the process group after each test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_sharded_run_resumes_and_its_checkpoint_is_consolidated(material, tmp_path):
    options = {"trainer__strategy": "sharded", "trainer__devices": 1, "checkpoints__every_n_steps": 3}
    lora = {"model__trainable": "[projector,mixer,lora]", "model__lora": "{r: 2}"}
    assert fit(material, tmp_path / "plain", **lora) == 0
    assert fit(material, tmp_path / "sharded", **lora, **options) == 0
    assert difference(weights(tmp_path / "plain"), weights(tmp_path / "sharded")) < 1e-6
    state = full_state_dict(tmp_path / "sharded/checkpoints/step=6")
    assert difference(weights(tmp_path / "sharded"), state) == 0
    resume = {**options, "ckpt_path": tmp_path / "sharded/checkpoints/step=3"}
    assert fit(material, tmp_path / "resumed", **lora, **resume) == 0
    assert difference(weights(tmp_path / "sharded"), weights(tmp_path / "resumed")) == 0


def test_sharded_llm_is_saved_correctly_after_generation(material, tmp_path):
    options = {
        "model__trainable": "[projector,mixer,llm]",
        "model__dtype": "fp32",
        "data__val": material / "data.jsonl",
        "trainer__gradient_clip_val": 0.5,
        "trainer__max_epochs": 1,
    }
    every_step = {
        "trainer__val_check_interval": 1,
        "sample_answers__every_n_steps": 1,
        "checkpoints__every_n_steps": 1,
    }
    sharded = {"trainer__strategy": "sharded", "trainer__devices": 1}
    assert fit(material, tmp_path / "plain", **options) == 0
    assert fit(material, tmp_path / "sharded", **options, **every_step, **sharded) == 0
    assert difference(weights(tmp_path / "plain"), weights(tmp_path / "sharded")) < 1e-6
    state = full_state_dict(tmp_path / "sharded/checkpoints/step=3")
    assert difference(weights(tmp_path / "sharded"), state) == 0
