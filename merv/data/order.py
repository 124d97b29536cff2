"""Order: the samples of each training step, as a pure function of seed, epoch and number of processes.

An epoch is a sequence of global batches, called steps here; with gradient accumulation, an optimizer step
uses several. A step is what all processes train on at once: `batch_size` samples for each of them, fewer in
the last. Its samples are distributed over the processes round-robin, so all processes have the same number of
batches, of similar lengths. No sample is repeated or dropped: if a step has fewer samples than there are
processes, the last processes get an empty batch.
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
MODALITIES = ("video", "image", "text")  # a sample has the first of these that it contains
# Steps whose samples are sorted by length together: more steps mean less padding, but a less random order
MEGABATCH_STEPS = 50
# What random numbers are drawn for; a part of their seed, so that draws are independent
EPOCH, GROUPS, SET, QUESTIONS, STREAM, FRAMES = range(6)


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The steps of every epoch.

    Args:
        sizes: Number of samples in each set. Samples are numbered across the sets, in order.
        batch_size: Samples per batch and process.
        world_size: Number of processes that share the data.
        seed: Seed of the order.
        weights: Proportions in which the sets are mixed. An epoch is then as long as it can be without a
            repeated sample: it has all of one set and a random part of each other set. A set of at least
            twice the size of its part gives different parts in successive epochs, `size // part` of them;
            then it is shuffled and split again. None: every epoch has all samples.
        shuffle: False keeps the order of the sets.
        modalities: Index into MODALITIES of each sample.
        lengths: Length of each sample, in any unit. With `modalities` and `lengths`, a step has samples of
            one modality and of similar lengths. The samples that do not fill such a step are combined in a
            few mixed steps. The longest step of each modality comes first, so that too little memory shows
            at the start.

    Example:
        >>> order = EpochOrder([5], batch_size=2)
        >>> len(order), sorted(index for step in order.epoch(0) for index in step.tolist())
        (3, [0, 1, 2, 3, 4])

    Source: grouping by length within shuffled megabatches is `group_by_length` of transformers; grouping by
    modality is `group_by_modality_length` of LLaVA (arXiv 2304.08485).
    """

    sizes: Sequence[int]
    batch_size: int
    world_size: int = 1
    seed: int = 0
    weights: Sequence[float] | None = None
    shuffle: bool = True
    modalities: NDArray[np.int8] | None = None
    lengths: Indices | None = None

    @property
    def step_size(self) -> int:
        """Samples in a step, over all processes."""
        return self.batch_size * self.world_size

    @cached_property
    def portions(self) -> list[int]:
        """Number of samples of each set in an epoch."""
        return portions(self.sizes, self.weights)

    def __len__(self) -> int:
        """Return the number of steps in every epoch, which is the number of batches of each process."""
        return math.ceil(sum(self.portions) / self.step_size)

    def epoch(self, epoch: int) -> list[Indices]:
        """Return the steps of an epoch, each as the indices of its samples."""
        chosen = self._choose(epoch)
        if self.modalities is None or self.lengths is None:
            return _split(chosen, self.step_size)
        return self._group(chosen, np.random.default_rng([self.seed, epoch, GROUPS]))

    def batches(self, epoch: int, rank: int = 0) -> list[Indices]:
        """Return the batches of one process in an epoch."""
        return [step[rank :: self.world_size] for step in self.epoch(epoch)]

    def _choose(self, epoch: int) -> Indices:
        """Return the samples of an epoch, in random order."""
        chosen, start = [], 0
        for number, (size, portion) in enumerate(zip(self.sizes, self.portions, strict=True)):
            # Each cycle shuffles the set and splits it into parts, one for each epoch of the cycle
            cycle, part = divmod(epoch, size // portion)
            shuffled = np.arange(size)
            if self.shuffle:
                np.random.default_rng([self.seed, cycle, SET, number]).shuffle(shuffled)
            chosen.append(start + shuffled[part * portion : (part + 1) * portion])
            start += size
        samples = np.concatenate(chosen)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch, EPOCH]).shuffle(samples)
        return samples

    def _group(self, chosen: Indices, random: np.random.Generator) -> list[Indices]:
        """Split the samples into steps of one modality and of similar lengths."""
        assert self.modalities is not None
        steps, rest = [], []
        for modality in range(len(MODALITIES)):
            samples = chosen[self.modalities[chosen] == modality]
            full_steps = len(samples) // self.step_size
            end = full_steps * self.step_size
            megabatch = self.step_size * max(1, min(MEGABATCH_STEPS, full_steps // 4))
            for start in range(0, end, megabatch):
                group = samples[start : min(start + megabatch, end)]
                steps += _split(self._longest_first(group), self.step_size)
            rest.append(self._longest_first(samples[end:]))
        steps += _split(np.concatenate(rest), self.step_size)
        steps = [steps[i] for i in random.permutation(len(steps))]
        first: list[int] = []
        for modality in range(len(MODALITIES)):
            lengths = [self._padded_length(step, modality) for step in steps]
            largest = int(np.argmax(lengths))
            if lengths[largest] and largest not in first:
                first.append(largest)
        return [steps[i] for i in first] + [step for i, step in enumerate(steps) if i not in first]

    def _padded_length(self, step: Indices, modality: int) -> int:
        """Return the total length of the samples of one modality in a step, all padded to the longest."""
        assert self.modalities is not None
        assert self.lengths is not None
        lengths = self.lengths[step[self.modalities[step] == modality]]
        return len(lengths) * int(lengths.max(initial=0))

    def _longest_first(self, samples: Indices) -> Indices:
        assert self.lengths is not None
        return samples[np.argsort(-self.lengths[samples], kind="stable")]


def portions(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Return how many samples of each set an epoch has: all, or as many as `weights` allow without repeats.

    Raises DataError if a weight is not positive, or if the weights are so unequal that a set gets no sample.

    >>> portions([100, 30], None), portions([100, 30], [1, 1]), portions([100, 30], [3, 1])
    ([100, 30], [30, 30], [90, 30])
    """
    if weights is None:
        return list(sizes)
    if len(weights) != len(sizes) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise DataError(f"Expected {len(sizes)} positive weights, one per data set; got {list(weights)}.")
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [min(size, round(weight * scale)) for size, weight in zip(sizes, weights, strict=True)]
    if not all(counts):
        raise DataError(
            f"The weights {list(weights)} are too unequal for sets of {list(sizes)} samples: an epoch "
            f"without repeated samples would take {counts} samples from them. Increase the smallest weight."
        )
    return counts


def _split(samples: Indices, size: int) -> list[Indices]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
