"""`merv consolidate`: one folder of a checkpoint that several processes wrote."""

from __future__ import annotations

import argparse

EXAMPLES = """\
example:
  merv consolidate outputs/mine/checkpoints/step=500 outputs/mine/model

The model has to fit into this machine's memory; no GPU is needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `merv consolidate` takes."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", help="the folder of a sharded checkpoint")
    parser.add_argument("out", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    """Consolidate, and say where the model is."""
    from merv.training.sharding import consolidate

    consolidate(args.checkpoint, args.out)
    print(f'written to {args.out}: merv ask CLIP "QUESTION" --model {args.out}')
    return 0
