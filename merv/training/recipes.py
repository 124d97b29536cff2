"""Recipes: find them by name and check their keys, without importing torch or Lightning."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from merv.errors import TrainingError
from merv.utils.suggest import nearest

# Section of a recipe → package, file and class that define its options
SECTIONS = {
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
    "model": ("merv", "training/options.py", "TrainingOptions"),
    "data": ("merv", "data/module.py", "ChatData"),
    "checkpoints": ("merv", "training/checkpointing.py", "Checkpoints"),
    "sample_answers": ("merv", "training/callbacks.py", "SampleAnswers"),
}
SYNONYMS = {"learning_rate": "lr"}  # name in other libraries → option
# Keys outside the sections, each with a single value
TOP_LEVEL_KEYS = ("config", "c", "seed_everything", "ckpt_path", "weights_only", "print_config", "help", "h")


def recipes() -> dict[str, Path]:
    """Name → file of each installed recipe.

    >>> "demo" in recipes()
    True
    """
    import merv.recipes

    folder = Path(merv.recipes.__path__[0])
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}


def with_recipes(argv: Sequence[str]) -> list[str]:
    """The arguments, with the name of a recipe in `--config NAME` replaced by its path.

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
                    f"Unknown recipe {name!r}.{nearest(name, known)} Pass a file, or one of: "
                    f"{', '.join(known)}."
                )
            if value:
                out[i] = f"{option}={path}"
            else:
                out[i + 1] = str(path)
    return out


def check_keys(argv: Sequence[str]) -> None:
    """Check every key in the recipes and on the command line.

    Args:
        argv: Arguments of `merv fit`, with recipes as paths.

    Raises:
        TrainingError: A key is unknown. The message names the nearest one.
    """
    known = options()
    for origin, key in _keys(argv):
        section, _, rest = key.partition(".")
        if section not in known:
            raise TrainingError(
                f"{origin}: unknown key {section!r}.{nearest(section, known)} Available: {', '.join(known)}."
            )
        name = re.split(r"[.+]", rest)[0]
        if known[section] and name and name not in known[section]:
            similar = nearest(SYNONYMS.get(name, name), known[section])
            raise TrainingError(
                f"{origin}: {section} has no option {name!r}.{similar} `merv fit --help` lists the options."
            )


def options() -> dict[str, dict[str, str]]:
    """Section of a recipe → its options as source text; empty for keys with a single value."""
    known: dict[str, dict[str, str]] = {section: documented_options(section)[1] for section in SECTIONS}
    return {**known, **{key: {} for key in TOP_LEVEL_KEYS}}


def documented_options(section: str) -> tuple[str, dict[str, str]]:
    """Docstring of the class behind a section of a recipe, and its options with types and defaults.

    They are parsed from the source file, because importing Lightning takes seconds.
    """
    package, path, name = SECTIONS[section]
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).parent.joinpath(path).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if not inits:  # a dataclass
        return ast.get_docstring(node) or "", {ast.unparse(f.target): ast.unparse(f) for f in fields}
    (init,) = inits
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    values = [*init.args.defaults, *init.args.kw_defaults]
    defaults = dict(zip(reversed(arguments), reversed(values), strict=False))
    texts = {}
    for argument in arguments:
        default = defaults.get(argument)
        texts[argument.arg] = ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")
    return ast.get_docstring(node) or "", texts


def _keys(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the origin and the dotted name of each key on the command line and in its recipes."""
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
                raise TrainingError(f"{path} is not valid YAML: {error}") from error
            if not isinstance(recipe, Mapping):
                raise TrainingError(f"{path} is not a recipe: expected the keys trainer, model and data.")
            for section, values in recipe.items():
                yield path, str(section)
                yield from (
                    (path, f"{section}.{key}") for key in (values if isinstance(values, Mapping) else ())
                )


def summary_of(path: Path) -> str:
    """The summary of a recipe: its first comment with text after the command in the first line."""
    comments = [line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((line for line in comments[1:] if line), "")
