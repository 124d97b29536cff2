"""Write the mean of several checkpoints of one model.

examples:
  merv average outputs/mine/checkpoints/step=* --out outputs/mine/mean
  merv average a b --coefficients 3 1 --out c
  merv ask clip.mp4 "What happens?" --model outputs/mine/mean
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv average`."""
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="folders of trained models or checkpoints"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--coefficients",
        nargs="+",
        type=float,
        help="a number ≥ 0 for each checkpoint, in order; only their ratios matter (default: equal)",
    )


def run(args: argparse.Namespace) -> None:
    """Average the checkpoints and print the path of the result."""
    from merv.checkpoints.average import average

    average(args.checkpoints, args.out, args.coefficients)
    print(f"The mean of {len(args.checkpoints)} checkpoints is in {args.out}")
