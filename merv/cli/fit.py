"""`merv fit`: LightningCLI for Training and ChatData, with recipes found by name."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence

from merv.errors import TrainingError
from merv.training.recipes import check_keys, documented_options, recipes, summary_of, with_recipes

# Parts of Lightning's warnings that appear in every run and that a user cannot act on.
NOISE = (
    "does not have many workers",
    "no `val_dataloader`",
    "LeafSpec",
    "in eval mode",
    "litlogger",
    "`weights_only` was not set",
    "exists and is not empty",
)

REQUIRED = ("--model.llm", "--model.encoders", "--data.train")


def run(argv: Sequence[str]) -> int:
    """Train with the given recipe and options; the model is saved under trainer.default_root_dir."""
    if set(argv) & {"-h", "--help"}:
        print(help_text())
        return 0
    argv = with_recipes(["--help" if argument == "--help-all" else argument for argument in argv])
    check_keys(argv)
    typed = {argument.partition("=")[0] for argument in argv}
    if not typed & {"-c", "--config", "--help"} and not set(REQUIRED) <= typed:
        raise TrainingError(
            "Pass a recipe, for example `merv fit --config cpu_small`, or at least "
            f"{', '.join(REQUIRED)}. Recipes: {', '.join(recipes())}."
        )
    print("Loading torch, transformers and Lightning …", file=sys.stderr, flush=True)
    # Lightning uses deprecated names of jsonargparse; a user cannot act on that
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from transformers.utils import logging as transformers_logging

    from merv.training.fit import Fit

    transformers_logging.disable_progress_bar()
    for text in NOISE:
        warnings.filterwarnings("ignore", f".*{re.escape(text)}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(text in record.getMessage() for text in NOISE)
    )
    # LightningCLI reads sys.argv, and passes it on to the processes that it starts
    original, sys.argv = sys.argv, [sys.argv[0], "fit", *argv]
    try:
        return Fit.command()
    finally:
        sys.argv = original


def help_text() -> str:
    """The text of `merv fit --help`: recipes, and the options with their defaults."""
    lines = [
        "usage: merv fit --config RECIPE [--SECTION.OPTION=VALUE ...] [--ckpt_path=last]",
        "",
        "Train with a recipe: a YAML file, or one of",
        *(f"  {name:28} {summary_of(path)}" for name, path in recipes().items()),
    ]
    for section in ("model", "data", "checkpoints", "sample_answers"):
        documentation, options = documented_options(section)
        lines += ["", f"--{section}.OPTION, with one of", *(f"  {option}" for option in options.values())]
        lines += ["", documentation]
    lines += [
        "",
        "--trainer.OPTION, with an option of Lightning's Trainer: max_steps, max_epochs, devices, strategy,",
        "  precision, accumulate_grad_batches, gradient_clip_val, default_root_dir, logger, ...",
        "--ckpt_path=last resumes from the newest checkpoint of the run. --ckpt_path=auto starts a new run",
        "  if there is none.",
        "--seed_everything=N sets the seed of initial weights and dropout (default 0).",
        "--print_config prints the complete recipe. --help-all prints Lightning's help for every option;",
        "  this takes about 15 s.",
    ]
    return "\n".join(lines)
