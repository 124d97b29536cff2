"""Helpers for complete runs of `merv fit` that take about a second."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from merv.cli.fit import NOISE
from merv.cli.main import main
from merv.testing import make_video, tiny_llm

QUIET = [
    *(pytest.mark.filterwarnings(f"ignore:.*{re.escape(text)}.*") for text in NOISE),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def make_material(folder: Path) -> Path:
    """Write a tiny LLM, videos, and questions with answers of different lengths."""
    tiny_llm(folder / "llm")
    rows = []
    for number in range(6):
        make_video(folder / f"{number}.mp4", frames=4)
        question = {"question": "Who?", "answer": "ab"[number % 2] * (1 + 3 * number), "kind": "who"}
        rows.append({"video": f"{number}.mp4", "questions": [question]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def fit(material, out, **options) -> int:
    """Run `merv fit`; options are written part__name. Returns the exit status."""
    values = {
        "model__llm": material / "llm",
        "model__encoders": "[fake]",
        "model__grid": "[2,1,1]",
        "model__lr": 1e-2,
        "model__feature_store": "memory",
        "data__train": material / "data.jsonl",
        "data__batch_size": 2,
        "data__num_workers": 0,
        "trainer__default_root_dir": out,
        "trainer__max_epochs": 2,
        "trainer__accelerator": "cpu",
        "trainer__logger": "false",
        "trainer__enable_progress_bar": "false",
        **options,
    }
    return main(["fit", *(f"--{name.replace('__', '.')}={value}" for name, value in values.items())])


def weights(out) -> dict:
    """Return the trained tensors of a run by name."""
    return load_file(out / "model/model.safetensors")


def difference(one, other) -> float:
    """Return the maximum absolute difference between two dicts of tensors."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
