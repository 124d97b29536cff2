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
        tokens: The V tokens of all distinct videos, shape [V, L].
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
        logits: Predictions in float32, shape [B, K, vocabulary]. `logits[b, k]` predicts `labels[b, k]`: they
            are already shifted, unlike in transformers.
        labels: Tokens of the answers, shape [B, K]; NOT_LEARNED where the row has none.
        conversations: For each token, the index of its conversation in the batch, shape [B, K]. Only
            meaningful where `labels` is not NOT_LEARNED.
        mix_weights: See `VisualTokens`.
    """

    logits: Tensor
    labels: Tensor
    conversations: Tensor
    mix_weights: dict[str, Tensor]

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
