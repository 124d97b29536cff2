"""Runs of `merv fit` with FSDP2 and DDP, in one process."""

import pytest
import torch
from running import QUIET, difference, fit, make_material, weights
from safetensors.torch import load_file

from merv.models.video_llm import VideoLLM

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


def test_sharded_run_resumes_and_its_checkpoints_are_those_of_any_run(material, tmp_path):
    options = {"trainer__devices": 1, "checkpoints__every_n_steps": 3}
    options |= {"model__trainable": "[projector,mixer,lora]", "model__lora": "{r: 2}"}
    sharded = {**options, "trainer__strategy": "sharded"}
    assert fit(material, tmp_path / "plain", **options) == 0
    assert fit(material, tmp_path / "sharded", **sharded) == 0
    assert difference(weights(tmp_path / "plain"), weights(tmp_path / "sharded")) < 1e-6
    model = VideoLLM.from_pretrained(tmp_path / "sharded/checkpoints/step=6")
    assert difference(weights(tmp_path / "sharded"), model.trainable_state_dict()) == 0
    checkpoint = tmp_path / "sharded/checkpoints/step=3"
    for name, resumed, limit in ("sharded", sharded, 0), ("plain", options, 1e-6):  # also without sharding
        assert fit(material, tmp_path / f"2 {name}", **resumed, ckpt_path=checkpoint) == 0
        assert difference(weights(tmp_path / name), weights(tmp_path / f"2 {name}")) <= limit


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
    state = load_file(tmp_path / "sharded/checkpoints/step=3/model.safetensors")
    assert difference(weights(tmp_path / "sharded"), state) == 0


def test_ddp_does_not_count_frozen_encoders_as_modified(material, tmp_path):
    ddp = {"trainer__strategy": "ddp", "trainer__devices": 1, "trainer__max_epochs": 1}
    assert fit(material, tmp_path / "ddp", **ddp) == 0
    assert not [name for name in weights(tmp_path / "ddp") if "encoders" in name]
