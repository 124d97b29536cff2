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
from merv.testing.results import Check, Checks, CheckSkipped, require, require_equal, require_finite
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


class Subject:
    """A plug-in; one with random weights, `module`; and what that computes for two clips, `output`."""

    def __init__(self, plugin: type, **options: Any) -> None:
        self.type, self.options = plugin, options

    def create(self) -> Any:
        """Create another mixer or projector with its initial weights."""
        raise NotImplementedError

    def create_fusion(self) -> Fusion:
        """Create a fusion with the plug-in."""
        raise NotImplementedError

    def run(self, module: Any, clips: slice = slice(None)) -> Tensor:
        """The output for clips."""
        raise NotImplementedError

    @cached_property
    def module(self) -> Any:
        return _randomize(self.create())

    @cached_property
    def output(self) -> Tensor:
        return self.run(self.module)


class MixerSubject(Subject):
    """A mixer, and the projected features of two clips. The output has the real tokens, [N, L]."""

    def __init__(self, mixer: type[Mixer], **options: Any) -> None:
        super().__init__(mixer, **options)
        self.streams, self.mask = _random(2, len(EMBED_DIMS), *GRID, OUTPUT_DIM), _mask()

    def create(self) -> Mixer:
        return MIXERS.create(self.type, OUTPUT_DIM, len(EMBED_DIMS), **self.options)

    def create_fusion(self) -> Fusion:
        return Fusion(EMBED_DIMS, OUTPUT_DIM, self.type, mixer_options=self.options)

    def mix(
        self, mixer: Mixer, streams: Tensor, clips: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix clips: tokens, their mask, weights."""
        question = _random(2, OUTPUT_DIM, seed=9)[clips] if mixer.conditioned else None
        with torch.set_grad_enabled(mixer.training):  # modules that keep a graph cannot be copied
            return mixer(streams[clips], self.mask[clips], question)

    def run(self, module: Mixer, clips: slice = slice(None)) -> Tensor:
        tokens, real, _ = self.mix(module, self.streams, clips)
        return tokens[real]


class ProjectorSubject(Subject):
    """A projector, and the features of two clips."""

    def __init__(self, projector: type[Projector], **options: Any) -> None:
        super().__init__(projector, **options)
        self.features = _random(2, *GRID, INPUT_DIM)

    def create(self) -> Projector:
        return PROJECTORS.create(self.type, INPUT_DIM, OUTPUT_DIM, **{"norm": True, **self.options})

    def create_fusion(self) -> Fusion:
        return Fusion(EMBED_DIMS, OUTPUT_DIM, "mean", projector=self.type, projector_options=self.options)

    def run(self, module: Projector, clips: slice = slice(None)) -> Tensor:
        with torch.set_grad_enabled(module.training):
            return module(self.features[clips])


# Mixers and projectors --------------------------------------------------------------------


def _can_be_created(subject: Subject) -> None:
    _ = subject.module


def _clips_are_independent(subject: Subject) -> None:
    clips = [subject.run(subject.module, slice(i, i + 1)) for i in range(2)]
    require_equal(torch.cat(clips), subject.output)


def _every_parameter_gets_a_gradient(subject: Subject) -> None:
    module = copy.deepcopy(subject.module).train()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise CheckSkipped("it has no trainable parameters")
    output = subject.run(module)
    if output.requires_grad:
        output.square().sum().backward()
    _require_gradients(module)


def _require_gradients(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        require(
            not parameter.requires_grad or parameter.grad is not None,
            f"{name} gets no gradient, which stops plain DDP; use the parameter or remove it",
        )


def _folded_form_equals_the_plain_one(subject: Subject) -> None:
    """In eval mode, `Fusion` may mix before it projects ("folded"). Both ways must give the same tokens."""
    fusion: Fusion = _randomize(subject.create_fusion())
    fusion.token_rms = None  # normalized tokens would hide a wrong scale
    times_s, extent, mask = torch.zeros(2, GRID[0]), torch.tensor(WHOLE_PICTURE).expand(2, -1), _mask()
    grids = {
        name: Grid(_random(2, *GRID, embed_dim, seed=number), times_s, extent, mask[:, number])
        for number, (name, embed_dim) in enumerate(EMBED_DIMS.items())
    }
    question = _random(2, OUTPUT_DIM) if fusion.mixer.conditioned else None
    if not fusion.is_folded:
        raise CheckSkipped("it always projects before it mixes")
    folded = fusion(grids, question)
    fusion.folded = False
    plain = fusion(grids, question)
    require_equal(folded.tokens[plain.mask], plain.tokens[plain.mask])


def _can_be_saved(subject: Subject) -> None:
    """`Fusion.config` raises if a checkpoint cannot describe the plug-in."""
    subject.create_fusion().config()


def _state_dict_is_complete(subject: Subject) -> None:
    other = subject.create().eval()
    other.load_state_dict(subject.module.state_dict())
    require_equal(
        subject.run(other), subject.output, f" after another {type(other).__name__} loads the state dict"
    )


# Mixers -----------------------------------------------------------------------------------


def _output_shapes_are_correct(subject: MixerSubject) -> None:
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
        shape = expected if tensor is None else list(tensor.shape)
        cells = f"{t * h * w} cells (num_tokens is {count})"
        require(shape == expected, f"expected {name} {expected} for {cells}, got {shape}")
    require(mask.any(dim=1).all(), "the mask is False for all tokens of a clip that has features")
    require_finite(tokens[mask], "numbers in tokens")


def _weights_sum_to_one_over_present_encoders(subject: MixerSubject) -> None:
    _, _, weights = subject.mix(subject.module, subject.streams)
    if weights is None:
        raise CheckSkipped("it returns no weights")
    require(not weights[~subject.mask].any(), "an encoder has a weight at a cell that it does not see")
    sums = weights.sum(dim=1)[subject.mask.any(dim=1)]
    worst = sums[(sums - 1).abs().argmax()].item()
    require(abs(worst - 1) < 1e-4, f"the weights of a cell sum to {worst:.4g} instead of 1")


def _masked_features_are_ignored(subject: MixerSubject) -> None:
    noise = 100 * _random(*subject.streams.shape, seed=5)
    streams = torch.where(subject.mask[..., None], subject.streams, noise)
    tokens, real, _ = subject.mix(subject.module, streams)
    require_equal(tokens[real], subject.output, " if the features at masked cells change")


def _an_added_encoder_has_the_shapes_of_the_constructor(subject: MixerSubject) -> None:
    """A model is saved with its number of encoders, and created again with it."""
    mixer = MIXERS.create(subject.type, OUTPUT_DIM, len(EMBED_DIMS) - 1, **subject.options)
    if mixer.per_encoder_parameters is None:
        raise CheckSkipped("no encoder can be added to it")
    mixer.add_encoder()
    added, created = ({n: list(t.shape) for n, t in m.state_dict().items()} for m in (mixer, subject.module))
    require(added == created, f"after add_encoder(), its tensors are {added} instead of {created}")


def _accepts_a_clip_without_features(subject: MixerSubject) -> None:
    """A training step without a video runs the fusion on one cell that no encoder sees."""
    mixer = copy.deepcopy(subject.module).train()
    streams = _random(1, len(EMBED_DIMS), 1, 1, 1, OUTPUT_DIM).requires_grad_()
    question = _random(1, OUTPUT_DIM) if mixer.conditioned else None
    tokens, _, _ = mixer(streams, torch.zeros(streams.shape[:-1], dtype=torch.bool), question)
    (0.0 * tokens.sum()).backward()
    require_finite(tokens, "numbers in tokens of a clip that no encoder sees")
    for name, parameter in mixer.named_parameters():
        if parameter.grad is not None:
            require_finite(parameter.grad, f"gradients of {name}, for a clip that no encoder sees,")
    _require_gradients(mixer)


# Projectors -------------------------------------------------------------------------------


def _output_shape_is_correct(subject: ProjectorSubject) -> None:
    shape, expected = list(subject.output.shape), [*subject.features.shape[:-1], OUTPUT_DIM]
    require(
        shape == expected, f"expected {expected} for features {list(subject.features.shape)}, got {shape}"
    )
    require_finite(subject.output, "projected features")


def _scale_can_be_initialized(subject: ProjectorSubject) -> None:
    """`Fusion.init_scale` runs before training."""
    projector = subject.create()
    projector.init_scale(0.1)
    require_finite(subject.run(projector), "projected features, after init_scale,")


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
    _an_added_encoder_has_the_shapes_of_the_constructor: (_can_be_created,),
}
PROJECTOR_CHECKS: Checks = {
    _can_be_created: (),
    _output_shape_is_correct: (_can_be_created,),
    _scale_can_be_initialized: (_can_be_created,),
    **_shared(_output_shape_is_correct),
}
