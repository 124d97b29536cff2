"""Check that a plug-in satisfies the contract of its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from merv.encoding.base import Encoder
from merv.encoding.registry import ENCODERS, name_and_variant
from merv.fusion.mixers import Mixer
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.testing.encoder_checks import ENCODER_CHECKS, EncoderSubject
from merv.testing.fusion_checks import MIXER_CHECKS, PROJECTOR_CHECKS, MixerSubject, ProjectorSubject
from merv.testing.results import CheckResult, Checks, run_checks
from merv.utils.plugins import Registry

# Kind → its registry, its checks, and the subject that the checks share.
SUITES: dict[str, tuple[Registry, Checks, Callable[..., Any]]] = {
    "encoder": (ENCODERS, ENCODER_CHECKS, EncoderSubject),
    "mixer": (MIXERS, MIXER_CHECKS, MixerSubject),
    "projector": (PROJECTORS, PROJECTOR_CHECKS, ProjectorSubject),
}


def check_encoder(encoder: Encoder | type[Encoder] | str, *, variant: str | None = None) -> list[CheckResult]:
    """Check that an encoder satisfies its contract.

    The checks take about fifteen forward passes over short clips. A check that raises counts as failed.
    Checks that need a failed one are not run, so that one fault gives one FAIL.

    Args:
        encoder: An encoder, an encoder class, or a name, with or without a variant: "dinov2", "dinov2/base".
            A class is created with random weights.
        variant: The variant to check. Defaults to the first one.

    Returns:
        One result for each check.

    Raises:
        PluginError: No encoder, or more than one, has this name.
        EncoderError: The name has another variant than `variant`.
        BrokenPlugin: The plug-in with this name cannot be imported.

    Example:
        >>> all(result.passed for result in check_encoder("fake"))
        True
    """
    if isinstance(encoder, str):
        encoder, variant = name_and_variant(encoder, variant)
    return check_plugin("encoder", encoder, variant=variant)


def check_mixer(mixer: type[Mixer] | str, **options: Any) -> list[CheckResult]:
    """Check that a mixer satisfies its contract.

    Args:
        mixer: A mixer class, or its name.
        **options: Options of the mixer's constructor.

    Returns:
        One result for each check.

    Raises:
        PluginError: No mixer, or more than one, has this name.
        BrokenPlugin: The plug-in with this name cannot be imported.

    Example:
        >>> [result.name for result in check_mixer("gate", hidden=8) if not result.passed]
        []
    """
    return check_plugin("mixer", mixer, **options)


def check_projector(projector: type[Projector] | str, **options: Any) -> list[CheckResult]:
    """Check that a projector satisfies its contract.

    Args:
        projector: A projector class, or its name.
        **options: Options of the projector's constructor.

    Returns:
        One result for each check.

    Raises:
        PluginError: No projector, or more than one, has this name.
        BrokenPlugin: The plug-in with this name cannot be imported.

    Example:
        >>> [result.name for result in check_projector("mlp") if not result.passed]
        []
    """
    return check_plugin("projector", projector, **options)


def check_plugin(kind: str, plugin: Any, **options: Any) -> list[CheckResult]:
    """Run all checks of a kind ("encoder", "mixer" or "projector") on a plug-in."""
    registry, checks, create_subject = SUITES[kind]
    loaded = registry.load(plugin) if isinstance(plugin, str) else plugin
    return run_checks(checks, create_subject(loaded, **options))
