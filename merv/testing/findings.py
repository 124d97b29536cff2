"""Conformance: whether a plug-in keeps the contract of its kind, check by check.

Used by `merv plugins KIND check`, by `merv.testing.check_encoder` and its like, and in the tests of a
plug-in by `merv.testing.contract_test`. That authors of plug-ins run the suite is pandas' idea.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3  # of the values' own spread: batched kernels may sum in another order

Check = Callable[[Any], "str | None"]  # a fault of the subject, in words


@dataclass(frozen=True)
class Finding:
    """What one check found.

    `message` says what came and what was wanted if it failed; or why, if it could not be made here.
    """

    name: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        if not self.passed:
            return f"FAIL  {self.name}: {self.message}"
        return f"ok    {self.name} ({self.message})" if self.message else f"ok    {self.name}"


class CheckSkipped(Exception):
    """Raised by a check that cannot be made here: not a fault of the plug-in."""


def run_checks(checks: Sequence[Check], subject: Any) -> list[Finding]:
    """What each check finds; the others need the first one, that the subject can be created, to pass."""
    created = run_check(checks[0], subject)
    return [created, *(run_check(check, subject) for check in checks[1:])] if created.passed else [created]


def run_check(check: Check, subject: Any) -> Finding:
    """What one check finds. A check that raises has failed."""
    try:
        with torch.enable_grad():  # or nobody would notice a graph
            fault = check(subject)
    except CheckSkipped as reason:
        return Finding(name_of(check), True, f"skipped: {reason}")
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return Finding(name_of(check), not fault, fault or "")


def name_of(check: Check) -> str:
    """`_is_frozen` → "is frozen"."""
    return check.__name__.strip("_").replace("_", " ")


def far(one: Tensor, other: Tensor) -> str | None:
    """How far two tensors are from each other, if further than rounding takes them."""
    if one.shape != other.shape:
        return f"shapes {list(one.shape)} and {list(other.shape)} differ"
    distance = ((one - other).abs().max() / other.std().clamp_min(1e-6)).item() if one.numel() else 0.0
    return None if distance <= TOLERANCE else f"they differ by {distance:.2g} standard deviations"
