"""Stream loader: batches from a dataset that is read in passes and never held in memory.

Each worker of each process reads its own shard of the stream. It fills a buffer, shuffles it, and splits it
into batches; at the end of the shard it starts the next pass. The state of a shard is where the current
buffer starts in the stream and how much of the buffer was used, so resuming loses and repeats nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from merv.data.loader import Batch, BatchReader, Loader
from merv.data.order import STREAM, EpochOrder
from merv.data.sources import SampleStream
from merv.errors import DataError
from merv.utils.distributed import gathered


class StreamReader(IterableDataset):
    """An endless iterable of (batch, number of the shard, state of the shard after the batch).

    Args:
        stream: The whole stream.
        reader: Reads the batches.
        batch_size: Samples in a batch.
        shuffle_buffer_size: Samples that are shuffled together.
        rank: Rank of this process.
        world_size: Number of processes that share the stream.
    """

    def __init__(
        self,
        stream: SampleStream,
        reader: BatchReader,
        batch_size: int,
        shuffle_buffer_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.stream, self.reader, self.batch_size = stream, reader, batch_size
        # A multiple of batch_size: otherwise each buffer would end with a short batch
        self.shuffle_buffer_size = math.ceil(shuffle_buffer_size / batch_size) * batch_size
        self.rank, self.world_size = rank, world_size
        self.states: dict[int, dict[str, Any]] = {}  # of this process's shards, from which to continue
        self.first_shard = 0  # the shard of worker 0, whose batch comes first

    def __iter__(self) -> Iterator[tuple[Batch, int, dict[str, Any]]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        local_shard = (worker + self.first_shard) % num_workers
        shard, num_shards = self.rank * num_workers + local_shard, self.world_size * num_workers
        state = self.states.get(local_shard) or _start_of_pass(0)
        while True:
            stream = self.stream.shard(shard, num_shards)
            if state["stream"] is not None:
                stream.load_state_dict(state["stream"])
            is_empty = state["stream"] is None  # a resumed pass may have no batches left
            for batch, state in self._one_pass(stream, state, shard, num_shards):  # noqa: B020 — used after the loop
                is_empty = False
                yield batch, local_shard, state
            if is_empty:
                raise DataError(
                    f"Shard {shard} of {num_shards} of {self.stream.name} has no samples; expected at least "
                    "one for each worker of each process. Set a smaller data.num_workers."
                )
            state = _start_of_pass(state["pass_index"] + 1)

    def _one_pass(
        self, stream: SampleStream, state: dict[str, Any], shard: int, num_shards: int
    ) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield the batches from the state to the end of the shard, each with the state after it."""
        pass_index, num_buffers = state["pass_index"], state["num_buffers"]
        used, buffer_start = state["used"], state["stream"]
        size = self.shuffle_buffer_size
        rows = stream.unparsed()
        while buffer := list(islice(rows, size)):
            seed = [self.reader.seed, pass_index, STREAM, shard, num_buffers]
            order = np.random.default_rng(seed).permutation(len(buffer))
            for start in range(used, len(buffer), self.batch_size):
                chosen = order[start : start + self.batch_size].tolist()
                samples = ((num_shards * (num_buffers * size + i) + shard, buffer[i]) for i in chosen)
                batch = self.reader.batch(samples, pass_index)
                yield (
                    batch,
                    {
                        "pass_index": pass_index,
                        "num_buffers": num_buffers,
                        "used": start + len(chosen),
                        "stream": buffer_start,
                    },
                )
            num_buffers, used, buffer_start = num_buffers + 1, 0, stream.state_dict()


def _start_of_pass(pass_index: int) -> dict[str, Any]:
    return {"pass_index": pass_index, "num_buffers": 0, "used": 0, "stream": None}


class StreamLoader(Loader):
    """A `Loader` over a stream, in epochs of `batches_per_epoch` batches.

    Resuming needs the same number of processes and workers.

    Args:
        reader: Reads the stream.
        batches_per_epoch: Number of batches of this process in an epoch.
        **options: Options of `Loader`, except `rank`.
    """

    def __init__(self, reader: StreamReader, *, batches_per_epoch: int, **options: Any) -> None:
        samples = batches_per_epoch * reader.batch_size
        order = EpochOrder([samples], reader.batch_size, seed=reader.reader.seed)
        super().__init__(reader, order, rank=reader.rank, **options)
        self.reader = reader
        self.next_shard = 0  # the shard that the next batch comes from
        self.iterator: Iterator[Any] | None = None  # continues across epochs

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that remain in the epoch."""
        if self.iterator is None:
            self.iterator = iter(self.loader)
        while self.position < len(self):
            batch, shard, state = next(self.iterator)
            self.reader.states[shard] = state
            self.next_shard = (shard + 1) % max(self.num_workers, 1)
            yield batch

    def close(self) -> None:
        """Stop the workers."""
        super().close()
        self.iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the states of all shards; all processes have to call this together."""
        states = dict(gathered((self.rank, self.reader.states)))
        return {**super().state_dict(), "shard_states": states, "next_shard": self.next_shard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position at which the next `iter` starts; raises DataError if the order has changed."""
        super().load_state_dict(state)
        self.reader.states = dict(state["shard_states"][self.rank])
        self.next_shard = self.reader.first_shard = state["next_shard"]
        self.iterator = None

    def order_fingerprint(self) -> dict[str, Any]:
        """Return everything that the order of samples depends on."""
        reader = self.reader
        return {
            "batch_size": reader.batch_size,
            "shuffle_buffer_size": reader.shuffle_buffer_size,
            "processes": reader.world_size,
            "num_workers": self.num_workers,
            "seed": self.order.seed,
            "batches_per_epoch": len(self),
        }
