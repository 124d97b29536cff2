"""Generate questions about planned clips, with one-word answers that follow from the plan.

Kinds of questions: `first` and `last` (what is shown), `count` (number of shots), `when` (start, middle or
end), `order` (is one thing shown before another) and `present` (is a thing shown). Answers are balanced as
far as the clips allow it, so guessing helps little; `majority_accuracy` measures how much. If the name of a
unseen thing is in the question or the answer, the kind is `new name`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merv.demo.clips import ClipPlan
from merv.demo.material import Thing
from merv.errors import DataError

KINDS = ("first", "last", "count", "when", "order", "present")
NEW_NAME = "new name"
NUMBERS = ("one", "two", "three", "four")


def questions(
    plan: ClipPlan, names: Sequence[str], rng: random.Random, *, per_clip: int = 5, new: Collection[str] = ()
) -> list[dict[str, str]]:
    """Generate `per_clip` different questions about a clip, of as many kinds as possible.

    A question has the keys `kind`, `question` and `answer`, a single word in lower case.

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
        >>> sorted(question["kind"] for question in asked)
        ['count', 'first', 'last', 'order', 'present', 'when']
    """
    asked: dict[str, dict[str, str]] = {}
    starts_with_yes = {kind: rng.random() < 0.5 for kind in KINDS}
    for attempt in range(20):
        for kind in rng.sample(KINDS, len(KINDS)):
            if len(asked) == per_clip:
                return list(asked.values())
            yes = starts_with_yes[kind] != bool(attempt % 2)  # alternate the answers of a kind
            question_and_answer = _generate(kind, plan.names, names, rng, yes)
            if question_and_answer is not None:
                text, answer = question_and_answer
                has_new_name = not set(new).isdisjoint(re.findall(r"\w+", f"{text} {answer}"))
                row_kind = NEW_NAME if has_new_name else kind
                asked.setdefault(text, {"kind": row_kind, "question": text, "answer": answer})
    raise DataError(
        f"A clip of {', '.join(plan.names)} allows only {len(asked)} different questions, not {per_clip}. "
        "Reduce per_clip."
    )


def _generate(
    kind: str, shown: Sequence[str], names: Sequence[str], rng: random.Random, yes: bool
) -> tuple[str, str] | None:
    """Generate a question and its answer; None if the clip is too short for the kind.

    Args:
        kind: One of KINDS.
        shown: Names that are shown.
        names: Names that may be asked about.
        rng: Source of randomness.
        yes: Whether the answer of a yes-or-no question should be yes.
    """
    if kind == "first":
        return "What is shown first?", shown[0]
    if kind == "last":
        return "What is shown last?", shown[-1]
    if kind == "count":
        return "How many shots are there?", NUMBERS[len(shown) - 1]
    if kind == "present":
        absent = [name for name in names if name not in shown]
        name = rng.choice(shown if yes or not absent else absent)
        return f"Is the {name} shown?", "yes" if name in shown else "no"
    if len(shown) < 2:
        return None
    if kind == "when":
        # The answer is "middle" for half of the clips of three or more shots, to balance the three answers
        if len(shown) > 2 and rng.random() < 0.5:
            name, answer = rng.choice(shown[1:-1]), "middle"
        else:
            name, answer = rng.choice([(shown[0], "start"), (shown[-1], "end")])
        return f"When is the {name} shown: start, middle or end?", answer
    # order
    earlier, later = sorted(rng.sample(shown, 2), key=shown.index)
    first, second = (earlier, later) if yes else (later, earlier)
    return f"Is the {first} shown before the {second}?", "yes" if yes else "no"


# Data files -------------------------------------------------------------------------------


def rows(
    plans: Iterable[ClipPlan], things: Sequence[Thing], *, per_clip: int = 5, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Generate questions about each clip.

    Only clips that show unseen things get questions about such things.

    Args:
        plans: The plans of the clips.
        things: All things that questions may name.
        per_clip: Number of questions about each clip.
        seed: Makes the questions repeatable.

    Yields:
        A row of a data file for each clip: `video`, `questions` and `shots` as (name, start_s, end_s).

    Raises:
        DataError: A clip allows fewer different questions.
    """
    new = {thing.name for thing in things if thing.unseen}
    for plan in plans:
        also_visible = {name for t in things if t.name in plan.names for name in t.also}
        candidates = things if new & set(plan.names) else [t for t in things if not t.unseen]
        names = [thing.name for thing in candidates if thing.name not in also_visible]
        asked = questions(plan, names, random.Random(f"{seed} {plan.key}"), per_clip=per_clip, new=new)
        shots = [[shot.name, shot.start_s, shot.end_s] for shot in plan.shots]
        yield {"video": f"clips/{plan.key}.mp4", "questions": asked, "shots": shots}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of rows."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def majority_accuracy(
    train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """The accuracy, by kind, of always giving the most common training answer to that kind of question.

    It is 0 for a kind that is not in the training rows.
    """

    def answers(rows: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in (question for row in rows for question in row["questions"]):
            counts[question["kind"]][question["answer"]] += 1
        return counts

    guesses = {kind: counts.most_common(1)[0][0] for kind, counts in answers(train).items()}
    tested = sorted(answers(test).items())
    return {kind: counts[guesses.get(kind, "")] / counts.total() for kind, counts in tested}
