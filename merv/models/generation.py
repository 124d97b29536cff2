"""Generation: the language model's answers, in batches or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merv.errors import PromptError
from merv.models.chat import Conversation, check_messages
from merv.models.llm import stream_tokens
from merv.models.outputs import VisualTokens
from merv.models.packing import Packed


class GenerationMixin:
    """`generate` and `stream` of a VideoLLM."""

    llm: Any
    tokenizer: Any
    pad_id: int
    if TYPE_CHECKING:

        def prepare(self, groups: Any, **options: Any) -> tuple[Packed, VisualTokens]: ...

    @torch.no_grad()
    def generate(self, conversations: Sequence[Conversation], **options: Any) -> list[str]:
        """The assistant's next turn in each conversation; options go to transformers' generate.

        Greedy and at most 64 new tokens unless the options say otherwise. A batch gives the same
        answers as one by one.
        """
        inputs = self._inputs(conversations)
        ids = self.llm.generate(**inputs, **self._options(options))
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def stream(self, conversation: Conversation, **options: Any) -> Iterator[str]:
        """The answer to one conversation piece by piece, as it comes."""
        inputs = self._inputs([conversation])
        return stream_tokens(self.llm, self.tokenizer, {**inputs, **self._options(options)})

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        for messages in conversations:
            check_messages(messages)
            if messages[-1]["role"] == "assistant":
                raise PromptError("To be answered, a conversation must end in the user's turn.")
        with torch.no_grad():
            packed, visual = self.prepare([[messages] for messages in conversations], side="left")
            embeddings = packed.embed(self.llm.get_input_embeddings(), visual.tokens)
        return {"inputs_embeds": embeddings, "attention_mask": packed.mask.long()}

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        # Without the penalty and length limit that some models bring along: greedy is the likeliest token.
        greedy = {"max_new_tokens": 64, "max_length": None, "do_sample": False, "repetition_penalty": 1.0}
        return {**greedy, "pad_token_id": self.pad_id, **options}
