"""Scale: what several processes need of the training, on the engines that Lightning and torch have.

Plain DDP needs nothing. Sharding (FSDP2) splits the language model and the fusion over processes;
encoders that are frozen stay whole on each.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from merv.checkpoints.folder import clear_up, find_folder, read_config, save_folder, swap, write_config
from merv.errors import CheckpointError, TrainingError
from merv.utils.files import temporary_beside

META = "training.pt"  # of a checkpoint: all but tensors of the model


def shard(model: Any, mesh: Any) -> None:
    """Split a VideoLLM over the processes of a device mesh, in place: layer by layer, and the fusion.

    Encoders stay whole on each process.
    Raises TrainingError where that cannot be done.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise TrainingError(
            f"Sharding needs a newer torch than {torch.__version__}; DDP works with this one."
        )
    if model.identity["quantize"]:
        raise TrainingError(
            "A quantized LLM cannot be sharded; use strategy ddp, each process with all of it."
        )
    if any(name.startswith("mixer.") for name in model.trained):
        raise TrainingError("Parts of a mixer (mixer.NAME) cannot be trained sharded; use strategy ddp.")
    mesh = mesh["data_parallel"]
    frozen = {p for _, encoder in model.vision.named() for p in encoder.parameters()}
    layers = set(getattr(model.llm, "_no_split_modules", None) or ())
    for module in list(model.llm.modules()):
        if type(module).__name__ in layers:
            # A LoRA is fp32 whatever the layer is: a group of its own
            lora = [m for n, m in module.named_modules() if ".lora_" in n and not list(m.children())]
            lora = [m for m in lora if list(m.parameters())]
            if lora:
                fully_shard(lora, mesh=mesh)
            fully_shard(module, mesh=mesh)
    fully_shard(model.fusion, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    register_fsdp_forward_method(model, "generate")


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints that each process writes its part of.

    A checkpoint is a folder with what is trained, nothing frozen; `merv consolidate` makes one of it that
    `merv ask` and `VideoLLM.from_pretrained` load. Works with NCCL and gloo.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **options)

    def setup_environment(self) -> None:
        """All processes share the data."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, each process its shard."""
        from torch.distributed.fsdp import FSDPModule

        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what ran without a backward pass is still whole
        return self.lightning_module.state_dict()  # type: ignore[union-attr]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, whole or not at all."""
        import torch.distributed.checkpoint as dcp

        with temporary_beside(Path(filepath)) as own:
            path, fresh = self.broadcast((Path(filepath), own))
            if self.is_global_zero:
                clear_up(path)
                fresh.mkdir(parents=True)
            self.barrier()
            states = {"state_dict": checkpoint.pop("state_dict")}
            for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
                states[f"optimizer_{number}"] = state
            dcp.save(states, checkpoint_id=fresh)
            if self.is_global_zero:
                write_config(fresh, "VideoLLM", checkpoint["config"])
                torch.save(checkpoint, fresh / META)
                swap(fresh, path)
            self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the model and the optimizers; returns the rest."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            raise CheckpointError(f"{path} is no sharded checkpoint; it was written by another strategy.")
        assert self.lightning_module is not None
        assert self.model is not None
        dcp.load({"state_dict": self.lightning_module.state_dict()}, checkpoint_id=path)
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[f"optimizer_{number}"])
        return torch.load(path / META, weights_only=True)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete the folder."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)


def register() -> None:
    """Let Lightning know the strategy by its name; once is enough."""
    if "sharded" not in StrategyRegistry:
        StrategyRegistry.register("sharded", Sharded, description="FSDP2 over all processes")


def is_sharded(path: str | Path) -> bool:
    """Whether a folder is a checkpoint that `Sharded` wrote."""
    return (Path(path) / ".metadata").is_file() and (Path(path) / META).is_file()


def whole_state(path: str | Path) -> Mapping[str, torch.Tensor]:
    """The model's tensors of a sharded checkpoint, put together in this one process.

    Raises CheckpointError where `path` is none.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not is_sharded(path):
        raise CheckpointError(f"{path} is no sharded checkpoint of merv.")
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if name.startswith("state_dict.") and isinstance(about, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return {name.removeprefix("state_dict.").removeprefix("model."): t for name, t in state.items()}


def consolidate(folder: str | Path, out: str | Path) -> None:
    """A sharded checkpoint as a folder that `VideoLLM.from_pretrained` loads; whole or not at all.

    The model has to fit into this machine's memory. Optimizers are left out.
    Raises CheckpointError where `folder` is no sharded checkpoint, or `out` is not merv's to replace.
    """
    folder = find_folder(folder)
    state = whole_state(folder)
    kind, config = read_config(folder, beside=META)
    save_folder(out, kind, config, state)
