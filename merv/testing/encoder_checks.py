"""The checks of an encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from merv.encoding.base import Encoder
from merv.testing.findings import difference
from merv.types import Frames, Grid


class EncoderSubject:
    """An encoder, two clips, and the encoder's features of them, each computed once."""

    def __init__(self, encoder: Encoder | type[Encoder], variant: str | None = None) -> None:
        self.instance = encoder if isinstance(encoder, Encoder) else None
        self.type: type[Encoder] = encoder if isinstance(encoder, type) else type(encoder)
        self.options: dict[str, Any] = {"variant": variant, "weights": None}
        if isinstance(encoder, Encoder):
            self.options |= {"variant": encoder.variant, "preset": encoder.preset_name}

    @cached_property
    def encoder(self) -> Encoder:
        return self.instance or self.create()

    def create(self) -> Encoder:
        """Create another encoder of the same class with random weights."""
        return self.type(**self.options)

    @property
    def num_frames(self) -> int:
        """Number of frames in a clip."""
        return max(2, self.encoder.spec.window_size or 8 * self.encoder.spec.tubelet_size)

    @cached_property
    def frames(self) -> Frames:
        """Two cropped clips [2, T, 3, H, W]; the second half of the second clip is padding."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, self.num_frames, 3, *self.encoder.preset.input_size, generator=generator)
        times_s = torch.stack([torch.arange(self.num_frames) / 8, 3 + torch.arange(self.num_frames) / 25])
        extent = torch.tensor([[0.0, 0.25, 1.0, 0.75], [0.1, 0.2, 0.9, 0.8]])
        mask = torch.ones(2, self.num_frames, dtype=torch.bool)
        mask[1, self.num_frames // 2 :] = False
        return Frames(pixels, times_s.double(), extent, mask)

    @cached_property
    def grid(self) -> Grid:
        """The features of both clips, encoded as one batch."""
        return self.encoder(self.frames)

    @cached_property
    def first(self) -> Grid:
        """The features of the first clip, encoded alone."""
        return self.encoder(self.frames[:1])


# The encoder itself -----------------------------------------------------------------------


def _can_be_created(subject: EncoderSubject) -> str | None:
    _ = subject.encoder
    return None


def _spec_is_consistent(subject: EncoderSubject) -> str | None:
    spec = subject.encoder.spec
    if spec.num_frames != spec.grid[0] * spec.tubelet_size:
        return (
            f"spec.num_frames is {spec.num_frames}, but {spec.grid[0]} steps of {spec.tubelet_size} frames "
            f"(grid, tubelet_size) are {spec.grid[0] * spec.tubelet_size} frames"
        )
    for name, preset in spec.presets.items() if spec.patch else ():
        cells = tuple(side // spec.patch for side in preset.input_size)
        if cells != spec.grid[1:]:
            return (
                f"patches of {spec.patch} pixels divide preset {name!r} into {cells} cells, but spec.grid "
                f"has {spec.grid[1:]}"
            )
    parameters = sum(p.numel() for p in subject.encoder.parameters())
    if spec.parameters is not None and not math.isclose(parameters, spec.parameters, rel_tol=0.01):
        return f"spec.parameters is {spec.parameters}, but the encoder has {parameters} parameters"
    return None


def _is_frozen(subject: EncoderSubject) -> str | None:
    for name, parameter in subject.encoder.named_parameters():
        if parameter.requires_grad:
            return f"{name} requires a gradient; all parameters must be frozen"
    if subject.first.values.requires_grad:
        return "the features require a gradient: forward() uses a trainable tensor that is not a parameter"
    subject.encoder.train()
    for name, module in subject.encoder.named_modules():
        if module.training:
            return f"{name or 'the encoder'} is in training mode after .train(); it must stay in eval mode"
    return None


# The features -----------------------------------------------------------------------------


def _shape_matches_the_spec(subject: EncoderSubject) -> str | None:
    spec = subject.encoder.spec
    expected = [2, subject.num_frames // spec.tubelet_size, *spec.grid[1:], spec.embed_dim]
    shape = list(subject.grid.values.shape)
    if shape != expected:
        return f"expected features {expected} for {subject.num_frames} frames, got {shape}"
    invalid = int((~subject.grid.values.isfinite()).sum())
    return f"{invalid} features are NaN or infinite" if invalid else None


def _is_deterministic(subject: EncoderSubject) -> str | None:
    state = torch.get_rng_state()
    values = subject.encoder(subject.frames[:1]).values
    if not torch.equal(state, torch.get_rng_state()):
        return "forward() draws random numbers"
    return difference(values, subject.first.values)


def _clips_are_independent(subject: EncoderSubject) -> str | None:
    second = subject.encoder(subject.frames[1:])
    return difference(torch.cat([subject.first.values, second.values]), subject.grid.values)


def _windows_are_independent(subject: EncoderSubject) -> str | None:
    if not subject.encoder.spec.window_size:  # the whole clip is one window, so padding must not matter
        unpadded = subject.encoder(Frames.of(subject.frames.pixels[1:, : subject.num_frames // 2])).values
        return difference(unpadded, subject.grid.values[1:, : unpadded.shape[1]])
    joined = Frames.of(subject.frames.pixels.flatten(0, 1)[None])  # both clips as one
    return difference(subject.encoder(joined).values, subject.grid.values.flatten(0, 1)[None])


def _times_match_the_frames(subject: EncoderSubject) -> str | None:
    times_s, frame_times_s = subject.grid.times_s, subject.frames.times_s
    if (times_s.diff() < 0).any():
        return "times_s must not decrease"
    inside = (times_s[:, 0] >= frame_times_s[:, 0]) & (times_s[:, -1] <= frame_times_s[:, -1])
    if inside.all():
        return None
    return f"times_s {times_s.tolist()} are outside the times of the frames, {frame_times_s.tolist()}"


def _mask_matches_the_frames(subject: EncoderSubject) -> str | None:
    unpadded, half_padded = subject.grid.mask
    if not unpadded.all():
        return "the mask is False for cells of a clip without padding"
    if not half_padded[0].all():
        return "the mask is False for cells of real frames"
    if len(half_padded) > 1 and half_padded[-1].any():
        return "the mask is True for cells of padding"
    return None


def _extent_is_unchanged(subject: EncoderSubject) -> str | None:
    extent, expected = subject.grid.extent, subject.frames.extent
    if torch.equal(extent, expected):
        return None
    return f"expected the extent of the frames, {expected.tolist()}, got {extent.tolist()}"


# Weights ---------------------------------------------------------------------------------


def _state_dict_is_complete(subject: EncoderSubject) -> str | None:
    if subject.encoder.source is not None:  # the network may depend on the source's config.json
        return None
    other = subject.create()
    other.load_state_dict(subject.encoder.state_dict())
    fault = difference(other(subject.frames[:1]).values, subject.first.values)
    return fault and f"{fault} after another encoder loads the state dict"


def _does_not_seed_torch(subject: EncoderSubject) -> str | None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(12345)
        _ = subject.create()
        seed = torch.initial_seed()
    return None if seed == 12345 else f"creating the encoder sets torch's seed to {seed}"


ENCODER_CHECKS: tuple[Callable[[EncoderSubject], str | None], ...] = (
    _can_be_created,
    _spec_is_consistent,
    _is_frozen,
    _shape_matches_the_spec,
    _is_deterministic,
    _clips_are_independent,
    _windows_are_independent,
    _times_match_the_frames,
    _mask_matches_the_frames,
    _extent_is_unchanged,
    _state_dict_is_complete,
    _does_not_seed_torch,
)
