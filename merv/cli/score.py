"""Score saved predictions, with 95 % intervals over videos. No model is needed.

examples:
  merv score predictions.jsonl
  merv score predictions.jsonl --json

A line of the file is a JSON object with `answer` (what is right) and `output` (what the model said), and, if
there are any, `options` (then `answer` is the number, letter or text of one), `video`, `kind`, `id`,
`question` and `log_likelihoods` (a number per option):

  {"id": "q1", "video": "a.mp4", "kind": "count", "answer": ["2", "two"], "output": "There are two."}
  {"id": "q2", "video": "a.mp4", "options": ["a dog", "a cat"], "answer": "B", "output": "The answer is B."}

Every item counts: an answer that is empty, refuses or cannot be parsed is wrong. The score of an item is
`likelihood` (the likeliest option is right) or else `choice` (the option that the output names is right); of
an open question, `normalized` (equal without case, punctuation and articles). See docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merv.evaluation.predictions import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv score` to `parser`."""
    parser.add_argument("predictions", metavar="PREDICTIONS", help="a JSONL file of predictions")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row of the table")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from merv.evaluation.predictions import read_predictions, table

    rows = table(read_predictions(args.predictions))
    print("\n".join(map(as_json, rows)) if args.json else as_text(rows))


def as_json(row: Row) -> str:
    """A row of the table as a JSON object."""
    metrics = {name: vars(value) for name, value in row.metrics.items()}
    return json.dumps(vars(row) | {"metrics": metrics})


def as_text(rows: list[Row]) -> str:
    """The table as text."""
    header = ["", "items", "videos", "score", "95 % interval", "not parsed"]
    others = [name for name in rows[0].metrics if name != "score"]
    has_both = any(row.disagreement is not None for row in rows)
    lines = [[*header, *others, *(["disagreement"] if has_both else [])]]
    for row in rows:
        score = row.metrics["score"]
        cells = [row.name, str(score.items), str(score.clusters), f"{score.mean:.1%}"]
        cells += [f"{score.low:.1%} – {score.high:.1%}", f"{row.not_parsed:.1%}"]
        cells += [f"{row.metrics[name].mean:.1%}" if name in row.metrics else "" for name in others]
        if has_both:
            cells.append("" if row.disagreement is None else f"{row.disagreement:.1%}")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
