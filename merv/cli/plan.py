"""`merv plan`: estimate the memory, disk and time of a `merv fit` run, without loading weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from merv.errors import TrainingError
from merv.training.recipes import check_keys, with_recipes
from merv.utils.suggest import nearest

DEFAULT_GPU, DEFAULT_UTILIZATION = "h100", 0.4
USABLE = 0.92  # share of a device's memory; the rest is for the context, workspaces and fragmentation
DESCRIPTION = """\
Estimate what a run of `merv fit` needs: tokens, parameters, FLOPs, memory, disk and hours, and what to change
if it does not fit. It takes the arguments of `merv fit`. No weights are read: one training step runs on
tensors that have shapes but no data. If the data file cannot be read, the lengths of texts are guessed.
"""
EXAMPLES = """\
examples:
  merv plan --config demo --gpu 4090
  merv plan --config mine.yaml --data.batch_size=8 --model.gradient_checkpointing=true --trainer.devices=8
  merv plan --config mine.yaml --gpu a100 --utilization 0.35 --json

Hours are the FLOPs divided by the GPU's peak in bf16 and by the utilization. They do not include video
decoding and validation. Large runs reach a utilization of 0.3 to 0.5, small models and batches less.
"""


def build_parser(recipe: bool = True) -> Any:
    """Return the parser of `merv plan`; without `recipe`, only with its own options, for --help."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ActionConfigFile, ArgumentParser

    from merv.training.plan import GPUS

    parser = ArgumentParser(
        prog="merv plan",
        usage="merv plan [OPTION ...] [OPTION OF merv fit ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a recipe, by name or path")
    parser.add_argument(
        "--gpu", default=DEFAULT_GPU, help=f"{', '.join(GPUS)} or cpu (default: {DEFAULT_GPU})"
    )
    parser.add_argument(
        "--utilization",
        type=float,
        default=DEFAULT_UTILIZATION,
        help=f"share of the GPU's peak speed that the run reaches (default: {DEFAULT_UTILIZATION})",
    )
    parser.add_argument("--tflops", type=float, help="peak speed in TFLOP/s, for a device not in the list")
    parser.add_argument("--memory", type=float, help="memory in GB, for a device not in the list")
    parser.add_argument("--samples", type=int, default=256, help="number of samples to read (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if not recipe:
        return parser
    from lightning import Trainer

    from merv.data.module import ChatData
    from merv.training.checkpointing import Checkpoints
    from merv.training.module import Training

    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.add_class_arguments(Training, "model")
    parser.add_class_arguments(ChatData, "data")
    parser.add_class_arguments(Checkpoints, "checkpoints", instantiate=False)
    parser.add_argument("--sample_answers", type=dict, default={}, help="as for merv fit; has no effect")
    for option in ("seed_everything", "ckpt_path"):
        parser.add_argument(f"--{option}", help="as for merv fit; has no effect")
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the plan; return 1 if the run does not fit."""
    if set(argv) & {"-h", "--help"}:
        build_parser(recipe=False).print_help()
        return 0
    from merv.training.plan import GPUS, make_plan

    argv = with_recipes(argv)
    check_keys(argv, also=("gpu", "utilization", "tflops", "memory", "samples", "json"))
    parser = build_parser()
    config = parser.parse_args(argv)
    if config.gpu not in (*GPUS, "cpu"):
        raise TrainingError(
            f"Unknown GPU {config.gpu!r}.{nearest(config.gpu, GPUS)} Available: {', '.join(GPUS)}, cpu. For "
            "another device, set --tflops and --memory."
        )
    device = GPUS.get(config.gpu)
    tflops = config.tflops or (device.tflops if device else None)
    memory = (config.memory or (device.memory if device else math.inf)) * 1e9
    built = parser.instantiate_classes(config)
    checkpoints = config.checkpoints.save_total_limit + (config.data.val is not None)
    setup = setup_of(config.trainer, checkpoints)
    plan = make_plan(built.model, built.data, setup, gpu=config.gpu != "cpu", num_samples=config.samples)
    fits = plan.peak <= USABLE * memory
    seconds = None if tflops is None else plan.seconds(tflops, config.utilization)
    suggestions = [] if fits else list(suggest(config, plan, memory))
    if config.json:
        hours = None if seconds is None else seconds / 3600
        result = {"peak_bytes": plan.peak, "fits": fits, "hours": hours, "advice": suggestions}
        print(json.dumps({**asdict(plan), **result}, indent=1))
    else:
        show(plan, config, memory, seconds, suggestions)
    return 0 if fits else 1


def setup_of(trainer: Any, checkpoints: int = 2) -> Any:
    """Read the trainer's options into the Setup of a plan."""
    from merv.training.plan import Setup

    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    return Setup(
        devices=max(count, 1) * trainer.num_nodes,
        accumulate=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        precision=str(trainer.precision or "32-true"),
        sharded=any(name in strategy.lower() for name in ("sharded", "fsdp", "modelparallel")),
        checkpoints=checkpoints,
    )


def suggest(config: Any, plan: Any, memory: float) -> Iterator[str]:
    """Suggest changes that reduce memory, the least costly first."""
    model, data, setup = config.model, config.data, plan.setup
    trained = set(model.trainable)
    if data.batch_size > 1:
        half = math.ceil(data.batch_size / 2)
        yield (
            f"--data.batch_size={half} --trainer.accumulate_grad_batches={2 * setup.accumulate}: the same "
            "global batch in smaller pieces"
        )
    if not model["gradient_checkpointing"]:
        yield "--model.gradient_checkpointing=true: keeps activations of one layer at a time, a third slower"
    if setup.precision == "32-true" and "llm" in trained:
        yield "--trainer.precision=bf16-mixed: halves the activations"
    if "llm" not in trained and model.dtype not in ("bf16", "fp16"):
        yield "--model.dtype=bf16: enough for a frozen language model"
    if "llm" in trained:
        yield "--model.trainable='[projector,mixer,lora]': no gradients and optimizer states of the LLM"
    elif model["quantize"] is None and plan.memory["weights of LLM"] > 0.25 * memory:
        yield "--model.quantize=nf4: a quarter of the LLM's weights (QLoRA if lora is trained)"
    if not plan.stores_features and plan.memory["weights of encoders"] > 0.1 * memory:
        yield "--model.feature_store=FOLDER: features are computed before training"
    if not setup.sharded:
        yield "--trainer.strategy=sharded --trainer.devices=N: splits the LLM and its training over N devices"
    yield "--model.grid='[t,h,w]' with fewer cells: fewer visual tokens"


# Output -----------------------------------------------------------------------------------------


def show(plan: Any, config: Any, memory: float, seconds: float | None, suggestions: Sequence[str]) -> None:
    """Print the plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value, note in lines(plan, config, memory, seconds):
        if value:
            table.add_row(f"  {name}", value, note)
        else:
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
    console = Console(highlight=False)
    console.print(table)
    if suggestions:
        console.print("\n[bold]It does not fit.[/bold] What would help, the least costly first:")
        for line in suggestions:
            console.print(f"  {line}", markup=False)


def lines(plan: Any, config: Any, memory: float, seconds: float | None) -> Iterator[tuple[str, str, str]]:
    """Rows of the table: name, value, note. A heading has no value."""
    batches, setup = plan.batches, plan.setup
    yield "Tokens", "", ""
    yield "per video", f"{plan.visual_tokens:,}", "grid " + "×".join(map(str, config.model.grid))
    source = f"of {batches.measured} samples" if batches.measured else "guessed: the data cannot be read"
    yield "per row", f"{batches.tokens_mean:,.0f}", f"mean; maximum {batches.tokens_max:,}; {source}"
    if batches.measured:
        yield (
            "data",
            f"{batches.samples:,}",
            f"samples, {batches.conversations:,} conversations, {batches.videos:,} videos",
        )
    yield "Parameters", "", ""
    for name, (count, trained) in plan.parts.items():
        yield name, f"{count:,}", "trained" if trained else "frozen"
    yield "Memory per device", "", ""
    for name, count in plan.memory.items():
        yield name, size(count), ""
    share = f"{plan.peak / memory:.0%} of {size(memory)} on {config.gpu}; leave {1 - USABLE:.0%} free"
    yield "total", size(plan.peak), "" if math.isinf(memory) else share
    yield "Work per step and device", "", ""
    for name, flops in plan.flops.items():
        if flops:
            yield name, f"{flops / 1e12:,.3g} TFLOP", ""
    yield "total", f"{sum(plan.flops.values()) / 1e12:,.3g} TFLOP", ""
    if plan.stores_features:
        yield "encoders, once per video", f"{plan.encode_flops / 1e12:,.3g} TFLOP", ""
    yield "Run", "", ""
    yield "devices", str(setup.devices), "sharded" if setup.sharded else ""
    yield "global batch", str(plan.global_batch), "samples per step"
    yield "steps", "?" if plan.steps is None else f"{plan.steps:,}", ""
    if seconds is not None:
        hours = f"{seconds / 3600:,.2g}" if seconds > 60 else "under a minute"
        yield (
            "hours",
            hours,
            f"on {config.gpu} at {config.utilization:.0%} of its peak (assumed), without decoding",
        )
    yield (
        "disk",
        size(plan.store_bytes + plan.trained_bytes + plan.checkpoint_bytes),
        f"features {size(plan.store_bytes)}, trained weights {size(plan.trained_bytes)}, "
        f"{setup.checkpoints} checkpoints {size(plan.checkpoint_bytes)}",
    )


def size(count: float) -> str:
    """Format a number of bytes.

    >>> size(2_500_000_000), size(12_000_000)
    ('2.50 GB', '12.0 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
