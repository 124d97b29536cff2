"""Render chat messages with video, image and text content as token ids with gaps for visual tokens.

Messages have the format of transformers and of OpenAI-compatible servers:

    [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"},
                                  {"type": "text", "text": "What happens?"}]},
     {"role": "assistant", "content": "A cat jumps."}]

The chat template of the tokenizer renders them. A tokenizer without a template gets the prompt of the
released MERV's base model, `In: … \\nOut: …`, with the visual tokens right after BOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merv.errors import PromptError

VISUAL = "\ue000"  # stands for one video or image in rendered text: a private-use character
NOT_LEARNED = -100  # label that the loss ignores

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Visual:
    """A video or image in a conversation, with the text of the same message."""

    source: Any
    question: str


@dataclass(frozen=True)
class Prompt:
    """A conversation as token ids, split where visual tokens are inserted.

    Attributes:
        pieces: Lists of token ids and `Visual`s, in order.
        learned: For each piece, which of its tokens belong to an answer; empty for a `Visual`.
    """

    pieces: tuple[list[int] | Visual, ...]
    learned: tuple[list[bool], ...]

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


def render(messages: Sequence[Message], tokenizer: Any) -> Prompt:
    """Render messages as a prompt.

    Args:
        messages: One conversation. If its last message is not the assistant's, it is a question to be
            answered, and none of its tokens is learned.
        tokenizer: Tokenizer of transformers.

    Raises:
        PromptError: The messages are malformed, or the chat template rejects them.
    """
    texts, visuals = _to_texts(messages)
    is_question = texts[-1]["role"] != "assistant"
    text = _text(texts, tokenizer, is_question)
    answers = [] if is_question else _answer_spans(texts, tokenizer, text)
    if text.count(VISUAL) != len(visuals):
        raise PromptError(
            f"The chat template kept {text.count(VISUAL)} of {len(visuals)} videos. "
            "Put videos into messages of the user."
        )
    pieces: list[list[int] | Visual] = []
    learned: list[list[bool]] = []
    start = 0
    for number, part in enumerate(text.split(VISUAL)):
        if number:
            pieces.append(visuals[number - 1])
            learned.append([])
        if part:
            ids, flags = _tokens(part, start, answers, tokenizer)
            pieces.append(ids)
            learned.append(flags)
        start += len(part) + len(VISUAL)
    return Prompt(tuple(pieces), tuple(learned))


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


def _to_texts(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Visual]]:
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
        texts.append({"role": str(message["role"]), "content": content})
    return texts, visuals


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    is_known = kind in ("text", "video", "image") and kind in part
    if not is_known or (kind == "text" and not isinstance(part["text"], str)):
        raise PromptError(
            "Expected content to be a text or a list of parts {'type': 'text', 'text': …}, or the same with "
            f"'video' or 'image'; got {str(part)[:200]}."
        )


def _text(texts: Sequence[Mapping[str, str]], tokenizer: Any, is_question: bool) -> str:
    """Render the whole prompt as text, by the chat template or in MERV's plain format."""
    if not tokenizer.chat_template:
        return _plain(texts, tokenizer)
    try:
        return tokenizer.apply_chat_template(list(texts), tokenize=False, add_generation_prompt=is_question)
    except Exception as error:  # a template can raise any exception
        reason = str(error).rstrip(".")
        raise PromptError(f"The tokenizer's chat template rejects the messages: {reason}.") from error


def _plain(texts: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    """Render `In: {question}\\nOut: {answer}</s>`, after BOS if the tokenizer adds one."""
    has_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    text = tokenizer.bos_token if has_bos else ""
    for turn in texts:
        words = turn["content"].replace(VISUAL, "").strip()
        videos = VISUAL * turn["content"].count(VISUAL)
        if turn["role"] == "assistant":
            text += f" {words}{tokenizer.eos_token}"
        elif turn["role"] == "system":
            text += f"{words}\n"
        else:
            text += f"{videos}In: {words}\nOut:"
    return text


def _answer_spans(texts: Sequence[Mapping[str, str]], tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Return start and end of each answer in `text`, in characters, including its end token."""
    spans = []
    for i, turn in enumerate(texts):
        if turn["role"] == "assistant":
            before = _text(texts[:i], tokenizer, True)
            after = _text(texts[: i + 1], tokenizer, False)
            if not (text.startswith(after) and after.startswith(before)):
                raise PromptError(
                    "The chat template changes earlier turns when later ones follow, so the answers cannot "
                    "be located. Train on conversations of one turn, or use another chat template."
                )
            spans.append((len(before), len(after.rstrip())))
    return spans


def _tokens(
    part: str, start: int, answers: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Return the ids of a part of the text that begins at `start`, and which of them belong to an answer."""
    encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=bool(answers))
    if not answers:
        return encoded.input_ids, [False] * len(encoded.input_ids)
    flags = [
        any(start + last > begin and start + first < end for begin, end in answers)
        for first, last in encoded.offset_mapping
    ]
    return encoded.input_ids, flags
