"""Saved predictions: read them, and score them again without a model.

A file of predictions has a JSON object per line:

    {"id": "q1", "video": "a.mp4", "kind": "count", "question": "How many?", "answer": ["2", "two"],
     "output": "There are two."}
    {"id": "q2", "video": "a.mp4", "question": "Which?", "options": ["a dog", "a cat"], "answer": 1,
     "output": "B", "log_likelihoods": [-2.5, -0.1]}

`answer` and `output` are needed. With `options`, `answer` is the number, letter or text of one; without, a
text or a list of texts that are all right. `output` is what the model said; null if it failed.
`log_likelihoods` has a number per option. `id` tells the items of two files apart; it is the number of the
line by default. Questions with the same `video` form a cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merv.errors import DataError
from merv.evaluation.answers import LETTERS, exact_match, normalize, normalized_match, parse_choice, token_f1
from merv.evaluation.statistics import Interval, interval

MOST = 1e300  # of a log-likelihood; larger integers are no floats


@dataclass(frozen=True)
class Prediction:
    """One question and what the model answered.

    Args:
        id: Tells the items of two runs apart.
        video: The cluster.
        kind: Kind of question, or "".
        question: The question, or "".
        options: Texts of the options; empty for an open question.
        answers: Texts that are right.
        right: Number of the right option; None for an open question.
        output: What the model said; "" if it failed.
        log_likelihoods: Of the options, or empty.
    """

    id: str
    video: str
    kind: str
    question: str
    options: tuple[str, ...]
    answers: tuple[str, ...]
    right: int | None
    output: str
    log_likelihoods: tuple[float, ...]

    @property
    def is_parsed(self) -> bool:
        """Whether the output chooses an option, or has a word."""
        return bool(normalize(self.output)) if self.right is None else self.choice is not None

    @property
    def choice(self) -> int | None:
        """Number of the option that the output chooses."""
        return parse_choice(self.output, self.options)

    @property
    def likeliest(self) -> int:
        """Number of the option with the largest log-likelihood; the first of equal ones."""
        return self.log_likelihoods.index(max(self.log_likelihoods))


def _likelihood(item: Prediction) -> float | None:
    return float(item.likeliest == item.right) if item.log_likelihoods else None


def _choice(item: Prediction) -> float | None:
    return float(item.choice == item.right) if item.right is not None else None


def _open(score: Callable[[str, Sequence[str]], float]) -> Callable[[Prediction], float | None]:
    return lambda item: float(score(item.output, item.answers)) if item.right is None else None


# Name → score of an item from 0 to 1; None if it does not apply. The first that applies is the main one.
METRICS: dict[str, Callable[[Prediction], float | None]] = {
    "likelihood": _likelihood,
    "choice": _choice,
    "normalized": _open(normalized_match),
    "exact": _open(exact_match),
    "f1": _open(token_f1),
}


def main_score(item: Prediction) -> float:
    """The score of the first metric that applies.

    >>> item = parse({"answer": "two", "output": "Two."}, "line")
    >>> main_score(item), METRICS["exact"](item)
    (1.0, 0.0)
    """
    return next(score for metric in METRICS.values() if (score := metric(item)) is not None)


# Reading --------------------------------------------------------------------------------------


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a file of predictions.

    Raises:
        DataError: The file cannot be read, a line is malformed, or an `id` occurs twice.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise DataError(f"{path}: could not be read: {error}.") from error
    found: dict[str, Prediction] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: expected a JSON object: {error}.") from error
        prediction = parse(row, origin, str(number))
        if prediction.id in found:
            raise DataError(f"{origin}: the id {prediction.id!r} occurs twice.")
        found[prediction.id] = prediction
    if not found:
        raise DataError(f"{path}: there is no prediction.")
    return list(found.values())


def parse(row: Any, origin: str, default_id: str = "") -> Prediction:
    """Parse a row of a file of predictions. Raises DataError, which begins with `origin`."""
    if not isinstance(row, dict):
        raise DataError(f"{origin}: expected a JSON object, got {type(row).__name__}.")
    if missing := [name for name in ("answer", "output") if name not in row]:
        raise DataError(f"{origin}: {' and '.join(missing)} missing. See `merv score --help`.")
    options = _texts(row.get("options") or [], origin, "options")
    answers = () if options else _texts(row["answer"], origin, "answer")
    if not (options or answers):
        raise DataError(f"{origin}: expected at least one answer.")
    likelihoods = row.get("log_likelihoods") or []
    is_list = isinstance(likelihoods, list) and (not likelihoods or len(likelihoods) == len(options))
    if not is_list or not all(map(_is_log_likelihood, likelihoods)):
        raise DataError(f"{origin}: expected log_likelihoods to have a number for each option.")
    output = row["output"]
    if not isinstance(output, str | None):
        raise DataError(f"{origin}: expected output to be a text or null, got {output!r}.")
    name = str(default_id if row.get("id") is None else row["id"])
    return Prediction(
        id=name,
        video=str(name if row.get("video") is None else row["video"]),
        kind=str(row.get("kind") or ""),
        question=str(row.get("question") or ""),
        options=options,
        answers=answers,
        right=_right(row["answer"], options, origin) if options else None,
        output=output or "",
        log_likelihoods=tuple(map(float, likelihoods)),
    )


def _is_log_likelihood(value: Any) -> bool:
    """Whether a value is a number, or -inf."""
    return isinstance(value, int | float) and (abs(value) < MOST or value == -math.inf)


def _texts(value: Any, origin: str, name: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, (str, int, float)) for text in values):
        raise DataError(f"{origin}: expected {name} to be a text or a list of texts, got {value!r}.")
    return tuple(map(str, values))


def _right(answer: Any, options: Sequence[str], origin: str) -> int:
    """Number of the right option: a number, a letter, or the text of one option."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str) and options.count(answer) == 1:
        return options.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(options)]:
        return LETTERS.index(answer)
    raise DataError(
        f"{origin}: expected answer to be the number (from 0), the letter or the text of one of the "
        f"{len(options)} options, got {answer!r}."
    )


# Tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Scores of some items.

    Args:
        name: "all", or a kind of question.
        metrics: Name of each metric → its mean with an interval. `score` is the main one.
        not_parsed: Share of outputs that choose no option, or say nothing; `choice` counts them as wrong.
        disagreement: Share of items with log-likelihoods where the output names another option than the
            likeliest; None if no item has any.
    """

    name: str
    metrics: dict[str, Interval]
    not_parsed: float
    disagreement: float | None


def table(predictions: Sequence[Prediction]) -> list[Row]:
    """Scores of all items, and of each kind.

    >>> rows = table([parse({"answer": "a", "output": text}, "line") for text in ("a", "b")])
    >>> rows[0].metrics["score"].mean, rows[0].not_parsed
    (0.5, 0.0)
    """
    kinds = sorted({item.kind for item in predictions} - {""})
    rows = [_row(kind, [item for item in predictions if item.kind == kind]) for kind in kinds]
    return [_row("all", predictions), *rows]


def _row(name: str, items: Sequence[Prediction]) -> Row:
    metrics = {"score": interval([main_score(item) for item in items], [item.video for item in items])}
    for metric, score in METRICS.items():
        scored = [(value, item.video) for item in items if (value := score(item)) is not None]
        if scored:
            values, videos = zip(*scored, strict=True)
            metrics[metric] = interval(values, videos)
    both = [item for item in items if item.log_likelihoods]
    others = [item for item in both if item.choice not in (None, item.likeliest)]
    disagreement = len(others) / len(both) if both else None
    return Row(name, metrics, sum(not item.is_parsed for item in items) / len(items), disagreement)
