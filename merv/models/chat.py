"""Chat: messages with video, image and text content → token ids with places for visual tokens.

Messages have the form that transformers and the large models' servers use:

    [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"},
                                  {"type": "text", "text": "What happens?"}]},
     {"role": "assistant", "content": "A cat jumps."}]

They are rendered by the tokenizer's own chat template. A tokenizer without one gets the prompt
of the released MERV's base model, `In: … \\nOut: …`, with the visual tokens right after BOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merv.errors import PromptError

VISUAL = "\ue000"  # stands for one video in rendered text: a private-use character nobody types
NOT_LEARNED = -100  # a label that the loss leaves out

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Visual:
    """A video or image in a conversation, with the question that is asked beside it."""

    source: Any
    question: str


@dataclass(frozen=True)
class Prompt:
    """A conversation as token ids, cut where visual tokens go.

    pieces: lists of token ids and `Visual`s in order. learned: for each piece which of its
    tokens are an answer (nothing for a Visual).
    """

    pieces: tuple[list[int] | Visual, ...]
    learned: tuple[list[bool], ...]

    @property
    def visuals(self) -> list[Visual]:
        """The videos and images, in order."""
        return [piece for piece in self.pieces if isinstance(piece, Visual)]


def user_message(question: str, *videos: Any, answer: str | None = None) -> list[dict[str, Any]]:
    """The messages of one question about any number of videos, with its answer if there is one.

    >>> user_message("What is this?", "clip.mp4")[0]["content"][1]
    {'type': 'text', 'text': 'What is this?'}
    """
    content: list[dict[str, Any]] = [{"type": "video", "video": video} for video in videos]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    ]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def render(messages: Sequence[Message], tokenizer: Any) -> Prompt:
    """Messages → Prompt. Ending with the user's turn, it is to be answered: nothing in it is learned.

    Raises PromptError for messages that are malformed or that the chat template rejects.
    """
    flat, visuals = _flatten(messages)
    open_turn = flat[-1]["role"] != "assistant"
    text = _text(flat, tokenizer, open_turn)
    answers = [] if open_turn else _answer_spans(flat, tokenizer, text)
    if text.count(VISUAL) != len(visuals):
        raise PromptError(
            f"The chat template kept {text.count(VISUAL)} of {len(visuals)} videos. "
            "Put videos into user turns."
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
            f"Messages are a non-empty list of {{'role': …, 'content': …}}; got {str(messages)[:200]}. "
            "Several conversations are a list of such lists."
        )


def check_content(messages: Sequence[Message]) -> None:
    """Raise PromptError unless the content of every message is text, videos and images."""
    for message in messages:
        for part in _parts(message):
            _check_part(part)


def _parts(message: Message) -> list[Any]:
    """The parts of a message's content; a text alone is one part."""
    content = message["content"]
    whole = {"type": "text", "text": content} if isinstance(content, str) else content
    return list(whole) if isinstance(whole, (list, tuple)) else [whole]


def _flatten(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Visual]]:
    """Content lists to strings, each video to a VISUAL character."""
    check_messages(messages)
    check_content(messages)
    flat, visuals = [], []
    for message in messages:
        parts = _parts(message)
        words = "".join(part["text"] for part in parts if part["type"] == "text").strip()
        if VISUAL in words:
            raise PromptError(f"The text {words[:80]!r} has the character U+E000, which stands for videos.")
        said = ""
        for part in parts:
            kind = part["type"]
            if kind == "text":
                said += part["text"]
            else:
                said += VISUAL
                visuals.append(Visual(part[kind], words))
        flat.append({"role": str(message["role"]), "content": said})
    return flat, visuals


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    known = kind in ("text", "video", "image") and kind in part
    if not known or (kind == "text" and not isinstance(part["text"], str)):
        raise PromptError(
            "Content is a text or a list of parts {'type': 'text', 'text': …}, or the same with 'video' or "
            f"'image'; got {str(part)[:200]}."
        )


def _text(flat: Sequence[Mapping[str, str]], tokenizer: Any, open_turn: bool) -> str:
    """The whole prompt as text, by the chat template or in MERV's plain form."""
    if not tokenizer.chat_template:
        return _plain(flat, tokenizer, open_turn)
    try:
        return tokenizer.apply_chat_template(list(flat), tokenize=False, add_generation_prompt=open_turn)
    except Exception as error:  # templates raise whatever they like
        reason = str(error).rstrip(".")
        raise PromptError(f"The tokenizer's chat template rejects the messages: {reason}.") from error


def _plain(flat: Sequence[Mapping[str, str]], tokenizer: Any, open_turn: bool) -> str:
    """`In: {question}\\nOut: {answer}</s>`, after BOS where the tokenizer starts with one."""
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    text = tokenizer.bos_token if starts else ""
    for turn in flat:
        words = turn["content"].replace(VISUAL, "").strip()
        videos = VISUAL * turn["content"].count(VISUAL)
        if turn["role"] == "assistant":
            text += f" {words}{tokenizer.eos_token}"
        elif turn["role"] == "system":
            text += f"{words}\n"
        else:
            text += f"{videos}In: {words}\nOut:"
    return text


def _answer_spans(flat: Sequence[Mapping[str, str]], tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Start and end, in characters of `text`, of what the assistant says, with its end token."""
    spans = []
    for i, turn in enumerate(flat):
        if turn["role"] == "assistant":
            before = _text(flat[:i], tokenizer, True)
            after = _text(flat[: i + 1], tokenizer, False)
            if not (text.startswith(after) and after.startswith(before)):
                raise PromptError(
                    "The chat template rewrites earlier turns when later ones come, so that answers cannot "
                    "be found in it. Train on conversations of one turn, or with another template."
                )
            spans.append((len(before), len(after.rstrip())))
    return spans


def _tokens(
    part: str, start: int, answers: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Ids of a part of the text that begins at `start`, and which of them are an answer."""
    coded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=bool(answers))
    if not answers:
        return coded.input_ids, [False] * len(coded.input_ids)
    flags = [
        any(start + last > begin and start + first < end for begin, end in answers)
        for first, last in coded.offset_mapping
    ]
    return coded.input_ids, flags
