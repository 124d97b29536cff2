"""The mean of several checkpoints of one model, tensor by tensor.

Source: model soups, arXiv 2203.05482. Averaging the last checkpoints of a run is an older method.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from merv.checkpoints.folder import (
    find_folder,
    first_difference,
    load_folder,
    read_config,
    replacing,
    write_model,
)
from merv.checkpoints.pretrained import bundled_llm
from merv.errors import CheckpointError
from merv.utils.torch_modules import state_dict_mismatch


def average(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    coefficients: Sequence[float] | None = None,
    verify: bool | None = True,
) -> None:
    """Write the weighted mean of checkpoints as a folder that `from_pretrained` loads.

    Sums are computed in fp32; each tensor has the dtype that it has in the first checkpoint. Memory holds one
    model, and one tensor of one other model at a time. The optimizer state is left out.

    Args:
        checkpoints: Two or more folders written by `save_pretrained` or by a run, all of the same model.
        out: The folder to write. It is written completely or not at all.
        coefficients: The weight of each checkpoint; only their ratios matter. None: equal weights.
        verify: Compare the files of the checkpoints with their SHA-256, as in `VideoLLM.from_pretrained`.

    Raises:
        CheckpointError: A folder is not a checkpoint, two checkpoints are of different models, or the
            coefficients are invalid.

    Example:
        >>> import tempfile
        >>> from merv import MultiEncoder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "b"):
        ...         MultiEncoder(["fake"], output_dim=8).save_pretrained(f"{folder}/{name}")
        ...     average([f"{folder}/a", f"{folder}/b"], f"{folder}/mean", coefficients=[3, 1])
        ...     MultiEncoder.from_pretrained(f"{folder}/mean").fusion.output_dim
        8
    """
    count = len(checkpoints)
    weights = [1.0] * count if coefficients is None else list(coefficients)
    valid = all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0
    if count < 2 or len(weights) != count or not valid:
        raise CheckpointError(
            "Expected at least two checkpoints and a finite coefficient ≥ 0 for each, not all of them 0; "
            f"got {count} checkpoint(s) and the coefficients {weights}."
        )
    first = find_folder(checkpoints[0])
    kind, _ = read_config(first)
    config, state = load_folder(first, kind, verify)
    states = [state]  # the tensors are mapped from the files, not read yet
    for checkpoint in checkpoints[1:]:
        other_config, other_state = load_folder(checkpoint, kind, verify)
        difference = state_dict_mismatch(state, other_state)
        if values := first_difference(config, other_config):
            difference = "{} is {} in one and {} in the other".format(*values)
        if difference:
            raise CheckpointError(f"{first} and {checkpoint} are different models: {difference}.")
        states.append(other_state)
    mean = {name: _mean(name, [state[name] for state in states], weights) for name in state}
    with replacing(out) as temporary:
        source = config.get("llm", {}).get("source", "")
        if (llm := bundled_llm(first, source)) is not None:
            shutil.copytree(llm, temporary / source)
        write_model(temporary, kind, config, mean)


def _mean(name: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of one tensor."""
    first = tensors[0]
    if not first.is_floating_point():  # counts and masks have no mean
        if not all(torch.equal(first, tensor) for tensor in tensors):
            raise CheckpointError(
                f"Cannot average {name}: it is {first.dtype} and differs between checkpoints."
            )
        return first
    total = torch.zeros(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight / sum(weights) * tensor.to(total.dtype)
    return total.to(first.dtype)
