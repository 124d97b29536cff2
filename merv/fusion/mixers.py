"""Mix: several aligned streams to one.

A weighting mixer reads every stream through a linear map (`reader`), turns what it reads
into weights that are convex over the encoders present at a cell (`score`), and the stream
of fused tokens is the weighted sum. Because reading is linear, a projector before it can be
folded in: see `merv.fusion.fusion`. The concatenating mixers have no weights.

A mixer is registered in the group `merv.mixers`, or named as `module:Class`; see docs/fusion.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from merv.errors import ShapeError

NEW_ENCODER_LOGIT = -4.0  # logit at which an encoder joins: a fiftieth of what another counts


class Mixer(nn.Module):
    """E streams [B, E, t, h, w, L] and their mask [B, E, t, h, w] → one sequence of tokens.

    width: L. encoders: E. Absent encoders, cells cropped away and padding are False in the
    mask, and may differ by sample. conditioned: whether it wants the question.

    A subclass writes `forward`, and `num_tokens` and `positions` where tokens are not one a cell. Options of
    its own follow `width` and `encoders` in its constructor; they come from `mixer_options`.
    """

    conditioned: bool = False
    # Parameters made of one block an encoder, by name: the axis, and what the block of one that joins is
    # filled with. A mixer that cannot take another encoder in sets it to None.
    per_encoder_parameters: Mapping[str, tuple[int, float]] | None = {}

    def __init__(self, width: int, encoders: int) -> None:
        super().__init__()
        self.width, self.encoders = width, encoders

    def add_encoder(self) -> None:
        """Grow by one encoder, behind the others, that hardly counts until it is trained.

        `gate` has nothing of an encoder's own, and `mean` counts it in full at once.
        """
        if self.per_encoder_parameters is None:
            raise ShapeError(f"{type(self).__name__} as it is built cannot take in another encoder.")
        for name, (axis, start) in self.per_encoder_parameters.items():
            owner, _, leaf = name.rpartition(".")
            blocks = self.get_parameter(name).data.chunk(self.encoders, dim=axis)
            grown = torch.cat([*blocks, torch.full_like(blocks[0], start)], dim=axis)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(grown))
        self.encoders += 1

    def encoder_mask(self, encoder: int) -> dict[str, Tensor]:
        """Which numbers of which parameters are one encoder's: name → mask of the parameter's shape."""
        masks = {}
        for name, (axis, _) in (self.per_encoder_parameters or {}).items():
            masks[name] = torch.zeros_like(self.get_parameter(name), dtype=torch.bool)
            masks[name].chunk(self.encoders, dim=axis)[encoder].fill_(True)
        return masks

    def num_tokens(self, cells: int) -> int:
        """How many tokens N a grid of so many cells becomes: by default one a cell."""
        return cells

    def positions(self, cells: Tensor) -> Tensor:
        """Where the tokens are, [B, N, 3], of the positions of the cells [B, t·h·w, 3]."""
        return cells

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [B, N, L], their mask [B, N], weights [B, E, t, h, w] or None.

        question: [B, L], the mean embedding of the question's tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class WeightingMixer(Mixer):
    """Base of the mixers that return weights; a subclass defines `reader` and `score`."""

    @property
    def foldable(self) -> bool:
        """Whether the weighted sum is all that it does: then projectors may be applied after it."""
        return type(self).forward is WeightingMixer.forward

    def reader(self) -> Tensor | None:
        """[R, L]: what the mixer reads of each stream; None: nothing."""
        return None

    def score(self, reads: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        """Logits that broadcast to [B, E, t, h, w], from reads [B, E, t, h, w, R]."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def weigh(self, reads: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        """Weights [B, E, t, h, w], summing to 1 over the encoders present at each cell."""
        logits = self.score(reads, mask, question).float().expand(mask.shape)
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=1) * mask  # all absent: zeros, and finite gradients

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        reader = self.reader()
        reads = None if reader is None else streams @ reader.T.to(streams.dtype)
        weights = self.weigh(reads, mask, question)
        tokens = einsum(weights.to(streams.dtype), streams, "b e t h w, b e t h w l -> b t h w l")
        return rearrange(tokens, "b t h w l -> b (t h w) l"), _any_present(mask), weights


class Mean(WeightingMixer):
    """Every encoder that is present counts the same."""

    def score(self, reads: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        return torch.zeros((), device=mask.device)


class Scalar(WeightingMixer):
    """One learned number per encoder, softmax over them (an ablation of the paper)."""

    per_encoder_parameters = {"logits": (0, NEW_ENCODER_LOGIT)}

    def __init__(self, width: int, encoders: int) -> None:
        super().__init__(width, encoders)
        self.logits = nn.Parameter(torch.zeros(encoders))

    def score(self, reads: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        return rearrange(self.logits, "e -> 1 e 1 1 1")


class Gate(WeightingMixer):
    """The released MERV's mixer: one softmax number per encoder and video.

    The release calls it cross attention: one learned query against the mean token x̄_e of
    each encoder, a_e = softmax_e((W_q Q + b_q)·(W_k x̄_e + b_k) / √hidden), and uses only
    the weights. b_k cancels in the softmax and the value and output maps get no gradient,
    so none of them is here. What is left is one vector u = W_kᵀ(W_q Q + b_q) / √hidden; it
    is trained in its factors, as released, because a single vector would be another path of
    the optimizer, and used as the one vector everywhere.

    Source: arXiv 2501.01426 §3.3; https://github.com/princetonvisualai/merv (MIT).
    """

    def __init__(self, width: int, encoders: int, hidden: int = 3072) -> None:
        super().__init__(width, encoders)
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, hidden)))
        self.to_query = nn.Linear(hidden, hidden)
        self.to_key = nn.Linear(width, hidden, bias=False)
        nn.init.xavier_uniform_(self.to_query.weight)
        nn.init.zeros_(self.to_query.bias)
        nn.init.xavier_uniform_(self.to_key.weight)

    def reader(self) -> Tensor:
        """u, [1, L]."""
        return self.to_query(self.query) @ self.to_key.weight / math.sqrt(self.query.shape[1])

    def score(self, reads: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        assert reads is not None
        real = mask[..., None].float()
        total = (reads.float() * real).sum(dim=(2, 3, 4), keepdim=True)
        return (total / real.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1))[..., 0]  # [B, E, 1, 1, 1]


class CrossAttention(WeightingMixer):
    """Weights per encoder and space-time cell, conditioned on the question if wanted.

    At every cell a query made of the mean of the streams there (and of the question) attends
    over the E streams of that cell: as many tokens as one stream, and an encoder can speak
    where and when it knows something. Queries and keys are normalized, so that the scale of
    features and LLM embeddings does not matter, and the query's gain starts at zero: step 0
    is the mean of the encoders. There is no position in it: permuting time permutes the
    weights.

    hidden: width of queries and keys. conditioned: use the question.
    """

    per_encoder_parameters = {"key_of_encoder": (0, 0.0), "share": (0, NEW_ENCODER_LOGIT)}

    def __init__(self, width: int, encoders: int, hidden: int = 128, conditioned: bool = False) -> None:
        super().__init__(width, encoders)
        self.to_query = nn.Linear(width, hidden, bias=False)
        self.to_key = nn.Linear(width, hidden, bias=False)
        self.key_of_encoder = nn.Parameter(torch.zeros(encoders, hidden))
        self.query_bias = nn.Parameter(torch.zeros(hidden))
        self.gain = nn.Parameter(torch.zeros(hidden))
        self.share = nn.Parameter(torch.zeros(encoders))  # what an encoder counts everywhere
        self.conditioned = conditioned
        self.from_question = nn.Linear(width, hidden, bias=False) if conditioned else None

    def reader(self) -> Tensor:
        return torch.cat([self.to_query.weight, self.to_key.weight])

    def score(self, reads: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        assert reads is not None
        queries, keys = reads.float().chunk(2, dim=-1)  # [B, E, t, h, w, hidden] each
        real = mask[..., None].to(queries.dtype)
        query = (queries * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)  # [B, t, h, w, hidden]
        query = _unit(query)
        if self.from_question is not None:
            query = query + self._ask(question, like=query)
        query = _unit(query + self.query_bias) * self.gain
        keys = _unit(_unit(keys) + rearrange(self.key_of_encoder, "e d -> e 1 1 1 d"))
        scores = einsum(query, keys, "b t h w d, b e t h w d -> b e t h w") / math.sqrt(keys.shape[-1])
        return scores + rearrange(self.share, "e -> e 1 1 1")

    def _ask(self, question: Tensor | None, like: Tensor) -> Tensor:
        if not isinstance(question, Tensor) or question.ndim != 2 or question.shape[1] != self.width:
            came = list(question.shape) if isinstance(question, Tensor) else question
            raise ShapeError(
                f"This mixer is conditioned on the question; pass question=[B, {self.width}], not {came}, "
                "or build it with conditioned=False."
            )
        assert self.from_question is not None
        asked = _unit(self.from_question(question.to(self.from_question.weight)).float())
        return rearrange(asked, "b d -> b 1 1 1 d").to(like.dtype)


class Concat(Mixer):
    """Streams one after the other in the sequence: E times the tokens (an ablation of the paper)."""

    def num_tokens(self, cells: int) -> int:
        return cells * self.encoders

    def positions(self, cells: Tensor) -> Tensor:
        return cells.repeat(1, self.encoders, 1)

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = rearrange(streams, "b e t h w l -> b (e t h w) l")
        return tokens, rearrange(mask, "b e t h w -> b (e t h w)"), None


class ConcatChannels(Mixer):
    """Channels side by side, then Linear(E·L → L) (an ablation of the paper); absent ones are zero.

    norm: LayerNorm before the linear map.
    """

    per_encoder_parameters: Mapping[str, tuple[int, float]] | None = {"linear.weight": (1, 0.0)}

    def __init__(self, width: int, encoders: int, norm: bool = False) -> None:
        super().__init__(width, encoders)
        if norm:
            # A LayerNorm over all channels would change those of the encoders that are there.
            self.per_encoder_parameters = None
        self.norm = nn.LayerNorm(encoders * width) if norm else nn.Identity()
        self.linear = nn.Linear(encoders * width, width)

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        side_by_side = rearrange(streams * mask[..., None], "b e t h w l -> b (t h w) (e l)")
        return self.linear(self.norm(side_by_side)), _any_present(mask), None


def cell_positions(times_s: Tensor, h: int, w: int) -> Tensor:
    """(time in seconds, row, column) of each cell in token order: [B, t] → [B, t·h·w, 3]."""
    batch, t = times_s.shape
    rows = torch.arange(h, device=times_s.device, dtype=times_s.dtype)
    columns = torch.arange(w, device=times_s.device, dtype=times_s.dtype)
    return torch.stack(
        [
            repeat(times_s, "b t -> b (t h w)", h=h, w=w),
            repeat(rows, "h -> b (t h w)", b=batch, t=t, w=w),
            repeat(columns, "w -> b (t h w)", b=batch, t=t, h=h),
        ],
        dim=2,
    )


def _any_present(mask: Tensor) -> Tensor:
    """[B, E, t, h, w] → [B, N]: cells that at least one encoder sees."""
    return rearrange(mask.any(dim=1), "b t h w -> b (t h w)")


def _unit(x: Tensor) -> Tensor:
    """Root mean square 1 over the last axis."""
    return rms_norm(x, (x.shape[-1],), eps=1e-6)
