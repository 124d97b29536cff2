"""The documentation is correct: its Python runs, its commands exist, its paths and options are real.

A block after `<!-- not run -->` needs something that tests do not have, such as trained weights. Its Python
must still compile, and its commands must accept their arguments.
"""

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from merv.cli import main as cli
from merv.training.recipes import documented_options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run -->\n+)?```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    source: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start(3)), match[2], match[3], not match[1])
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
LINES = [
    pytest.param(line, block.run, id=f"{block}-{line.strip()}")
    for block in BLOCKS
    if block.language == "bash"
    for line in block.source.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def test_docs_have_code_blocks():
    assert any(block.run for block in PYTHON), "found no ```python block that runs"
    assert LINES, "found no ```bash block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # so that its classes can be pickled
    for block in (block for block in PYTHON if block.page == page):
        code = compile("\n" * block.line + block.source, str(page), "exec")
        if block.run:
            exec(code, module.__dict__)


@pytest.mark.parametrize(("line", "run"), LINES)
def test_command_exists_and_runs(line, run):
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert set(arguments) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif program != "merv":
        assert program in {"cd", "git", "hf", "pip", ".ci/run"}
    elif run:
        assert exit_status(cli.main, arguments) == 0
    else:
        assert arguments[0] in cli.COMMANDS
        module, parser = import_module(f"merv.cli.{arguments[0]}"), argparse.ArgumentParser()
        if hasattr(module, "add_arguments"):
            module.add_arguments(parser)
            parser.parse_args(arguments[1:])


def exit_status(main, arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as exit:
        return exit.code or 0


# Paths and options ------------------------------------------------------------------------


def packages() -> dict[str, set[str]]:
    """The modules of each package in merv/; those of merv/ itself have the key ""."""
    modules = [path.relative_to(ROOT / "merv") for path in (ROOT / "merv").rglob("*.py")]
    modules_of: dict[str, set[str]] = {}
    for path in modules:
        if path.parts[0] not in ("encoders", "recipes"):  # links to top-level folders
            modules_of.setdefault("/".join(path.parts[:-1]), set()).add(path.stem)
    return modules_of


def test_tree_in_the_readme_matches_the_disk():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\nmerv/ .*?```", text, re.DOTALL)[0]
    inside = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    top = re.findall(r"^(\w+)/ ", tree, re.MULTILINE)
    assert sorted(inside) == sorted(name for name in packages() if name)
    assert {"merv", "encoders", "recipes", "benchmarks", "examples", "docs", "tests"} == set(top)


def test_packages_in_the_design_match_the_disk():
    rows = re.findall(r"^\| `merv/` .*|^\| `\w+/` \| .*", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    documented = {}
    for row in rows:
        name, _, files = (cell.strip() for cell in row.strip("|").split("|"))
        package = name.strip("`").removesuffix("/").removeprefix("merv")
        documented[package] = set(re.findall(r"`(\w+)`", files)) - ({"__init__"} if package else set())
    on_disk = {name: modules - ({"__init__"} if name else set()) for name, modules in packages().items()}
    assert documented == on_disk


def test_packages_in_the_design_and_the_readme_have_the_same_order():
    text = (ROOT / "docs/design.md").read_text()
    order = re.findall(r"^\| `(\w+)/` \| ", text, re.MULTILINE)
    tree = re.search(r"```text\nmerv/ .*?```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert order[1:] == re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)


def test_every_path_in_the_docs_exists():
    roots = "merv|tests|benchmarks|examples|docs|encoders|recipes"
    inside = "|".join(name for name in packages() if name)
    for page in PAGES:
        text = page.read_text()
        paths = [ROOT / path for path in re.findall(rf"`((?:{roots})/[\w/.-]+\.\w+)`", text)]
        paths += [ROOT / "merv" / path for path in re.findall(rf"[` ]((?:{inside})/\w+\.py)", text)]
        assert [str(path) for path in paths if not path.exists()] == []


def test_every_option_in_the_docs_exists():
    parts = "model|data|checkpoints|sample_answers"
    mentioned = set()
    for page in [*PAGES, *sorted((ROOT / "recipes").rglob("*.yaml"))]:
        text = page.read_text()
        mentioned |= set(re.findall(rf"--({parts})\.(\w+)", text))
        mentioned |= set(re.findall(rf"`({parts})\.(\w+)`", text))
    mentioned.discard(("model", "safetensors"))  # a file name
    assert len(mentioned) > 10
    options = {part: documented_options(part)[1] for part in parts.split("|")}
    assert [f"{part}.{name}" for part, name in sorted(mentioned) if name not in options[part]] == []
