"""Run checks on a plug-in and report what each one finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3  # in standard deviations of the values: batched kernels may sum in another order

Check = Callable[[Any], "str | None"]  # takes a subject, returns a description of its fault or None


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        passed: Whether the check passed.
        message: What is wrong.
    """

    name: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        return f"ok    {self.name}" if self.passed else f"FAIL  {self.name}: {self.message}"


def run_checks(checks: Sequence[Check], subject: Any) -> list[Finding]:
    """Run all checks; if the first one fails, the subject cannot be created and the others are left out."""
    created = run_check(checks[0], subject)
    return [created, *(run_check(check, subject) for check in checks[1:])] if created.passed else [created]


def run_check(check: Check, subject: Any) -> Finding:
    """Run one check. A check that raises has failed."""
    try:
        with torch.enable_grad():  # without it, a graph built by forward() would go unnoticed
            fault = check(subject)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return Finding(name_of(check), not fault, fault or "")


def name_of(check: Check) -> str:
    """Turn the name of a check function into words: `_is_frozen` → "is frozen"."""
    return check.__name__.strip("_").replace("_", " ")


def difference(values: Tensor, expected: Tensor) -> str | None:
    """Describe how two tensors differ, or return None if they agree up to rounding."""
    if values.shape != expected.shape:
        return f"shapes {list(values.shape)} and {list(expected.shape)} differ"
    largest = (
        ((values - expected).abs().max() / expected.std().clamp_min(1e-6)).item() if values.numel() else 0.0
    )
    return None if largest <= TOLERANCE else f"values differ by {largest:.2g} standard deviations"
