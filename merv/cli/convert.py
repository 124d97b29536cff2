"""`merv convert`: a checkpoint of the released MERV as a folder of ours."""

from __future__ import annotations

import argparse

EXAMPLES = """\
examples:
  merv convert latest-checkpoint.pt --config config.json merv-full
  merv convert latest-checkpoint.pt --config config.json merv-full \\
      --llm /models/Llama-2-7b-hf --encoder languagebind=/models/LanguageBind_Video_merge
  merv ask clip.mp4 "What happens?" --model merv-full

The encoders are not in the checkpoint, nor are configuration and tokenizer of the language model: they
come from the hub unless folders are given.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `merv convert` takes."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", help="the .pt file of the released model")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--config", required=True, help="the config.json beside it")
    parser.add_argument("--llm", help="folder or hub id of the language model it was trained from")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="where an encoder's weights are, if not on the hub",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and tell what was left out."""
    from merv.models.convert_released_merv import convert

    convert(
        args.checkpoint,
        args.config,
        args.out,
        llm=args.llm,
        encoders=dict(pair.partition("=")[::2] for pair in args.encoder),
        say=lambda line: print(line, flush=True),
    )
    print(f'written to {args.out}: merv ask CLIP "QUESTION" --model {args.out}')
    return 0
