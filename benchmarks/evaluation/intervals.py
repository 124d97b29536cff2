"""Check intervals and the paired test by simulation: how often are they right?

    python benchmarks/evaluation/intervals.py [--draws 5000] [--write]

Questions come in clusters (videos) of 1 to 15, unequal in size. Each cluster has a probability of a right
answer from a beta distribution, so that answers of a cluster have a given correlation. Coverage is the share
of draws whose 95 % interval of `merv.evaluation.statistics.interval` contains the true accuracy; beside it is
that of the usual interval, which takes all questions as independent (Wilson). For the paired test, two runs
are equally good: they share a part of their answers, and the share of draws with p < 5 % should be 5 %.

Predicted before the first run: coverage of 93 to 97 % from 100 clusters on, and 90 to 96 % for 20; the usual
interval covers less than 80 % at a correlation of 0.5; the test is right in 4 to 6 % of the draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import norm

from merv.evaluation.statistics import compare, interval

SIZES = (1, 1, 2, 3, 3, 4, 5, 8, 15)  # of clusters, in turn; 4.7 on average


def draw(
    generator: np.random.Generator, clusters: int, correlation: float, accuracy: float
) -> tuple[np.ndarray, np.ndarray]:
    """Answers (0 or 1), and the number of the cluster of each."""
    sizes = np.resize(SIZES, clusters)
    scale = (1 - correlation) / correlation
    chances = generator.beta(accuracy * scale, (1 - accuracy) * scale, clusters)
    numbers = np.repeat(np.arange(clusters), sizes)
    return (generator.random(len(numbers)) < chances[numbers]).astype(float), numbers


def wilson(scores: np.ndarray) -> tuple[float, float]:
    """The interval that takes all items as independent."""
    n, p, z2 = len(scores), scores.mean(), norm.ppf(0.975) ** 2
    center, half = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    return (center - half) / (1 + z2 / n), (center + half) / (1 + z2 / n)


def coverages(draws: int) -> list[str]:
    """Coverage for each number of clusters, correlation and accuracy."""
    lines = ["clusters  correlation  accuracy   coverage   if taken as independent"]
    for clusters in (20, 100, 800):
        for correlation in (0.1, 0.5):
            for accuracy in (0.5, 0.95):
                generator, ours, usual = np.random.default_rng(0), 0, 0
                for _ in range(draws):
                    scores, numbers = draw(generator, clusters, correlation, accuracy)
                    found = interval(scores, numbers.tolist())
                    ours += found.low <= accuracy <= found.high
                    low, high = wilson(scores)
                    usual += low <= accuracy <= high
                setting = f"{clusters:8}  {correlation:11}  {accuracy:8}"
                lines.append(f"{setting}   {ours / draws:8.1%}   {usual / draws:.1%}")
    return lines


def errors(draws: int) -> list[str]:
    """Share of draws in which the test finds a difference between equally good runs."""
    lines = ["items  clusters  correlation  accuracy   p < 5 %"]
    for clusters in (22, 86, 400):
        for correlation in (0.1, 0.5):
            for accuracy in (0.5, 0.95):
                generator, found, items = np.random.default_rng(1), 0, 0
                for _ in range(draws):
                    first, numbers = draw(generator, clusters, correlation, accuracy)
                    second, _ = draw(generator, clusters, correlation, accuracy)
                    shared = generator.random(len(first)) < 0.5  # half of the answers are the same
                    second = np.where(shared, first, second)
                    found += compare(first, second, numbers.tolist()).p_value < 0.05
                    items = len(first)
                lines.append(
                    f"{items:5}  {clusters:8}  {correlation:11}  {accuracy:8}   {found / draws:7.1%}"
                )
    return lines


def main() -> None:
    """Simulate, print, and write the results if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=5000, help="repetitions (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/intervals.txt")
    args = parser.parse_args()
    lines = [
        f"python benchmarks/evaluation/intervals.py --draws {args.draws}",
        "",
        *coverages(args.draws),
        "",
        *errors(args.draws),
    ]
    text = "\n".join([*lines, ""])
    print(text)
    if args.write:
        (Path(__file__).parents[1] / "results" / "intervals.txt").write_text(text)


if __name__ == "__main__":
    main()
