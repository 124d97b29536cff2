"""PyTorch modules: their device and dtype, differences between state dicts, and the speed of bfloat16."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter or buffer; CPU and float32 if there is none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


@contextmanager
def torch_defaults(device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the block with the default dtype and device that torch starts with, float32 and the CPU.

    A program may have set others, with which the code of a network would compute other features.

    >>> with torch.device("meta"), torch_defaults():
    ...     torch.zeros(2)
    tensor([0., 0.])
    """
    dtype = torch.get_default_dtype()
    if dtype == torch.float32 and torch.get_default_device() == torch.device(device):
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(dtype)


def without_weights(build: Callable[[], M], *errors: type[Exception]) -> M:
    """Call `build` on the meta device, where tensors have shapes but no values and need no memory.

    A module that reads its own weights while it is built cannot be built there; it gets random weights on
    the CPU instead. torch's random state is not changed.

    Args:
        build: Creates the module.
        *errors: What `build` may raise on the meta device, besides NotImplementedError and RuntimeError.
    """
    with torch.random.fork_rng(devices=[]):
        with suppress(NotImplementedError, RuntimeError, *errors), torch.device("meta"):
            return build()
        with torch.device("cpu"):
            return build()


def state_dict_mismatch(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Describe how the keys, shapes and kinds of numbers of two state dicts differ; None if they match.

    Floating-point dtypes may differ, and so may those of integers. Integers in place of floating-point
    numbers are a mismatch, because they are quantized weights.

    >>> state_dict_mismatch({"a": torch.zeros(1), "b": torch.zeros(2)}, {"b": torch.zeros(3)})
    '1 missing (a); 1 of another shape (b [3], expected [2])'
    """
    shared = [key for key in expected if key in state]
    differences = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {list(state[key].shape)}, expected {list(expected[key].shape)}"
            for key in shared
            if state[key].shape != expected[key].shape
        ],
        "of another kind of number": [
            f"{key} {state[key].dtype}, expected {expected[key].dtype}"
            for key in shared
            if _kind(state[key]) != _kind(expected[key])
        ],
    }
    parts = [f"{len(keys)} {what} ({first_few(keys)})" for what, keys in differences.items() if keys]
    return "; ".join(parts) or None


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """The kind of numbers of a tensor: floating-point, complex, boolean or integer."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def first_few(names: list[str], limit: int = 4) -> str:
    """The first names of a list, for an error message.

    >>> first_few(["a", "b", "c"], limit=2)
    'a, b, …'
    """
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def bfloat16_is_slow() -> bool:
    """Whether this CPU multiplies bfloat16 matrices much slower than float32 ones.

    The function measures it in about 0.1 s. A CPU without bfloat16 instructions is 30 or more times slower.
    """
    seconds = {dtype: _matmul_s(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.bfloat16] > 6 * seconds[torch.float32]


def _matmul_s(dtype: torch.dtype) -> float:
    """The fastest of four products of 256 × 256 matrices, in seconds."""
    matrix = torch.ones(256, 256, dtype=dtype, device="cpu")
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=4))
