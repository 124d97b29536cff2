"""Samples: conversations about videos and images, read from rows of JSON.

A row is either questions about one video, which are learned in one pass over it,

    {"video": "clips/a.mp4", "questions": [{"question": "…", "answer": "…", "kind": "count"}, …]}

or one conversation, with any number of videos, images and turns,

    {"messages": [{"role": "user", "content": […]}, {"role": "assistant", "content": "…"}]}

Paths are relative to the file's folder. `kind` is free: accuracy is reported by it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merv.chat import ask, check_content, check_messages
from merv.errors import DataError

Group = list[list[dict[str, Any]]]  # conversations about the same video


@dataclass(frozen=True)
class Sample:
    """A line of the file: conversations that share their video, and the kind of each."""

    conversations: tuple[list[dict[str, Any]], ...]
    kinds: tuple[str, ...]
    origin: str = ""

    def videos(self) -> list[Any]:
        """Every video and image in it, in order, repeated as it comes."""
        contents = [turn["content"] for talk in self.conversations for turn in talk]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        return [part[part["type"]] for part in parts if part["type"] != "text"]


def read_samples(path: str | Path) -> list[Sample]:
    """All lines of a JSONL file.

    Raises DataError that names the file, the line and what is wrong with it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"No data at {path}: no such file. For the demo's data run `merv demo --only-data`.")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                samples.append(_sample(json.loads(line), path.parent))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path}, line {number}: {type(error).__name__}: {error}. Wanted 'video' and 'questions' "
                    f"(each with 'question' and 'answer'), or 'messages'; got {line[:80]!r}."
                ) from error
    if not samples:
        raise DataError(f"{path} is empty; wanted one JSON object a line.")
    return samples


def _sample(row: dict[str, Any], folder: Path) -> Sample:
    if "messages" in row:
        check_messages(row["messages"])
        sample = Sample((_placed(row["messages"], folder),), (str(row.get("kind", "")),))
    else:
        video = _path(row["video"], folder)
        talks = tuple(ask(q["question"], video, answer=q["answer"]) for q in row["questions"])
        sample = Sample(talks, tuple(str(q.get("kind", "")) for q in row["questions"]))
    if not sample.conversations:
        raise ValueError("there are no questions")
    for talk in sample.conversations:
        check_content(talk)
        if talk[-1]["role"] != "assistant":
            raise ValueError("the last turn must be the assistant's")
    return sample


def _placed(messages: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages with the paths in them made absolute."""

    def part_placed(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["type"] == "text" else {**part, part["type"]: _path(part[part["type"]], folder)}

    return [
        turn
        if isinstance(turn["content"], str)
        else {**turn, "content": [part_placed(part) for part in turn["content"]]}
        for turn in messages
    ]


def _path(video: str, folder: Path) -> str:
    return str(folder / Path(video).expanduser())
