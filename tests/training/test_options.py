"""Options of `merv fit`: misspelled, invalid, and in `--help`."""

import inspect
import re
from importlib.util import find_spec

import pytest
from lightning import Trainer
from running import QUIET, fit, make_material

from merv.cli.main import main
from merv.data.module import ChatData
from merv.errors import TrainingError
from merv.training.options import TrainingOptions
from merv.training.recipes import check_keys, described

pytestmark = QUIET


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("--model.lrr=1", "lr"),
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
        assert list(described(part)[1]) == list(inspect.signature(of).parameters)


@pytest.mark.parametrize(("option", "value"), [("lr", "-1"), ("betas", "[0.9, 1.5]")])
def test_invalid_optimizer_options_are_an_error(material, tmp_path, capsys, option, value):
    assert fit(material, tmp_path, **{f"model__{option}": value}) == 2
    assert re.search(rf"model\.{option}|lr_overrides, {option}|betas", capsys.readouterr().err)


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
