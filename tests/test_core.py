"""What holds of the core as a whole."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import merv

CORE = sorted(path for path in Path(merv.__file__).parent.glob("*.py"))
ENCODERS = {entry.name for entry in importlib.metadata.entry_points(group="merv.encoders")}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_neither_imports_nor_names_an_encoder(path):
    assert ENCODERS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        assert not any(name.split(".")[:2] == ["merv", "encoders"] for name in names)
        assert not (isinstance(node, ast.Constant) and node.value in ENCODERS), ast.unparse(node)


def test_every_exported_name_is_there():
    assert all(getattr(merv, name) is not None for name in merv.__all__)


def test_importing_merv_loads_nothing_heavy():
    heavy = "torch", "lightning", "transformers", "timm", "av"
    code = f"import merv, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_over_400_lines_and_no_function_over_60():
    root = Path(merv.__file__).parent.parent
    files = [*(root / "merv").rglob("*.py"), *(root / "encoders").rglob("*.py")]
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
