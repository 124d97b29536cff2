"""Weights: find them on a hub, in a folder, file or installed package; load them key by key.

Two steps, so that an encoder can read the config.json beside its weights before it builds its
network: `locate` turns what a user typed into a `Source`, `load_exactly` copies a state dict into a module
and accepts no key missing, none left over and none of another shape. Nothing is ever substituted
for what was asked, and no file is ever fully unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from merv.errors import WeightsError
from merv.utils.files import fetched_folder, files_digest, package_folders
from merv.utils.hub import download, find_on_hub

PRETRAINED = "pretrained"
BUILT_IN = "built-in"
PACKAGE = "package:"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WRAPPERS = ("state_dict", "model")  # what training scripts call the weights beside their other state


@dataclass(frozen=True)
class Identity:
    """Which weights an encoder runs on: what was asked for, the commit, a hash of the bytes.

    sha256 is that of the file, or of the hashes of several: the shards in order, then config.json where
    the encoder reads it. Built-in weights are hashed tensor by tensor. Random ones have neither hash nor
    revision.
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
    _also_read: list[Path] = field(default_factory=list, compare=False, repr=False)

    def config(self) -> dict:
        """The config.json that lies beside the weights; reading it makes it part of their identity.

        Raises WeightsError where there is none, or it is damaged.
        """
        path = self.files[0].parent / "config.json"
        if self.revision is not None:
            path = find_on_hub(self.name, self.revision, [path.name]) or path
        if not path.is_file():
            raise WeightsError(
                f"{self.name}: no config.json beside {self.files[0].name}. It says how the network is "
                "built, so it is needed: pass a folder that has both."
            )
        self._also_read[:] = [path]
        return _json(path)

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU, in the dtype that they were saved in.

        Raises WeightsError where a file is damaged or holds something other than named tensors, and
        where two files hold a tensor of the same name.
        """
        state: dict[str, Tensor] = {}
        for file in self.files:
            read = _read(file)
            twice = [key for key in read if key in state]
            if twice:
                raise WeightsError(f"{file} holds tensors that another file of it has too ({_few(twice)}).")
            state.update(read)
        return state

    def identity(self) -> Identity:
        """Name, commit, and the hash of all that was read."""
        return Identity(self.name, self.revision, files_digest([*self.files, *self._also_read]))


def locate(weights: str | os.PathLike[str], names: Sequence[str] = WEIGHT_FILES) -> Source:
    """Find weights: a file, a folder in the hub's layout, `package:MODULE/GLOB`, or a hub id.

    names: which files to look for in a folder or hub repository, best first. A hub id may carry a
    revision: "owner/name@revision". A whole commit that is in the cache is taken from there; otherwise
    the hub is asked, and the cache only where it does not answer. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN
    are honored; see docs/weights.md. The name of what was found is an absolute path or a hub id, so
    that it can be found again from another directory.

    Raises WeightsError where nothing is found; it says what else to type.

    >>> locate("/nowhere")
    Traceback (most recent call last):
    merv.errors.WeightsError: No weights at /nowhere: no such file or folder.
    """
    if not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights):
        raise WeightsError(
            f"weights={weights!r} names none. Wanted: 'pretrained', a folder, a file, a hub id, or None for "
            "random ones."
        )
    weights = os.fspath(weights)
    if weights.startswith(PACKAGE):
        module, _, pattern = weights.removeprefix(PACKAGE).partition("/")
        try:
            return Source(weights, (package_file(module, pattern),))
        except (ValueError, NotImplementedError) as error:  # of find_spec, of glob
            raise WeightsError(f"{weights!r} is no {PACKAGE}MODULE/GLOB: {error}.") from error
    path = Path(weights).expanduser()
    if path.is_file():
        return Source(str(path.absolute()), _shards(path))
    if path.is_dir():
        return _in_folder(weights, path, names)
    repo, _, revision = weights.partition("@")
    if path.is_absolute() or weights.startswith((".", "~")) or repo.count("/") != 1:
        raise WeightsError(f"No weights at {weights}: no such file or folder.")
    first = find_on_hub(repo, revision or None, names)
    if first is None:
        raise WeightsError(f"{repo} is on the hub, but holds none of {', '.join(names)}.")
    commit = first.parent.name  # the cache's layout: …/snapshots/<commit>/<file>
    return Source(repo, _shards(first, lambda name: download(repo, commit, name)), commit)


def load_exactly(module: nn.Module, state: dict[str, Tensor], name: str, owner: str) -> None:
    """Copy `state` into `module`: all its keys, and no others, in the dtype of the module.

    name, owner: what the weights and the module are called in the message.

    Raises WeightsError with the first few keys that are missing, left over, of another shape, or integers
    (quantized weights, say) where the module has floating-point numbers.
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
        "not floating-point": [
            f"{key} {state[key].dtype}"
            for key in wanted
            if key in state and wanted[key].is_floating_point() and not state[key].is_floating_point()
        ],
    }
    if any(faults.values()):
        said = "; ".join(f"{len(keys)} {what} ({_few(keys)})" for what, keys in faults.items() if keys)
        raise WeightsError(f"The weights {name} do not fit {owner}: {said}. {_way_out(wanted, state)}")
    module.load_state_dict(state)


def _way_out(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What to do about weights that do not fit: all that is wrong may be a prefix."""
    if prefix := _prefix(state, wanted):
        how = (
            f"all names begin with {prefix!r}, which merv.encoding.weights.select(state, prefix={prefix!r}) "
            "takes off"
        )
    elif prefix := _prefix(wanted, state):
        how = (
            f"all names lack {prefix!r}, which merv.encoding.weights.renamed(state, {{'^': {prefix!r}}}) adds"
        )
    else:
        return "Are they those of another variant or model?"
    return f"But {how}: in the encoder's rename(), or before the file is saved."


def _prefix(longer: Collection[str], shorter: Collection[str]) -> str:
    """What each name of `longer` has before one of `shorter`, or nothing; a prefix keeps their order."""
    prefix = min(longer, default="").removesuffix(min(shorter, default=""))
    return prefix if {prefix + key for key in shorter} == set(longer) else ""


def select(state: dict[str, Tensor], *, prefix: str = "", drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A state dict without the keys that begin with one of `drop`, and with `prefix` taken off the rest.

    What is left out is named, so that nothing is left out unseen.

    >>> list(select({"visual.proj": torch.ones(1), "logit_scale": torch.ones(1)}, prefix="visual.",
    ...             drop=("logit_scale",)))
    ['proj']
    """
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if not key.startswith(drop)}


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    r"""A state dict under other names: each pattern of `table`, in order, substituted in each.

    >>> list(renamed({"encoder.layer.0.norm": torch.ones(1)}, {r"^encoder\.layer\.": "blocks."}))
    ['blocks.0.norm']
    """
    names = {key: key for key in state}
    for pattern, new in table.items():
        names = {key: re.sub(pattern, new, name) for key, name in names.items()}
    return {names[key]: tensor for key, tensor in state.items()}


def joined(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> dict[str, Tensor]:
    """A state dict in which tensors that differ in one step of their names are one, row under row.

    >>> list(joined({"a.q.bias": torch.ones(1), "a.k.bias": torch.ones(1)}, ("q", "k"), "qk"))
    ['a.qk.bias']
    """
    result = dict(state)
    for key in state:
        rows = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if rows[0] != rows[1] and all(row in state for row in rows):
            one = torch.cat([result.pop(row) for row in rows])
            result[key.replace(f".{parts[0]}.", f".{whole}.")] = one
    return result


def identity_of(module: nn.Module) -> Identity:
    """The identity of weights that a module makes itself: the hash of its tensors."""
    return Identity(BUILT_IN, None, values_digest(module))


def values_digest(module: nn.Module) -> str:
    """SHA-256 of the names and bytes of all tensors of a module, on whatever device."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def package_file(module: str, pattern: str) -> Path:
    """The file that `pattern` matches in the folder of an installed package, or of a fetched one.

    The package is not imported. Raises WeightsError with the command that fetches it.
    """
    for folder in [*package_folders(module), fetched_folder(module)]:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise WeightsError(
        f"The weights in the package {module} are not on this machine. Run `merv download "
        f"{module.replace('_', '-')}` to fetch them, or pass weights=None for random ones."
    )


def _in_folder(weights: str, folder: Path, names: Sequence[str]) -> Source:
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise WeightsError(
            f"No weights in the folder {weights}: looked for {', '.join(names)}. "
            "If they have another name, pass the file itself."
        )
    return Source(str(folder.absolute()), _shards(found[0]))


def _shards(file: Path, fetch: Callable[[str], Path] | None = None) -> tuple[Path, ...]:
    """The files that hold the tensors: `file` itself, or those that it lists if it is an index.

    fetch: gets one of them by name; without it they must lie beside the index.
    """
    if not file.name.endswith(".index.json"):
        return (file,)
    listed = _json(file).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise WeightsError(f"{file} is no index of weights: it has no weight_map.")
    names = sorted({str(name) for name in listed.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{file} lists files that are not beside it ({_few(outside)}); they are not read.")
    if fetch is not None:
        return tuple(fetch(name) for name in names)
    absent = [name for name in names if not (file.parent / name).is_file()]
    if absent:
        raise WeightsError(f"The folder {file.parent} lacks {len(absent)} of its files ({_few(absent)}).")
    return tuple(file.parent / name for name in names)


def _json(file: Path) -> dict:
    try:
        held = json.loads(file.read_text())
    except ValueError as error:  # of the text or of its encoding
        raise WeightsError(f"{file} is damaged: {error}") from error
    if not isinstance(held, dict):
        raise WeightsError(f"{file} holds a {type(held).__name__}; wanted a JSON object.")
    return held


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        with file.open("rb") as start:
            safe = file.suffix == ".safetensors" or start.read(9)[8:] == b"{"  # whatever it is called
        if safe:
            return load_file(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly anything
        raise WeightsError(f"{file} cannot be read as weights: {_reason(error)}.") from error
    if _is_state(held):
        return held
    states = [key for key, value in held.items() if _is_state(value)] if isinstance(held, dict) else []
    if len(states) == 1 and states[0] in WRAPPERS:
        return held[states[0]]
    keys = _few([str(key) for key in held]) if isinstance(held, dict) else type(held).__name__
    raise WeightsError(
        f"{file} holds {keys}; wanted a state dict, tensors by name, alone or as the only one in a "
        f"dictionary under {' or '.join(map(repr, WRAPPERS))}."
    )


def _reason(error: Exception) -> str:
    """The first sentence of an error, without a full stop; never torch's advice to unpickle a file fully."""
    if isinstance(error, UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"it holds pickled objects{f' ({found[1]})' if found else ''}, which are never made. Save the "
            "tensors alone: torch.save(module.state_dict(), file)"
        )
    return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


def _is_state(held: object) -> bool:
    """Whether it is tensors by name."""
    if not isinstance(held, dict) or not held:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items())


def _few(keys: Sequence[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", …" if len(keys) > most else "")
