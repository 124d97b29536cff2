"""Estimate what a run of `merv fit` needs, and what to change if it does not fit.

The command takes the arguments of `merv fit`. No weights are read: one training step runs on tensors that
have shapes but no data. If the data file cannot be read, the lengths of texts are guessed.

Hours are the FLOPs divided by the GPU's peak in bf16 and by the utilization. They do not include video
decoding and validation. Large runs reach a utilization of 0.3 to 0.5, small models and batches less.

examples:
  merv plan --config demo --gpu 4090
  merv plan --config mine.yaml --data.batch_size=8 --model.gradient_checkpointing=true --trainer.devices=8
  merv plan --config mine.yaml --gpu a100 --utilization 0.35 --json
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from merv.training.recipes import check_keys, with_recipes

# Device → dense bf16 TFLOPS with fp32 accumulation, from its datasheet, and memory in units
# of 10⁹ bytes, about what torch reports: an "80 GB" H100 has 80 GiB = 85.
DEVICES = {
    "b200": (2250, 192),
    "h200": (989, 150),
    "h100": (989, 85),
    "a100": (312, 85),
    "a100-40": (312, 42),
    "l40s": (362, 48),
    "l40": (181, 48),
    "a6000": (155, 51),
    "a10": (125, 24),
    "l4": (121, 24),
    "5090": (210, 34),
    "4090": (165, 25),
    "3090": (71, 25),
    "cpu": (None, math.inf),  # speed and memory differ from machine to machine
}
USABLE = 0.92  # share of a device's memory; the rest is for the context, workspaces and fragmentation
ADVICE = """
It does not fit. These options need less memory, the least costly first:
  a smaller --data.batch_size with more --trainer.accumulate_grad_batches
  --model.gradient_checkpointing=true: a third slower
  --trainer.precision=bf16-mixed; --model.dtype=bf16 if the language model is frozen
  --model.feature_store=FOLDER: encoders run before training
  --model.trainable='[projector,mixer,lora]' instead of llm, and --model.quantize=nf4
  --trainer.strategy=sharded --trainer.devices=N
  --model.grid='[t,h,w]' with fewer cells"""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of `merv plan` itself; return them, and the arguments of `merv fit`."""
    parser = argparse.ArgumentParser(
        "merv plan",
        usage="merv plan [OPTION ...] [ARGUMENT OF merv fit ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", choices=DEVICES, default="h100", help="the GPU (default: %(default)s)")
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="share of the GPU's peak speed that the run reaches (default: %(default)s)",
    )
    parser.add_argument("--tflops", type=float, help="peak speed in TFLOP/s, for a device not in the list")
    parser.add_argument("--memory", type=float, help="memory in GB, for a device not in the list")
    parser.add_argument(
        "--samples", type=int, default=256, help="number of samples to read (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_known_args(argv)


def fit_parser() -> Any:
    """Return a parser of the arguments of `merv fit`."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from jsonargparse import ActionConfigFile, ArgumentParser
    from lightning import Trainer

    from merv.data.module import ChatData
    from merv.training.checkpointing import Checkpoints
    from merv.training.module import Training

    parser = ArgumentParser("merv plan")
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.add_class_arguments(Training, "model")
    parser.add_class_arguments(ChatData, "data")
    parser.add_class_arguments(Checkpoints, "checkpoints")
    for without_effect in ("sample_answers", "seed_everything", "ckpt_path"):
        parser.add_argument(f"--{without_effect}", type=Any)
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the plan; return 1 if the run does not fit."""
    options, rest = parse(argv)
    rest = with_recipes(rest)
    check_keys(rest)
    from merv.training.module import check_end
    from merv.training.plan import make_plan

    parser = fit_parser()
    config = parser.parse_args(rest)
    check_end(config.trainer)
    built = parser.instantiate_classes(config)
    gpu = options.gpu != "cpu"
    plan = make_plan(built.model, built.data, setup_of(config), gpu=gpu, num_samples=options.samples)
    tflops, memory = DEVICES[options.gpu]
    tflops, memory = options.tflops or tflops, (options.memory or memory) * 1e9
    fits = plan.peak <= USABLE * memory
    hours = plan.hours(tflops, options.utilization) if tflops else None
    if options.json:
        result = {"peak_bytes": plan.peak, "fits": fits, "hours": hours}
        print(json.dumps({**asdict(plan), **result}, indent=1))
    else:
        show(plan, options, memory, hours)
        if not fits:
            print(ADVICE)
    return 0 if fits else 1


def setup_of(config: Any) -> Any:
    """Read the options of the trainer and of the checkpoints into the Setup of a plan."""
    from merv.training.plan import Setup

    trainer, devices = config.trainer, config.trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    strategy = str(trainer.strategy).lower()
    return Setup(
        devices=max(count, 1) * trainer.num_nodes,
        accumulate=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        limit_train_batches=trainer.overfit_batches or trainer.limit_train_batches or 1.0,
        precision=str(trainer.precision or "32-true"),
        sharded=any(name in strategy for name in ("sharded", "fsdp", "modelparallel")),
        every_n_steps=config.checkpoints.every_n_steps,
        save_total_limit=config.checkpoints.save_total_limit,
        saves_checkpoints=trainer.enable_checkpointing is not False,
        keeps_best=config.data.val is not None,
    )


# Output -----------------------------------------------------------------------------------------


def show(plan: Any, options: argparse.Namespace, memory: float, hours: float | None) -> None:
    """Print the plan as a table."""
    batches = plan.batches
    device = "your device" if options.tflops or options.memory else options.gpu

    def row(name: str, value: str, note: str = "") -> None:
        print(f"  {name:26}{value:>16}  {note}".rstrip())

    print("Tokens")
    row("per video", f"{plan.visual_tokens:,}")
    source = f"of {batches.measured} samples" if batches.measured else "guessed: the data cannot be read"
    row("per sequence", f"{batches.tokens_mean:,.0f}", f"mean; maximum {batches.tokens_max:,}; {source}")
    row("samples", f"{batches.samples:,}", f"with {batches.videos:,} videos")
    print("Parameters")
    for name, (count, trained) in plan.parts.items():
        row(name, f"{count:,}", "trained" if trained else "frozen")
    print("Memory per device")
    for name, count in plan.memory.items():
        row(name, size(count))
    share = f"{plan.peak / memory:.0%} of {size(memory)} on {device}; leave {1 - USABLE:.0%} free"
    row("total", size(plan.peak), "" if math.isinf(memory) else share)
    print("Run")
    step_flops = sum(plan.flops.values())
    row("step", f"{step_flops / 1e12:,.3g} TFLOP", f"on each device; {plan.global_batch} samples on all")
    if plan.stores_features:
        row("encoders, once per video", f"{plan.encode_flops / 1e12:,.3g} TFLOP")
    row("steps", "?" if plan.steps is None else f"{plan.steps:,}")
    if hours is not None:
        note = f"on {device} at {options.utilization:.0%} of its peak (assumed), without decoding"
        row("hours", f"{hours:,.2g}", note)
    if plan.checkpoints is None:
        row("disk", "?", f"features {size(plan.store_bytes)}, and all checkpoints")
    else:
        disk = plan.store_bytes + plan.trained_bytes * (1 + 3 * plan.checkpoints)  # with AdamW's moments
        row("disk", size(disk), f"features {size(plan.store_bytes)}, checkpoints: {plan.checkpoints}")


def size(count: float) -> str:
    """Format a number of bytes.

    >>> size(2_500_000_000), size(12_000_000)
    ('2.50 GB', '12.0 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
