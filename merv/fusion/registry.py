"""The registries of mixers and projectors, which create them by name; see `merv.utils.plugins`."""

from __future__ import annotations

from merv.utils.plugins import Registry

MIXERS = Registry("mixer", "merv.mixers", "merv.fusion.mixers:Mixer")
PROJECTORS = Registry("projector", "merv.projectors", "merv.fusion.projectors:Projector")
