"""The checks of a mixer and of a projector."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from merv.fusion.fusion import Fusion
from merv.fusion.mixers import Mixer, WeightingMixer, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.testing.findings import CheckSkipped, bfloat16_difference, difference
from merv.types import WHOLE_PICTURE, Grid

WIDTH, ENCODERS, GRID = 64, 3, (4, 3, 2)  # L, E, and (t, h, w)
FEATURES = 24  # D, the input width of a projector
BFLOAT16_TOLERANCE = 0.1


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _randomize(module: nn.Module) -> nn.Module:
    """Give all parameters random values, so that zero initialization hides nothing."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * _random(*parameter.shape, seed=number)
    return module.eval()


def _gradient_fault(module: nn.Module, output: Tensor) -> str | None:
    """Name a parameter that gets no gradient from a sum over the output."""
    module.zero_grad()
    output.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            return f"{name} gets no gradient, which stops plain DDP; use the parameter or remove it"
    return None


# Mixers -----------------------------------------------------------------------------------


class MixerSubject:
    """A mixer, the projected features of two clips, and the mixer's tokens.

    All encoders see the first clip. In the second one the last encoder is absent, and the first encoder sees
    half of each frame.
    """

    def __init__(self, mixer: type[Mixer], **options: Any) -> None:
        self.type, self.options = mixer, options

    def create(self) -> Mixer:
        """Create another mixer with its initial weights."""
        return MIXERS.create(self.type, WIDTH, ENCODERS, **self.options)

    @cached_property
    def mixer(self) -> Mixer:
        return _randomize(self.create())  # type: ignore[return-value]

    @cached_property
    def streams(self) -> Tensor:
        return _random(2, ENCODERS, *GRID, WIDTH)

    @cached_property
    def mask(self) -> Tensor:
        mask = torch.ones(2, ENCODERS, *GRID, dtype=torch.bool)
        mask[1, -1] = False
        mask[1, 0, ..., 0] = False
        return mask

    def run(
        self, mixer: Mixer | None = None, clips: slice = slice(None), streams: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix clips, by default with the mixer under test: tokens, their mask, weights."""
        mixer = mixer or self.mixer
        streams = self.streams if streams is None else streams
        question = _random(2, WIDTH, seed=9)[clips].to(streams) if mixer.conditioned else None
        return mixer(streams[clips], self.mask[clips], question)

    @cached_property
    def output(self) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            return self.run()

    def compare(self, tokens: Tensor) -> str | None:
        """Describe how the real tokens differ from those of `output`."""
        expected, real, _ = self.output
        return difference(tokens[real], expected[real])


def _can_be_created(subject: MixerSubject) -> str | None:
    _ = subject.mixer
    return None


def _output_shapes_are_correct(subject: MixerSubject) -> str | None:
    tokens, mask, weights = subject.output
    t, h, w = GRID
    count = subject.mixer.num_tokens(t * h * w)
    positions = subject.mixer.positions(cell_positions(torch.zeros(2, t), h, w))
    for name, tensor, expected in (
        ("tokens", tokens, [2, count, WIDTH]),
        ("mask", mask, [2, count]),
        ("positions", positions, [2, count, 3]),
    ):
        if list(tensor.shape) != expected:
            return (
                f"expected {name} {expected} for {t * h * w} cells (num_tokens is {count}), "
                f"got {list(tensor.shape)}"
            )
    if mask.dtype != torch.bool:
        return f"expected a mask of torch.bool (True for a real token), got {mask.dtype}"
    if not mask.any(dim=1).all():
        return "the mask is False for all tokens of a clip that has features"
    expected_weights = [2, ENCODERS, *GRID]
    if weights is not None and list(weights.shape) != expected_weights:
        return f"expected weights [B, E, t, h, w] {expected_weights} or None, got {list(weights.shape)}"
    return None


def _accepts_a_single_frame(subject: MixerSubject) -> str | None:
    frame = subject.streams[:1, :, :1]
    question = _random(1, WIDTH) if subject.mixer.conditioned else None
    tokens, _, _ = subject.mixer(frame, torch.ones(frame.shape[:-1], dtype=torch.bool), question)
    expected = subject.mixer.num_tokens(GRID[1] * GRID[2])
    count = tokens.shape[1]
    return None if count == expected else f"expected {expected} tokens for a single frame, got {count}"


def _weights_sum_to_one_over_present_encoders(subject: MixerSubject) -> str | None:
    weights = subject.output[2]
    if weights is None:
        raise CheckSkipped("the mixer returns no weights")
    if weights[~subject.mask].any():
        return "an encoder has a weight at a cell where its mask is False"
    sums = weights.sum(dim=1)[subject.mask.any(dim=1)]
    worst = sums[(sums - 1).abs().argmax()].item()
    return None if abs(worst - 1) < 1e-4 else f"the weights of a cell sum to {worst:.4g} instead of 1"


def _masked_features_are_ignored(subject: MixerSubject) -> str | None:
    noise = 100 * _random(*subject.streams.shape, seed=5)
    streams = torch.where(subject.mask[..., None], subject.streams, noise)
    with torch.no_grad():
        fault = subject.compare(subject.run(streams=streams)[0])
    return fault and f"features at masked cells change real tokens: {fault}"


def _accepts_a_clip_without_features(subject: MixerSubject) -> str | None:
    """A training step without a video runs the fusion on one cell that no encoder sees."""
    mixer = copy.deepcopy(subject.mixer).train()
    mixer.zero_grad()
    streams = _random(1, ENCODERS, 1, 1, 1, WIDTH).requires_grad_()
    question = _random(1, WIDTH) if mixer.conditioned else None
    tokens, _, _ = mixer(streams, torch.zeros(1, ENCODERS, 1, 1, 1, dtype=torch.bool), question)
    (0.0 * tokens.float().sum()).backward()
    if not tokens.isfinite().all():
        return "tokens are NaN or infinite if the mask is False everywhere"
    for name, parameter in mixer.named_parameters():
        if parameter.grad is None:
            return f"{name} gets no gradient if the mask is False everywhere, which stops plain DDP"
        if not parameter.grad.isfinite().all():
            return f"the gradient of {name} is NaN or infinite if the mask is False everywhere"
    return None


def _clips_are_independent(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        tokens = [subject.run(clips=slice(i, i + 1))[0] for i in range(2)]
    return subject.compare(torch.cat(tokens))


def _every_parameter_gets_a_gradient(subject: MixerSubject) -> str | None:
    mixer = copy.deepcopy(subject.mixer).train()
    return _gradient_fault(mixer, subject.run(mixer, streams=subject.streams.clone().requires_grad_())[0])


def _folded_form_equals_the_plain_one(subject: MixerSubject) -> str | None:
    mixer = subject.mixer
    if not isinstance(mixer, WeightingMixer) or not mixer.foldable:
        raise CheckSkipped("the mixer is more than a weighted sum and is never folded")
    return _folding_fault(Fusion({"a": 8, "b": 12, "c": 6}, WIDTH, mixer), subject.mask)


def _folding_fault(fusion: Fusion, mask: Tensor) -> str | None:
    """Describe how a fusion's folded tokens differ from its plain ones; mask: [B, E, t, h, w]."""
    fusion.eval()
    grids = {
        name: Grid(
            _random(2, *GRID, cast(Projector, projector).input_dim, seed=number),
            torch.zeros(2, GRID[0]),
            torch.tensor(WHOLE_PICTURE).expand(2, -1),
            mask[:, number],
        )
        for number, (name, projector) in enumerate(fusion.projectors.items())
    }
    question = _random(2, WIDTH) if fusion.mixer.conditioned else None
    with torch.no_grad():
        folded = fusion(grids, question)
        fusion.folded = False
        plain = fusion(grids, question)
    return difference(folded.tokens[plain.mask], plain.tokens[plain.mask])


def _accepts_another_encoder(subject: MixerSubject) -> str | None:
    mixer = copy.deepcopy(subject.mixer)
    if mixer.per_encoder_parameters is None:
        raise CheckSkipped("per_encoder_parameters is None")
    mixer.add_encoder()
    absent = torch.zeros_like(subject.streams[:, :1])
    mask = torch.cat([subject.mask, torch.zeros_like(subject.mask[:, :1])], dim=1)
    question = _random(2, WIDTH, seed=9) if mixer.conditioned else None
    with torch.no_grad():
        tokens, real, _ = mixer(torch.cat([subject.streams, absent], dim=1), mask, question)
    return difference(tokens[real], subject.output[0][subject.output[1]])


def _runs_in_bfloat16(subject: MixerSubject) -> str | None:
    mixer = copy.deepcopy(subject.mixer).to(torch.bfloat16)
    with torch.no_grad():
        tokens = subject.run(mixer, streams=subject.streams.to(torch.bfloat16))[0]
    expected, real, _ = subject.output
    return bfloat16_difference(tokens[real], expected[real], BFLOAT16_TOLERANCE)


def _can_be_saved(subject: MixerSubject) -> str | None:
    """`Fusion.config` raises if a checkpoint cannot describe the mixer."""
    Fusion({"a": 8, "b": 12}, WIDTH, subject.type, mixer_options=subject.options).config()
    return None


def _can_be_pickled_and_copied(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        return subject.compare(subject.run(copy.deepcopy(pickle.loads(pickle.dumps(subject.mixer))))[0])


def _state_dict_is_complete(subject: MixerSubject) -> str | None:
    other = subject.create().eval()
    other.load_state_dict(subject.mixer.state_dict())
    with torch.no_grad():
        fault = subject.compare(subject.run(other)[0])
    return fault and f"{fault} after another mixer loads the state dict"


MIXER_CHECKS: tuple[Callable[[MixerSubject], str | None], ...] = (
    _can_be_created,
    _output_shapes_are_correct,
    _accepts_a_single_frame,
    _weights_sum_to_one_over_present_encoders,
    _masked_features_are_ignored,
    _accepts_a_clip_without_features,
    _clips_are_independent,
    _every_parameter_gets_a_gradient,
    _folded_form_equals_the_plain_one,
    _accepts_another_encoder,
    _runs_in_bfloat16,
    _can_be_saved,
    _can_be_pickled_and_copied,
    _state_dict_is_complete,
)


# Projectors -------------------------------------------------------------------------------


class ProjectorSubject:
    """A projector, features, and the projector's output."""

    def __init__(self, projector: type[Projector], **options: Any) -> None:
        self.type, self.options = projector, options

    def create(self) -> Projector:
        """Create another projector with its initial weights."""
        return PROJECTORS.create(self.type, FEATURES, WIDTH, **{"norm": True, **self.options})

    def create_fusion(self) -> Fusion:
        """Create a fusion of two encoders, each with such a projector."""
        embed_dims = {"a": 8, "b": 12}
        return Fusion(embed_dims, WIDTH, "mean", projector=self.type, projector_options=self.options)

    @cached_property
    def projector(self) -> Projector:
        return _randomize(self.create())  # type: ignore[return-value]

    @cached_property
    def features(self) -> Tensor:
        return _random(2, *GRID, FEATURES)

    @cached_property
    def output(self) -> Tensor:
        with torch.no_grad():
            return self.projector(self.features)


def _projector_can_be_created(subject: ProjectorSubject) -> str | None:
    _ = subject.projector
    PROJECTORS.create(subject.type, FEATURES, WIDTH, **{**subject.options, "norm": False})
    return None


def _output_shape_is_correct(subject: ProjectorSubject) -> str | None:
    shape, expected = list(subject.output.shape), [*subject.features.shape[:-1], WIDTH]
    if shape == expected:
        return None
    return f"expected {expected} for features {list(subject.features.shape)}, got {shape}"


def _vectors_are_independent(subject: ProjectorSubject) -> str | None:
    with torch.no_grad():
        return difference(subject.projector(subject.features[0, 0]), subject.output[0, 0])


def _scale_to_sets_the_scale(subject: ProjectorSubject) -> str | None:
    projector, scales = subject.create(), []
    for rms in (0.05, 0.1):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            projector.scale_to(rms)
            scales.append(projector(subject.features).square().mean().sqrt().item())
    ratio = scales[1] / scales[0] if scales[0] else 0.0
    if 1.8 < ratio < 2.2:
        return None
    return (
        f"after scale_to(0.1) tokens should be twice as large as after scale_to(0.05), got {ratio:.2g} times"
    )


def _every_projector_parameter_gets_a_gradient(subject: ProjectorSubject) -> str | None:
    projector = copy.deepcopy(subject.projector).train()
    return _gradient_fault(projector, projector(subject.features.clone().requires_grad_()))


def _folded_projections_equal_plain_ones(subject: ProjectorSubject) -> str | None:
    if not subject.projector.foldable:
        raise CheckSkipped("the projector has its own forward() or last layer and is never folded")
    fusion = subject.create_fusion()
    _randomize(fusion)
    return _folding_fault(fusion, torch.ones(2, 2, *GRID, dtype=torch.bool))


def _projects_bfloat16(subject: ProjectorSubject) -> str | None:
    projector = copy.deepcopy(subject.projector).to(torch.bfloat16)
    with torch.no_grad():
        output = projector(subject.features.to(torch.bfloat16))
    return bfloat16_difference(output, subject.output, BFLOAT16_TOLERANCE)


def _projector_can_be_saved(subject: ProjectorSubject) -> str | None:
    """`Fusion.config` raises if a checkpoint cannot describe the projector."""
    subject.create_fusion().config()
    return None


def _projector_can_be_pickled_and_copied(subject: ProjectorSubject) -> str | None:
    other = copy.deepcopy(pickle.loads(pickle.dumps(subject.projector)))
    with torch.no_grad():
        return difference(other(subject.features), subject.output)


def _projector_state_dict_is_complete(subject: ProjectorSubject) -> str | None:
    other = subject.create().eval()
    other.load_state_dict(subject.projector.state_dict())
    with torch.no_grad():
        fault = difference(other(subject.features), subject.output)
    return fault and f"{fault} after another projector loads the state dict"


PROJECTOR_CHECKS: tuple[Callable[[ProjectorSubject], str | None], ...] = (
    _projector_can_be_created,
    _output_shape_is_correct,
    _vectors_are_independent,
    _scale_to_sets_the_scale,
    _every_projector_parameter_gets_a_gradient,
    _folded_projections_equal_plain_ones,
    _projects_bfloat16,
    _projector_can_be_saved,
    _projector_can_be_pickled_and_copied,
    _projector_state_dict_is_complete,
)
