"""Checkpoint: a folder with safetensors of what was trained and a JSON that says how to use it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from merv.errors import CheckpointError
from merv.utils.files import is_abandoned, temporaries_beside, temporary_beside
from merv.utils.suggest import nearest

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 2  # one more wherever a config.json of before would be misread


def save_folder(
    folder: str | Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write `folder` whole or not at all; an older one is replaced.

    kind: the class that can load it. config: JSON. state: the trained tensors only.
    """
    with replacing(folder) as fresh:
        write_model(fresh, kind, config, state)


def write_model(
    folder: str | Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """config.json and model.safetensors, into a folder that is there."""
    from safetensors.torch import save_file

    write_config(folder, kind, config)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS)
    shutil.copymode(Path(folder) / CONFIG, Path(folder) / WEIGHTS)  # else its owner's alone


def write_config(folder: str | Path, kind: str, config: Mapping[str, Any]) -> None:
    """config.json alone, into a folder that is there."""
    text = json.dumps({"merv": FORMAT, "kind": kind, **config}, indent=2)
    (Path(folder) / CONFIG).write_text(text + "\n")


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when all went well, and vanishes otherwise.

    Raises CheckpointError where `folder` is not merv's to replace, or the disk does not take it.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    clear_up(folder)
    check_free(folder)
    try:
        with temporary_beside(folder) as fresh:
            fresh.mkdir(parents=True)
            yield fresh
            swap(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. What was there before is untouched."
        ) from error


def load_folder(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder that `save_folder` wrote for `kind`.

    Raises CheckpointError where it is not such a folder; the message says what it is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = find_folder(folder)
    found, config = read_config(where)
    if found != kind:
        raise CheckpointError(f"{where} holds a {found!r}; wanted a {kind!r}.")
    try:
        return config, load_file(where / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} was replaced while it was read: load it again.") from error


def read_config(folder: str | Path, beside: str = WEIGHTS) -> tuple[str, dict[str, Any]]:
    """Kind and config of a folder that has `beside`, the file of its tensors.

    Raises CheckpointError where it is not such a folder.
    """
    folder = find_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.{_instead(folder.parent, folder.name)}")
    if not (folder / CONFIG).is_file() or not (folder / beside).is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} is no checkpoint of merv: it needs {CONFIG} and {beside}; there is {there}."
            f"{_instead(folder, 'model')}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} was replaced while it was read: load it again.") from error
    written = config.pop("merv", None)
    if written != FORMAT:
        by = "not by merv" if written is None else f"by another version of merv (format {written})"
        raise CheckpointError(
            f"{folder} was written {by}; this version reads format {FORMAT}. Train or convert it again."
        )
    return config.pop("kind"), config


def _instead(run: Path, typed: str) -> str:
    """What there is in the folder of a run, for messages."""
    models = [path.parent.name for path in run.glob(f"*/{CONFIG}")]
    if "model" in models:
        return nearest(typed, models)
    steps = sorted(run.glob("checkpoints/step=*"), key=lambda path: path.stat().st_mtime)
    return f" A run that did not reach its end left {steps[-1]}." if steps else nearest(typed, models)


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Where two configs first differ, and both values; None where they describe the same model.

    Where parts are, `source` and `revision`, may differ: fingerprints and hashes say what they are.

    >>> first_difference({"llm": {"dtype": "bf16"}}, {"llm": {"dtype": "fp32"}})
    ('llm.dtype', 'bf16', 'fp32')
    """
    for name in sorted({*one, *other}):
        was, own = one.get(name), other.get(name)
        if isinstance(was, Mapping) and isinstance(own, Mapping):
            deeper = first_difference(was, own)
            if deeper is not None:
                return f"{name}.{deeper[0]}", *deeper[1:]
        elif was != own and name not in ("source", "revision"):
            return name, was, own
    return None


def fill_exactly(own: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy `state` into the tensors `own`; CheckpointError names what is missing or left over."""
    faults = {
        "missing": [name for name in own if name not in state],
        "left over": [name for name in state if name not in own],
        "of another shape": [n for n in own if n in state and own[n].shape != state[n].shape],
    }
    if any(faults.values()):
        said = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:4])})" for what, names in faults.items() if names
        )
        raise CheckpointError(f"{folder} does not fit the model that its config.json describes: {said}.")
    for name, tensor in own.items():
        tensor.data.copy_(state[name])


def check_free(folder: str | Path) -> None:
    """Raise CheckpointError where saving to `folder` would destroy something that is not merv's."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = "merv" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise CheckpointError(f"{folder} exists and is no checkpoint of merv; it is left as it is.")


def swap(fresh: Path, folder: Path) -> None:
    """Put `fresh` where `folder` is; the old one goes last."""
    old = fresh.with_name(f"{fresh.name}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def find_folder(folder: str | Path) -> Path:
    """Where the content of `folder` is: there, or beside it where `swap` was stopped in the middle.

    Only looks: nothing is moved or removed, so that reading needs no right to write.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    old = [beside for beside in temporaries_beside(folder) if beside.name.endswith(".old")]
    return max(old, key=lambda beside: beside.stat().st_mtime, default=folder)


def clear_up(folder: str | Path) -> None:
    """Before `folder` is written: put back, or remove, what killed processes left of their writing it.

    What another machine may still be writing stays.
    """
    folder = Path(folder)
    for left in filter(is_abandoned, temporaries_beside(folder)):
        if left.name.endswith(".old") and not folder.exists():
            with suppress(OSError):  # another process was quicker, or may not
                left.replace(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)
