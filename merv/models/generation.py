"""Generate answers, in batches or as a stream of text."""

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
        """Generate the assistant's next message of each conversation.

        Answers do not depend on the other conversations of the batch.

        Args:
            conversations: Conversations that end with a message of the user.
            **options: Options of transformers' `generate`. The defaults are greedy decoding and
                `max_new_tokens=64`.

        Returns:
            The text of each answer.

        Raises:
            PromptError: A conversation is malformed or ends with a message of the assistant.
        """
        inputs = self._inputs(conversations)
        ids = self.llm.generate(**inputs, **self._options(options))
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def stream(self, conversation: Conversation, **options: Any) -> Iterator[str]:
        """Generate the answer to one conversation as a stream of text; arguments as in `generate`."""
        inputs = self._inputs([conversation])
        return stream_tokens(self.llm, self.tokenizer, {**inputs, **self._options(options)})

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        for messages in conversations:
            check_messages(messages)
            if messages[-1]["role"] == "assistant":
                raise PromptError(
                    "Expected a conversation that ends with a message of the user, got one that ends with "
                    f"the assistant's {str(messages[-1]['content'])[:80]!r}. Remove that message."
                )
        with torch.no_grad():
            packed, visual = self.prepare([[messages] for messages in conversations], side="left")
            embeddings = packed.embed(self.llm.get_input_embeddings(), visual.tokens)
        return {"inputs_embeds": embeddings, "attention_mask": packed.mask.long()}

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        # These override what the generation_config of some models sets.
        greedy = {"max_new_tokens": 64, "max_length": None, "do_sample": False, "repetition_penalty": 1.0}
        return {**greedy, "pad_token_id": self.pad_id, **options}
