"""`merv fit`: Lightning's command line over Training and ChatData, with recipes found by name."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from merv.errors import TrainingError
from merv.suggest import nearest

# What Lightning says on every run and a user can do nothing about.
NOISE = ("does not have many workers", "no `val_dataloader`", "LeafSpec", "in eval mode", "litlogger")


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
    # Lightning calls jsonargparse by names that are going away; users can do nothing about that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.cli import LightningCLI
    from transformers.utils import logging as transformers_logging

    from merv.checkpoint import check_free
    from merv.data import ChatData
    from merv.plot import LossPlot
    from merv.train import Training, save

    transformers_logging.disable_progress_bar()
    for words in NOISE:
        warnings.filterwarnings("ignore", f".*{re.escape(words)}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in NOISE)
    )

    class Command(LightningCLI):
        """fit, then save the model and its loss curve."""

        def before_instantiate_classes(self) -> None:
            if self.config["fit"]["trainer"]["enable_progress_bar"] is not False:
                self.trainer_defaults["callbacks"].append(TQDMProgressBar(refresh_rate=5))  # in logs too

        def before_fit(self) -> None:
            check_free(Path(self.trainer.default_root_dir) / "model")  # before hours of training, not after

        def after_fit(self) -> None:
            folder = save(self.model, Path(self.trainer.default_root_dir) / "model")
            print(f"The trained model is in {folder}: merv ask VIDEO QUESTION --model {folder}")

    typed, sys.argv = sys.argv, ["merv", "fit", *with_recipes(argv)]  # LightningCLI reads them there
    try:
        Command(
            Training,
            ChatData,
            trainer_defaults={"callbacks": [LossPlot()]},
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
        )
    finally:
        sys.argv = typed
    return 0
