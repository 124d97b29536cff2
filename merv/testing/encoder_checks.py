"""What holds of an encoder that keeps its contract, check by check."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from merv.encoding.base import Encoder, class_fault
from merv.testing.findings import CheckSkipped, far
from merv.testing.side_effects import of_import, put_back, settings
from merv.types import Frames, Grid

BFLOAT16_TOLERANCE = 0.25  # the mean, of the features' spread: 24 layers of 8 bits; what is wrong is off by 1
ELSEWHERE = re.compile(r"same device|two (different )?devices|expected device", re.IGNORECASE)


class EncoderSubject:
    """An encoder, two clips for it, and what it makes of them; each computed once."""

    def __init__(self, encoder: Encoder | type[Encoder], variant: str | None = None) -> None:
        self.given = encoder
        self.type: type[Encoder] = encoder if isinstance(encoder, type) else type(encoder)
        self.options: dict[str, Any] = {"variant": variant, "weights": None}
        if isinstance(encoder, Encoder):
            self.options |= {"variant": encoder.variant, "preset": encoder.preset_name}
        self.changed: list[str] = []  # settings of the process that it changed

    @cached_property
    def encoder(self) -> Encoder:
        return self.given if isinstance(self.given, Encoder) else self.another()

    def another(self) -> Encoder:
        """One more of its kind, with random weights of its own."""
        return self.watched(self.type, **self.options)

    def run(self, frames: Frames, encoder: Encoder | None = None) -> Grid:
        """What the encoder, or another one, makes of frames."""
        return self.watched(encoder or self.encoder, frames)

    def watched(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        before = settings()
        try:
            return work(*args, **options)
        finally:
            self.changed += put_back(before)

    @property
    def length(self) -> int:
        """Frames a clip."""
        return max(2, self.encoder.spec.window_size or 8 * self.encoder.spec.tubelet_size)

    def make_frames(self) -> Frames:
        """Two clips [2, T, 3, H, W]: cropped, and of the second only the first half is real."""
        at = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, self.length, 3, *self.encoder.preset.input_size, generator=at)
        times_s = torch.stack([torch.arange(self.length) / 8, 3 + torch.arange(self.length) / 25])
        extent = torch.tensor([[0.0, 0.25, 1.0, 0.75], [0.1, 0.2, 0.9, 0.8]])
        mask = torch.ones(2, self.length, dtype=torch.bool)
        mask[1, self.length // 2 :] = False
        return Frames(pixels, times_s.double(), extent, mask)

    @cached_property
    def frames(self) -> Frames:
        return self.make_frames()

    @cached_property
    def grid(self) -> Grid:
        return self.run(self.frames)

    @cached_property
    def first(self) -> Grid:
        """The first clip alone."""
        return self.run(self.frames[:1])


# What it is -------------------------------------------------------------------------------


def _is_created(subject: EncoderSubject) -> str | None:
    fault = class_fault(subject.type)
    if not fault:
        _ = subject.encoder
    return fault


def _spec_is_consistent(subject: EncoderSubject) -> str | None:
    spec = subject.encoder.spec
    if spec.num_frames != spec.grid[0] * spec.tubelet_size:
        return (
            f"{spec.grid[0]} steps of {spec.tubelet_size} frames (tubelet) are not {spec.num_frames} frames"
        )
    for name, preset in spec.presets.items() if spec.patch else ():
        cells = tuple(side // spec.patch for side in preset.input_size)
        if cells != spec.grid[1:]:
            return f"patches of {spec.patch} make {cells} of preset {name!r}; the grid is {spec.grid[1:]}"
    own = sum(p.numel() for p in subject.encoder.parameters())
    if spec.parameters is not None and not math.isclose(own, spec.parameters, rel_tol=0.01):
        return f"spec.parameters is {spec.parameters}; the encoder has {own}"
    return None


def _is_frozen(subject: EncoderSubject) -> str | None:
    open_ones = [name for name, p in subject.encoder.named_parameters() if p.requires_grad]
    if open_ones:
        return f"{open_ones[0]} requires a gradient; all parameters should be frozen"
    if subject.first.values.requires_grad:
        return "features require a gradient: forward() builds a graph on something that is no parameter"
    return None


def _stays_in_eval_mode(subject: EncoderSubject) -> str | None:
    subject.encoder.train()
    training = [name or "it" for name, module in subject.encoder.named_modules() if module.training]
    return f"{training[0]} is in training mode after .train()" if training else None


# What it makes of frames --------------------------------------------------------------------


def _shape_is_what_the_spec_says(subject: EncoderSubject) -> str | None:
    spec = subject.encoder.spec
    wanted = [2, subject.length // spec.tubelet_size, *spec.grid[1:], spec.embed_dim]
    came = list(subject.grid.values.shape)
    return None if came == wanted else f"features of {subject.length} frames are {came}; wanted {wanted}"


def _features_are_finite(subject: EncoderSubject) -> str | None:
    strange = int((~subject.grid.values.isfinite()).sum())
    return f"{strange} values are NaN or infinite" if strange else None


def _features_depend_on_the_pixels(subject: EncoderSubject) -> str | None:
    same = torch.equal(subject.grid.values[0], subject.grid.values[1])
    return "two different clips have equal features" if same else None


def _is_deterministic(subject: EncoderSubject) -> str | None:
    state = torch.get_rng_state()
    again = subject.run(subject.frames[:1]).values
    if not torch.equal(state, torch.get_rng_state()):
        return "forward() draws random numbers"
    return far(again, subject.first.values)


def _batch_equals_one_by_one(subject: EncoderSubject) -> str | None:
    second = subject.run(subject.frames[1:])
    return far(torch.cat([subject.first.values, second.values]), subject.grid.values)


def _windows_are_independent(subject: EncoderSubject) -> str | None:
    if not subject.encoder.spec.window_size:  # a clip is one window: then its padding must not show
        real = subject.run(Frames.of(subject.frames.pixels[1:, : subject.length // 2])).values
        return far(real, subject.grid.values[1:, : real.shape[1]])
    both = Frames.of(subject.frames.pixels.flatten(0, 1)[None])  # the two clips as one
    return far(subject.run(both).values, subject.grid.values.flatten(0, 1)[None])


def _times_pass_through(subject: EncoderSubject) -> str | None:
    came, given = subject.grid.times_s, subject.frames.times_s
    if (came.diff() < 0).any():
        return "times_s do not ascend"
    inside = (came[:, 0] >= given[:, 0]) & (came[:, -1] <= given[:, -1])
    return None if inside.all() else f"times_s {came.tolist()} leave those of the frames {given.tolist()}"


def _mask_passes_through(subject: EncoderSubject) -> str | None:
    real, half = subject.grid.mask
    if not real.all():
        return "cells of a clip without padding are masked"
    if not half[0].all():
        return "cells of real frames are masked"
    if len(half) > 1 and half[-1].any():
        return "cells of padding are not masked"
    return None


def _extent_is_carried(subject: EncoderSubject) -> str | None:
    same = torch.equal(subject.grid.extent, subject.frames.extent)
    return None if same else f"extent is {subject.grid.extent.tolist()}; wanted that of the frames"


def _leaves_its_frames_alone(subject: EncoderSubject) -> str | None:
    _ = subject.grid
    given = vars(subject.make_frames())
    changed = [n for n, was in given.items() if was is not None and not was.equal(getattr(subject.frames, n))]
    return f"forward() changes frames.{changed[0]} in place" if changed else None


# Where it can go ----------------------------------------------------------------------------


def _moves_between_devices(subject: EncoderSubject) -> str | None:
    """On a GPU that need not be there: fake tensors have shapes and devices, but no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    encoder, frames = subject.encoder, subject.frames[:1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = [*encoder.named_parameters(), *encoder.named_buffers()]
        moved = {name: torch.empty_like(tensor, device="cuda") for name, tensor in state}
        if type(encoder).forward is Encoder.forward:  # ours looks into the mask, which fakes do not allow
            frames = replace(frames, pixels=torch.empty_like(frames.pixels, device="cuda"))
        else:
            frames = frames.to("cuda")
    try:
        device = subject.watched(torch.func.functional_call, encoder, moved, (frames,)).values.device
    except Exception as error:
        said = str(error).partition("\n")[0]
        if ELSEWHERE.search(str(error)):
            return (
                f"{said} A tensor that is no parameter stays behind: give it to "
                "register_buffer(), and device=pixels.device to what forward() creates."
            )
        raise CheckSkipped(f"needs a GPU, {type(error).__name__}: {said}") from error
    return None if device.type == "cuda" else f"features of frames on a GPU are on {device}"


def _runs_in_bfloat16(subject: EncoderSubject) -> str | None:
    encoder = copy.deepcopy(subject.encoder).to(torch.bfloat16)
    came, wanted = subject.run(subject.frames[:1].to(torch.bfloat16), encoder).values, subject.first.values
    if came.dtype != torch.bfloat16:
        return f"features of bfloat16 frames are {came.dtype}; a tensor that is no parameter or buffer stays"
    off = ((came.float() - wanted).abs().mean() / wanted.std().clamp_min(1e-6)).item()
    return None if off <= BFLOAT16_TOLERANCE else f"off by {off:.2g} standard deviations on average"


def _pickles_and_copies(subject: EncoderSubject) -> str | None:
    other = copy.deepcopy(pickle.loads(pickle.dumps(subject.encoder)))
    return far(subject.run(subject.frames[:1], other).values, subject.first.values)


def _state_dict_holds_all(subject: EncoderSubject) -> str | None:
    if subject.encoder.source is not None:  # its network may be built as the source says
        raise CheckSkipped("made of trained weights; check its class")
    other = subject.another()
    other.load_state_dict(subject.encoder.state_dict())
    fault = far(subject.run(subject.frames[:1], other).values, subject.first.values)
    return fault and f"{fault} in another one that loaded its state dict"


# What it leaves alone -----------------------------------------------------------------------


def _leaves_the_process_alone(subject: EncoderSubject) -> str | None:
    _ = subject.grid
    changed = " and ".join(dict.fromkeys(subject.changed))
    return f"creating or running it changes {changed}" if changed else None


def _import_does_no_work(subject: EncoderSubject) -> str | None:
    found = of_import(subject.type.__module__)
    if found is None:
        raise CheckSkipped(f"another interpreter does not find its module {subject.type.__module__}")
    return f"importing {subject.type.__module__} " + ", ".join(found) if found else None


ENCODER_CHECKS: tuple[Callable[[EncoderSubject], str | None], ...] = (
    _is_created,
    _spec_is_consistent,
    _is_frozen,
    _stays_in_eval_mode,
    _shape_is_what_the_spec_says,
    _features_are_finite,
    _features_depend_on_the_pixels,
    _is_deterministic,
    _batch_equals_one_by_one,
    _windows_are_independent,
    _times_pass_through,
    _mask_passes_through,
    _extent_is_carried,
    _leaves_its_frames_alone,
    _moves_between_devices,
    _runs_in_bfloat16,
    _pickles_and_copies,
    _state_dict_holds_all,
    _leaves_the_process_alone,
    _import_does_no_work,
)
