"""Create mixers and projectors by name. `merv.utils.plugins` describes how plug-ins are registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merv.utils.plugins import Fault, Registry, must_subclass

if TYPE_CHECKING:
    from merv.fusion.mixers import Mixer
    from merv.fusion.projectors import Projector


def _mixer() -> tuple[type, Fault]:
    from merv.fusion.mixers import Mixer

    return Mixer, must_subclass(Mixer)


def _projector() -> tuple[type, Fault]:
    from merv.fusion.projectors import Projector

    return Projector, must_subclass(Projector)


MIXERS = Registry("mixer", "merv.mixers", _mixer)
PROJECTORS = Registry("projector", "merv.projectors", _projector)


def create_mixer(name: str | type[Mixer], output_dim: int, num_encoders: int, **options: Any) -> Mixer:
    """Create a mixer.

    Args:
        name: A registered name, `module:Class`, or a class.
        output_dim: Embedding dimension of the LLM (L).
        num_encoders: Number of encoders (E).
        **options: Further arguments of the constructor.

    Raises:
        UnknownPlugin: No mixer has this name.
        AmbiguousPlugin: Two distributions register this name.
        BrokenPlugin: The mixer cannot be imported or created.
        PluginError: The mixer does not have one of the options.

    Example:
        >>> create_mixer("gate", output_dim=64, num_encoders=2, hidden=16).reader().shape
        torch.Size([1, 64])
    """
    return MIXERS.create(name, output_dim, num_encoders, **options)


def create_projector(
    name: str | type[Projector], input_dim: int, output_dim: int, **options: Any
) -> Projector:
    """Create a projector from `input_dim` to `output_dim`; name, options and errors as in `create_mixer`.

    >>> create_projector("mlp", 48, 64)(torch.zeros(5, 48)).shape
    torch.Size([5, 64])
    """
    return PROJECTORS.create(name, input_dim, output_dim, **options)
