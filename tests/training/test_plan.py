"""`merv plan`: FLOPs, memory, data and the command."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from merv.cli.fit import NOISE
from merv.cli.main import main
from merv.cli.plan import fit_parser, setup_of
from merv.data.module import ChatData
from merv.errors import WeightsError
from merv.models.llm import LoraOptions
from merv.testing import tiny_llm
from merv.training.dry_run import BatchShape, Meter, dry_step
from merv.training.module import Training
from merv.training.plan import Setup, make_plan, on_meta

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{re.escape(text)}.*") for text in NOISE]
SHAPE = BatchShape(videos=2, rows=2, length=40, answers=5, visual=8)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The folder of a tiny LLM, without weights."""
    folder = tmp_path_factory.mktemp("llm")
    tiny_llm(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def data(tmp_path):
    """A file of four samples with texts of different lengths. The videos do not exist."""
    rows = [
        {"video": f"{i}.mp4", "questions": [{"question": "w" * 10 * i, "answer": "yes"}] * 2}
        for i in range(1, 5)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ChatData(str(tmp_path / "train.jsonl"), batch_size=2)


def training(llm, **options) -> Training:
    return Training(str(llm), ["fake", "fake/video"], grid=(2, 2, 1), **options)


def dry(llm, shape=SHAPE, encode=False, **options):
    module = training(llm, **options)
    module.model = on_meta(module)
    return dry_step(module, shape, encode=encode)


def plan_of(llm, data=None, setup=None, **options):
    return make_plan(training(llm, **options), data or ChatData("no.jsonl"), setup or Setup())


# FLOPs --------------------------------------------------------------------------------------


def test_flops_match_a_real_step(llm):
    real, _ = tiny_llm()
    real.requires_grad_(False)
    embeddings = torch.zeros(2, 40, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        logits = real(inputs_embeds=embeddings, logits_to_keep=torch.arange(5)).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    cost = dry(llm, trainable=["projector"], mixer="mean")
    assert 1 <= cost.flops["forward"] / forward.get_total_flops() < 1.05  # includes the fusion
    assert 1 <= cost.flops["backward"] / backward.get_total_flops() < 1.05


def test_backward_of_a_trained_llm_costs_twice_its_forward(llm):
    cost = dry(llm, trainable=["projector", "llm"])
    assert cost.flops["backward"] / cost.flops["forward"] == pytest.approx(2, rel=0.1)


def test_gradient_checkpointing_computes_layers_twice_and_saves_memory(llm):
    shape = BatchShape(videos=2, rows=2, length=400, answers=5, visual=8)
    plain, checkpointed = dry(llm, shape), dry(llm, shape, gradient_checkpointing=True)
    assert checkpointed.flops["backward"] > 1.4 * plain.flops["backward"]
    assert checkpointed.peaks["forward"] < 0.5 * plain.peaks["forward"]


def test_encoder_flops_are_proportional_to_videos(llm):
    one, three = (
        dry(llm, BatchShape(videos=n, rows=1, length=9, answers=1, visual=4), encode=True).flops["encode"]
        for n in (1, 3)
    )
    assert three == 3 * one > 0


# Memory -------------------------------------------------------------------------------------


def test_freed_tensors_are_subtracted():
    with Meter() as meter:
        tensor = torch.ones(1000)
        view = tensor[:10]
        del tensor
        assert meter.now == 4000
        del view
    assert (meter.now, meter.peak) == (0, 4000)


def test_weights_gradients_and_two_states_are_held_between_steps(llm):
    module = training(llm, trainable=["projector", "mixer", "llm"])
    module.model = on_meta(module)
    sizes = [(p.nbytes, p.requires_grad) for p in module.model.parameters()]
    buffers = sum(b.nbytes for b in module.model.buffers())
    cost = dry_step(module, SHAPE, encode=False)
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


def test_optimizer_step_on_a_gpu_needs_a_copy_of_the_trained_weights(llm):
    module = training(llm, trainable=["llm"])
    module.model = on_meta(module)
    trained = sum(p.nbytes for p in module.model.parameters() if p.requires_grad)
    cost = dry_step(
        module, BatchShape(videos=1, rows=1, length=2, answers=1, visual=1), encode=False, gpu=True
    )
    assert cost.peaks["optimizer"] - cost.held > 0.9 * trained


def test_nf4_shrinks_linears_but_not_the_lora(llm):
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
    assert plan.batches.tokens_max - plan.batches.tokens_mean == pytest.approx(lengths[-1] - sum(lengths) / 4)
    assert plan.batches.largest.length == plan.batches.tokens_max


def test_image_has_one_time_step(llm, tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    batches = plan_of(llm, ChatData(str(tmp_path / "a.jsonl"), batch_size=1)).batches
    assert (batches.largest.videos, batches.largest.stills, batches.largest.visual) == (0, 1, 2)


def test_steps_are_epochs_times_samples_over_the_global_batch(llm, data):
    setup = Setup(devices=2, accumulate=1, max_epochs=3)
    plan = plan_of(llm, data, setup)
    assert (plan.global_batch, plan.steps) == (4, 3)
    assert plan.hours(1e-6, 0.5) == pytest.approx(3 * sum(plan.flops.values()) / 1800e6)


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (0.5, 1), (1.0, 2), (99, 2)])
def test_limit_train_batches_shortens_the_epochs(llm, data, limit, steps):
    assert plan_of(llm, data, Setup(max_epochs=1, limit_train_batches=limit)).steps == steps


@pytest.mark.parametrize(
    ("setup", "checkpoints"),
    [
        (Setup(max_steps=250, every_n_steps=100, save_total_limit=None), 3),
        (Setup(max_steps=250, every_n_steps=100, save_total_limit=2), 2),
        (Setup(max_steps=250, every_n_steps=500, save_total_limit=2, keeps_best=True), 2),
        (Setup(max_steps=250, every_n_steps=0), 1),
        (Setup(save_total_limit=2), 2),
        (Setup(save_total_limit=None), None),
    ],
)
def test_checkpoints_are_those_written_up_to_the_limit(llm, setup, checkpoints):
    assert plan_of(llm, setup=setup).checkpoints == checkpoints


def test_command_passes_the_limit_of_batches_on():
    arguments = ["--config", "recipes/demo.yaml", "--trainer.limit_train_batches"]
    limits = [setup_of(fit_parser().parse_args([*arguments, n])).limit_train_batches for n in ("2", "0.5")]
    assert limits == [2, 0.5]


def test_stream_has_batches_per_epoch_on_each_device(llm, tmp_path, monkeypatch):
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    Dataset.from_dict({"messages": [messages] * 3}).to_parquet(tmp_path / "a.parquet")
    data = ChatData(str(tmp_path / "a.parquet"), batch_size=2, stream=True, batches_per_epoch=40)
    plan = plan_of(llm, data, Setup(devices=4, accumulate=2, max_epochs=1))
    assert (plan.steps, plan.batches.samples) == (20, 320)


def test_batch_without_videos_trains_the_fusion(llm):
    cost = dry(llm, BatchShape(videos=0, rows=2, length=40, answers=5, visual=0))
    with_videos = dry(llm, BatchShape(videos=2, rows=2, length=40, answers=5, visual=8))
    assert 0 < cost.flops["backward"] < with_videos.flops["backward"]
    assert cost.held == with_videos.held


# The command --------------------------------------------------------------------------------


def run_plan(llm, *options):
    tiny = [f"--model.llm={llm}", "--model.encoders=[fake]", "--model.grid=[2,2,1]", "--data.train=no.jsonl"]
    tiny += ["--trainer.max_steps=1000"]
    return main(["plan", *tiny, *options])


def test_command_prints_json(llm, capsys):
    assert run_plan(llm, "--trainer.devices=2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["visual_tokens"], result["steps"], result["fits"]) == (4, 1000, True)
    assert result["hours"] > 0


def test_run_that_does_not_fit_gets_advice(llm, capsys):
    assert run_plan(llm, "--memory=0.001") == 1
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "--model.gradient_checkpointing=true" in out


def test_options_override_the_recipe():
    config = fit_parser().parse_args(["--config", "recipes/demo.yaml", "--trainer.devices=4", "--model.lr=1"])
    assert (setup_of(config).devices, config.model.lr, config.model.grid) == (4, 1.0, (8, 1, 1))


def test_sharded_strategy_divides_optimizer_states(llm, capsys):
    options = [
        "--trainer.devices=4",
        "--model.trainable=[projector,mixer,llm]",
        "--model.dtype=fp32",
        "--json",
    ]
    states = []
    for strategy in ("ddp", "sharded"):
        assert run_plan(llm, f"--trainer.strategy={strategy}", *options) == 0
        states.append(json.loads(capsys.readouterr().out)["memory"]["optimizer states"])
    assert states[0] == 4 * states[1]


def test_disk_includes_the_kept_checkpoints(llm, capsys):
    options = ["--checkpoints.save_total_limit=3", "--checkpoints.every_n_steps=100"]
    assert run_plan(llm, *options, "--data.val=val.jsonl", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoints"] == 4  # with the best one
    trained = sum(count for count, learns in result["parts"].values() if learns)
    assert result["trained_bytes"] == 4 * trained


def test_help_shows_own_options_and_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "--utilization" in out
    assert "merv plan --config demo --gpu 4090" in out
    assert "--trainer" not in out.partition("examples:")[0]


def test_unknown_gpu_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--gpu=h10"])
    assert "'h10'" in capsys.readouterr().err


def test_missing_llm_is_an_error():
    with pytest.raises(WeightsError, match="/nowhere"):
        plan_of("/nowhere")
