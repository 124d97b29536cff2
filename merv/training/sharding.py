"""Sharded training (FSDP2) and its checkpoints, on Lightning's ModelParallelStrategy.

The language model and the fusion are split over the processes; frozen encoders stay whole on each.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from merv.checkpoints.folder import (
    TRAINING_STATE,
    find_folder,
    read_config,
    remove_leftovers,
    save_folder,
    saved_files,
    verify_folder,
    write_config,
)
from merv.errors import CheckpointError, TrainingError
from merv.utils.distributed import gathered, processes, rank
from merv.utils.files import files_below, folder_digests, replace_folder, temporary_beside
from merv.utils.private import layer_classes


def shard(model: Any, mesh: Any) -> None:
    """Split a VideoLLM over the processes of a device mesh, in place: the LLM's layers and the fusion.

    Encoders stay whole on each process.

    Raises:
        TrainingError: The installed torch, the quantization or the trained parts do not allow it.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise TrainingError(
            f"Sharding needs a newer torch than {torch.__version__}. Upgrade it, or set "
            "trainer.strategy: ddp."
        )
    if model.llm_identity["quantize"]:
        raise TrainingError(
            "A quantized LLM cannot be sharded. Set trainer.strategy: ddp; each process then holds all of it."
        )
    if any(name.startswith("mixer.") for name in model.trained):
        raise TrainingError(
            "Parts of a mixer (mixer.NAME) cannot be trained sharded. Set trainer.strategy: ddp."
        )
    mesh = mesh["data_parallel"]
    frozen = {p for _, encoder in model.vision.named() for p in encoder.parameters()}
    layers = layer_classes(model.llm)
    for module in list(model.llm.modules()):
        if type(module).__name__ in layers:
            # A LoRA is always fp32, so it needs a group separate from the layer
            leaves = [m for n, m in module.named_modules() if ".lora_" in n and not list(m.children())]
            lora = [m for m in leaves if list(m.parameters())]
            if lora:
                fully_shard(lora, mesh=mesh)
            fully_shard(module, mesh=mesh)
    fully_shard(model.fusion, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    register_fsdp_forward_method(model, "generate")


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, with NCCL or gloo. Each process writes its part of a checkpoint.

    A checkpoint is a folder with the trained tensors only. `merv consolidate` turns it into a folder that
    `merv ask` and `VideoLLM.from_pretrained` load.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **options)

    def setup_environment(self) -> None:
        """Spread the data over all processes."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained tensors; each process returns its shards."""
        from torch.distributed.fsdp import FSDPModule

        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # modules that ran without a backward pass are still gathered
        return self.lightning_module.state_dict()  # type: ignore[union-attr]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, completely or not at all."""
        import torch.distributed.checkpoint as dcp

        with temporary_beside(Path(filepath)) as suggested:
            path, temporary = self.broadcast(
                (Path(filepath), suggested)
            )  # all use the paths of the first process
            if self.is_global_zero:
                temporary.mkdir(parents=True)
            self.barrier()
            states = {"state_dict": checkpoint.pop("state_dict")}
            for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
                states[f"optimizer_{number}"] = state
            dcp.save(states, checkpoint_id=temporary)
            if self.is_global_zero:
                torch.save(checkpoint, temporary / TRAINING_STATE)
            self.barrier()
            shares = gathered(folder_digests(temporary, _share(files_below(temporary))))
            if self.is_global_zero:
                write_config(
                    temporary,
                    "VideoLLM",
                    checkpoint["config"],
                    {k: v for share in shares for k, v in share.items()},
                )
                replace_folder(temporary, path)
                remove_leftovers(path)
            self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the tensors into the model and the optimizers; return the rest of the checkpoint."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        from merv.training.distributed_checkpoint import load

        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            raise CheckpointError(
                f"Cannot resume from {path}: it is not a sharded checkpoint. "
                "Use the trainer.strategy that wrote it."
            )
        _verify_together(path)
        assert self.lightning_module is not None
        assert self.model is not None
        load({"state_dict": self.lightning_module.state_dict()}, path)
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            states = {key: get_optimizer_state_dict(self.model, optimizer)}
            load(states, path)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=states[key])
        return read_training_state(path)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete the folder."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)


def register() -> None:
    """Register `trainer.strategy: sharded` with Lightning, if it is not registered yet."""
    if "sharded" not in StrategyRegistry:
        StrategyRegistry.register("sharded", Sharded, description="FSDP2 over all processes")


def is_sharded(path: str | Path) -> bool:
    """Whether `Sharded` wrote the checkpoint in this folder."""
    return (Path(path) / ".metadata").is_file() and (Path(path) / TRAINING_STATE).is_file()


def _share(files: Sequence[str]) -> list[str]:
    """The files that this process hashes."""
    return list(files[rank() :: processes()])


def _verify_together(path: Path) -> None:
    """Verify the files of a checkpoint, each in one process. All processes raise the same CheckpointError."""
    fault = ""
    try:
        verify_folder(path, True, _share(saved_files(path)))
    except CheckpointError as error:
        fault = str(error)
    if faults := [fault for fault in gathered(fault) if fault]:
        raise CheckpointError(faults[0])


def read_training_state(path: Path) -> dict[str, Any]:
    """Read training.pt of a checkpoint. Only tensors and plain values are unpickled.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = path / TRAINING_STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # damaged files raise errors of many types
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}). Resume from an earlier checkpoint, or start a "
            f"new run from its model: --model.init_from={path}."
        ) from error
    return state


def full_state_dict(path: str | Path) -> Mapping[str, torch.Tensor]:
    """Read the model's tensors from a sharded checkpoint, in one process.

    Raises:
        CheckpointError: The folder is not a sharded checkpoint.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from merv.training.distributed_checkpoint import load, read_metadata

    if not is_sharded(path):
        raise CheckpointError(
            f"{path} is not a sharded checkpoint of merv. Expected a folder that a run with "
            "trainer.strategy: sharded wrote."
        )
    verify_folder(path, True)
    metadata = read_metadata(Path(path)).state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    load(state, Path(path), no_dist=True)
    return {name.removeprefix("state_dict.model."): tensor for name, tensor in state.items()}


def consolidate(folder: str | Path, out: str | Path) -> None:
    """Turn a sharded checkpoint into a folder that `VideoLLM.from_pretrained` loads.

    The trained parts must fit into this machine's memory. The optimizer state is left out.

    Args:
        folder: The sharded checkpoint.
        out: The folder to write. It is written completely or not at all.

    Raises:
        CheckpointError: `folder` is not a sharded checkpoint, or `out` holds something other than a model of
            merv.
    """
    folder = find_folder(folder)
    state = full_state_dict(folder)
    kind, config = read_config(folder, required=TRAINING_STATE)
    save_folder(out, kind, config, state)
