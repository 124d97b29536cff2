"""Notice when the weights of an encoder are no longer the ones that it was created with."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from merv.utils.private import version_of


class TrackedModule(nn.Module):
    """A module that knows whether its parameters were replaced or written to since `track_weights`.

    It is not modified by moving, converting, copying or pickling it, nor by loading the same values again.
    Writes through a parameter's `.data` are not noticed; call `mark_modified` after them.
    """

    def __init__(self) -> None:
        super().__init__()
        # Each parameter with its number of writes when tracking started; None once the module is modified.
        self._tracked: list[tuple[weakref.ref[Tensor], int]] | None = None
        self.register_load_state_dict_pre_hook(_compare_before_load)
        self.register_load_state_dict_post_hook(_track_after_load)

    def track_weights(self) -> None:
        """Take the current weights as the unmodified ones."""
        self._tracked = [(weakref.ref(parameter), version_of(parameter)) for parameter in self.parameters()]

    def mark_modified(self) -> None:
        """Record that the weights were modified."""
        self._tracked = None

    @property
    def weights_modified(self) -> bool:
        """Whether a parameter was replaced or written to."""
        if self._tracked is None:
            return True
        parameters = list(self.parameters())
        return len(parameters) != len(self._tracked) or any(
            tracked() is not parameter or version != version_of(parameter)
            for parameter, (tracked, version) in zip(parameters, self._tracked, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tracked": None if self.weights_modified else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._tracked is not None:
            self.track_weights()


def _compare_before_load(module: TrackedModule, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Mark the module as modified if the state dict holds other values than it has now."""
    current = module.state_dict(prefix=prefix)
    pairs = [(current[name], state[name]) for name in current.keys() & state.keys()]
    if module.weights_modified or any(
        old.is_meta or new.is_meta or not torch.equal(old, new.to(old)) for old, new in pairs
    ):
        module.mark_modified()


def _track_after_load(module: TrackedModule, _: Any) -> None:
    """Loading the same values writes to the parameters: start counting again."""
    if module._tracked is not None:
        module.track_weights()
