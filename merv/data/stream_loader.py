"""Stream loader: batches from a dataset that is read once through, and nowhere held whole.

Each worker of each process reads its own part of the stream, block by block; a block is shuffled
and cut into batches. At the end of its part it begins again. The place in a stream is the place of the
block and how much of it was used, so nothing is lost or repeated by stopping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from merv.data.loader import Batch, BatchReader, Loader
from merv.data.order import EpochOrder
from merv.data.samples import Sample
from merv.data.sources import SampleStream
from merv.errors import DataError
from merv.utils.distributed import gathered


class StreamReader(IterableDataset):
    """What workers get: an endless iterable of (batch, number of the part, its state after the batch).

    block: samples that are shuffled together. process, processes: whose parts. states: of the parts, to go
        on from. first: the part whose turn it is.
    """

    def __init__(
        self,
        stream: SampleStream,
        reader: BatchReader,
        batch_size: int,
        block: int,
        process: int,
        processes: int,
    ) -> None:
        self.stream, self.reader, self.batch_size = stream, reader, batch_size
        self.block = math.ceil(block / batch_size) * batch_size  # else each block would end in a short batch
        self.process, self.processes = process, processes
        self.states: dict[int, dict[str, Any]] = {}
        self.first = 0

    def __iter__(self) -> Iterator[tuple[Batch, int, dict[str, Any]]]:
        about = get_worker_info()
        worker, workers = (about.id, about.num_workers) if about else (0, 1)
        own = (worker + self.first) % workers
        part, parts = self.process * workers + own, self.processes * workers
        state = self.states.get(own) or {"turn": 0, "blocks": 0, "used": 0, "stream": None}
        while True:
            stream = self.stream.part(part, parts)
            if state["stream"] is not None:
                stream.load_state_dict(state["stream"])
            empty = state["stream"] is None
            for batch, state in self._turn(stream, state, part, parts):  # noqa: B020 — it goes on from there
                empty = False
                yield batch, own, state
            if empty:
                raise DataError(f"Part {part} of {parts} of the stream has no samples: use fewer workers.")
            state = {"turn": state["turn"] + 1, "blocks": 0, "used": 0, "stream": None}

    def _turn(
        self, stream: SampleStream, state: dict[str, Any], part: int, parts: int
    ) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """The batches of the part from the state on, to its end; with the state after each."""
        turn, blocks, used, before = state["turn"], state["blocks"], state["used"], state["stream"]
        rows = _Rows(stream)
        while block := rows.take(self.block):
            order = np.random.default_rng([self.reader.seed, turn, 4, part, blocks]).permutation(len(block))
            for start in range(used, len(block), self.batch_size):
                chosen = order[start : start + self.batch_size].tolist()
                found = ((parts * (blocks * self.block + i) + part, block[i]) for i in chosen)
                batch = self.reader.batch(found, turn)
                yield batch, {"turn": turn, "blocks": blocks, "used": start + len(chosen), "stream": before}
            blocks, used, before = blocks + 1, 0, stream.state_dict()


class StreamLoader(Loader):
    """A `Loader` over a stream. An epoch is `length` batches, as a stream does not know its own length.

    Resuming wants the same number of processes and workers.
    """

    def __init__(self, reader: StreamReader, *, length: int, **options: Any) -> None:
        order = EpochOrder([length * reader.batch_size], reader.batch_size, seed=reader.reader.seed)
        super().__init__(reader, order, process=reader.process, **options)
        self.reader = reader
        self.part = 0  # whose turn it is
        self.running: Iterator[Any] | None = None

    def batches(self) -> Iterator[Batch]:
        """The next ones, as many as the epoch has left."""
        if self.running is None:
            self.running = iter(self.loader)
        while self.position < len(self):
            batch, part, state = next(self.running)
            self.reader.states[part] = state
            self.part = (part + 1) % max(self.workers, 1)
            yield batch

    def close(self) -> None:
        """End the workers."""
        super().close()
        self.running = None

    def state_dict(self) -> dict[str, Any]:
        """Also the states of all parts of the stream: all processes have to call it together."""
        states = dict(gathered((self.process, self.reader.states)))
        return {**super().state_dict(), "streams": states, "part": self.part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there at the next `iter`."""
        super().load_state_dict(state)
        self.reader.states = dict(state["streams"][self.process])
        self.part = self.reader.first = state["part"]
        self.running = None

    def order_fingerprint(self) -> dict[str, Any]:
        """What the order depends on."""
        reader = self.reader
        return {
            "batch_size": reader.batch_size,
            "shuffle_buffer_size": reader.block,
            "processes": reader.processes,
            "num_workers": self.workers,
            "seed": self.order.seed,
            "batches_per_epoch": len(self),
        }


class _Rows:
    """The samples of a stream, each as what gives it or raises what is wrong with it."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream, self.rows = stream, iter(stream)

    def take(self, most: int) -> list[_Deferred]:
        """The next ones, up to so many."""
        block: list[_Deferred] = []
        while len(block) < most:
            try:
                block.append(_Deferred(next(self.rows)))
            except StopIteration:
                break
            except DataError as error:
                block.append(_Deferred(error))
                self.stream.load_state_dict(self.stream.state_dict())  # the iterator ended with its error
                self.rows = iter(self.stream)
        return block


class _Deferred:
    """`given()` is the sample, or raises the error, that it was made with."""

    def __init__(self, what: Sample | DataError) -> None:
        self.what = what

    def __call__(self) -> Sample:
        if isinstance(self.what, DataError):
            raise self.what
        return self.what
