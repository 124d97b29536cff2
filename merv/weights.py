"""Weights: find them on a hub, in a folder, file or installed package; load them key by key.

Two steps, so that an encoder can read the config.json beside its weights before it builds its
network: `locate` turns what a user typed into a `Source`, `fill` copies a state dict into a module
and accepts no key missing, none left over and none of another shape. Nothing is ever substituted
for what was asked, and no file is ever fully unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from merv.errors import WeightsError

PRETRAINED = "pretrained"
BUILT_IN = "built-in"
PACKAGE = "package:"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Identity:
    """Which weights an encoder runs on: what was asked for, the commit, a hash of the bytes.

    sha256 is that of the files (of the tensors where weights are built in); it and the revision
    are None for random weights.
    """

    source: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """Weights that were found: their name, the files that hold them, the commit if from a hub."""

    name: str
    files: tuple[Path, ...]
    revision: str | None = None

    def config(self) -> dict:
        """The config.json that lies beside the weights.

        Raises WeightsError where there is none.
        """
        from huggingface_hub.errors import EntryNotFoundError

        path = self.files[0].parent / "config.json"
        try:
            if self.revision is not None:
                path = _download(self.name, path.name, self.revision)
            return json.loads(path.read_text())
        except (FileNotFoundError, EntryNotFoundError) as error:
            raise WeightsError(
                f"{self.name}: no config.json beside {self.files[0].name}. It says how the network is "
                "built, so it is needed: pass a folder that has both."
            ) from error

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU.

        Raises WeightsError where a file is damaged or holds something other than named tensors.
        """
        state: dict[str, Tensor] = {}
        for file in self.files:
            state.update(_read(file))
        return state

    def identity(self) -> Identity:
        """Name, commit, and the hash of the files, one after the other."""
        return Identity(self.name, self.revision, _digest(_chunks(self.files)))


def locate(weights: str, names: Sequence[str] = WEIGHT_FILES) -> Source:
    """Find weights: a file, a folder in the hub's layout, `package:MODULE/GLOB`, or a hub id.

    names: which files to look for in a folder or hub repository, best first. A hub id may carry
    a revision: "owner/name@revision". HF_HOME and HF_HUB_OFFLINE are honoured. The name of what was found
    is an absolute path or a hub id, so that it can be found again from another directory.

    Raises WeightsError where nothing is found; it says what else to type.

    >>> locate("/nowhere")
    Traceback (most recent call last):
    merv.errors.WeightsError: No weights at /nowhere: no such file or folder.
    """
    if weights.startswith(PACKAGE):
        module, _, pattern = weights.removeprefix(PACKAGE).partition("/")
        return Source(weights, (package_file(module, pattern),))
    path = Path(weights).expanduser()
    if path.is_file():
        return Source(str(path.absolute()), (path,))
    if path.is_dir():
        return _in_folder(weights, path, names)
    if path.is_absolute() or weights.startswith((".", "~")) or weights.count("/") != 1:
        raise WeightsError(f"No weights at {weights}: no such file or folder.")
    return _on_hub(weights, names)


def fill(module: nn.Module, state: dict[str, Tensor], name: str, owner: str) -> None:
    """Copy `state` into `module`: all its keys, and no others.

    name, owner: what the weights and the module are called in the message.

    Raises WeightsError with the first few keys that are missing, left over or of another shape.
    """
    wanted = module.state_dict()
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [
            f"{key} {list(state[key].shape)}, wanted {list(wanted[key].shape)}"
            for key in wanted
            if key in state and state[key].shape != wanted[key].shape
        ],
    }
    if any(faults.values()):
        said = "; ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in faults.items() if keys)
        raise WeightsError(
            f"The weights {name} do not fit {owner}: {said}. Are they those of another variant or model?"
        )
    module.load_state_dict(state)


def select(state: dict[str, Tensor], *, prefix: str = "", drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A state dict without the keys that begin with one of `drop`, and with `prefix` taken off the rest.

    What is left out is named, so that nothing is left out unseen.

    >>> list(select({"visual.proj": torch.ones(1), "logit_scale": torch.ones(1)}, prefix="visual.",
    ...             drop=("logit_scale",)))
    ['proj']
    """
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if not key.startswith(drop)}


def identity_of(module: nn.Module) -> Identity:
    """The identity of weights that a module makes itself: the hash of its tensors."""
    tensors = module.state_dict().items()
    return Identity(BUILT_IN, None, _digest(key.encode() + t.numpy().tobytes() for key, t in tensors))


def cache_folder() -> Path:
    """Where merv keeps what it fetched: $MERV_CACHE, or ~/.cache/merv."""
    return Path(os.environ.get("MERV_CACHE") or "~/.cache/merv").expanduser()


def package_file(module: str, pattern: str) -> Path:
    """The file that `pattern` matches in the folder of an installed package, or of a fetched one.

    The package is not imported. Fetched ones lie in `cache_folder()/parts/MODULE`.

    Raises WeightsError with the command that fetches the package.
    """
    spec = importlib.util.find_spec(module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in [*folders, cache_folder() / "parts" / module]:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise WeightsError(
        f"The weights in the package {module} are not on this machine. Run `merv parts "
        f"{module.replace('_', '-')}` to fetch them, or pass weights=None for random ones."
    )


def _in_folder(weights: str, folder: Path, names: Sequence[str]) -> Source:
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise WeightsError(
            f"No weights in the folder {weights}: looked for {', '.join(names)}. "
            "If they have another name, pass the file itself."
        )
    shards = tuple(folder / name for name in _shards(found[0]))
    absent = [file.name for file in shards if not file.is_file()]
    if absent:
        raise WeightsError(f"The folder {weights} lacks {len(absent)} of its files ({_few(absent)}).")
    return Source(str(folder.absolute()), shards)


def _on_hub(weights: str, names: Sequence[str]) -> Source:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = weights.partition("@")
    unreachable: LocalEntryNotFoundError | None = None
    for name in names:
        try:
            first = _download(repo, name, revision or None, cached_only=unreachable is not None)
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            continue
        else:
            commit = first.parent.name  # the cache's layout: …/snapshots/<commit>/<file>
            return Source(repo, tuple(_download(repo, file, commit) for file in _shards(first)), commit)
    if unreachable is None:
        raise WeightsError(f"{repo} is on the hub, but holds none of {', '.join(names)}.")
    raise WeightsError(
        _no_hub(repo, "it is not in the cache, and the hub cannot be reached")
    ) from unreachable


def _download(repo: str, name: str, revision: str | None, cached_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=cached_only))
    except EntryNotFoundError:
        raise
    except (OSError, HFValidationError) as error:  # all answers of the hub that say no are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(_no_hub(repo, reason)) from error


def _no_hub(repo: str, reason: str) -> str:
    return (
        f"The weights {repo} cannot be had from the hub: {reason.rstrip('.')}. Where you have them, pass "
        'weights="/path/to/folder" (or file); weights=None makes random ones.'
    )


def _shards(file: Path) -> list[str]:
    """The names of the files that hold the tensors: `file` itself, or those that its index lists."""
    if not file.name.endswith(".index.json"):
        return [file.name]
    return sorted(set(json.loads(file.read_text())["weight_map"].values()))


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{file} cannot be read as weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = _few([str(key) for key in state]) if isinstance(state, dict) else type(state).__name__
        raise WeightsError(f"{file} holds {held}; wanted a state dict, tensors by name.")
    return state


def _chunks(files: Iterable[Path], size: int = 1 << 24) -> Iterable[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(size):
                yield chunk


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _few(keys: Sequence[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", …" if len(keys) > most else "")
