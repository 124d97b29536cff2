"""Fit: Lightning's command line, made to what a run of merv needs."""

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
    """fit, then save the model and its loss curve."""

    @classmethod
    def command(cls) -> int:
        """Run what sys.argv says; the exit status."""
        register()
        done = cls(
            Training,
            ChatData,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )
        return 130 if done.stopped else 0

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The parts of a recipe besides trainer, model and data."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(SampleAnswers, "sample_answers")

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; raises TrainingError where Lightning cannot, of the options."""
        try:
            super().instantiate_classes()
        except MervError:
            raise
        except (ImportError, ValueError, TypeError, MisconfigurationException) as error:
            raise TrainingError(f"The run cannot be set up: {error}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer with what a run has unless it is told otherwise."""
        root = Path(config["default_root_dir"] or "outputs")
        config["default_root_dir"] = str(root)
        if config["logger"] in (None, True):
            table = CSVLogger(root, name="logs")
            config["logger"] = [table, TensorBoardLogger(root, name="logs", version=table.version)]
        config["enable_model_summary"] = bool(config["enable_model_summary"])  # the parts are listed anyway
        own: list[Callback] = [LossPlot(), GracefulShutdown(), Throughput()]
        if config["logger"] is not False:
            own.append(LearningRateMonitor())
        if config["enable_progress_bar"] is not False:
            own.append(TQDMProgressBar(refresh_rate=5))  # in logs too
        if config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoints)]
        else:
            for callback in callbacks:
                if isinstance(callback, Checkpoints):
                    callback.dirpath = str(root / CHECKPOINTS)
            if self.config["fit"]["data"]["val"] is not None:
                own.append(Best(root / CHECKPOINTS, self.config["fit"]["checkpoints"]["monitor"]))
        config["plugins"] = [*(config["plugins"] or []), Folders()]
        return super()._instantiate_trainer(config, [*callbacks, *own])

    def before_fit(self) -> None:
        """What would end a run after hours must end it now."""
        root = Path(self.trainer.default_root_dir)
        check_free(root / "model")
        given = self.config_init["fit"]
        asked = given["ckpt_path"]
        if asked in ("last", "auto"):
            found = newest(root / CHECKPOINTS)
            if found is None and asked == "last":
                raise CheckpointError(f"There is no checkpoint in {root / CHECKPOINTS} to go on from.")
            given["ckpt_path"] = None if found is None else str(found)
            print(f"Going on from {found}." if found else "A new run: there is no checkpoint yet.")
        given["weights_only"] = True
        earlier = newest(root / CHECKPOINTS)
        if given["ckpt_path"] is None and earlier is not None:
            raise CheckpointError(
                f"{earlier} is of an earlier run. Go on with it by --ckpt_path=last, or begin elsewhere: "
                "--trainer.default_root_dir=..."
            )

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its end."""
        return any(isinstance(c, GracefulShutdown) and c.stopped for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Save what was trained to the end."""
        if not self.stopped:
            folder = save(self.model, Path(self.trainer.default_root_dir) / "model")
            if self.trainer.is_global_zero:
                print(f"The trained model is in {folder}: merv ask VIDEO QUESTION --model {folder}")
