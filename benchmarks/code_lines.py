"""Count the lines of code of each package, without docstrings, comments and blank lines.

python benchmarks/code_lines.py [CHECKOUT]
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

LAYOUT = {  # tokens that are not code
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> int:
    """The number of lines with code.

    >>> code_lines('def f():\\n    "Docstring."\\n\\n    return 1  # comment\\n')
    2
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def by_package(checkout: Path) -> Counter[str]:
    """Package → lines of code, of merv/ and encoders/."""
    counts: Counter[str] = Counter()
    for path in [*(checkout / "merv").rglob("*.py"), *(checkout / "encoders").glob("*.py")]:
        folders = path.relative_to(checkout).parts[:-1]
        is_link = folders[:2] in (("merv", "encoders"), ("merv", "recipes"))
        if not is_link:
            counts["/".join(folders[:2])] += code_lines(path.read_text(encoding="utf-8"))
    return counts


def main() -> None:
    """Print one row per package, and the total."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "checkout",
        type=Path,
        nargs="?",
        default=Path(__file__).parents[1],
        metavar="CHECKOUT",
        help="(default: this one)",
    )
    counts = by_package(parser.parse_args().checkout)
    for package, count in sorted(counts.items()):
        print(f"{package:20} {count:6}")
    print(f"{'total':20} {counts.total():6}")


if __name__ == "__main__":
    main()
