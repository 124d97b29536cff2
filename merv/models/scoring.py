"""Score given answers without generating: log-probabilities and exact match with greedy decoding."""

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

    @torch.no_grad()
    def log_probs(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Compute the log-probability of each token of the given answers.

        Args:
            conversations: Conversations with at least one answer of the assistant.

        Returns:
            A tensor of shape [tokens] for each conversation, in float32.

        Raises:
            PromptError: A conversation has no answer.
        """
        if not conversations:
            return []
        out = self([[conversation] for conversation in conversations])
        assert out.conversations is not None
        log_probs = out.logits.log_softmax(dim=-1).gather(2, out.labels.clamp(min=0)[..., None])[..., 0]
        answers: list[list[Tensor]] = [[] for _ in conversations]
        for row, numbers in enumerate(out.conversations):
            for branch, number in enumerate(numbers, start=1):
                is_answer = (out.branches[row] == branch) & (out.labels[row] != NOT_LEARNED)
                answers[number].append(log_probs[row, is_answer])
        return [torch.cat(parts) for parts in answers]

    def exact_match(self, groups: Sequence[Sequence[Conversation]]) -> list[list[bool]]:
        """Check whether greedy decoding would give exactly the answer of each conversation and then stop.

        This takes one forward pass and no generation, because the first token that differs decides.

        Args:
            groups: Conversations with answers, grouped as in `VideoLLM.forward`.

        Returns:
            For each group, True or False for each of its conversations.

        Raises:
            PromptError: A conversation has no answer.
        """
        return self.score_batch(groups)[0]

    @torch.no_grad()
    def score_batch(
        self, groups: Sequence[Sequence[Conversation]]
    ) -> tuple[list[list[bool]], VideoLLMOutput]:
        """Compute the results of `exact_match` and `forward` in one pass.

        Args:
            groups: Conversations with answers, grouped as in `VideoLLM.forward`.

        Returns:
            What `exact_match` returns, and what `forward` returns.

        Raises:
            PromptError: A conversation has no answer.
        """
        if not groups:
            return [], self(groups)
        out = self(groups)
        assert out.conversations is not None
        wrong = (out.logits.argmax(dim=-1) != out.labels) & (out.labels != NOT_LEARNED)
        exact = [True] * sum(map(len, groups))
        for row, numbers in enumerate(out.conversations):
            for branch, number in enumerate(numbers, start=1):
                exact[number] &= not wrong[row, out.branches[row] == branch].any()
        results = iter(exact)
        return [[next(results) for _ in group] for group in groups], out
