"""Modules of torch: where they are, and whether two are built alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import nn

from merv.utils.plugins import class_path

M = TypeVar("M", bound=nn.Module)


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point dtype of a module, by its first such parameter or buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def without_weights(build: Callable[[], M], *but: type[Exception]) -> M:
    """What `build` makes, on the meta device: shapes without numbers, in no time and no memory.

    Where a part computes with its weights while it is built, it gets random ones, on the CPU; torch's
    random state is left as it was. but: further errors of `build` that mean the same.
    """
    with torch.random.fork_rng(devices=[]):
        with suppress(NotImplementedError, RuntimeError, *but), torch.device("meta"):
            return build()
        with torch.device("cpu"):
            return build()


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was built: `fully_shard` puts one of its own in front."""
    own = type(module)
    return own.__mro__[2] if own.__mro__[1].__name__ == "FSDPModule" else own


def first_unlike(one: nn.Module, other: nn.Module) -> str | None:
    """The first place where two modules are not built of the same classes and shapes, in words; or None.

    >>> first_unlike(nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4)))
    '0.weight is [3, 2] in one and [4, 2] in the other'
    """
    parts = [{name: class_path(class_of(m)) for name, m in module.named_modules()} for module in (one, other)]
    shapes = [{n: str(list(t.shape)) for n, t in module.state_dict().items()} for module in (one, other)]
    for first, second in (parts, shapes):
        for name in {**first, **second}:
            if first.get(name) != second.get(name):
                was, now = first.get(name, "absent"), second.get(name, "absent")
                return f"{name or 'the whole'} is {was} in one and {now} in the other"
    return None


def bfloat16_is_slow() -> bool:
    """Whether this CPU multiplies in bfloat16 many times slower than in float32.

    Measured, in a tenth of a second: a CPU without instructions for it takes 30 times as long or more.
    """
    took_s = {dtype: _matmul_s(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return took_s[torch.bfloat16] > 6 * took_s[torch.float32]


def _matmul_s(dtype: torch.dtype) -> float:
    """The shortest of three products of 256 × 256 numbers, in seconds, after one that is not counted."""
    numbers = torch.ones(256, 256, dtype=dtype, device="cpu")
    times_s = []
    for _ in range(4):
        start = time.perf_counter()
        numbers @ numbers
        times_s.append(time.perf_counter() - start)
    return min(times_s[1:])
