"""How sure a score is: intervals and tests for questions that share videos.

Questions about one video are not independent: if the video is hard, all of them are. So the unit of all
intervals and tests is the cluster, usually the video.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from merv.errors import DataError

DRAWS = 10_000  # of the permutation test


@dataclass(frozen=True)
class Interval:
    """A mean score with a confidence interval.

    Args:
        mean: Mean score.
        low: Lower end of the interval.
        high: Upper end of the interval.
        items: Number of items.
        clusters: Number of clusters.
    """

    mean: float
    low: float
    high: float
    items: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


def interval(scores: Sequence[float], clusters: Sequence[Hashable], level: float = 0.95) -> Interval:
    """Confidence interval of a mean score.

    The jackknife over clusters gives the variance, and that gives an effective number of items, for which
    Wilson's interval is computed. Instead of the normal distribution it uses Student's t, with fewer degrees
    of freedom if few clusters cause most of the variance. If all scores are 0 or all are 1, a cluster counts
    as one item. benchmarks/evaluation/intervals.py measures the coverage.

    Args:
        scores: Score of each item, in [0, 1].
        clusters: Cluster of each item.
        level: Share of repetitions in which the interval contains the true score.

    Returns:
        Mean and interval; the interval is [0, 1] if there is only one cluster.

    Raises:
        DataError: There is no item, the lengths differ, or a score is not in [0, 1].

    Source: E. B. Wilson, JASA 22 (1927); effective sample size as in E. L. Korn and B. I. Graubard, Survey
    Methodology 24 (1998); degrees of freedom from the variance of a variance, 2 n / (kurtosis - 1).

    Example:
        >>> print(interval([1, 1, 0, 1], ["a", "a", "b", "c"]))
        75.0% [5.8%, 99.3%]
    """
    values, sums, sizes = _cluster_sums(scores, clusters)
    mean, count = float(values.mean()), len(sums)
    if count == 1:
        return Interval(mean, 0.0, 1.0, len(values), 1)
    changes = (sums - mean * sizes) / (len(values) - sizes)  # of the mean without each cluster
    squares, spread = (changes**2).sum(), mean * (1 - mean)
    effective, freedom = float(count), count - 1.0
    if squares > 0 and spread > 0:
        effective = min(spread / ((count - 1) / count * squares), len(values))
        kurtosis = count * (changes**4).sum() / squares**2
        freedom = min(max(2 * count / max(kurtosis - 1, 1e-9), 2.0), freedom)
    z2 = t.ppf((1 + level) / 2, freedom) ** 2
    center = (mean + z2 / (2 * effective)) / (1 + z2 / effective)
    half = np.sqrt(z2 * (spread / effective + z2 / (4 * effective**2))) / (1 + z2 / effective)
    return Interval(mean, float(max(center - half, 0)), float(min(center + half, 1)), len(values), count)


@dataclass(frozen=True)
class Comparison:
    """The difference between two runs on the same items.

    Args:
        difference: Mean score of the first minus that of the second.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of the interval.
        p_value: Probability of a larger difference, plus half of that of an equal one, if the runs are
            equally good.
        detectable: Difference that 80 % of such comparisons would find significant at 5 %.
    """

    difference: float
    low: float
    high: float
    p_value: float
    detectable: float


def compare(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Comparison:
    """Compare the scores of two runs on the same items.

    The test flips the sign of the difference of whole clusters at random. Its p-value is a mid-p: draws that
    equal the observed difference count half, so that the test is not conservative when few answers differ.
    Interval and detectable difference are computed with two more clusters, which differ in opposite
    directions, so that they do not collapse when all clusters differ equally.

    Args:
        first: Score of each item in the first run.
        second: Score of each item in the second run.
        clusters: Cluster of each item.

    Raises:
        DataError: There is no item, the lengths differ, or a score is not in [0, 1].

    Source: the interval extends A. Agresti and Y. Min, Statistics in Medicine 24 (2005), to clusters.

    Example:
        >>> compare([1, 1, 1, 0], [0, 1, 0, 0], ["a", "b", "c", "d"]).difference
        0.5
    """
    values, sums, sizes = _cluster_sums(first, clusters)
    other, other_sums, _ = _cluster_sums(second, clusters)
    sums = sums - other_sums
    difference, count = float(values.mean() - other.mean()), len(sums)
    if count == 1:
        return Comparison(difference, -1.0, 1.0, 1.0, 1.0)
    more, total = [*sums, 0.5**0.5, -(0.5**0.5)], len(values) + 2
    center = sum(more) / total
    residuals = np.array(more) - center * np.array([*sizes, 1, 1])
    error = np.sqrt((count + 2) / (count + 1) * (residuals**2).sum()) / total
    half = t.ppf(0.975, count + 1) * error
    return Comparison(
        difference,
        max(center - half, -1.0),
        min(center + half, 1.0),
        _sign_flips(sums),
        float(min((norm.ppf(0.975) + norm.ppf(0.8)) * error, 1.0)),
    )


def _sign_flips(sums: np.ndarray) -> float:
    """The p-value of a sum of clusters' differences, two-sided."""
    sums = sums[sums != 0]
    generator = np.random.default_rng(0)
    observed, tolerance = abs(sums.sum()), 1e-9
    above = equal = 0
    for _ in range(10):  # in parts, so that many clusters fit into memory
        signs = generator.integers(0, 2, (DRAWS // 10, len(sums)), dtype=np.int8) * 2.0 - 1
        drawn = np.abs(signs @ sums)
        above += int((drawn > observed + tolerance).sum())
        equal += int((np.abs(drawn - observed) <= tolerance).sum())
    return float((above + equal / 2 + 0.5) / (DRAWS + 1)) if len(sums) else 1.0


def _cluster_sums(
    scores: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scores, and for each cluster the sum of its scores and its size."""
    values = np.asarray(scores, dtype=float)
    if len(values) != len(clusters):
        raise DataError(f"Expected a cluster for each score; got {len(values)} and {len(clusters)}.")
    if not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise DataError("Expected at least one score, and scores from 0 to 1.")
    numbers: dict[Hashable, int] = {}
    positions = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    return values, np.bincount(positions, values), np.bincount(positions).astype(float)


# Calibration ----------------------------------------------------------------------------------


def calibration_error(confidences: Sequence[float], scores: Sequence[float], bins: int = 15) -> float:
    """Expected calibration error: mean distance of confidence and accuracy, in bins of equal confidence.

    Args:
        confidences: Probability that the model gives to its answer, for each item.
        scores: Score of each item, in [0, 1].
        bins: Number of bins of equal width.

    Source: C. Guo et al., arXiv 1706.04599.

    Example:
        >>> round(calibration_error([0.9, 0.9, 0.6, 0.6], [1, 1, 1, 0]), 3)
        0.1
    """
    confidence, score = np.asarray(confidences, dtype=float), np.asarray(scores, dtype=float)
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins are (a, b]
    gaps = np.bincount(number, score - confidence, bins)
    return float(np.abs(gaps).sum() / len(score))


def risk_coverage(confidences: Sequence[float], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk (1 - mean score) if only the k most confident items are answered, for k = 1 … n.

    >>> coverage, risk = risk_coverage([0.9, 0.5, 0.7], [1, 0, 1])
    >>> coverage.round(2).tolist(), risk.round(2).tolist()
    ([0.33, 0.67, 1.0], [0.0, 0.0, 0.33])
    """
    order = np.argsort(-np.asarray(confidences, dtype=float), kind="stable")
    counts = np.arange(1, len(order) + 1)
    return counts / len(order), 1 - np.asarray(scores, dtype=float)[order].cumsum() / counts
