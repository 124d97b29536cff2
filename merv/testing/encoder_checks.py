"""The checks of an encoder."""

from __future__ import annotations

import copy
import math
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import quiet_transformers
from merv.testing.results import CheckFailed, Checks, CheckSkipped, require, require_equal, require_finite
from merv.types import Frames, Grid

PAINT = (3.0, -2.0, 1.0)  # normalized color of a cell whose effect on the features is measured


class EncoderSubject:
    """An encoder, two clips, and the encoder's features of them, each computed once."""

    def __init__(self, encoder: Encoder | type[Encoder], variant: str | None = None) -> None:
        self.instance = encoder if isinstance(encoder, Encoder) else None
        self.type: type[Encoder] = encoder if isinstance(encoder, type) else type(encoder)
        self.options: dict[str, Any] = {"variant": variant, "weights": None}
        if isinstance(encoder, Encoder):
            self.options |= {"variant": encoder.variant, "preset": encoder.preset_name}
            if source := encoder.source:  # the network may depend on the config.json beside the weights
                self.options["weights"] = (
                    f"{source.name}@{source.revision}" if source.revision else source.name
                )

    @cached_property
    def encoder(self) -> Encoder:
        return self.instance or self.create()

    def create(self, **options: Any) -> Encoder:
        """Create another encoder of the same class, with weights from the same source or random ones."""
        return self.type(**{**self.options, **options})

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


def _can_be_created(subject: EncoderSubject) -> None:
    _ = subject.encoder


def _spec_is_consistent(subject: EncoderSubject) -> None:
    spec = subject.encoder.spec
    frames = spec.grid[0] * spec.tubelet_size
    require(
        spec.num_frames == frames,
        f"spec.num_frames is {spec.num_frames}, but {spec.grid[0]} steps of {spec.tubelet_size} frames "
        f"(grid, tubelet_size) are {frames} frames",
    )
    for name, preset in spec.presets.items() if spec.patch else ():
        cells = tuple(side // spec.patch for side in preset.input_size)
        require(
            cells == spec.grid[1:],
            f"patches of {spec.patch} pixels divide preset {name!r} into {cells} cells, but spec.grid has "
            f"{spec.grid[1:]}",
        )
    parameters = sum(p.numel() for p in subject.encoder.parameters())
    require(
        spec.parameters is None or math.isclose(parameters, spec.parameters, rel_tol=0.01),
        f"spec.parameters is {spec.parameters}, but the encoder has {parameters} parameters",
    )


def _is_frozen(subject: EncoderSubject) -> None:
    for name, parameter in subject.encoder.named_parameters():
        require(not parameter.requires_grad, f"{name} requires a gradient; all parameters must be frozen")
    require(
        not subject.first.values.requires_grad,
        "the features require a gradient: forward() uses a trainable tensor that is not a parameter",
    )
    training = [name for name, module in subject.encoder.train().named_modules() if module.training]
    subject.encoder.eval()
    if training:
        raise CheckFailed(
            f"{training[0] or 'the encoder'} is in training mode after .train(); it must stay in eval mode"
        )


# The features -----------------------------------------------------------------------------


def _shape_matches_the_spec(subject: EncoderSubject) -> None:
    spec = subject.encoder.spec
    expected = [2, subject.num_frames // spec.tubelet_size, *spec.grid[1:], spec.embed_dim]
    shape = list(subject.grid.values.shape)
    require(shape == expected, f"expected features {expected} for {subject.num_frames} frames, got {shape}")
    require_finite(subject.grid.values, "features")


def _is_deterministic(subject: EncoderSubject) -> None:
    state = torch.get_rng_state()
    values = subject.encoder(subject.frames[:1]).values
    require(torch.equal(state, torch.get_rng_state()), "forward() draws random numbers")
    require_equal(values, subject.first.values)


def _clips_are_independent(subject: EncoderSubject) -> None:
    second = subject.encoder(subject.frames[1:])
    require_equal(torch.cat([subject.first.values, second.values]), subject.grid.values)


def _windows_are_independent(subject: EncoderSubject) -> None:
    if not subject.encoder.spec.window_size:  # the whole clip is one window, so padding must not matter
        unpadded = subject.encoder(Frames.of(subject.frames.pixels[1:, : subject.num_frames // 2])).values
        return require_equal(unpadded, subject.grid.values[1:, : unpadded.shape[1]])
    joined = Frames.of(subject.frames.pixels.flatten(0, 1)[None])  # both clips as one
    return require_equal(subject.encoder(joined).values, subject.grid.values.flatten(0, 1)[None])


def _times_match_the_frames(subject: EncoderSubject) -> None:
    for step, frames in enumerate(_frames_of_steps(subject)):
        time_s, frame_times_s = subject.grid.times_s[:, step], subject.frames.times_s[:, frames]
        inside = (time_s >= frame_times_s[:, 0]) & (time_s <= frame_times_s[:, -1])
        require(
            inside.all(),
            f"times_s of step {step} is {time_s.tolist()}, which is outside the times of its frames, "
            f"{frame_times_s.tolist()}",
        )


def _mask_matches_the_frames(subject: EncoderSubject) -> None:
    for step, frames in enumerate(_frames_of_steps(subject)):
        is_real = subject.frames.mask[:, frames]  # [B, frames of the step]
        mask = subject.grid.mask[:, step]  # [B, h, w]
        require(mask[is_real.all(dim=1)].all(), f"the mask is False for cells of real frames, in step {step}")
        require(not mask[~is_real.any(dim=1)].any(), f"the mask is True for cells of padding, in step {step}")


def _frames_of_steps(subject: EncoderSubject) -> list[slice]:
    """The frames that each time step of the features overlaps."""
    steps, frames = subject.grid.shape[0], subject.num_frames
    return [slice(i * frames // steps, math.ceil((i + 1) * frames / steps)) for i in range(steps)]


def _extent_is_unchanged(subject: EncoderSubject) -> None:
    extent, expected = subject.grid.extent, subject.frames.extent
    require(
        torch.equal(extent, expected),
        f"expected the extent of the frames, {expected.tolist()}, got {extent.tolist()}",
    )


def _cells_are_at_their_pixels(subject: EncoderSubject) -> None:
    """Each corner cell must depend on its own pixels more than on those of the other corners.

    The effect of a corner's pixels on a cell is taken as a share of their effect on all cells. So a network
    may mix all cells, as long as its own pixels count more. One corner is taken in the first and last step.
    """
    count = subject.encoder.spec.window_size or subject.num_frames
    pixels = subject.frames.pixels[:1, :count]
    values = subject.encoder(Frames.of(pixels)).values[0]  # [t, h, w, D]
    t, h, w = values.shape[:3]
    others = [(row, column) for row in (0, h - 1) for column in (0, w - 1) if (row, column) != (0, w - 1)]
    corners = [(0, 0, w - 1), (t - 1, 0, w - 1), *((t // 2, row, column) for row, column in others)]
    corners = list(dict.fromkeys(corners))  # the same ones, if the grid has one step, row or column
    if len(corners) == 1:
        raise CheckSkipped("a window has only one cell")
    effects = []  # of each corner's pixels on all cells, [t, h, w]
    for corner in corners:
        changed = subject.encoder(Frames.of(_paint(pixels, corner, (t, h, w)))).values[0]
        effects.append((changed - values).detach().double().norm(dim=-1))
        require(
            effects[-1].any(),
            f"the features do not depend on the pixels of cell {corner} (time step, row, column)",
        )
    shares = torch.stack([effect / effect.sum() for effect in effects])
    for number, corner in enumerate(corners):
        strongest = tuple(int(i) for i in torch.unravel_index(shares[number].argmax(), (t, h, w)))
        require(
            shares[(slice(None), *corner)].argmax() == number,
            f"the pixels of cell {corner} (time step, row, column) have most effect on the features of cell "
            f"{strongest}; are rows and columns exchanged, frames in another order, or class and register "
            "tokens not cut off?",
        )


def _paint(pixels: Tensor, cell: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Return a copy of pixels [1, T, 3, H, W] in which one cell of the grid has one color."""
    num_frames, _, height, width = pixels.shape[1:]
    frames, rows, columns = (
        slice(i * size // n, (i + 1) * size // n)
        for i, size, n in zip(cell, (num_frames, height, width), grid, strict=True)
    )
    painted = pixels.clone()
    painted[:, frames, :, rows, columns] = torch.tensor(PAINT)[:, None, None]
    return painted


# Weights ---------------------------------------------------------------------------------


def _state_dict_is_complete(subject: EncoderSubject) -> None:
    other = subject.create()
    other.load_state_dict(subject.encoder.state_dict())
    values = other(subject.frames[:1]).values
    require_equal(values, subject.first.values, " after another encoder loads the state dict")


def _loads_what_its_library_saves(subject: EncoderSubject) -> None:
    with TemporaryDirectory() as folder:
        _save_as_its_library(subject.encoder, folder)
        loaded = subject.create(weights=str(Path(folder, "model.safetensors")))
    saved = subject.encoder.net.state_dict()
    for name, tensor in loaded.net.state_dict().items():
        require(
            torch.equal(tensor.to(saved[name]), saved[name]),
            f"{name} has other values after they were saved by the library and loaded by the encoder",
        )


def _save_as_its_library(encoder: Encoder, folder: str) -> None:
    """Save the network with the code of the library that it comes from."""
    net: Any = copy.deepcopy(getattr(encoder, "net", None))
    if hasattr(net, "save_pretrained"):  # transformers, or a class with the mixin of huggingface_hub
        with quiet_transformers():
            net.save_pretrained(folder)
    elif hasattr(net, "pretrained_cfg"):
        from timm.models import save_for_hf

        save_for_hf(net.to(memory_format=torch.contiguous_format), folder, safe_serialization=True)
    if not Path(folder, "model.safetensors").is_file():
        raise CheckSkipped(f"no library saves self.net, a {type(net).__name__}, as model.safetensors")


def _does_not_seed_torch(subject: EncoderSubject) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(12345)
        _ = subject.create()
        seed = torch.initial_seed()
    require(seed == 12345, f"creating the encoder sets torch's seed to {seed}")


ENCODER_CHECKS: Checks = {
    _can_be_created: (),
    _spec_is_consistent: (_can_be_created,),
    _shape_matches_the_spec: (_spec_is_consistent,),
    _is_frozen: (_shape_matches_the_spec,),
    _is_deterministic: (_shape_matches_the_spec,),
    _clips_are_independent: (_is_deterministic,),
    _windows_are_independent: (_clips_are_independent,),
    _cells_are_at_their_pixels: (_windows_are_independent,),
    _times_match_the_frames: (_shape_matches_the_spec,),
    _mask_matches_the_frames: (_shape_matches_the_spec,),
    _extent_is_unchanged: (_shape_matches_the_spec,),
    _state_dict_is_complete: (_is_deterministic,),
    _loads_what_its_library_saves: (_can_be_created,),
    _does_not_seed_torch: (_can_be_created,),
}
