"""Chat messages with text, videos and images, and prompts: token ids with gaps for visual tokens.

Messages have the format of transformers and of OpenAI-compatible servers:

    [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"},
                                  {"type": "text", "text": "What happens?"}]},
     {"role": "assistant", "content": "A cat jumps."}]

A part for a video or image has its source under its type ("video" or "image"), "path" or "url". It may also
be {"type": "image_url", "image_url": {"url": …}}, and likewise video_url. A source is anything that
`load_video` reads, or a file:// URL; nothing is downloaded.

The chat template of the tokenizer renders them. A tokenizer without a template gets the prompt of the
released MERV's base model, `In: … \\nOut: …`, with the visual tokens before each `In:`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from merv.errors import PromptError

VISUAL = "\ue000"  # stands for one video or image in rendered text: a private-use character
MEDIA_TYPES = ("video", "image", "video_url", "image_url")  # of parts of a message
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
    """A sequence of token ids from one conversation, with a `Visual` in place of visual tokens.

    Attributes:
        items: Token ids and `Visual`s, in order.
        learned: For each item, whether it is a token of an answer.
        conversation: Index of the conversation in its batch, from 0.
    """

    items: list[int | Visual]
    learned: list[bool]
    conversation: int = 0

    @property
    def visuals(self) -> list[Visual]:
        """The videos and images, in order."""
        return [item for item in self.items if isinstance(item, Visual)]


def user_message(question: str, *videos: Any, answer: str | None = None) -> list[dict[str, Any]]:
    """Return a conversation with one user message and, with `answer`, that of the assistant.

    To ask a further question, join the turns: `[*history, *user_message("And then?")]`.

    Args:
        question: Text of the user.
        *videos: Any number of videos, of any type that `load_video` reads.
        answer: Answer of the assistant, for training and scoring.

    Returns:
        A list of one or two messages.

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
                visuals.append(Visual(sources_of(part)[0], question))
        # Templates differ in whether they strip answers, and generated answers are stripped.
        role = str(message["role"])
        texts.append({"role": role, "content": content.strip() if role == "assistant" else content})
    return texts, visuals


def sources_of(part: Mapping[str, Any]) -> list[Any]:
    """Return what a part for a video or image names, under any of the keys of a source."""
    sources = []
    for key in (part["type"], "path", "url"):
        source = part.get(key)
        if isinstance(source, Mapping) and "url" in source:  # OpenAI's image_url
            source = source["url"]
        if isinstance(source, str) and source.startswith("file://"):
            source = url2pathname(urlsplit(source).path)
        if source is not None:
            sources.append(source)
    return sources


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    is_text = kind == "text" and isinstance(part.get("text"), str)
    if not is_text and (kind not in MEDIA_TYPES or len(sources_of(part)) != 1):
        raise PromptError(
            "Expected content to be a string or a list of parts: {'type': 'text', 'text': …}, "
            "{'type': 'video', 'video': SOURCE} or {'type': 'image', 'image': SOURCE}; got "
            f"{str(part)[:200]}."
        )
    if kind == "text":
        try:
            part["text"].encode()
        except UnicodeEncodeError as error:  # JSON may contain half of a surrogate pair
            raise PromptError(f"The text {part['text'][:80]!a} is not valid Unicode: {error}.") from error
