"""The documentation is true: every block of Python and every command of it is run or known.

A block after `<!-- not run -->` wants what tests do not have (trained weights, a video of
yours); it must still compile, or be a command that takes those arguments.
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
from merv.training.recipes import described

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
        Block(page, text.count("\n", 0, found.start(3)), found[2], found[3], not found[1])
        for found in BLOCK.finditer(text)
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


def test_there_are_blocks_to_test():
    assert any(block.run for block in PYTHON), "no ```python block found that runs"
    assert LINES, "no ```bash block found"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # so that its classes pickle
    for block in (block for block in PYTHON if block.page == page):
        code = compile("\n" * block.line + block.source, str(page), "exec")
        if block.run:
            exec(code, module.__dict__)


@pytest.mark.parametrize(("line", "run"), LINES)
def test_a_command_is_there_and_ours_run(line, run):
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert set(arguments) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif program != "merv":
        assert program in {"cd", "git", "hf", "pip", ".ci/run"}
    elif run:
        assert exit_status(cli.main, arguments) == 0
    else:
        row = next(row for row in cli.COMMANDS if row.name == arguments[0])
        parser = argparse.ArgumentParser()
        if not row.raw:
            import_module(row.module).add_arguments(parser)
            parser.parse_args(arguments[1:])


def exit_status(main, arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code or 0


# Where things are -----------------------------------------------------------------------------


def packages() -> dict[str, set[str]]:
    """Each package of merv/, and the modules in it; those of merv/ itself under ""."""
    modules = [path.relative_to(ROOT / "merv") for path in (ROOT / "merv").rglob("*.py")]
    found: dict[str, set[str]] = {}
    for path in modules:
        if path.parts[0] not in ("encoders", "recipes"):  # links to the folders at the top
            found.setdefault("/".join(path.parts[:-1]), set()).add(path.stem)
    return found


def test_the_tree_of_the_readme_is_the_one_on_disk():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\nmerv/ .*?```", text, re.DOTALL)[0]
    inside = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    top = re.findall(r"^(\w+)/ ", tree, re.MULTILINE)
    assert sorted(inside) == sorted(name for name in packages() if name)
    assert {"merv", "encoders", "recipes", "benchmarks", "examples", "docs", "tests"} == set(top)


def test_the_packages_of_the_design_are_those_on_disk_with_all_their_files():
    rows = re.findall(r"^\| `merv/` .*|^\| `\w+/` \| .*", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    told = {}
    for row in rows:
        name, _, files = (cell.strip() for cell in row.strip("|").split("|"))
        own = name.strip("`").removesuffix("/").removeprefix("merv")
        told[own] = set(re.findall(r"`(\w+)`", files)) - ({"__init__"} if own else set())
    on_disk = {name: own - ({"__init__"} if name else set()) for name, own in packages().items()}
    assert told == on_disk


def test_the_packages_of_the_design_stand_in_the_order_of_their_imports():
    text = (ROOT / "docs/design.md").read_text()
    order = re.findall(r"^\| `(\w+)/` \| ", text, re.MULTILINE)
    tree = re.search(r"```text\nmerv/ .*?```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert order[1:] == re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)


def test_every_file_that_the_docs_name_is_there():
    roots = "merv|tests|benchmarks|examples|docs|encoders|recipes"
    inside = "|".join(name for name in packages() if name)
    for page in PAGES:
        text = page.read_text()
        named = [ROOT / path for path in re.findall(rf"`((?:{roots})/[\w/.-]+\.\w+)`", text)]
        named += [ROOT / "merv" / path for path in re.findall(rf"[` ]((?:{inside})/\w+\.py)", text)]
        assert all(path.exists() for path in named), [str(path) for path in named if not path.exists()]


def test_every_option_that_the_docs_name_is_one():
    parts = "model|data|checkpoints|sample_answers"
    named = set()
    for page in [*PAGES, *sorted((ROOT / "recipes").rglob("*.yaml"))]:
        text = page.read_text()
        named |= set(re.findall(rf"--({parts})\.(\w+)", text))
        named |= set(re.findall(rf"`({parts})\.(\w+)`", text))
    named.discard(("model", "safetensors"))  # a file
    assert len(named) > 10
    options = {part: described(part)[1] for part in parts.split("|")}
    assert [f"{part}.{name}" for part, name in sorted(named) if name not in options[part]] == []
