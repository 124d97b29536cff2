"""Folders in the layout of a model hub, and encoders that are deep enough for a test."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def write_hub(
    folder: Path, state: dict[str, Tensor], *, file: str = "model.safetensors", config: dict | None = None
) -> str:
    """Weights (and a config.json) as a hub's repository has them; the folder as `weights=` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / file) if file.endswith(".safetensors") else torch.save(state, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_shards(folder: Path, state: dict[str, Tensor], stem: str = "model.safetensors") -> str:
    """The same in two files and an index."""
    base, _, suffix = stem.partition(".")
    names = sorted(state)
    files = {name: f"{base}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(files.values()):
        write_hub(folder, {name: state[name] for name in names if files[name] == file}, file=file)
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return str(folder)


def cache_as_hub(home: Path, repo: str, commit: str, folder: str, ref: str = "main") -> None:
    """Put a folder where huggingface_hub keeps what it downloaded: `home` is $HF_HOME/hub."""
    place = home / f"models--{repo.replace('/', '--')}"
    for made in ("refs", "snapshots"):
        (place / made).mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    Path(folder).rename(place / "snapshots" / commit)


def output_of(block: nn.Module, run) -> Tensor:
    """What `block` gives while `run()` runs: a reference that needs no interface of the library."""
    outputs = []
    hook = block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad():
        run()
    hook.remove()
    return outputs[-1]
