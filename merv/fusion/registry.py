"""Mixers and projectors by name; how they are registered and found is in `merv.utils.plugins`."""

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


def create_mixer(name: str | type[Mixer], width: int, encoders: int, **options: Any) -> Mixer:
    """A mixer by name, `module:Class` or class; options: those of its constructor.

    Raises UnknownPlugin, AmbiguousPlugin, BrokenPlugin, PluginError for an option that it does not have.

    >>> create_mixer("gate", width=64, encoders=2, hidden=16).reader().shape
    torch.Size([1, 64])
    """
    return MIXERS.create(name, width, encoders, **options)


def create_projector(name: str | type[Projector], features: int, width: int, **options: Any) -> Projector:
    """A projector by name, `module:Class` or class; options: those of its constructor.

    >>> create_projector("mlp", 48, 64)(torch.zeros(5, 48)).shape
    torch.Size([5, 64])
    """
    return PROJECTORS.create(name, features, width, **options)
