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
