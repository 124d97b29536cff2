"""What the steps of a VideoLLM give: visual tokens, and what is expected where the answers are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from merv.models.chat import NOT_LEARNED


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The videos of a batch as the LLM gets them.

    tokens: [V, L], of all videos, each distinct one once. ranges: for each video in the prompts, in order,
    which of the tokens are its own. mix_weights: what each encoder counted, on average over all cells,
    0-dim; empty where the mixer has no weights.
    """

    tokens: Tensor
    ranges: list[range]
    mix_weights: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class VideoLLMOutput:
    """What a VideoLLM makes of a batch of conversations.

    logits: [B, K, vocabulary], fp32, where any row has an answer's token. labels: [B, K], those tokens,
    NOT_LEARNED where the row has none. branches: [B, K], which conversation of its group a token is of, from
    1. mix_weights: as of VisualTokens.
    """

    logits: Tensor
    labels: Tensor
    branches: Tensor
    mix_weights: dict[str, Tensor]

    @property
    def loss_sum(self) -> Tensor:
        """Negative log-likelihood summed over the answers' tokens: what adds up over batches."""
        return cross_entropy(self.logits.flatten(0, 1), self.labels.flatten(), reduction="sum")

    @property
    def num_tokens(self) -> int:
        """How many tokens the answers have."""
        return int((self.labels != NOT_LEARNED).sum())

    @property
    def loss(self) -> Tensor:
        """Mean negative log-likelihood of the answers' tokens."""
        return self.loss_sum / max(self.num_tokens, 1)
