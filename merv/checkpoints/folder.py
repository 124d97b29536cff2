"""The format of a saved model: a folder with `config.json` and the trained tensors in safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from merv.errors import CheckpointError
from merv.utils.files import is_abandoned, new_folder, temporaries_beside
from merv.utils.suggest import nearest
from merv.utils.torch_modules import state_dict_mismatch

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 3  # increase it when an older config.json would be misread


def save_folder(
    folder: str | Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write a folder completely or not at all. An older model in it is replaced.

    Args:
        folder: The folder to write.
        kind: Name of the class that loads it, such as "VideoLLM".
        config: Values for config.json.
        state: The trained tensors.

    Raises:
        CheckpointError: The folder holds something other than a model of merv, or cannot be written.
    """
    with replacing(folder) as temporary:
        write_model(temporary, kind, config, state)


def write_model(
    folder: str | Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    from safetensors.torch import save_file

    write_config(folder, kind, config)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS)
    shutil.copymode(Path(folder) / CONFIG, Path(folder) / WEIGHTS)  # safetensors lets only the owner read it


def write_config(folder: str | Path, kind: str, config: Mapping[str, Any]) -> None:
    """Write config.json into an existing folder."""
    text = json.dumps({"merv": FORMAT, "model_type": "merv", "kind": kind, **config}, indent=2)
    (Path(folder) / CONFIG).write_text(text + "\n")


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` if the block succeeds; otherwise it is removed.

    Raises:
        CheckpointError: The folder holds something other than a model of merv, or cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    check_free(folder)
    try:
        with new_folder(folder) as temporary:
            yield temporary
        remove_leftovers(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. Its previous content is unchanged."
        ) from error


def load_folder(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors of a folder that `save_folder` wrote.

    Raises:
        CheckpointError: The folder is missing, damaged, or does not hold a model of this kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = find_folder(folder)
    saved_kind, config = read_config(path)
    if saved_kind != kind:
        raise CheckpointError(f"{path} holds a {saved_kind!r}; expected a {kind!r}.")
    try:
        return config, load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error


def read_config(folder: str | Path, required: str = WEIGHTS) -> tuple[str, dict[str, Any]]:
    """Read kind and config of a folder. `required` is another file that the folder must have.

    Raises:
        CheckpointError: The folder is missing, damaged, or not a model of merv.
    """
    folder = find_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"The folder {folder} does not exist.{_suggestion(folder.parent, folder.name)}")
    if not (folder / CONFIG).is_file() or not (folder / required).is_file():
        files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        is_sharded = required == WEIGHTS and (folder / CONFIG).is_file() and (folder / ".metadata").is_file()
        advice = (
            " Run `merv consolidate` first: it is sharded." if is_sharded else _suggestion(folder, "model")
        )
        raise CheckpointError(
            f"{folder} is not a complete model of merv. Expected {CONFIG} and {required}, found {files}."
            f"{advice}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} could not be read: {error}") from error
    version = config.pop("merv", None)
    if version is None:
        raise CheckpointError(
            f"{folder / CONFIG} was not written by merv: it has no key 'merv'. Expected a folder written by "
            "save_pretrained or `merv fit`."
        )
    if version != FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG} has format {version}; this version of merv reads format {FORMAT}. "
            "Train or convert the model again."
        )
    config.pop("model_type", None)
    return config.pop("kind"), config


def _suggestion(run: Path, typed: str) -> str:
    """Return a sentence that names a model in the folder of a run; "" if there is none."""
    models = [path.parent.name for path in run.glob(f"*/{CONFIG}")]
    steps = sorted(run.glob("checkpoints/step=*"), key=lambda path: path.stat().st_mtime)
    if steps and "model" not in models:
        return f" The run did not finish; its last checkpoint is {steps[-1]}."
    return nearest(typed, models)


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key in which two configs differ, and both values; None if they describe the same model.

    `source` and `revision` may differ: parts are compared by their hashes.

    >>> first_difference({"llm": {"dtype": "bf16"}}, {"llm": {"dtype": "fp32"}})
    ('llm.dtype', 'bf16', 'fp32')
    """
    for key in sorted({*one, *other}):
        first, second = one.get(key), other.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            difference = first_difference(first, second)
            if difference is not None:
                return f"{key}.{difference[0]}", *difference[1:]
        elif first != second and key not in ("source", "revision"):
            return key, first, second
    return None


def fill_exactly(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy `state` into `tensors`, in place.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    if mismatch := state_dict_mismatch(tensors, state):
        raise CheckpointError(f"{folder} does not fit the model that its config.json describes: {mismatch}.")
    for name, tensor in tensors.items():
        tensor.data.copy_(state[name])


def check_free(folder: str | Path) -> None:
    """Check that a model may be saved to `folder`: it is empty, missing, or holds a model of merv.

    Raises:
        CheckpointError: The folder holds something else.
    """
    config = Path(folder, CONFIG)
    is_merv = config.is_file() and b'"merv":' in config.read_bytes()
    is_empty = not config.parent.exists() or (config.parent.is_dir() and not any(config.parent.iterdir()))
    if not is_merv and not is_empty:
        raise CheckpointError(
            f"{folder} exists and is not a checkpoint of merv; it was not overwritten. Choose another folder."
        )


# Interrupted writes ---------------------------------------------------------------------------


def find_folder(folder: str | Path) -> Path:
    """The path to read a folder from: the `.old` folder beside it if `replace_folder` was interrupted.

    Nothing is moved or removed, so reading needs no write permission.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    old = [path for path in temporaries_beside(folder) if path.name.endswith(".old")]
    return max(old, key=lambda path: path.stat().st_mtime, default=folder)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary folders of killed processes, after `folder` has been written.

    Temporary folders of other machines are kept, because they may still be in use.
    """
    for leftover in filter(is_abandoned, temporaries_beside(Path(folder))):
        shutil.rmtree(leftover, ignore_errors=True)
