"""The suites of all kinds of plug-ins, and a test of them for pytest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from merv.encoding.base import Encoder
from merv.encoding.registry import ENCODERS
from merv.fusion.mixers import Mixer
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.testing.encoder_checks import ENCODER_CHECKS, EncoderSubject
from merv.testing.findings import Check, Finding, name_of, run_check, run_checks
from merv.testing.fusion_checks import MIXER_CHECKS, PROJECTOR_CHECKS, MixerSubject, ProjectorSubject
from merv.utils.plugins import Registry

# Kind → its registry, its base class, its checks, and what they share.
SUITES: dict[str, tuple[Registry, type, tuple[Check, ...], Callable[..., Any]]] = {
    "encoder": (ENCODERS, Encoder, ENCODER_CHECKS, EncoderSubject),
    "mixer": (MIXERS, Mixer, MIXER_CHECKS, MixerSubject),
    "projector": (PROJECTORS, Projector, PROJECTOR_CHECKS, ProjectorSubject),
}


def check_encoder(encoder: Encoder | type[Encoder] | str, *, variant: str | None = None) -> list[Finding]:
    """Check that an encoder keeps its contract; a class is created with random weights first.

    encoder: a class, an encoder, or what `find_encoder` takes.

    Costs about ten passes over one window of frames (two frames of an image encoder) and one more
    interpreter, in which its module is imported. A check that raises has failed, and the others still run.

    >>> all(finding.passed for finding in check_encoder("fake"))
    True
    """
    return check_plugin("encoder", encoder, variant=variant)


def check_mixer(mixer: type[Mixer] | str, **options: Any) -> list[Finding]:
    """Check that a mixer keeps its contract; options: of its constructor.

    >>> [finding.name for finding in check_mixer("gate", hidden=8) if not finding.passed]
    []
    """
    return check_plugin("mixer", mixer, **options)


def check_projector(projector: type[Projector] | str, **options: Any) -> list[Finding]:
    """Check that a projector keeps its contract; options: of its constructor.

    >>> [finding.name for finding in check_projector("mlp") if not finding.passed]
    []
    """
    return check_plugin("projector", projector, **options)


def check_plugin(kind: str, plugin: Any, **options: Any) -> list[Finding]:
    """Check a plug-in of a kind of SUITES, by class or name."""
    registry, _, checks, subject = SUITES[kind]
    return run_checks(
        checks, subject(registry.load(plugin) if isinstance(plugin, str) else plugin, **options)
    )


def contract_test(plugin: Any, *, kind: str | None = None, **options: Any) -> Callable:
    """A test for pytest, of one case for each check: all that the tests of a plug-in need.

        from merv.testing import contract_test
        test_contract = contract_test("fake", variant="video")

    plugin: a class or an encoder; or a name, of an encoder unless `kind` says "mixer" or "projector".
    options: a variant of an encoder, what the constructor of a mixer or projector takes.

    >>> contract_test("fake", variant="video").__name__
    'test_contract'
    """
    import pytest

    kind = kind or _kind_of(plugin)
    registry, _, checks, make = SUITES[kind]

    @functools.cache
    def subject() -> Any:  # made when the first test runs, not when pytest collects
        return make(registry.load(plugin) if isinstance(plugin, str) else plugin, **options)

    @pytest.mark.parametrize("check", checks, ids=name_of)
    def test_contract(check: Check) -> None:
        finding = run_check(check, subject())
        if not finding.passed:
            pytest.fail(finding.message, pytrace=False)

    return test_contract


def _kind_of(plugin: Any) -> str:
    given = plugin if isinstance(plugin, type) else type(plugin)
    return next((kind for kind, (_, base, *_) in SUITES.items() if issubclass(given, base)), "encoder")
