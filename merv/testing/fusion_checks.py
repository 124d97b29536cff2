"""What holds of a mixer and of a projector that keep their contracts, check by check."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from merv.errors import CheckpointError
from merv.fusion.fusion import Fusion
from merv.fusion.mixers import Mixer, WeightingMixer, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.testing.findings import CheckSkipped, far
from merv.types import WHOLE_PICTURE, Grid

WIDTH, ENCODERS, GRID = 64, 3, (4, 3, 2)  # L, E, and t, h, w
FEATURES = 24  # D of a projector
BFLOAT16_TOLERANCE = 0.1  # the mean distance, of the tokens' spread


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_random_weights(module: nn.Module) -> nn.Module:
    """Its parameters drawn anew: what starts at zero would hide what it does."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * _random(*parameter.shape, seed=number)
    return module.eval()


def _without_gradient(module: nn.Module, out: Tensor) -> list[str]:
    """Parameters that a sum over `out` gives no gradient; plain DDP stops at those."""
    module.zero_grad()
    out.float().square().sum().backward()
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


class MixerSubject:
    """A mixer, streams of two clips for it, and what it makes of them.

    In the first clip all is there; in the second the last encoder is absent, the first sees a half.
    """

    def __init__(self, mixer: type[Mixer], **options: Any) -> None:
        self.type, self.options = mixer, options

    def another(self) -> Mixer:
        """One more, with the weights that it is created with."""
        return MIXERS.create(self.type, WIDTH, ENCODERS, **self.options)

    @cached_property
    def mixer(self) -> Mixer:
        return _with_random_weights(self.another())  # type: ignore[return-value]

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
        """What the mixer, or another one, makes of clips."""
        mixer = mixer or self.mixer
        streams = self.streams if streams is None else streams
        question = _random(2, WIDTH, seed=9)[clips].to(streams) if mixer.conditioned else None
        return mixer(streams[clips], self.mask[clips], question)

    @cached_property
    def made(self) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            return self.run()

    def compare(self, tokens: Tensor, clips: slice = slice(None)) -> str | None:
        """How far tokens are from what was made first, where they are real."""
        real = self.made[1][clips]
        return far(tokens[real], self.made[0][clips][real])


def _is_created(subject: MixerSubject) -> str | None:
    _ = subject.mixer
    return None


def _makes_what_it_says(subject: MixerSubject) -> str | None:
    tokens, mask, weights = subject.made
    t, h, w = GRID
    count = subject.mixer.num_tokens(t * h * w)
    positions = subject.mixer.positions(cell_positions(torch.zeros(2, t), h, w))
    wanted = {"tokens": [2, count, WIDTH], "mask": [2, count], "positions": [2, count, 3]}
    came = {"tokens": list(tokens.shape), "mask": list(mask.shape), "positions": list(positions.shape)}
    for name, shape in came.items():
        if shape != wanted[name]:
            return f"{name} of {t * h * w} cells are {shape}; wanted {wanted[name]} (num_tokens is {count})"
    if not mask.any(dim=1).all():
        return "no token of a clip with features is real: the mask is False everywhere"
    if mask.dtype != torch.bool:
        return f"the mask is {mask.dtype}; wanted torch.bool, True for a real token"
    if weights is not None and list(weights.shape) != [2, ENCODERS, *GRID]:
        return f"weights are {list(weights.shape)}; wanted [B, E, t, h, w] {[2, ENCODERS, *GRID]}, or None"
    return None


def _takes_stills(subject: MixerSubject) -> str | None:
    still = subject.streams[:1, :, :1]
    question = _random(1, WIDTH) if subject.mixer.conditioned else None
    tokens, _, _ = subject.mixer(still, torch.ones(still.shape[:-1], dtype=torch.bool), question)
    wanted = subject.mixer.num_tokens(GRID[1] * GRID[2])
    return None if tokens.shape[1] == wanted else f"a still has {tokens.shape[1]} tokens; wanted {wanted}"


def _weights_sum_to_one_over_present_encoders(subject: MixerSubject) -> str | None:
    weights = subject.made[2]
    if weights is None:
        raise CheckSkipped("it has no weights")
    if weights[~subject.mask].any():
        return "an encoder that is absent at a cell has a weight there"
    total = weights.sum(dim=1)[subject.mask.any(dim=1)]
    off = (total - 1).abs().max().item()
    return None if off < 1e-4 else f"the weights of a cell sum to {1 + off:.4g} or {1 - off:.4g}; wanted 1"


def _what_is_masked_does_not_count(subject: MixerSubject) -> str | None:
    streams = torch.where(
        subject.mask[..., None], subject.streams, 100 * _random(*subject.streams.shape, seed=5)
    )
    with torch.no_grad():
        fault = subject.compare(subject.run(streams=streams)[0])
    return fault and f"other features in masked cells change real tokens: {fault}"


def _learns_nothing_where_nothing_is_seen(subject: MixerSubject) -> str | None:
    """As in a training step without a video, which runs the fusion on a cell that no encoder sees."""
    mixer = copy.deepcopy(subject.mixer).train()
    mixer.zero_grad()
    streams = _random(1, ENCODERS, 1, 1, 1, WIDTH).requires_grad_()
    question = _random(1, WIDTH) if mixer.conditioned else None
    tokens, _, _ = mixer(streams, torch.zeros(1, ENCODERS, 1, 1, 1, dtype=torch.bool), question)
    (0.0 * tokens.float().sum()).backward()
    if not tokens.isfinite().all():
        return "tokens of a clip that no encoder sees are not finite"
    for name, parameter in mixer.named_parameters():
        if parameter.grad is None:
            return f"{name} gets no gradient from a clip that no encoder sees, where plain DDP stops"
        if not parameter.grad.isfinite().all():
            return f"the gradient of {name} from a clip that no encoder sees is not finite"
    return None


def _batch_equals_one_by_one(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        ones = [subject.run(clips=slice(i, i + 1))[0] for i in range(2)]
    return subject.compare(torch.cat(ones))


def _is_deterministic(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        return subject.compare(subject.run()[0])


def _every_parameter_has_a_gradient(subject: MixerSubject) -> str | None:
    mixer = copy.deepcopy(subject.mixer).train()
    missing = _without_gradient(
        mixer, subject.run(mixer, streams=subject.streams.clone().requires_grad_())[0]
    )
    return (
        f"{missing[0]} gets no gradient, where plain DDP stops; leave it out or use it" if missing else None
    )


def _folded_equals_plain(subject: MixerSubject) -> str | None:
    mixer = subject.mixer
    if not isinstance(mixer, WeightingMixer) or not mixer.foldable:
        raise CheckSkipped("it is more than a weighted sum, and so is never folded")
    return _folding_fault(Fusion({"a": 8, "b": 12, "c": 6}, WIDTH, mixer), subject.mask)


def _folding_fault(fusion: Fusion, mask: Tensor) -> str | None:
    """How far a fusion's folded tokens are from its plain ones; mask: [B, E, t, h, w]."""
    fusion.eval()
    grids = {
        name: Grid(
            _random(2, *GRID, cast(Projector, projector).features, seed=number),
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
    return far(folded.tokens[plain.mask], plain.tokens[plain.mask])


def _takes_in_another_encoder(subject: MixerSubject) -> str | None:
    mixer = copy.deepcopy(subject.mixer)
    if mixer.per_encoder_parameters is None:
        raise CheckSkipped("it says that it cannot")
    mixer.add_encoder()
    absent = torch.zeros_like(subject.streams[:, :1])
    mask = torch.cat([subject.mask, torch.zeros_like(subject.mask[:, :1])], dim=1)
    question = _random(2, WIDTH, seed=9) if mixer.conditioned else None
    with torch.no_grad():
        tokens, real, _ = mixer(torch.cat([subject.streams, absent], dim=1), mask, question)
    return far(tokens[real], subject.made[0][subject.made[1]])


def _runs_in_bfloat16(subject: MixerSubject) -> str | None:
    mixer = copy.deepcopy(subject.mixer).to(torch.bfloat16)
    with torch.no_grad():
        tokens = subject.run(mixer, streams=subject.streams.to(torch.bfloat16))[0]
    real = subject.made[1]
    return _bfloat16_fault(tokens[real], subject.made[0][real])


def _bfloat16_fault(tokens: Tensor, wanted: Tensor) -> str | None:
    if tokens.dtype != torch.bfloat16:
        return f"tokens of bfloat16 features are {tokens.dtype}"
    off = ((tokens.float() - wanted).abs().mean() / wanted.std().clamp_min(1e-6)).item()
    return None if off <= BFLOAT16_TOLERANCE else f"off by {off:.2g} standard deviations on average"


def _is_saved(subject: MixerSubject) -> str | None:
    """What a checkpoint says of it makes it again."""
    return _saving_fault(Fusion({"a": 8, "b": 12}, WIDTH, subject.type, mixer_options=subject.options))


def _saving_fault(fusion: Fusion) -> str | None:
    try:
        fusion.config()
    except CheckpointError as error:
        return str(error)
    return None


def _pickles_and_copies(subject: MixerSubject) -> str | None:
    with torch.no_grad():
        return subject.compare(subject.run(copy.deepcopy(pickle.loads(pickle.dumps(subject.mixer))))[0])


def _state_dict_holds_all(subject: MixerSubject) -> str | None:
    other = subject.another().eval()
    other.load_state_dict(subject.mixer.state_dict())
    with torch.no_grad():
        fault = subject.compare(subject.run(other)[0])
    return fault and f"{fault} in another one that loaded its state dict"


MIXER_CHECKS: tuple[Callable[[MixerSubject], str | None], ...] = (
    _is_created,
    _makes_what_it_says,
    _takes_stills,
    _weights_sum_to_one_over_present_encoders,
    _what_is_masked_does_not_count,
    _learns_nothing_where_nothing_is_seen,
    _batch_equals_one_by_one,
    _is_deterministic,
    _every_parameter_has_a_gradient,
    _folded_equals_plain,
    _takes_in_another_encoder,
    _runs_in_bfloat16,
    _is_saved,
    _pickles_and_copies,
    _state_dict_holds_all,
)


# Projectors -----------------------------------------------------------------------------------


class ProjectorSubject:
    """A projector, features for it, and what it makes of them."""

    def __init__(self, projector: type[Projector], **options: Any) -> None:
        self.type, self.options = projector, options

    def another(self) -> Projector:
        """One more, with the weights that it is created with."""
        return PROJECTORS.create(self.type, FEATURES, WIDTH, **{"norm": True, **self.options})

    def fusion(self) -> Fusion:
        """The mean of two encoders, each with such a projector."""
        widths = {"a": 8, "b": 12}
        return Fusion(widths, WIDTH, "mean", projector=self.type, projector_options=self.options)

    @cached_property
    def projector(self) -> Projector:
        return _with_random_weights(self.another())  # type: ignore[return-value]

    @cached_property
    def features(self) -> Tensor:
        return _random(2, *GRID, FEATURES)

    @cached_property
    def made(self) -> Tensor:
        with torch.no_grad():
            return self.projector(self.features)


def _projector_is_created(subject: ProjectorSubject) -> str | None:
    _ = subject.projector
    PROJECTORS.create(subject.type, FEATURES, WIDTH, **{**subject.options, "norm": False})
    return None


def _shape_is_that_of_the_features(subject: ProjectorSubject) -> str | None:
    came, wanted = list(subject.made.shape), [*subject.features.shape[:-1], WIDTH]
    return (
        None if came == wanted else f"features {list(subject.features.shape)} become {came}; wanted {wanted}"
    )


def _each_vector_is_projected_alone(subject: ProjectorSubject) -> str | None:
    with torch.no_grad():
        return far(subject.projector(subject.features[0, 0]), subject.made[0, 0])


def _follows_the_scale_asked_for(subject: ProjectorSubject) -> str | None:
    other, sizes = subject.another(), []
    for rms in (0.05, 0.1):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            other.scale_to(rms)
            sizes.append(other(subject.features).square().mean().sqrt().item())
    ratio = sizes[1] / sizes[0] if sizes[0] else 0.0
    return (
        None if 1.8 < ratio < 2.2 else f"scale_to(0.1) makes tokens {ratio:.2g} times those of scale_to(0.05)"
    )


def _all_its_parameters_have_a_gradient(subject: ProjectorSubject) -> str | None:
    projector = copy.deepcopy(subject.projector).train()
    missing = _without_gradient(projector, projector(subject.features.clone().requires_grad_()))
    return (
        f"{missing[0]} gets no gradient, where plain DDP stops; leave it out or use it" if missing else None
    )


def _folded_projections_equal_plain_ones(subject: ProjectorSubject) -> str | None:
    if not subject.projector.foldable:
        raise CheckSkipped("it has a forward or a last layer of its own, and so is never folded")
    fusion = subject.fusion()
    _with_random_weights(fusion)
    return _folding_fault(fusion, torch.ones(2, 2, *GRID, dtype=torch.bool))


def _projects_bfloat16(subject: ProjectorSubject) -> str | None:
    with torch.no_grad():
        came = copy.deepcopy(subject.projector).to(torch.bfloat16)(subject.features.to(torch.bfloat16))
    return _bfloat16_fault(came, subject.made)


def _can_be_saved(subject: ProjectorSubject) -> str | None:
    """What a checkpoint says of it makes it again."""
    return _saving_fault(subject.fusion())


def _is_pickled_and_copied(subject: ProjectorSubject) -> str | None:
    other = copy.deepcopy(pickle.loads(pickle.dumps(subject.projector)))
    with torch.no_grad():
        return far(other(subject.features), subject.made)


def _all_is_in_its_state_dict(subject: ProjectorSubject) -> str | None:
    other = subject.another().eval()
    other.load_state_dict(subject.projector.state_dict())
    with torch.no_grad():
        fault = far(other(subject.features), subject.made)
    return fault and f"{fault} in another one that loaded its state dict"


PROJECTOR_CHECKS: tuple[Callable[[ProjectorSubject], str | None], ...] = (
    _projector_is_created,
    _shape_is_that_of_the_features,
    _each_vector_is_projected_alone,
    _follows_the_scale_asked_for,
    _all_its_parameters_have_a_gradient,
    _folded_projections_equal_plain_ones,
    _projects_bfloat16,
    _can_be_saved,
    _is_pickled_and_copied,
    _all_is_in_its_state_dict,
)
