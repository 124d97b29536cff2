"""The structure of the package: its layers, its imports, and that the core names no encoder."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import merv

ROOT = Path(merv.__file__).parent
LINKED = ("encoders", "recipes")  # links to folders at the top of the repository
MAY_NAME_ENCODERS = ("demo", "utils/assets.py")
LAYERS = (
    ("errors",),
    ("types",),
    ("utils",),
    ("video", "encoding", "fusion"),
    ("features", "checkpoints"),
    ("models",),
    ("data",),
    ("evaluation",),
    ("training",),
    ("extraction",),
    ("testing",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}
ENCODERS = {entry.name for entry in importlib.metadata.entry_points(group="merv.encoders")}


def name_of(path: Path) -> str:
    """`merv/video/open.py` → `merv.video.open`."""
    parts = ("merv", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {
    name_of(path): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in (*LINKED, "__init__.py")
}


def imports(path: Path) -> Iterator[str]:
    """The modules of merv that a file imports, also in functions and with `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module or "" for name in imported]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from (name for name in names if name.partition(".")[0] == "merv")


def package_of(name: str) -> str:
    """`merv.video.open` → `video`; the package itself for `merv`."""
    return [*name.split("."), "merv"][1]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_lower_layers(name):
    package = package_of(name)
    for imported in imports(MODULES[name]):
        other = package_of(imported)
        allowed = other == package or imported == "merv.recipes" or LAYER[other] < LAYER[package]
        assert allowed, f"{name} ({package}) imports {imported} ({other})"


def test_there_are_no_import_cycles():
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    assert len(graph) > 60
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # CycleError names the modules


@pytest.mark.parametrize("name", MODULES)
def test_core_neither_imports_nor_names_an_encoder(name):
    assert ENCODERS
    path = MODULES[name]
    if any(path.is_relative_to(ROOT / allowed) for allowed in MAY_NAME_ENCODERS):
        return
    assert not any(imported.startswith("merv.encoders") for imported in imports(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Constant) and node.value in ENCODERS), ast.unparse(node)


def test_every_exported_name_exists():
    assert all(getattr(merv, name) is not None for name in merv.__all__)


def test_data_workers_do_not_import_lightning():
    code = "import merv.data.loader, sys; assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_merv_imports_nothing_heavy():
    heavy = "torch", "lightning", "transformers", "timm", "av"
    code = f"import merv, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TRANSFORMERS_FILES = {
    path
    for folder in ("merv", "encoders", "examples")
    for path in (Path(__file__).parents[1] / folder).rglob("*.py")
    if "transformers" in path.read_text(encoding="utf-8")
}
LOADS_NO_CODE = {"GenerationConfig"}


def loading_calls(path: Path) -> Iterator[ast.Call]:
    """The calls of `from_pretrained` and `from_config` of classes that a file imports from transformers."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    froms = [
        n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("transformers")
    ]
    names = {alias.asname or alias.name for node in froms for alias in node.names} - LOADS_NO_CODE
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).removeprefix("transformers.")
            if node.func.attr in ("from_pretrained", "from_config") and (owner in names or "Auto" in owner):
                yield node


def test_transformers_never_loads_code_of_a_folder():
    calls = [(path, call) for path in sorted(TRANSFORMERS_FILES) for call in loading_calls(path)]
    assert len(calls) >= 8
    for path, call in calls:
        trust = [ast.unparse(each.value) for each in call.keywords if each.arg == "trust_remote_code"]
        assert trust == ["False"], f"{path.name}: {ast.unparse(call)}"
