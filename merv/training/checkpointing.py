"""Checkpoints of a training run: folders from which it resumes exactly.

A checkpoint is the folder of `VideoLLM.save_pretrained`, so that `merv ask --model` loads it, plus
`training.pt`: optimizer, schedule, position in the data, random states.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO

from merv.checkpoints.folder import (
    TRAINING_STATE,
    find_folder,
    load_folder,
    replacing,
    verify_folder,
    write_model,
)
from merv.errors import CheckpointError, TrainingError
from merv.utils.suggest import nearest

EXACT_MATCH, VAL_LOSS = "val/exact_match", "val/loss"  # metrics; those of a kind are val/exact_match/KIND
CHECKPOINTS = "checkpoints"  # the subfolder of a run
PREFIX = "model."  # how the LightningModule names the tensors of its model


class Folders(CheckpointIO):
    """Stores Lightning's checkpoints as folders: config.json, model.safetensors, training.pt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the folder, completely or not at all."""
        tensors = {name.removeprefix(PREFIX): t for name, t in checkpoint["state_dict"].items()}
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "config")}
        with replacing(path) as temporary:
            try:
                with (temporary / TRAINING_STATE).open("wb") as file:
                    torch.save(rest, file)
            except RuntimeError as error:  # torch hides the OSError of a full disk behind this one
                raise OSError(error.__context__ or error) from error
            write_model(temporary, "VideoLLM", checkpoint["config"], tensors)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder that `save_checkpoint` wrote. Only tensors and plain values are unpickled.

        Raises:
            CheckpointError: The folder is not a checkpoint, or one of its files has changed.
        """
        path = find_folder(path)
        config, tensors = load_folder(path, "VideoLLM", verify=True)
        if not (path / TRAINING_STATE).is_file():
            raise CheckpointError(
                f"Cannot resume from {path}: it is a trained model without {TRAINING_STATE}. "
                "To start a new run with it, set model.init_from."
            )
        verify_folder(path, True, [TRAINING_STATE])
        rest = read_training_state(path)
        state = {PREFIX + name: tensor for name, tensor in tensors.items()}
        return {**rest, "config": config, "state_dict": state}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the folder."""
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints(ModelCheckpoint):
    """Saves checkpoints during training and at its end, as `checkpoints/step=N` in the run's folder.

    Args:
        every_n_steps: Steps of the optimizer between two checkpoints. 0: only at the end.
        save_total_limit: How many checkpoints to keep, the newest ones; at least 1. None: all.
        monitor: With validation data, the checkpoint with the best value of this metric is kept as
            `checkpoints/best`: `val/exact_match` (share of exactly correct answers),
            `val/exact_match/KIND` (that of a kind of question), or `val/loss`.

    Raises:
        TrainingError: `save_total_limit` is below 1, or `every_n_steps` is negative.
    """

    FILE_EXTENSION = ""

    def __init__(
        self, every_n_steps: int = 500, save_total_limit: int | None = 2, monitor: str = "val/exact_match"
    ) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise TrainingError(
                f"checkpoints.save_total_limit is {save_total_limit}; expected at least 1, or null to keep "
                "all checkpoints. --trainer.enable_checkpointing=false saves none."
            )
        if every_n_steps < 0:
            raise TrainingError(f"checkpoints.every_n_steps is {every_n_steps}; expected at least 0.")
        self.save_total_limit, self.best_metric = save_total_limit, monitor
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=-1 if save_total_limit is None else save_total_limit,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=True,  # otherwise the last step of an epoch is saved after validation
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """The same for all options: a run resumed with other options still deletes its old checkpoints."""
        return "Checkpoints"

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return previous != current  # Lightning keeps every checkpoint that the run was resumed from

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Do not save the resumed step again: during gradient accumulation, gradients would be missing."""
        super().on_train_start(trainer, module)
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        if trainer.should_stop or trainer.global_step == trainer.estimated_stepping_batches:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_end(trainer, module)
        self.save(trainer)

    def save(self, trainer: Trainer, overwrite: bool = False) -> None:
        """Save this step now. With `overwrite`, also if it is saved already."""
        if overwrite or self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class Best(ModelCheckpoint):
    """Keeps the checkpoint with the best value of `monitor`, as `best`."""

    FILE_EXTENSION = ""

    def __init__(self, folder: Path, monitor: str) -> None:
        mode = "min" if monitor == VAL_LOSS else "max"
        super().__init__(
            folder,
            "best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Raise TrainingError, before the model is loaded, if validation does not log the metric."""
        super().setup(trainer, module, stage)
        if self.monitor in (EXACT_MATCH, VAL_LOSS):
            return
        kinds = trainer.datamodule.val_kinds()  # type: ignore[attr-defined]
        known = [EXACT_MATCH, *(f"{EXACT_MATCH}/{kind}" for kind in kinds), VAL_LOSS]
        if self.monitor not in known:
            raise TrainingError(
                f"checkpoints.monitor: unknown metric {self.monitor!r}.{nearest(str(self.monitor), known)} "
                f"Available: {', '.join(known)}."
            )

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the checkpoint if it is better; raises TrainingError if validation did not log the metric."""
        if not trainer.sanity_checking and self.monitor not in trainer.callback_metrics:
            logged = [name for name in trainer.callback_metrics if name.startswith("val/")]
            raise TrainingError(
                f"checkpoints.monitor is {self.monitor}, but validation logged "
                f"{', '.join(logged) or 'nothing'}. Choose one of these, or validate on more batches."
            )
        super().on_validation_end(trainer, module)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step in a folder, or None."""
    checkpoints = [
        p for p in Path(folder).glob("step=*") if p.name[5:].isdigit() and (p / TRAINING_STATE).is_file()
    ]
    return max(checkpoints, key=lambda path: int(path.name[5:]), default=None)


def read_training_state(path: Path) -> dict[str, Any]:
    """Read training.pt of a checkpoint. Only tensors and plain values are unpickled.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = path / TRAINING_STATE
    try:
        # Mapped, because every process of a machine reads the file
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # damaged files raise errors of many types
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}). Resume from an earlier checkpoint, or start a "
            f"new run from its model: --model.init_from={path}."
        ) from error
    return state


def random_states() -> dict[str, Any]:
    """The states of this process's random generators, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (plug-ins may use it)
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *others = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
