"""The mean of several checkpoints of one model, tensor by tensor.

Source: model soups, arXiv 2203.05482. Averaging the last checkpoints of a run is older.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merv.checkpoints.folder import (
    WEIGHTS,
    check_free,
    find_folder,
    first_difference,
    read_config,
    replacing,
    write_model,
)
from merv.checkpoints.pretrained import bundled_llm
from merv.errors import CheckpointError


def average(
    checkpoints: Sequence[str | Path], out: str | Path, coefficients: Sequence[float] | None = None
) -> None:
    """Write the weighted mean of checkpoints as a folder that `from_pretrained` loads.

    Sums are computed in fp32; each tensor has the dtype that it has in the first checkpoint. Memory holds one
    model and one tensor of another. The optimizer state is left out.

    Args:
        checkpoints: Two or more folders written by `save_pretrained` or by a run, all of the same model.
        out: The folder to write. It is written completely or not at all.
        coefficients: The weight of each checkpoint; only their ratios matter. None: equal weights.

    Raises:
        CheckpointError: A folder is not a checkpoint, two checkpoints are of different models, or the
            coefficients are invalid.
    """
    weights = _normalize(len(checkpoints), coefficients)
    check_free(out)
    folders = [find_folder(checkpoint) for checkpoint in checkpoints]
    kind, config = _common_config(folders)
    state = _mean(folders, weights)
    with replacing(out) as temporary:
        write_model(temporary, kind, config, state)
        source = config.get("llm", {}).get("source", "")
        if (llm := bundled_llm(folders[0], source)) is not None:
            shutil.copytree(llm, temporary / source)


def _normalize(count: int, coefficients: Sequence[float] | None) -> list[float]:
    """The coefficients scaled to a sum of 1."""
    values = [1.0] * count if coefficients is None else list(coefficients)
    if count < 2 or len(values) != count:
        raise CheckpointError(
            "Expected at least two checkpoints and one coefficient for each; "
            f"got {count} checkpoint(s) and {len(values)} coefficient(s)."
        )
    if not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values):
        raise CheckpointError(f"Coefficients must be finite, not negative and not all 0; got {values}.")
    return [value / sum(values) for value in values]


def _common_config(folders: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    """Kind and config of the first folder, after checking that the others have the same."""
    kind, config = read_config(folders[0])
    for folder in folders[1:]:
        other_kind, other_config = read_config(folder)
        difference = first_difference({"kind": kind, **config}, {"kind": other_kind, **other_config})
        if difference is not None:
            key, first, second = difference
            raise CheckpointError(
                f"Cannot average checkpoints of different models: {folders[0]} has {key} {first}, "
                f"{folder} has {second}."
            )
    return kind, config


def _mean(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of each tensor, after checking that the files have the same names and shapes."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(folder / WEIGHTS, "pt")) for folder in folders]
        except SafetensorError as error:
            raise CheckpointError(f"One of {', '.join(map(str, folders))} is damaged: {error}") from error
        shapes = [{name: file.get_slice(name).get_shape() for name in file.keys()} for file in files]  # noqa: SIM118
        for folder, other in zip(folders, shapes, strict=True):
            different = [name for name in {**shapes[0], **other} if shapes[0].get(name) != other.get(name)]
            if different:
                raise CheckpointError(
                    f"Cannot average {folders[0]} and {folder}: these tensors differ in shape or are missing "
                    f"in one of them: {', '.join(different[:4])}."
                )
        return {name: _weighted_sum(name, files, weights) for name in shapes[0]}


def _weighted_sum(name: str, files: Sequence[Any], weights: Sequence[float]) -> Tensor:
    first = files[0].get_tensor(name)
    if not first.is_floating_point():  # counts and masks have no mean
        if not all(torch.equal(first, file.get_tensor(name)) for file in files):
            raise CheckpointError(
                f"Cannot average {name}: it is {first.dtype} and differs between checkpoints."
            )
        return first
    total = torch.zeros(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for file, weight in zip(files, weights, strict=True):
        total += weight * file.get_tensor(name).to(total.dtype)
    return total.to(first.dtype)
