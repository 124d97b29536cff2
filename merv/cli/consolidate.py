"""`merv consolidate`: turn a sharded checkpoint into a folder that `merv ask` loads."""

from __future__ import annotations

import argparse

EXAMPLES = """\
example:
  merv consolidate outputs/mine/checkpoints/step=500 outputs/mine/model

The trained parts must fit into this machine's memory. No GPU is needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv consolidate`."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a sharded checkpoint")
    parser.add_argument("out", metavar="OUT", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    """Consolidate the checkpoint and print the path of the model."""
    from merv.training.sharding import consolidate

    consolidate(args.checkpoint, args.out)
    print(f"The model is in {args.out}: merv ask VIDEO QUESTION --model {args.out}")
    return 0
