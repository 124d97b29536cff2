"""`merv doctor`: independent checks, an exit status for scripts, no private paths."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from merv.cli import doctor
from merv.cli.main import main
from merv.errors import MissingDependency


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., tuple[int, list[str]]]:
    """Run `merv doctor`, with other checks if some are given; return its exit status and its lines."""

    def run(*checks: doctor.Check) -> tuple[int, list[str]]:
        if checks:
            monkeypatch.setattr(doctor, "checks", lambda: checks)
        status = main(["doctor"])
        return status, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return run


def fail(*_: object, **__: object) -> str:
    raise ZeroDivisionError("by\nzero")


# The report


def test_failing_check_is_a_line_and_the_others_still_run(report) -> None:
    status, lines = report(("one", True, fail), ("two", False, fail), ("three", True, lambda: "fine"))
    assert status == 1
    assert lines[:3] == ["! one ZeroDivisionError: by zero", "? two ZeroDivisionError: by zero", "three fine"]
    assert lines[-1] == "Broken: one."


def test_optional_failures_keep_the_exit_status_0(report) -> None:
    assert report(("one", False, fail))[0] == 0


def test_home_folder_is_redacted(report) -> None:
    _, lines = report(("one", True, lambda: f"in {Path.home() / 'here'}"))
    assert lines[0] == f"one in {Path('~', 'here')}"


def test_this_installation_works_and_every_required_package_is_imported(report, monkeypatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(doctor, "import_module", imported.append)
    status, lines = report()
    assert status == 0
    assert {"torch", "torchvision", "open_clip", "PIL", "av"} <= set(imported)
    assert "peft" not in imported  # belongs to an extra
    assert {"python", "merv", "torch", "pyav", "devices"} <= {line.split()[0] for line in lines if line}


# Versions


def test_package_that_cannot_be_imported_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_module", fail)
    with pytest.raises(ZeroDivisionError):
        doctor._version("torchvision", "")


@pytest.mark.parametrize(("extra", "command"), [("", "pip install nowhere"), ("half", "[half]")])
def test_missing_package_comes_with_its_install_command(extra: str, command: str) -> None:
    with pytest.raises(PackageNotFoundError) as caught:
        doctor._version("nowhere", extra)
    assert command in str(caught.value)


def test_distribution_whose_name_has_capitals_is_imported() -> None:
    assert doctor._version("pyyaml", "")  # its own name is PyYAML, its module yaml


def test_requirements_come_from_the_metadata() -> None:
    requirements = doctor._requirements()
    assert requirements["torch"] == ""
    assert requirements["jsonargparse"] == ""
    assert requirements["peft"] == "lora"


# Decoding and devices


def test_each_backend_decodes_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    assert "8 of 8 frames" in doctor._decode("pyav")
    with pytest.raises(MissingDependency, match=r"\[torchcodec\]"):
        doctor._decode("torchcodec")


def test_gpus_are_listed_with_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="T4", total_memory=16 * 2**30, major=7, minor=5)
    new = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [old, new].__getitem__)
    assert doctor._devices().endswith("; T4, 16 GiB, no bf16, use fp32; H100, 80 GiB, bf16")
