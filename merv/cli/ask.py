"""`merv ask`: a question about a video, answered by a trained model."""

from __future__ import annotations

import argparse
import logging
import sys

EXAMPLES = """\
examples:
  merv ask clip.mp4 "What is shown first? Answer in one word." --model outputs/demo/model
  merv ask a.mp4 b.mp4 "Which of the two shows a cat?" --model FOLDER
  merv ask "" "What is a video?" --model FOLDER            text only: no video

A video is anything with pictures in it: a file, an animated GIF, a still, a folder of frames.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `merv ask` takes."""
    parser.epilog = EXAMPLES
    parser.add_argument("video", nargs="+", help="one or more videos or images; '' for none")
    parser.add_argument("question", help="the question, in quotes")
    parser.add_argument("--model", required=True, help="a folder that `merv fit` or save_pretrained wrote")
    parser.add_argument("--llm", help="where its language model is now, if not where it was in training")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="where an encoder's weights are now, if not where they were in training",
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="a plug-in that the model may use though no installed package registers it: its code is run",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the LLM (default: as trained)")
    parser.add_argument("--quantize", choices=["nf4", "int8"], help="its weights, by bitsandbytes")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit (default: %(default)s)")
    parser.add_argument("--weights", action="store_true", help="also print how much each encoder counted")


def run(args: argparse.Namespace) -> int:
    """Print the answer as it comes."""
    from transformers.utils import logging as transformers_logging

    from merv.cli.main import look_here
    from merv.features.store import FeatureStore
    from merv.models.chat import user_message
    from merv.models.video_llm import VideoLLM
    from merv.utils.plugins import trust

    transformers_logging.disable_progress_bar()
    logging.getLogger("merv").setLevel(logging.WARNING)
    videos = [video for video in args.video if video]
    if args.trust:
        look_here()
    for name in args.trust:
        trust(name)
    moved = dict(pair.partition("=")[::2] for pair in args.encoder)
    model = VideoLLM.from_pretrained(
        args.model,
        llm=args.llm,
        weights=moved,
        dtype=args.dtype,
        quantize=args.quantize,
        feature_store=FeatureStore(),  # the encoders run once, for the answer and for the weights
    ).to(args.device)
    conversation = user_message(args.question, *videos)
    for piece in model.stream(conversation, max_new_tokens=args.max_new_tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if args.weights and videos:
        weights = model.encode(conversation).mix_weights  # [videos, E, t, h, w]
        if weights is None:
            sys.stdout.write("weights: this mixer has none\n")
        else:
            shares = (weights.sum(dim=(0, 2, 3, 4)) / weights.sum()).tolist()
            said = ", ".join(
                f"{n} {share:.0%}" for n, share in zip(model.vision.encoders, shares, strict=True)
            )
            sys.stdout.write(f"weights: {said}\n")
    return 0
