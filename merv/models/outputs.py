"""The results of a VideoLLM: visual tokens, and logits at the tokens of the answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from merv.models.chat import NOT_LEARNED


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of a batch.

    Attributes:
        tokens: Tokens of all distinct videos, shape [V, L].
        ranges: For each video in the prompts, in order, the range of its tokens.
        mix_weights: Encoder name → its mean weight over all cells, a scalar. Empty if the mixer has no
            weights.
    """

    tokens: Tensor
    ranges: list[range]
    mix_weights: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class VideoLLMOutput:
    """The output of a VideoLLM for a batch of conversations.

    The batch has B rows. K is the number of positions at which any row has a token of an answer.

    Attributes:
        logits: Predictions in float32, shape [B, K, vocabulary].
        labels: Tokens of the answers, shape [B, K]; NOT_LEARNED where the row has none.
        branches: Number of the sequence in its row, from 1, that each token belongs to; shape [B, K].
        mix_weights: See `VisualTokens`.
        conversations: For each row, the number of the conversation in the batch that each of its sequences
            belongs to. None if several groups are packed into a row.
    """

    logits: Tensor
    labels: Tensor
    branches: Tensor
    mix_weights: dict[str, Tensor]
    conversations: list[list[int]] | None = None

    @property
    def loss_sum(self) -> Tensor:
        """Negative log-likelihood, summed over the tokens of the answers."""
        return cross_entropy(self.logits.flatten(0, 1), self.labels.flatten(), reduction="sum")

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the answers."""
        return int((self.labels != NOT_LEARNED).sum())

    @property
    def loss(self) -> Tensor:
        """Mean negative log-likelihood of the tokens of the answers."""
        return self.loss_sum / max(self.num_tokens, 1)
