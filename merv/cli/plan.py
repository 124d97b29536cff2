"""`merv plan`: what a run of `merv fit` will take, before anything is loaded."""

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

GPU, UTILIZATION, FULL = "h100", 0.4, 0.92
ABOUT = """\
What a run of `merv fit` will take: tokens, parameters, FLOPs, memory, disk, hours, and what to change
where it does not fit. The arguments are those of `merv fit`. No weights are read: one step is run on
tensors that have shapes and no numbers. Where the data file is not there yet, its texts are guessed.
"""
EXAMPLES = """\
examples:
  merv plan --config demo --gpu 4090
  merv plan --config mine.yaml --data.batch_size=8 --model.gradient_checkpointing=true --trainer.devices=8
  merv plan --config mine.yaml --gpu a100 --utilization 0.35 --json

Hours are FLOPs over the GPU's peak in bf16 times the utilization; decoding videos is not in them, nor is
validation. What large runs reach is 0.3 to 0.5; small models and small batches reach less.
"""


def parser(recipe: bool = True) -> Any:
    """The parser of `merv plan`: a few options of its own, and those of a recipe."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ActionConfigFile, ArgumentParser

    from merv.training.plan import GPUS

    made = ArgumentParser(
        prog="merv plan",
        usage="merv plan [OPTION ...] [OPTION OF merv fit ...]",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    made.add_argument("-c", "--config", action=ActionConfigFile, help="a recipe, by name or path")
    made.add_argument("--gpu", default=GPU, help=f"one of {', '.join(GPUS)}, or cpu (default: {GPU})")
    made.add_argument(
        "--utilization", type=float, default=UTILIZATION, help="share of the GPU's peak that is reached"
    )
    made.add_argument("--tflops", type=float, help="peak of a device that is not in the list")
    made.add_argument("--memory", type=float, help="memory of a device that is not in the list, in GB")
    made.add_argument("--samples", type=int, default=256, help="how many samples of the data to look at")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    if not recipe:
        return made
    from lightning import Trainer

    from merv.data.module import ChatData
    from merv.training.checkpointing import Checkpoints
    from merv.training.module import Training

    made.add_class_arguments(Trainer, "trainer", instantiate=False)
    made.add_class_arguments(Training, "model")
    made.add_class_arguments(ChatData, "data")
    made.add_class_arguments(Checkpoints, "checkpoints", instantiate=False)
    made.add_argument("--sample_answers", type=dict, default={}, help="as for merv fit; changes nothing here")
    for ignored in ("seed_everything", "ckpt_path"):
        made.add_argument(f"--{ignored}", help="as for merv fit; changes nothing here")
    return made


def run(argv: Sequence[str]) -> int:
    """Print the plan; 1 if it does not fit."""
    if set(argv) & {"-h", "--help"}:
        parser(recipe=False).print_help()
        return 0
    from merv.training.plan import GPUS, make_plan

    typed = with_recipes(argv)
    check_keys(typed, also=("gpu", "utilization", "tflops", "memory", "samples", "json"))
    config = (made := parser()).parse_args(typed)
    if config.gpu not in (*GPUS, "cpu"):
        raise TrainingError(
            f"Unknown GPU {config.gpu!r}.{nearest(config.gpu, GPUS)} There are: {', '.join(GPUS)}, cpu; or "
            "give --tflops and --memory."
        )
    device = GPUS.get(config.gpu)
    tflops = config.tflops or (device.tflops if device else None)
    memory = (config.memory or (device.memory if device else math.inf)) * 1e9
    started = made.instantiate_classes(config)
    setup = setup_of(config.trainer, config.checkpoints.save_total_limit + (config.data.val is not None))
    plan = make_plan(started.model, started.data, setup, gpu=config.gpu != "cpu", num_samples=config.samples)
    fits = plan.peak <= FULL * memory
    seconds = None if tflops is None else plan.seconds(tflops, config.utilization)
    advice = [] if fits else list(advise(config, plan, memory))
    if config.json:
        known = {"peak_bytes": plan.peak, "fits": fits, "hours": seconds and seconds / 3600, "advice": advice}
        print(json.dumps({**asdict(plan), **known}, indent=1))
    else:
        show(plan, config, memory, seconds, advice)
    return 0 if fits else 1


def setup_of(trainer: Any, checkpoints: int = 2) -> Any:
    """What the trainer's options mean for the plan."""
    from merv.training.plan import Setup

    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    name = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
    return Setup(
        devices=max(count, 1) * trainer.num_nodes,
        accumulate=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        max_epochs=trainer.max_epochs,
        precision=str(trainer.precision or "32-true"),
        sharded=any(word in name.lower() for word in ("sharded", "fsdp", "modelparallel")),
        checkpoints=checkpoints,
    )


def advise(config: Any, plan: Any, memory: float) -> Iterator[str]:
    """What to change, the cheapest first; what each would come to is one more run of the command."""
    model, data, setup = config.model, config.data, plan.setup
    trained = set(model.trainable)
    if data.batch_size > 1:
        half = math.ceil(data.batch_size / 2)
        yield (
            f"--data.batch_size={half} --trainer.accumulate_grad_batches={2 * setup.accumulate}: the same "
            "steps in smaller pieces"
        )
    if not model["gradient_checkpointing"]:
        yield "--model.gradient_checkpointing=true: activations of one layer at a time, a third more time"
    if setup.precision == "32-true" and "llm" in trained:
        yield "--trainer.precision=bf16-mixed: half the activations"
    if "llm" not in trained and model.dtype not in ("bf16", "fp16"):
        yield "--model.dtype=bf16: a frozen language model needs no more"
    if "llm" in trained:
        yield "--model.trainable='[projector,mixer,lora]': no gradients and states of the LLM"
    elif model["quantize"] is None and plan.memory["weights of LLM"] > 0.25 * memory:
        yield "--model.quantize=nf4: a quarter of the language model's weights (QLoRA with lora trained)"
    if not plan.stores_features and plan.memory["weights of encoders"] > 0.1 * memory:
        yield "--model.feature_store=FOLDER: features are made before training"
    if not setup.sharded:
        yield "--trainer.strategy=sharded --trainer.devices=N: the LLM and its training split over N"
    yield "--model.grid='[t,h,w]' with fewer cells: fewer visual tokens"


# Printed ----------------------------------------------------------------------------------------


def show(plan: Any, config: Any, memory: float, seconds: float | None, advice: Sequence[str]) -> None:
    """The plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value, note in lines(plan, config, memory, seconds):
        if not value and not note:
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
        else:
            table.add_row(f"  {name}", value, note)
    console = Console(highlight=False)
    console.print(table)
    if advice:
        console.print("\n[bold]It does not fit.[/bold] What would help, the cheapest first:")
        for line in advice:
            console.print(f"  {line}", markup=False)


def lines(plan: Any, config: Any, memory: float, seconds: float | None) -> Iterator[tuple[str, str, str]]:
    """Rows of the table: name, value, note; a heading has neither of the last two."""
    batches, setup = plan.batches, plan.setup
    seen = f"of {batches.measured} samples" if batches.measured else "guessed: the data cannot be read"
    yield "Tokens", "", ""
    yield "visual, a video", f"{plan.visual_tokens:,}", "grid " + "×".join(map(str, config.model.grid))
    yield "a row", f"{batches.tokens_mean:,.0f}", f"on average, {batches.tokens_most:,} at most; {seen}"
    if batches.measured:
        yield (
            "data",
            f"{batches.samples:,}",
            f"samples, {batches.conversations:,} conversations, {batches.videos:,} videos",
        )
    yield "Parameters", "", ""
    for name, (count, trained) in plan.parts.items():
        yield name, f"{count:,}", "trained" if trained else "frozen"
    yield "Memory of a device", "", ""
    for name, count in plan.memory.items():
        yield name, size(count), ""
    share = (
        ""
        if math.isinf(memory)
        else f"{plan.peak / memory:.0%} of {size(memory)} on {config.gpu}; leave {1 - FULL:.0%}"
    )
    yield "in all", size(plan.peak), share
    yield "Work of a step of a device", "", ""
    for name, flops in plan.flops.items():
        if flops:
            yield name, f"{flops / 1e12:,.3g} TFLOP", ""
    yield "in all", f"{sum(plan.flops.values()) / 1e12:,.3g} TFLOP", ""
    if plan.stores_features:
        yield "encoders, once a video", f"{plan.encode_flops / 1e12:,.3g} TFLOP", ""
    yield "Run", "", ""
    yield "devices", str(setup.devices), "sharded" if setup.sharded else ""
    yield "global batch", str(plan.global_batch), "samples a step"
    yield "steps", "?" if plan.steps is None else f"{plan.steps:,}", ""
    if seconds is not None:
        assumed = f"on {config.gpu} at {config.utilization:.0%} of its peak (assumed)"
        yield (
            "hours",
            f"{seconds / 3600:,.2g}" if seconds > 60 else "under a minute",
            f"{assumed}, without decoding",
        )
    yield (
        "disk",
        size(plan.store_bytes + plan.trained_bytes + plan.checkpoint_bytes),
        f"features {size(plan.store_bytes)}, what is trained {size(plan.trained_bytes)}, "
        f"{setup.checkpoints} checkpoints {size(plan.checkpoint_bytes)}",
    )


def size(count: float) -> str:
    """Bytes for people.

    >>> size(2_500_000_000), size(12_000_000)
    ('2.50 GB', '12.0 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
