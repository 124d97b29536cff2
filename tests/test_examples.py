"""The examples run, print an answer, and weight all tokens equally if they accumulate gradients."""

import importlib
from pathlib import Path

import pytest
import torch

from merv.models.video_llm import VideoLLM

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def example(monkeypatch):
    """Import an example by its module name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def tiny(example, tmp_path):
    """Make the same tiny model on each call, and groups with answers of different lengths."""
    plain_torch = example("plain_torch")
    args = plain_torch.parser("", "").parse_args(["--out", str(tmp_path / "model"), "--encoders", "fake"])
    return lambda: plain_torch.prepare(args)


def weights(model: VideoLLM) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in model.trainable_state_dict().values()])


def train_with_hf(example, tiny, folder, steps=3, **options) -> torch.Tensor:
    """Train with transformers' Trainer and return the trained weights."""
    model, groups = tiny()
    logging = {"disable_tqdm": True, "logging_strategy": "no"}
    optimizer = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "use_cpu": True,
        **logging,
        **optimizer,
        **options,
    }
    example("hf_trainer").train(model, groups, **settings)
    return weights(model)


def test_examples_are_found():
    assert {"plain_torch", "hf_trainer"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_example_prints_an_answer_of_the_saved_model(name, example, tmp_path, capsys):
    arguments = ["--steps", "1", "--encoders", "fake", "--out", str(tmp_path / "model")]
    example(name).main(arguments)
    assert "answer:" in capsys.readouterr().out
    assert VideoLLM.from_pretrained(tmp_path / "model").trained == ("projector", "mixer", "llm")


@pytest.mark.parametrize("name", NAMES)
def test_example_has_a_help_text(name, example, capsys):
    with pytest.raises(SystemExit) as exit:
        example(name).main(["--help"])
    assert exit.value.code == 0
    assert "--encoders" in capsys.readouterr().out


def test_example_trains_on_a_data_file(example, tmp_path):
    from merv.testing import make_video

    make_video(tmp_path / "a.mp4")
    row = '{"video": "a.mp4", "questions": [{"question": "What?", "answer": "a square"}]}'
    (tmp_path / "train.jsonl").write_text(row + "\n")
    arguments = ["--out", str(tmp_path / "model"), "--data", str(tmp_path / "train.jsonl")]
    example("plain_torch").main([*arguments, "--steps", "1", "--encoders", "fake", "--train", "projector"])
    assert VideoLLM.from_pretrained(tmp_path / "model").trained == ("projector",)


def test_plain_loop_does_not_depend_on_accumulation(example, tiny, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # Adam would amplify rounding errors
    after = []
    for batch, accumulate in ((2, 1), (1, 2)):
        model, groups = tiny()
        options = {"steps": 3, "batch": batch, "accumulate": accumulate, "lr": 0.1}
        example("plain_torch").train(model, groups, **options)
        after.append(weights(model))
    assert torch.allclose(*after, atol=1e-5)


def test_trainer_does_not_depend_on_accumulation(example, tiny, tmp_path):
    batch_and_accumulation = ((2, 1), (1, 2))
    after = [
        train_with_hf(example, tiny, tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=a)
        for b, a in batch_and_accumulation
    ]
    assert torch.allclose(*after, atol=1e-5)


def test_trainer_resumes_from_its_checkpoint(example, tiny, tmp_path):
    options = {"steps": 4, "save_steps": 2}
    whole = train_with_hf(example, tiny, tmp_path / "run", **options)
    resumed = train_with_hf(
        example, tiny, tmp_path / "run", **options, resume=str(tmp_path / "run/checkpoint-2")
    )
    assert torch.equal(resumed, whole)
