"""Recipes: found by name, their keys checked against the options that they set; imports nothing heavy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from merv.errors import TrainingError
from merv.utils.suggest import nearest

# Part of a recipe → package, file under it and class that have its options.
PARTS = {
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
    "model": ("merv", "training/module.py", "Training"),
    "data": ("merv", "data/module.py", "ChatData"),
    "checkpoints": ("merv", "training/checkpointing.py", "Checkpoints"),
    "sample_answers": ("merv", "training/callbacks.py", "SampleAnswers"),
}
SINGLE = ("config", "c", "seed_everything", "ckpt_path", "weights_only", "print_config", "help", "h")


def recipes() -> dict[str, Path]:
    """Name → file of every installed recipe.

    >>> "demo" in recipes()
    True
    """
    import merv.recipes

    folder = Path(merv.recipes.__path__[0])
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}


def with_recipes(argv: Sequence[str]) -> list[str]:
    """The arguments with each `--config NAME` of a recipe turned into its path.

    Raises TrainingError for a name that is neither a recipe nor a file.
    """
    known = recipes()
    out = list(argv)
    for i, argument in enumerate(out):
        option, _, value = argument.partition("=")
        if option in ("--config", "-c"):
            name = value or (out[i + 1] if i + 1 < len(out) else "")
            path = known.get(name, Path(name))
            if not path.is_file():
                raise TrainingError(
                    f"No recipe and no file is called {name!r}.{nearest(name, known)} "
                    f"Recipes: {', '.join(known)}."
                )
            if value:
                out[i] = f"{option}={path}"
            else:
                out[i + 1] = str(path)
    return out


def check_keys(argv: Sequence[str], also: Sequence[str] = ()) -> None:
    """Raise TrainingError for a key, in a recipe or typed, that no part has: it names the nearest.

    also: further options that a command takes.
    """
    known = {**options(), **{option: {} for option in also}}
    for where, key in _keys(argv):
        part, _, rest = key.partition(".")
        own = known.get(part)
        if part not in known:
            raise TrainingError(f"{where}: nothing is called {part!r}.{nearest(part, known)}")
        name = re.split(r"[.+]", rest)[0]
        if own and name and name not in own:
            raise TrainingError(f"{where}: {part} has no option {name!r}.{nearest(name, own)}")


def options() -> dict[str, dict[str, str]]:
    """Part of a recipe → its options, each as it is written; none for what is a single value."""
    known: dict[str, dict[str, str]] = {part: described(part)[1] for part in PARTS}
    return {**known, **{key: {} for key in SINGLE}}


def described(part: str) -> tuple[str, dict[str, str]]:
    """Documentation of the class behind a part, and its options with types and defaults.

    Read from its source: importing what it stands on takes seconds.
    """
    package, place, name = PARTS[part]
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).parent.joinpath(place).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    values = [*init.args.defaults, *init.args.kw_defaults]
    defaults = dict(zip(reversed(arguments), reversed(values), strict=False))
    written = {}
    for argument in arguments:
        default = defaults.get(argument)
        written[argument.arg] = ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")
    return ast.get_docstring(node) or "", written


def _keys(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Where a key stands, and the key with dots: of recipes, and of what was typed."""
    import yaml

    for i, argument in enumerate(argv):
        if not argument.startswith("-"):
            continue
        key, _, value = argument.lstrip("-").partition("=")
        yield f"--{key}", key
        if key in ("config", "c"):
            path = value or argv[i + 1]
            try:
                recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except yaml.YAMLError as error:
                raise TrainingError(f"{path} is no YAML: {error}") from error
            if not isinstance(recipe, Mapping):
                raise TrainingError(f"{path} is no recipe: wanted trainer, model and data at its top.")
            for part, own in recipe.items():
                yield path, str(part)
                yield from ((path, f"{part}.{name}") for name in (own if isinstance(own, Mapping) else ()))


def first_line(path: Path) -> str:
    """What a recipe says of itself: its second comment line that has words."""
    said = [line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((line for line in said[1:] if line), "")
