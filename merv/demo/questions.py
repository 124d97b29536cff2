"""Generate questions about planned clips, with one-word answers that follow from the plan.

Kinds of questions: `first` and `last` (what is shown), `count` (number of shots), `when` (start, middle or
end), `order` (is one thing shown before another) and `present` (is a thing shown). Answers are balanced as
far as the clips allow it, so guessing helps little; `majority_accuracy` measures how much. If the name of a
held-out thing is in the question or the answer, the kind is `new name`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from merv.demo.clips import Clip, ClipPlan
from merv.demo.material import Thing
from merv.errors import DataError
from merv.utils.files import write_whole

KINDS = ("first", "last", "count", "when", "order", "present")
NEW_NAME = "new name"
NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question about a clip and its answer, a single word in lower case."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Row:
    """A line of a data file: a video, its questions, and its shots as (name, start_s, end_s)."""

    video: str
    questions: tuple[Question, ...]
    shots: tuple[tuple[str, float, float], ...] = ()


def questions(
    plan: ClipPlan, names: Sequence[str], rng: random.Random, *, per_clip: int = 5, new: Collection[str] = ()
) -> list[Question]:
    """Generate `per_clip` different questions about a clip, of as many kinds as possible.

    Args:
        plan: The plan of the clip. A clip of one shot gets no `when` and no `order`.
        names: Names that a `present` question may use for a thing that is not shown.
        rng: Source of randomness.
        per_clip: Number of questions.
        new: Names that are not used in training.

    Raises:
        DataError: The clip allows fewer different questions.

    Example:
        >>> from merv.demo.clips import plan_clip
        >>> plan = plan_clip(random.Random(0), ["cat", "rocket"])
        >>> asked = questions(plan, ["cat", "rocket", "moon"], random.Random(0), per_clip=6)
        >>> sorted(question.kind for question in asked)
        ['count', 'first', 'last', 'order', 'present', 'when']
    """
    asked: dict[str, Question] = {}
    starts_with_yes = {kind: rng.random() < 0.5 for kind in KINDS}
    for attempt in range(20):
        for kind in rng.sample(KINDS, len(KINDS)):
            if len(asked) == per_clip:
                return list(asked.values())
            yes = starts_with_yes[kind] != bool(attempt % 2)  # alternate the answers of a kind
            question_and_answer = _GENERATE[kind](plan.names, names, rng, yes)
            if question_and_answer is not None:
                text, answer = question_and_answer
                has_new_name = not set(new).isdisjoint(re.findall(r"\w+", f"{text} {answer}"))
                asked.setdefault(text, Question(NEW_NAME if has_new_name else kind, text, answer))
    raise DataError(
        f"A clip of {', '.join(plan.names)} allows only {len(asked)} different questions, not {per_clip}. "
        "Reduce per_clip."
    )


# Each function gets the names that are shown, the names that may be asked about, and whether the answer of a
# yes-or-no question should be yes. It returns a question and its answer, or None if the clip is too short.

_QuestionAnswer = tuple[str, str] | None


def _first(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _QuestionAnswer:
    return "What is shown first?", shown[0]


def _last(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _QuestionAnswer:
    return "What is shown last?", shown[-1]


def _count(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _QuestionAnswer:
    return "How many shots are there?", NUMBERS[len(shown) - 1]


def _when(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _QuestionAnswer:
    """Make the answer "middle" in half of the clips of three or more shots, to balance the three answers."""
    if len(shown) < 2:
        return None
    if len(shown) > 2 and rng.random() < 0.5:
        name, answer = rng.choice(shown[1:-1]), "middle"
    else:
        name, answer = rng.choice([(shown[0], "start"), (shown[-1], "end")])
    return f"When is the {name} shown: start, middle or end?", answer


def _order(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _QuestionAnswer:
    if len(shown) < 2:
        return None
    earlier, later = sorted(rng.sample(shown, 2), key=shown.index)
    first, second = (earlier, later) if yes else (later, earlier)
    return f"Is the {first} shown before the {second}?", "yes" if yes else "no"


def _present(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _QuestionAnswer:
    absent = [name for name in names if name not in shown]
    name = rng.choice(shown if yes or not absent else absent)
    return f"Is the {name} shown?", "yes" if name in shown else "no"


_GENERATE: dict[str, Callable[[Sequence[str], Sequence[str], random.Random, bool], _QuestionAnswer]] = {
    "first": _first,
    "last": _last,
    "count": _count,
    "when": _when,
    "order": _order,
    "present": _present,
}


# Data files -------------------------------------------------------------------------------


def rows(clips: Iterable[Clip], things: Sequence[Thing], *, per_clip: int = 5, seed: int = 0) -> list[Row]:
    """Generate questions about each clip.

    Only clips that show held-out things get questions about such things.

    Args:
        clips: The clips.
        things: All things that questions may name.
        per_clip: Number of questions about each clip.
        seed: Makes the questions repeatable.

    Returns:
        One row for each clip, in the same order.

    Raises:
        DataError: A clip allows fewer different questions.
    """
    new = {thing.name for thing in things if thing.held_out}
    result = []
    for clip in clips:
        also_visible = {name for t in things if t.name in clip.plan.names for name in t.also}
        candidates = things if new & set(clip.plan.names) else [t for t in things if not t.held_out]
        names = [thing.name for thing in candidates if thing.name not in also_visible]
        rng = random.Random(f"{seed} {clip.plan.key}")
        asked = questions(clip.plan, names, rng, per_clip=per_clip, new=new)
        shots = tuple((shot.name, shot.start_s, shot.end_s) for shot in clip.plan.shots)
        result.append(Row(str(clip.path), tuple(asked), shots))
    return result


def write_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write rows as a JSONL file, atomically."""
    path = Path(path)
    write_whole(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())
    return path


def read_rows(path: str | Path) -> list[Row]:
    """Read a file that `write_rows` has written."""
    result = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = tuple(Question(**question) for question in row["questions"])
        result.append(Row(row["video"], asked, tuple(map(tuple, row["shots"]))))
    return result


def majority_accuracy(train: Iterable[Row], test: Iterable[Row]) -> dict[str, float]:
    """The accuracy, by kind, of always giving the most common training answer to that kind of question.

    It is 0 for a kind that is not in the training rows.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in (question for row in train for question in row.questions):
        counts[question.kind][question.answer] += 1
    guesses = {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}
    correct: defaultdict[str, list[bool]] = defaultdict(list)
    for question in (question for row in test for question in row.questions):
        correct[question.kind].append(question.answer == guesses.get(question.kind))
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(correct.items())}
