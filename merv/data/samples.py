"""Samples: conversations about videos and images, from rows of JSON in any of three forms.

Ours, questions about one video that are learned in one pass over it; chat messages, with any
number of videos, images and turns; and LLaVA's, where `<image>` and `<video>` stand for files:

    {"video": "clips/a.mp4", "questions": [{"question": "…", "answer": "…", "kind": "count"}, …]}
    {"messages": [{"role": "user", "content": […]}, {"role": "assistant", "content": "…"}]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", …}]}

`kind` is free: accuracy is reported by it. docs/data.md says what else a row may have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merv.errors import DataError
from merv.models.chat import VISUAL

Group = list[list[dict[str, Any]]]  # conversations about the same video
Part = dict[str, Any]
MEDIA = ("video", "image")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
PLACE = re.compile(r"\n?<(video|image)>\n?")


@dataclass(frozen=True)
class Sample:
    """A row: conversations that share their video, the kind of each, and where the row stands.

    origin: for messages, as `train.jsonl:17` (a line), `train.json[16]` (an index) or
        `shard.tar/00042` (a key).
    """

    conversations: tuple[list[dict[str, Any]], ...]
    kinds: tuple[str, ...]
    origin: str = ""

    def videos(self) -> list[Any]:
        """Every video and image in it, in order, repeated as it comes."""
        return [part[part["type"]] for talk in self.conversations for part in media_parts(talk)]


def media_parts(talk: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts of a conversation's content that are no text, in order."""
    contents = [turn["content"] for turn in talk if not isinstance(turn["content"], str)]
    return [part for content in contents for part in content if part["type"] != "text"]


def sample_of(row: Any, origin: str = "", root: Path | None = None) -> Sample:
    """A row of any of the forms as a Sample. Relative paths in it begin at `root`.

    Raises DataError that begins with `origin` and says what is wrong.

    >>> row = {"video": "a.mp4", "conversations": [
    ...     {"from": "human", "value": "<video>\\nWhat moves?"}, {"from": "gpt", "value": "A square."}]}
    >>> sample_of(row, root=Path("clips")).conversations[0][0]["content"]
    [{'type': 'video', 'video': 'clips/a.mp4'}, {'type': 'text', 'text': 'What moves?'}]
    """
    try:
        if not isinstance(row, Mapping):
            raise ValueError(f"a row is a JSON object; got {_short(row)}")
        talks, kinds = _talks({key: value for key, value in row.items() if value is not None}, root or Path())
        for talk in talks:
            _check_talk(talk)
        if wrong := [kind for kind in kinds if not isinstance(kind, str)]:
            raise ValueError(f"'kind' is a text; got {_short(wrong[0])}")
    except ValueError as error:
        raise DataError(f"{origin}: {error}.") from error
    return Sample(tuple(talks), tuple(kinds), origin)


def row_of(sample: Sample, place: Any = str) -> dict[str, Any]:
    """The row that `sample_of` makes this sample of: messages, or questions where it has several.

    place: what to write for a video or image.
    """
    if len(sample.conversations) == 1:
        (talk,), (kind,) = sample.conversations, sample.kinds
        written = [{**turn, "content": _written(turn["content"], place)} for turn in talk]
        return {"messages": written, **({"kind": kind} if kind else {})}
    row: dict[str, Any] = {"questions": []}
    for part in media_parts(sample.conversations[0]):
        row.setdefault(part["type"], []).append(place(part[part["type"]]))
    for (asked, answer), kind in zip(sample.conversations, sample.kinds, strict=True):
        question = {"question": asked["content"][-1]["text"], "answer": answer["content"], "kind": kind}
        row["questions"].append(question)
    return row


def _written(content: Any, place: Any) -> Any:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else _media(part, place(part[part["type"]])) for part in content]


def _media(part: Part, source: Any) -> Part:
    return {"type": part["type"], part["type"]: source}


def _talks(row: dict[str, Any], root: Path) -> tuple[list[list[dict[str, Any]]], list[Any]]:
    """The conversations of a row, and the kind of each."""
    files = [
        {"type": kind, kind: _source(source, root)}
        for kind in MEDIA
        for key in (kind, f"{kind}s")
        for source in _listed(row.get(key, []))
    ]
    if "questions" in row:
        if not files:
            raise ValueError("a row with 'questions' has no 'video' or 'image' that they are about")
        asked = [_question(each, files) for each in _list_of_objects(row["questions"], "questions")]
        return [talk for talk, _ in asked], [kind for _, kind in asked]
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        raise ValueError(f"wanted 'messages', 'conversations' or 'questions'; got {sorted(map(str, row))}")
    marked = name == "conversations" or bool(files)  # in other messages <video> is only a word
    turns = [_turn(turn, root, marked) for turn in _list_of_objects(row[name], name)]
    return [_placed(turns, files)], [row.get("kind", "")]


def _question(each: Mapping[str, Any], files: list[Part]) -> tuple[list[dict[str, Any]], Any]:
    for key in ("question", "answer"):
        if not isinstance(each.get(key), str):
            raise ValueError(f"each of 'questions' has a text as {key!r}; got {_short(each.get(key))}")
    content = [*map(dict, files), {"type": "text", "text": each["question"]}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": each["answer"]}]
    return talk, "" if each.get("kind") is None else each["kind"]


def _turn(turn: Mapping[str, Any], root: Path, marked: bool) -> dict[str, Any]:
    """Role and content; of a file that is only marked, there is a part without its source."""
    said, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(said, str) or said not in ROLES:
        raise ValueError(f"unknown role {_short(said)}; wanted one of {', '.join(ROLES)}")
    if isinstance(content, str) and not (marked and PLACE.search(content)):
        return {"role": ROLES[said], "content": content}
    if isinstance(content, str):
        texts = PLACE.split(content)  # text, kind, text, kind, …, text
        pieces = [{"type": p} if n % 2 else {"type": "text", "text": p} for n, p in enumerate(texts) if p]
        return {"role": ROLES[said], "content": pieces}
    if not isinstance(content, list) or not content:
        raise ValueError(f"the content of a turn is a text or a list of parts; got {_short(content)}")
    return {"role": ROLES[said], "content": [_part(part, root) for part in content]}


def _part(part: Any, root: Path) -> Part:
    """A part of a content in our form: {"type": "image_url", …} of other libraries becomes it."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    media = str(kind).removesuffix("_url")
    if media not in MEDIA:
        raise ValueError(f"a part of a content is a text, video or image; got {_short(part)}")
    source = part.get(kind)
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    return {"type": media} if source is None else {"type": media, media: _source(source, root)}


def _placed(turns: list[dict[str, Any]], files: list[Part]) -> list[dict[str, Any]]:
    """The turns with each file where it is marked, or all of them before the first question."""
    parts = media_parts(turns)
    holes = [part for part in parts if part["type"] not in part]
    if files and len(holes) < len(parts):
        raise ValueError("it names files both in the content and under 'video' or 'image'")
    if files and not holes:
        asked = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        said = asked["content"]
        asked["content"] = [*files, *([{"type": "text", "text": said}] if isinstance(said, str) else said)]
        return turns
    if len(holes) != len(files):
        raise ValueError(f"{len(holes)} places for videos and images, but {len(files)} files")
    kinds = Counter(part["type"] for part in files)
    by_name = Counter(part["type"] for part in holes) == kinds
    if not by_name and len(kinds) > 1:
        raise ValueError(f"the places are for {[p['type'] for p in holes]}, the files are {dict(kinds)}")
    for hole in holes:  # a video may stand at <image>, as LLaVA's own data has it
        file = next(file for file in files if not by_name or file["type"] == hole["type"])
        files.remove(file)
        hole.update(file)
    return turns


def _check_talk(talk: list[dict[str, Any]]) -> None:
    """Raise ValueError unless user and assistant take turns, and everybody says something."""
    roles = [turn["role"] for turn in talk]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"roles are user and assistant in turns, the last one assistant; got {roles}")
    for turn in talk:
        parts = [{"type": "text", "text": turn["content"]}]
        if not isinstance(turn["content"], str):
            parts = turn["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        media = any(part["type"] != "text" for part in parts)
        if media and turn["role"] != "user":
            raise ValueError(f"videos and images belong into turns of the user, not of the {turn['role']}")
        if not media and not text.strip():
            raise ValueError(f"the {turn['role']} says nothing: {_short(turn['content'])}")
        if VISUAL in text:
            raise ValueError("the character U+E000 in its text stands for videos; take it out")


def _source(value: Any, root: Path) -> Any:
    """A path made absolute; what holds bytes as it is, and of both, as `datasets` has them, the bytes."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        if "://" in value or value.startswith("data:"):
            raise ValueError(f"only local files are read, not {_short(value)}: download it and give its path")
        return str(root / Path(value).expanduser())
    if isinstance(value, bytes) or hasattr(value, "read"):
        return value
    raise ValueError(f"a video or image is a path; got {_short(value)}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _list_of_objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{name!r} is a list of one object or more; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]
