"""Generate answers, in batches or as a stream of text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from merv.errors import PromptError
from merv.models.chat import Conversation
from merv.models.chat_template import ChatTemplate

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Options of a generation_config that belong to the LLM and do not change how it decodes.
MODEL_OPTIONS = {"bos_token_id", "decoder_start_token_id", "cache_implementation"}
# Options of transformers' `generate` that merv sets itself, and the way out.
REFUSED = {
    **dict.fromkeys(
        ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"),
        "The conversations are the input.",
    ),
    "generation_config": "Pass its values as options, such as temperature=0.7.",
}
REFUSED_IN_STREAM = {
    "streamer": "Iterate over stream().",
    "return_dict_in_generate": "Call generate().",
}


class GenerationMixin:
    """`generate` and `stream` of a VideoLLM."""

    llm: Any
    tokenizer: Any
    chat: ChatTemplate
    pad_id: int
    max_length: int | None
    embed_prompts: Callable[[Sequence[Conversation]], dict[str, Tensor]]

    @overload
    def generate(
        self, conversations: Sequence[Conversation], *, return_dict_in_generate: Literal[True], **options: Any
    ) -> Any: ...

    @overload
    def generate(
        self, conversations: Sequence[Conversation], *, keep_thinking: bool = False, **options: Any
    ) -> list[str]: ...

    @torch.no_grad()
    def generate(
        self, conversations: Sequence[Conversation], *, keep_thinking: bool = False, **options: Any
    ) -> Any:
        """Generate the assistant's next message of each conversation.

        Decoding is greedy unless the options ask for sampling or beams; the LLM's own generation_config is
        ignored. Answers do not depend on the other conversations of the batch.

        Args:
            conversations: Conversations that end with a message of the user.
            keep_thinking: Whether thinking is part of the answer. By default the answer is the text after the
                last thinking block.
            **options: Options of transformers' `generate`, except its inputs and `generation_config`. None
                means the default, which is `max_new_tokens=64`. The limit is lowered to what fits into the
                LLM's context. Sampling options such as `temperature` imply `do_sample=True`.

        Returns:
            The text of each answer; `num_return_sequences` answers per conversation, if that option is set.
            With `return_dict_in_generate=True`, the output of transformers instead: the ids of the generated
            tokens in `sequences`, and with `output_scores=True` their `scores`.

        Raises:
            PromptError: A conversation is malformed, ends with a message of the assistant, or does not fit
                into the LLM's context; or an option is one that merv sets.
        """
        if not conversations:
            return []
        arguments = self._arguments(conversations, options, REFUSED)
        with _generation_config(self.llm):
            ids = self.llm.generate(**arguments)
        if options.get("return_dict_in_generate"):
            return ids
        copies = len(ids) // len(conversations)  # num_return_sequences
        opened = [self.chat.opens_thinking(messages) for messages in conversations for _ in range(copies)]
        return [self.chat.answer_of(row, was, keep_thinking) for row, was in zip(ids, opened, strict=True)]

    def stream(
        self, conversation: Conversation, *, keep_thinking: bool = False, **options: Any
    ) -> Iterator[str]:
        """Generate the answer to one conversation as a stream of text.

        Generation stops when the iterator is closed.

        Args:
            conversation: A conversation that ends with a message of the user.
            keep_thinking: See `generate`.
            **options: See `generate`; without `return_dict_in_generate`.

        Yields:
            Pieces of the answer, which joined give the text that `generate` returns.

        Raises:
            PromptError: See `generate`.
        """
        arguments = self._arguments([conversation], options, {**REFUSED, **REFUSED_IN_STREAM})
        pieces = _stream(self.llm, self.tokenizer, arguments)
        yield from self.chat.stream_of(pieces, self.chat.opens_thinking(conversation), keep_thinking)

    def _arguments(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any], refused: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`: the inputs, and the options with defaults."""
        for name, value in options.items():
            if name in refused and value is not None and value is not False:
                raise PromptError(f"merv does not accept the option {name}. {refused[name]}")
        with torch.no_grad():
            inputs = self.embed_prompts(conversations)
        options = {name: value for name, value in options.items() if value is not None}
        if options.get("temperature") == 0:  # greedy decoding, as in OpenAI-compatible servers
            options = {name: value for name, value in options.items() if name not in SAMPLING}
        defaults: dict[str, Any] = {
            "do_sample": bool(SAMPLING & options.keys()),
            "eos_token_id": self._stop_ids(),
            "pad_token_id": self.pad_id,
        }
        if "max_length" not in options:
            limits = [options.pop("max_new_tokens", 64)]
            if self.max_length is not None:
                limits.append(self.max_length - inputs["inputs_embeds"].shape[1])
            defaults["max_new_tokens"] = min(limits)
        return {**inputs, **defaults, **options}

    def _stop_ids(self) -> list[int]:
        """Ids at which an answer ends: the end token that is learned, and those of tokenizer and LLM."""
        of_llm = self.llm.generation_config.eos_token_id
        of_llm = of_llm if isinstance(of_llm, list) else [of_llm]
        ids = {self.chat.end_id, self.tokenizer.eos_token_id, *of_llm}
        return sorted(id_ for id_ in ids if id_ is not None)


@contextmanager
def _generation_config(llm: Any) -> Iterator[None]:
    """Replace the LLM's generation_config, which may set beams or penalties, by the defaults."""
    from transformers import GenerationConfig

    own = llm.generation_config
    llm.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in MODEL_OPTIONS})
    try:
        yield
    finally:
        llm.generation_config = own


def _stream(llm: Any, tokenizer: Any, inputs: dict[str, Any]) -> Iterator[str]:
    """Yield decoded text while `llm.generate(**inputs)` runs in a thread, whose errors are raised here.

    Closing this iterator stops the thread after its current token.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=False)
    stopped = threading.Event()
    failed: list[BaseException] = []

    def is_stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), stopped.is_set(), device=ids.device)

    criteria = StoppingCriteriaList([*inputs.pop("stopping_criteria", ()), is_stopped])

    def run() -> None:
        try:
            with torch.no_grad(), _generation_config(llm):
                llm.generate(**inputs, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:  # raised below, in the thread of the caller
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]
