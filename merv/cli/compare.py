"""Compare two runs that answered the same questions, by a paired test over videos.

examples:
  merv compare base.jsonl mine.jsonl
  merv compare base.jsonl mine.jsonl --flips 20       also list questions whose score changed

Both files have the form that `merv score --help` describes, with the same `id`s. The p-value is a mid-p: the
probability of a larger difference, plus half of that of an equal one, if both runs are equally good. The
detectable difference is the one that four of five such comparisons would find significant (p < 5 %).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from merv.errors import DataError

if TYPE_CHECKING:
    from merv.evaluation.predictions import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv compare` to `parser`."""
    parser.add_argument("first", metavar="A", help="a JSONL file of predictions")
    parser.add_argument("second", metavar="B", help="another one, for the same questions")
    parser.add_argument(
        "--flips",
        type=int,
        default=0,
        metavar="N",
        help="list up to N questions that became better, and worse",
    )


def run(args: argparse.Namespace) -> None:
    """Print the comparison."""
    from merv.evaluation.predictions import main_score, read_predictions
    from merv.evaluation.statistics import compare, interval

    first, second = (read_predictions(path) for path in (args.first, args.second))
    pairs = paired(first, second, args.first, args.second)
    videos = [one.video for one, _ in pairs]
    scores = [[main_score(item) for item in run] for run in zip(*pairs, strict=True)]
    for name, values in zip("AB", scores, strict=True):
        print(f"{name}  {interval(values, videos)}")
    result = compare(scores[1], scores[0], videos)
    better, worse = _flips(pairs, 1), _flips(pairs, -1)
    print(
        f"B - A  {result.difference:+.1%} [{result.low:+.1%}, {result.high:+.1%}], p = {result.p_value:.3f}; "
        f"detectable: {result.detectable:.1%}"
    )
    print(f"{len(pairs)} questions about {len(set(videos))} videos: {len(better)} better, {len(worse)} worse")
    for title, flips in (("better in B", better), ("worse in B", worse)):
        for one, other in flips[: args.flips]:
            print(f"  {title}: {one.id} {one.question}\n    A: {one.output!r}\n    B: {other.output!r}")


def paired(
    first: list[Prediction], second: list[Prediction], first_name: str, second_name: str
) -> list[tuple[Prediction, Prediction]]:
    """Pair the predictions of two runs by id. Raises DataError if the questions differ."""
    others = {item.id: item for item in second}
    pairs = [(item, others.pop(item.id)) for item in first if item.id in others]
    if others or len(pairs) < len(first):
        lacking = [item.id for item in first if item.id not in {one.id for one, _ in pairs}]
        raise DataError(
            f"The runs answered different questions: {len(lacking)} are only in {first_name}, such as "
            f"{', '.join(lacking[:3]) or '-'}; {len(others)} only in {second_name}, such as "
            f"{', '.join(list(others)[:3]) or '-'}."
        )
    for one, other in pairs:
        if bool(one.log_likelihoods) != bool(other.log_likelihoods):
            raise DataError(
                f"The item {one.id} has log_likelihoods in one run only, so its scores cannot be compared. "
                "Remove them from both files, or add them to the other one."
            )
        if (one.options, one.answers, one.right, one.video) != (
            other.options,
            other.answers,
            other.right,
            other.video,
        ):
            raise DataError(f"The item {one.id} has another video, options or answer in {second_name}.")
    return pairs


def _flips(pairs: list[tuple[Prediction, Prediction]], direction: int) -> list[tuple[Prediction, Prediction]]:
    from merv.evaluation.predictions import main_score

    return [(a, b) for a, b in pairs if (main_score(b) - main_score(a)) * direction > 0]
