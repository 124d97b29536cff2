"""`merv data check`: read a whole data set before training does, and say what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merv.errors import WeightsError

if TYPE_CHECKING:
    from merv.data.check import Report

EXAMPLES = """\
examples:
  merv data check train.jsonl                      every row and every video, with all cores
  merv data check 'shards/train-{0000..0063}.tar' --report report --clean clean.jsonl
  merv data check train.json --root clips --media decode
  merv data check train.jsonl --against test.jsonl --llm FOLDER --max-tokens 4096

Bad is what training would stop at or should not see: files and rows that are malformed, videos and images
that cannot be read or are too small, conversations that are too long or come twice, videos of
evaluation data. Notes are copies of a video under another name, and questions of evaluation data about
other videos. The exit status is 1 where something is bad. docs/data.md says what a row may look like.
"""
SHOWN = 20  # findings on the screen
QUANTILES = {"smallest": 0.0, "median": 0.5, "95 %": 0.95, "largest": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `merv data` takes."""
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="read all samples, videos and images; say which are bad and why",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "files", nargs="+", metavar="FILE", help=".jsonl, .json, .parquet, .tar or a saved dataset"
    )
    check.add_argument("--root", help="folder that paths in rows begin at (default: that of the file)")
    check.add_argument(
        "--media",
        choices=["none", "probe", "decode"],
        default="probe",
        help="open each video and image, decode 8 frames of it too, or only look for copies (default: probe)",
    )
    check.add_argument("--llm", help="a language model's folder, whose tokenizer measures lengths")
    check.add_argument(
        "--visual-tokens",
        type=int,
        default=1024,
        help="tokens that a video or image becomes (default: 1024, of a grid of 16×8×8)",
    )
    check.add_argument("--max-tokens", type=int, help="longer conversations are bad")
    check.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="evaluation data, not to be in here"
    )
    check.add_argument("--report", metavar="FOLDER", help="write report.md, report.json and report.png there")
    check.add_argument("--clean", metavar="OUT.jsonl", help="write the samples that are not bad")
    check.add_argument("--workers", type=int, help="processes (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """Check, print the summary, write what was asked for; 1 where something is bad."""
    from merv.data.check import check_data

    report = check_data(
        args.files,
        root=args.root,
        media=args.media,
        tokenizer=_tokenizer(args.llm) if args.llm else None,
        visual_tokens=args.visual_tokens,
        max_tokens=args.max_tokens,
        against=args.against,
        workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
        progress=True,
    )
    how = "by its tokenizer" if args.llm else "estimated, at 4 characters each"
    how = f"Tokens of text {how}, and {args.visual_tokens} for a video or image."
    sys.stdout.write(summary(report, how, SHOWN))
    if args.report:
        write_report(report, how, Path(args.report).expanduser())
        print(f"In {args.report}: report.md, report.json, report.png.")
    if args.clean:
        write_clean(report, Path(args.clean).expanduser())
        print(f"{len(report.good)} of {len(report.samples)} rows are in {args.clean}.")
    return int(bool(report.bad))


def summary(report: Report, how: str, shown: int | None = None) -> str:
    """The report as Markdown; of what is bad and of notes at most `shown` each."""
    lines = ["| what | how many |", "|---|---|"]
    for name, counted in report.counts.items():
        lines.append(f"| {name} | {', '.join(f'{n} {what}' for what, n in counted.most_common())} |")
    for name, numbers in measured(report).items():
        lines.append(f"| {name} | {', '.join(f'{what} {n:g}' for what, n in numbers.items())} |")
    for title, findings in ("Bad", report.bad), ("Notes", report.notes):
        kinds = Counter(finding.kind for finding in findings)
        lines += ["", f"{title}: {', '.join(f'{n} {kind}' for kind, n in kinds.items()) or 'nothing'}"]
        lines += [f"- {finding.origin}: {finding.reason}" for finding in findings[:shown]]
        if shown is not None and len(findings) > shown:
            lines.append(f"- … and {len(findings) - shown} more; --report FOLDER lists them all")
    return "\n".join([*lines, "", how, ""])


def measured(report: Report) -> dict[str, dict[str, float]]:
    """Quantiles of each thing that was measured."""
    import numpy as np

    return {
        name: {what: round(float(np.quantile(values, q)), 2) for what, q in QUANTILES.items()}
        for name, values in report.numbers.items()
    }


def write_report(report: Report, how: str, folder: Path) -> None:
    """report.md, to read; report.json, with everything; report.png, how lengths are distributed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(summary(report, how), encoding="utf-8")
    everything = {
        "counts": report.counts,
        "measured": measured(report),
        "lengths": how,
        "bad": [vars(finding) for finding in report.bad],
        "notes": [vars(finding) for finding in report.notes],
    }
    text = json.dumps(everything, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    _draw(report.numbers, folder / "report.png")


def _draw(numbers: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    drawn = {"tokens of a conversation": "tokens", "seconds of a video": "duration_s"}
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axes, (label, name) in zip(figure.subplots(1, len(drawn)), drawn.items(), strict=True):
        axes.hist(numbers.get(name, []), bins=40, color="#3b6fb6")
        axes.set(xlabel=label, ylabel="how many")
    figure.savefig(path, dpi=110)


def write_clean(report: Report, path: Path) -> None:
    """The good samples as JSONL. Videos that are in shards or tables become files beside it."""
    from merv.data.samples import row_of

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".media")

    def place(source: Any) -> str:
        if isinstance(source, str):
            return os.path.relpath(source, path.parent)
        from merv.features.store import video_key

        file = beside / (video_key(source, "")[:32] + Path(getattr(source, "name", "")).suffix)
        if not file.exists():
            beside.mkdir(exist_ok=True)
            part = file.with_name(f"{file.name}.new")  # what was interrupted is not taken for a copy
            with part.open("wb") as out:
                out.write(source) if isinstance(source, bytes) else shutil.copyfileobj(source, out)
            part.replace(file)
        return os.path.relpath(file, path.parent)

    fresh = path.with_name(f"{path.name}.new")  # `path` may be one of the files that are read
    with fresh.open("w", encoding="utf-8") as file:
        for index in report.good:
            row = row_of(report.samples[index], place)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    fresh.replace(path)


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    from merv.models.llm import SMOLLM2
    from merv.utils.assets import smollm2_folder

    try:
        return AutoTokenizer.from_pretrained(smollm2_folder() if source == SMOLLM2 else source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"There is no tokenizer in {source!r}: {reason} Give a model's folder.") from error
