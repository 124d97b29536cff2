"""Loader: batches for training, made by worker processes, that know their place in the epoch.

The place counts batches that were handed out, not those that workers have ready. Saved after a step
and loaded again, it goes on with the batch after it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from merv.data.order import EpochOrder
from merv.data.samples import Group, Sample
from merv.errors import DataError, PromptError, SamplingError, ShapeError, VideoError
from merv.features.reader import LoadedVideo, Reader
from merv.models.chat import render
from merv.utils.distributed import gathered

# What a sample can be at fault for.
SAMPLE_ERRORS = (VideoError, SamplingError, ShapeError, PromptError, DataError)
OnError = Literal["raise", "skip"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one process trains on at once.

    groups: conversations that share their videos, these as `LoadedVideo` (as they came,
        without a reader). kinds, origins: of each group, the kinds of its conversations; its row.
    skipped: origin and reason of each sample that could not be used; nothing stands in for it, so that
        a batch may have fewer groups than asked for, or none.
    """

    groups: list[Group]
    kinds: list[tuple[str, ...]]
    origins: list[str]
    skipped: list[tuple[str, str]]


class BatchReader(Dataset):
    """Makes batches of samples; what workers get a copy of. `reader[epoch, numbers]` is a Batch.

    questions: at most so many conversations of a sample, drawn anew in each epoch, as are the frames of
        `segment` sampling; None: all, in order, and the frames the same in each epoch.
    tokenizer: the language model's; a conversation that its chat template rejects is bad.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reader: Reader | None,
        questions: int | None = None,
        seed: int = 0,
        tokenizer: Any = None,
    ) -> None:
        self.samples, self.reader, self.questions, self.seed = samples, reader, questions, seed
        self.tokenizer = tokenizer

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Batch:
        epoch, numbers = key
        return self.batch(((n, lambda n=n: self.samples[n]) for n in numbers), epoch)  # type: ignore[misc]

    def batch(self, found: Any, epoch: int) -> Batch:
        """A batch of samples: pairs of a number and what gives the sample, or raises what is wrong."""
        batch = Batch([], [], [], [])
        loaded: dict[Any, LoadedVideo | Exception] = {}  # each video is read once
        for number, sample_of in found:
            origin = ""
            try:
                sample = sample_of()
                origin = sample.origin
                chosen = self._drawn(len(sample.conversations), epoch, number)
                seed = self._seed(epoch, number)
                for i in chosen if self.tokenizer is not None else ():
                    render(sample.conversations[i], self.tokenizer)
                group = [self._read(sample.conversations[i], loaded, seed) for i in chosen]
            except SAMPLE_ERRORS as error:
                # What is wrong with a row begins with its origin
                origin, reason = (origin, f"{type(error).__name__}: {error}") if origin else _split(error)
                batch.skipped.append((origin, reason))
                continue
            batch.groups.append(group)
            batch.kinds.append(tuple(sample.kinds[i] for i in chosen))
            batch.origins.append(origin)
        return batch

    def _drawn(self, conversations: int, epoch: int, number: int) -> list[int]:
        if self.questions is None:
            return list(range(conversations))
        random = np.random.default_rng([self.seed, epoch, 3, number])
        return random.permutation(conversations)[: self.questions].tolist()

    def _seed(self, epoch: int, number: int) -> int:
        """Of the frames that are drawn; a function of the same things as the order, so that runs repeat."""
        when = 0 if self.questions is None else epoch
        return int(np.random.default_rng([self.seed, when, 5, number]).integers(2**32))

    def _read(
        self, talk: list[dict[str, Any]], loaded: dict[Any, LoadedVideo | Exception], seed: int
    ) -> list[dict[str, Any]]:
        """The conversation with its videos read."""
        if self.reader is None:
            return talk
        return [
            turn
            if isinstance(turn["content"], str)
            else {**turn, "content": [self._read_part(part, loaded, seed) for part in turn["content"]]}
            for turn in talk
        ]

    def _read_part(
        self, part: dict[str, Any], loaded: dict[Any, LoadedVideo | Exception], seed: int
    ) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        video = part[part["type"]]
        name = video if isinstance(video, Hashable) else id(video)
        if name not in loaded:
            assert self.reader is not None
            try:
                loaded[name] = self.reader(video, seed)
            except SAMPLE_ERRORS as error:
                loaded[name] = error
        result = loaded[name]
        if isinstance(result, Exception):
            raise result
        return {**part, part["type"]: result}


def bad_sample(origin: str, reason: str) -> DataError:
    """What ends a run where bad samples are not skipped."""
    return DataError(
        f"{origin}: {reason} To pass over such samples, set data.on_error to skip; `merv data check` finds "
        "them all."
    )


class BadSamplePolicy:
    """What to do about samples that cannot be used: stop at once, or note them, up to a limit.

    most: so many distinct samples may be skipped. folder: `skipped.jsonl` in it gets a line for each.
    """

    def __init__(self, on_error: OnError = "raise", most: int = 0, folder: str | Path | None = None) -> None:
        self.on_error, self.most, self.folder = on_error, most, folder
        self.reasons: dict[str, str] = {}

    def see(self, batch: Batch) -> None:
        """Raises DataError for the first bad sample, or for the one that is too many."""
        for origin, reason in batch.skipped:
            if self.on_error == "raise":
                raise bad_sample(origin, reason)
            if origin not in self.reasons:
                self.reasons[origin] = reason
                self._note(origin, reason)
        if len(self.reasons) > self.most:
            raise DataError(
                f"{len(self.reasons)} samples could not be used; data.max_skipped is {self.most}. The last: "
                f"{next(reversed(self.reasons))}: {next(reversed(self.reasons.values()))}"
            )

    def _note(self, origin: str, reason: str) -> None:
        logger.warning("Skipped %s: %s", origin, reason)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with open(Path(self.folder, "skipped.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps({"origin": origin, "reason": reason}, ensure_ascii=False) + "\n")


class Loader:
    """Iterates over the batches of one process, an epoch at a time, and keeps its place.

    order: which samples when; process: whose batches. workers: processes that make them ahead of time,
        each on one thread; 0: made when they are asked for, in this one. limit: how many batches of an
        epoch are used, if not all. epoch: the first. content: a hash of the samples' files.

    `state_dict` is the same in all processes, which call it together. Iterating anew begins the next
    epoch, or, after `load_state_dict`, goes on where the state was saved.

    It is no torch DataLoader on purpose: nothing that wraps those (in a sampler for several
    processes, say) has to be told to leave it alone.
    """

    def __init__(
        self,
        batches: Dataset,
        order: EpochOrder,
        *,
        process: int = 0,
        workers: int = 0,
        skips: BadSamplePolicy | None = None,
        limit: Callable[[], float] | None = None,
        epoch: int = 0,
        content: str = "",
    ) -> None:
        self.content = content
        self.order, self.process, self.skips, self.limit = order, process, skips or BadSamplePolicy(), limit
        self.epoch, self.position = epoch, 0  # of the next batch
        self.begun = False  # whether `epoch` is
        self.wanted: list[tuple[int, list[int]]] = []  # what its torch loader has to do next
        self.workers = workers
        self.loader: DataLoader = DataLoader(
            batches,
            sampler=None if isinstance(batches, IterableDataset) else self.wanted,
            batch_size=None,  # what is made is whole batches
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_run,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=1 if workers else None,  # a batch of frames is large
            generator=torch.Generator(),  # not the global one: a resumed run draws what the whole would
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        """All of this runs at the first `next`: Lightning calls `iter` more often than it means it."""
        if self.begun:
            self.epoch, self.position = self.epoch + 1, 0
        self.begun = True
        for batch in self.batches():
            self.skips.see(batch)
            self.position += 1
            yield batch

    def batches(self) -> Iterator[Batch]:
        """Those of the epoch from its position on."""
        rest = self.order.batches(self.epoch, self.process)[self.position :]
        self.wanted[:] = [(self.epoch, numbers.tolist()) for numbers in rest]
        return iter(self.loader)

    def close(self) -> None:
        """End the workers. Left to the garbage collection they may take five seconds each."""
        running: Any = self.loader._iterator  # as Lightning does it for torch's own loaders
        if self.workers and running is not None:
            running._shutdown_workers()
        self.loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """The place of the batch that comes next, and what it is a place in; plain values."""
        at_end = self.position >= min(len(self), self.limit() if self.limit else len(self))
        epoch, position = (self.epoch + 1, 0) if at_end else (self.epoch, self.position)
        skipped = dict(gathered((self.process, [list(each) for each in self.skips.reasons.items()])))
        return {"epoch": epoch, "position": position, "of": self.order_fingerprint(), "skipped": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there at the next `iter`.

        Raises DataError where the order is another than that of the state.
        """
        was, now = state["of"], self.order_fingerprint()
        differ = [
            f"{name} was {was.get(name)} and is {now[name]}" for name in now if was.get(name) != now[name]
        ]
        if differ:
            raise DataError(
                f"Cannot resume: the data order has changed: {'; '.join(differ)}. Resume with "
                "the same data and options, or begin a new run with what was trained."
            )
        self.epoch, self.position, self.begun = state["epoch"], state["position"], False
        self.skips.reasons = dict(state["skipped"][self.process])

    def order_fingerprint(self) -> dict[str, Any]:
        """What the order depends on."""
        order = self.order
        return {
            "samples": list(order.sizes),
            "content": self.content,
            "weights": None if order.weights is None else list(order.weights),
            "batch_size": order.batch_size,
            "processes": order.processes,
            "seed": order.seed,
            "group_by_length": order.kinds is not None,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(_: int) -> None:
    """A terminal and `timeout` signal a group of processes: the run needs its workers to end a step and save.

    SIGTERM alone still ends a worker, or the run could not end it when it exits.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _split(error: Exception) -> tuple[str, str]:
    """What a DataError about a row says: origin, reason."""
    origin, _, reason = str(error).partition(": ")
    return origin, reason
