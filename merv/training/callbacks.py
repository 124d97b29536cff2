"""Watch: what a run tells of itself while it trains."""

from __future__ import annotations

import json
import logging
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
from merv.errors import BadLoss
from merv.training.checkpointing import CHECKPOINTS, Checkpoints
from merv.utils.plot import draw_loss

log = logging.getLogger(__name__)

PAST = 100  # losses that a spike is held against


class LossMonitor:
    """Sees every loss and tells where one is not to be learned from: not a number, or a spike.

    spike: how many times the largest of the last hundred, and above 1; None: any finite loss is good.

    >>> monitor = LossMonitor(spike=5)
    >>> monitor.see(torch.tensor(float("nan")), 12, ["train.jsonl:7"])
    >>> monitor.alarms(), monitor.report()
    (1, 'The loss is nan in the batch of train.jsonl:7. Nothing was learned from it.')
    """

    def __init__(self, spike: float | None) -> None:
        self.spike = spike
        self.past: deque[float] = deque(maxlen=PAST)
        self.seen: list[tuple[Tensor, Sequence[str]]] = []
        self.latest: list[str] = []
        self.bad: list[tuple[float, Sequence[str]]] = []

    def see(self, loss: Tensor, tokens: int, origins: Sequence[str]) -> None:
        """Remember a mean loss and whose it is."""
        if tokens:
            self.seen.append((loss, origins))

    def alarms(self) -> int:
        """How many losses since the last call are bad; this waits for the device, once a step."""
        self.latest = [origin for _, origins in self.seen for origin in origins]
        for loss, origins in self.seen:
            value = float(loss)
            known = self.spike is not None and len(self.past) == PAST
            high = known and value > max(1.0, self.spike * max(self.past))  # type: ignore[operator]
            if high or value != value or value in (float("inf"), float("-inf")):
                self.bad.append((value, origins))
            else:
                self.past.append(value)
        self.seen.clear()
        return len(self.bad)

    def report(self) -> str:
        """Which losses were bad and what they were about."""
        if not self.bad:
            return (
                "A gradient has numbers that are none, or another process had a bad loss. Here the step was "
                f"made of {', '.join(self.latest)}. Nothing was learned from it."
            )
        said = [
            f"The loss is {value:.4g} in the batch of {', '.join(origins)}." for value, origins in self.bad
        ]
        return " ".join([*said, "Nothing was learned from it."])


class Throughput(Callback):
    """Answer tokens a second, share of the time spent waiting for data, memory, minutes left.

    In the progress bar and the logs: tokens/s, wait, GB, min_left. Over the last 20 steps.
    """

    def __init__(self) -> None:
        self.done = time.perf_counter()
        self.steps: deque[tuple[float, float, int]] = deque(maxlen=20)  # waited, took, tokens

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.done = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.done = time.perf_counter()  # it is no wait for data

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.perf_counter()
        tokens: Any = module.last_tokens
        self.steps.append((self.began - self.done, now - self.began, tokens))
        self.done = now
        waited, took, answered = (sum(column) for column in zip(*self.steps, strict=True))
        a_batch = (waited + took) / len(self.steps)
        pace = {"tokens/s": answered / (waited + took), "wait": waited / (waited + took), "GB": memory_gb()}
        steps = trainer.estimated_stepping_batches
        left = round((steps - trainer.global_step) * trainer.accumulate_grad_batches * a_batch / 60, 1)
        module.log_dict({**pace, "min_left": left}, prog_bar=True, batch_size=1)


def memory_gb() -> float:
    """Highest memory so far in GB: of the GPU, or else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class SampleAnswers(Callback):
    """Answers to the first `num_samples` questions, every `every_n_steps` steps: `answers.jsonl`.

    The questions are of the validation data where there are any, else of the training data. every_n_steps: 0
    is never.
    """

    def __init__(self, every_n_steps: int = 200, num_samples: int = 3, max_new_tokens: int = 32) -> None:
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self.max_new_tokens = max_new_tokens
        self.last = 0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        step = trainer.global_step
        if not self.every_n_steps or step == self.last or step % self.every_n_steps:
            return
        self.last = step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        try:
            self._ask(trainer, module, data.val or data.train)
        except SAMPLE_ERRORS as error:  # training tells about bad samples, or passes over them
            log.warning("No answers were sampled at step %s: %s", step, error)

    def _ask(self, trainer: Trainer, module: LightningModule, samples: Any) -> None:
        step = trainer.global_step
        talks = [samples[i].conversations[0] for i in range(min(self.num_samples, len(samples)))]
        if not talks:
            return
        was = module.training
        module.eval()
        try:
            said = module.model.generate(  # type: ignore[union-attr, operator]
                [talk[:-1] for talk in talks], max_new_tokens=self.max_new_tokens
            )
        finally:
            module.train(was)  # also where a sample is bad, or the rest would train in eval mode
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "answers.jsonl").open("a", encoding="utf-8") as file:
                for talk, answer in zip(talks, said, strict=True):
                    question = _words(talk[-2]["content"])
                    row = {
                        "step": step,
                        "question": question,
                        "answer": answer,
                        "right": _words(talk[-1]["content"]),
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


class GracefulShutdown(Callback):
    """Ctrl-C, a scheduler's SIGTERM, a bad loss: a checkpoint first, and how to go on.

    The first signal lets the step end, the same in all processes; the second does not wait.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self._listen(module)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._listen(module)  # in between, Lightning has set handlers of its own

    def _listen(self, module: Any) -> None:
        def request(*_: Any) -> None:
            if module.stop_requested:
                raise KeyboardInterrupt
            module.request_stop()
            print("\nStopping after this step, with a checkpoint. Once more to stop at once.", flush=True)

        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(which, request)
                self._before.setdefault(which, before)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if module.stop_agreed:
            self._save(trainer)
            trainer.limit_val_batches = 0  # who asked does not wait for a validation
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._put_back()
        if isinstance(exception, BadLoss) and trainer.global_step:
            trainer.fit_loop.epoch_loop.batch_progress.increment_processed()  # to go on behind its batch
            self._save(trainer, again=True)  # this step may be saved, with that batch to come

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        self._before = {}

    def _save(self, trainer: Trainer, again: bool = False) -> None:
        self.stopped = True
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        for callback in kept:
            callback.save(trainer, again)
        if not kept:
            folder = Path(trainer.default_root_dir) / CHECKPOINTS
            trainer.save_checkpoint(folder / f"step={trainer.global_step}")
        if trainer.is_global_zero:
            print(f"\nStopped after step {trainer.global_step}. To go on: the same with --ckpt_path=last")


class LossPlot(Callback):
    """Draw the training loss to `loss.png` beside the logs when a run ends, however it ends."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.callback_metrics.get("loss")
        if loss is not None:
            self.losses.append((trainer.global_step, float(loss)))

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, for a run that goes on."""
        return {"losses": [[step, loss] for step, loss in self.losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw on from there."""
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.losses and trainer.is_global_zero:
            draw_loss(self.losses, Path(trainer.default_root_dir) / "loss.png")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # of a full disk, say: that would hide what went wrong before
            self.on_fit_end(trainer, module)


def print_parts(model: Any) -> None:
    """A table of the parts: parameters, precision, trained or not, memory of weights, gradients, AdamW."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ASCII2)
    for column in ("part", "parameters", "precision", "state", "memory"):
        table.add_column(column, justify="right" if column in ("parameters", "memory") else "left")
    for name, parameters in model.parts().items():
        if "." in name and name not in model.trained:
            continue
        own = list(parameters.values())
        learns = [p for p in own if p.requires_grad]
        held = sum(p.numel() * p.element_size() for p in own)
        held += sum(3 * p.numel() * p.element_size() for p in learns)  # gradient, AdamW's two moments
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        state = "trained" if len(learns) == len(own) else "in part" if learns else "frozen"
        count = sum(p.numel() for p in own)
        table.add_row(name, f"{count:,}", ", ".join(kinds), state, f"{held / 1e6:,.1f} MB")
    Console(width=100).print(table)
