"""Options of `merv fit`: misspelled, invalid, and in `--help`."""

import inspect
import json
import re
from importlib.util import find_spec

import pytest
import torch
from lightning import Trainer
from running import QUIET, fit, make_material

from merv.cli.main import main
from merv.data.module import ChatData
from merv.errors import TrainingError
from merv.models.llm import LoraOptions, add_lora
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm
from merv.training.module import Training
from merv.training.options import TrainingOptions
from merv.training.recipes import check_keys, documented_options

pytestmark = QUIET


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("--model.lrr=1", "lr"),
        ("--model.learning_rate=1", "lr"),
        ("--trainer.max_step=1", "max_steps"),
        ("--data.batchsize=1", "batch_size"),
        ("--modle.lr=1", "model"),
    ],
)
def test_misspelled_option_suggests_the_nearest(typed, nearest):
    with pytest.raises(TrainingError, match=f"'{nearest}'"):
        check_keys([typed])


def test_misspelled_key_in_a_recipe_names_the_file_and_the_nearest(tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  encoder: [fake]\n")
    with pytest.raises(TrainingError, match=r"mine\.yaml.*'encoder'.*'encoders'"):
        check_keys([f"--config={tmp_path / 'mine.yaml'}"])


@pytest.mark.parametrize("text", ["a: [", "- a"])
def test_invalid_recipe_is_named(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(TrainingError, match=r"mine\.yaml"):
        check_keys(["--config", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("option", "name"),
    [("--trainer.strategy=shardedd", "shardedd"), ("--trainer.logger=WandbLogger", "wandb")],
)
@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_option_that_lightning_rejects_is_named(material, tmp_path, capsys, option, name):
    key, _, value = option.removeprefix("--").partition("=")
    assert fit(material, tmp_path, **{key.replace(".", "__"): value}) == 2
    assert name in capsys.readouterr().err


def test_help_lists_recipes_and_options(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("usage: merv fit --config RECIPE", "demo", "encoders: list[str]"))


def test_missing_recipe_lists_the_available_ones(capsys):
    assert main(["fit", "--model.lr=1"]) == 2
    assert "merv fit --config cpu_small" in capsys.readouterr().err


def test_described_options_are_those_of_the_classes():
    for part, of in {"trainer": Trainer, "model": TrainingOptions, "data": ChatData}.items():
        assert list(documented_options(part)[1]) == list(inspect.signature(of).parameters)


@pytest.mark.parametrize(("option", "value"), [("lr", "-1"), ("betas", "[0.9, 1.5]")])
def test_invalid_optimizer_options_are_an_error(material, tmp_path, capsys, option, value):
    assert fit(material, tmp_path, **{f"model__{option}": value}) == 2
    assert re.search(rf"model\.{option}|lr_overrides, {option}|betas", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value"), [("save_total_limit", 0), ("save_total_limit", -1), ("every_n_steps", -1)]
)
def test_invalid_options_of_checkpoints_are_an_error(material, tmp_path, capsys, option, value):
    for command in ("fit", "plan"):
        arguments = [f"--model.llm={material / 'llm'}", "--model.encoders=[fake]", "--trainer.max_steps=1"]
        arguments += [f"--data.train={material / 'data.jsonl'}", f"--trainer.default_root_dir={tmp_path}"]
        assert main([command, *arguments, f"--checkpoints.{option}={value}"]) == 2
        assert f"checkpoints.{option} is {value}" in capsys.readouterr().err


def test_run_without_an_end_is_an_error(material, tmp_path, capsys):
    for command in ("fit", "plan"):
        arguments = [f"--model.llm={material / 'llm'}", "--model.encoders=[fake]"]
        arguments += [f"--data.train={material / 'data.jsonl'}", f"--trainer.default_root_dir={tmp_path}"]
        assert main([command, *arguments]) == 2
        assert "trainer.max_epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("model__encoders", "[fak]", "'fake'"),
        ("model__trainable", "[projektor]", "'projector'"),
        ("model__lr_overrides", "{lora: 1}", "'lora'"),
        ("model__mixer", "gat", "'gate'"),
    ],
)
def test_unknown_name_in_an_option_suggests_the_nearest(material, tmp_path, capsys, option, value, name):
    assert fit(material, tmp_path, **{option: value}) == 2
    assert name in capsys.readouterr().err


def test_precision_that_rounds_trained_weights_is_an_error(material, tmp_path, capsys):
    assert fit(material, tmp_path, trainer__precision="bf16-true") == 2
    assert "bf16-mixed" in capsys.readouterr().err


def test_single_names_are_lists_of_one():
    options = TrainingOptions("llm", "dinov2", trainable="lora", compile="llm")
    assert (options.encoders, options.trainable, options.compile) == (["dinov2"], ("lora",), ("llm",))
    assert LoraOptions(target_modules="q_proj").target_modules == ("q_proj",)


@pytest.mark.parametrize("option", ["encoders", "trainable", "compile"])
@pytest.mark.parametrize("value", ["[lora", "lora,mixer", "lora mixer", ["[lora", "mixer"]])
def test_misspelled_list_names_the_option(option, value):
    values = {"encoders": ["fake"], option: value}
    with pytest.raises(TrainingError, match=rf"model\.{option}"):
        TrainingOptions("llm", **values)


@pytest.mark.parametrize("value", ["[q_proj", "q_proj,v_proj", ["all-linear", "q_proj"]])
def test_misspelled_target_modules_are_an_error(value):
    with pytest.raises(TrainingError, match="target_modules"):
        LoraOptions(target_modules=value)


def test_single_names_work_on_the_command_line(material, tmp_path):
    options = {"model__trainable": "lora", "model__encoders": "fake", "model__lora": "{r: 2}"}
    options |= {"model__lora.target_modules": "q_proj", "trainer__max_steps": 1}
    assert fit(material, tmp_path, **options) == 0
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["lora"]["target_modules"] == ["q_proj"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("model__lora.target_modules", "[q_proj"), ("model__trainable", "[lora"), ("model__encoders", "fake]")],
)
def test_missing_bracket_names_the_option(material, tmp_path, capsys, option, value):
    assert fit(material, tmp_path, **{option: value}) == 2
    assert option.replace("__", ".") in capsys.readouterr().err


def test_missing_bracket_in_the_data_names_the_value(material, tmp_path, capsys):
    assert fit(material, tmp_path, data__train="[a.jsonl") == 2
    assert "[a.jsonl" in capsys.readouterr().err


def test_value_of_the_wrong_type_names_the_option(material, tmp_path, capsys):
    assert fit(material, tmp_path, model__lr="abc") == 2
    assert re.search("^merv: .*model.lr.*abc", capsys.readouterr().err, re.DOTALL | re.MULTILINE)


def test_all_linear_adapts_every_linear_but_the_output_embeddings():
    llm = tiny_llm()[0]
    linears = {name.rpartition(".")[2] for name, m in llm.named_modules() if isinstance(m, torch.nn.Linear)}
    add_lora(llm, LoraOptions(target_modules="all-linear"))
    adapted = {name.partition(".lora_")[0] for name, _ in llm.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == linears - {"lm_head"}


# Mappings of several recipes ---------------------------------------------------------------


def test_later_mapping_replaces_the_earlier_one_and_a_dotted_key_adds_to_it(material, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(Training, "configure_model", lambda self: used.append(self.options.lr_overrides))
    monkeypatch.setattr(Training, "configure_optimizers", lambda self: 1 / 0)
    recipes = {"first": "{projector: 1.0, mixer: 2.0}", "second": "{mixer: 3.0}"}
    for name, rates in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(f"model: {{lr_overrides: {rates}}}")
    first, second = (f"--config={tmp_path / name}.yaml" for name in recipes)
    for arguments in (
        [first, second],
        [first, "--model.lr_overrides={mixer: 3.0}"],
        [first, "--model.lr_overrides.mixer=3.0"],
        [first, "--model.lr_overrides=null"],
    ):
        options = {"model.llm": material / "llm", "model.encoders": "[fake]", "trainer.logger": "false"}
        options |= {"trainer.max_epochs": 1, "trainer.accelerator": "cpu"}
        options |= {"data.train": material / "data.jsonl", "trainer.default_root_dir": tmp_path / "run"}
        with pytest.raises(ZeroDivisionError):
            main(["fit", *arguments, *(f"--{name}={value}" for name, value in options.items())])
    merged = {"projector": 1.0, "mixer": 3.0}
    assert used == [{"mixer": 3.0}, {"mixer": 3.0}, merged, None]


def test_rate_of_a_part_that_is_not_trained_is_an_error(material):
    with pytest.raises(TrainingError, match=r"model\.lr_overrides.*'lora'.*model\.trainable"):
        Training(str(material / "llm"), ["fake"], lr_overrides={"lora": 1e-3, "mixer": 1e-2})


@pytest.mark.parametrize("option", ["num_frames", "presets", "weights", "lr_overrides"])
def test_unknown_name_in_a_mapping_says_how_to_remove_the_mapping(option):
    with pytest.raises(TrainingError, match=rf"'siglip'.*--model\.{option}=null"):
        Training("llm", ["fake"], **{option: {"siglip": 8}})


def test_lora_that_is_not_trained_is_an_error():
    with pytest.raises(TrainingError, match=r"model\.trainable.*--model\.lora=null"):
        Training("llm", ["fake"], lora=LoraOptions(r=2))


# Schedule and chat template ----------------------------------------------------------------


@pytest.mark.parametrize("limit", [1.0, 2])
def test_validation_interval_longer_than_an_epoch_is_an_error(material, tmp_path, capsys, limit):
    options = {"data__val": material / "data.jsonl", "trainer__val_check_interval": 4}
    assert fit(material, tmp_path, trainer__limit_train_batches=limit, **options) == 2
    assert "val_check_interval" in capsys.readouterr().err


def test_validation_interval_may_span_epochs(material, tmp_path):
    options = {"data__val": material / "data.jsonl", "trainer__val_check_interval": 4}
    options |= {"trainer__check_val_every_n_epoch": "null", "trainer__num_sanity_val_steps": 0}
    assert fit(material, tmp_path, **options) == 0
    rest = torch.load(tmp_path / "checkpoints/best/training.pt", weights_only=True)
    assert rest["global_step"] == 4


def test_chat_template_variables_reach_the_model_and_are_compared_on_resuming(material, tmp_path, capsys):
    options = {"model__chat_template_kwargs": "{enable_thinking: false}"}
    assert fit(material, tmp_path, trainer__max_epochs=1, **options) == 0
    model = VideoLLM.from_pretrained(tmp_path / "model")
    assert model.chat.options == {"enable_thinking": False}
    assert fit(material, tmp_path, ckpt_path="last") == 2
    assert "enable_thinking" in capsys.readouterr().err
    assert fit(material, tmp_path, ckpt_path="last", **options) == 0


def test_warmup_ratio_is_a_fraction() -> None:
    with pytest.raises(TrainingError, match=r"warmup_ratio.*500"):
        TrainingOptions(llm="llm", encoders=["fake"], warmup_ratio=500)
