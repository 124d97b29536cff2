"""The checks of mixers and projectors."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from merv.fusion.fusion import Fusion
from merv.fusion.mixers import Mixer, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.testing.findings import Check, Checks, CheckSkipped, difference
from merv.types import WHOLE_PICTURE, Grid

EMBED_DIMS = {"a": 8, "b": 12, "c": 6}  # encoder → D
OUTPUT_DIM, GRID = 64, (4, 3, 2)  # L, and (t, h, w)
INPUT_DIM = 24  # D of a projector that is checked alone


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _randomize(module: nn.Module) -> Any:
    """Give all parameters random values, so that zero initialization hides nothing."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * _random(*parameter.shape, seed=number)
    return module.eval()


def _mask() -> Tensor:
    """[B, E, t, h, w]: all encoders see the first clip. In the second one, the last encoder is absent."""
    mask = torch.ones(2, len(EMBED_DIMS), *GRID, dtype=torch.bool)
    mask[1, -1] = False
    mask[1, 0, ..., 0] = False  # the first encoder sees half of each frame
    return mask


class MixerSubject:
    """A mixer, the projected features of two clips, and the mixer's tokens."""

    def __init__(self, mixer: type[Mixer], **options: Any) -> None:
        self.type, self.options = mixer, options
        self.streams = _random(2, len(EMBED_DIMS), *GRID, OUTPUT_DIM)
        self.mask = _mask()

    def create(self) -> Mixer:
        """Create another mixer with its initial weights."""
        return MIXERS.create(self.type, OUTPUT_DIM, len(EMBED_DIMS), **self.options)

    def create_fusion(self) -> Fusion:
        """Create a fusion with such a mixer."""
        return Fusion(EMBED_DIMS, OUTPUT_DIM, self.type, mixer_options=self.options)

    @cached_property
    def module(self) -> Mixer:
        return _randomize(self.create())

    def mix(
        self, mixer: Mixer, streams: Tensor, clips: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix clips: tokens, their mask, weights."""
        question = _random(2, OUTPUT_DIM, seed=9)[clips] if mixer.conditioned else None
        return mixer(streams[clips], self.mask[clips], question)

    def run(self, module: Mixer, clips: slice = slice(None)) -> Tensor:
        """The real tokens of clips, [N, L]."""
        tokens, real, _ = self.mix(module, self.streams, clips)
        return tokens[real]

    @cached_property
    def output(self) -> Tensor:
        with torch.no_grad():
            return self.run(self.module)


class ProjectorSubject:
    """A projector, the features of two clips, and the projector's output."""

    def __init__(self, projector: type[Projector], **options: Any) -> None:
        self.type, self.options = projector, options
        self.features = _random(2, *GRID, INPUT_DIM)

    def create(self) -> Projector:
        """Create another projector with its initial weights."""
        return PROJECTORS.create(self.type, INPUT_DIM, OUTPUT_DIM, **{"norm": True, **self.options})

    def create_fusion(self) -> Fusion:
        """Create a fusion with such projectors."""
        return Fusion(EMBED_DIMS, OUTPUT_DIM, "mean", projector=self.type, projector_options=self.options)

    @cached_property
    def module(self) -> Projector:
        return _randomize(self.create())

    def run(self, module: Projector, clips: slice = slice(None)) -> Tensor:
        """The projected features of clips."""
        return module(self.features[clips])

    @cached_property
    def output(self) -> Tensor:
        with torch.no_grad():
            return self.run(self.module)


Subject = MixerSubject | ProjectorSubject

# Mixers and projectors --------------------------------------------------------------------


def _can_be_created(subject: Subject) -> str | None:
    _ = subject.module
    return None


def _clips_are_independent(subject: Subject) -> str | None:
    with torch.no_grad():
        clips = [subject.run(subject.module, slice(i, i + 1)) for i in range(2)]  # type: ignore[arg-type]
    return difference(torch.cat(clips), subject.output)


def _every_parameter_gets_a_gradient(subject: Subject) -> str | None:
    module: Any = copy.deepcopy(subject.module).train()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise CheckSkipped("it has no trainable parameters")
    output = subject.run(module)
    if output.requires_grad:
        output.square().sum().backward()
    return _missing_gradient(module)


def _missing_gradient(module: nn.Module) -> str | None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            return f"{name} gets no gradient, which stops plain DDP; use the parameter or remove it"
    return None


def _folded_form_equals_the_plain_one(subject: Subject) -> str | None:
    fusion: Fusion = _randomize(subject.create_fusion())
    fusion.token_rms = None  # normalized tokens would hide a wrong scale
    times_s, extent, mask = torch.zeros(2, GRID[0]), torch.tensor(WHOLE_PICTURE).expand(2, -1), _mask()
    grids = {
        name: Grid(_random(2, *GRID, embed_dim, seed=number), times_s, extent, mask[:, number])
        for number, (name, embed_dim) in enumerate(EMBED_DIMS.items())
    }
    question = _random(2, OUTPUT_DIM) if fusion.mixer.conditioned else None
    if not fusion.is_folded:
        raise CheckSkipped("it cannot be folded")
    with torch.no_grad():
        folded = fusion(grids, question)
        fusion.folded = False
        plain = fusion(grids, question)
    return difference(folded.tokens[plain.mask], plain.tokens[plain.mask])


def _can_be_saved(subject: Subject) -> str | None:
    """`Fusion.config` raises if a checkpoint cannot describe the plug-in."""
    subject.create_fusion().config()
    return None


def _state_dict_is_complete(subject: Subject) -> str | None:
    other: Any = subject.create().eval()
    other.load_state_dict(subject.module.state_dict())
    with torch.no_grad():
        fault = difference(subject.run(other), subject.output)
    return fault and f"{fault} after another {type(other).__name__} loads the state dict"


# Mixers -----------------------------------------------------------------------------------


def _output_shapes_are_correct(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        tokens, mask, weights = subject.mix(subject.module, subject.streams)
    t, h, w = GRID
    count = subject.module.num_tokens(t * h * w)
    positions = subject.module.positions(cell_positions(torch.zeros(2, t), h, w))
    for name, tensor, expected in (
        ("tokens", tokens, [2, count, OUTPUT_DIM]),
        ("mask", mask, [2, count]),
        ("positions", positions, [2, count, 3]),
        ("weights", weights, list(subject.mask.shape)),
    ):
        if tensor is not None and list(tensor.shape) != expected:
            return (
                f"expected {name} {expected} for {t * h * w} cells (num_tokens is {count}), "
                f"got {list(tensor.shape)}"
            )
    if not mask.any(dim=1).all():
        return "the mask is False for all tokens of a clip that has features"
    invalid = int((~tokens[mask].isfinite()).sum())
    return f"{invalid} numbers in tokens are NaN or infinite" if invalid else None


def _weights_sum_to_one_over_present_encoders(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        _, _, weights = subject.mix(subject.module, subject.streams)
    if weights is None:
        raise CheckSkipped("it returns no weights")
    if weights[~subject.mask].any():
        return "an encoder has a weight at a cell that it does not see"
    sums = weights.sum(dim=1)[subject.mask.any(dim=1)]
    worst = sums[(sums - 1).abs().argmax()].item()
    return None if abs(worst - 1) < 1e-4 else f"the weights of a cell sum to {worst:.4g} instead of 1"


def _masked_features_are_ignored(subject: MixerSubject) -> str | None:
    noise = 100 * _random(*subject.streams.shape, seed=5)
    streams = torch.where(subject.mask[..., None], subject.streams, noise)
    with torch.no_grad():
        tokens, real, _ = subject.mix(subject.module, streams)
    fault = difference(tokens[real], subject.output)
    return fault and f"features at masked cells change real tokens: {fault}"


def _accepts_a_clip_without_features(subject: MixerSubject) -> str | None:
    """A training step without a video runs the fusion on one cell that no encoder sees."""
    mixer = copy.deepcopy(subject.module).train()
    streams = _random(1, len(EMBED_DIMS), 1, 1, 1, OUTPUT_DIM).requires_grad_()
    question = _random(1, OUTPUT_DIM) if mixer.conditioned else None
    tokens, _, _ = mixer(streams, torch.zeros(streams.shape[:-1], dtype=torch.bool), question)
    (0.0 * tokens.sum()).backward()
    if not tokens.isfinite().all():
        return "tokens are NaN or infinite if the mask is False everywhere"
    for name, parameter in mixer.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name} is NaN or infinite if the mask is False everywhere"
    return _missing_gradient(mixer)


# Projectors -------------------------------------------------------------------------------


def _output_shape_is_correct(subject: ProjectorSubject) -> str | None:
    shape, expected = list(subject.output.shape), [*subject.features.shape[:-1], OUTPUT_DIM]
    if shape != expected:
        return f"expected {expected} for features {list(subject.features.shape)}, got {shape}"
    invalid = int((~subject.output.isfinite()).sum())
    return f"{invalid} projected features are NaN or infinite" if invalid else None


def _scale_can_be_initialized(subject: ProjectorSubject) -> str | None:
    """`Fusion.init_scale` runs before training."""
    projector = subject.create()
    projector.init_scale(0.1)
    return (
        None if subject.run(projector).isfinite().all() else "the output is NaN or infinite after init_scale"
    )


def _shared(shapes: Check) -> dict[Check, tuple[Check, ...]]:
    """The checks of both kinds, which need the check of the output's shape."""
    return {
        _clips_are_independent: (shapes,),
        _every_parameter_gets_a_gradient: (shapes,),
        _folded_form_equals_the_plain_one: (shapes,),
        _can_be_saved: (_can_be_created,),
        _state_dict_is_complete: (shapes,),
    }


MIXER_CHECKS: Checks = {
    _can_be_created: (),
    _output_shapes_are_correct: (_can_be_created,),
    _weights_sum_to_one_over_present_encoders: (_output_shapes_are_correct,),
    _masked_features_are_ignored: (_output_shapes_are_correct,),
    **_shared(_output_shapes_are_correct),
    _accepts_a_clip_without_features: (_every_parameter_gets_a_gradient,),
}
PROJECTOR_CHECKS: Checks = {
    _can_be_created: (),
    _output_shape_is_correct: (_can_be_created,),
    _scale_can_be_initialized: (_can_be_created,),
    **_shared(_output_shape_is_correct),
}
