"""The wheel contains all of merv and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"merv": "merv", "encoders": "merv/encoders", "recipes": "merv/recipes"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, bytes]:
    """Build a wheel from a copy of the sources; returns its files."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: dict[str, bytes], name: str) -> bytes:
    return next(content for path, content in wheel.items() if path.endswith(f".dist-info/{name}"))


def test_wheel_contains_only_merv(wheel):
    top_level = {path.partition("/")[0] for path in wheel}
    assert sorted(name.partition("-")[0] for name in top_level) == ["merv", "merv"]  # merv-….dist-info


def test_wheel_contains_all_modules_and_recipes(wheel):
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for suffix in (".py", ".yaml", ".typed")
        for path in (ROOT / folder).rglob(f"*{suffix}")
    }
    assert {path for path in wheel if path.startswith("merv/")} == expected


def test_every_entry_point_is_a_module_of_the_wheel(wheel):
    entries = ConfigParser(delimiters="=")
    entries.optionxform = str
    entries.read_string(metadata(wheel, "entry_points.txt").decode())
    values = [value for group in entries.sections() for value in entries[group].values()]
    assert "merv.cli.main:main" in values
    for value in values:
        assert value.partition(":")[0].replace(".", "/") + ".py" in wheel


def test_wheel_contains_the_license(wheel):
    assert message_from_bytes(metadata(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"
    assert b"Apache License" in metadata(wheel, "licenses/LICENSE")


def test_constraints_pin_versions_of_packages():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    assert all("==" in line and "://" not in line and "@" not in line for line in lines if line[0] != "#")
