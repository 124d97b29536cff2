"""Plan: what a training run will take, told before it begins and without loading a weight.

The sizes of batches come from the data file and the language model's tokenizer; memory and FLOPs
of a step from running it dry (see dry_run.py); the rest is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merv.errors import BrokenPlugin, WeightsError
from merv.models.llm import DTYPES, SMOLLM2, LoraOptions
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.training.dry_run import ENCODE, OPTIMIZER, BatchShape, Cost, dry_step
from merv.training.plan_batches import Batches, measure
from merv.utils.assets import smollm2_folder
from merv.utils.torch_modules import device_and_dtype, without_weights

BYTES_OF = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # a weight, with its share of the scale of its block


@dataclass(frozen=True)
class GPU:
    """tflops: dense bf16 with fp32 sums, as its maker states them. memory: GB = 10⁹ bytes."""

    tflops: float
    memory: float


GPUS = {
    "b200": GPU(2250, 192),
    "h200": GPU(989, 141),
    "h100": GPU(989, 85),
    "a100": GPU(312, 85),
    "a100-40": GPU(312, 42),
    "l40s": GPU(362, 48),
    "l40": GPU(181, 48),
    "a6000": GPU(155, 51),
    "a10": GPU(125, 25),
    "l4": GPU(121, 25),
    "5090": GPU(210, 34),
    "4090": GPU(165, 25),
    "3090": GPU(71, 25),
}


@dataclass(frozen=True)
class Setup:
    """What the trainer's part of a recipe says, as far as it matters here.

    sharded: whether weights, gradients and optimizer states are split over the devices. checkpoints: how
        many a run keeps.
    """

    devices: int = 1
    accumulate: int = 1
    max_steps: int = -1
    max_epochs: int | None = None
    precision: str = "32-true"
    sharded: bool = False
    checkpoints: int = 2


@dataclass(frozen=True)
class Plan:
    """All that `merv plan` tells. Bytes, FLOPs and seconds; memory is of one device."""

    visual_tokens: int
    batches: Batches
    parts: dict[str, tuple[int, bool]]
    memory: dict[str, float]
    flops: dict[str, float]
    encode_flops: float
    kept: bool
    store_bytes: float
    trained_bytes: float
    steps: int | None
    global_batch: int
    setup: Setup

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment, on each device."""
        return sum(self.memory.values())

    @property
    def checkpoint_bytes(self) -> float:
        """Of the checkpoints that a run keeps: what is trained, and AdamW's two moments of it."""
        return 3 * self.trained_bytes * self.setup.checkpoints

    def seconds(self, tflops: float, utilization: float) -> float | None:
        """Of the whole run, at a share of the peak speed; None where its length is not known."""
        if self.steps is None:
            return None
        speed = tflops * 1e12 * utilization
        once = self.encode_flops * self.batches.videos / self.setup.devices if self.kept else 0.0
        return (self.steps * sum(self.flops.values()) + once) / speed


def make_plan(training: Any, data: Any, setup: Setup, *, gpu: bool = True, probe: int = 256) -> Plan:
    """The plan of a run.

    training: a `merv.training.module.Training`, not built yet. data: a `merv.data.module.ChatData`.
    gpu: whether it will run on one. probe: how many samples to look at.
    Raises the errors of unknown names; WeightsError where the LLM's config cannot be loaded.
    """
    h: Any = training.hparams
    model = on_meta(training, setup.precision)
    visual = model.fusion.mixer.num_tokens(math.prod(h.grid))
    batches = measure(data, model, h.packed_length, probe, setup.devices)
    parts = {
        name: (sum(p.numel() for p in own.values()), name in model.trained)
        for name, own in model.parts().items()
        if "." not in name
    }
    quantized = _saved_by_quantizing(model.llm, h.quantize)
    weights = _weights(model)
    kept = h.feature_store is not None
    options: dict[str, Any] = {
        "encode": not kept,
        "accumulate": setup.accumulate,
        "autocast": setup.precision in ("bf16-mixed", "16-mixed"),
        "gpu": gpu,
    }
    training.use_model(model)
    largest = dry_step(training, batches.largest, **options)
    typical = largest
    if batches.typical != batches.largest:
        typical = dry_step(training, batches.typical, **options)
    alone = BatchShape(videos=1, rows=1, length=visual + 8, answers=1, visual=visual)
    encode = (
        dry_step(training, alone, **{**options, "encode": True}).flops[ENCODE]
        if kept
        else typical.flops[ENCODE] / max(typical_videos(batches), 1)
    )
    micro = {name: flops for name, flops in typical.flops.items() if name != OPTIMIZER}
    per_step = data.batch_size * setup.devices * setup.accumulate
    return Plan(
        visual_tokens=visual,
        batches=batches,
        parts=parts,
        memory=_memory(weights, quantized, largest, model, setup),
        flops={name: flops * setup.accumulate for name, flops in micro.items()},
        encode_flops=encode,
        kept=kept,
        store_bytes=_store_bytes(model, h.grid) * batches.videos
        if kept and h.feature_store != "memory"
        else 0.0,
        trained_bytes=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        steps=_steps(setup, batches.samples, per_step),
        global_batch=per_step,
        setup=setup,
    )


def typical_videos(batches: Batches) -> int:
    """Videos and stills of the typical batch."""
    return batches.typical.videos + batches.typical.stills


# The model --------------------------------------------------------------------------------------


def on_meta(training: Any, precision: str = "32-true") -> VideoLLM:
    """The VideoLLM that `training` will build, on the meta device: shapes without numbers."""
    h: Any = training.hparams
    llm, tokenizer = llm_on_meta(h.llm, h.dtype)
    vision = _vision(h, llm.get_input_embeddings().embedding_dim)
    model = VideoLLM(llm, tokenizer, vision)
    if "lora" in h.trainable:
        model.add_lora(training.lora or LoraOptions())
    model.train_only(h.trainable)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    return model


def llm_on_meta(source: str | Path, dtype: str) -> tuple[Any, Any]:
    """The LLM of `merv.models.llm.load_llm` without its weights, and its tokenizer.

    Raises WeightsError where its config cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder() if source == SMOLLM2 else source
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"The config of the LLM {str(source)!r} could not be loaded: {reason} Pass the folder of a "
            "causal LM in the layout of transformers (its weights are not read), or a hub id that can be "
            "reached."
        ) from error
    wanted = config.get_text_config().dtype or torch.float32 if dtype == "auto" else DTYPES[dtype]
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=wanted)
    return llm.eval(), tokenizer


def _vision(h: Any, width: int) -> MultiEncoder:
    options: dict[str, Any] = {
        option: h[option]
        for option in (
            "mixer",
            "projector",
            "norm",
            "mixer_options",
            "projector_options",
            "presets",
            "num_frames",
        )
    }

    return without_weights(
        lambda: MultiEncoder(h.encoders, grid=tuple(h.grid), output_dim=width, weights=None, **options),
        BrokenPlugin,
    )


# Arithmetic -------------------------------------------------------------------------------------


def _weights(model: VideoLLM) -> dict[str, int]:
    """Bytes of the language model, the encoders, the fusion."""
    parts: dict[str, nn.Module] = {
        "LLM": model.llm,
        "encoders": model.vision.encoders,
        "fusion": model.fusion,
    }
    return {
        f"weights of {name}": sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
        for name, part in parts.items()
    }


def _saved_by_quantizing(llm: nn.Module, how: str | None) -> tuple[float, float]:
    """Bytes that quantized Linears save, and those of the largest one, as it is unpacked to be used."""
    if how is None:
        return 0.0, 0.0
    output = llm.get_output_embeddings()  # type: ignore[operator]
    linears = [
        (m.weight.numel(), m.weight.element_size())
        for name, m in llm.named_modules()
        if isinstance(m, nn.Linear) and m is not output and "lora_" not in name
    ]
    saved = sum(count * (size - BYTES_OF[how]) for count, size in linears)
    return saved, max(count * size for count, size in linears)


def _memory(
    weights: dict[str, int], quantized: tuple[float, float], cost: Cost, model: VideoLLM, setup: Setup
) -> dict[str, float]:
    """Bytes on a device at the fullest moment, by what they are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    states = 2 * gradients
    memory: dict[str, float] = {name: float(count) for name, count in weights.items()}
    memory["weights of LLM"] -= quantized[0]
    memory["gradients"] = gradients
    memory["optimizer states"] = states
    held = sum(weights.values()) + gradients + states
    updating = (cost.peaks[OPTIMIZER] - held) / (setup.devices if setup.sharded else 1)
    others = max(peak for phase, peak in cost.peaks.items() if phase != OPTIMIZER)
    memory["activations"] = max(others - held, 0) + quantized[1]
    if updating > memory["activations"]:  # the fullest moment is then, when activations are gone
        del memory["activations"]
        memory["the optimizer's step"] = updating
    if setup.sharded:
        layers = [m for m in model.llm.modules() if type(m).__name__ in (model.llm._no_split_modules or ())]
        one = max((sum(p.nbytes for p in layer.parameters()) for layer in layers), default=0)
        for name in ("weights of LLM", "weights of fusion", "gradients", "optimizer states"):
            memory[name] /= setup.devices
        memory["gathered layers"] = 2.0 * one  # the one that runs and the next
    elif setup.devices > 1:
        memory["buckets of DDP"] = gradients
    return memory


def _store_bytes(model: VideoLLM, grid: Sequence[int]) -> float:
    """Of the kept features of one video: values, masks and times of each encoder."""
    cells = math.prod(grid)
    return sum(
        cells * (encoder.spec.embed_dim * device_and_dtype(encoder)[1].itemsize + 1) + grid[0] * 8 + 400
        for _, encoder in model.vision.named()
    )


def _steps(setup: Setup, samples: int, per_step: int) -> int | None:
    """Steps of the optimizer; None where nothing says how many."""
    by_epochs = None
    if samples and setup.max_epochs not in (None, -1):
        by_epochs = setup.max_epochs * math.ceil(samples / per_step)  # type: ignore[operator]
    if setup.max_steps > 0:
        return min(setup.max_steps, by_epochs or setup.max_steps)
    return by_epochs
