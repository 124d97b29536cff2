"""Run checks on a plug-in and report what each one finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TOLERANCE = 1e-3  # in standard deviations of the values: batched kernels may sum in another order

Check = Callable[[Any], "str | None"]  # takes a subject, returns a description of its fault or None
Checks = Mapping[Check, tuple[Check, ...]]  # check → the checks that must pass before it, in order


class CheckSkipped(Exception):
    """Raised by a check that does not apply to its subject. The message is the reason."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        status: "ok"; "FAIL"; "skipped" if the check does not apply; or "not run" if a check that it needs
            failed.
        message: What is wrong, or why the check was skipped or not run.
    """

    name: str
    status: Literal["ok", "FAIL", "skipped", "not run"]
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong: the check passed, or does not apply."""
        return self.status in ("ok", "skipped")

    def __str__(self) -> str:
        return f"{self.status:7}  {self.name}" + (f": {self.message}" if self.message else "")


def run_checks(checks: Checks, subject: Any) -> list[Finding]:
    """Run all checks. A check is not run if one that it needs failed, so that one fault gives one FAIL."""
    findings: dict[Check, Finding] = {}
    for check, needed in checks.items():
        obstacle = next((findings[other] for other in needed if not findings[other].passed), None)
        if obstacle is None:
            findings[check] = run_check(check, subject)
        else:
            reason = f"needs {obstacle.name!r}" if obstacle.status == "FAIL" else obstacle.message
            findings[check] = Finding(name_of(check), "not run", reason)
    return list(findings.values())


def run_check(check: Check, subject: Any) -> Finding:
    """Run one check. A check that raises has failed, unless it raises CheckSkipped."""
    try:
        with torch.enable_grad():  # without it, a graph built by forward() would go unnoticed
            fault = check(subject)
    except CheckSkipped as reason:
        return Finding(name_of(check), "skipped", str(reason))
    except (Exception, SystemExit) as error:
        fault = f"{type(error).__name__}: {error}"
    return Finding(name_of(check), "FAIL" if fault else "ok", fault or "")


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
