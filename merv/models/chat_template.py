"""Conversations as prompts: what the LLM reads before each answer, and what it learns to answer.

In training, the same prompt precedes an answer as in inference: the messages before it, rendered with the
generation prompt. Most chat templates render earlier turns the same way in later prompts; then one sequence
holds all answers. Others rewrite earlier turns (they drop thinking or the last token); then a conversation
becomes several sequences, which share their common prefix in a row (packing.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from merv.errors import CheckpointError, PromptError
from merv.models.chat import VISUAL, Message, Prompt, Visual, to_texts

logger = logging.getLogger(__name__)

TOKENIZER_PROBES = [  # tokenizers with different rules give these different ids
    "Hello, world!  2 × 3\n\n",
    " don't",
    "x\tÉté ſ ﬁ",
    "日本語 한국어",
    "🙂",
    "a</s>b",
    "In: Who?\nOut:",
]
PROBE = "Zq7"  # an answer that occurs nowhere in a chat template
THINKING_OPENED = re.compile(r"<think>\s*(</think>\s*)?$")  # at the end of a generation prompt
# The empty thinking block that a template adds to answers without thinking.
THINKING_EMPTY = re.compile(r"^\s*<think>\s*</think>\s*")
THINKING_END = "\n</think>\n\n"
THINKING_STARTS = ("<think>", "<|channel|>")
ANSWER_FOLLOWS = ("</think>", "<|message|>")  # the answer follows the last of these; the latter is gpt-oss's

Texts = Sequence[Mapping[str, str]]
Item = int | Visual  # of a sequence: a token id, or a video or image


class ChatTemplate:
    """Renders conversations by the chat template of a tokenizer: as a prompt, or as answers to learn.

    A tokenizer without a template gets the prompt of the released MERV's base model, `In: … \\nOut: …`, with
    the visual tokens before each `In:`.

    Args:
        tokenizer: Tokenizer of transformers.
        options: Variables of the template, e.g. {"enable_thinking": False} for Qwen3.

    Example:
        >>> from merv import user_message
        >>> from merv.testing import tiny_llm
        >>> template = ChatTemplate(tiny_llm()[1])
        >>> template.end_token
        '</s>'
        >>> (prompt,) = template.training_prompts(user_message("What is this?", answer="A cat."))
        >>> sum(prompt.learned)
        7
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self._ends: dict[str | None, tuple[str, str]] = {}  # by template, which may be replaced

    def generation_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Render messages as the prompt of the next answer.

        Args:
            messages: A conversation that ends with a message of the user.

        Raises:
            PromptError: The messages are malformed or end with one of the assistant, or the chat template
                rejects them.
        """
        texts, visuals = to_texts(messages)
        if texts[-1]["role"] == "assistant":
            raise PromptError(
                "Expected a conversation that ends with a message of the user, got one that ends with the "
                f"assistant's {texts[-1]['content'][:80]!r}. Remove that message."
            )
        ids = self._ids(self._text(texts, is_question=True), texts, visuals)
        return Prompt(ids, [False] * len(ids))

    def training_prompts(self, messages: Sequence[Message]) -> list[Prompt]:
        """Render a conversation as sequences in which each answer, with its end token, is learned once.

        Args:
            messages: A conversation with at least one answer. Messages after the last answer are left out.

        Returns:
            One sequence, or several if the chat template changes earlier turns.

        Raises:
            PromptError: The messages are malformed or have no answer, or the chat template rejects them or
                does not render answers after their prompt.
        """
        texts, visuals = to_texts(messages)
        sequences: list[tuple[list[Item], list[bool]]] = []
        for number, turn in enumerate(texts, start=1):
            if turn["role"] != "assistant":
                continue
            prompt_text, answer_text = self._split(texts[:number])
            prompt = self._ids(prompt_text, texts[:number], visuals)
            whole = self._ids(prompt_text + answer_text, texts[:number], visuals)
            if not _starts_with(whole, prompt):  # inference cannot merge the end of a prompt with an answer
                whole = [*prompt, *self._encode(answer_text)]
            flags = [False] * len(prompt) + [True] * (len(whole) - len(prompt))
            if sequences and _starts_with(prompt, sequences[-1][0]):
                earlier = sequences.pop()[1]
                flags[: len(earlier)] = earlier
            sequences.append((whole, flags))
        if not sequences:
            raise PromptError(
                "Expected a conversation with an answer, a message whose role is 'assistant'; got "
                f"{str(messages)[:200]}. To generate an answer, call generate()."
            )
        return [Prompt(ids, flags) for ids, flags in sequences]

    def check(self) -> None:
        """Check that answers have an end at which generation can stop.

        Raises:
            PromptError: They have none, or it is not a single token.
        """
        if self.tokenizer.convert_tokens_to_ids(self.end_token) in (None, self.tokenizer.unk_token_id):
            raise PromptError(
                f"The end token {self.end_token!r} is not in the tokenizer's vocabulary. Set "
                "tokenizer.eos_token."
            )

    @property
    def end_token(self) -> str:
        """The token that ends every answer.

        Raises:
            PromptError: Neither the chat template nor the tokenizer has one.
        """
        return self._end()[1].strip()

    @property
    def end_id(self) -> int:
        """Id of the token that ends every answer."""
        return self.tokenizer.convert_tokens_to_ids(self.end_token)

    def identity(self) -> dict[str, Any]:
        """Return what identifies tokenizer and template in a checkpoint, as a dict of JSON values."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        probe = self.tokenizer(TOKENIZER_PROBES, add_special_tokens=False).input_ids
        return {
            "sha256": hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest(),
            "chat_template": self.tokenizer.chat_template,
            "chat_template_kwargs": self.options,
            "end_token": self.end_token,
        }

    def opens_thinking(self, messages: Sequence[Message]) -> bool:
        """Return whether the prompt of the next answer ends inside a thinking block."""
        opened = THINKING_OPENED.search(self._text(to_texts(messages)[0], is_question=True))
        return opened is not None and opened[1] is None

    def answer_of(self, ids: Sequence[int], opened: bool = False, keep_thinking: bool = False) -> str:
        """Decode generated tokens to the answer: the text after the last thinking block.

        Args:
            ids: Generated token ids.
            opened: Whether the prompt opened a thinking block.
            keep_thinking: Return all text, with the thinking.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if not keep_thinking:
            text = _after_thinking(text, opened)
        return self._without_special_tokens(text).strip()

    def stream_of(
        self, pieces: Iterable[str], opened: bool = False, keep_thinking: bool = False
    ) -> Iterator[str]:
        """Yield the answer from a stream of decoded text, without special tokens.

        Args:
            pieces: Decoded text with special tokens.
            opened: Whether the prompt opened a thinking block.
            keep_thinking: Yield all text, with the thinking.
        """
        text, is_thinking, has_begun = "", not keep_thinking, False
        for piece in pieces:
            text += piece
            start = text.lstrip()
            if is_thinking:
                may_think = opened or any(start.startswith(mark[: len(start)]) for mark in THINKING_STARTS)
                if may_think and not any(mark in text for mark in ANSWER_FOLLOWS):
                    continue
                text, is_thinking = _after_thinking(text, opened), False
            text = self._without_special_tokens(text)
            text = text if has_begun else text.lstrip()
            visible = text.rstrip()
            if visible:
                has_begun = True
                yield visible
            text = text[len(visible) :]  # white space at the end of the answer is left out
        if is_thinking:  # the stream ended before it was clear whether it begins with thinking
            text = self._without_special_tokens(_after_thinking(text, opened)).strip()
            if text:
                yield text

    # Text ---------------------------------------------------------------------------------

    def _split(self, texts: Texts) -> tuple[str, str]:
        """Return the prompt before the last message, which is an answer, and the text to learn.

        For example, Qwen3 renders the answer "A cat." to the question "Who?" as

            <|im_start|>user / Who?<|im_end|> / <|im_start|>assistant / <think></think> / A cat.<|im_end|>

        with line breaks at the slashes, and its prompt ends with "assistant". The text to learn is
        "A cat.<|im_end|>": without the empty thinking block, and only up to the end token.
        """
        prompt, full = self._text(texts[:-1], is_question=True), self._text(texts, is_question=False)
        opened = THINKING_OPENED.search(prompt)
        if full.startswith(prompt):
            answer = full[len(prompt) :]
        else:  # the template changes what comes before the answer
            history = self._text(texts[:-1], is_question=False)
            start = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(history, prompt, strict=False))
            )
            generation_prompt = prompt[start : opened.start() if opened else None]
            index = full.rfind(generation_prompt)
            if not generation_prompt or index < 0:
                raise PromptError(
                    f"The chat template does not render {generation_prompt!r}, the end of its prompt, before "
                    f"an answer: …{full[-80:]!r}. Set another tokenizer.chat_template."
                )
            answer = THINKING_EMPTY.sub("", full[index + len(generation_prompt) :])
            if opened and not opened[1]:
                answer = THINKING_END + answer
        if not opened:
            answer = THINKING_EMPTY.sub("", answer)
        tail, end = self._end()
        answer, tail = answer.rstrip(), tail.rstrip()
        if not answer.endswith(tail):
            raise PromptError(
                f"The chat template ends the answer {texts[-1]['content'][:60]!r} with {answer[-40:]!r}, but "
                f"others with {tail!r}. Set another tokenizer.chat_template."
            )
        return prompt, answer.removesuffix(tail) + end

    def _end(self) -> tuple[str, str]:
        """Return all that the template writes after an answer, and its beginning up to the end token.

        For example, "<|end|><|endoftext|>" and "<|end|>" for Phi-3. If the template writes no end token, the
        second is EOS.
        """
        template = self.tokenizer.chat_template
        if template not in self._ends:
            texts = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
            tail = self._text(texts, is_question=False).rpartition(PROBE)[2]
            known = {*self.tokenizer.all_special_tokens, *map(str, self.tokenizer.get_added_vocab())}
            found = [token for token in known if token and token in tail]
            if found:
                first = min(found, key=lambda token: (tail.find(token), -len(token)))
                end = tail[: tail.find(first) + len(first)]
                if end.strip() != first:
                    raise PromptError(
                        f"The chat template writes {end!r} after an answer: text before its end token "
                        f"{first!r}, or a changed answer. Set another tokenizer.chat_template."
                    )
            elif self.tokenizer.eos_token is not None:
                end = self.tokenizer.eos_token
            else:
                raise PromptError(
                    "Answers have no end: neither the chat template nor the tokenizer has an end token. Set "
                    "tokenizer.eos_token."
                )
            self._ends[template] = tail, end
        return self._ends[template]

    def _text(self, texts: Texts, is_question: bool) -> str:
        """Render the messages as text, by the chat template or in MERV's plain format."""
        if not self.tokenizer.chat_template:
            return _plain(texts, self.tokenizer)
        try:
            return self.tokenizer.apply_chat_template(
                list(texts), tokenize=False, add_generation_prompt=is_question, **self.options
            )
        except Exception as error:  # a template can raise any exception
            reason = str(error).rstrip(".")
            raise PromptError(f"The tokenizer's chat template rejects the messages: {reason}.") from error

    def _without_special_tokens(self, text: str) -> str:
        for token in {*self.tokenizer.all_special_tokens, self.end_token}:
            text = text.replace(token, "")
        return text

    # Tokens -------------------------------------------------------------------------------

    def _ids(self, text: str, texts: Texts, visuals: Sequence[Visual]) -> list[Item]:
        """Return the token ids of `text`, rendered from `texts`, with its visuals in their places."""
        expected = sum(turn["content"].count(VISUAL) for turn in texts)
        if text.count(VISUAL) != expected:
            raise PromptError(
                f"The chat template kept {text.count(VISUAL)} of {expected} videos. "
                "Put videos into messages of the user."
            )
        items: list[Item] = []
        for number, part in enumerate(text.split(VISUAL)):
            if number:
                items.append(visuals[number - 1])
            items += self._encode(part)
        return items

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def restore_template(tokenizer: Any, saved: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Give a tokenizer the chat template that a model was trained with; returns the template's variables."""
    template = saved["chat_template"]
    if tokenizer.chat_template != template:
        logger.warning(
            "The chat template of %s is not the one that the model was trained with. The saved one is used.",
            source,
        )
        tokenizer.chat_template = template
    return dict(saved["chat_template_kwargs"])


def check_tokenizer(saved: Mapping[str, Any], loaded: Mapping[str, Any], folder: Any) -> None:
    """Raise CheckpointError if two identities are of different tokenizers."""
    for key, what in (("sha256", "vocabulary or other rules"), ("end_token", "end token")):
        if saved[key] != loaded[key]:
            raise CheckpointError(
                f"{folder} was trained with a tokenizer with another {what} (saved: {saved[key]}, loaded: "
                f"{loaded[key]}). Pass the folder or hub id of the original LLM as llm=."
            )


def _starts_with(items: Sequence[Item], prefix: Sequence[Item]) -> bool:
    """Return whether the items begin with those of `prefix`; visuals are compared by identity."""
    return len(items) >= len(prefix) and all(
        a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
        for a, b in zip(items, prefix, strict=False)
    )


def _after_thinking(text: str, opened: bool) -> str:
    """Return the text after the last thinking block; nothing if that block has no end."""
    ends = [(text.rfind(mark), mark) for mark in ANSWER_FOLLOWS if mark in text]
    if ends:
        index, mark = max(ends)
        return text[index + len(mark) :]
    if opened or text.lstrip().startswith("<think>"):
        logger.warning("The answer was cut off in its thinking block. Increase max_new_tokens.")
        return ""
    return text


def _plain(texts: Texts, tokenizer: Any) -> str:
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
