"""Batches: which samples come when, as a pure function of seed, epoch and number of processes.

An epoch is a row of steps. A step is what all processes train on at once: `batch_size` samples for each
of them, fewer in the last step. Its samples are dealt to the processes like cards, so that all have
equally many batches, of like length. Nothing is repeated or dropped: where a step has fewer samples
than there are processes, the last ones get an empty batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from merv.errors import DataError

Indices = NDArray[np.int64]
KINDS = ("video", "image", "text")  # of a sample, by what is most work in it
MEGABATCH_STEPS = 50  # steps whose samples are sorted by length together: more pad less and are less random


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The steps of every epoch.

    sizes: samples in each set; they are numbered through, the second set after the first.
    weights: how the sets are mixed, as proportions. An epoch is then as long as it can be without a
        sample that comes twice: one set is used whole, of the others each epoch has another part, and
        all parts once before one comes again. None: all of every set.
    shuffle: False keeps the order of the sets.
    kinds, lengths: of each sample, a number of KINDS and any measure of its length. With them a
        step is of one kind and of like lengths (the rest of each kind shares the last steps), and the longest
        step of each kind comes first, so that memory runs out at once or not at all.

    >>> order = EpochOrder([5], batch_size=2)
    >>> len(order), sorted(index for step in order.epoch(0) for index in step.tolist())
    (3, [0, 1, 2, 3, 4])

    Source: grouping by length within shuffled stretches is that of transformers' `group_by_length`; by kind,
    of LLaVA (arXiv 2304.08485).
    """

    sizes: Sequence[int]
    batch_size: int
    processes: int = 1
    seed: int = 0
    weights: Sequence[float] | None = None
    shuffle: bool = True
    kinds: NDArray[np.int8] | None = None
    lengths: Indices | None = None

    @property
    def step_size(self) -> int:
        """Samples in a step, over all processes."""
        return self.batch_size * self.processes

    @cached_property
    def portions(self) -> list[int]:
        """How many samples of each set an epoch has."""
        return portions(self.sizes, self.weights)

    def __len__(self) -> int:
        """Steps in an epoch, which are the batches of each process; the same in every epoch."""
        return math.ceil(sum(self.portions) / self.step_size)

    def epoch(self, epoch: int) -> list[Indices]:
        """The steps of that epoch: the numbers of their samples."""
        chosen = self._chosen(epoch)
        if self.kinds is None or self.lengths is None:
            return _cut(chosen, self.step_size)
        return self._grouped(chosen, np.random.default_rng([self.seed, epoch, 1]))

    def batches(self, epoch: int, process: int = 0) -> list[Indices]:
        """The batches of one process in that epoch."""
        return [step[process :: self.processes] for step in self.epoch(epoch)]

    def _chosen(self, epoch: int) -> Indices:
        """The samples of the epoch, in random order."""
        parts, start = [], 0
        for number, (size, portion) in enumerate(zip(self.sizes, self.portions, strict=True)):
            turn, part = divmod(epoch, size // portion)  # each turn cuts the set, shuffled anew, into parts
            shuffled = np.arange(size)
            if self.shuffle:
                np.random.default_rng([self.seed, turn, 2, number]).shuffle(shuffled)
            parts.append(start + shuffled[part * portion : (part + 1) * portion])
            start += size
        chosen = np.concatenate(parts)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch, 0]).shuffle(chosen)
        return chosen

    def _grouped(self, chosen: Indices, random: np.random.Generator) -> list[Indices]:
        assert self.kinds is not None
        assert self.lengths is not None
        steps, rest = [], []
        for kind in range(len(KINDS)):
            own = chosen[self.kinds[chosen] == kind]
            whole = len(own) // self.step_size * self.step_size
            stretch = self.step_size * max(1, min(MEGABATCH_STEPS, whole // self.step_size // 4))
            for start in range(0, whole, stretch):
                stretched = own[start : min(start + stretch, whole)]
                steps += _cut(self._longest_first(stretched), self.step_size)
            rest.append(self._longest_first(own[whole:]))
        steps += _cut(np.concatenate(rest), self.step_size)
        steps = [steps[i] for i in random.permutation(len(steps))]
        largest = [max(range(len(steps)), key=lambda i: self._memory(steps[i], k)) for k in range(len(KINDS))]
        first = list(dict.fromkeys(i for k, i in enumerate(largest) if self._memory(steps[i], k)))
        return [steps[i] for i in first] + [step for i, step in enumerate(steps) if i not in first]

    def _memory(self, step: Indices, kind: int) -> int:
        """What the samples of one kind take in a step, in lengths: all are padded to the longest."""
        assert self.kinds is not None
        assert self.lengths is not None
        own = self.lengths[step[self.kinds[step] == kind]]
        return len(own) * int(own.max(initial=0))

    def _longest_first(self, samples: Indices) -> Indices:
        assert self.lengths is not None
        return samples[np.argsort(-self.lengths[samples], kind="stable")]


def portions(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """How many samples of each set an epoch has: all, or as many as the weights allow without repeats.

    Raises DataError for weights that are not positive, or so unequal that a set would not come at all.

    >>> portions([100, 30], None), portions([100, 30], [1, 1]), portions([100, 30], [3, 1])
    ([100, 30], [30, 30], [90, 30])
    """
    if weights is None:
        return list(sizes)
    if len(weights) != len(sizes) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise DataError(f"Weights of data sets are positive numbers, one a set; got {list(weights)}.")
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    found = [min(size, round(weight * scale)) for size, weight in zip(sizes, weights, strict=True)]
    if not all(found):
        raise DataError(
            f"With the weights {list(weights)} for sets of {list(sizes)} samples, an epoch in which no "
            f"sample comes twice has {found} of them. Give the sets without any more weight."
        )
    return found


def _cut(samples: Indices, size: int) -> list[Indices]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
