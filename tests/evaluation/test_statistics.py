"""Intervals and tests over clusters. benchmarks/evaluation/intervals.py measures their coverage."""

import numpy as np
import pytest
from scipy.stats import binomtest

from merv.errors import DataError
from merv.evaluation.statistics import calibration_error, compare, interval, risk_coverage


def test_single_items_give_nearly_the_interval_of_wilson():
    scores = [1] * 300 + [0] * 100
    expected = binomtest(300, 400).proportion_ci(method="wilson")
    found = interval(scores, range(400))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=2e-3)
    assert (found.mean, found.items, found.clusters) == (0.75, 400, 400)


def test_copies_of_items_do_not_narrow_the_interval():
    scores = [1, 0, 1, 1, 0, 1] * 5
    once = interval(scores, range(30))
    copied = interval([s for s in scores for _ in range(10)], [n for n in range(30) for _ in range(10)])
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-9)


@pytest.mark.parametrize(("score", "end"), [(1, "high"), (0, "low")])
def test_equal_scores_still_have_an_interval(score, end):
    found = interval([score] * 40, [n // 2 for n in range(40)])
    assert getattr(found, end) == pytest.approx(score, abs=1e-9)
    assert 0.1 < found.high - found.low < 0.25


def test_one_cluster_says_nothing():
    assert vars(interval([1, 0], ["a", "a"])) == {
        "mean": 0.5,
        "low": 0.0,
        "high": 1.0,
        "items": 2,
        "clusters": 1,
    }
    assert compare([1, 1], [0, 0], ["a", "a"]).p_value == 1


@pytest.mark.parametrize(("scores", "clusters"), [([], []), ([2], ["a"]), ([1], ["a", "b"])])
def test_invalid_scores_are_an_error(scores, clusters):
    with pytest.raises(DataError):
        interval(scores, clusters)


def test_exact_p_value_of_a_sign_test():
    result = compare([1] * 10, [0] * 9 + [1], range(10))  # 9 of 9 flips in one direction
    assert result.p_value == pytest.approx(2 / 2**9 / 2, abs=3e-3)  # what equals the observation counts half
    assert result.difference == 0.9


def test_equal_runs_do_not_differ():
    result = compare([1, 0, 1], [1, 0, 1], "abc")
    assert (result.difference, result.p_value) == (0, 1)


def test_intervals_of_few_clusters_that_differ_equally_do_not_collapse():
    better, equal = compare([1] * 5, [0] * 5, range(5)), compare([1] * 5, [1] * 5, range(5))
    assert 0 < better.low < 0.3
    assert better.high == 1
    assert equal.low == pytest.approx(-equal.high)
    assert 0.2 < equal.high < 0.5
    assert min(better.detectable, equal.detectable) > 0.2


def test_comparison_is_symmetric():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 2, (2, 60))
    one, other = compare(a, b, range(60)), compare(b, a, range(60))
    assert one.difference == -other.difference
    assert one.p_value == pytest.approx(other.p_value, abs=1e-9)
    assert one.low == pytest.approx(-other.high)


def test_calibration_error_of_calibrated_and_of_sure_answers():
    generator = np.random.default_rng(0)
    confidence = generator.random(50_000)
    scores = generator.random(50_000) < confidence
    assert calibration_error(confidence, scores) < 0.01
    assert calibration_error([1.0] * 4, [1, 0, 0, 0]) == 0.75


def test_risk_falls_when_unsure_items_are_left_out():
    coverage, risk = risk_coverage([0.2, 0.9, 0.4, 0.8], [0, 1, 0, 1])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 0.5])
