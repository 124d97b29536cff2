"""Resume: checkpoints of a run as folders, written whole or not at all, from which it goes on exactly.

A checkpoint is what `VideoLLM.save_pretrained` writes, so that `merv ask --model` takes it, and
`training.pt` beside it: optimizer, schedule, place in the data, random states.
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

from merv.checkpoints.folder import find_folder, load_folder, replacing, write_model
from merv.errors import CheckpointError
from merv.training.sharding import META

CHECKPOINTS = "checkpoints"  # folder under the run's
PREFIX = "model."  # of the LightningModule's names


class Folders(CheckpointIO):
    """Lightning's checkpoints as folders: config.json, model.safetensors, training.pt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the folder; it is there whole or not at all."""
        state = {name.removeprefix(PREFIX): t for name, t in checkpoint["state_dict"].items()}
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "config")}
        with replacing(path) as fresh:
            write_model(fresh, "VideoLLM", checkpoint["config"], state)
            try:
                with (fresh / META).open("wb") as file:
                    torch.save(rest, file)
            except RuntimeError as error:  # torch's of a full disk; the reason is behind it
                raise OSError(error.__context__ or error) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder that `save_checkpoint` wrote; never unpickles more than tensors and plain values.

        Raises CheckpointError where it is no such folder.
        """
        path = find_folder(path)
        config, state = load_folder(path, "VideoLLM")
        if not (path / META).is_file():
            raise CheckpointError(
                f"{path} is a trained model and no checkpoint to resume from: it has no {META}. "
                "To begin a new run with it, set model.init_from."
            )
        rest = torch.load(path / META, map_location="cpu", weights_only=True)
        return {**rest, "config": config, "state_dict": {PREFIX + name: t for name, t in state.items()}}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the folder."""
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints(ModelCheckpoint):
    """A checkpoint every `every_n_steps` steps of the optimizer and one at the end; the newest are kept.

    save_total_limit: how many. They are in `checkpoints/` under the run's folder: `step=400` and so on.
    monitor: where there are validation data, `best` is the checkpoint with the best `val/exact_match` (share
    of right answers), `val/KIND` or `val/loss`.
    """

    FILE_EXTENSION = ""

    def __init__(
        self, every_n_steps: int = 500, save_total_limit: int = 2, monitor: str = "val/exact_match"
    ) -> None:
        self.best = monitor
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=save_total_limit,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=True,  # else one that falls on the end of an epoch waits for validation
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """The same whatever `every_n_steps` is, so that what was saved before is known and rotated."""
        return "Checkpoints"

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return previous != current  # Lightning would keep all that a run ever went on from

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """What a run goes on from is saved; saved again amid an accumulation, it would lack a part."""
        super().on_train_start(trainer, module)
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        if trainer.should_stop or trainer.global_step == trainer.estimated_stepping_batches:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_end(trainer, module)
        self.save(trainer)

    def save(self, trainer: Trainer, again: bool = False) -> None:
        """Now, where this step is not saved already; `again`, also where it is."""
        if again or self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class Best(ModelCheckpoint):
    """The checkpoint with the best `monitor` on the validation data, as `best`: the smallest of a loss."""

    FILE_EXTENSION = ""

    def __init__(self, folder: Path, monitor: str = "val/exact_match") -> None:
        mode = "min" if monitor == "val/loss" else "max"
        super().__init__(
            folder,
            "best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )


def newest(folder: str | Path) -> Path | None:
    """The checkpoint of a run that has trained longest, or None."""
    found = [p for p in Path(folder).glob("step=*") if p.name[5:].isdigit() and (p / META).is_file()]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (whoever draws from it, in a transform, counts)
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *others = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
