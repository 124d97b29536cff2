"""LightningCLI with merv's callbacks, checkpoints and loggers: the implementation of `merv fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from merv.checkpoints.folder import check_free
from merv.data.module import ChatData
from merv.errors import CheckpointError, MervError, TrainingError
from merv.training.callbacks import GracefulShutdown, LossPlot, SampleAnswers, Throughput
from merv.training.checkpointing import CHECKPOINTS, Best, Checkpoints, Folders, newest
from merv.training.module import Training, save
from merv.training.sharding import register


class Fit(LightningCLI):
    """Builds trainer, model and data from the options, trains, and saves the model."""

    @classmethod
    def command(cls) -> int:
        """Run the command in sys.argv; return the exit status, 130 after an interrupt."""
        register()
        finished = cls(
            Training,
            ChatData,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )
        return 130 if finished.stopped else 0

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of a recipe besides trainer, model and data."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(SampleAnswers, "sample_answers")

    def instantiate_classes(self) -> None:
        """Build trainer, model and data.

        Raises:
            TrainingError: Lightning does not accept an option.
        """
        try:
            super().instantiate_classes()
        except MervError:
            raise
        except (ImportError, ValueError, TypeError, MisconfigurationException) as error:
            raise TrainingError(f"The run cannot be set up: {error}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Build the trainer with merv's defaults for what the options leave open."""
        root = Path(config["default_root_dir"] or "outputs")
        config["default_root_dir"] = str(root)
        if config["logger"] in (None, True):
            csv = CSVLogger(root, name="logs")
            config["logger"] = [csv, TensorBoardLogger(root, name="logs", version=csv.version)]
        config["enable_model_summary"] = bool(config["enable_model_summary"])  # print_parts replaces it
        callbacks = [*callbacks, LossPlot(), GracefulShutdown(), Throughput()]
        if config["logger"] is not False:
            callbacks.append(LearningRateMonitor())
        if config["enable_progress_bar"] is not False:
            callbacks.append(TQDMProgressBar(refresh_rate=5))  # seldom enough for log files
        (checkpoints,) = (callback for callback in callbacks if isinstance(callback, Checkpoints))
        if config["enable_checkpointing"] is False:
            callbacks.remove(checkpoints)
        else:
            checkpoints.dirpath = str(root / CHECKPOINTS)
            if self.config["fit"]["data"]["val"] is not None:
                callbacks.append(Best(root / CHECKPOINTS, checkpoints.best_metric))
        config["plugins"] = [*(config["plugins"] or []), Folders()]
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Find the checkpoint to resume from, and fail now rather than when the model is saved."""
        root = Path(self.trainer.default_root_dir)
        check_free(root / "model")
        options = self.config_init["fit"]
        latest = newest(root / CHECKPOINTS)
        if options["ckpt_path"] in ("last", "auto"):
            if latest is None and options["ckpt_path"] == "last":
                raise CheckpointError(f"Cannot resume: {root / CHECKPOINTS} has no checkpoint.")
            print(
                "Starting a new run: there is no checkpoint yet."
                if latest is None
                else f"Resuming from {latest}."
            )
            options["ckpt_path"] = None if latest is None else str(latest)
        elif options["ckpt_path"] is None and latest is not None:
            raise CheckpointError(
                f"{latest} belongs to an earlier run. Resume it with --ckpt_path=last, or choose another "
                "folder with --trainer.default_root_dir=..."
            )
        options["weights_only"] = True

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its end."""
        return any(isinstance(c, GracefulShutdown) and c.stopped for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Save the trained model, unless the run was stopped."""
        if not self.stopped:
            folder = save(self.model, Path(self.trainer.default_root_dir) / "model")
            if self.trainer.is_global_zero:
                print(f"The trained model is in {folder}: merv ask VIDEO QUESTION --model {folder}")
