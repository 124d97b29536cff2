"""Average: the mean of several checkpoints of one model, tensor by tensor.

Source: model soups, arXiv 2203.05482, and averages of a run's last checkpoints before them.
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
    """Write the mean of checkpoints as a folder that `from_pretrained` loads; whole or not at all.

    checkpoints: folders of `save_pretrained`, or of a run, of one model; state of optimizers is left out.
    coefficients: one number for each; None: equal. Only their ratios count.

    Sums are in fp32, results in the dtype of the first. Memory holds one model and a tensor of another.
    Raises CheckpointError for what is no checkpoint, and names what differs between two.
    """
    shares = _normalized(len(checkpoints), coefficients)
    check_free(out)
    folders = [find_folder(checkpoint) for checkpoint in checkpoints]
    kind, config = _same_config(folders)
    state = _mean(folders, shares)
    with replacing(out) as fresh:
        write_model(fresh, kind, config, state)
        source = config.get("llm", {}).get("source", "")
        if (llm := bundled_llm(folders[0], source)) is not None:
            shutil.copytree(llm, fresh / source)


def _normalized(count: int, coefficients: Sequence[float] | None) -> list[float]:
    """What each counts, summing to 1."""
    given = [1.0] * count if coefficients is None else list(coefficients)
    if count < 2 or len(given) != count:
        raise CheckpointError(
            f"An average takes two checkpoints or more; got {count}, {len(given)} coefficients."
        )
    if not all(math.isfinite(each) and each >= 0 for each in given) or not sum(given):
        raise CheckpointError(f"Coefficients are numbers from 0 up, not all of them 0; got {given}.")
    return [each / sum(given) for each in given]


def _same_config(folders: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    """Kind and config of the first, which the others have too."""
    kind, config = read_config(folders[0])
    for folder in folders[1:]:
        other, own = read_config(folder)
        differs = first_difference({"kind": kind, **config}, {"kind": other, **own})
        if differs is not None:
            place, first, second = differs
            raise CheckpointError(
                f"Only checkpoints of one model have a mean: {folders[0]} has {place} {first}, "
                f"{folder} has {second}."
            )
    return kind, config


def _mean(folders: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of all tensors, which the files have alike."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(folder / WEIGHTS, "pt")) for folder in folders]
        except SafetensorError as error:
            raise CheckpointError(f"One of {', '.join(map(str, folders))} is damaged: {error}") from error
        shapes = [{name: file.get_slice(name).get_shape() for name in file.keys()} for file in files]  # noqa: SIM118
        for folder, own in zip(folders, shapes, strict=True):
            unlike = [name for name in {**shapes[0], **own} if shapes[0].get(name) != own.get(name)]
            if unlike:
                raise CheckpointError(
                    f"{folders[0]} and {folder} hold other tensors: {', '.join(unlike[:4])}."
                )
        return {name: _weighted(name, files, shares) for name in shapes[0]}


def _weighted(name: str, files: Sequence[Any], shares: Sequence[float]) -> Tensor:
    first = files[0].get_tensor(name)
    if not first.is_floating_point():  # a count or a mask has no mean
        if not all(torch.equal(first, file.get_tensor(name)) for file in files):
            raise CheckpointError(f"{name} is {first.dtype} and differs between the checkpoints.")
        return first
    total = torch.zeros(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for file, share in zip(files, shares, strict=True):
        total += share * file.get_tensor(name).to(total.dtype)
    return total.to(first.dtype)
