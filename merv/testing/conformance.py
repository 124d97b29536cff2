"""Conformance: whether an encoder keeps its contract, check by check.

Used by `merv encoders check`, by `merv.testing.check_encoder`, and in the tests of a plug-in by
`merv.testing.contract_test`. That the authors of plug-ins run the suite is pandas' idea (extension arrays).
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from merv.encoding.base import Encoder, class_fault
from merv.encoding.registry import find_encoder
from merv.testing.side_effects import of_import, put_back, settings
from merv.types import Frames, Grid

TOLERANCE = 1e-3  # of the features' own spread: batched kernels may sum in another order
BFLOAT16_TOLERANCE = 0.25  # the mean, likewise: 24 layers of 8 bits; what is wrong is off by 1 and more
ELSEWHERE = re.compile(r"same device|two (different )?devices|expected device", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    `message` says what came and what was wanted if it failed; or, if it could not be told here, why.
    """

    name: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        if not self.passed:
            return f"FAIL  {self.name}: {self.message}"
        return f"ok    {self.name} ({self.message})" if self.message else f"ok    {self.name}"


class NotTold(Exception):
    """Raised by a check that cannot be made here: not a fault of the encoder."""


def check_encoder(encoder: Encoder | type[Encoder], *, variant: str | None = None) -> list[Finding]:
    """Check that an encoder keeps its contract; a class is created with random weights first.

    Costs about ten passes over one window of frames (two frames of an image encoder) and one more
    interpreter, in which its module is imported. A check that raises has failed, and the others still run.

    >>> from merv import find_encoder
    >>> all(finding.passed for finding in check_encoder(find_encoder("fake")))
    True
    """
    trial = _Trial(encoder, variant)
    created = _finding(CHECKS[0], trial)
    return [created, *(_finding(check, trial) for check in CHECKS[1:])] if created.passed else [created]


def contract_test(encoder: Encoder | type[Encoder] | str, *, variant: str | None = None) -> Callable:
    """A test for pytest, of one case for each check: all that the tests of a plug-in need.

        from merv.testing import contract_test
        test_contract = contract_test("fake", variant="video")

    encoder: a class, an encoder, or what `find_encoder` takes.

    >>> contract_test("fake", variant="video").__name__
    'test_contract'
    """
    import pytest

    @functools.cache
    def trial() -> _Trial:  # made when the first test runs, not when pytest collects
        return _Trial(find_encoder(encoder) if isinstance(encoder, str) else encoder, variant)

    @pytest.mark.parametrize("check", CHECKS, ids=_name)
    def test_contract(check: Check) -> None:
        finding = _finding(check, trial())
        if not finding.passed:
            pytest.fail(finding.message, pytrace=False)

    return test_contract


def _name(check: Check) -> str:
    return check.__name__.strip("_").replace("_", " ")


def _finding(check: Check, trial: _Trial) -> Finding:
    try:
        with torch.enable_grad():  # or nobody would notice a graph
            fault = check(trial)
    except NotTold as reason:
        return Finding(_name(check), True, f"not told: {reason}")
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return Finding(_name(check), not fault, fault or "")


class _Trial:
    """An encoder, two clips for it, and what it makes of them; each computed once."""

    def __init__(self, encoder: Encoder | type[Encoder], variant: str | None) -> None:
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
        return max(2, self.encoder.spec.window or 8 * self.encoder.spec.tubelet)

    def make_frames(self) -> Frames:
        """Two clips [2, T, 3, H, W]: cropped, and of the second only the first half is real."""
        at = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, self.length, 3, *self.encoder.preset.size, generator=at)
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


Check = Callable[[_Trial], "str | None"]


def _far(one: Tensor, other: Tensor) -> str | None:
    """How far two tensors of features are from each other, if further than rounding takes them."""
    if one.shape != other.shape:
        return f"shapes {list(one.shape)} and {list(other.shape)} differ"
    distance = ((one - other).abs().max() / other.std().clamp_min(1e-6)).item()
    return None if distance <= TOLERANCE else f"they differ by {distance:.2g} standard deviations"


# What it is -------------------------------------------------------------------------------


def _is_created(trial: _Trial) -> str | None:
    fault = class_fault(trial.type)
    if not fault:
        _ = trial.encoder
    return fault


def _spec_is_consistent(trial: _Trial) -> str | None:
    spec = trial.encoder.spec
    if spec.frames != spec.grid[0] * spec.tubelet:
        return f"{spec.grid[0]} steps of {spec.tubelet} frames (tubelet) are not {spec.frames} frames"
    for name, preset in spec.presets.items() if spec.patch else ():
        cells = tuple(side // spec.patch for side in preset.size)
        if cells != spec.grid[1:]:
            return f"patches of {spec.patch} make {cells} of preset {name!r}; the grid is {spec.grid[1:]}"
    own = sum(p.numel() for p in trial.encoder.parameters())
    if spec.parameters is not None and not math.isclose(own, spec.parameters, rel_tol=0.01):
        return f"spec.parameters is {spec.parameters}; the encoder has {own}"
    return None


def _is_frozen(trial: _Trial) -> str | None:
    open_ones = [name for name, p in trial.encoder.named_parameters() if p.requires_grad]
    if open_ones:
        return f"{open_ones[0]} requires a gradient; all parameters should be frozen"
    if trial.first.values.requires_grad:
        return "features require a gradient: forward() builds a graph on something that is no parameter"
    return None


def _stays_in_eval_mode(trial: _Trial) -> str | None:
    trial.encoder.train()
    training = [name or "it" for name, module in trial.encoder.named_modules() if module.training]
    return f"{training[0]} is in training mode after .train()" if training else None


# What it makes of frames --------------------------------------------------------------------


def _shape_is_what_the_spec_says(trial: _Trial) -> str | None:
    spec = trial.encoder.spec
    wanted = [2, trial.length // spec.tubelet, *spec.grid[1:], spec.width]
    came = list(trial.grid.values.shape)
    return None if came == wanted else f"features of {trial.length} frames are {came}; wanted {wanted}"


def _features_are_finite(trial: _Trial) -> str | None:
    strange = int((~trial.grid.values.isfinite()).sum())
    return f"{strange} values are NaN or infinite" if strange else None


def _features_depend_on_the_pixels(trial: _Trial) -> str | None:
    same = torch.equal(trial.grid.values[0], trial.grid.values[1])
    return "two different clips have equal features" if same else None


def _is_deterministic(trial: _Trial) -> str | None:
    state = torch.get_rng_state()
    again = trial.run(trial.frames[:1]).values
    if not torch.equal(state, torch.get_rng_state()):
        return "forward() draws random numbers"
    return _far(again, trial.first.values)


def _batch_equals_one_by_one(trial: _Trial) -> str | None:
    second = trial.run(trial.frames[1:])
    return _far(torch.cat([trial.first.values, second.values]), trial.grid.values)


def _windows_are_independent(trial: _Trial) -> str | None:
    if not trial.encoder.spec.window:  # a clip is one window: then its padding must not show
        real = trial.run(Frames.of(trial.frames.pixels[1:, : trial.length // 2])).values
        return _far(real, trial.grid.values[1:, : real.shape[1]])
    both = Frames.of(trial.frames.pixels.flatten(0, 1)[None])  # the two clips as one
    return _far(trial.run(both).values, trial.grid.values.flatten(0, 1)[None])


def _times_pass_through(trial: _Trial) -> str | None:
    came, given = trial.grid.times_s, trial.frames.times_s
    if (came.diff() < 0).any():
        return "times_s do not ascend"
    inside = (came[:, 0] >= given[:, 0]) & (came[:, -1] <= given[:, -1])
    return None if inside.all() else f"times_s {came.tolist()} leave those of the frames {given.tolist()}"


def _mask_passes_through(trial: _Trial) -> str | None:
    real, half = trial.grid.mask
    if not real.all():
        return "cells of a clip without padding are masked"
    if not half[0].all():
        return "cells of real frames are masked"
    if len(half) > 1 and half[-1].any():
        return "cells of padding are not masked"
    return None


def _extent_is_carried(trial: _Trial) -> str | None:
    same = torch.equal(trial.grid.extent, trial.frames.extent)
    return None if same else f"extent is {trial.grid.extent.tolist()}; wanted that of the frames"


def _leaves_its_frames_alone(trial: _Trial) -> str | None:
    _ = trial.grid
    given = vars(trial.make_frames())
    changed = [n for n, was in given.items() if was is not None and not was.equal(getattr(trial.frames, n))]
    return f"forward() changes frames.{changed[0]} in place" if changed else None


# Where it can go ----------------------------------------------------------------------------


def _moves_between_devices(trial: _Trial) -> str | None:
    """On a GPU that need not be there: fake tensors have shapes and devices, but no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    encoder, frames = trial.encoder, trial.frames[:1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = [*encoder.named_parameters(), *encoder.named_buffers()]
        moved = {name: torch.empty_like(tensor, device="cuda") for name, tensor in state}
        if type(encoder).forward is Encoder.forward:  # ours looks into the mask, which fakes do not allow
            frames = replace(frames, pixels=torch.empty_like(frames.pixels, device="cuda"))
        else:
            frames = frames.to("cuda")
    try:
        device = trial.watched(torch.func.functional_call, encoder, moved, (frames,)).values.device
    except Exception as error:
        said = str(error).partition("\n")[0]
        if ELSEWHERE.search(str(error)):
            return (
                f"{said} A tensor that is no parameter stays behind: give it to "
                "register_buffer(), and device=pixels.device to what forward() creates."
            )
        raise NotTold(f"wants a GPU that is there, {type(error).__name__}: {said}") from error
    return None if device.type == "cuda" else f"features of frames on a GPU are on {device}"


def _runs_in_bfloat16(trial: _Trial) -> str | None:
    encoder = copy.deepcopy(trial.encoder).to(torch.bfloat16)
    came, wanted = trial.run(trial.frames[:1].to(torch.bfloat16), encoder).values, trial.first.values
    if came.dtype != torch.bfloat16:
        return f"features of bfloat16 frames are {came.dtype}; a tensor that is no parameter or buffer stays"
    off = ((came.float() - wanted).abs().mean() / wanted.std().clamp_min(1e-6)).item()
    return None if off <= BFLOAT16_TOLERANCE else f"off by {off:.2g} standard deviations on average"


def _pickles_and_copies(trial: _Trial) -> str | None:
    other = copy.deepcopy(pickle.loads(pickle.dumps(trial.encoder)))
    return _far(trial.run(trial.frames[:1], other).values, trial.first.values)


def _state_dict_holds_all(trial: _Trial) -> str | None:
    if trial.encoder.source is not None:  # its network may be built as the source says
        raise NotTold("made of trained weights; check its class")
    other = trial.another()
    other.load_state_dict(trial.encoder.state_dict())
    fault = _far(trial.run(trial.frames[:1], other).values, trial.first.values)
    return fault and f"{fault} in another one that loaded its state dict"


# What it leaves alone -----------------------------------------------------------------------


def _leaves_the_process_alone(trial: _Trial) -> str | None:
    _ = trial.grid
    changed = " and ".join(dict.fromkeys(trial.changed))
    return f"creating or running it changes {changed}" if changed else None


def _import_does_no_work(trial: _Trial) -> str | None:
    found = of_import(trial.type.__module__)
    if found is None:
        raise NotTold(f"another interpreter does not find its module {trial.type.__module__}")
    return f"importing {trial.type.__module__} " + ", ".join(found) if found else None


CHECKS: tuple[Check, ...] = (
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
