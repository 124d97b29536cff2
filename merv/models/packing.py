"""Pack prompts with visual tokens into the LLM's input: padded, masked, labeled.

A conversation is one sequence of tokens, or several (see chat_template.py). The sequences of a group of
conversations about the same video are packed into one row. Their common prefix comes first. Then each
sequence has a branch that attends to the prefix and to itself. The position ids of every branch continue
after the prefix, so the logits equal those of separate rows. Several groups can share a row, to reduce
padding; they do not attend to each other.
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
    """One sequence: `ids` and `labels`, each of shape [n]. Visual token i has the id −1−i."""

    ids: Tensor
    labels: Tensor


def tokens_of(prompt: Prompt, ranges: Iterator[range]) -> Tokens:
    """Return the ids and labels of a prompt; `ranges` gives the visual tokens of its videos in order."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in zip(prompt.pieces, prompt.learned, strict=True):
        if isinstance(piece, Visual):
            visual_ids = [-1 - i for i in next(ranges)]
            ids += visual_ids
            labels += [NOT_LEARNED] * len(visual_ids)
        else:
            ids += piece
            labels += [i if flag else NOT_LEARNED for i, flag in zip(piece, learned, strict=True)]
    return Tokens(torch.tensor(ids), torch.tensor(labels))


@dataclass(frozen=True, eq=False)
class Packed:
    """The input of the LLM.

    Attributes:
        ids: Token ids, shape [B, S]; −1−i stands for visual token i.
        mask: True for a real token, shape [B, S]; or True where a token (third axis) attends to another one,
            shape [B, 1, S, S].
        positions: Position ids, shape [B, S].
        labels: Tokens of the answers, NOT_LEARNED elsewhere, shape [B, S].
        branches: 0 in the common prefix, n in the n-th sequence of the group, −1 in the padding, shape
            [B, S].
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    branches: Tensor

    def embed(self, table: torch.nn.Module, visual: Tensor) -> Tensor:
        """Return input embeddings [B, S, L]: text from the LLM's `table`, and the visual tokens [V, L]."""
        embeddings = table(self.ids.clamp(min=0))
        is_visual = self.ids < 0
        # Without visual tokens, `visual` still is part of the graph. index_put sums the gradients of a visual
        # token that several rows share.
        return embeddings.index_put((is_visual,), visual[-1 - self.ids[is_visual]].to(embeddings))

    def attention_mask(self, like: Tensor, additive: bool) -> Tensor:
        """Return the mask that the LLM's attention takes.

        Args:
            like: Tensor with the dtype and device of an additive mask.
            additive: Whether the attention adds a [B, 1, S, S] mask to its scores: 0 where a token attends,
                the lowest number elsewhere. A mask of shape [B, S] is always boolean.
        """
        if self.mask.ndim == 2 or not additive:
            return self.mask
        return like.new_zeros(self.mask.shape).masked_fill(~self.mask, torch.finfo(like.dtype).min)


def pack(
    groups: Sequence[Sequence[Tokens]],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    packed_length: int | None = None,
) -> Packed:
    """Pack each group of sequences into one row.

    Args:
        groups: The sequences of each group.
        pad_id: Token id of the padding.
        side: Side of the padding; generation needs "left".
        packed_length: Put several groups into one row of at most this many tokens. A longer group has its
            own row.
    """
    columns = [_columns(group, number) for number, group in enumerate(groups)]
    rows = [[of_group] for of_group in columns]
    if packed_length is not None:
        rows = _bin_pack(columns, packed_length)
    length = max(sum(len(of_group.ids) for of_group in row) for row in rows)

    def padded(column: str, padding: int) -> Tensor:
        out = torch.full((len(rows), length), padding, dtype=torch.long)
        for i, row in enumerate(rows):
            values = torch.cat([getattr(of_group, column) for of_group in row])
            start = length - len(values) if side == "left" else 0
            out[i, start : start + len(values)] = values
        return out

    branches = padded("branches", -1)
    mask = branches >= 0
    if any(len(group) > 1 for group in groups) or len(rows) < len(groups):
        mask = _attention_mask(branches, padded("groups", -1))
    return Packed(
        padded("ids", pad_id), mask, padded("positions", 0), padded("labels", NOT_LEARNED), branches
    )


@dataclass(frozen=True, eq=False)
class _Columns:
    """The columns of `Packed` for one group without padding, and the number of the group."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    branches: Tensor
    groups: Tensor


def _columns(group: Sequence[Tokens], group_number: int) -> _Columns:
    """Return the columns of one group: the common prefix, then the rest of each sequence."""
    prefix = _prefix_length(group)
    first = group[0]
    ids, labels = [first.ids[:prefix]], [first.labels[:prefix]]
    positions, branches = [torch.arange(prefix)], [torch.zeros(prefix, dtype=torch.long)]
    for number, sequence in enumerate(group, start=1):
        ids.append(sequence.ids[prefix:])
        labels.append(sequence.labels[prefix:])
        positions.append(torch.arange(prefix, len(sequence.ids)))
        branches.append(torch.full((len(sequence.ids) - prefix,), number))
    groups = [torch.full_like(part, group_number) for part in ids]
    return _Columns(*map(torch.cat, (ids, labels, positions, branches, groups)))


def _bin_pack(groups: Sequence[_Columns], max_length: int) -> list[list[_Columns]]:
    """Distribute groups to few rows: the longest first, each into the first row with enough room."""
    rows: list[list[_Columns]] = []
    for group in sorted(groups, key=lambda group: -len(group.ids)):
        for row in rows:
            if sum(len(other.ids) for other in row) + len(group.ids) <= max_length:
                row.append(group)
                break
        else:
            rows.append([group])
    return rows


def _prefix_length(group: Sequence[Tokens]) -> int:
    """Return the number of tokens that all sequences of a group start with, before any answer."""
    if len(group) == 1:
        return 0
    shortest = min(len(sequence.ids) for sequence in group)
    rows = torch.stack([sequence.ids[:shortest] for sequence in group])
    learned = torch.stack([sequence.labels[:shortest] != NOT_LEARNED for sequence in group])
    differs = (rows != rows[:1]).any(dim=0) | learned.any(dim=0)
    if not differs.any():
        return shortest - 1
    first = int(differs.nonzero()[0])
    # The token before an answer predicts its first token, so every sequence needs its own copy.
    return max(first - 1, 0) if learned[:, first].any() else first


def _attention_mask(branches: Tensor, groups: Tensor) -> Tensor:
    """Return a causal mask [B, 1, S, S]: tokens attend to their branch and to the prefix of their group."""
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
    same_group = groups[:, :, None] == groups[:, None, :]
    mask = causal & visible & same_group & (branches[:, None, :] >= 0)
    return (mask | torch.eye(length, dtype=torch.bool))[:, None]  # padding attends to itself: no empty row
