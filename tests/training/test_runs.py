"""Complete runs of `merv fit`: stopping, resuming, logs, bad data, later stages."""

import json
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback
from running import QUIET, difference, fit, make_material, weights

from merv.data.module import ChatData
from merv.errors import CheckpointError, DataError, TrainingError
from merv.models.video_llm import VideoLLM
from merv.training import checkpointing
from merv.training.callbacks import LossMonitor
from merv.training.checkpointing import newest_checkpoint
from merv.training.module import Training, compare

pytestmark = QUIET


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """The trained model of an earlier run."""
    out = tmp_path_factory.mktemp("trained")
    assert fit(material, out, trainer__max_epochs=1) == 0
    return out / "model"


class Interrupt(Callback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_batches_train_like_one_large_batch(material, tmp_path, accumulated):
    assert fit(material, tmp_path / "large", data__batch_size=4) == 0
    small = {"data__batch_size": 4 // accumulated, "trainer__accumulate_grad_batches": accumulated}
    assert fit(material, tmp_path / "small", **small) == 0
    assert difference(weights(tmp_path / "large"), weights(tmp_path / "small")) < 1e-6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_stopped_by_a_signal_resumes_to_the_same_weights(material, tmp_path, capsys, monkeypatch, number):
    options = {"model__trainable": "[projector,mixer,lora]", "model__lora": "{r: 2, lora_dropout: 0.1}"}
    assert fit(material, tmp_path / "whole", **options) == 0
    stop = json.dumps(
        [{"class_path": "test_runs.Interrupt", "init_args": {"step": 4, "number": int(number)}}]
    )
    monkeypatch.setitem(__import__("sys").modules, "test_runs", __import__("sys").modules[__name__])
    assert fit(material, tmp_path / "stopped", **options, trainer__callbacks=stop) == 130
    assert "--ckpt_path=last" in capsys.readouterr().out
    assert not (tmp_path / "stopped/model").exists()
    assert newest_checkpoint(tmp_path / "stopped/checkpoints").name == "step=4"
    assert fit(material, tmp_path / "stopped", **options, ckpt_path="last") == 0
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "stopped")) == 0


def test_checkpoint_loads_as_a_model_and_old_ones_are_deleted(material, tmp_path):
    assert fit(material, tmp_path, checkpoints__every_n_steps=1, checkpoints__save_total_limit=2) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step=5", "step=6"]
    model = VideoLLM.from_pretrained(tmp_path / "checkpoints/step=6")
    assert all(torch.equal(t, weights(tmp_path)[name]) for name, t in model.trainable_state_dict().items())


def test_best_checkpoint_is_kept(material, tmp_path):
    assert fit(material, tmp_path, data__val=material / "data.jsonl") == 0
    assert (tmp_path / "checkpoints/best/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("monitor", "better"), [("val/loss", [2.0, 1.0, 3.0]), ("val/exact_match/who", [0.1, 0.3, 0.2])]
)
def test_monitor_selects_the_best_checkpoint(material, tmp_path, monkeypatch, monitor, better):
    def end(self):
        self.log("val/exact_match", 0.0)
        self.log(monitor, better[self.current_epoch])

    monkeypatch.setattr(Training, "on_validation_epoch_end", end)
    options = {"data__val": material / "data.jsonl", "trainer__num_sanity_val_steps": 0}
    assert fit(material, tmp_path, trainer__max_epochs=3, checkpoints__monitor=monitor, **options) == 0
    rest = torch.load(tmp_path / "checkpoints/best/training.pt", weights_only=True)
    assert rest["global_step"] == 6


def test_unknown_monitor_lists_the_metrics_before_loading(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Training, "configure_model", None)
    options = {"data__val": material / "data.jsonl", "checkpoints__monitor": "val/exact_match/hwo"}
    assert fit(material, tmp_path, **options) == 2
    err = capsys.readouterr().err
    assert re.search("Did you mean 'val/exact_match/who'.*val/exact_match, .*val/loss", err)


def test_monitor_that_a_short_validation_does_not_log_is_an_error(material, tmp_path, capsys):
    rows = [json.loads(line) for line in (material / "data.jsonl").read_text().splitlines()]
    rows[0]["questions"] = [{"question": "Who?", "answer": "a"}]  # without a kind
    (material / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"data__val": material / "val.jsonl", "checkpoints__monitor": "val/exact_match/who"}
    assert fit(material, tmp_path, data__batch_size=1, trainer__limit_val_batches=1, **options) == 2
    assert re.search("val/exact_match/who.*logged val/exact_match, val/loss", capsys.readouterr().err)


def test_resuming_without_a_checkpoint_is_an_error(material, tmp_path, capsys):
    assert fit(material, tmp_path, ckpt_path="last") == 2
    assert str(tmp_path / "checkpoints") in capsys.readouterr().err


def test_auto_starts_a_new_run_without_a_checkpoint(material, tmp_path, capsys):
    assert fit(material, tmp_path, ckpt_path="auto", trainer__max_epochs=1) == 0
    assert "new run" in capsys.readouterr().out


def test_resuming_from_a_trained_model_is_an_error(material, tmp_path, capsys):
    assert fit(material, tmp_path / "one", trainer__max_epochs=1) == 0
    assert fit(material, tmp_path / "two", ckpt_path=tmp_path / "one/model") == 2
    assert "model.init_from" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_keeps_the_previous_checkpoint(material, tmp_path, capsys, monkeypatch):
    assert fit(material, tmp_path, trainer__max_epochs=1) == 0
    replacing = checkpointing.replacing

    @contextmanager
    def nearly_full(folder):
        with replacing(folder) as temporary:
            (temporary / "training.pt").symlink_to("/dev/full")
            yield temporary

    monkeypatch.setattr(checkpointing, "replacing", nearly_full)
    assert fit(material, tmp_path, ckpt_path="last") == 2
    assert re.search(r"step=6 .*No space left on device", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=3"]


def test_difference_to_the_checkpoint_is_named():
    with pytest.raises(CheckpointError, match=r"vision\.grid \[2, 1, 1\].*\[4, 1, 1\]"):
        compare({"vision": {"grid": [2, 1, 1]}}, {"vision": {"grid": [4, 1, 1]}})
    compare({"llm": {"source": "here"}}, {"llm": {"source": "there"}})


def test_resuming_with_other_learning_rates_is_an_error(material, tmp_path, capsys):
    assert fit(material, tmp_path, trainer__max_epochs=1) == 0
    assert fit(material, tmp_path, ckpt_path="last", model__lr_overrides="{mixer: 0.5}") == 2
    assert re.search("lr_overrides None.*{'mixer': 0.5}", capsys.readouterr().err)


def test_nan_loss_stops_the_run_before_an_update(material, tmp_path, capsys, monkeypatch):
    forward = VideoLLM.forward

    def forward_with_nan(self, *args, **options):
        out = forward(self, *args, **options)
        forward_with_nan.calls += 1
        return replace(out, logits=out.logits * float("nan")) if forward_with_nan.calls == 3 else out

    forward_with_nan.calls = 0
    monkeypatch.setattr(VideoLLM, "forward", forward_with_nan)
    assert fit(material, tmp_path, trainer__max_epochs=1) == 2
    err = capsys.readouterr().err
    assert re.search(r"The loss is nan in the batch of .*data\.jsonl:\d", err)
    model = VideoLLM.from_pretrained(tmp_path / "checkpoints/step=2")
    assert all(tensor.isfinite().all() for tensor in model.trainable_state_dict().values())


def test_spike_is_detected_by_previous_losses():
    monitor = LossMonitor(loss_spike_threshold=3)
    for loss in (2.0, 1.0) * 50:
        monitor.record(torch.tensor(loss), 1, ["a:1"])
    assert monitor.check() == 0
    monitor.record(torch.tensor(5.9), 1, ["a:2"])
    assert monitor.check() == 0
    monitor.record(torch.tensor(17.8), 1, ["a:3", "a:4"])
    assert monitor.check() == 1
    assert re.search("17.8.*a:3, a:4", monitor.report())


def test_answers_are_sampled_during_training(material, tmp_path):
    assert fit(material, tmp_path, sample_answers__every_n_steps=3, sample_answers__num_samples=1) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert set(rows[0]) == {"step", "question", "answer", "expected"}
    assert (rows[0]["question"], rows[0]["expected"]) == ("Who?", "a")


def test_throughput_and_mixing_weights_are_logged(material, tmp_path):
    table = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    options = {"trainer__log_every_n_steps": 1, "data__val": material / "data.jsonl"}
    assert fit(material, tmp_path, trainer__logger=json.dumps(table), **options) == 0
    (table,) = tmp_path.rglob("metrics.csv")
    columns = table.read_text().splitlines()[0].split(",")
    expected = {"loss", "grad_norm", "lr-AdamW/projector", "mix_weight/fake"}
    expected |= {"tokens_per_s", "data_wait", "memory_gb", "minutes_left"}
    expected |= {"val/loss", "val/exact_match/who", "val/exact_match"}
    assert expected <= set(columns)


@pytest.mark.parametrize(
    "options",
    [
        {"sample_answers__every_n_steps": 0},
        {"sample_answers__every_n_steps": 1, "sample_answers__num_samples": 0},
    ],
)
def test_sampling_answers_can_be_disabled(material, tmp_path, options):
    assert fit(material, tmp_path, trainer__max_epochs=1, **options) == 0
    assert not (tmp_path / "answers.jsonl").exists()


def test_bad_samples_are_skipped_everywhere(material, tmp_path):
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


def test_sampling_answers_restores_training_mode(material, tmp_path, monkeypatch):
    modes, step = [], Training.training_step

    def record_mode(self, batch, index):
        modes.append(self.model.fusion.training)
        return step(self, batch, index)

    def raise_data_error(self, *args, **options):
        assert not self.training
        raise DataError("invalid sample")

    monkeypatch.setattr(Training, "training_step", record_mode)
    monkeypatch.setattr(VideoLLM, "generate", raise_data_error)
    assert fit(material, tmp_path, sample_answers__every_n_steps=1) == 0
    assert modes == [True] * 6


def test_missing_video_is_named_with_its_row(material, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text((material / "data.jsonl").read_text().replace("4.mp4", "none.mp4"))
    options = {"data__train": tmp_path / "rows.jsonl", "data__root": material}
    assert fit(material, tmp_path / "run", **options) == 2
    assert re.search(r"rows\.jsonl:5: .*none\.mp4", capsys.readouterr().err)


def test_new_run_in_the_folder_of_an_earlier_one_is_an_error(material, tmp_path, capsys):
    assert fit(material, tmp_path, trainer__max_epochs=1) == 0
    assert fit(material, tmp_path) == 2
    assert "step=3" in capsys.readouterr().err
    assert fit(material, tmp_path, ckpt_path="last") == 0


def test_nan_gradient_stops_the_run_before_an_update(material, tmp_path, capsys, monkeypatch):
    def poison(self, *_):
        parameter = next(p for p in self.parameters() if p.requires_grad)
        parameter.grad.fill_(float("inf"))

    monkeypatch.setattr(Training, "on_after_backward", poison)
    assert fit(material, tmp_path, trainer__max_epochs=1) == 2
    assert re.search(r"gradient.*data\.jsonl:\d", capsys.readouterr().err)


# Stages ------------------------------------------------------------------------------------


def test_second_stage_adds_an_encoder_to_the_model_of_the_first(material, tmp_path):
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
    ("option", "name"),
    [
        ({"model__grid": "[4,1,1]"}, "grid"),
        ({"model__sampling": "released"}, "sampling"),
        ({"model__num_frames": "{fake: 4}"}, "num_frames"),
        ({"model__mixer_options": "{conditioned: true}"}, "mixer_options"),
        ({"model__embed_scale": 9}, "embed_scale"),
    ],
)
def test_init_from_that_differs_from_the_recipe_is_an_error(
    trained, material, tmp_path, capsys, option, name
):
    assert fit(material, tmp_path, model__init_from=trained, **option) == 2
    assert name in capsys.readouterr().err


def test_features_of_a_trained_encoder_cannot_be_stored(material):
    training = Training(str(material / "llm"), ["fake"], trainable=["fake"], feature_store="memory")
    with pytest.raises(TrainingError, match="fake"):
        training.configure_model()


def test_module_works_without_a_trainer(material):
    training = Training(str(material / "llm"), ["fake"], grid=(2, 1, 1))
    training.configure_model()
    data = ChatData(str(material / "data.jsonl"), batch_size=3, num_workers=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    out = training.model(batch.groups)
    assert out.num_tokens > 0
    assert out.loss_sum.requires_grad
