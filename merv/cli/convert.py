"""Turn a checkpoint of the released MERV into a folder that `merv ask` loads.

The checkpoint holds neither the encoders nor the language model's config and tokenizer. They are loaded
from the hub unless you pass --llm and --encoder. docs/convert.md lists the supported checkpoints.

examples:
  merv convert latest-checkpoint.pt --config config.json merv-full
  merv convert latest-checkpoint.pt --config config.json merv-full \\
      --llm /models/Llama-2-7b-hf --encoder languagebind=/models/LanguageBind_Video_merge
  merv ask clip.mp4 "What happens?" --model merv-full
"""

from __future__ import annotations

import argparse

from merv.cli.ask import add_sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv convert`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the .pt file of the released model")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--config", required=True, help="the config.json of the released model")
    add_sources(parser, "if it is not that of the release")


def run(args: argparse.Namespace) -> None:
    """Convert the checkpoint and print which tensors were left out."""
    from merv.models.convert_released_merv import convert

    left_out = convert(args.checkpoint, args.config, args.out, llm=args.llm, encoders=dict(args.encoder))
    for name, reason in left_out.items():
        print(f"left out {name}: {reason}")
    print(f"The model is in {args.out}: merv ask VIDEO QUESTION --model {args.out}")
