"""Train with a loop of your own around merv's model: any optimizer, any loop, plain PyTorch.

    python examples/plain_torch.py
    python examples/plain_torch.py --llm FOLDER --encoders dinov2 siglip --data train.jsonl --out model

Without options it takes tiny random parts and clips of one color, and ends within a minute in what the
saved model says of a clip that it was not trained on. The loss is summed over the answers' tokens, and
the gradient divided by their number in the whole step, so that each token counts the same, however many
passes a step has and however long its answers are.
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
Group = Sequence[list[dict[str, Any]]]  # conversations about one video, which share it


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, train, save, load, ask."""
    args = parser(__doc__, "outputs/plain_torch").parse_args(arguments)
    model, groups = prepared(args)
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
    """`steps` steps of AdamW, each of `accumulate` passes over `batch` groups."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    drawn = random.Random(seed)
    for step in range(1, steps + 1):
        total, tokens = 0.0, 0
        for _ in range(accumulate):
            out = model(drawn.choices(groups, k=batch))
            out.loss_sum.backward()
            total, tokens = total + out.loss_sum.item(), tokens + out.num_tokens
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= tokens  # known only now, after the last pass
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            print(f"step {step}: loss {total / tokens:.3f}")


# What both examples begin and end with ------------------------------------------------------


def prepared(args: argparse.Namespace) -> tuple[VideoLLM, list[Group]]:
    """The model, and the groups of conversations that it learns from."""
    torch.manual_seed(0)
    llm, parts = args.llm, ["projector", "mixer"]
    if llm is None:
        llm = args.out.with_name(f"{args.out.name}-llm")
        tiny_llm(llm)
        parts.append("llm")  # a random one has no words yet
    model = build(llm, args.encoders)
    model.train_only(args.train or parts)
    groups = [sample.conversations for sample in open_samples(args.data)] if args.data else colors()
    return model, groups


def build(llm: str | Path, encoders: Sequence[str]) -> VideoLLM:
    """A language model that sees through encoders."""
    loaded, tokenizer = load_llm(llm)
    table = loaded.get_input_embeddings().weight
    vision = MultiEncoder(encoders, grid=(4, 4, 4), output_dim=table.shape[1])
    model = VideoLLM(loaded, tokenizer, vision)
    model.fusion.scale_to(table.float().pow(2).mean().sqrt().item())  # visual tokens as large as words
    return model


def colors() -> list[Group]:
    """A question about each of three clips; the answers differ in length."""
    return [[user_message("Which color?", clip(color), answer=name)] for name, color in COLORS.items()]


def clip(color: tuple[int, int, int]) -> Tensor:
    """A video of one color, uint8 [8, 3, 32, 32]; a path would do as well."""
    return torch.tensor(color, dtype=torch.uint8)[None, :, None, None].expand(8, 3, 32, 32)


def answer(folder: Path, groups: Sequence[Group]) -> None:
    """What the saved model says to the first question."""
    model = VideoLLM.from_pretrained(folder)
    asked = [turn for turn in groups[0][0] if turn["role"] != "assistant"]
    print("answer:", *model.generate([asked], max_new_tokens=16))


def parser(text: str | None, out: str) -> argparse.ArgumentParser:
    """What both examples take."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--llm", help="folder or hub id of a causal language model; default: a tiny random one")
    made.add_argument("--encoders", nargs="+", default=["fake", "fake/video"], help="see `merv encoders`")
    made.add_argument("--data", help="train.jsonl, or whatever `merv fit` reads; default: three colors")
    made.add_argument("--train", nargs="+", help="parts; default: projector mixer, and llm if it is random")
    made.add_argument("--out", type=Path, default=Path(out), help=f"where the model is saved; default: {out}")
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--batch", type=int, default=2, help="videos in a pass")
    made.add_argument("--accumulate", type=int, default=2, help="passes in a step")
    made.add_argument("--lr", type=float, default=1e-2)
    return made


if __name__ == "__main__":
    main()
