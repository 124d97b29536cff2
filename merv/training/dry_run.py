"""Dry: one step of training on tensors that have shapes and no numbers, to count what it takes.

The model is built on the meta device and then run, forwards, backwards and through the optimizer,
by the very code that trains, on torch's fake tensors. So nothing is estimated by formula: FLOPs
are those of every matrix product, convolution and attention; memory is that of every tensor, from
the moment it is made until nothing holds it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from merv.encoding.base import Encoder
from merv.encoding.windows import FRAMES_AT_ONCE
from merv.models.packing import Packed
from merv.types import WHOLE_PICTURE, Grid
from merv.utils.torch_modules import device_and_dtype

OPTIMIZER = "optimizer"
FORWARD, BACKWARD, ENCODE = "forward", "backward", "encode"


@dataclass(frozen=True)
class BatchShape:
    """What one pass through the model is fed: the sizes of a batch.

    videos: with a full grid; stills: with one step of time. rows, length: of what the language model
    reads, B and S. answers: places K at which a row may have a token to learn. visual: places in all
    rows that hold a visual token. padded: whether rows differ in length. shared: whether one holds more
    than one conversation.
    """

    videos: int
    rows: int
    length: int
    answers: int
    visual: int
    stills: int = 0
    padded: bool = True
    shared: bool = False


@dataclass
class Cost:
    """What a step took. flops: by phase. peaks: most bytes alive in each phase. held: bytes alive between
    steps: weights, gradients kept, states of the optimizer."""

    flops: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    held: int = 0

    @property
    def peak(self) -> int:
        """Most bytes that are ever alive."""
        return max(self.peaks.values())


class Meter(TorchDispatchMode):
    """Counts `flops`, and the bytes of all tensors that are alive: `now`, and their `peak`.

    torch's FlopCounterMode, whose formulas these are, keeps the tensors of modules alive.

    >>> with Meter() as meter:
    ...     kept = torch.ones(10, 100) @ torch.ones(100, 10)
    >>> meter.now, meter.peak, meter.flops
    (400, 8400, 20000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if formula := flop_registry.get(function.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that is there already; views of what is counted add nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def to_fake_tensors(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake ones on the CPU, in place; inside a FakeTensorMode.

    What was shared by two modules stays shared.
    """
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    table[name] = made[id(tensor)]  # type: ignore[assignment]


def dry_step(
    training: Any,
    shape: BatchShape,
    *,
    encode: bool,
    accumulate: int = 1,
    autocast: bool = False,
    gpu: bool = False,
) -> Cost:
    """One micro-batch of `training`, and the optimizer's step; its model becomes one without numbers.

    training: a `merv.training.module.Training` whose `model` is on the meta device.
    encode: whether the encoders run in the step. accumulate: micro-batches a step of the optimizer.
    autocast: to bf16, as Lightning's `bf16-mixed`. gpu: the optimizer's step takes all tensors at once.
    """
    cost, meter = Cost(), Meter()
    model = training.model
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about devices that fake tensors do not have
        to_fake_tensors(model)
        training.train()
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(training.parameter_groups(), foreach=gpu)
        with meter:
            _set_gradients(trained)  # those of the step before, which made the optimizer's states too
            optimizer.step()
        with cast:
            with _phase(cost, meter, ENCODE):
                features = _features(model, shape, meter, encode)
            with _phase(cost, meter, FORWARD):
                loss = _loss(model, features, shape)
        del features
        with _phase(cost, meter, BACKWARD):
            if accumulate == 1:
                optimizer.zero_grad()  # Lightning does it between the two
            loss.backward()
            del loss
        with _phase(cost, meter, OPTIMIZER):
            optimizer.step()
        cost.held = meter.now
    return cost


@contextmanager
def _phase(cost: Cost, meter: Meter, name: str) -> Iterator[None]:
    meter.peak, meter.flops = meter.now, 0
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel that no formula knows
    try:
        with meter:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    cost.flops[name], cost.peaks[name] = meter.flops, meter.peak


def _set_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


# The path ---------------------------------------------------------------------------------------


def _features(model: Any, shape: BatchShape, meter: Meter, encode: bool) -> list[dict[str, Grid]]:
    """Aligned features of the videos, and of the stills, of a batch: a dictionary each."""
    grids = []
    t, h, w = model.vision.aligner.grid
    for count, steps in ((shape.videos, t), (shape.stills, 1)):
        if not count:
            continue
        own = {}
        for name, encoder in model.vision.named():
            values = torch.empty(
                count, steps, h, w, encoder.spec.embed_dim, dtype=device_and_dtype(encoder)[1]
            )
            if encode:
                frames = model.vision.num_frames.get(name, encoder.spec.num_frames) if steps > 1 else 1
                made = _encoded(encoder, frames, count, meter)
                values = _resampled(made, values.shape)
            own[name] = Grid(
                values,
                torch.empty(count, steps, dtype=torch.float64),
                torch.tensor(WHOLE_PICTURE).expand(count, -1),
                torch.ones(count, steps, h, w, dtype=torch.bool),
            )
        grids.append(own)
    return grids


def _encoded(encoder: Encoder, frames: int, clips: int, meter: Meter) -> Tensor:
    """Run an encoder over clips, as many windows at once as merv does; features of the last ones.

    One that is frozen keeps nothing from one run to the next, so a single run is multiplied.
    """
    window = encoder.spec.window_size or max(frames, encoder.spec.tubelet_size)
    windows = -(-frames // window)
    at_once = min(windows, max(1, FRAMES_AT_ONCE // window))
    pixels = torch.empty(at_once, window, 3, *encoder.preset.input_size, dtype=device_and_dtype(encoder)[1])
    if any(p.requires_grad for p in encoder.parameters()):
        runs = -(-windows * clips // at_once)
        return torch.cat([encoder.encode(pixels) for _ in range(runs)])
    before = meter.flops
    with torch.no_grad():
        made = encoder.encode(pixels)
    meter.flops = before + (meter.flops - before) * windows * clips // at_once
    return made


def _resampled(made: Tensor, shape: torch.Size) -> Tensor:
    """In the shape of aligned features; where they are trained, on the way back too."""
    values = made.new_empty(shape)
    return values + made.mean() if made.requires_grad else values


def _loss(model: Any, features: list[dict[str, Grid]], shape: BatchShape) -> Tensor:
    """The summed loss of one batch, as `VideoLLM` has it."""
    tokens = []
    for own in features:
        clips = len(next(iter(own.values())).values)
        question = torch.empty(clips, model.fusion.output_dim) if model.fusion.mixer.conditioned else None
        tokens.append(model.vision.fuse(own, question).tokens.flatten(0, 1))
    visual = torch.cat(tokens) if tokens else model.fusion.nothing()[:0]
    with _no_packing_found():
        logits = model.logits(_Sized.of(shape), visual, torch.zeros(shape.answers, dtype=torch.long)).float()
    labels = torch.zeros(shape.rows * shape.answers, dtype=torch.long)
    return cross_entropy(logits.flatten(0, 1), labels, reduction="sum")


@contextmanager
def _no_packing_found() -> Iterator[None]:
    """Without a mask transformers looks for rows of several sequences, and fears the worst of fake ones."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    looks = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, looks)


@dataclass(frozen=True, eq=False)
class _Sized(Packed):
    """A packed batch of which only the sizes are known."""

    places: int = 0
    padded: bool = True

    @classmethod
    def of(cls, shape: BatchShape) -> _Sized:
        size = (shape.rows, shape.length)
        ids, positions, labels, branches = (torch.zeros(size, dtype=torch.long) for _ in range(4))
        length = shape.length
        mask = torch.ones(shape.rows, 1, length, length, dtype=torch.bool) if shape.shared else ids == 0
        return cls(ids, mask, positions, labels, branches, shape.visual, shape.padded)

    def embed(self, table: nn.Module, visual: Tensor) -> Tensor:
        words = table(self.ids)
        row, column = torch.zeros(2, self.places, dtype=torch.long)
        some = visual[torch.zeros(self.places, dtype=torch.long)]
        return words.index_put((row, column), some.to(words))

    def attention_mask(self, like: Tensor, additive: bool) -> Any:
        if self.mask.ndim == 2 and not self.padded:
            return None  # as transformers does with a mask that masks nothing; it cannot look into this one
        return super().attention_mask(like, additive)
