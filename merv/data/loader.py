"""Loader: batches for training, prepared by worker processes, with a resumable position in the epoch.

The position counts the batches that were handed out, not those that workers have prefetched. A run that
resumes from a saved state continues with the next batch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from merv.data.order import FRAMES, QUESTIONS, EpochOrder
from merv.data.samples import Conversation, Group, Part, Sample
from merv.errors import DataError, PromptError, SamplingError, ShapeError, VideoError
from merv.features.reader import LoadedVideo, Reader
from merv.models.chat_template import ChatTemplate
from merv.utils.distributed import gathered
from merv.utils.private import shut_down_workers
from merv.video.reader import reason_of

SAMPLE_ERRORS = (
    VideoError,
    SamplingError,
    ShapeError,
    PromptError,
    DataError,
)  # errors that one sample causes
OnError = Literal["raise", "skip"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples that one process trains on in one step.

    Args:
        groups: For each sample, its conversations, with each video as a `LoadedVideo` (or unread, if the
            BatchReader has no reader).
        kinds: For each sample, the kinds of its conversations.
        origins: For each sample, where its row is.
        skipped: Origin and reason of each sample that could not be used. Such samples are not replaced, so a
            batch may have fewer groups than `batch_size`, or none.
    """

    groups: list[Group]
    kinds: list[tuple[str, ...]]
    origins: list[str]
    skipped: list[tuple[str, str]]


class BatchReader(Dataset):
    """Reads batches; each worker has a copy. `batch_reader[epoch, indices]` is a Batch.

    Args:
        samples: The samples that indices refer to.
        reader: Reads the videos; None leaves them unread.
        max_questions: Maximum number of conversations that are drawn from each sample. Every epoch draws
            different ones and, with `segment` frame sampling and no feature store, different frames. None:
            all conversations in order, and the same frames in every epoch.
        seed: Seed of these random choices.
        chat: The model's chat template. A conversation that it rejects is a bad sample.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: Reader | None,
        max_questions: int | None = None,
        seed: int = 0,
        chat: ChatTemplate | None = None,
    ) -> None:
        self.samples, self.reader, self.max_questions, self.seed = samples, reader, max_questions, seed
        self.chat = chat

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Batch:
        epoch, indices = key
        return self.batch(((index, partial(self.samples.__getitem__, index)) for index in indices), epoch)

    def batch(self, samples: Iterable[tuple[int, Callable[[], Sample]]], epoch: int) -> Batch:
        """Read a batch.

        Args:
            samples: For each sample, its index, and a function that returns it or raises its error.
            epoch: The epoch, for random choices.

        Returns:
            The batch. Samples that cannot be used are in `skipped`; none of SAMPLE_ERRORS is raised.
        """
        batch = Batch([], [], [], [])
        loaded: dict[Any, LoadedVideo | Exception] = {}  # so that each video is read once
        for index, parse in samples:
            origin = ""
            try:
                sample = parse()
                origin = sample.origin
                chosen = self._choose_conversations(len(sample.conversations), epoch, index)
                seed = self._frame_seed(epoch, index)
                if self.chat is not None:
                    for i in chosen:
                        self.chat.training_prompts(sample.conversations[i])  # or PromptError
                group = [self._read(sample.conversations[i], loaded, seed) for i in chosen]
            except SAMPLE_ERRORS as error:
                if origin:
                    batch.skipped.append((origin, f"{type(error).__name__}: {reason_of(error)}"))
                else:  # the row is malformed, and the message starts with its origin
                    origin, _, reason = str(error).partition(": ")
                    batch.skipped.append((origin, reason))
                continue
            batch.groups.append(group)
            batch.kinds.append(tuple(sample.kinds[i] for i in chosen))
            batch.origins.append(origin)
        return batch

    def _choose_conversations(self, count: int, epoch: int, index: int) -> list[int]:
        if self.max_questions is None:
            return list(range(count))
        random = np.random.default_rng([self.seed, epoch, QUESTIONS, index])
        return random.permutation(count)[: self.max_questions].tolist()

    def _frame_seed(self, epoch: int, index: int) -> int:
        """Return the seed for randomly drawn frames. It depends only on `seed`, the epoch and the index."""
        epoch = 0 if self.max_questions is None else epoch
        return int(np.random.default_rng([self.seed, epoch, FRAMES, index]).integers(2**32))

    def _read(
        self, conversation: Conversation, loaded: dict[Any, LoadedVideo | Exception], seed: int
    ) -> Conversation:
        """Return the conversation with its videos read."""
        if self.reader is None:
            return conversation
        return [
            turn
            if isinstance(turn["content"], str)
            else {**turn, "content": [self._read_part(part, loaded, seed) for part in turn["content"]]}
            for turn in conversation
        ]

    def _read_part(self, part: Part, loaded: dict[Any, LoadedVideo | Exception], seed: int) -> Part:
        if part["type"] == "text":
            return part
        video = part[part["type"]]
        key = video if isinstance(video, Hashable) else id(video)
        if key not in loaded:
            assert self.reader is not None
            try:
                loaded[key] = self.reader(video, seed)
            except SAMPLE_ERRORS as error:
                loaded[key] = error
        result = loaded[key]
        if isinstance(result, Exception):
            raise result
        return {**part, part["type"]: result}


def bad_sample(origin: str, reason: str) -> DataError:
    """Return the error that ends a run at a bad sample."""
    return DataError(
        f"{origin}: {reason} To train without such samples, set data.on_error to skip. `merv data check "
        "--media decode` finds most of them before a run."
    )


class BadSamplePolicy:
    """Decides about samples that cannot be used: stop the run, or log them up to a limit.

    Args:
        on_error: "raise" or "skip".
        max_skipped: Number of distinct samples that may be skipped.
        folder: Skipped samples are appended to `skipped.jsonl` in this folder.
    """

    def __init__(
        self, on_error: OnError = "raise", max_skipped: int = 0, folder: str | Path | None = None
    ) -> None:
        self.on_error, self.max_skipped, self.folder = on_error, max_skipped, folder
        self.reasons: dict[str, str] = {}  # by origin of a skipped sample

    def check(self, batch: Batch) -> None:
        """Log the skipped samples of a batch; raise DataError if they may not be skipped."""
        for origin, reason in batch.skipped:
            if self.on_error == "raise":
                raise bad_sample(origin, reason)
            if origin not in self.reasons:
                self.reasons[origin] = reason
                self._log(origin, reason)
        if len(self.reasons) > self.max_skipped:
            raise DataError(
                f"{len(self.reasons)} samples could not be used, but data.max_skipped is {self.max_skipped}. "
                f"The last one: {next(reversed(self.reasons))}: {next(reversed(self.reasons.values()))} "
                "Fix them (`merv data check --media decode` finds most of them), or increase "
                "data.max_skipped."
            )

    def _log(self, origin: str, reason: str) -> None:
        logger.warning("Skipped %s: %s", origin, reason)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with open(Path(self.folder, "skipped.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps({"origin": origin, "reason": reason}, ensure_ascii=False) + "\n")


class Loader:
    """Iterates over the batches of one process, one epoch at a time, and can be resumed at any batch.

    Each iteration starts the next epoch, or the saved position after `load_state_dict`. It is not a torch
    DataLoader, so Lightning does not replace its sampler for several processes.

    Args:
        dataset: The dataset whose items are batches, such as a BatchReader.
        order: The order of samples.
        rank: Rank of this process among the `world_size` processes of `order`.
        num_workers: Processes that prepare batches ahead, one thread each; 0: this process prepares them.
        policy: What to do about samples that cannot be used; by default, stop at the first one.
        limit: Returns how many batches of an epoch are used; None: all.
        epoch: The first epoch.
        content: Hash of the data files, by which `load_state_dict` notices that they have changed.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: EpochOrder,
        *,
        rank: int = 0,
        num_workers: int = 0,
        policy: BadSamplePolicy | None = None,
        limit: Callable[[], float] | None = None,
        epoch: int = 0,
        content: str = "",
    ) -> None:
        self.order, self.rank, self.num_workers, self.limit = order, rank, num_workers, limit
        self.policy = policy or BadSamplePolicy()
        self.content = content
        self.epoch, self.position = epoch, 0  # epoch of the next batch, and its index there
        self.started = False  # whether iteration over `epoch` has started
        self.keys: list[tuple[int, list[int]]] = []  # of the epoch's remaining batches
        self.loader: DataLoader = DataLoader(
            dataset,
            sampler=None if isinstance(dataset, IterableDataset) else self.keys,
            batch_size=None,  # an item is a whole batch
            collate_fn=_identity,
            worker_init_fn=_detach_from_terminal,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=1 if num_workers else None,  # only one, because batches of frames are large
            generator=torch.Generator(),  # an epoch must not advance the global random state
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing happens before the first `next`, because Lightning may call `iter` twice
        if self.started:
            self.epoch, self.position = self.epoch + 1, 0
        self.started = True
        for batch in self.batches():
            self.policy.check(batch)
            self.position += 1
            yield batch

    def batches(self) -> Iterator[Batch]:
        """Return the batches of the epoch from the position on."""
        rest = self.order.batches(self.epoch, self.rank)[self.position :]
        self.keys[:] = [(self.epoch, indices.tolist()) for indices in rest]
        return iter(self.loader)

    def close(self) -> None:
        """Stop the workers at once. Garbage collection would take up to five seconds for each."""
        shut_down_workers(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch; all processes have to call this together.

        The state has plain values and is the same in all processes.
        """
        at_end = self.position >= min(len(self), self.limit() if self.limit else len(self))
        epoch, position = (self.epoch + 1, 0) if at_end else (self.epoch, self.position)
        skipped = dict(gathered((self.rank, [list(item) for item in self.policy.reasons.items()])))
        return {"epoch": epoch, "position": position, "order": self.order_fingerprint(), "skipped": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position at which the next `iter` starts; raises DataError if the order has changed."""
        saved, current = state["order"], self.order_fingerprint()
        changes = [
            f"{'content hash' if name == 'content' else name} was {saved.get(name)} and is now {value}"
            for name, value in current.items()
            if saved.get(name) != value
        ]
        if changes:
            raise DataError(
                f"Cannot resume: the data order has changed: {'; '.join(changes)}. Resume with the same data "
                "and options, or start a new run from the trained model with --model.init_from."
            )
        self.epoch, self.position, self.started = state["epoch"], state["position"], False
        self.policy.reasons = dict(state["skipped"][self.rank])

    def order_fingerprint(self) -> dict[str, Any]:
        """Return everything that the order of samples depends on."""
        order = self.order
        return {
            "samples": list(order.sizes),
            "content": self.content,
            "weights": None if order.weights is None else list(order.weights),
            "batch_size": order.batch_size,
            "processes": order.world_size,
            "seed": order.seed,
            "group_by_length": order.modalities is not None,
        }


def _identity(batch: Any) -> Any:
    return batch


def _detach_from_terminal(_: int) -> None:
    """Keep Ctrl-C and `timeout` from stopping a worker: the run still has to finish its step and save.

    A terminal sends a signal to a whole process group, so each worker gets a group of its own. SIGTERM keeps
    its default action, so that the run can stop its workers.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
