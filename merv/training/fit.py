"""LightningCLI with merv's callbacks, checkpoints and loggers: the implementation of `merv fit`."""

from __future__ import annotations

import os
from argparse import ArgumentError
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from merv.checkpoints.folder import check_free
from merv.data.module import ChatData
from merv.errors import CheckpointError, MervError, TrainingError
from merv.training.callbacks import GracefulShutdown, LossPlot, SampleAnswers, Throughput
from merv.training.checkpointing import CHECKPOINTS, Best, Checkpoints, Folders, newest_checkpoint
from merv.training.module import Training, check_end, save
from merv.training.sharding import register_strategy


class Fit(LightningCLI):
    """Builds trainer, model and data from the options, trains, and saves the model.

    Args:
        scratch: Temporary folder. A `fast_dev_run` writes to it instead of the run's folder, so that a later
            run cannot resume from it.
        **options: Arguments of LightningCLI.
    """

    def __init__(self, *, scratch: str | Path, **options: Any) -> None:
        self.scratch = Path(scratch)
        super().__init__(**options)

    @classmethod
    def command(cls) -> int:
        """Run the command in sys.argv; return the exit status, 130 after an interrupt.

        Raises:
            TrainingError: An option has a value of the wrong type, or the options do not fit each other.
            MervError: Any other error of the run that the user can fix, such as a bad sample.
        """
        register_strategy()
        with TemporaryDirectory(prefix="merv_fit_") as scratch:
            finished = cls(
                scratch=scratch,
                model_class=Training,
                datamodule_class=ChatData,
                parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                auto_configure_optimizers=False,
            )
        return 130 if finished.stopped else 0

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options. A value of the wrong type raises TrainingError and does not print the usage."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise TrainingError(str(error).strip()) from error

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
        except (ImportError, RuntimeError, ValueError, TypeError, MisconfigurationException) as error:
            raise TrainingError(f"The run cannot be set up: {error}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Build the trainer, with merv's defaults for options that are not set.

        Raises TrainingError for a run without an end.
        """
        check_end(config)
        self.root = root = Path(config["default_root_dir"] or "outputs")
        if config["fast_dev_run"]:
            root = self.scratch
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
        if config["enable_checkpointing"] is False or config["fast_dev_run"]:
            callbacks.remove(checkpoints)
        else:
            checkpoints.dirpath = str(root / CHECKPOINTS)
            if self.config["fit"]["data"]["val"] is not None:
                callbacks.append(Best(root / CHECKPOINTS, checkpoints.best_metric))
        plugins = config["plugins"] or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        environment = cluster_environment(config["num_nodes"])
        if environment is not None and not any(isinstance(p, ClusterEnvironment) for p in plugins):
            plugins.append(environment)
        config["plugins"] = [*plugins, Folders()]
        trainer = super()._instantiate_trainer(config, callbacks)
        devices = trainer.num_devices * trainer.num_nodes
        if isinstance(environment, SLURMEnvironment) and environment.world_size() != devices:
            raise TrainingError(  # Lightning would train with one device in each of them
                f"srun started {environment.world_size()} processes, but the run has {devices}: set "
                "trainer.devices to srun's --ntasks-per-node, and trainer.num_nodes to its --nodes."
            )
        return trainer

    def before_fit(self) -> None:
        """Find the checkpoint to resume from, and fail now rather than when the model is saved."""
        root = self.root
        check_free(root / "model")
        options = self.config_init["fit"]
        if self.is_dev_run:
            print("Starting a new run for trainer.fast_dev_run; nothing will be saved.")
            options["ckpt_path"] = None
            return
        latest = newest_checkpoint(root / CHECKPOINTS)
        if options["ckpt_path"] in ("last", "auto"):
            if latest is None and options["ckpt_path"] == "last":
                raise CheckpointError(
                    f"Cannot resume: {root / CHECKPOINTS} has no checkpoint. Pass --ckpt_path=auto, "
                    "which starts a new run in this case."
                )
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
    def is_dev_run(self) -> bool:
        """Whether the run only checks, with a few batches, that everything works."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped before its end."""
        return any(isinstance(c, GracefulShutdown) and c.stopped for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Save the trained model, unless the run was stopped or is a `fast_dev_run`."""
        if not self.stopped and not self.is_dev_run:
            folder = save(self.model, self.root / "model")
            if self.trainer.is_global_zero:
                print(
                    f"The trained model is in {folder}. To use it: merv ask VIDEO QUESTION --model {folder}"
                )


def cluster_environment(num_nodes: int) -> ClusterEnvironment | None:
    """The environment to give to Lightning in a SLURM job; None leaves the choice to Lightning.

    Lightning takes part in a SLURM job as soon as SLURM_NTASKS is set. But batch scripts and interactive
    shells have this variable, too: a process in them would wait for processes that do not exist. srun alone
    sets SLURM_STEP_NUM_TASKS.

    Raises:
        TrainingError: The run needs several nodes, but srun did not start this process.
    """
    in_job = "SLURM_NTASKS" in os.environ or "SLURM_JOB_ID" in os.environ
    if not in_job or TorchElasticEnvironment.detect():
        return None
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return SLURMEnvironment()
    if num_nodes > 1 and "NODE_RANK" not in os.environ:  # users set it to start each node by hand
        raise TrainingError(
            f"trainer.num_nodes is {num_nodes}, but srun did not start this process, so nothing runs on the "
            f"other nodes. Run `srun --nodes={num_nodes} --ntasks-per-node=DEVICES merv fit ...`."
        )
    return LightningEnvironment()
