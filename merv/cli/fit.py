"""`merv fit`: Lightning's command line over Training and ChatData, with recipes found by name."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence

from merv.errors import TrainingError
from merv.training.recipes import check_keys, described, first_line, recipes, with_recipes

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

NEEDED = ("--model.llm", "--model.encoders", "--data.train")


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

    from merv.training.fit import Fit

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


def help_text() -> str:
    """What `merv fit --help` prints: the options of a recipe with their defaults."""
    lines = [
        "usage: merv fit --config RECIPE [--PART.OPTION=VALUE ...] [--ckpt_path=last]",
        "",
        "Train by a recipe: a file, or one of",
        *(f"  {name:28} {first_line(path)}" for name, path in recipes().items()),
    ]
    for part in ("model", "data", "checkpoints", "sample_answers"):
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
