"""Fuse: one projector per encoder and a mixer, in a plain form and a folded one.

Plain (training, the released order): project every stream to the LLM's width, then mix.
Folded (inference): read the weights from the features before any projection, then one
matrix product over [a_1 p_1 | … | a_E p_E] with the stacked projections plus Σ a_e b_e. No
[B, E, N, L] tensor is made, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from merv.errors import ShapeError
from merv.fusion.mixers import Concat, Mixer, WeightingMixer, cell_positions, create_mixer
from merv.types import Fused, Grid, is_count


class Projector(nn.Module):
    """Features of one encoder to the LLM's width: [..., D] → [..., L].

    kind: `linear` (the released one) or `mlp` (Linear, GELU, Linear).
    norm: first bring each feature vector to mean 0 and variance 1. The release does not;
        encoders differ in scale by orders of magnitude, and without it the largest one
        decides what is learned first.
    """

    def __init__(
        self, features: int, width: int, kind: Literal["linear", "mlp"] = "linear", norm: bool = True
    ) -> None:
        super().__init__()
        self.features = features
        if kind not in ("linear", "mlp"):
            raise ShapeError(f"Unknown projector {kind!r}: 'linear' or 'mlp'.")
        self.norm: nn.Module = nn.LayerNorm(features, elementwise_affine=False) if norm else nn.Identity()
        self.hidden: nn.Module = nn.Identity()
        if kind == "mlp":
            self.hidden = nn.Sequential(nn.Linear(features, width), nn.GELU())
        self.linear = nn.Linear(width if kind == "mlp" else features, width)

    def before(self, features: Tensor) -> Tensor:
        """Everything but the last Linear, which the folded form applies after mixing."""
        return self.hidden(self.norm(features))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.before(features))


class Fusion(nn.Module):
    """Projectors and mixer: aligned grids by name → tokens for the LLM.

    widths: encoder name → its width D, in the order of the streams.
    width: L. mixer: a name of `merv.fusion.mixers.MIXERS` or a Mixer; mixer_options go to its constructor.
    norm: normalise features before they are projected, and tokens after they are mixed, to the root
        mean square `token_rms`. Left to themselves, tokens soon are many times as large as the
        embeddings of the language model, whose layers then hardly change them. The release does neither.
    folded: True, False, or None: folded outside of training wherever the mixer allows it.

    >>> fusion = Fusion({"a": 32, "b": 48}, width=64, mixer="gate")
    >>> fusion.projectors["b"](torch.zeros(5, 48)).shape
    torch.Size([5, 64])

    Source: arXiv 2501.01426 §3; the folded form follows from the linearity of the projectors.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        width: int,
        mixer: str | Mixer = "cross_attention",
        *,
        projector: Literal["linear", "mlp"] = "linear",
        norm: bool = True,
        mixer_options: Mapping[str, Any] | None = None,
        folded: bool | None = None,
    ) -> None:
        super().__init__()
        if not is_count(width):
            raise ShapeError(f"The width of the tokens is a whole number of at least 1; got {width!r}.")
        self.names, self.width, self.folded = list(widths), width, folded
        self.projector, self.norm = projector, norm
        self.projectors = nn.ModuleDict(
            {name: Projector(features, width, projector, norm) for name, features in widths.items()}
        )
        self.token_rms: Tensor | None
        self.register_buffer("token_rms", torch.ones(()) if norm else None)
        self.mixer = (
            create_mixer(mixer, width, len(self.names), **(mixer_options or {}))
            if isinstance(mixer, str)
            else mixer
        )
        if (self.mixer.width, self.mixer.encoders) != (width, len(self.names)):
            raise ShapeError(
                f"The mixer is built for {self.mixer.encoders} encoders of width {self.mixer.width}; "
                f"this fusion has {len(self.names)} of width {width}."
            )

    def forward(self, grids: Mapping[str, Grid], question: Tensor | None = None) -> Fused:
        """Aligned grids [B, t, h, w, D_e] → Fused; an encoder that is left out counts as absent.

        question: [B, L], for mixers that are conditioned on it.
        Raises ShapeError for unknown names and for grids that are not aligned.
        """
        self._check(grids)
        if question is not None and not self.mixer.conditioned:
            raise ShapeError(
                "This mixer is not conditioned on the question and would ignore it. `cross_attention` with "
                "mixer_options={'conditioned': True} is."
            )
        device = self._in_order()[0].linear.weight.device
        grids = {name: grid.to(device) for name, grid in grids.items()}
        mask = self._mask(grids)  # [B, E, t, h, w]
        features = self._features(grids, mask.shape)
        mix = self._mix_folded if self._is_folded() else self._mix_plain
        tokens, real, weights = mix(features, mask, question)
        if self.token_rms is not None:
            tokens = self.token_rms.to(tokens) * rms_norm(tokens, (self.width,), eps=1e-6)
        grid = next(iter(grids.values()))
        positions = cell_positions(grid.times_s, *grid.shape[1:])
        if isinstance(self.mixer, Concat):
            positions = positions.repeat(1, len(self.names), 1)
        return Fused(tokens, positions, real, weights)

    def nothing(self) -> Tensor:
        """Tokens [N, L] of one cell that no encoder sees: for steps without a video, times 0."""
        grids = {
            name: Grid(
                torch.zeros(1, 1, 1, 1, projector.features),
                torch.zeros(1, 1, dtype=torch.float64),
                torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
                torch.zeros(1, 1, 1, 1, dtype=torch.bool),
            )
            for name, projector in zip(self.names, self._in_order(), strict=True)
        }
        question = torch.zeros(1, self.width) if self.mixer.conditioned else None
        return self(grids, question).tokens[0]

    def scale_to(self, rms: float) -> None:
        """Make tokens of root mean square `rms`, that of the LLM's own embeddings, from the start.

        With `norm` they keep it whatever is learned. Without, it is where they start, as far as
        features are of variance 1.
        """
        if self.token_rms is not None:
            self.token_rms.fill_(rms)
        for projector in self._in_order():
            _start_at(projector, rms)

    def join(self, name: str, features: int) -> None:
        """One encoder more, behind the others: a fresh projector, and a mixer that hardly minds it yet.

        Raises ShapeError where the mixer cannot grow.
        """
        some = self._in_order()[0].linear.weight
        fresh = Projector(features, self.width, self.projector, self.norm).to(some)
        if self.token_rms is not None:
            _start_at(fresh, float(self.token_rms))
        self.mixer.join()
        self.projectors[name] = fresh
        self.names.append(name)

    # The two forms ------------------------------------------------------------------------

    def _is_folded(self) -> bool:
        can = isinstance(self.mixer, WeightingMixer)
        return can and (not self.training if self.folded is None else self.folded)

    def _mix_plain(
        self, features: Sequence[Tensor], mask: Tensor, question: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Project, then mix: the released order."""
        streams = [project(f) for project, f in zip(self._in_order(), features, strict=True)]
        return self.mixer(torch.stack(streams, dim=1), mask, question)

    def _mix_folded(
        self, features: Sequence[Tensor], mask: Tensor, question: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the weights through the projectors, mix the features, project once."""
        assert isinstance(self.mixer, WeightingMixer)
        features = [p.before(f) for p, f in zip(self._in_order(), features, strict=True)]
        linears = [p.linear for p in self._in_order()]
        reader = self.mixer.reader()
        reads = None
        if reader is not None:
            reads = torch.stack(
                [
                    f @ (reader @ linear.weight).T + reader @ linear.bias
                    for f, linear in zip(features, linears, strict=True)
                ],
                dim=1,
            )  # [B, E, t, h, w, R]
        weights = self.mixer.weigh(reads, mask, question)
        shares = weights.to(features[0].dtype)  # [B, E, t, h, w]
        weighted = torch.cat([f * shares[:, e, ..., None] for e, f in enumerate(features)], dim=-1)
        stacked = torch.cat([linear.weight for linear in linears], dim=1)  # [L, ΣD]
        bias = einsum(shares, torch.stack([linear.bias for linear in linears]), "b e t h w, e l -> b t h w l")
        tokens = weighted @ stacked.T + bias
        real = rearrange(mask.any(dim=1), "b t h w -> b (t h w)")
        return rearrange(tokens, "b t h w l -> b (t h w) l"), real, weights

    # Checks and shapes --------------------------------------------------------------------

    def _check(self, grids: Mapping[str, Grid]) -> None:
        unknown = [name for name in grids if name not in self.names]
        if unknown or not grids:
            raise ShapeError(
                f"This fusion knows the encoders {', '.join(self.names)}; got features of "
                f"{', '.join(grids) or 'none'}."
            )
        shapes = {name: tuple(grid.mask.shape) for name, grid in grids.items()}
        if len(set(shapes.values())) > 1:
            raise ShapeError(f"Grids must be aligned before they are fused; got [B, t, h, w] {shapes}.")

    def _mask(self, grids: Mapping[str, Grid]) -> Tensor:
        some = next(iter(grids.values())).mask
        absent = torch.zeros_like(some)
        return torch.stack([grids[n].mask if n in grids else absent for n in self.names], dim=1)

    def _features(self, grids: Mapping[str, Grid], shape: torch.Size) -> list[Tensor]:
        """Of each stream [B, t, h, w, D] in the projector's dtype; zeros for an absent encoder."""
        features = []
        for name, projector in zip(self.names, self._in_order(), strict=True):
            weight = projector.linear.weight
            absent = (shape[0], *shape[2:], projector.features)
            features.append(grids[name].values.to(weight) if name in grids else weight.new_zeros(absent))
        return features

    def _in_order(self) -> list[Projector]:
        """The projectors, one a stream."""
        return cast(list[Projector], list(self.projectors.values()))


def _start_at(projector: Projector, rms: float) -> None:
    """Random weights that turn features of variance 1 into tokens of that root mean square."""
    nn.init.normal_(projector.linear.weight, std=rms / projector.linear.in_features**0.5)
    nn.init.zeros_(projector.linear.bias)
