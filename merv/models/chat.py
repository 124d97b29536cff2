"""Chat messages with text, videos and images, and prompts: token ids with gaps for visual tokens.

Messages have the format of transformers and of OpenAI-compatible servers:

    [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"},
                                  {"type": "text", "text": "What happens?"}]},
     {"role": "assistant", "content": "A cat jumps."}]

The chat template of the tokenizer renders them. A tokenizer without a template gets the prompt of the
released MERV's base model, `In: … \\nOut: …`, with the visual tokens before each `In:`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merv.errors import PromptError

VISUAL = "\ue000"  # stands for one video or image in rendered text: a private-use character
NOT_LEARNED = -100  # label that the loss ignores, torch's ignore_index

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Visual:
    """A video or image in a conversation, with the text of the same message."""

    source: Any
    question: str


@dataclass(frozen=True)
class Prompt:
    """A sequence of token ids from one conversation, split where visual tokens are inserted.

    Attributes:
        pieces: Lists of token ids and `Visual`s, in order.
        learned: For each piece, which of its tokens belong to an answer; empty for a `Visual`.
        conversation: Index of the conversation in its batch, from 0.
    """

    pieces: tuple[list[int] | Visual, ...]
    learned: tuple[list[bool], ...]
    conversation: int = 0

    @classmethod
    def of(cls, items: Sequence[int | Visual], learned: Sequence[bool]) -> Prompt:
        """Split a sequence of token ids and visuals at its visuals."""
        pieces: list[list[int] | Visual] = []
        flags: list[list[bool]] = []
        for item, flag in zip(items, learned, strict=True):
            if isinstance(item, Visual):
                pieces.append(item)
                flags.append([])
            elif not pieces or isinstance(pieces[-1], Visual):
                pieces.append([item])
                flags.append([flag])
            else:
                pieces[-1].append(item)
                flags[-1].append(flag)
        return cls(tuple(pieces), tuple(flags))

    @property
    def visuals(self) -> list[Visual]:
        """The videos and images, in order."""
        return [piece for piece in self.pieces if isinstance(piece, Visual)]


def user_message(question: str, *videos: Any, answer: str | None = None) -> list[dict[str, Any]]:
    """Build the messages of one question.

    Args:
        question: Text of the user.
        *videos: Any number of videos, of any type that `load_video` reads.
        answer: Answer of the assistant, for training and scoring.

    Returns:
        A conversation: the message of the user and, with `answer`, that of the assistant.

    Example:
        >>> user_message("What is this?", "clip.mp4")[0]["content"][1]
        {'type': 'text', 'text': 'What is this?'}
    """
    content: list[dict[str, Any]] = [{"type": "video", "video": video} for video in videos]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    ]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise PromptError unless these are the messages of one conversation."""
    if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise PromptError(
            "Expected a conversation, a non-empty list of messages {'role': …, 'content': …}; got "
            f"{str(messages)[:200]}. Pass several conversations as a list of such lists."
        )


def _parts(message: Message) -> list[Any]:
    """Return the content of a message as a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, (list, tuple)) else [content]


def to_texts(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Visual]]:
    """Return the messages with content as strings, a VISUAL character for each video, and the videos."""
    check_messages(messages)
    texts, visuals = [], []
    for message in messages:
        parts = _parts(message)
        for part in parts:
            _check_part(part)
        question = "".join(part["text"] for part in parts if part["type"] == "text").strip()
        if VISUAL in question:
            raise PromptError(
                f"The text {question[:80]!r} has the character U+E000, which merv uses for videos. Remove it."
            )
        content = ""
        for part in parts:
            kind = part["type"]
            if kind == "text":
                content += part["text"]
            else:
                content += VISUAL
                visuals.append(Visual(part[kind], question))
        # Templates differ in whether they strip answers, and generated answers are stripped.
        role = str(message["role"])
        texts.append({"role": role, "content": content.strip() if role == "assistant" else content})
    return texts, visuals


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    is_known = kind in ("text", "video", "image") and kind in part
    if not is_known or (kind == "text" and not isinstance(part["text"], str)):
        raise PromptError(
            "Expected content to be a text or a list of parts {'type': 'text', 'text': …}, or the same with "
            f"'video' or 'image'; got {str(part)[:200]}."
        )
    if kind == "text":
        try:
            part["text"].encode()
        except UnicodeEncodeError as error:  # JSON may contain half of a surrogate pair
            raise PromptError(f"The text {part['text'][:80]!a} is not valid Unicode: {error}.") from error
