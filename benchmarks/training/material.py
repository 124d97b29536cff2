"""Material for small runs: a tiny language model, clips, questions, and arguments of `merv fit`."""

from __future__ import annotations

import json
from pathlib import Path

from merv.testing import make_video, tiny_llm

CLIPS = 22  # not a multiple of the batch size, so the last step of an epoch is smaller


def make(folder: Path) -> None:
    """Write a folder with llm/, clips and data.jsonl, unless it exists. Answers have unequal lengths."""
    if (folder / "data.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llm(folder / "llm")
    rows = []
    for number in range(CLIPS):
        make_video(folder / f"{number}.mp4", frames=4 + number % 5)
        questions = [
            {"question": "What moves?", "answer": "ab"[number % 2] * (1 + number % 7), "kind": "what"},
            {"question": "How fast?", "answer": "very " * (number % 3) + "slow", "kind": "how"},
        ]
        rows.append({"video": f"{number}.mp4", "questions": questions[: 1 + number % 2]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, rows[: CLIPS // 2])))


def options(folder: Path, out: Path, **more: object) -> list[str]:
    """Return the arguments of `merv fit` for a run in `out`, with `more` options, written part__option."""
    values: dict[str, object] = {
        "model__llm": folder / "llm",
        "model__encoders": "[fake,fake/video]",
        "model__grid": "[2,1,1]",
        "model__trainable": "[projector,mixer,lora]",
        "model__lr": 1e-2,
        "data__train": folder / "data.jsonl",
        "trainer__default_root_dir": out,
        "trainer__accelerator": "cpu",
        "trainer__logger": "false",
        "trainer__enable_progress_bar": "false",
        **more,
    }
    return [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]
