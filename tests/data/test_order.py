"""The order of samples: none repeated, none lost, reproducible from the seed."""

from collections import Counter

import numpy as np
import pytest

from merv.data.order import EpochOrder, portions
from merv.errors import DataError


def batches_by_process(order: EpochOrder, epoch: int) -> list[list[list[int]]]:
    """The batches of an epoch, by process."""
    return [[b.tolist() for b in order.batches(epoch, p)] for p in range(order.world_size)]


def flat(batches) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("group", [False, True])
def test_epoch_has_every_sample_once(world_size, group):
    modalities = np.arange(37, dtype=np.int8) % 3 if group else None
    order = EpochOrder([20, 17], 3, world_size, modalities=modalities, lengths=np.arange(37))
    for epoch in range(3):
        assert sorted(flat(flat(batches_by_process(order, epoch)))) == list(range(37))


@pytest.mark.parametrize("samples", [1, 7, 12, 13])
def test_processes_have_the_same_number_of_batches(samples):
    order = EpochOrder([samples], 2, 3)
    assert {len(batches) for batches in batches_by_process(order, 0)} == {len(order)}


def test_last_step_may_have_empty_batches():
    assert batches_by_process(EpochOrder([7], 2, 3, shuffle=False), 0) == [
        [[0, 3], [6]],
        [[1, 4], []],
        [[2, 5], []],
    ]


def test_order_depends_on_seed_and_epoch():
    def run(seed, epoch):
        return batches_by_process(EpochOrder([50], 4, 2, seed), epoch)

    assert run(1, 3) == run(1, 3)
    assert run(1, 3) != run(2, 3)
    assert run(1, 3) != run(1, 4)


def test_weights_mix_sets_without_repeated_samples():
    order = EpochOrder([10, 100], 4, weights=[1, 2])
    epochs = [flat(batches_by_process(order, epoch)[0]) for epoch in range(5)]
    for chosen in epochs:
        assert sorted(i for i in chosen if i < 10) == list(range(10))
        assert len(set(chosen)) == len(chosen) == 30
    large = Counter(i for chosen in epochs for i in chosen if i >= 10)
    assert set(large.values()) == {1}  # five parts of twenty samples: the whole set
    assert len(large) == 100


def test_remainder_of_a_set_is_used_in_later_cycles():
    order = EpochOrder([2, 5], 2, weights=[1, 1])
    cycles = [
        {i for epoch in (c, c + 1) for i in flat(batches_by_process(order, epoch)[0]) if i >= 2}
        for c in (0, 2, 4, 6)
    ]
    assert all(len(cycle) == 4 for cycle in cycles)
    assert set.union(*cycles) == {2, 3, 4, 5, 6}


def test_invalid_weights_are_errors():
    for weights, pattern in ([1], r"\[1\]"), ([1, 0], r"\[1, 0\]"), ([1, float("nan")], r"\[1, nan\]"):
        with pytest.raises(DataError, match=pattern):
            portions([5, 5], weights)
    with pytest.raises(DataError, match=r"\[1, 0\.001\]"):
        portions([3, 3], [1, 0.001])


@pytest.fixture
def grouped() -> EpochOrder:
    random = np.random.default_rng(0)
    modalities = np.sort(random.integers(0, 3, 1000)).astype(np.int8)
    return EpochOrder([1000], 4, 2, modalities=modalities, lengths=random.integers(1, 1000, 1000))


def test_grouped_steps_have_one_modality_except_for_the_rest(grouped):
    steps = grouped.epoch(0)
    mixed = [step for step in steps if len(set(grouped.modalities[step])) > 1]
    assert len(steps) == len(grouped)
    assert len(mixed) <= 3


def test_grouped_steps_have_similar_lengths(grouped):
    def padding(steps):
        return sum(len(s) * grouped.lengths[s].max() for s in steps) / grouped.lengths.sum()

    plain = EpochOrder([1000], 4, 2).epoch(0)
    assert padding(grouped.epoch(0)) < 1.15 < 1.7 < padding(plain)


def test_largest_step_of_each_modality_comes_first(grouped):
    for epoch in range(3):
        steps = grouped.epoch(epoch)

        def padded_length(step, modality):
            lengths = grouped.lengths[step[grouped.modalities[step] == modality]]
            return len(lengths) * lengths.max(initial=0)

        for modality in range(3):
            assert padded_length(steps[modality], modality) == max(
                padded_length(step, modality) for step in steps
            )


def test_grouped_and_weighted_epochs_differ_and_have_the_same_length(grouped):
    order = EpochOrder(
        [400, 600], 4, 2, weights=[1, 1], modalities=grouped.modalities, lengths=grouped.lengths
    )
    epochs = [order.epoch(epoch) for epoch in range(6)]
    assert {len(steps) for steps in epochs} == {len(order)}
    assert epochs[0][5].tolist() != epochs[1][5].tolist()
