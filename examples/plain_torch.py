"""Train merv's model in your own loop, with plain PyTorch.

    python examples/plain_torch.py
    python examples/plain_torch.py --llm FOLDER --encoders dinov2 siglip --data train.jsonl --out model

Without options, the script trains tiny random parts on clips of one color, takes less than a minute, and
prints the saved model's answer about a clip that it was not trained on. The loss is summed over the answer
tokens, and the gradient is divided by the number of answer tokens in the whole step. So every token has the
same weight, however the step is split into micro-batches.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merv import MultiEncoder, VideoLLM, user_message
from merv.data.sources import open_samples
from merv.models.llm import load_llm
from merv.testing import tiny_llm

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "navy blue": (20, 30, 140)}
Group = Sequence[list[dict[str, Any]]]  # conversations about the same video


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, train, save, load, ask."""
    args = parser(__doc__, "outputs/plain_torch").parse_args(arguments)
    model, groups = prepare(args)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train(model, groups, steps=args.steps, batch=args.batch, accumulate=args.accumulate, lr=args.lr)
    model.save_pretrained(args.out)
    answer(args.out, groups if args.data else [[user_message("Which color?", clip((200, 50, 45)))]])


def train(
    model: VideoLLM,
    groups: Sequence[Group],
    *,
    steps: int,
    batch: int,
    accumulate: int,
    lr: float,
    seed: int = 0,
) -> None:
    """Run AdamW for `steps` steps, each of `accumulate` passes over `batch` groups."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        total, tokens = 0.0, 0
        for _ in range(accumulate):
            out = model(rng.choices(groups, k=batch))
            out.loss_sum.backward()
            total, tokens = total + out.loss_sum.item(), tokens + out.num_tokens
        for parameter in trainable:
            if parameter.grad is not None:
                parameter.grad /= tokens  # the number is known only after the last pass
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            print(f"step {step}: loss {total / tokens:.3f}")


# Shared by both examples ------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> tuple[VideoLLM, list[Group]]:
    """Return the model and the groups of conversations to train on."""
    torch.manual_seed(0)
    llm, trainable = args.llm, ["projector", "mixer"]
    if llm is None:
        llm = args.out.with_name(f"{args.out.name}-llm")
        tiny_llm(llm)
        trainable.append("llm")  # its weights are random
    model = build(llm, args.encoders)
    model.train_only(args.trainable or trainable)
    groups = [sample.conversations for sample in open_samples(args.data)] if args.data else colors()
    return model, groups


def build(llm: str | Path, encoders: Sequence[str]) -> VideoLLM:
    """Connect encoders to a language model."""
    language_model, tokenizer = load_llm(llm)
    embeddings = language_model.get_input_embeddings().weight
    vision = MultiEncoder(encoders, grid=(4, 4, 4), output_dim=embeddings.shape[1])
    model = VideoLLM(language_model, tokenizer, vision)
    model.fusion.init_scale(embeddings.float().pow(2).mean().sqrt().item())  # same scale as words
    return model


def colors() -> list[Group]:
    """Three clips with one question each; the answers differ in length."""
    return [[user_message("Which color?", clip(color), answer=name)] for name, color in COLORS.items()]


def clip(color: tuple[int, int, int]) -> Tensor:
    """A video of one color, uint8 [8, 3, 32, 32]; a path works, too."""
    return torch.tensor(color, dtype=torch.uint8)[None, :, None, None].expand(8, 3, 32, 32)


def answer(folder: Path, groups: Sequence[Group]) -> None:
    """Print the saved model's answer to the first question."""
    model = VideoLLM.from_pretrained(folder)
    question = [turn for turn in groups[0][0] if turn["role"] != "assistant"]
    print("answer:", *model.generate([question], max_new_tokens=16))


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The command-line options of both examples."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--llm", help="folder or hub id of a language model; default: a tiny random one")
    options.add_argument("--encoders", nargs="+", default=["fake", "fake/video"], help="see `merv encoders`")
    options.add_argument("--data", help="a data file as for `merv fit`; default: clips of three colors")
    options.add_argument(
        "--trainable", nargs="+", help="parts to train; default: projector mixer, and llm if it is random"
    )
    options.add_argument("--out", type=Path, default=Path(out), help=f"folder for the model; default: {out}")
    options.add_argument("--steps", type=int, default=30, help="optimizer steps; default: 30")
    options.add_argument("--batch", type=int, default=2, help="videos per micro-batch; default: 2")
    options.add_argument("--accumulate", type=int, default=2, help="micro-batches per step; default: 2")
    options.add_argument("--lr", type=float, default=1e-2, help="learning rate; default: 0.01")
    return options


if __name__ == "__main__":
    main()
