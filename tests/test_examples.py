"""The examples run, end in an answer, and weight every token alike."""

import importlib
from pathlib import Path

import pytest
import torch

from merv.models.video_llm import VideoLLM

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def example(monkeypatch):
    """An example as a module, found as when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def tiny(example, tmp_path):
    """A model of tiny parts, always the same, and groups whose answers differ in length."""
    plain = example("plain_torch")
    args = plain.parser("", "").parse_args(["--out", str(tmp_path / "model"), "--encoders", "fake"])
    return lambda: plain.prepare(args)


def weights(model: VideoLLM) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in model.trainable_state_dict().values()])


def hf(example, tiny, folder, steps=3, **options) -> torch.Tensor:
    """The weights after training by the Trainer of transformers."""
    model, groups = tiny()
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    plain = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    settings = {"output_dir": str(folder), "max_steps": steps, **quiet, **plain, **options}
    example("hf_trainer").train(model, groups, **settings)
    return weights(model)


def test_there_are_examples():
    assert {"plain_torch", "hf_trainer"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_ends_in_an_answer_of_the_model_that_it_saved(name, example, tmp_path, capsys):
    arguments = ["--steps", "1", "--encoders", "fake", "--out", str(tmp_path / "model")]
    example(name).main(arguments)
    assert "answer:" in capsys.readouterr().out
    assert VideoLLM.from_pretrained(tmp_path / "model").trained == ("projector", "mixer", "llm")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_tells_what_it_takes(name, example, capsys):
    with pytest.raises(SystemExit) as ended:
        example(name).main(["--help"])
    assert ended.value.code == 0
    assert "--encoders" in capsys.readouterr().out


def test_rows_of_a_file_are_learned_from(example, tmp_path):
    from merv.testing import make_video

    make_video(tmp_path / "a.mp4")
    row = '{"video": "a.mp4", "questions": [{"question": "What?", "answer": "a square"}]}'
    (tmp_path / "train.jsonl").write_text(row + "\n")
    arguments = ["--out", str(tmp_path / "model"), "--data", str(tmp_path / "train.jsonl")]
    plain = example("plain_torch")
    plain.main([*arguments, "--steps", "1", "--encoders", "fake", "--train", "projector"])
    assert VideoLLM.from_pretrained(tmp_path / "model").trained == ("projector",)


def test_the_plain_loop_learns_the_same_however_a_step_is_cut(example, tiny, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # which does not scale rounding up
    after = []
    for batch, accumulate in ((2, 1), (1, 2)):
        model, groups = tiny()
        options = {"steps": 3, "batch": batch, "accumulate": accumulate, "lr": 0.1}
        example("plain_torch").train(model, groups, **options)
        after.append(weights(model))
    assert torch.allclose(*after, atol=1e-5)


def test_the_trainer_learns_the_same_however_a_step_is_cut(example, tiny, tmp_path):
    cuts = ((2, 1), (1, 2))
    after = [
        hf(example, tiny, tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=a)
        for b, a in cuts
    ]
    assert torch.allclose(*after, atol=1e-5)


def test_the_trainer_goes_on_from_its_checkpoint(example, tiny, tmp_path):
    options = {"steps": 4, "save_steps": 2}
    whole = hf(example, tiny, tmp_path / "run", **options)
    again = hf(example, tiny, tmp_path / "run", **options, resume=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(again, whole)
