"""Folders in the layout of the Hugging Face hub and of its cache."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def write_hub(
    folder: Path, state: dict[str, Tensor], *, file: str = "model.safetensors", config: dict | None = None
) -> str:
    """Write weights and a config.json as in a hub repository. Returns the folder for `weights=`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / file) if file.endswith(".safetensors") else torch.save(state, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_shards(folder: Path, state: dict[str, Tensor], stem: str = "model.safetensors") -> str:
    """Write weights in two shards with an index. Returns the folder for `weights=`."""
    base, _, suffix = stem.partition(".")
    names = sorted(state)
    files = {name: f"{base}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(files.values()):
        write_hub(folder, {name: state[name] for name in names if files[name] == file}, file=file)
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return str(folder)


def cache_as_hub(home: Path, repo: str, commit: str, folder: str, ref: str = "main") -> None:
    """Move a folder into the cache of huggingface_hub. `home` is $HF_HOME/hub."""
    cache = home / f"models--{repo.replace('/', '--')}"
    for folder_name in ("refs", "snapshots"):
        (cache / folder_name).mkdir(parents=True, exist_ok=True)
    (cache / "refs" / ref).write_text(commit)
    Path(folder).rename(cache / "snapshots" / commit)


def output_of(block: nn.Module, run) -> Tensor:
    """The output of `block` during `run()`."""
    outputs = []
    hook = block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad():
        run()
    hook.remove()
    return outputs[-1]
