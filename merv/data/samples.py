"""Samples: conversations about videos and images, parsed from rows of JSON.

A row has one of three forms: questions about one video; chat messages with any number of videos, images
and turns; or a LLaVA conversation, in which `<image>` and `<video>` are placeholders for files:

    {"video": "clips/a.mp4", "questions": [{"question": "…", "answer": "…", "kind": "count"}, …]}
    {"messages": [{"role": "user", "content": […]}, {"role": "assistant", "content": "…"}]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", …}]}

`kind` is any string; validation accuracy is reported per kind. docs/data.md describes the other keys.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merv.errors import DataError, VideoError
from merv.models.chat import VISUAL, sources_of
from merv.video.open import is_decoder, original_of

Conversation = list[dict[str, Any]]  # messages of {"role": …, "content": …}
Group = list[Conversation]  # conversations about the same video
Part = dict[str, Any]  # of a message's content, such as {"type": "video", "video": "a.mp4"}
MEDIA = ("video", "image")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile(r"\n?<(video|image)>\n?")


@dataclass(frozen=True)
class Sample:
    """One row: conversations that share their videos and images.

    Args:
        conversations: Each is a list of messages.
        kinds: The kind of each conversation, or "".
        origin: Where the row is, for error messages: `train.jsonl:17` (a line), `train.json[16]` (an index)
            or `shard.tar/00042` (a key).
    """

    conversations: tuple[Conversation, ...]
    kinds: tuple[str, ...]
    origin: str = ""

    def videos(self) -> list[Any]:
        """Return every video and image in order, once for each time that it occurs."""
        return [part[part["type"]] for messages in self.conversations for part in media_parts(messages)]


def media_parts(conversation: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return the videos and images of a conversation as content parts, in order."""
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] != "text"]


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text in the content of a message.

    >>> text_of("Who?"), text_of([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Who?"}])
    ('Who?', 'Who?')
    """
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def sample_of(
    row: Any,
    origin: str = "",
    root: Path | None = None,
    members: Mapping[str, Sequence[Any]] | None = None,
) -> Sample:
    """Parse a row of any of the three forms.

    Args:
        row: A JSON object.
        origin: Where the row is. Error messages begin with it.
        root: The folder that relative paths in the row start at; the current folder by default.
        members: "video" or "image" → files that came with the row, in a shard. They replace the files that
            the row names: those of the same name or, if no name is the same, in order.

    Returns:
        The sample, with paths joined to `root`.

    Raises:
        DataError: The row is malformed.

    Example:
        >>> row = {"video": "a.mp4", "conversations": [
        ...     {"from": "human", "value": "<video>\\nWhat moves?"}, {"from": "gpt", "value": "A square."}]}
        >>> sample_of(row, root=Path("clips")).conversations[0][0]["content"]
        [{'type': 'video', 'video': 'clips/a.mp4'}, {'type': 'text', 'text': 'What moves?'}]
    """
    try:
        if not isinstance(row, Mapping):
            raise ValueError(f"expected a JSON object; got {_short(row)}")
        row = {key: value for key, value in row.items() if value is not None}
        conversations, kinds = _conversations(row, root or Path(), members or {})
        for conversation in conversations:
            _check_conversation(conversation)
        for kind in kinds:
            if not isinstance(kind, str):
                raise ValueError(f"'kind' must be a string; got {_short(kind)}")
            _check_unicode(kind)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply, in a table or for repr
        raise DataError(f"{origin}: {error}.") from error
    return Sample(tuple(conversations), tuple(kinds), origin)


def row_of(sample: Sample, path_of: Callable[[Any], Any] = str) -> dict[str, Any]:
    """Return a row that `sample_of` parses into this sample.

    The row has `messages`, or `questions` if the sample has several conversations. `path_of` maps each
    video and image to what is written in the row.
    """
    if len(sample.conversations) == 1:
        (conversation,), (kind,) = sample.conversations, sample.kinds
        messages = [{**turn, "content": _content_row(turn["content"], path_of)} for turn in conversation]
        return {"messages": messages, **({"kind": kind} if kind else {})}
    row: dict[str, Any] = {"questions": []}
    for part in media_parts(sample.conversations[0]):
        row.setdefault(part["type"], []).append(path_of(part[part["type"]]))
    for (user, assistant), kind in zip(sample.conversations, sample.kinds, strict=True):
        question = {"question": text_of(user["content"]), "answer": assistant["content"], "kind": kind}
        row["questions"].append(question)
    return row


def _content_row(content: str | list[Part], path_of: Callable[[Any], Any]) -> Any:
    if isinstance(content, str):
        return content
    return [
        part if part["type"] == "text" else {**part, part["type"]: path_of(part[part["type"]])}
        for part in content
    ]


def _conversations(
    row: Mapping[str, Any], root: Path, members: Mapping[str, Sequence[Any]]
) -> tuple[list[Conversation], list[Any]]:
    """Return the conversations of a row, and the kind of each."""
    named = {
        media_type: [
            source for key in (media_type, f"{media_type}s") for source in _as_list(row.get(key, []))
        ]
        for media_type in MEDIA
    }
    if "questions" in row:
        files = _files(named, [], root, members)
        if not files:
            raise ValueError("a row with 'questions' needs a 'video' or an 'image'")
        questions = _list_of_objects(row["questions"], "questions")
        kinds = ["" if question.get("kind") is None else question["kind"] for question in questions]
        return [_question_conversation(question, files) for question in questions], kinds
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        raise ValueError(
            "expected one of the keys 'messages', 'conversations' and 'questions'; got "
            f"{sorted(map(str, row))}"
            + (". Put 'question' and 'answer' into a list, 'questions'" if "question" in row else "")
        )
    # Without files beside them, <video> in chat messages is plain text
    has_placeholders = name == "conversations" or any(named.values()) or bool(members)
    turns = [_turn(turn, root, has_placeholders) for turn in _list_of_objects(row[name], name)]
    return [_insert_files(turns, _files(named, turns, root, members))], [row.get("kind", "")]


def _files(
    named: Mapping[str, list[Any]], turns: Conversation, root: Path, members: Mapping[str, Sequence[Any]]
) -> list[Part]:
    """Return the files beside the messages, as content parts; members replace those that messages name."""
    files: list[Part] = []
    for media_type, sources in named.items():
        in_content = [part for part in media_parts(turns) if media_type in part]
        if media_type not in members:
            found = [_source(source, root) for source in sources]
        elif sources or not in_content:
            found = _members_for(sources, members[media_type])
        else:
            found = []
            replaced = _members_for([part[media_type] for part in in_content], members[media_type])
            for part, member in zip(in_content, replaced, strict=True):
                part[media_type] = member
        files += [{"type": media_type, media_type: source} for source in found]
    return files


def _members_for(sources: Sequence[Any], members: Sequence[Any]) -> list[Any]:
    """Return the members of a shard that the files of a row stand for; all members if the row names none."""
    names = [Path(str(source)).name.lower() for source in sources]
    by_name = {Path(str(member)).name.lower(): member for member in members}
    if names and set(names) == set(by_name):
        return [by_name[name] for name in names]
    if names and (len(names) != len(members) or set(names) & set(by_name)):
        raise ValueError(f"the row names the files {names}, but the shard has {list(by_name)}")
    return list(members)


def _question_conversation(question: Mapping[str, Any], files: list[Part]) -> Conversation:
    for key in ("question", "answer"):
        if not isinstance(question.get(key), str):
            raise ValueError(f"each of 'questions' needs a string {key!r}; got {_short(question.get(key))}")
    content = [*map(dict, files), {"type": "text", "text": question["question"]}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": question["answer"]}]


def _turn(turn: Mapping[str, Any], root: Path, has_placeholders: bool) -> dict[str, Any]:
    """Return a message in merv's form. A placeholder becomes a part without a source."""
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role {_short(role)}; expected one of {', '.join(ROLES)}")
    if isinstance(content, str) and not (has_placeholders and PLACEHOLDER.search(content)):
        return {"role": ROLES[role], "content": content}
    if isinstance(content, str):
        pieces = PLACEHOLDER.split(content)  # text, kind, text, kind, …, text
        parts = [{"type": p} if n % 2 else {"type": "text", "text": p} for n, p in enumerate(pieces) if p]
        return {"role": ROLES[role], "content": parts}
    if not isinstance(content, list) or not content:
        raise ValueError(f"'content' must be a string or a non-empty list of parts; got {_short(content)}")
    return {"role": ROLES[role], "content": [_part(part, root) for part in content]}


def _part(part: Any, root: Path) -> Part:
    """Return a content part in merv's form. A null counts as a missing key.

    A part without a file is a placeholder, for which some data sets give the `index` of its file in the row.
    """
    values = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
    kind = str(values.get("type"))
    media = kind.removesuffix("_url")
    is_text = kind == "text" and isinstance(values.get("text"), str)
    if not is_text and media not in MEDIA:
        raise ValueError(f"a content part must be a text, video or image; got {_short(part)}")
    sources = [] if is_text else sources_of(values)
    if len(sources) > 1:
        raise ValueError(f"a content part has several files; got {_short(part)}")
    keys = ["text"] if is_text else [kind, "path", "url"] if sources else [kind, "path", "url", "index"]
    if unknown := [key for key in values if key not in ("type", *keys)]:
        raise ValueError(f"a {kind} part has the unknown key {unknown[0]!r}; expected {', '.join(keys)}")
    if sources:
        return {"type": media, media: _source(sources[0], root)}
    return values if is_text else {**values, "type": media}


def _insert_files(turns: Conversation, files: list[Part]) -> Conversation:
    """Put each file at its placeholder; without placeholders, all files before the first question."""
    parts = media_parts(turns)
    placeholders = [part for part in parts if part["type"] not in part]
    for media_type in MEDIA:
        indices = [part.pop("index", None) for part in placeholders if part["type"] == media_type]
        if any(index not in (None, position) for position, index in enumerate(indices)):
            raise ValueError(f"files replace placeholders in order, from 'index' 0; got {indices}")
    if files and len(placeholders) < len(parts):
        raise ValueError("files are given both in 'content' and under 'video' or 'image'; use one of the two")
    if files and not placeholders:
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        content = first["content"]
        first["content"] = [
            *files,
            *([{"type": "text", "text": content}] if isinstance(content, str) else content),
        ]
        return turns
    if len(placeholders) != len(files):
        raise ValueError(
            f"expected one file per placeholder; got {len(placeholders)} placeholders for videos and images, "
            f"and {len(files)} files"
        )
    types = Counter(part["type"] for part in files)
    types_match = Counter(part["type"] for part in placeholders) == types
    if not types_match and len(types) > 1:
        raise ValueError(
            "expected placeholders of the same types as the files; got placeholders for "
            f"{[p['type'] for p in placeholders]}, and the files {dict(types)}"
        )
    for placeholder in placeholders:  # LLaVA's own data uses <image> for videos, too
        file = next(file for file in files if not types_match or file["type"] == placeholder["type"])
        files.remove(file)
        placeholder.update(file)
    return turns


def _check_conversation(conversation: Conversation) -> None:
    """Raise ValueError unless user and assistant alternate and no message is empty."""
    roles = [turn["role"] for turn in conversation]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"roles must alternate between user and assistant, assistant last; got {roles}")
    for turn in conversation:
        role, content = turn["role"], turn["content"]
        text = text_of(content)
        has_media = bool(media_parts([turn]))
        if has_media and role != "user":
            raise ValueError(
                f"videos and images are only allowed in user messages; the {role} message has one"
            )
        if not has_media and not text.strip():
            raise ValueError(f"the {role} message is empty: {_short(content)}")
        _check_unicode(text)
        if VISUAL in text:
            raise ValueError("the text contains U+E000, which is reserved for videos; remove it")


def _check_unicode(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON may contain as an escape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {_short(text[error.start : error.end])} is half of a surrogate pair, which is not "
            "valid Unicode; remove it"
        ) from error


def _source(value: Any, root: Path) -> Any:
    """Return a path joined to `root`, or bytes, a file object or a decoder unchanged.

    Of a row of datasets' Video feature, the bytes are used, or the path if there are none.
    """
    with suppress(VideoError):  # without bytes and path, it is an invalid value
        value = original_of(value)
    if isinstance(value, str) and value:
        if "://" in value or value.startswith("data:"):
            raise ValueError(
                f"only local files are supported; got {_short(value)}. Download it and give its path"
            )
        _check_unicode(value)
        if "\0" in value:
            raise ValueError(f"a path cannot contain a null byte; got {_short(value)}")
        return str(root / os.path.expanduser(value))
    if isinstance(value, bytes) or hasattr(value, "read") or is_decoder(value):
        return value
    raise ValueError(f"a video or image must be a path; got {_short(value)}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _list_of_objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{name!r} must be a non-empty list of objects; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]
