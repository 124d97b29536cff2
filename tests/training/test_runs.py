"""Whole runs of `merv fit`: stopped, gone on with, told wrongly."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback
from running import QUIET, difference, fit, make_material, weights

from merv.data.module import ChatData
from merv.errors import CheckpointError, DataError, TrainingError
from merv.models.video_llm import VideoLLM
from merv.training import checkpointing as resume
from merv.training.callbacks import LossMonitor
from merv.training.checkpointing import newest
from merv.training.module import Training, compare

pytestmark = QUIET


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def started(material, tmp_path_factory):
    """A model that an earlier stage left."""
    out = tmp_path_factory.mktemp("started")
    assert fit(material, out, trainer__max_epochs=1) == 0
    return out / "model"


class Interrupt(Callback):
    """Presses Ctrl-C in the middle of a step, or is the scheduler that ends the job."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_micro_batches_train_as_the_large_batch(material, tmp_path, accumulated):
    assert fit(material, tmp_path / "large", data__batch_size=4) == 0
    small = {"data__batch_size": 4 // accumulated, "trainer__accumulate_grad_batches": accumulated}
    assert fit(material, tmp_path / "small", **small) == 0
    assert difference(weights(tmp_path / "large"), weights(tmp_path / "small")) < 1e-6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_to_the_same_weights(
    material, tmp_path, capsys, monkeypatch, number
):
    options = {"model__trainable": "[projector,mixer,lora]", "model__lora": "{r: 2, lora_dropout: 0.1}"}
    assert fit(material, tmp_path / "whole", **options) == 0
    stop = json.dumps(
        [{"class_path": "test_runs.Interrupt", "init_args": {"step": 4, "number": int(number)}}]
    )
    monkeypatch.setitem(__import__("sys").modules, "test_runs", __import__("sys").modules[__name__])
    assert fit(material, tmp_path / "cut", **options, trainer__callbacks=stop) == 130
    assert "To go on: the same with --ckpt_path=last" in capsys.readouterr().out
    assert not (tmp_path / "cut/model").exists()
    assert newest(tmp_path / "cut/checkpoints").name == "step=4"
    assert fit(material, tmp_path / "cut", **options, ckpt_path="last") == 0
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0


def test_a_checkpoint_is_a_model_and_older_ones_go(material, tmp_path):
    assert fit(material, tmp_path, checkpoints__every_n_steps=1, checkpoints__save_total_limit=2) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step=5", "step=6"]
    model = VideoLLM.from_pretrained(tmp_path / "checkpoints/step=6")
    assert all(torch.equal(t, weights(tmp_path)[name]) for name, t in model.trainable_state_dict().items())


def test_the_best_checkpoint_is_kept_by_its_accuracy(material, tmp_path):
    assert fit(material, tmp_path, data__val=material / "data.jsonl") == 0
    assert (tmp_path / "checkpoints/best/model.safetensors").is_file()


@pytest.mark.parametrize(("monitor", "better"), [("val/loss", [2.0, 1.0, 3.0]), ("val/who", [0.1, 0.3, 0.2])])
def test_the_best_checkpoint_is_kept_by_what_is_asked_for(material, tmp_path, monkeypatch, monitor, better):
    def end(self):
        self.log("val/exact_match", 0.0)
        self.log(monitor, better[self.current_epoch])

    monkeypatch.setattr(Training, "on_validation_epoch_end", end)
    options = {"data__val": material / "data.jsonl", "trainer__num_sanity_val_steps": 0}
    assert fit(material, tmp_path, trainer__max_epochs=3, checkpoints__monitor=monitor, **options) == 0
    rest = torch.load(tmp_path / "checkpoints/best/training.pt", weights_only=True)
    assert rest["global_step"] == 6


def test_a_run_does_not_go_on_from_nothing(material, tmp_path, capsys):
    assert fit(material, tmp_path, ckpt_path="last") == 2
    assert "There is no checkpoint in" in capsys.readouterr().err


def test_auto_begins_where_there_is_no_checkpoint(material, tmp_path, capsys):
    assert fit(material, tmp_path, ckpt_path="auto", trainer__max_epochs=1) == 0
    assert "A new run" in capsys.readouterr().out


def test_a_trained_model_is_no_checkpoint_to_go_on_from(material, tmp_path, capsys):
    assert fit(material, tmp_path / "one", trainer__max_epochs=1) == 0
    assert fit(material, tmp_path / "two", ckpt_path=tmp_path / "one/model") == 2
    assert "To begin a new run with it, set model.init_from" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(material, tmp_path, capsys, monkeypatch):
    assert fit(material, tmp_path, trainer__max_epochs=1) == 0
    write = resume.write_model

    def nearly_full(folder, *rest):
        write(folder, *rest)
        (folder / "training.pt").symlink_to("/dev/full")

    monkeypatch.setattr(resume, "write_model", nearly_full)
    assert fit(material, tmp_path, ckpt_path="last") == 2
    assert re.search(r"step=6 could not be written: .*No space left on device", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=3"]


def test_what_differs_from_the_checkpoint_is_named():
    with pytest.raises(CheckpointError, match=r"has vision\.grid \[2, 1, 1\], this run \[4, 1, 1\]"):
        compare({"vision": {"grid": [2, 1, 1]}}, {"vision": {"grid": [4, 1, 1]}})
    compare({"llm": {"source": "here"}}, {"llm": {"source": "there"}})


def test_rates_that_the_optimizer_would_not_take_are_refused(material, tmp_path, capsys):
    assert fit(material, tmp_path, trainer__max_epochs=1) == 0
    assert fit(material, tmp_path, ckpt_path="last", model__lr_overrides="{mixer: 0.5}") == 2
    assert (
        "The checkpoint has lr_overrides None, this run {'mixer': 0.5}: set it as it was"
        in capsys.readouterr().err
    )


def test_a_loss_that_is_no_number_is_not_learned_from(material, tmp_path, capsys, monkeypatch):
    forward = VideoLLM.forward

    def poisoned(self, *args, **options):
        out = forward(self, *args, **options)
        poisoned.calls += 1
        return replace(out, logits=out.logits * float("nan")) if poisoned.calls == 3 else out

    poisoned.calls = 0
    monkeypatch.setattr(VideoLLM, "forward", poisoned)
    assert fit(material, tmp_path, trainer__max_epochs=1) == 2
    said = capsys.readouterr()
    assert re.search(r"The loss is nan in the batch of .*data\.jsonl:\d", said.err)
    model = VideoLLM.from_pretrained(tmp_path / "checkpoints/step=2")
    assert all(tensor.isfinite().all() for tensor in model.trainable_state_dict().values())


def test_a_spike_is_told_by_the_losses_before_it():
    guard = LossMonitor(spike=3)
    for loss in (2.0, 1.0) * 50:
        guard.see(torch.tensor(loss), 1, ["a:1"])
    assert guard.alarms() == 0
    guard.see(torch.tensor(5.9), 1, ["a:2"])
    assert guard.alarms() == 0
    guard.see(torch.tensor(17.8), 1, ["a:3", "a:4"])
    assert guard.alarms() == 1
    assert "The loss is 17.8 in the batch of a:3, a:4" in guard.report()


def test_answers_are_sampled_while_it_trains(material, tmp_path):
    assert fit(material, tmp_path, sample_answers__every_n_steps=3, sample_answers__num_samples=1) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["question"] == "Who?"


def test_pace_and_weights_are_in_the_logs(material, tmp_path):
    table = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    options = {"trainer__log_every_n_steps": 1, "data__val": material / "data.jsonl"}
    assert fit(material, tmp_path, trainer__logger=json.dumps(table), **options) == 0
    (table,) = tmp_path.rglob("metrics.csv")
    columns = table.read_text().splitlines()[0].split(",")
    wanted = {"loss", "grad_norm", "lr-AdamW/projector", "tokens/s", "wait", "GB", "min_left", "weight/fake"}
    assert wanted | {"val/loss", "val/who", "val/exact_match"} <= set(columns)


@pytest.mark.parametrize(
    "options",
    [
        {"sample_answers__every_n_steps": 0},
        {"sample_answers__every_n_steps": 1, "sample_answers__num_samples": 0},
    ],
)
def test_answers_can_be_left_out(material, tmp_path, options):
    assert fit(material, tmp_path, trainer__max_epochs=1, **options) == 0
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_broken_video_is_passed_over_wherever_it_is_met(material, tmp_path):
    rows = (material / "data.jsonl").read_text().splitlines()
    broken = {"video": "broken.mp4", "questions": [{"question": "Who?", "answer": "nobody"}]}
    (material / "broken.mp4").write_bytes(b"no video")
    (material / "some.jsonl").write_text("\n".join([json.dumps(broken), '{"video": 3}', *rows]))
    options = {
        "data__train": material / "some.jsonl",
        "data__on_error": "skip",
        "sample_answers__every_n_steps": 1,
    }
    assert fit(material, tmp_path, trainer__max_epochs=1, **options) == 0
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {row["origin"].rpartition(":")[2] for row in skipped} == {"1", "2"}


def test_sampling_answers_leaves_what_is_trained_in_training_mode(material, tmp_path, monkeypatch):
    modes, step = [], Training.training_step

    def recorded(self, batch, index):
        modes.append(self.model.fusion.training)
        return step(self, batch, index)

    def unusable(self, *args, **options):
        assert not self.training
        raise DataError("a sample that cannot be used")

    monkeypatch.setattr(Training, "training_step", recorded)
    monkeypatch.setattr(VideoLLM, "generate", unusable)
    assert fit(material, tmp_path, sample_answers__every_n_steps=1) == 0
    assert modes == [True] * 6


def test_a_broken_video_is_told_with_its_row_and_its_folder_can_be_named(material, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text((material / "data.jsonl").read_text().replace("4.mp4", "none.mp4"))
    options = {"data__train": tmp_path / "rows.jsonl", "data__root": material}
    assert fit(material, tmp_path / "run", **options) == 2
    assert re.search(r"rows\.jsonl:5: .*none\.mp4", capsys.readouterr().err)


def test_a_new_run_does_not_mix_with_an_earlier_one(material, tmp_path, capsys):
    assert fit(material, tmp_path, trainer__max_epochs=1) == 0
    assert fit(material, tmp_path) == 2
    assert "is of an earlier run. Go on with it by --ckpt_path=last" in capsys.readouterr().err
    assert fit(material, tmp_path, ckpt_path="last") == 0


def test_a_gradient_that_is_no_number_is_not_learned_from(material, tmp_path, capsys, monkeypatch):
    def poison(self, *_):
        parameter = next(p for p in self.parameters() if p.requires_grad)
        parameter.grad.fill_(float("inf"))

    monkeypatch.setattr(Training, "on_after_backward", poison)
    assert fit(material, tmp_path, trainer__max_epochs=1) == 2
    assert re.search(r"A gradient has numbers that are none.*data\.jsonl:\d", capsys.readouterr().err)


# Stages ------------------------------------------------------------------------------------


def test_a_second_stage_starts_from_the_first_and_an_encoder_joins(material, tmp_path):
    assert fit(material, tmp_path / "one") == 0
    options = {
        "model__init_from": tmp_path / "one/model",
        "model__encoders": "[fake,fake/video]",
        "model__trainable": "[projector.fake_video,mixer.fake_video]",
    }
    assert fit(material, tmp_path / "two", **options) == 0
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    name = "vision.fusion.projectors.fake.linear.weight"
    assert torch.equal(before[name], after[name])
    assert torch.equal(before["vision.fusion.mixer.share"], after["vision.fusion.mixer.share"][:1])
    assert list(VideoLLM.from_pretrained(tmp_path / "two/model").vision.encoders) == ["fake", "fake_video"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model__grid": "[4,1,1]"}, "has {'grid': [2, 1, 1]}"),
        ({"model__sampling": "official"}, "has {'sampling': 'uniform'}"),
        ({"model__num_frames": "{fake: 4}"}, "this recipe has {'num_frames': {'fake': 4}}"),
        ({"model__mixer_options": "{conditioned: true}"}, "has {'mixer_options': {}}"),
        ({"model__embed_scale": 9}, "this recipe has {'embed_scale': 9.0}"),
    ],
)
def test_a_start_that_is_otherwise_than_the_recipe_is_refused(
    started, material, tmp_path, capsys, other, said
):
    assert fit(material, tmp_path, model__init_from=started, **other) == 2
    assert said in capsys.readouterr().err


def test_features_of_an_encoder_that_is_trained_cannot_be_kept(material):
    training = Training(str(material / "llm"), ["fake"], trainable=["fake"], feature_store="memory")
    with pytest.raises(TrainingError, match="Features of fake change while it is trained"):
        training.configure_model()


def test_the_module_alone_takes_batches_of_another_loader(material):
    training = Training(str(material / "llm"), ["fake"], grid=(2, 1, 1))
    training.configure_model()
    data = ChatData(str(material / "data.jsonl"), batch_size=3, num_workers=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    out = training.model(batch.groups)
    assert out.num_tokens > 0
    assert out.loss_sum.requires_grad
