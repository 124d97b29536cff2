"""What holds of the core as a whole."""

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
LINKED = ("encoders", "recipes")  # folders at the top of the repository
KNOW_ENCODERS = ("demo", "utils/assets.py")  # by name: the demo, and what is fetched for it
LAYERS = (
    ("errors",),
    ("types",),
    ("utils",),
    ("video", "encoding", "fusion"),
    ("features", "checkpoints"),
    ("models",),
    ("data",),
    ("training",),
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
    """The modules of merv that a file imports, also inside functions, and by `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module or "" for name in inside]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from (name for name in names if name.partition(".")[0] == "merv")


def package_of(name: str) -> str:
    """`merv.video.open` → `video`; the package itself for `merv`."""
    return [*name.split("."), "merv"][1]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_below_it(name):
    own = package_of(name)
    for imported in imports(MODULES[name]):
        package = package_of(imported)
        allowed = package == own or imported == "merv.recipes" or LAYER[package] < LAYER[own]
        assert allowed, f"{name} ({own}) imports {imported} ({package})"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {own for own in imports(path) if own != name} for name, path in MODULES.items()}
    assert len(graph) > 60
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # or CycleError names them


@pytest.mark.parametrize("name", MODULES)
def test_the_core_neither_imports_nor_names_an_encoder(name):
    assert ENCODERS
    path = MODULES[name]
    if any(path.is_relative_to(ROOT / place) for place in KNOW_ENCODERS):
        return
    assert not any(imported.startswith("merv.encoders") for imported in imports(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Constant) and node.value in ENCODERS), ast.unparse(node)


def test_every_exported_name_is_there():
    assert all(getattr(merv, name) is not None for name in merv.__all__)


def test_a_worker_that_reads_data_imports_no_lightning():
    code = "import merv.data.loader, sys; assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_merv_loads_nothing_heavy():
    heavy = "torch", "lightning", "transformers", "timm", "av"
    code = f"import merv, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
