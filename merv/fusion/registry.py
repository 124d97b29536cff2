"""The registries of mixers and projectors, which create them by name; see `merv.utils.plugins`."""

from __future__ import annotations

from merv.utils.plugins import Fault, Registry, must_subclass


def _mixer() -> tuple[type, Fault]:
    from merv.fusion.mixers import Mixer

    return Mixer, must_subclass(Mixer)


def _projector() -> tuple[type, Fault]:
    from merv.fusion.projectors import Projector

    return Projector, must_subclass(Projector)


MIXERS = Registry("mixer", "merv.mixers", _mixer)
PROJECTORS = Registry("projector", "merv.projectors", _projector)
