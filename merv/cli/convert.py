"""`merv convert`: turn a checkpoint of the released MERV into a folder that `merv ask` loads."""

from __future__ import annotations

import argparse

from merv.cli.ask import name_and_folder

EXAMPLES = """\
examples:
  merv convert latest-checkpoint.pt --config config.json merv-full
  merv convert latest-checkpoint.pt --config config.json merv-full \\
      --llm /models/Llama-2-7b-hf --encoder languagebind=/models/LanguageBind_Video_merge
  merv ask clip.mp4 "What happens?" --model merv-full

The checkpoint holds neither the encoders nor the language model's config and tokenizer. They are loaded
from the hub unless you pass --llm and --encoder. docs/convert.md lists the supported checkpoints.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the .pt file of the released model")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--config", required=True, help="the config.json of the released model")
    parser.add_argument(
        "--llm",
        help="folder or hub id of the config and tokenizer of the language model (default: the hub id of "
        "the release)",
    )
    parser.add_argument(
        "--encoder",
        action="append",
        type=name_and_folder,
        default=[],
        metavar="NAME=FOLDER",
        help="folder or hub id of an encoder's weights; can be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint and print which tensors were left out."""
    from merv.models.convert_released_merv import convert

    encoders = dict(args.encoder)
    left_out = convert(args.checkpoint, args.config, args.out, llm=args.llm, encoders=encoders)
    for name, reason in left_out.items():
        print(f"left out {name}: {reason}")
    print(f"The model is in {args.out}: merv ask VIDEO QUESTION --model {args.out}")
    return 0
