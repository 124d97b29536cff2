"""Fuse: one projector per encoder and a mixer, in a plain form and a folded one.

Plain (training, the released order): project every stream to the LLM's width, then mix.
Folded (inference): read the weights from the features before any projection, then one
matrix product over [a_1 p_1 | … | a_E p_E] with the stacked projections plus Σ a_e b_e. No
[B, E, N, L] tensor is made, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from merv.errors import BrokenPlugin, CheckpointError, ShapeError
from merv.fusion.mixers import Mixer, WeightingMixer, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import create_mixer, create_projector
from merv.types import Fused, Grid, is_count
from merv.utils.plugins import class_path, is_importable
from merv.utils.torch_modules import class_of, device_and_dtype, first_unlike, without_weights

NAMED_ONLY = "Only what is named when it is made is saved: mixer=, projector= and their options."


class Fusion(nn.Module):
    """Projectors and mixer: aligned grids by name → tokens for the LLM.

    embed_dims: encoder name → its D, in the order of the streams.
    output_dim: L.
    mixer, projector: names (`merv plugins mixers` lists them), `module:Class`, or subclasses of `Mixer` and
        `Projector`; mixer_options, projector_options go to their constructors. A mixer may also be made
        already; such a fusion cannot be saved, because its options are not known.
    norm: normalize features before they are projected, and tokens after they are mixed, to the root
        mean square `token_rms`. Left to themselves, tokens soon are many times as large as the
        embeddings of the language model, whose layers then hardly change them. The release does neither.
    folded: True, False, or None: folded outside of training wherever the mixer allows it.

    >>> fusion = Fusion({"a": 32, "b": 48}, output_dim=64, mixer="gate")
    >>> fusion.projectors["b"](torch.zeros(5, 48)).shape
    torch.Size([5, 64])

    Source: arXiv 2501.01426 §3; the folded form follows from the linearity of the projectors.
    """

    def __init__(
        self,
        embed_dims: Mapping[str, int],
        output_dim: int,
        mixer: str | type[Mixer] | Mixer = "cross_attention",
        *,
        projector: str | type[Projector] = "linear",
        norm: bool = True,
        mixer_options: Mapping[str, Any] | None = None,
        projector_options: Mapping[str, Any] | None = None,
        folded: bool | None = None,
    ) -> None:
        super().__init__()
        if not is_count(output_dim):
            raise ShapeError(f"output_dim is a whole number of at least 1; got {output_dim!r}.")
        self.names, self.output_dim, self.folded = list(embed_dims), int(output_dim), folded
        self.norm = norm
        self.mixer_options, self.projector_options = dict(mixer_options or {}), dict(projector_options or {})
        self.projector = projector
        self.projectors = nn.ModuleDict(
            {name: self._new_projector(features) for name, features in embed_dims.items()}
        )
        self.token_rms: Tensor | None
        self.register_buffer("token_rms", torch.ones(()) if norm else None)
        self.mixer = (
            mixer
            if isinstance(mixer, Mixer)
            else create_mixer(mixer, self.output_dim, len(self.names), **self.mixer_options)
        )
        if (self.mixer.width, self.mixer.encoders) != (self.output_dim, len(self.names)):
            raise ShapeError(
                f"The mixer is built for {self.mixer.encoders} encoders of width {self.mixer.width}; "
                f"this fusion has {len(self.names)} of width {self.output_dim}."
            )

        self._built = [None if isinstance(mixer, Mixer) else self.mixer, *self.projectors.values()]

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
        device, _ = device_and_dtype(self)
        grids = {name: grid.to(device) for name, grid in grids.items()}
        mask = self._mask(grids)  # [B, E, t, h, w]
        features = self._features(grids, mask.shape)
        mix = self._mix_folded if self._is_folded() else self._mix_plain
        tokens, real, weights = mix(features, mask, question)
        if self.token_rms is not None:
            tokens = self.token_rms.to(tokens) * rms_norm(tokens, (self.output_dim,), eps=1e-6)
        grid = next(iter(grids.values()))
        positions = self.mixer.positions(cell_positions(grid.times_s, *grid.shape[1:]))
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
        question = torch.zeros(1, self.output_dim) if self.mixer.conditioned else None
        return self(grids, question).tokens[0]

    def scale_to(self, rms: float) -> None:
        """Make tokens of root mean square `rms`, that of the LLM's own embeddings, from the start.

        With `norm` they keep it whatever is learned. Without, it is where they start, as far as
        features are of variance 1.
        """
        if self.token_rms is not None:
            self.token_rms.fill_(rms)
        for projector in self._in_order():
            projector.scale_to(rms)

    def add_encoder(self, name: str, features: int) -> None:
        """One encoder more, behind the others: a fresh projector, and a mixer that hardly minds it yet.

        Raises ShapeError where the mixer cannot grow.
        """
        device, dtype = device_and_dtype(self)
        fresh = self._new_projector(features).to(device, dtype)
        if self.token_rms is not None:
            fresh.scale_to(float(self.token_rms))
        self.mixer.add_encoder()
        self.projectors[name] = fresh
        self._built.append(fresh)
        self.names.append(name)

    def config(self) -> dict[str, Any]:
        """What its constructor needs, besides the widths of the encoders, to make this again; JSON.

        Raises CheckpointError where that would make another one: parts that were put in by hand are lost.
        """
        own = [self.mixer, *self.projectors.values()]
        if len(own) != len(self._built) or any(a is not b for a, b in zip(own, self._built, strict=True)):
            raise CheckpointError(f"A mixer or projector of this fusion was put in by hand. {NAMED_ONLY}")
        mixer, projector = class_of(self.mixer), class_of(self._in_order()[0])
        for one in (mixer, projector):
            if not is_importable(one):
                raise CheckpointError(
                    f"{class_path(one)} could not be found again: define the class at the top of a module."
                )
        options: dict[str, Any] = {
            "output_dim": self.output_dim,
            "mixer": class_path(mixer),
            "mixer_options": self.mixer_options,
            "projector": class_path(projector),
            "projector_options": self.projector_options,
            "norm": self.norm,
        }
        widths = {name: p.features for name, p in zip(self.names, self._in_order(), strict=True)}
        alike = without_weights(lambda: Fusion(widths, **options), BrokenPlugin)
        if differs := first_unlike(self, alike):
            raise CheckpointError(
                f"This fusion would be another one when it is loaded: {differs}. {NAMED_ONLY}"
            )
        return options

    # The two forms ------------------------------------------------------------------------

    def _is_folded(self) -> bool:
        can = isinstance(self.mixer, WeightingMixer) and self.mixer.foldable
        can = can and all(projector.foldable for projector in self._in_order())
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
        shapes = {name: grid.mask.shape for name, grid in grids.items()}
        first = next(iter(shapes.values()))
        if any(shape != first for shape in shapes.values()):  # no set: sizes of an export do not hash
            raise ShapeError(
                f"Grids must be aligned before they are fused; got [B, t, h, w] "
                f"{ {name: tuple(shape) for name, shape in shapes.items()} }."
            )

    def _mask(self, grids: Mapping[str, Grid]) -> Tensor:
        some = next(iter(grids.values())).mask
        absent = torch.zeros_like(some)
        return torch.stack([grids[n].mask if n in grids else absent for n in self.names], dim=1)

    def _features(self, grids: Mapping[str, Grid], shape: torch.Size) -> list[Tensor]:
        """Of each stream [B, t, h, w, D] in the projector's dtype; zeros for an absent encoder."""
        device, _ = device_and_dtype(self)
        features = []
        for name, projector in zip(self.names, self._in_order(), strict=True):
            dtype = device_and_dtype(projector)[1]
            absent = (shape[0], *shape[2:], projector.features)
            features.append(
                grids[name].values.to(device, dtype)
                if name in grids
                else torch.zeros(absent, device=device, dtype=dtype)
            )
        return features

    def _new_projector(self, features: int) -> Projector:
        options = {"norm": self.norm, **self.projector_options}
        return create_projector(self.projector, features, self.output_dim, **options)

    def _in_order(self) -> list[Projector]:
        """The projectors, one a stream."""
        return cast(list[Projector], list(self.projectors.values()))
