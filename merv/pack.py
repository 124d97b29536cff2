"""Pack: prompts with visual tokens → the LLM's input, padded, masked, labelled.

Conversations about the same video may share it: a group of them is packed into one row, their
common beginning once, then each one's own turn as a branch that sees the beginning and itself.
That is exact, not an approximation: positions go on from the shared beginning in every branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merv.chat import NOT_LEARNED


@dataclass(frozen=True, eq=False)
class Tokens:
    """One conversation: `ids` [n] (a visual token i is −1−i) and `labels` [n]."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """What the LLM gets.

    ids: [B, S]; −1−i means visual token i. mask: [B, S], True for a real token, or
    [B, 1, S, S], True where a token (third axis) may see another. positions, labels: [B, S].
    branches: [B, S], 0 in the common beginning, n in the n-th conversation, −1 in the padding.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    branches: Tensor

    def embed(self, table: torch.nn.Module, visual: Tensor) -> Tensor:
        """Input embeddings [B, S, L]: text by the LLM's table, visual tokens [V, L] in their places."""
        words = table(self.ids.clamp(min=0))
        if not len(visual):
            return words
        places = self.ids < 0
        # index_put, not where: its gradient adds up where branches or rows share a token
        return words.index_put((places,), visual[-1 - self.ids[places]].to(words))

    def attention_mask(self, like: Tensor, additive: bool) -> Tensor:
        """The mask as the LLM takes it; `additive` makes one [B, 1, S, S] numbers to add to its scores."""
        if self.mask.ndim == 2 or not additive:
            return self.mask
        return like.new_zeros(self.mask.shape).masked_fill(~self.mask, torch.finfo(like.dtype).min)


def pack(groups: Sequence[Sequence[Tokens]], pad_id: int, side: Literal["left", "right"] = "right") -> Packed:
    """Groups of conversations to one row each; a group of one is an ordinary row.

    side: where the padding goes; generation wants it on the left.
    """
    rows = [_row(group) for group in groups]
    length = max(len(row[0]) for row in rows)

    def padded(column: int, fill: int) -> Tensor:
        out = torch.full((len(rows), length), fill, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row[column])
            out[i, (length - n if side == "left" else 0) : (length if side == "left" else n)] = row[column]
        return out

    branches = padded(3, -1)
    mask = branches >= 0
    if any(len(group) > 1 for group in groups):
        mask = _who_sees_whom(branches)
    return Packed(padded(0, pad_id), mask, padded(2, 0), padded(1, NOT_LEARNED), branches)


def _row(group: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, labels, positions and branch (0 is the common beginning) of a group."""
    shared = _common(group)
    first = group[0]
    ids, labels = [first.ids[:shared]], [first.labels[:shared]]
    positions, branches = [torch.arange(shared)], [torch.zeros(shared, dtype=torch.long)]
    for number, sequence in enumerate(group, start=1):
        ids.append(sequence.ids[shared:])
        labels.append(sequence.labels[shared:])
        positions.append(torch.arange(shared, len(sequence.ids)))
        branches.append(torch.full((len(sequence.ids) - shared,), number))
    return torch.cat(ids), torch.cat(labels), torch.cat(positions), torch.cat(branches)


def _common(group: Sequence[Tokens]) -> int:
    """Tokens that all conversations of a group begin with, before any answer."""
    if len(group) == 1:
        return 0
    least = min(len(sequence.ids) for sequence in group)
    rows = torch.stack([sequence.ids[:least] for sequence in group])
    learned = torch.stack([sequence.labels[:least] != NOT_LEARNED for sequence in group])
    differs = (rows != rows[:1]).any(dim=0) | learned.any(dim=0)
    if not differs.any():
        return least - 1
    first = int(differs.nonzero()[0])
    # What predicts an answer's first token is the token before it, which therefore is each one's own.
    return max(first - 1, 0) if learned[:, first].any() else first


def _who_sees_whom(branches: Tensor) -> Tensor:
    """[B, S] branch numbers → [B, 1, S, S]: causal, the common beginning and one's own branch."""
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
    sees = causal & own & (branches[:, None, :] >= 0)
    return (sees | torch.eye(length, dtype=torch.bool))[:, None]  # padding sees itself: no empty row
