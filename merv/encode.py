"""Encode: preprocessed frames to the features of one frozen encoder.

An encoder is one file: a table of variants, `build`, `encode`. Everything that all
encoders share (finding and loading weights, freezing, checking shapes, times, extents
and masks) is here. See `encoders/` for examples to copy, docs/encoders.md for a guide.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from merv.errors import EncoderError, ShapeError
from merv.suggest import nearest
from merv.types import EncoderSpec, Frames, Grid, Preset
from merv.weights import PRETRAINED, Identity, load_weights


class Encoder(nn.Module):
    """A frozen visual encoder: `forward(Frames) -> Grid`.

    A subclass declares `variants` (name → spec, the first is the default), creates its
    modules in `build` and computes features in `encode`.

    variant: a key of `variants`.
    weights: "pretrained" (the spec's source), another hub id, a local folder or file, or
        None for random weights. Nothing is ever substituted for what was asked.
    preset: a key of the spec's presets; None takes the first.

    Raises EncoderError for an unknown variant or preset, WeightsError for weights that
    cannot be had or do not fit.

    >>> from merv import create_encoder, Frames
    >>> encoder = create_encoder("fake")
    >>> encoder(Frames.of(torch.zeros(1, 4, 3, 16, 16))).values.shape
    torch.Size([1, 4, 4, 4, 8])
    """

    variants: ClassVar[dict[str, EncoderSpec]]

    def __init__(
        self, variant: str | None = None, *, weights: str | None = PRETRAINED, preset: str | None = None
    ) -> None:
        super().__init__()
        self.variant = variant or next(iter(self.variants))
        self.spec = _pick(self.variants, self.variant, f"{type(self).__name__} variant")
        self.preset_name = preset or next(iter(self.spec.presets))
        self.preset: Preset = _pick(self.spec.presets, self.preset_name, f"{self.spec.name} preset")
        self.build()
        self.identity: Identity = self.load(weights)
        self.requires_grad_(False).eval()

    # What a subclass writes ---------------------------------------------------------------

    def build(self) -> None:
        """Create the modules, with random weights."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of preprocessed pixels: [B, T, 3, H, W] → [B, t, h, w, D]."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the source in this module's names; override where they differ."""
        return state

    # What it gets -------------------------------------------------------------------------

    def load(self, weights: str | None) -> Identity:
        """Load `weights` into this module; see the class for what they may be."""
        return load_weights(
            self, weights, default=self.spec.source, revision=self.spec.revision, rename=self.rename
        )

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode: a frozen encoder has no training behaviour."""
        return super().train(False)

    def forward(self, frames: Frames) -> Grid:
        """Features on the encoder's own grid; T must be a multiple of the spec's window.

        Raises ShapeError where the frames are not what the spec and preset declare.
        """
        self._check(frames)
        values = self.encode(frames.pixels)  # [B, t, h, w, D]
        t, h, w = values.shape[1:4]
        if frames.pixels.shape[1] % t:
            raise EncoderError(
                f"{self.spec.name} made {t} steps of time of {frames.pixels.shape[1]} frames, which is no "
                "whole number of frames a step. An encoder with its own clock overrides forward()."
            )
        times_s = reduce(frames.times_s, "b (t k) -> b t", "mean", t=t)
        real = reduce(frames.mask, "b (t k) -> b t", "max", t=t)
        return Grid(values, times_s, frames.extent, repeat(real, "b t -> b t h w", h=h, w=w))

    def _check(self, frames: Frames) -> None:
        name, height_width = self.spec.name, self.preset.size
        if frames.patches is not None or tuple(frames.pixels.shape[-2:]) != height_width:
            raise ShapeError(
                f"{name} expects frames [B, T, 3, {height_width[0]}, {height_width[1]}]; got "
                f"{list(frames.pixels.shape)}. `merv.preprocess(frames, encoder.preset)` makes them fit."
            )
        if not frames.pixels.is_floating_point():
            raise ShapeError(
                f"{name} expects normalised floating-point frames; got {frames.pixels.dtype}. "
                "`merv.preprocess(frames, encoder.preset)` does it."
            )
        if frames.pixels.shape[1] % self.spec.window:
            raise ShapeError(
                f"{name} takes frames in windows of {self.spec.window}; got {frames.pixels.shape[1]}. "
                "Sample a multiple of it, or repeat the last frame."
            )


def _pick(table: dict, key: str, what: str):
    if key not in table:
        raise EncoderError(f"Unknown {what} {key!r}.{nearest(key, table)} There are: {', '.join(table)}.")
    return table[key]
