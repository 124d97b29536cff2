"""`merv fit`: Lightning's command line over Training and ChatData, with recipes found by name."""

from __future__ import annotations

import ast
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from merv.errors import TrainingError
from merv.suggest import nearest

# What Lightning says on every run and a user can do nothing about.
NOISE = (
    "does not have many workers",
    "no `val_dataloader`",
    "LeafSpec",
    "in eval mode",
    "litlogger",
    "`weights_only` was not set",
    "exists and is not empty",
)

# Part of a recipe → package, file under it and class that have its options.
PARTS = {
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
    "model": ("merv", "train.py", "Training"),
    "data": ("merv", "data.py", "ChatData"),
    "checkpoints": ("merv", "resume.py", "Checkpoints"),
    "answers": ("merv", "watch.py", "SampleAnswers"),
}
SINGLE = ("config", "c", "seed_everything", "ckpt_path", "weights_only", "print_config", "help", "h")
NEEDED = ("--model.llm", "--model.encoders", "--data.train")


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


def run(argv: Sequence[str]) -> int:
    """Train as the recipe and the options say; the result is a folder under trainer.default_root_dir."""
    if set(argv) & {"-h", "--help"}:
        print(help_text())
        return 0
    argv = with_recipes(["--help" if argument == "--help-all" else argument for argument in argv])
    check_keys(argv)
    typed = {argument.partition("=")[0] for argument in argv}
    if not typed & {"-c", "--config", "--help"} and not set(NEEDED) <= typed:
        raise TrainingError(
            "Name a recipe, as in `merv fit --config cpu_small`, or give at least "
            f"{', '.join(NEEDED)}. Recipes: {', '.join(recipes())}."
        )
    print("Loading torch, transformers and Lightning …", file=sys.stderr, flush=True)
    # Lightning calls jsonargparse by names that are going away; users can do nothing about that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from transformers.utils import logging as transformers_logging

    from merv.fit import Fit

    transformers_logging.disable_progress_bar()
    for words in NOISE:
        warnings.filterwarnings("ignore", f".*{re.escape(words)}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in NOISE)
    )
    # LightningCLI reads them there, and so do the further processes that it starts
    was, sys.argv = sys.argv, [sys.argv[0], "fit", *argv]
    try:
        return Fit.command()
    finally:
        sys.argv = was


# Before anything is loaded -----------------------------------------------------------------


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


def help_text() -> str:
    """What `merv fit --help` prints: the options of a recipe with their defaults."""
    lines = [
        "usage: merv fit --config RECIPE [--PART.OPTION=VALUE ...] [--ckpt_path=last]",
        "",
        "Train by a recipe: a file, or one of",
        *(f"  {name:28} {_first_line(path)}" for name, path in recipes().items()),
    ]
    for part in ("model", "data", "checkpoints", "answers"):
        said, own = described(part)
        lines += ["", f"--{part}. and one of", *(f"  {option}" for option in own.values()), "", said]
    lines += [
        "",
        "--trainer. and an option of Lightning's Trainer: max_steps, max_epochs, devices, strategy,",
        "  precision, accumulate_grad_batches, gradient_clip_val, default_root_dir, logger, ...",
        "--ckpt_path=last goes on from the newest checkpoint of the run; auto does if there is one.",
        "--print_config prints the whole recipe; --help-all what Lightning knows of every option (15 s).",
    ]
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    """What a recipe says of itself: its second comment line that has words."""
    said = [line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((line for line in said[1:] if line), "")
