"""Most private names of other libraries that merv uses, with the reason for each.

Not here: overrides of private methods, in `Checkpoints` (training/checkpointing.py), `Sharded`
(training/sharding.py) and `Fit` (training/fit.py); datasets' `_hf_encoded` (video/open.py); Pillow's
`_prev_im` (video/images.py); torch's fake tensors and dispatch modes (training/dry_run.py). All were tested
with torch 2.15, transformers 5.23 and lightning 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

# torch -----------------------------------------------------------------------------------------


def version_of(tensor: Tensor) -> int:
    """Number of in-place writes to a tensor, except writes through `tensor.data`.

    It shows that weights have changed without hashing them; torch has no public name for it. It is 0 for a
    tensor that was created in inference mode: torch does not count its writes.
    """
    try:
        return tensor._version
    except RuntimeError:
        return 0


def storage_key(tensor: Tensor) -> int:
    """Number that identifies the storage of a tensor; fake tensors have no `data_ptr`."""
    return tensor.untyped_storage()._cdata


def tensor_tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Name → tensor of the parameters, and of the buffers, of each submodule; the tables can be written to.

    Assigning attributes instead would lose whether a buffer is saved.
    """
    for owner in module.modules():
        yield owner._parameters
        yield owner._buffers


def shut_down_workers(loader: Any) -> None:
    """Stop the worker processes of a torch DataLoader now, as Lightning does; no public method does it."""
    iterator = loader._iterator
    if loader.num_workers and iterator is not None:
        iterator._shutdown_workers()
    loader._iterator = None


# transformers ----------------------------------------------------------------------------------


def attention_kernel(llm: Any) -> str:
    """Name of the attention implementation that an LLM uses, e.g. "sdpa"; only the setter is public."""
    return llm.config.get_text_config()._attn_implementation


def layer_classes(llm: Any) -> set[str]:
    """Names of the classes of an LLM's layers, which it declares for splitting over devices."""
    return set(getattr(llm, "_no_split_modules", None) or ())


# lightning -------------------------------------------------------------------------------------


def is_attached(module: Any) -> bool:
    """Whether a LightningModule belongs to a Trainer; the public property raises if not."""
    return module._trainer is not None


# torch and lightning: DDP ----------------------------------------------------------------------


def leave_out_of_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Exclude parameters and buffers from DistributedDataParallel, which Lightning creates."""
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]
