"""Run checks on a plug-in and report what each one finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TOLERANCE = 1e-3  # in standard deviations of the values: batched kernels may sum in another order

Check = Callable[[Any], None]  # takes a subject; raises CheckFailed if something is wrong with it
Checks = Mapping[Check, tuple[Check, ...]]  # check → the checks that must pass before it, in order


class CheckFailed(Exception):
    """Raised by a check. The message describes the fault."""


class CheckSkipped(Exception):
    """Raised by a check that does not apply to its subject. The message is the reason."""


@dataclass(frozen=True)
class CheckResult:
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


def run_checks(checks: Checks, subject: Any) -> list[CheckResult]:
    """Run all checks. A check is not run if one that it needs failed, so that one fault gives one FAIL."""
    results: dict[Check, CheckResult] = {}
    for check, needed in checks.items():
        obstacle = next((results[other] for other in needed if not results[other].passed), None)
        if obstacle is None:
            results[check] = run_check(check, subject)
        else:
            reason = f"needs {obstacle.name!r}" if obstacle.status == "FAIL" else obstacle.message
            results[check] = CheckResult(name_of(check), "not run", reason)
    return list(results.values())


def run_check(check: Check, subject: Any) -> CheckResult:
    """Run one check. A check that raises has failed, unless it raises CheckSkipped."""
    try:
        with torch.enable_grad():  # without it, a graph built by forward() would go unnoticed
            check(subject)
    except CheckSkipped as reason:
        return CheckResult(name_of(check), "skipped", str(reason))
    except CheckFailed as fault:
        return CheckResult(name_of(check), "FAIL", str(fault))
    except (Exception, SystemExit) as error:
        return CheckResult(name_of(check), "FAIL", f"{type(error).__name__}: {error}")
    return CheckResult(name_of(check), "ok")


def name_of(check: Check) -> str:
    """Turn the name of a check function into words: `_is_frozen` → "is frozen"."""
    return check.__name__.strip("_").replace("_", " ")


def require(condition: bool | Tensor, fault: str) -> None:
    """Raise CheckFailed if the condition is false."""
    if not condition:
        raise CheckFailed(fault)


def require_equal(values: Tensor, expected: Tensor, when: str = "") -> None:
    """Raise CheckFailed if two tensors differ by more than rounding."""
    shapes = f"{list(values.shape)} and {list(expected.shape)}"
    require(values.shape == expected.shape, f"shapes {shapes} differ{when}")
    if values.numel():
        error = (values - expected).detach().abs().max() / expected.detach().std().clamp_min(1e-6)
        require(error <= TOLERANCE, f"values differ by {error:.2g} standard deviations{when}")


def require_finite(values: Tensor, what: str) -> None:
    """Raise CheckFailed if some values are NaN or infinite."""
    invalid = int((~values.isfinite()).sum())
    require(not invalid, f"{invalid} {what} are NaN or infinite")
