"""`merv doctor`: independent sections, an exit status for scripts, no private paths."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from merv.cli import doctor
from merv.cli.doctor import Line
from merv.cli.main import main


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the sections of the report."""
    return lambda **checks: monkeypatch.setattr(doctor, "SECTIONS", checks)


def states(lines: Iterator[Line]) -> dict[str, str]:
    return {line.name: line.state for line in lines}


def texts(lines: Iterator[Line]) -> dict[str, str]:
    return {line.name: line.text for line in lines}


# The report


def test_failing_section_is_a_line_and_the_others_still_run(sections, capsys) -> None:
    def first() -> Iterator[Line]:
        yield Line("one", "fine")
        raise ZeroDivisionError("by\nzero")

    sections(first=first, second=lambda: iter([Line("two", "fine"), Line("three", "look", "note")]))
    assert main(["doctor"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("! first") and "ZeroDivisionError: by zero" in line for line in lines)
    assert {"one fine", "two fine", "? three look"} <= set(lines)
    assert lines[-1] == "Broken: first."


def test_notes_keep_the_exit_status_0(sections) -> None:
    sections(first=lambda: iter([Line("one", "absent", "note")]))
    assert main(["doctor"]) == 0


def test_home_folder_is_redacted(sections, capsys) -> None:
    sections(first=lambda: iter([Line("one", f"in {Path.home() / 'here'}")]))
    main(["doctor"])
    report = capsys.readouterr().out
    assert f"in {Path('~', 'here')}" in report
    assert str(Path.home()) not in report


# Versions


def test_every_required_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(doctor, "import_module", imported.append)
    assert "broken" not in states(doctor.versions()).values()
    assert {"torch", "torchvision", "open_clip", "PIL", "av"} <= set(imported)
    assert "peft" not in imported  # belongs to an extra


def test_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", fail)
    monkeypatch.setattr(doctor, "_requirements", lambda: {"torchvision": "", "nowhere": ""})
    lines = list(doctor.versions())
    assert "RuntimeError: operator torchvision::nms" in texts(lines)["torchvision"]
    assert "pip install nowhere" in texts(lines)["nowhere"]
    assert states(lines)["torchvision"] == states(lines)["nowhere"] == "broken"


def test_missing_optional_package_comes_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: {"nowhere": "half"})
    lines = list(doctor.versions())
    assert states(lines)["nowhere"] == "note"
    assert "[half]" in texts(lines)["nowhere"]


def test_requirements_come_from_the_metadata() -> None:
    requirements = doctor._requirements()
    assert requirements["torch"] == ""
    assert requirements["jsonargparse"] == ""
    assert requirements["peft"] == "lora"


# Decoding


def test_each_backend_decodes_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    lines = list(doctor.decoding())
    assert states(lines) == {"pyav": "ok", "torchcodec": "note"}
    assert "[torchcodec]" in texts(lines)["torchcodec"]


def test_backend_that_cannot_decode_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, backend: str) -> None:
        raise RuntimeError("no codec")

    monkeypatch.setattr("merv.video.open.open_video", fail)
    lines = list(doctor.decoding())
    assert states(lines) == {"pyav": "broken", "torchcodec": "note"}
    assert "no codec" in texts(lines)["pyav"]


# Devices


def test_gpus_are_listed_with_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="T4", total_memory=16 * 2**30, major=7, minor=5)
    new = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [old, new].__getitem__)
    lines = texts(doctor.devices())
    assert lines["cuda:0"] == "T4, 16 GiB, no bf16, use fp32"
    assert lines["cuda:1"] == "H100, 80 GiB, bf16"
