"""Options of `merv fit`: what is typed wrongly, what is refused, what `--help` teaches."""

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
    ("typed", "said"),
    [
        ("--model.lrr=1", r"--model\.lrr: model has no option 'lrr'\. Did you mean 'lr'"),
        ("--trainer.max_step=1", "Did you mean 'max_steps'"),
        ("--data.batchsize=1", "Did you mean 'batch_size'"),
        ("--modle.lr=1", "nothing is called 'modle'. Did you mean 'model'"),
    ],
)
def test_a_misspelt_option_names_the_nearest(typed, said):
    with pytest.raises(TrainingError, match=said):
        check_keys([typed])


def test_a_misspelt_key_of_a_recipe_names_the_file_and_the_nearest(tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  encoder: [fake]\n")
    with pytest.raises(TrainingError, match=r"mine\.yaml: model has no option 'encoder'\. Did you mean"):
        check_keys([f"--config={tmp_path / 'mine.yaml'}"])


@pytest.mark.parametrize(("text", "said"), [("a: [", "is no YAML"), ("- a", "is no recipe")])
def test_a_recipe_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(TrainingError, match=said):
        check_keys(["--config", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("option", "said"),
    [("--trainer.strategy=shardedd", "shardedd"), ("--trainer.logger=WandbLogger", "wandb")],
)
@pytest.mark.skipif(find_spec("wandb") is not None, reason="it can be used here")
def test_what_lightning_cannot_make_is_told_without_a_traceback(material, tmp_path, capsys, option, said):
    name, _, value = option.removeprefix("--").partition("=")
    assert fit(material, tmp_path, **{name.replace(".", "__"): value}) == 2
    assert re.search(f"(?s)merv: The run cannot be set up: .*{said}", capsys.readouterr().err)


def test_help_teaches(capsys):
    assert main(["fit", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("usage: merv fit --config RECIPE", "demo", "encoders: list[str]"))


def test_without_a_recipe_it_names_some(capsys):
    assert main(["fit", "--model.lr=1"]) == 2
    assert "Name a recipe, as in `merv fit --config cpu_small`" in capsys.readouterr().err


def test_options_are_those_of_the_classes():
    for part, of in {"trainer": Trainer, "model": TrainingOptions, "data": ChatData}.items():
        assert list(described(part)[1]) == list(inspect.signature(of).parameters)


@pytest.mark.parametrize(("option", "value"), [("lr", "-1"), ("betas", "[0.9, 1.5]")])
def test_rates_that_no_optimizer_takes_are_refused(material, tmp_path, capsys, option, value):
    assert fit(material, tmp_path, **{f"model__{option}": value}) == 2
    assert re.search(
        r"model\.lr, lr_overrides, betas or weight_decay: Invalid .*[15]", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("model__encoders", "[fak]", "Did you mean 'fake'"),
        ("model__trainable", "[projektor]", "unknown name 'projektor'. Did you mean 'projector'"),
        ("model__lr_overrides", "{lora: 1}", "model.lr_overrides: unknown name 'lora'"),
        ("model__mixer", "gat", "Did you mean 'gate'"),
    ],
)
def test_a_value_that_names_nothing_names_the_nearest(material, tmp_path, capsys, option, value, said):
    assert fit(material, tmp_path, **{option: value}) == 2
    assert said in capsys.readouterr().err


def test_what_would_be_rounded_after_each_step_is_refused(material, tmp_path, capsys):
    assert fit(material, tmp_path, trainer__precision="bf16-true") == 2
    assert "Set trainer.precision: bf16-mixed" in capsys.readouterr().err
