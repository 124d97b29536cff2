"""Mixers: combine the aligned streams of several encoders into one sequence of tokens.

A weighting mixer multiplies every stream by a matrix (`score_weight`) and computes logits from the products
(`score`). A softmax over the encoders that are present at a cell gives the weights, and the tokens are the
weighted sum of the streams. Because the product is linear, a linear projector can be applied after mixing
instead of before; see `merv.fusion.fusion`. The concatenating mixers have no weights.

A mixer is registered in the entry point group `merv.mixers` or named as `module:Class`; see docs/fusion.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from merv.errors import ShapeError

NEW_ENCODER_LOGIT = -4.0  # about a fiftieth of the weight of an encoder with logit 0


class Mixer(nn.Module):
    """Base class of mixers: combine E streams [B, E, t, h, w, L] into one sequence of tokens [B, N, L].

    A subclass defines `forward`. If it does not make one token per cell, it also defines `num_tokens` and
    `positions`. Further constructor arguments follow `output_dim` and `num_encoders`; they are passed as
    `mixer_options`.

    Args:
        output_dim: Embedding dimension of the LLM (L).
        num_encoders: Number of encoders (E).

    Attributes:
        conditioned: Whether the mixer takes the embedding of the question.
        per_encoder_parameters: Parameters that consist of one block per encoder: name → (axis of the blocks,
            initial value of the block of an added encoder). None if no encoder can be added.

    Example:
        >>> class First(Mixer):
        ...     def forward(self, streams, mask, question=None):
        ...         return streams[:, 0].flatten(1, 3), mask[:, 0].flatten(1), None
        >>> mask = torch.ones(1, 2, 4, 3, 3, dtype=torch.bool)
        >>> First(output_dim=64, num_encoders=2)(torch.zeros(1, 2, 4, 3, 3, 64), mask)[0].shape
        torch.Size([1, 36, 64])
    """

    conditioned: bool = False
    per_encoder_parameters: Mapping[str, tuple[int, float]] | None = {}

    def __init__(self, output_dim: int, num_encoders: int) -> None:
        super().__init__()
        self.output_dim, self.num_encoders = output_dim, num_encoders

    def add_encoder(self) -> None:
        """Add an encoder after the others.

        With `cross_attention` and `scalar` its logit starts at −4: about a fiftieth of the weight of an
        encoder whose logit is 0. With `concat_channels` it starts at zero. `gate` and `mean` have no
        parameters per encoder, so the new encoder counts fully at once; `concat` adds its tokens at once.

        Raises:
            ShapeError: No encoder can be added to this mixer.
        """
        if self.per_encoder_parameters is None:
            raise ShapeError(
                f"No encoder can be added to this {type(self).__name__}: its per_encoder_parameters is None. "
                "Train a new fusion with all encoders."
            )
        for name, (axis, start) in self.per_encoder_parameters.items():
            owner, _, leaf = name.rpartition(".")
            blocks = self.get_parameter(name).data.chunk(self.num_encoders, dim=axis)
            extended = torch.cat([*blocks, torch.full_like(blocks[0], start)], dim=axis)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(extended))
        self.num_encoders += 1

    def encoder_mask(self, encoder: int) -> dict[str, Tensor]:
        """Return the mask of one encoder's block in each of the `per_encoder_parameters`, by name."""
        masks = {}
        for name, (axis, _) in (self.per_encoder_parameters or {}).items():
            masks[name] = torch.zeros_like(self.get_parameter(name), dtype=torch.bool)
            masks[name].chunk(self.num_encoders, dim=axis)[encoder].fill_(True)
        return masks

    def num_tokens(self, cells: int) -> int:
        """Return the number of tokens N for a grid of `cells` cells; one per cell by default."""
        return cells

    def positions(self, cells: Tensor) -> Tensor:
        """Return the positions of the tokens [B, N, 3], given those of the cells [B, t·h·w, 3].

        A position is (time in seconds, row, column).
        """
        return cells

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix the streams.

        Args:
            streams: Projected features, shape [B, E, t, h, w, L]; arbitrary where `mask` is False.
            mask: True where the encoder sees the cell, shape [B, E, t, h, w]. False for absent encoders, for
                cells outside a crop and for padding. It can differ between the clips of a batch.
            question: Mean embedding of the question's tokens, shape [B, L]; only for mixers that are
                `conditioned`.

        Returns:
            The tokens [B, N, L]; their mask [B, N], True for a real token; and the weights of the encoders
            [B, E, t, h, w], or None if the mixer has none.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class WeightingMixer(Mixer):
    """Base class of mixers whose tokens are a weighted sum; a subclass defines `score`.

    Example:
        >>> class OnlyFirst(WeightingMixer):
        ...     def score(self, score_inputs, mask, question=None):
        ...         logits = torch.full((self.num_encoders,), -1e9)
        ...         logits[0] = 0.0
        ...         return logits[:, None, None, None]
        >>> mask = torch.ones(1, 2, 1, 1, 1, dtype=torch.bool)
        >>> OnlyFirst(output_dim=64, num_encoders=2)(torch.zeros(1, 2, 1, 1, 1, 64), mask)[2].flatten()
        tensor([1., 0.])
    """

    @property
    def foldable(self) -> bool:
        """Whether the tokens are just the weighted sum, so that projectors can be applied after mixing."""
        return type(self).forward is WeightingMixer.forward

    def score_weight(self) -> Tensor | None:
        """Return the matrix [R, L] by which each stream is multiplied for `score`, or None."""
        return None

    def score(self, score_inputs: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        """Return logits that broadcast to [B, E, t, h, w].

        Args:
            score_inputs: Each stream multiplied by `score_weight`, shape [B, E, t, h, w, R]; None without a
                `score_weight`.
            mask: See `forward`.
            question: See `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def weigh(self, score_inputs: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        """Return weights [B, E, t, h, w] that sum to 1 over the encoders that are present at each cell."""
        logits = self.score(score_inputs, mask, question).float().expand(mask.shape)
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=1) * mask  # zeros and finite gradients if all encoders are absent

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        matrix = self.score_weight()
        score_inputs = None if matrix is None else streams @ matrix.T.to(streams.dtype)
        weights = self.weigh(score_inputs, mask, question)
        tokens = einsum(weights.to(streams.dtype), streams, "b e t h w, b e t h w l -> b t h w l")
        return rearrange(tokens, "b t h w l -> b (t h w) l"), any_present(mask), weights


class Mean(WeightingMixer):
    """The mean of the encoders that are present."""

    def score(self, score_inputs: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        return torch.zeros((), device=mask.device)


class Scalar(WeightingMixer):
    """Softmax over one learned logit per encoder (an ablation in the paper)."""

    per_encoder_parameters = {"logits": (0, NEW_ENCODER_LOGIT)}

    def __init__(self, output_dim: int, num_encoders: int) -> None:
        super().__init__(output_dim, num_encoders)
        self.logits = nn.Parameter(torch.zeros(num_encoders))

    def score(self, score_inputs: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        return rearrange(self.logits, "e -> 1 e 1 1 1")


class Gate(WeightingMixer):
    """The mixer of the released MERV: one weight per encoder and video.

    The released MERV calls it cross attention. One learned query Q attends to the mean token x̄_e of each
    encoder, and only the attention weights are used:

        a_e = softmax_e((W_q Q + b_q)·(W_k x̄_e + b_k) / √hidden)

    b_k cancels in the softmax, and the value and output projections get no gradient, so this class has none
    of them. The rest equals a product with one vector, u = W_kᵀ(W_q Q + b_q) / √hidden. The factors of u are
    trained, as in the released MERV, because training u itself would take other optimizer steps.

    Args:
        output_dim: Embedding dimension of the LLM (L).
        num_encoders: Number of encoders (E).
        hidden: Dimension of query and keys.

    Source: arXiv 2501.01426 §3.3; https://github.com/princetonvisualai/merv (MIT).
    """

    def __init__(self, output_dim: int, num_encoders: int, hidden: int = 3072) -> None:
        super().__init__(output_dim, num_encoders)
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, hidden)))
        self.to_query = nn.Linear(hidden, hidden)
        self.to_key = nn.Linear(output_dim, hidden, bias=False)
        nn.init.xavier_uniform_(self.to_query.weight)
        nn.init.zeros_(self.to_query.bias)
        nn.init.xavier_uniform_(self.to_key.weight)

    def score_weight(self) -> Tensor:
        """Return the vector u, shape [1, L]."""
        return self.to_query(self.query) @ self.to_key.weight / math.sqrt(self.query.shape[1])

    def score(self, score_inputs: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        assert score_inputs is not None
        real = mask[..., None].float()
        total = (score_inputs.float() * real).sum(dim=(2, 3, 4), keepdim=True)
        return (total / real.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1))[..., 0]  # [B, E, 1, 1, 1]


class CrossAttention(WeightingMixer):
    """One weight per encoder and space-time cell, optionally conditioned on the question.

    It is not the mixer that the released MERV calls cross attention; that one is `Gate`.

    At each cell, a query attends to the E streams of that cell. It is computed from the mean of these streams
    and, if `conditioned`, from the question. Queries and keys are normalized, so the scale of features and
    LLM embeddings does not matter. The gain of the query is initialized with zero, so the initial tokens are
    the mean of the encoders. There is no position embedding: permuting time permutes the weights.

    Args:
        output_dim: Embedding dimension of the LLM (L).
        num_encoders: Number of encoders (E).
        hidden: Dimension of queries and keys.
        conditioned: Use the question.
    """

    per_encoder_parameters = {"key_of_encoder": (0, 0.0), "share": (0, NEW_ENCODER_LOGIT)}

    def __init__(
        self, output_dim: int, num_encoders: int, hidden: int = 128, conditioned: bool = False
    ) -> None:
        super().__init__(output_dim, num_encoders)
        self.to_query = nn.Linear(output_dim, hidden, bias=False)
        self.to_key = nn.Linear(output_dim, hidden, bias=False)
        self.key_of_encoder = nn.Parameter(torch.zeros(num_encoders, hidden))
        self.query_bias = nn.Parameter(torch.zeros(hidden))
        self.gain = nn.Parameter(torch.zeros(hidden))
        self.share = nn.Parameter(torch.zeros(num_encoders))  # logit of each encoder, added at every cell
        self.conditioned = conditioned
        self.from_question = nn.Linear(output_dim, hidden, bias=False) if conditioned else None

    def score_weight(self) -> Tensor:
        return torch.cat([self.to_query.weight, self.to_key.weight])

    def score(self, score_inputs: Tensor | None, mask: Tensor, question: Tensor | None = None) -> Tensor:
        assert score_inputs is not None
        queries, keys = score_inputs.float().chunk(2, dim=-1)  # [B, E, t, h, w, hidden] each
        real = mask[..., None].to(queries.dtype)
        query = (queries * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)  # [B, t, h, w, hidden]
        query = _unit(query)
        if self.from_question is not None:
            query = query + self._question_query(question, like=query)
        query = _unit(query + self.query_bias) * self.gain
        keys = _unit(_unit(keys) + rearrange(self.key_of_encoder, "e d -> e 1 1 1 d"))
        scores = einsum(query, keys, "b t h w d, b e t h w d -> b e t h w") / math.sqrt(keys.shape[-1])
        return scores + rearrange(self.share, "e -> e 1 1 1")

    def _question_query(self, question: Tensor | None, like: Tensor) -> Tensor:
        """Return the part of the query that comes from the question, shape [B, 1, 1, 1, hidden]."""
        if not isinstance(question, Tensor) or question.ndim != 2 or question.shape[1] != self.output_dim:
            got = list(question.shape) if isinstance(question, Tensor) else repr(question)
            raise ShapeError(
                f"Expected question= of shape [B, {self.output_dim}], the mean embedding of the question's "
                f"tokens; got {got}. To mix without a question, create the mixer with conditioned=False."
            )
        assert self.from_question is not None
        query = _unit(self.from_question(question.to(self.from_question.weight)).float())
        return rearrange(query, "b d -> b 1 1 1 d").to(like.dtype)


class Concat(Mixer):
    """Concatenate the streams along the sequence: E tokens per cell (an ablation in the paper)."""

    def num_tokens(self, cells: int) -> int:
        return cells * self.num_encoders

    def positions(self, cells: Tensor) -> Tensor:
        return cells.repeat(1, self.num_encoders, 1)

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = rearrange(streams, "b e t h w l -> b (e t h w) l")
        return tokens, rearrange(mask, "b e t h w -> b (e t h w)"), None


class ConcatChannels(Mixer):
    """Concatenate the channels of the streams, then Linear(E·L → L) (an ablation in the paper).

    The channels of absent encoders are zero.

    Args:
        output_dim: Embedding dimension of the LLM (L).
        num_encoders: Number of encoders (E).
        norm: Apply a LayerNorm before the Linear.
    """

    per_encoder_parameters: Mapping[str, tuple[int, float]] | None = {"linear.weight": (1, 0.0)}

    def __init__(self, output_dim: int, num_encoders: int, norm: bool = False) -> None:
        super().__init__(output_dim, num_encoders)
        if norm:
            # With an added encoder, a LayerNorm over all channels would change those of the other encoders.
            self.per_encoder_parameters = None
        self.norm = nn.LayerNorm(num_encoders * output_dim) if norm else nn.Identity()
        self.linear = nn.Linear(num_encoders * output_dim, output_dim)

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        channels = rearrange(streams * mask[..., None], "b e t h w l -> b (t h w) (e l)")
        return self.linear(self.norm(channels)), any_present(mask), None


def cell_positions(times_s: Tensor, h: int, w: int) -> Tensor:
    """Return (time in seconds, row, column) of each cell in token order: [B, t] → [B, t·h·w, 3]."""
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


def any_present(mask: Tensor) -> Tensor:
    """Return the mask of cells that at least one encoder sees: [B, E, t, h, w] → [B, N]."""
    return rearrange(mask.any(dim=1), "b t h w -> b (t h w)")


def _unit(x: Tensor) -> Tensor:
    """Scale to root mean square 1 over the last axis."""
    return rms_norm(x, (x.shape[-1],), eps=1e-6)
