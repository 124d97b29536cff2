"""Runs that were stopped or killed at any point resume to the same result."""

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import QUIET, difference, fit, make_material, weights

from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.training.checkpointing import newest_checkpoint
from merv.training.module import Training, warmup_cosine

pytestmark = QUIET
ALL = {"checkpoints__every_n_steps": 1, "checkpoints__save_total_limit": "null"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def record_batches(monkeypatch, entry=lambda module, batch: batch.origins[0].rpartition(":")[2]) -> list:
    """Return a list that gets an entry for each batch that is trained on."""
    seen, step = [], Training.training_step

    def record(self, batch, index):
        seen.append(entry(self, batch))
        return step(self, batch, index)

    monkeypatch.setattr(Training, "training_step", record)
    return seen


# Accumulation, validation within an epoch, and epochs that end within an accumulation
ACCUMULATED = {"data__batch_size": 1, "trainer__accumulate_grad_batches": 4, "trainer__val_check_interval": 3}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_run_resumes_from_every_step_to_the_same_weights(material, tmp_path):
    options = {**ACCUMULATED, **ALL, "data__val": material / "data.jsonl"}
    assert fit(material, tmp_path / "whole", **options) == 0
    assert checkpoint_names(tmp_path / "whole") == ["best", "step=1", "step=2", "step=3", "step=4"]
    for step in ("step=1", "step=2", "step=3"):
        shutil.copytree(tmp_path / "whole/checkpoints" / step, tmp_path / step / "checkpoints" / step)
        assert fit(material, tmp_path / step, **options, ckpt_path="last") == 0
        assert difference(weights(tmp_path / "whole"), weights(tmp_path / step)) == 0


def test_resumed_run_does_not_rewrite_its_checkpoint(material, tmp_path):
    options = {"data__batch_size": 1, "trainer__accumulate_grad_batches": 2, **ALL}
    assert fit(material, tmp_path, trainer__max_epochs=1, **options) == 0
    before = (tmp_path / "checkpoints/step=3").stat().st_ino
    assert fit(material, tmp_path, **options, ckpt_path="last") == 0
    assert (tmp_path / "checkpoints/step=3").stat().st_ino == before


def test_run_resumes_after_the_step_with_a_nan_loss(material, tmp_path, monkeypatch):
    options = {
        "data__batch_size": 1,
        "trainer__accumulate_grad_batches": 2,
        "data__val": material / "data.jsonl",
    }
    options |= {"trainer__max_epochs": 1, "trainer__num_sanity_val_steps": 0}
    seen = record_batches(monkeypatch, entry=lambda module, batch: (module.global_step, batch.origins[0]))
    forward, validated = VideoLLM.forward, []

    def forward_with_nan(self, *args, **options):
        out = forward(self, *args, **options)
        return replace(out, logits=out.logits * float("nan")) if len(seen) == 3 else out

    monkeypatch.setattr(VideoLLM, "forward", forward_with_nan)
    monkeypatch.setattr(
        Training, "on_validation_epoch_start", lambda self: validated.append(self.global_step)
    )
    monkeypatch.setattr(Training, "validation_step", lambda *_: None)
    monkeypatch.setattr(Training, "on_validation_epoch_end", lambda self: self.log("val/exact_match", 0.0))
    assert fit(material, tmp_path, **options) == 2
    assert fit(material, tmp_path, **options, ckpt_path="last") == 0
    assert len({origin for _, origin in seen}) == len(seen) == 6
    assert [step for step, _ in seen] == [0, 0, 1, 1, 1, 1]  # the second step was discarded
    assert validated == [2]
    assert checkpoint_names(tmp_path) == ["best", "step=1", "step=2"]


def test_run_that_ends_early_saves_a_checkpoint(material, tmp_path, monkeypatch):
    def stop(self, *_):
        self.trainer.should_stop = self.global_step == 2

    monkeypatch.setattr(Training, "on_train_batch_end", stop)
    monkeypatch.setattr(Training, "on_before_zero_grad", stop)
    assert fit(material, tmp_path) == 0
    assert checkpoint_names(tmp_path) == ["step=2"]
    assert (tmp_path / "model").is_dir()


def test_stopped_run_skips_validation(material, tmp_path, monkeypatch):
    validated = []
    monkeypatch.setattr(
        Training, "on_train_batch_start", lambda self, *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    monkeypatch.setattr(Training, "validation_step", lambda self, *_: validated.append(self.global_step))
    options = {"data__val": material / "data.jsonl", "trainer__num_sanity_val_steps": 0}
    assert fit(material, tmp_path, **options) == 130
    assert checkpoint_names(tmp_path) == ["step=1"]
    assert not validated


def test_betas_are_passed_to_the_optimizer(material, tmp_path, monkeypatch):
    betas = record_batches(monkeypatch, entry=lambda module, _: module.optimizers().param_groups[-1]["betas"])
    assert fit(material, tmp_path, trainer__max_epochs=1, model__betas="[0.8, 0.9]") == 0
    assert set(betas) == {(0.8, 0.9)}


def test_extended_run_has_the_learning_rates_of_the_longer_one(material, tmp_path, monkeypatch):
    rates = record_batches(monkeypatch, entry=lambda module, _: module.optimizers().param_groups[0]["lr"])
    assert fit(material, tmp_path / "long", trainer__max_epochs=4) == 0
    long = rates[6:]
    rates.clear()
    assert fit(material, tmp_path / "short") == 0
    assert fit(material, tmp_path / "short", trainer__max_epochs=4, ckpt_path="last") == 0
    assert rates[6:] == long


def test_newest_checkpoint_ignores_other_folders(tmp_path):
    for name in ("step=9", "step=10", "step=11-good", "step=12"):
        (tmp_path / name).mkdir()
        if name != "step=12":
            (tmp_path / name / "training.pt").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step=10"


def test_kind_may_have_the_name_of_a_logged_value(material, tmp_path):
    text = (material / "data.jsonl").read_text()
    (material / "kinds.jsonl").write_text(text.replace('"who"', '"exact_match"'))
    assert fit(material, tmp_path, data__val=material / "kinds.jsonl", trainer__max_epochs=1) == 0
    rest = torch.load(tmp_path / "checkpoints/best/training.pt", weights_only=True)
    assert rest["global_step"] == 3


def test_bad_batch_right_after_a_checkpoint_is_not_repeated(material, tmp_path, monkeypatch):
    seen, forward = record_batches(monkeypatch), VideoLLM.forward

    def forward_with_nan(self, *args, **options):
        out = forward(self, *args, **options)
        return replace(out, logits=out.logits * float("nan")) if len(seen) == 3 else out

    monkeypatch.setattr(VideoLLM, "forward", forward_with_nan)
    options = {"data__batch_size": 1, "trainer__max_epochs": 1, **ALL}
    assert fit(material, tmp_path, **options) == 2
    assert fit(material, tmp_path, **options, ckpt_path="last") == 0
    assert len(set(seen)) == len(seen) == 6


def test_resumed_run_deletes_old_checkpoints_of_the_stopped_run(material, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Training, "on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert fit(material, tmp_path) == 130
    assert fit(material, tmp_path, ckpt_path="last", checkpoints__every_n_steps=2) == 0
    assert checkpoint_names(tmp_path) == ["step=4", "step=6"]


def test_run_stopped_while_encoding_keeps_stored_features(material, tmp_path, monkeypatch, capsys):
    features = MultiEncoder.features

    def interrupted(self, *args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return features(self, *args, **options)

    monkeypatch.setattr(MultiEncoder, "features", interrupted)
    assert fit(material, tmp_path, model__feature_store=tmp_path / "store") == 2
    assert str(tmp_path / "store") in capsys.readouterr().err
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 1


# Runs that only check that everything works ------------------------------------------------


@pytest.mark.parametrize("batches", ["true", "2"])
def test_dev_run_leaves_nothing_in_the_folder_of_the_run(material, tmp_path, batches):
    options = {"sample_answers__every_n_steps": 1, **ALL, "data__val": material / "data.jsonl"}
    assert fit(material, tmp_path / "run", trainer__fast_dev_run=batches, **options) == 0
    assert not (tmp_path / "run").exists()


def test_dev_run_leaves_an_earlier_run_as_it_was(material, tmp_path):
    assert fit(material, tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for resume in ({}, {"ckpt_path": "auto"}, {"ckpt_path": "last"}):
        assert fit(material, tmp_path, trainer__fast_dev_run="true", **resume) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_stopped_dev_run_leaves_nothing(material, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert fit(material, tmp_path / "run", trainer__fast_dev_run="true") == 130
    assert not (tmp_path / "run").exists()


def test_dev_run_encodes_only_the_videos_of_its_batches(material, tmp_path, monkeypatch):
    monkeypatch.setattr("merv.training.module.encode_all", None)
    assert fit(material, tmp_path, trainer__fast_dev_run="true") == 0


# Resumed runs with another number of steps ---------------------------------------------------


def test_learning_rate_stays_zero_beyond_the_end_of_the_schedule():
    rates = [warmup_cosine(step, warmup_steps=2, steps=10) for step in range(40)]
    assert rates[10:] == [0.0] * 30
    assert warmup_cosine(3, warmup_steps=5, steps=3) == 0


@pytest.fixture(scope="module")
def two_of_six_steps(material, tmp_path_factory):
    """A run that was stopped after 2 of 6 steps."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Training,
            "on_before_zero_grad",
            lambda self, *_: os.kill(os.getpid(), signal.SIGTERM) if self.global_step == 1 else None,
        )
        assert fit(material, out) == 130
    assert checkpoint_names(out) == ["step=2"]
    return out


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("trainer__accumulate_grad_batches", 2, "trainer.accumulate_grad_batches"),
        ("trainer__limit_train_batches", 2, "trainer.limit_train_batches"),
        ("trainer__max_steps", 1, "trainer.max_steps"),
    ],
)
def test_resuming_with_steps_that_do_not_fit_names_the_option(
    material, two_of_six_steps, tmp_path, capsys, option, value, name
):
    shutil.copytree(two_of_six_steps, tmp_path, dirs_exist_ok=True)
    assert fit(material, tmp_path, ckpt_path="last", **{option: value}) == 2
    assert name in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_shortened_run_has_the_learning_rates_of_the_shorter_one(
    material, two_of_six_steps, tmp_path, monkeypatch, caplog
):
    rates = record_batches(monkeypatch, entry=lambda module, _: module.optimizers().param_groups[0]["lr"])
    assert fit(material, tmp_path / "short", trainer__max_steps=4) == 0
    short = rates[2:]
    rates.clear()
    shutil.copytree(two_of_six_steps, tmp_path / "long")
    assert fit(material, tmp_path / "long", ckpt_path="last", trainer__max_steps=4) == 0
    assert rates == short
    assert re.search("4.*6", caplog.text)
