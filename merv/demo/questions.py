"""Questions: what can be asked of a planned clip, with one-word answers that are certain.

Kinds: `first` and `last` (what is shown), `count` (how many shots), `when` (at the start, in
the middle or at the end), `order` (one thing before another) and `present` (is it there at
all). Answers are balanced where the clips allow it, so that little can be guessed without
the video; `majority_accuracy` says how much. A question that needs the name of a held-out
thing, in the question or the answer, is of the kind `new name`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merv.demo.clips import Clip, ClipPlan
from merv.demo.material import Thing
from merv.errors import DataError
from merv.utils.files import write_whole

KINDS = ("first", "last", "count", "when", "order", "present")
NEW_NAME = "new name"
NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question about a clip and its one right answer, a single word in lower case."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Row:
    """A line of a split's file: a video, its questions, and its shots as (name, start_s, end_s)."""

    video: str
    questions: tuple[Question, ...]
    shots: tuple[tuple[str, float, float], ...] = ()


def questions(
    plan: ClipPlan, names: Sequence[str], rng: random.Random, *, per_clip: int = 5, new: Collection[str] = ()
) -> list[Question]:
    """`per_clip` different questions, their kinds as even as the clip allows.

    names: the things that may be asked for though they are not there. new: the names that
    training never had. A clip of one shot has no `when` and no `order`.

    >>> from merv.demo.clips import plan_clip
    >>> plan = plan_clip(random.Random(0), ["cat", "rocket"])
    >>> asked = questions(plan, ["cat", "rocket", "moon"], random.Random(0), per_clip=6)
    >>> sorted(q.kind for q in asked)
    ['count', 'first', 'last', 'order', 'present', 'when']
    """
    asked: dict[str, Question] = {}
    coins = {kind: rng.random() < 0.5 for kind in KINDS}
    for turn in range(20):  # later turns only add what differs from the questions before
        for kind in rng.sample(KINDS, len(KINDS)):
            if len(asked) == per_clip:
                return list(asked.values())
            yes = coins[kind] != bool(turn % 2)  # asked twice, a kind gets both answers
            found = _ASK[kind](plan.names, names, rng, yes)
            if found is not None:
                text, answer = found
                needs_new = not set(new).isdisjoint(re.findall(r"\w+", f"{text} {answer}"))
                asked.setdefault(text, Question(NEW_NAME if needs_new else kind, text, answer))
    raise DataError(
        f"Only {len(asked)} different questions were found for a clip of {', '.join(plan.names)}; wanted "
        f"{per_clip}. Ask fewer per clip."
    )


_Asked = tuple[str, str] | None


def _first(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _Asked:
    return "What is shown first?", shown[0]


def _last(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _Asked:
    return "What is shown last?", shown[-1]


def _count(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _Asked:
    return "How many shots are there?", NUMBERS[len(shown) - 1]


def _when(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _Asked:
    """Half of the askings in longer clips go to the middle: each answer is then given a third of the time."""
    if len(shown) < 2:
        return None
    if len(shown) > 2 and rng.random() < 0.5:
        name, answer = rng.choice(shown[1:-1]), "middle"
    else:
        name, answer = rng.choice([(shown[0], "start"), (shown[-1], "end")])
    return f"When is the {name} shown: start, middle or end?", answer


def _order(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _Asked:
    if len(shown) < 2:
        return None
    earlier, later = sorted(rng.sample(shown, 2), key=shown.index)
    one, other = (earlier, later) if yes else (later, earlier)
    return f"Is the {one} shown before the {other}?", "yes" if yes else "no"


def _present(shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool) -> _Asked:
    absent = [name for name in names if name not in shown]
    name = rng.choice(shown if yes or not absent else absent)
    return f"Is the {name} shown?", "yes" if name in shown else "no"


_ASK: dict[str, Callable[[Sequence[str], Sequence[str], random.Random, bool], _Asked]] = {
    "first": _first,
    "last": _last,
    "count": _count,
    "when": _when,
    "order": _order,
    "present": _present,
}


# Rows and files ----------------------------------------------------------------------------


def rows(clips: Iterable[Clip], things: Sequence[Thing], *, per_clip: int = 5, seed: int = 0) -> list[Row]:
    """A row per clip; only a clip that shows a held-out thing is asked about held-out things.

    Nor is it asked whether a thing is there that another one also shows.
    """
    new = {thing.name for thing in things if thing.held_out}
    made = []
    for clip in clips:
        also = {name for t in things if t.name in clip.plan.names for name in t.also}
        maybe = things if new & set(clip.plan.names) else [t for t in things if not t.held_out]
        names = [thing.name for thing in maybe if thing.name not in also]
        rng = random.Random(f"{seed} {clip.plan.key}")
        asked = questions(clip.plan, names, rng, per_clip=per_clip, new=new)
        shots = tuple((shot.name, shot.start_s, shot.end_s) for shot in clip.plan.shots)
        made.append(Row(str(clip.path), tuple(asked), shots))
    return made


def write_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write a split's JSONL file, one row a line, replacing what was there."""
    path = Path(path)
    write_whole(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())
    return path


def read_rows(path: str | Path) -> list[Row]:
    """Read what `write_rows` wrote; raises DataError that names the file and line of a malformed row."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            asked = tuple(Question(**question) for question in row["questions"])
            found.append(Row(row["video"], asked, tuple(map(tuple, row.get("shots", ())))))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: wanted a JSON object with 'video' and 'questions' (each with "
                f"'kind', 'question' and 'answer'); got {line[:60]!r} ({error})."
            ) from error
    return found


def to_messages(video: str | Path, question: Question) -> list[dict[str, Any]]:
    """The chat of one question and its answer: a user's turn with video and text, then the assistant's.

    >>> to_messages("a.mp4", Question("count", "How many shots?", "two"))[1]
    {'role': 'assistant', 'content': 'two'}
    """
    asked = [{"type": "video", "video": str(video)}, {"type": "text", "text": question.question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": question.answer}]


def majority_accuracy(train: Iterable[Row], test: Iterable[Row]) -> dict[str, float]:
    """Kind → share of right answers if always that kind's commonest answer of training is given.

    A kind that training never had counts as 0.
    """
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in (question for row in train for question in row.questions):
        seen[question.kind][question.answer] += 1
    guess = {kind: answers.most_common(1)[0][0] for kind, answers in seen.items()}
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for question in (question for row in test for question in row.questions):
        right[question.kind].append(question.answer == guess.get(question.kind))
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}
