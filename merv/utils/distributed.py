"""Several processes: what they sum and gather, and tensors that are sharded over them.

Nothing here needs more than torch, so that loading data imports no Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Each number summed over all processes, in all of them."""
    if processes() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: Any) -> list[Any]:
    """What each process has, in all of them, by rank."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def mean_divides_by(trainer: Any) -> float:
    """What Lightning and the engine have divided the sum of gradients by."""
    return trainer.accumulate_grad_batches * processes()


def unsharded(state: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Sharded tensors put together, on the CPU of the process that is to `keep` them; all take part."""
    from torch.distributed.tensor import DTensor

    kept = {}
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[name] = whole.cpu()
    return kept


def total_norm(gradients: Sequence[torch.Tensor]) -> float:
    """The 2-norm of all of them, sharded or not, in all processes alike; this waits for the device."""
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
