"""`merv plan` counts what a run takes, and reads what `merv fit` reads."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from merv.cli.fit import NOISE
from merv.cli.main import main
from merv.cli.plan import parser, setup_of
from merv.data.module import ChatData
from merv.errors import TrainingError, WeightsError
from merv.models.llm import LoraOptions
from merv.testing import tiny_llm
from merv.training.dry_run import BatchShape, Meter, dry_step
from merv.training.module import Training
from merv.training.plan import Setup, make_plan, on_meta

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{re.escape(words)}.*") for words in NOISE]
LOAD = BatchShape(videos=2, rows=2, length=40, answers=5, visual=8)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The folder of a tiny LLM without its weights."""
    folder = tmp_path_factory.mktemp("llm")
    tiny_llm(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def data(tmp_path):
    """A file of four samples, of texts of different lengths; its videos are not there."""
    rows = [
        {"video": f"{i}.mp4", "questions": [{"question": "w" * 10 * i, "answer": "yes"}] * 2}
        for i in range(1, 5)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ChatData(str(tmp_path / "train.jsonl"), batch_size=2)


def training(llm, **options) -> Training:
    return Training(str(llm), ["fake", "fake/video"], grid=(2, 2, 1), **options)


def dry(llm, load=LOAD, encode=False, **options):
    own = training(llm, **options)
    own.model = on_meta(own)
    return dry_step(own, load, encode=encode)


def plan_of(llm, data=None, setup=None, **options):
    return make_plan(training(llm, **options), data or ChatData("no.jsonl"), setup or Setup())


# FLOPs --------------------------------------------------------------------------------------


def test_flops_are_those_of_a_real_step(llm):
    real, _ = tiny_llm()
    real.requires_grad_(False)
    embeddings = torch.zeros(2, 40, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        logits = real(inputs_embeds=embeddings, logits_to_keep=torch.arange(5)).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    cost = dry(llm, trainable=["projector"], mixer="mean")
    assert 1 <= cost.flops["forward"] / forward.get_total_flops() < 1.05  # and the fusion
    assert 1 <= cost.flops["backward"] / backward.get_total_flops() < 1.05


def test_a_trained_llm_takes_three_times_its_forward(llm):
    cost = dry(llm, trainable=["projector", "llm"])
    assert cost.flops["backward"] / cost.flops["forward"] == pytest.approx(2, rel=0.1)


def test_checkpointing_computes_the_layers_twice_and_keeps_less(llm):
    load = BatchShape(videos=2, rows=2, length=400, answers=5, visual=8)
    plain, checkpointed = dry(llm, load), dry(llm, load, gradient_checkpointing=True)
    assert checkpointed.flops["backward"] > 1.4 * plain.flops["backward"]
    assert checkpointed.peaks["forward"] < 0.5 * plain.peaks["forward"]


def test_encoders_count_once_for_each_video(llm):
    one, three = (
        dry(llm, BatchShape(videos=n, rows=1, length=9, answers=1, visual=4), encode=True).flops["encode"]
        for n in (1, 3)
    )
    assert three == 3 * one > 0


# Memory -------------------------------------------------------------------------------------


def test_memory_is_freed_with_its_tensor():
    with Meter() as meter:
        held = torch.ones(1000)
        view = held[:10]
        del held
        assert meter.now == 4000
        del view
    assert (meter.now, meter.peak) == (0, 4000)


def test_between_steps_weights_gradients_and_two_states_are_held(llm):
    own = training(llm, trainable=["projector", "mixer", "llm"])
    own.model = on_meta(own)
    sizes = [(p.nbytes, p.requires_grad) for p in own.model.parameters()]
    buffers = sum(b.nbytes for b in own.model.buffers())
    cost = dry_step(own, LOAD, encode=False)
    counters = 4 * sum(trained for _, trained in sizes)
    assert cost.held == buffers + counters + sum(size * (4 if trained else 1) for size, trained in sizes)


def test_bf16_halves_the_weights_of_a_frozen_llm(llm):
    full, half = plan_of(llm, dtype="fp32"), plan_of(llm, dtype="bf16")
    assert half.memory["weights of LLM"] < 0.51 * full.memory["weights of LLM"]
    assert half.memory["activations"] < full.memory["activations"]


def test_sharding_splits_the_llm_and_leaves_encoders_whole(llm):
    one = plan_of(llm, setup=Setup(devices=1), trainable=["llm"])
    four = plan_of(llm, setup=Setup(devices=4, sharded=True), trainable=["llm"])
    assert four.memory["optimizer states"] == one.memory["optimizer states"] / 4
    assert four.memory["weights of encoders"] == one.memory["weights of encoders"]


def test_on_a_gpu_the_optimizers_step_needs_a_copy_of_a_part_more(llm):
    own = training(llm, trainable=["llm"])
    own.model = on_meta(own)
    trained = sum(p.nbytes for p in own.model.parameters() if p.requires_grad)
    cost = dry_step(own, BatchShape(videos=1, rows=1, length=2, answers=1, visual=1), encode=False, gpu=True)
    assert cost.peaks["optimizer"] - cost.held > 0.9 * trained


def test_four_bits_leave_a_quarter_of_the_linears_and_lora_is_on_top(llm):
    plain = plan_of(llm, dtype="bf16", trainable=["lora"], lora=LoraOptions(r=2))
    nf4 = plan_of(llm, dtype="bf16", trainable=["lora"], lora=LoraOptions(r=2), quantize="nf4")
    linears = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    saved = plain.memory["weights of LLM"] - nf4.memory["weights of LLM"]
    assert saved == pytest.approx(linears * (2 - 0.5625))


# Data ---------------------------------------------------------------------------------------


def test_rows_are_measured_by_the_tokenizer(llm, data):
    plan = plan_of(llm, data)
    lengths = [len(json.dumps("w" * 10 * i)) for i in range(1, 5)]
    assert plan.batches.samples == plan.batches.videos == 4
    assert plan.batches.conversations == 8
    assert plan.batches.tokens_most - plan.batches.tokens_mean == pytest.approx(
        lengths[-1] - sum(lengths) / 4
    )
    assert plan.batches.largest.length == plan.batches.tokens_most


def test_a_still_has_one_step_of_time(llm, tmp_path):
    talk = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    batches = plan_of(llm, ChatData(str(tmp_path / "a.jsonl"), batch_size=1)).batches
    assert (batches.largest.videos, batches.largest.stills, batches.largest.visual) == (0, 1, 2)


def test_steps_are_epochs_over_the_global_batch(llm, data):
    setup = Setup(devices=2, accumulate=1, max_epochs=3)
    plan = plan_of(llm, data, setup)
    assert (plan.global_batch, plan.steps) == (4, 3)
    assert plan.seconds(1e-6, 0.5) == pytest.approx(3 * sum(plan.flops.values()) / 0.5e6)


def test_a_step_of_a_stream_is_a_batch_of_each_device(llm, tmp_path, monkeypatch):
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    Dataset.from_dict({"messages": [talk] * 3}).to_parquet(tmp_path / "a.parquet")
    data = ChatData(str(tmp_path / "a.parquet"), batch_size=2, stream=True, batches_per_epoch=40)
    plan = plan_of(llm, data, Setup(devices=4, accumulate=2, max_epochs=1))
    assert (plan.steps, plan.batches.samples) == (20, 320)


def test_a_batch_without_a_video_trains_what_takes_videos(llm):
    cost = dry(llm, BatchShape(videos=0, rows=2, length=40, answers=5, visual=0))
    seeing = dry(llm, BatchShape(videos=2, rows=2, length=40, answers=5, visual=8))
    assert 0 < cost.flops["backward"] < seeing.flops["backward"]
    assert cost.held == seeing.held


# The command --------------------------------------------------------------------------------


def command(llm, *more):
    own = [f"--model.llm={llm}", "--model.encoders=[fake]", "--model.grid=[2,2,1]", "--data.train=no.jsonl"]
    return main(["plan", *own, *more])


def test_the_command_prints_what_a_machine_can_read(llm, capsys):
    assert command(llm, "--trainer.max_steps=1000", "--trainer.devices=2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["visual_tokens"], told["steps"], told["fits"]) == (4, 1000, True)
    assert told["hours"] > 0


def test_what_does_not_fit_is_told_what_would_help(llm, capsys):
    assert command(llm, "--memory=0.001") == 1
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "--model.gradient_checkpointing=true" in out


def test_a_recipe_is_read_by_name_and_options_count_after_it():
    config = parser().parse_args(["--config", "recipes/demo.yaml", "--trainer.devices=4", "--model.lr=1"])
    assert (setup_of(config.trainer).devices, config.model.lr, config.model.grid) == (4, 1.0, (8, 1, 1))


def test_the_recipes_strategy_is_known_to_shard(llm, capsys):
    options = [
        "--trainer.devices=4",
        "--model.trainable=[projector,mixer,llm]",
        "--model.dtype=fp32",
        "--json",
    ]
    states = []
    for strategy in ("ddp", "sharded"):
        assert command(llm, f"--trainer.strategy={strategy}", *options) == 0
        states.append(json.loads(capsys.readouterr().out)["memory"]["optimizer states"])
    assert states[0] == 4 * states[1]


def test_disk_has_room_for_the_checkpoints_that_are_kept(llm, capsys):
    assert command(llm, "--checkpoints.save_total_limit=3", "--data.val=val.jsonl", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["setup"]["checkpoints"] == 4  # and the best
    trained = sum(count for count, learns in told["parts"].values() if learns)
    assert told["trained_bytes"] == 4 * trained


def test_help_shows_what_is_its_own_and_examples(capsys):
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--utilization" in out
    assert "merv plan --config demo --gpu 4090" in out
    assert "--trainer" not in out.partition("examples:")[0]


def test_an_unknown_gpu_names_the_nearest(llm):
    from merv.cli.plan import run

    with pytest.raises(TrainingError, match="Did you mean 'h100'"):
        run(["--gpu=h10", f"--model.llm={llm}", "--model.encoders=[fake]", "--data.train=no.jsonl"])


def test_an_llm_that_is_not_there_is_an_error():
    with pytest.raises(WeightsError, match="config of the LLM"):
        plan_of("/nowhere")
