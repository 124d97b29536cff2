"""Sharded training (FSDP2), on Lightning's ModelParallelStrategy.

The language model and the fusion are split over the processes; frozen encoders stay whole on each.
Checkpoints are not split: they are those of any other strategy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry

from merv.errors import TrainingError
from merv.utils.distributed import unsharded
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
    """FSDP2 over all processes, with NCCL or gloo.

    The first process writes checkpoints, whole and in the same format as without sharding; so it needs CPU
    memory for the trained weights and AdamW's two moments. Every process reads them.
    """

    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer

    def __init__(self, **options: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **options)

    def setup_environment(self) -> None:
        """Spread the data over all processes."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained tensors, whole, in the first process; an empty dict in the others."""
        from torch.distributed.fsdp import FSDPModule

        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # modules that ran without a backward pass are still gathered
        return unsharded(self.lightning_module.state_dict(), self.is_global_zero)  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state of an optimizer, whole, in the first process."""
        state: Any = ParallelStrategy.optimizer_state(self, optimizer)
        whole = {key: unsharded(values, self.is_global_zero) for key, values in state["state"].items()}
        return {**state, "state": whole}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained tensors; each process keeps its part."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _split_like(own.get(name), t) for name, t in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the optimizers; each process keeps its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            split = {
                key: {name: _split_like(parameters[key], value) for name, value in values.items()}
                for key, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": split})


def _split_like(like: Any, whole: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of `whole`, sharded like `like`; `whole` if that is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(like, DTensor) and like.shape == whole.shape:
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole


def register_strategy() -> None:
    """Register `trainer.strategy: sharded` with Lightning, if it is not registered yet."""
    if "sharded" not in StrategyRegistry:
        StrategyRegistry.register("sharded", Sharded, description="FSDP2 over all processes")
