"""Fusion: one projector per encoder and a mixer.

There are two ways to compute the same tokens. The plain way, used in training, projects every stream to the
dimension of the LLM and then mixes. The folded way, used in eval mode, computes the weights from the features
and mixes before it projects: one matrix product of [a_1 p_1 | … | a_E p_E] with the stacked projectors, plus
Σ a_e b_e. Here a_e is the weight of encoder e, p_e are its features before the last Linear of its projector,
and b_e is the bias of that Linear. It never creates a [B, E, N, L] tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from merv.errors import CheckpointError, ShapeError
from merv.fusion.mixers import Mixer, WeightingMixer, any_present, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.types import WHOLE_PICTURE, Fused, Grid, is_count
from merv.utils.plugins import class_path, is_importable
from merv.utils.torch_modules import device_and_dtype, first_few


class Fusion(nn.Module):
    """Turn the aligned features of several encoders into tokens for the LLM.

    Args:
        embed_dims: Encoder name → its channels (D), in the order of the streams.
        output_dim: Embedding dimension of the LLM (L).
        mixer: A registered name (see `merv plugins mixers`), `module:Class`, or a subclass of `Mixer`.
        projector: A registered name (see `merv plugins projectors`), `module:Class`, or a subclass of
            `Projector`.
        norm: Normalize features before projection, and tokens after mixing to a fixed root mean square (see
            `init_scale`). Without it, training soon makes tokens many times larger than the embeddings of the
            LLM, whose layers then hardly change them. The released MERV does not normalize.
        mixer_options: Further arguments of the mixer.
        projector_options: Further arguments of the projectors.
        folded: Mix before projection. By default, fold in eval mode if mixer and projectors allow it.

    Raises:
        ShapeError: `output_dim` is not an integer of at least 1.
        PluginError: A mixer or projector is unknown, cannot be created, or does not accept an option.

    Example:
        >>> fusion = Fusion({"a": 32, "b": 48}, output_dim=64, mixer="gate")
        >>> fusion.projectors["b"](torch.zeros(5, 48)).shape
        torch.Size([5, 64])

    Source: arXiv 2501.01426 §3; the folded way follows from the linearity of the projectors.
    """

    def __init__(
        self,
        embed_dims: Mapping[str, int],
        output_dim: int,
        mixer: str | type[Mixer] = "cross_attention",
        *,
        projector: str | type[Projector] = "linear",
        norm: bool = True,
        mixer_options: Mapping[str, Any] | None = None,
        projector_options: Mapping[str, Any] | None = None,
        folded: bool | None = None,
    ) -> None:
        super().__init__()
        if not is_count(output_dim):
            raise ShapeError(f"Expected output_dim to be an integer of at least 1; got {output_dim!r}.")
        self.names, self.output_dim, self.folded = list(embed_dims), int(output_dim), folded
        self.norm = norm
        self.mixer_options, self.projector_options = dict(mixer_options or {}), dict(projector_options or {})
        self.projector = projector
        self.projectors = nn.ModuleDict(
            {name: self._create_projector(embed_dim) for name, embed_dim in embed_dims.items()}
        )
        self.token_rms: Tensor | None
        self.register_buffer("token_rms", torch.ones(()) if norm else None)
        self.mixer: Mixer = MIXERS.create(mixer, self.output_dim, len(self.names), **self.mixer_options)
        self._classes = type(self.mixer), type(self._ordered_projectors()[0])  # `fully_shard` changes them
        self._created = self._structure()

    def forward(self, grids: Mapping[str, Grid], question: Tensor | None = None) -> Fused:
        """Fuse a batch of aligned features.

        Args:
            grids: Encoder name → aligned features, values of shape [B, t, h, w, D]. Encoders that are left
                out count as absent.
            question: Mean embedding of the question's tokens, shape [B, L]; only for conditioned mixers.

        Returns:
            Tokens [B, N, L], their positions and mask, and the mix weights [B, E, t, h, w].

        Raises:
            ShapeError: A name is unknown, the grids are not aligned, or the mixer does not take a question.
        """
        self._check(grids)
        if question is not None and not self.mixer.conditioned:
            raise ShapeError(
                f"{type(self.mixer).__name__} is not conditioned on the question and would ignore it. "
                "Use mixer='cross_attention' with mixer_options={'conditioned': True}."
            )
        device, _ = device_and_dtype(self)
        grids = {name: grid.to(device) for name, grid in grids.items()}
        absent = torch.zeros_like(next(iter(grids.values())).mask)
        masks = [grids[name].mask if name in grids else absent for name in self.names]
        mask = torch.stack(masks, dim=1)  # [B, E, t, h, w]
        features = self._features(grids, mask)
        mix = self._mix_folded if self.is_folded else self._mix_plain
        tokens, token_mask, weights = mix(features, mask, question)
        if self.token_rms is not None:
            tokens = self.token_rms.to(tokens) * rms_norm(tokens, (self.output_dim,), eps=1e-6)
        grid = next(iter(grids.values()))
        positions = self.mixer.positions(cell_positions(grid.times_s, *grid.shape[1:]))
        return Fused(tokens, positions, token_mask, weights)

    @property
    def is_folded(self) -> bool:
        """Whether `forward` mixes before it projects, in the current mode."""
        foldable = isinstance(self.mixer, WeightingMixer) and self.mixer.foldable
        foldable = foldable and all(projector.foldable for projector in self._ordered_projectors())
        return foldable and (not self.training if self.folded is None else self.folded)

    def dummy_tokens(self) -> Tensor:
        """Return the tokens [N, L] of one cell that no encoder sees.

        Their empty slice `[:0]` keeps every parameter of the fusion in the graph, with gradient zero, in
        steps without a video.
        """
        unseen = Grid(  # of the first encoder; the others count as absent
            torch.zeros(1, 1, 1, 1, self._ordered_projectors()[0].input_dim),
            torch.zeros(1, 1, dtype=torch.float64),
            torch.tensor([WHOLE_PICTURE]),
            torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        )
        question = torch.zeros(1, self.output_dim) if self.mixer.conditioned else None
        return self({self.names[0]: unseen}, question).tokens[0]

    def init_scale(self, rms: float) -> None:
        """Initialize the last layer of each projector again, for tokens of root mean square `rms`.

        This is only for a new model: trained projectors are lost. Pass the root mean square of the LLM's
        embeddings. With `norm`, tokens always have this scale. Without it, it is only approximate: the mean
        over encoders makes tokens smaller, and so does the activation of an MLP.
        """
        if self.token_rms is not None:
            self.token_rms.fill_(rms)
        for projector in self._ordered_projectors():
            projector.init_scale(rms)

    def add_encoder(self, name: str, embed_dim: int) -> None:
        """Add an encoder after the others, with a new projector.

        `Mixer.add_encoder` describes how much it counts at first, which depends on the mixer.

        Raises:
            ShapeError: No encoder can be added to the mixer.
        """
        before = self._structure()
        device, dtype = device_and_dtype(self)
        projector = self._create_projector(embed_dim).to(device, dtype)
        if self.token_rms is not None:
            projector.init_scale(float(self.token_rms))
        self.mixer.add_encoder()
        self.projectors[name] = projector
        self.names.append(name)
        for name, part in self._structure().items():  # what was modified before stays modified
            if before.get(name) == self._created.get(name):
                self._created[name] = part

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments, without `embed_dims` and `folded`, as a dict of JSON values.

        Raises:
            CheckpointError: A fusion built from these arguments would differ from this one.
        """
        current = self._structure()
        changed = [
            name for name in {**current, **self._created} if current.get(name) != self._created.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"A modified fusion cannot be saved. Replaced, added or removed: {first_few(changed)}. Only "
                "mixer=, projector=, mixer_options= and projector_options= of the constructor are saved."
            )
        for plugin in self._classes:
            if not is_importable(plugin):
                raise CheckpointError(
                    f"{class_path(plugin)} cannot be imported when the model is loaded. Define the class at "
                    "the top level of a module."
                )
        mixer, projector = map(class_path, self._classes)
        return {
            "output_dim": self.output_dim,
            "mixer": mixer,
            "mixer_options": self.mixer_options,
            "projector": projector,
            "projector_options": self.projector_options,
            "norm": self.norm,
        }

    def _structure(self) -> dict[str, Any]:
        """Return modules and shapes of tensors by name; `config` compares them with those at creation."""
        modules = {name: module for name, module in self.named_modules() if name}
        return {**modules, **{name: tensor.shape for name, tensor in self.state_dict().items()}}

    # Plain and folded ---------------------------------------------------------------------

    def _mix_plain(
        self, features: Sequence[Tensor], mask: Tensor, question: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Project, then mix, as the released MERV does."""
        streams = [project(f) for project, f in zip(self._ordered_projectors(), features, strict=True)]
        return self.mixer(torch.stack(streams, dim=1), mask, question)

    def _mix_folded(
        self, features: Sequence[Tensor], mask: Tensor, question: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the weights from the features, mix the features, project once."""
        assert isinstance(self.mixer, WeightingMixer)
        features = [p.before(f) for p, f in zip(self._ordered_projectors(), features, strict=True)]
        linears = [p.linear for p in self._ordered_projectors()]
        matrix = self.mixer.score_weight()
        score_inputs = None
        if matrix is not None:
            score_inputs = torch.stack(
                [
                    f @ (matrix @ linear.weight).T + matrix @ linear.bias
                    for f, linear in zip(features, linears, strict=True)
                ],
                dim=1,
            )  # [B, E, t, h, w, R]
        weights = self.mixer.weigh(score_inputs, mask, question)
        factors = weights.to(features[0].dtype)  # [B, E, t, h, w]
        weighted = torch.cat([f * factors[:, e, ..., None] for e, f in enumerate(features)], dim=-1)
        stacked = torch.cat([linear.weight for linear in linears], dim=1)  # [L, ΣD]
        biases = torch.stack([linear.bias for linear in linears])  # [E, L]
        tokens = weighted @ stacked.T + einsum(factors, biases, "b e t h w, e l -> b t h w l")
        return rearrange(tokens, "b t h w l -> b (t h w) l"), any_present(mask), weights

    # Checks and shapes --------------------------------------------------------------------

    def _check(self, grids: Mapping[str, Grid]) -> None:
        unknown = [name for name in grids if name not in self.names]
        if unknown or not grids:
            raise ShapeError(
                f"Expected features of {', '.join(self.names)} or some of them, got features of "
                f"{', '.join(grids) or 'no encoder'}."
            )
        shapes = {name: grid.mask.shape for name, grid in grids.items()}
        first = next(iter(shapes.values()))
        # Compared one by one, not in a set: the symbolic sizes of torch.export cannot be hashed.
        if any(shape != first for shape in shapes.values()):
            raise ShapeError(
                "Expected aligned features, the same [B, t, h, w] for all encoders; got "
                f"{ {name: list(shape) for name, shape in shapes.items()} }. Align them first: "
                "MultiEncoder.align or Aligner."
            )

    def _features(self, grids: Mapping[str, Grid], mask: Tensor) -> list[Tensor]:
        """Return the features of each stream [B, t, h, w, D] in its projector's dtype; zeros if absent."""
        features = []
        for name, projector in zip(self.names, self._ordered_projectors(), strict=True):
            absent = mask.new_zeros(*mask[:, 0].shape, projector.input_dim)
            values = grids[name].values if name in grids else absent
            features.append(values.to(device_and_dtype(projector)[1]))
        return features

    def _create_projector(self, embed_dim: int) -> Projector:
        options = {"norm": self.norm, **self.projector_options}
        return PROJECTORS.create(self.projector, embed_dim, self.output_dim, **options)

    def _ordered_projectors(self) -> list[Projector]:
        """Return the projectors in the order of the streams."""
        return cast(list[Projector], list(self.projectors.values()))
