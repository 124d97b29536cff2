"""Pack: prompts with visual tokens → the LLM's input, padded, masked, labeled.

Conversations about the same video may share it: a group of them is packed into one row, their
common beginning once, then each one's own turn as a branch that sees the beginning and itself.
That is exact, not an approximation: positions go on from the shared beginning in every branch.
Several groups may share a row too, to waste less on padding: they do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merv.models.chat import NOT_LEARNED, Prompt, Visual


@dataclass(frozen=True, eq=False)
class Tokens:
    """One conversation: `ids` [n] (a visual token i is −1−i) and `labels` [n]."""

    ids: Tensor
    labels: Tensor


def tokens_of(prompt: Prompt, runs: Iterator[range]) -> Tokens:
    """A prompt as ids and labels, the visual tokens of its videos taken from `runs` in order."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in zip(prompt.pieces, prompt.learned, strict=True):
        if isinstance(piece, Visual):
            places = [-1 - i for i in next(runs)]
            ids += places
            labels += [NOT_LEARNED] * len(places)
        else:
            ids += piece
            labels += [i if flag else NOT_LEARNED for i, flag in zip(piece, learned, strict=True)]
    return Tokens(torch.tensor(ids), torch.tensor(labels))


@dataclass(frozen=True, eq=False)
class Packed:
    """What the LLM gets.

    ids: [B, S]; −1−i means visual token i. mask: [B, S], True for a real token, or
    [B, 1, S, S], True where a token (third axis) may see another. positions, labels: [B, S].
    branches: [B, S], 0 in the common beginning, n in the n-th conversation of the group, −1 in the padding.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    branches: Tensor

    def embed(self, table: torch.nn.Module, visual: Tensor) -> Tensor:
        """Input embeddings [B, S, L]: text by the LLM's table, visual tokens [V, L] in their places."""
        words = table(self.ids.clamp(min=0))
        places = self.ids < 0  # where there are none, `visual` still is part of what is computed
        # index_put, not where: its gradient adds up where branches or rows share a token
        return words.index_put((places,), visual[-1 - self.ids[places]].to(words))

    def attention_mask(self, like: Tensor, additive: bool) -> Tensor:
        """The mask as the LLM takes it; `additive` makes one [B, 1, S, S] numbers to add to its scores."""
        if self.mask.ndim == 2 or not additive:
            return self.mask
        return like.new_zeros(self.mask.shape).masked_fill(~self.mask, torch.finfo(like.dtype).min)


def pack(
    groups: Sequence[Sequence[Tokens]],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    fill: int | None = None,
) -> Packed:
    """Groups of conversations to one row each; a group of one is an ordinary row.

    side: where the padding goes; generation wants it on the left.
    fill: put groups together in rows of up to so many tokens; a longer group has a row of its own.
    """
    rows = [_row(group) for group in groups]
    if fill is not None:
        rows = _bin_pack(rows, fill)
    length = max(len(row[0]) for row in rows)

    def padded(column: int, blank: int) -> Tensor:
        out = torch.full((len(rows), length), blank, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row[column])
            out[i, (length - n if side == "left" else 0) : (length if side == "left" else n)] = row[column]
        return out

    branches, parts = padded(3, -1), padded(4, -1)
    mask = branches >= 0
    if any(len(group) > 1 for group in groups) or len(rows) < len(groups):
        mask = _attention_mask(branches, parts)
    return Packed(padded(0, pad_id), mask, padded(2, 0), padded(1, NOT_LEARNED), branches)


def _row(group: Sequence[Tokens]) -> tuple[Tensor, ...]:
    """ids, labels, positions, branch (0 is the common beginning) and number in its row (0) of a group."""
    shared = _common(group)
    first = group[0]
    ids, labels = [first.ids[:shared]], [first.labels[:shared]]
    positions, branches = [torch.arange(shared)], [torch.zeros(shared, dtype=torch.long)]
    for number, sequence in enumerate(group, start=1):
        ids.append(sequence.ids[shared:])
        labels.append(sequence.labels[shared:])
        positions.append(torch.arange(shared, len(sequence.ids)))
        branches.append(torch.full((len(sequence.ids) - shared,), number))
    columns = [torch.cat(column) for column in (ids, labels, positions, branches)]
    return *columns, torch.zeros_like(columns[0])


def _bin_pack(rows: Sequence[tuple[Tensor, ...]], most: int) -> list[tuple[Tensor, ...]]:
    """Rows put one behind the other into fewer: the longest first, each where it still has room."""
    fuller: list[list[tuple[Tensor, ...]]] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        for other in fuller:
            if sum(len(part[0]) for part in other) + len(row[0]) <= most:
                other.append(row)
                break
        else:
            fuller.append([row])
    numbered = [[(*row[:-1], row[-1] + number) for number, row in enumerate(own)] for own in fuller]
    return [tuple(torch.cat(column) for column in zip(*own, strict=True)) for own in numbered]


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


def _attention_mask(branches: Tensor, parts: Tensor) -> Tensor:
    """[B, S] branches and group in the row → [B, 1, S, S]: causal, of one's own group the common
    beginning and one's own branch."""
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
    sees = causal & own & (parts[:, :, None] == parts[:, None, :]) & (branches[:, None, :] >= 0)
    return (sees | torch.eye(length, dtype=torch.bool))[:, None]  # padding sees itself: no empty row
