"""The format of a saved model: a folder with `config.json` and the trained tensors in safetensors.

`config.json` has the SHA-256 of every other file of the folder, and one of itself. So it is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from merv.checkpoints.config_schema import HEADER, check, check_config, shown
from merv.errors import CheckpointError
from merv.utils.files import (
    changed_files,
    files_below,
    folder_digests,
    new_folder,
    open_file,
    temporaries_beside,
)
from merv.utils.suggest import nearest
from merv.utils.torch_modules import state_dict_mismatch

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINING_STATE = "training.pt"  # everything in a checkpoint of a run except config and model tensors
MAX_CONFIG_BYTES = 16 * 2**20
VERIFY_BYTES = 256 * 2**20  # larger files are only hashed with verify=True; SHA-256 takes 0.2 to 0.7 s for it
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
    """Write model.safetensors and config.json into an existing folder, whose other files are complete."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS)
    write_config(folder, kind, config)
    shutil.copymode(Path(folder) / CONFIG, Path(folder) / WEIGHTS)  # safetensors lets only the owner read it


def write_config(folder: str | Path, kind: str, config: Mapping[str, Any]) -> None:
    """Write config.json into an existing folder, as its last file.

    Args:
        folder: The folder.
        kind: Name of the class that loads it.
        config: Values for config.json.

    Raises:
        CheckpointError: `read_config` would refuse the config.
    """
    folder = Path(folder)
    check_config(kind, json.loads(json.dumps(config)), f"The config of the model for {folder}")
    files = [name for name in files_below(folder) if name != CONFIG]
    content = {"merv": FORMAT, "model_type": "merv", "kind": kind, **config}
    content["sha256"] = folder_digests(folder, files)
    content["config_sha256"] = _config_digest(content)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _config_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content of config.json, in its order but without its white space."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. Its previous content is unchanged."
        ) from error


def load_folder(
    folder: str | Path, kind: str, verify: bool | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors of a folder that `save_folder` wrote.

    Args:
        folder: The folder.
        kind: Name of the class that loads it.
        verify: See `verify_folder`.

    Raises:
        CheckpointError: The folder is missing, damaged, or does not hold a model of this kind.
    """
    from safetensors.torch import load_file

    path = find_folder(folder)
    saved_kind, config = read_config(path)
    if saved_kind != kind:
        raise CheckpointError(f"{path} holds a {saved_kind!r}; expected a {kind!r}.")
    verify_folder(path, verify)
    try:
        return config, load_file(path / WEIGHTS)
    except Exception as error:  # damaged files raise errors of many types
        raise CheckpointError(f"{path / WEIGHTS} could not be read: {error}") from error


def verify_folder(
    folder: str | Path, verify: bool | None = None, files: Collection[str] | None = None
) -> None:
    """Compare files of a folder with the SHA-256 that they had when the model was saved.

    A config.json that has changed is a warning, because the change may be yours.

    Args:
        folder: The folder of a model or checkpoint.
        verify: True compares all files, None those of up to 256 MiB (`VERIFY_BYTES`), False none.
        files: Paths in the folder. Defaults to all files that were saved, except training.pt; without
            verify=True, a file may be missing.

    Raises:
        CheckpointError: A file has changed or is missing, or verify is True and the folder has no digests.
    """
    folder = find_folder(folder)
    if verify is False:
        return
    content = _read_content(folder)
    saved = content.pop("config_sha256", None)
    if saved is None or "sha256" not in content:
        if verify:
            raise CheckpointError(
                f"{folder / CONFIG} has no SHA-256 of its files, so they cannot be verified. Load the model "
                "without verify=True, and save it again."
            )
        return
    if saved != _config_digest(content):
        warnings.warn(
            f"{folder / CONFIG} has changed since the model was saved. It may describe another model.",
            stacklevel=2,
        )
    digests = content["sha256"]
    if files is None:
        files = [name for name in digests if name != TRAINING_STATE and (verify or (folder / name).is_file())]
    chosen = {name: digests.get(name, "") for name in files}
    if changed := changed_files(folder, chosen, float("inf") if verify else VERIFY_BYTES):
        raise CheckpointError(
            f"Damaged or changed since the model was saved (another SHA-256): "
            f"{', '.join(str(folder / name) for name in changed)}. Copy or download the folder again, or use "
            "an earlier checkpoint."
        )


def read_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """Read kind and config of a folder, which must also have a model.safetensors.

    Raises:
        CheckpointError: The folder is missing, damaged, or not a model of merv.
    """
    folder = find_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"The folder {folder} does not exist.{_suggestion(folder.parent, folder.name)}")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} is not a complete model of merv. Expected {CONFIG} and {WEIGHTS}, found {files}."
            f"{_suggestion(folder, 'model')}"
        )
    content = _read_content(folder)
    config = {key: value for key, value in content.items() if key not in ("merv", "kind", *HEADER)}
    check_config(content.get("kind"), config, folder / CONFIG)
    return content["kind"], config


def _read_content(folder: Path) -> dict[str, Any]:
    """Read config.json, and check everything in it that is not the config of the model."""
    path = folder / CONFIG
    try:
        with open_file(path) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES >> 20} MiB")
        content = json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    if not isinstance(content, dict) or "merv" not in content:
        raise CheckpointError(
            f"{path} was not written by merv: it has no key 'merv'. Expected a folder written by "
            "save_pretrained or `merv fit`."
        )
    if content["merv"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(content['merv'])}; this version of merv reads format {FORMAT}. "
            "Train or convert the model again."
        )
    for key, rule in HEADER.items():
        if key in content:
            check(rule, content[key], path, key)
    return content


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
        CheckpointError: Names, shapes or kinds of numbers differ, or a tensor has NaN.
    """
    check_fits(tensors, state, folder)
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{folder}: the tensor {name} has NaN. Use an earlier checkpoint.")
    for name, tensor in tensors.items():
        tensor.data.copy_(state[name])


def check_fits(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Raise CheckpointError unless `state` has the names, shapes and kinds of numbers of `tensors`."""
    if mismatch := state_dict_mismatch(tensors, state):
        raise CheckpointError(f"{folder} does not fit the model that its config.json describes: {mismatch}.")


def check_free(folder: str | Path) -> None:
    """Check that a model may be saved to `folder`: it is empty, missing, or holds a model of merv.

    Raises:
        CheckpointError: The folder holds something else.
    """
    config = Path(folder, CONFIG)
    is_merv = False
    if config.is_file():
        with open_file(config) as file:  # the key "merv" is written first
            is_merv = b'"merv":' in file.read(1 << 16)
    is_empty = not config.parent.exists() or (config.parent.is_dir() and not any(config.parent.iterdir()))
    if not is_merv and not is_empty:
        raise CheckpointError(
            f"{folder} exists and is not a checkpoint of merv; it was not overwritten. Choose another folder."
        )


def find_folder(folder: str | Path) -> Path:
    """The path to read a folder from: the `.old` folder beside it if `replace_folder` was interrupted.

    Nothing is moved or removed, so reading needs no write permission.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    old = [path for path in temporaries_beside(folder) if path.name.endswith(".old")]
    return max(old, key=lambda path: path.stat().st_mtime, default=folder)
