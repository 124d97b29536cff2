"""`merv data check`: check a data set before training on it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merv.errors import DataError, WeightsError
from merv.utils.files import remove_leftovers, temporary_beside, write_whole

if TYPE_CHECKING:
    from merv.data.check import Report

EXAMPLES = """\
examples:
  merv data check train.jsonl                      every row and every video, with all cores
  merv data check 'shards/train-{0000..0063}.tar' --report report --clean clean.jsonl
  merv data check train.json --root clips --media decode
  merv data check train.jsonl --against test.jsonl --llm FOLDER --max-tokens 4096

These are invalid, because they would stop training or should not be learned: malformed files and rows, videos
and images that cannot be read or are too small, conversations that are too long or repeated, and videos of
the evaluation data. These are only notes: copies of a video under another name, questions of the evaluation
data about other videos, rows with follow-up questions, and members of a shard that do not belong to a sample.
The exit status is 1 if anything is invalid. docs/data.md describes the rows.
"""
MAX_SHOWN = 20  # findings of each list on the screen
QUANTILES = {"min": 0.0, "median": 0.5, "95 %": 0.95, "max": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv data`."""
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="read all samples, videos and images, and list what is invalid and why",
        description="Read all samples, videos and images, and list what is invalid and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "files", nargs="+", metavar="FILE", help=".jsonl, .json, .parquet, .tar or a saved dataset"
    )
    check.add_argument("--root", help="folder that paths in rows start at (default: the folder of each file)")
    check.add_argument(
        "--media",
        choices=["none", "probe", "decode"],
        default="probe",
        help="probe: open each video and image; decode: also decode 8 frames of each; "
        "none: only look for copies (default: probe)",
    )
    check.add_argument("--llm", help="folder or hub id of a language model, whose tokenizer measures lengths")
    check.add_argument(
        "--visual-tokens",
        type=int,
        default=1024,
        help="tokens that a video or image counts as (default: 1024, a grid of 16×8×8)",
    )
    check.add_argument("--max-tokens", type=int, help="longer conversations are invalid")
    check.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation data, which must not be in the training data",
    )
    check.add_argument("--report", metavar="FOLDER", help="write report.md and report.json to this folder")
    check.add_argument("--clean", metavar="OUT.jsonl", help="write the valid samples to this file")
    check.add_argument("--num-workers", type=int, help="number of processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Check the files and write the requested outputs; return 1 if anything is invalid."""
    from merv.data.check import check_data

    folder, clean = (Path(os.path.expanduser(path)) if path else None for path in (args.report, args.clean))
    for created in folder, clean and clean.parent:
        if created:
            with _write_errors(created):  # before the work, not after it
                created.mkdir(parents=True, exist_ok=True)
    report = check_data(
        args.files,
        root=args.root,
        media=args.media,
        tokenizer=_tokenizer(args.llm) if args.llm else None,
        visual_tokens=args.visual_tokens,
        max_tokens=args.max_tokens,
        against=args.against,
        num_workers=(os.cpu_count() or 1) if args.num_workers is None else args.num_workers,
        progress=True,
    )
    method = "measured by the tokenizer" if args.llm else "estimated at 4 characters per token"
    lengths = f"Lengths of texts are {method}; a video or image counts as {args.visual_tokens} tokens."
    if folder:
        write_report(report, lengths, folder)
    text = summary(report, lengths, MAX_SHOWN)
    if folder:
        text += f"Wrote report.md and report.json to {args.report}.\n"
    # Names of files may hold bytes that are not text
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    if clean:
        with _write_errors(clean):
            write_clean(report, clean)
        print(f"Wrote {len(report.valid)} of {len(report.samples)} rows to {args.clean}.")
    return int(bool(report.invalid))


def summary(report: Report, lengths: str, max_shown: int | None = None) -> str:
    """Return the report as Markdown, with at most `max_shown` invalid findings and as many notes."""
    lines = ["| what | count or value |", "|---|---|"]
    for name, counter in report.counts.items():
        lines.append(f"| {name} | {', '.join(f'{n} {category}' for category, n in counter.most_common())} |")
    for name, values in quantiles(report).items():
        lines.append(f"| {name} | {', '.join(f'{label} {value:g}' for label, value in values.items())} |")
    for title, findings in ("Invalid", report.invalid), ("Notes", report.notes):
        kinds = Counter(finding.kind for finding in findings)
        lines += ["", f"{title}: {', '.join(f'{n} {kind}' for kind, n in kinds.items()) or 'none'}"]
        lines += [f"- {finding.origin}: {finding.reason}" for finding in findings[:max_shown]]
        if max_shown is not None and len(findings) > max_shown:
            lines.append(f"- … and {len(findings) - max_shown} more; --report FOLDER lists them all")
    return "\n".join([*lines, "", lengths, ""])


def quantiles(report: Report) -> dict[str, dict[str, float]]:
    """Return quantiles of each measured number."""
    import numpy as np

    return {
        name: {label: round(float(np.quantile(values, q)), 2) for label, q in QUANTILES.items()}
        for name, values in report.numbers.items()
    }


def write_report(report: Report, lengths: str, folder: Path) -> None:
    """Write report.md for people and report.json for programs."""
    content = {
        "counts": report.counts,
        "quantiles": quantiles(report),
        "lengths": lengths,
        "invalid": [vars(finding) for finding in report.invalid],
        "notes": [vars(finding) for finding in report.notes],
    }
    texts = {
        "report.md": summary(report, lengths),
        "report.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
    }
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            # Names of files may hold bytes that are not text; they become the escapes of JSON
            write_whole(folder / name, text.encode("utf-8", "backslashreplace"))


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}. Choose another path.") from error


def write_clean(report: Report, path: Path) -> None:
    """Write the valid samples as JSONL; videos in shards or tables become files in a folder beside it."""
    from merv.data.samples import row_of

    path.parent.mkdir(parents=True, exist_ok=True)
    media_folder = path.with_suffix(".media")

    def path_of(source: Any) -> str:
        if isinstance(source, str):
            return os.path.relpath(source, path.parent)
        from merv.features.keys import content_digest

        file = media_folder / (content_digest(source)[:32] + Path(getattr(source, "name", "")).suffix)
        if not file.exists():
            media_folder.mkdir(exist_ok=True)
            with temporary_beside(file) as temporary:
                with temporary.open("wb") as out:
                    if isinstance(source, bytes):
                        out.write(source)
                    else:
                        source.seek(0)  # `content_digest` has read it
                        shutil.copyfileobj(source, out)
                temporary.replace(file)
        return os.path.relpath(file, path.parent)

    with temporary_beside(path) as temporary:  # `path` may be one of the files that are read
        with temporary.open("w", encoding="utf-8") as out:
            for index in report.valid:
                row = row_of(report.samples[index], path_of)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(path)
    remove_leftovers(path.parent, path.name)
    remove_leftovers(media_folder)


def _tokenizer(source: str) -> Any:
    from merv.models.llm import SMOLLM2, load_tokenizer
    from merv.utils.assets import smollm2_folder

    try:
        return load_tokenizer(smollm2_folder() if source == SMOLLM2 else source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"Could not load a tokenizer from {source!r}: {reason} Pass the folder or hub id of a "
            "language model."
        ) from error
