"""Ask a trained model questions about videos.

examples:
  merv ask clip.mp4 "What is shown first? Answer in one word." --model outputs/demo/model
  merv ask a.mp4 b.mp4 "Which of the two shows a cat?" --model FOLDER
  merv ask clip.mp4 --question "What is shown first?" --question "Where is it?" --model FOLDER
  merv ask clip.mp4 "Tell a story." --model FOLDER --temperature 0.7 --top-p 0.9
  merv ask "" "What is a video?" --model FOLDER            text only, without a video

A video can be a video file, an animated GIF, an image, or a folder of frames. Each question is asked
separately, about all the videos; the encoders run once. Without --temperature and --top-p, the most likely
tokens are chosen, so the same question gets the same answer.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merv.errors import PromptError, UnreadableVideo

if TYPE_CHECKING:
    from merv.models.chat import Conversation
    from merv.models.video_llm import VideoLLM

USAGE = """\
%(prog)s VIDEO ... QUESTION --model FOLDER [options]
       %(prog)s VIDEO ... --question QUESTION [--question QUESTION ...] --model FOLDER [options]"""
FORMS = 'Forms: merv ask VIDEO ... "QUESTION" --model FOLDER, or with --question "QUESTION".'
GENERATION_OPTIONS = (
    "max_new_tokens",
    "keep_thinking",
    "temperature",
    "top_p",
)  # options of `VideoLLM.stream`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv ask` to `parser`."""
    parser.usage = USAGE
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="VIDEO ... QUESTION",
        help="one or more videos or images, or '' for none; then the question, in quotes, unless you pass "
        "--question",
    )
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        help="a question about all the videos; can be repeated",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder written by `merv fit` or save_pretrained, or the hub id of such a model (owner/name or "
        "owner/name@revision)",
    )
    add_sources(parser, "if it has moved since training")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="a class that the model needs and no installed package registers. Its module is imported, so "
        "its code runs; can be repeated",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="dtype of the language model (default: as in training)"
    )
    parser.add_argument(
        "--quantize", choices=["nf4", "int8"], help="quantize the language model with bitsandbytes"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        default=None,
        help="compare all files of the model with their saved SHA-256 (default: those of up to 256 MiB)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_number(int, "a whole number of at least 1", lambda n: n >= 1),
        default=64,
        metavar="N",
        help="maximum number of new tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=_number(float, "a number of at least 0", lambda t: 0 <= t < float("inf")),
        metavar="T",
        help="sample the answer at this temperature; 0: choose the most likely tokens",
    )
    parser.add_argument(
        "--top-p",
        type=_number(float, "a number above 0 and up to 1", lambda p: 0 < p <= 1),
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P",
    )
    parser.add_argument(
        "--keep-thinking", action="store_true", help="also print the thinking of a reasoning model"
    )
    parser.add_argument(
        "--mix-weights", action="store_true", help="also print the mixer's average weight of each encoder"
    )


def add_sources(parser: argparse.ArgumentParser, when: str) -> None:
    """Add the options that say where the parts are that a model folder does not contain."""
    parser.add_argument("--llm", help=f"folder or hub id of the language model, {when}")
    parser.add_argument(
        "--encoder",
        action="append",
        type=_name_and_folder,
        default=[],
        metavar="NAME=FOLDER",
        help=f"folder or hub id of an encoder's weights, {when}; can be repeated",
    )


def _name_and_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, such as siglip=/models/siglip; got {text!r}")
    return name, folder


def _number(convert: type, expected: str, is_valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse: a number that is valid."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if is_valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")

    return parse


def run(args: argparse.Namespace) -> None:
    """Print the answers while they are generated."""
    from transformers.utils import logging as transformers_logging

    from merv.models.chat import user_message

    videos, questions = videos_and_questions(args.inputs, args.question)
    transformers_logging.disable_progress_bar()
    logging.getLogger("merv").setLevel(logging.WARNING)
    model = _load(args)
    options = {name: getattr(args, name) for name in GENERATION_OPTIONS}
    for question in questions:
        conversation = user_message(question, *videos)
        if len(questions) > 1:
            print(f"Q: {question}\nA: ", end="", flush=True)
        answer: Any = model.stream(conversation, **options)  # a generator
        try:
            with closing(answer):  # so that Ctrl-C stops the thread that generates it
                for piece in answer:
                    print(piece, end="", flush=True)
        finally:
            print(flush=True)
        if args.mix_weights and videos:
            print("mix_weights:", _weights(model, conversation))


def videos_and_questions(inputs: list[str], questions: list[str]) -> tuple[list[str], list[str]]:
    """Split the positional arguments: without --question, the last one is the question.

    Raises:
        PromptError: There is no question, or a question is the path of a video.
        UnreadableVideo: A video does not exist.

    >>> videos_and_questions(["", "What is a video?"], [])
    ([], ['What is a video?'])
    """
    from merv.data.sources import IMAGES, VIDEOS

    if not questions:
        if len(inputs) < 2:
            raise PromptError(f"Expected videos and a question, got {inputs}. {FORMS}")
        inputs, questions = inputs[:-1], inputs[-1:]
    for question in questions:
        if os.path.exists(question) or Path(question).suffix.lower() in (*VIDEOS, *IMAGES):
            raise PromptError(f"Expected a question, got the path {question!r}. {FORMS}")
    videos = [video for video in inputs if video]
    for video in videos:
        if not os.path.exists(video):
            raise UnreadableVideo(f"The video {video!r} does not exist. {FORMS}")
    return videos, questions


def _load(args: argparse.Namespace) -> VideoLLM:
    import torch

    from merv.cli.main import import_from_cwd
    from merv.features.store import FeatureStore
    from merv.models.video_llm import VideoLLM
    from merv.utils.plugins import trust
    from merv.utils.torch_modules import bfloat16_is_slow

    if args.trust:
        import_from_cwd()
    for name in args.trust:
        trust(name)
    model = VideoLLM.from_pretrained(
        args.model,
        llm=args.llm,
        weights=dict(args.encoder),
        dtype=args.dtype,
        quantize=args.quantize,
        verify=args.verify,
        feature_store=FeatureStore(),  # so that the encoders run once for all questions and --mix-weights
    ).to(args.device)
    if args.device == "cpu" and model.llm.dtype == torch.bfloat16 and bfloat16_is_slow():
        print("merv: bfloat16 is slow on this CPU. --dtype fp32 is many times faster.", file=sys.stderr)
    return model


def _weights(model: VideoLLM, conversation: Conversation) -> str:
    """Describe the mixer's average weight of each encoder."""
    weights = model.encode(conversation).mix_weights  # [videos, E, t, h, w]
    if weights is None:
        return "none, this mixer does not weight encoders"
    shares = (weights.sum(dim=(0, 2, 3, 4)) / weights.sum()).tolist()
    return ", ".join(f"{name} {share:.0%}" for name, share in zip(model.vision.encoders, shares, strict=True))
