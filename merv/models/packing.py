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
    conversation: int = 0


def tokens_of(prompt: Prompt, ranges: Iterator[range]) -> Tokens:
    """Return the ids and labels of a prompt; `ranges` gives the visual tokens of its videos in order."""
    ids: list[int] = []
    labels: list[int] = []
    for item, is_learned in zip(prompt.items, prompt.learned, strict=True):
        new = [-1 - i for i in next(ranges)] if isinstance(item, Visual) else [item]
        ids += new
        labels += new if is_learned else [NOT_LEARNED] * len(new)
    return Tokens(torch.tensor(ids), torch.tensor(labels), prompt.conversation)


@dataclass(frozen=True, eq=False)
class Packed:
    """The input of the LLM.

    Attributes:
        ids: Token ids, shape [B, S]; −1−i stands for visual token i.
        mask: True for a real token, shape [B, S]; or True where a token (third axis) attends to another one,
            shape [B, 1, S, S].
        positions: Position ids, shape [B, S].
        labels: Tokens of the answers, NOT_LEARNED elsewhere, shape [B, S].
        conversations: Index in the batch of the token's conversation; in a common prefix, of the first one
            that shares it; −1 in the padding. Shape [B, S].
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    conversations: Tensor

    def to(self, device: torch.device) -> Packed:
        """Return the same on another device."""
        return Packed(*(tensor.to(device) for tensor in vars(self).values()))

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
    joined = [torch.cat(row, dim=1) for row in rows]
    length = max(row.shape[1] for row in joined)
    padding = torch.tensor([pad_id, NOT_LEARNED, 0, -1, -1, -1])
    batch = padding[:, None, None].repeat(1, len(rows), length)  # [6, B, S]
    for i, row in enumerate(joined):
        start = length - row.shape[1] if side == "left" else 0
        batch[:, i, start : start + row.shape[1]] = row
    ids, labels, positions, conversations, branches, group_numbers = batch
    mask = branches >= 0
    if any(len(group) > 1 for group in groups) or len(rows) < len(groups):
        mask = _attention_mask(branches, group_numbers)
    return Packed(ids, mask, positions, labels, conversations)


def _columns(group: Sequence[Tokens], group_number: int) -> Tensor:
    """Return the tokens of one group, [6, n]: the common prefix, then the rest of each sequence.

    The rows are ids, labels, positions, conversation, branch (0 in the prefix, n in the n-th sequence) and
    group.
    """
    prefix = _prefix_length(group)
    parts = [(group[0], slice(prefix), 0)]
    parts += [(sequence, slice(prefix, None), branch) for branch, sequence in enumerate(group, start=1)]
    columns = []
    for sequence, part, branch in parts:
        ids, labels, positions = (
            sequence.ids[part],
            sequence.labels[part],
            torch.arange(len(sequence.ids))[part],
        )
        constants = [torch.full_like(ids, n) for n in (sequence.conversation, branch, group_number)]
        columns.append(torch.stack([ids, labels, positions, *constants]))
    return torch.cat(columns, dim=1)


def _bin_pack(groups: Sequence[Tensor], max_length: int) -> list[list[Tensor]]:
    """Distribute groups to few rows: the longest first, each into the first row with enough room."""
    rows: list[list[Tensor]] = []
    for group in sorted(groups, key=lambda group: -group.shape[1]):
        for row in rows:
            if sum(other.shape[1] for other in row) + group.shape[1] <= max_length:
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
