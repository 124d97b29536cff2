"""Distributed processes: sums, gathered values and sharded tensors.

This module needs only torch, so that loading data does not import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def processes() -> int:
    """Number of processes that train together (the world size)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def sum_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over all processes; every process gets the sums."""
    if processes() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: Any) -> list[Any]:
    """Collect the values of all processes, in the order of ranks; every process gets the list."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def gradient_divisor(trainer: Any) -> float:
    """The number by which Lightning and the strategy have divided the sum of gradients."""
    return trainer.accumulate_grad_batches * processes()


def unsharded(state: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gather sharded tensors on the CPU. All processes must call this.

    Args:
        state: Tensors by name, sharded or not.
        keep: Whether this process gets the tensors; the others get an empty dict.
    """
    from torch.distributed.tensor import DTensor

    result = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            result[name] = full.cpu()
    return result


def total_norm(gradients: Sequence[torch.Tensor]) -> float:
    """The 2-norm of all gradients, sharded or not, equal on all processes. This synchronizes the device."""
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
