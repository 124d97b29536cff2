"""Scoring: how likely given answers are, and whether greedy decoding would give them, without generating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merv.models.chat import NOT_LEARNED, Conversation
from merv.models.outputs import VideoLLMOutput


class ScoringMixin:
    """`log_probs`, `exact_match` and `score_batch` of a VideoLLM."""

    if TYPE_CHECKING:

        def __call__(
            self, groups: Sequence[Sequence[Conversation]], packed_length: int | None = None
        ) -> VideoLLMOutput: ...
        def rows(self, groups: Sequence[Sequence[Conversation]]) -> list[Sequence[Conversation]]: ...

    @torch.no_grad()
    def log_probs(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Log-probability of each token of the assistant's turns, a float tensor a conversation."""
        if not conversations:
            return []
        out = self([[conversation] for conversation in conversations])
        chosen = out.logits.log_softmax(dim=-1).gather(2, out.labels.clamp(min=0)[..., None])[..., 0]
        return [row[own != NOT_LEARNED] for row, own in zip(chosen, out.labels, strict=True)]

    def exact_match(self, groups: Sequence[Sequence[Conversation]]) -> list[list[bool]]:
        """For each conversation whether greedy decoding would give exactly its answer and stop.

        One pass, without generating: the first token that differs already decides.
        """
        return self.score_batch(groups)[0]

    @torch.no_grad()
    def score_batch(
        self, groups: Sequence[Sequence[Conversation]]
    ) -> tuple[list[list[bool]], VideoLLMOutput]:
        """What `exact_match` and `forward` give, in one pass."""
        out = self(groups)
        wrong = (out.logits.argmax(dim=-1) != out.labels) & (out.labels != NOT_LEARNED)
        exact = iter(
            [
                not wrong[i, out.branches[i] == number].any()
                for i, row in enumerate(self.rows(groups))
                for number in range(1, len(row) + 1)
            ]
        )
        return [[next(exact) for _ in group] for group in groups], out
