"""`merv ask`: ask a trained model a question about a video."""

from __future__ import annotations

import argparse
import logging
import sys

EXAMPLES = """\
examples:
  merv ask clip.mp4 "What is shown first? Answer in one word." --model outputs/demo/model
  merv ask a.mp4 b.mp4 "Which of the two shows a cat?" --model FOLDER
  merv ask "" "What is a video?" --model FOLDER            text only, without a video

A video can be a video file, an animated GIF, an image, or a folder of frames.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv ask` to `parser`."""
    parser.epilog = EXAMPLES
    parser.add_argument("video", nargs="+", help="one or more videos or images; '' for none")
    parser.add_argument("question", help="the question, in quotes")
    parser.add_argument(
        "--model", required=True, help="model folder written by `merv fit` or save_pretrained"
    )
    parser.add_argument(
        "--llm", help="folder or hub id of the language model, if it has moved since training"
    )
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="folder of an encoder's weights, if they have moved since training; can be repeated",
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="plug-in class of the model that no installed package registers; its module is imported",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="dtype of the language model (default: as in training)"
    )
    parser.add_argument(
        "--quantize", choices=["nf4", "int8"], help="quantize the language model with bitsandbytes"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        help="maximum number of new tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", action="store_true", help="also print the mixer's average weight of each encoder"
    )


def run(args: argparse.Namespace) -> int:
    """Print the answer while it is generated."""
    import torch
    from transformers.utils import logging as transformers_logging

    from merv.cli.main import import_from_cwd
    from merv.features.store import FeatureStore
    from merv.models.chat import user_message
    from merv.models.video_llm import VideoLLM
    from merv.utils.plugins import trust
    from merv.utils.torch_modules import bfloat16_is_slow

    transformers_logging.disable_progress_bar()
    logging.getLogger("merv").setLevel(logging.WARNING)
    videos = [video for video in args.video if video]
    if args.trust:
        import_from_cwd()
    for name in args.trust:
        trust(name)
    model = VideoLLM.from_pretrained(
        args.model,
        llm=args.llm,
        weights=dict(pair.partition("=")[::2] for pair in args.encoder),
        dtype=args.dtype,
        quantize=args.quantize,
        feature_store=FeatureStore(),  # so that --weights does not run the encoders again
    ).to(args.device)
    if args.device == "cpu" and model.llm.dtype == torch.bfloat16 and bfloat16_is_slow():
        print("merv: bfloat16 is slow on this CPU. --dtype fp32 is many times faster.", file=sys.stderr)
    conversation = user_message(args.question, *videos)
    for piece in model.stream(conversation, max_new_tokens=args.max_new_tokens):
        print(piece, end="", flush=True)
    print()
    if args.weights and videos:
        weights = model.encode(conversation).mix_weights  # [videos, E, t, h, w]
        if weights is None:
            print("weights: none, this mixer does not weight encoders")
        else:
            shares = (weights.sum(dim=(0, 2, 3, 4)) / weights.sum()).tolist()
            names_and_shares = zip(model.vision.encoders, shares, strict=True)
            print("weights:", ", ".join(f"{name} {share:.0%}" for name, share in names_and_shares))
    return 0
