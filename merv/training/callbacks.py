"""Callbacks of a training run: bad losses, throughput, sampled answers, graceful shutdown, loss plot."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from merv.data.loader import SAMPLE_ERRORS
from merv.data.samples import text_of
from merv.errors import BadLoss
from merv.training.checkpointing import CHECKPOINTS, Checkpoints
from merv.utils.plot import draw_loss

logger = logging.getLogger(__name__)

LOSS_HISTORY = 100  # number of recent losses that a new one is compared with


class LossMonitor:
    """Detects losses that must not be learned from: NaN, infinite, or a spike.

    Args:
        loss_spike_threshold: A loss is a spike if it is above 1 and above this multiple of the largest of the
            last 100 losses. The first 100 losses are not compared. None: any finite loss is accepted.

    Example:
        >>> monitor = LossMonitor(loss_spike_threshold=5)
        >>> monitor.record(torch.tensor(float("nan")), 12, ["train.jsonl:7"])
        >>> monitor.check(), monitor.report()
        (1, 'The loss is nan in the batch of train.jsonl:7. The weights were not updated.')
    """

    def __init__(self, loss_spike_threshold: float | None) -> None:
        self.loss_spike_threshold = loss_spike_threshold
        self.past: deque[float] = deque(maxlen=LOSS_HISTORY)
        self.unchecked: list[tuple[Tensor, Sequence[str]]] = []
        self.step_origins: list[str] = []
        self.bad: list[tuple[float, Sequence[str]]] = []

    def record(self, loss: Tensor, tokens: int, origins: Sequence[str]) -> None:
        """Record the mean loss of a batch, its number of answer tokens, and the origins of its samples."""
        if tokens:
            self.unchecked.append((loss, origins))

    def check(self) -> int:
        """Check the losses recorded since the last call; return the number of bad ones.

        Call it once per step: it waits for the device.
        """
        self.step_origins = [origin for _, origins in self.unchecked for origin in origins]
        for loss, origins in self.unchecked:
            value = float(loss)
            if not math.isfinite(value) or self._is_spike(value):
                self.bad.append((value, origins))
            else:
                self.past.append(value)
        self.unchecked.clear()
        return len(self.bad)

    def _is_spike(self, value: float) -> bool:
        if self.loss_spike_threshold is None or len(self.past) < LOSS_HISTORY:
            return False
        return value > max(1.0, self.loss_spike_threshold * max(self.past))

    def report(self) -> str:
        """Describe the bad losses and the samples that they belong to."""
        if not self.bad:
            return (
                "A gradient is NaN or infinite, or another process had a bad loss. In this process the step "
                f"used {', '.join(self.step_origins)}. The weights were not updated."
            )
        losses = [
            f"The loss is {value:.4g} in the batch of {', '.join(origins)}." for value, origins in self.bad
        ]
        return " ".join([*losses, "The weights were not updated."])


class Throughput(Callback):
    """Logs speed and progress, averaged over the last 20 batches.

    `tokens_per_s` is answer tokens per second of this process, `data_wait` the share of time spent waiting,
    `memory_gb` the peak memory, `minutes_left` the estimated time to the end of the run.
    """

    def __init__(self) -> None:
        self.batch_end = time.perf_counter()
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=20)  # seconds waiting, training; tokens

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.batch_end = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.batch_end = time.perf_counter()  # validation does not count as waiting for data

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.perf_counter()
        last_tokens: Any = module.last_tokens
        self.recent.append((self.batch_start - self.batch_end, now - self.batch_start, last_tokens))
        self.batch_end = now
        waiting_s, training_s, tokens = (sum(column) for column in zip(*self.recent, strict=True))
        total_s = waiting_s + training_s
        steps_left = trainer.estimated_stepping_batches - trainer.global_step
        batches_left = steps_left * trainer.accumulate_grad_batches
        values = {
            "tokens_per_s": tokens / total_s,
            "data_wait": waiting_s / total_s,
            "memory_gb": memory_gb(),
            "minutes_left": round(batches_left * total_s / len(self.recent) / 60, 1),
        }
        module.log_dict(values, prog_bar=True, batch_size=1)


def memory_gb() -> float:
    """Peak memory so far in GB: of the GPU if there is one, otherwise of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class SampleAnswers(Callback):
    """Writes the model's answers to a few questions to `answers.jsonl` while it trains.

    The questions come from the validation data if there are any, otherwise from the training data. With
    `data.stream` and no validation data, no answers are sampled.

    Args:
        every_n_steps: Steps of the optimizer between two samplings. 0: never.
        num_samples: How many samples to use; each contributes its first question.
        max_new_tokens: Maximum length of an answer.
    """

    def __init__(self, every_n_steps: int = 200, num_samples: int = 3, max_new_tokens: int = 32) -> None:
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self.max_new_tokens = max_new_tokens
        self.last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        step = trainer.global_step
        if not self.every_n_steps or step == self.last_step or step % self.every_n_steps:
            return
        self.last_step = step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        try:
            self._sample(trainer, module, data.val or data.train)
        except SAMPLE_ERRORS as error:  # training itself reports or skips bad samples
            logger.warning("No answers were sampled at step %s: %s", step, error)

    def _sample(self, trainer: Trainer, module: LightningModule, samples: Any) -> None:
        conversations = [samples[i].conversations[0] for i in range(min(self.num_samples, len(samples)))]
        if not conversations:
            return
        was_training = module.training
        module.eval()
        try:
            answers = module.model.generate(  # type: ignore[union-attr, operator]
                [messages[:-1] for messages in conversations], max_new_tokens=self.max_new_tokens
            )
        finally:
            module.train(was_training)  # also after a bad sample
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "answers.jsonl").open("a", encoding="utf-8") as file:
                for messages, answer in zip(conversations, answers, strict=True):
                    row = {
                        "step": trainer.global_step,
                        "question": text_of(messages[-2]["content"]),
                        "answer": answer,
                        "expected": text_of(messages[-1]["content"]),
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


class GracefulShutdown(Callback):
    """Saves a checkpoint when a run is stopped by Ctrl-C, by SIGTERM from a scheduler, or by a bad loss.

    After the first signal all processes finish the same step and stop. A second signal stops at once.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self._install_handlers(module)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._install_handlers(module)  # Lightning installs its own after on_fit_start

    def _install_handlers(self, module: Any) -> None:
        def request_stop(*_: Any) -> None:
            if module.stop_requested:
                raise KeyboardInterrupt
            module.stop_requested = True
            print(
                "\nStopping after this step; a checkpoint will be saved. Press Ctrl-C again to stop at once.",
                flush=True,
            )

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, request_stop)
                self._previous_handlers.setdefault(number, previous)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if module.stop_agreed:
            self._save(trainer)
            trainer.limit_val_batches = 0  # do not make the user wait for a validation
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if isinstance(exception, BadLoss) and trainer.global_step:
            # Resuming must continue after the bad batch, so a checkpoint from before it is overwritten.
            trainer.fit_loop.epoch_loop.batch_progress.increment_processed()
            self._save(trainer, overwrite=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _save(self, trainer: Trainer, overwrite: bool = False) -> None:
        self.stopped = True
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        for callback in callbacks:
            callback.save(trainer, overwrite)
        if not callbacks:
            folder = Path(trainer.default_root_dir) / CHECKPOINTS
            trainer.save_checkpoint(folder / f"step={trainer.global_step}")
        if trainer.is_global_zero:
            print(
                f"\nStopped after step {trainer.global_step}. "
                "To resume, run the same command with --ckpt_path=last"
            )


class LossPlot(Callback):
    """Draws the training loss to `loss.png` when a run ends, also when it ends with an error."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.callback_metrics.get("loss")
        if loss is not None:
            self.losses.append((trainer.global_step, float(loss)))

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, to continue the curve after resuming."""
        return {"losses": [[step, loss] for step, loss in self.losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the losses."""
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.losses and trainer.is_global_zero:
            draw_loss(self.losses, Path(trainer.default_root_dir) / "loss.png")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # a full disk, for example; it would hide the original error
            self.on_fit_end(trainer, module)


def print_parts(model: Any) -> None:
    """Print a table of the model's parts: parameters, precision, whether trained, memory.

    Memory is that of weights, gradients and AdamW's two moments.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ASCII2)
    for column in ("part", "parameters", "precision", "state", "memory"):
        table.add_column(column, justify="right" if column in ("parameters", "memory") else "left")
    for name, named_parameters in model.parts().items():
        if "." in name and name not in model.trained:
            continue
        parameters = list(named_parameters.values())
        trained = [p for p in parameters if p.requires_grad]
        num_bytes = sum(p.nbytes for p in parameters) + 3 * sum(p.nbytes for p in trained)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        state = "trained" if len(trained) == len(parameters) else "partly trained" if trained else "frozen"
        count = sum(p.numel() for p in parameters)
        table.add_row(name, f"{count:,}", ", ".join(dtypes), state, f"{num_bytes / 1e6:,.1f} MB")
    Console(width=100).print(table)
