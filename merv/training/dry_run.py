"""One training step on torch's fake tensors, which have shapes but no data: its FLOPs and memory.

The model is built on the meta device. The code that trains then runs forward, backward and the
optimizer's step. FLOPs are counted for every matrix product, convolution and attention. Memory is
counted for every tensor, from its creation until nothing refers to it.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
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
from merv.utils.private import storage_key, tensor_tables
from merv.utils.torch_modules import device_and_dtype

OPTIMIZER = "optimizer"
FORWARD, BACKWARD, ENCODE = "forward", "backward", "encode"


@dataclass(frozen=True)
class BatchShape:
    """The sizes of one batch.

    Args:
        videos: Number of videos. Each has all time steps of the grid.
        rows: Number of rows that the language model reads (B).
        length: Length of a row in tokens (S).
        answers: Number of positions at which any row has a token to learn (K).
        visual: Number of visual tokens in all rows.
        stills: Number of images. Each has one time step.
        padded: Whether the rows differ in length.
        shared: Whether a row holds more than one conversation.
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
    """The cost of a step.

    Args:
        flops: FLOPs by phase.
        peaks: Peak memory in bytes by phase.
        held: Bytes in use between steps: weights, kept gradients, optimizer states.
    """

    flops: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    held: int = 0


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all live tensors: now and at the peak.

    It uses the formulas of torch's FlopCounterMode, which itself keeps the tensors of modules alive and
    so cannot be active while memory is measured.

    Example:
        >>> with Meter() as meter:
        ...     product = torch.ones(10, 100) @ torch.ones(100, 10)
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
        """Count an existing tensor. Views of a counted tensor add nothing."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        size = storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def to_fake_tensors(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake ones on the CPU, in place; call it in a FakeTensorMode."""

    @cache  # tensors shared by two modules stay shared
    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for table in tensor_tables(module):
        for name, tensor in table.items():
            if tensor is not None:
                table[name] = fake(tensor)


def dry_step(
    training: Any,
    shape: BatchShape,
    *,
    encode: bool,
    accumulate: int = 1,
    precision: str = "32-true",
    gpu: bool = False,
) -> Cost:
    """Run one micro-batch and the optimizer's step on fake tensors.

    Args:
        training: A `merv.training.module.Training` whose `model` is on the meta device. Its tensors are
            replaced by fake ones.
        shape: The sizes of the batch.
        encode: Whether the encoders run in the step.
        accumulate: Micro-batches per step of the optimizer.
        precision: As for Lightning's Trainer. A mixed one autocasts to bf16.
        gpu: Whether to estimate for a GPU, where torch's optimizers update all tensors at once by default
            (`foreach`).

    Returns:
        FLOPs and memory by phase.
    """
    cost, meter = Cost(), Meter()
    model = training.model
    with FakeTensorMode(allow_non_fake_inputs=True), _without_shortcuts(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about devices, which fake tensors do not have
        to_fake_tensors(model)
        training.train()
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        optimizer = torch.optim.AdamW(training.parameter_groups(), foreach=gpu)
        with meter:  # the previous step, which creates gradients and the optimizer's states
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("-mixed")):
            with _phase(cost, meter, ENCODE):
                features = _features(model, shape, meter, encode)
            with _phase(cost, meter, FORWARD):
                loss = _loss(model, features, shape)
        del features
        with _phase(cost, meter, BACKWARD):
            if accumulate == 1:
                optimizer.zero_grad()  # Lightning does it between forward and backward
            loss.backward()
            del loss
        with _phase(cost, meter, OPTIMIZER):
            optimizer.step()
        cost.held = meter.now
    return cost


@contextmanager
def _phase(cost: Cost, meter: Meter, name: str) -> Iterator[None]:
    meter.peak, meter.flops = meter.now, 0
    with meter:
        yield
    cost.flops[name], cost.peaks[name] = meter.flops, meter.peak


@contextmanager
def _without_shortcuts() -> Iterator[None]:
    """Turn off what fake tensors cannot do.

    transformers looks for packed sequences in the values of positions. torch has a fused kernel for frozen
    attention, whose FLOPs have no formula.
    """
    from transformers import masking_utils

    find_packed = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find_packed
        torch.backends.mha.set_fastpath_enabled(fastpath)


# Encoding, fusion, language model -----------------------------------------------------------------


def _features(model: Any, shape: BatchShape, meter: Meter, encode: bool) -> list[dict[str, Grid]]:
    """Aligned features by encoder, for the videos and for the stills of a batch."""
    features = []
    t, h, w = model.vision.aligner.size
    for clips, steps in ((shape.videos, t), (shape.stills, 1)):
        if not clips:
            continue
        grids = {}
        for name, encoder in model.vision.named():
            dtype = device_and_dtype(encoder)[1]
            values = torch.empty(clips, steps, h, w, encoder.spec.embed_dim, dtype=dtype)
            if encode:
                num_frames = model.vision.num_frames.get(name, encoder.spec.num_frames) if steps > 1 else 1
                values = _resize(_encode(encoder, num_frames, clips, meter), values.shape)
            grids[name] = Grid(
                values,
                torch.empty(clips, steps, dtype=torch.float64),
                torch.tensor(WHOLE_PICTURE).expand(clips, -1),
                torch.ones(clips, steps, h, w, dtype=torch.bool),
            )
        features.append(grids)
    return features


def _encode(encoder: Encoder, num_frames: int, clips: int, meter: Meter) -> Tensor:
    """Run an encoder over clips, with as many windows per call as merv uses.

    A frozen encoder keeps no activations between calls, so it runs once and its FLOPs are multiplied.
    """
    window = encoder.spec.window_size or max(num_frames, encoder.spec.tubelet_size)
    windows = math.ceil(num_frames / window)
    per_call = min(windows, max(1, FRAMES_AT_ONCE // window))
    pixels = torch.empty(per_call, window, 3, *encoder.preset.input_size, dtype=device_and_dtype(encoder)[1])
    if any(p.requires_grad for p in encoder.parameters()):
        calls = math.ceil(windows * clips / per_call)
        return torch.cat([encoder.encode(pixels) for _ in range(calls)])
    before = meter.flops
    with torch.no_grad():
        encoded = encoder.encode(pixels)
    meter.flops = before + (meter.flops - before) * windows * clips // per_call
    return encoded


def _resize(encoded: Tensor, shape: torch.Size) -> Tensor:
    """Values of the aligned shape, with a backward pass to the encoder if it is trained."""
    values = encoded.new_empty(shape)
    return values + encoded.mean() if encoded.requires_grad else values


def _loss(model: Any, features: list[dict[str, Grid]], shape: BatchShape) -> Tensor:
    """The summed loss of one batch, computed as `VideoLLM` does."""
    tokens = []
    for grids in features:
        clips = len(next(iter(grids.values())).values)
        question = torch.empty(clips, model.fusion.output_dim) if model.fusion.mixer.conditioned else None
        tokens.append(model.vision.fuse(grids, question).tokens.flatten(0, 1))
    visual = torch.cat(tokens) if tokens else model.fusion.dummy_tokens()[:0]
    positions = torch.zeros(shape.answers, dtype=torch.long)
    logits = model.logits(_FakePacked.of(shape), visual, positions).float()
    labels = torch.zeros(shape.rows * shape.answers, dtype=torch.long)
    return cross_entropy(logits.flatten(0, 1), labels, reduction="sum")


@dataclass(frozen=True, eq=False)
class _FakePacked(Packed):
    """A packed batch of which only the sizes are known."""

    shape: BatchShape

    @classmethod
    def of(cls, shape: BatchShape) -> _FakePacked:
        size = (shape.rows, shape.length)
        ids, positions, labels, conversations = (torch.zeros(size, dtype=torch.long) for _ in range(4))
        mask = (
            torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool)
            if shape.shared
            else ids == 0
        )
        return cls(ids, mask, positions, labels, conversations, shape)

    def embed(self, table: nn.Module, visual: Tensor) -> Tensor:
        text = table(self.ids)
        row, column = torch.zeros(2, self.shape.visual, dtype=torch.long)
        chosen = visual[torch.zeros(self.shape.visual, dtype=torch.long)]
        return text.index_put((row, column), chosen.to(text))

    def attention_mask(self, like: Tensor, additive: bool) -> Any:
        if self.mask.ndim == 2 and not self.shape.padded:
            return None  # transformers drops a mask of ones, but it cannot inspect a fake one
        return super().attention_mask(like, additive)
