"""What a training run needs, predicted before it starts and without reading weights.

Batch sizes come from the data file and the LLM's tokenizer, memory and FLOPs of a step from a dry run on fake
tensors (dry_run.py); the rest is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merv.data.module import ChatData
from merv.errors import BrokenPlugin, WeightsError
from merv.models.llm import DTYPES, SMOLLM2, LoraOptions, load_tokenizer
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.training.dry_run import ENCODE, OPTIMIZER, BatchShape, Cost, dry_step
from merv.training.module import Training
from merv.training.plan_batches import Batches, measure
from merv.utils.assets import smollm2_folder
from merv.utils.torch_modules import device_and_dtype, without_weights

BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # with the scale of its block


@dataclass(frozen=True)
class GPU:
    """A GPU: dense bf16 TFLOPS with fp32 accumulation, from its datasheet, and memory in GB (10⁹ bytes)."""

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
    """The trainer options that matter for a plan.

    Args:
        devices: Number of devices, of all nodes.
        accumulate: Batches per optimizer step.
        max_steps: As for Lightning's Trainer; -1 for no limit.
        max_epochs: As for Lightning's Trainer.
        precision: As for Lightning's Trainer.
        sharded: Whether weights, gradients and optimizer states are split over the devices.
        checkpoints: Number of checkpoints that the run keeps.
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
    """What a run needs, in bytes, FLOPs and seconds.

    Args:
        visual_tokens: Tokens per video.
        batches: Sizes of the typical and the largest batch.
        parts: Part → number of parameters, and whether they are trained.
        memory: What uses it → bytes on one device, at the moment of the highest use.
        flops: Phase → FLOPs of one optimizer step on one device.
        encode_flops: FLOPs to encode one video.
        stores_features: Whether encoders run once per video instead of in every step.
        store_bytes: Size of the feature store on disk.
        trained_bytes: Size of the trained weights.
        steps: Optimizer steps; None if nothing determines them.
        global_batch: Samples per optimizer step.
        setup: The trainer options.
    """

    visual_tokens: int
    batches: Batches
    parts: dict[str, tuple[int, bool]]
    memory: dict[str, float]
    flops: dict[str, float]
    encode_flops: float
    stores_features: bool
    store_bytes: float
    trained_bytes: float
    steps: int | None
    global_batch: int
    setup: Setup

    @property
    def peak(self) -> float:
        """Peak memory of each device, in bytes."""
        return sum(self.memory.values())

    @property
    def checkpoint_bytes(self) -> float:
        """Size of the kept checkpoints: trained weights and AdamW's two moments of each."""
        return 3 * self.trained_bytes * self.setup.checkpoints

    def seconds(self, tflops: float, utilization: float) -> float | None:
        """Duration of the run at a fraction of the peak speed; None if the number of steps is unknown."""
        if self.steps is None:
            return None
        speed = tflops * 1e12 * utilization
        encoding = self.encode_flops * self.batches.videos / self.setup.devices if self.stores_features else 0
        return (self.steps * sum(self.flops.values()) + encoding) / speed


def make_plan(
    training: Training, data: ChatData, setup: Setup, *, gpu: bool = True, num_samples: int = 256
) -> Plan:
    """Plan a run.

    Args:
        training: The module, not built yet. Its model becomes one of fake tensors.
        data: The data of the run.
        setup: The trainer options.
        gpu: Whether it will run on a GPU.
        num_samples: How many samples to read to estimate the batches.

    Returns:
        The plan.

    Raises:
        WeightsError: The config of the LLM cannot be loaded.
        MervError: Options or data are invalid.
    """
    options = training.options
    model = on_meta(training, setup.precision)
    visual_tokens = model.fusion.mixer.num_tokens(math.prod(options.grid))
    batches = measure(data, model, options.packed_length, num_samples, setup.devices)
    parts = {
        name: (sum(p.numel() for p in parameters.values()), name in model.trained)
        for name, parameters in model.parts().items()
        if "." not in name
    }
    quantized = _saved_by_quantizing(model.llm, options.quantize)
    weights = _weights(model)
    stores_features = options.feature_store is not None
    dry_options: dict[str, Any] = {
        "accumulate": setup.accumulate,
        "autocast": setup.precision in ("bf16-mixed", "16-mixed"),
        "gpu": gpu,
    }
    training.use_model(model)
    largest = typical = dry_step(training, batches.largest, encode=not stores_features, **dry_options)
    if batches.typical != batches.largest:
        typical = dry_step(training, batches.typical, encode=not stores_features, **dry_options)
    if stores_features:
        one_video = BatchShape(videos=1, rows=1, length=visual_tokens + 8, answers=1, visual=visual_tokens)
        encode_flops: float = dry_step(training, one_video, encode=True, **dry_options).flops[ENCODE]
    else:
        encode_flops = typical.flops[ENCODE] / max(batches.typical.videos + batches.typical.stills, 1)
    global_batch = data.batch_size * setup.devices * setup.accumulate
    return Plan(
        visual_tokens=visual_tokens,
        batches=batches,
        parts=parts,
        memory=_memory(weights, quantized, largest, model, setup),
        flops={
            phase: flops * setup.accumulate for phase, flops in typical.flops.items() if phase != OPTIMIZER
        },
        encode_flops=encode_flops,
        stores_features=stores_features,
        store_bytes=_store_bytes(model, options.grid) * batches.videos
        if stores_features and options.feature_store != "memory"
        else 0.0,
        trained_bytes=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        steps=_steps(setup, batches.samples, global_batch),
        global_batch=global_batch,
        setup=setup,
    )


# The model --------------------------------------------------------------------------------------


def on_meta(training: Training, precision: str = "32-true") -> VideoLLM:
    """The VideoLLM that `training` will build, on the meta device: shapes without values."""
    options = training.options
    llm, tokenizer = llm_on_meta(options.llm, options.dtype)
    vision = without_weights(
        lambda: MultiEncoder(
            options.encoders,
            output_dim=llm.get_input_embeddings().embedding_dim,
            weights=None,
            **options.multi_encoder(),
        ),
        BrokenPlugin,
    )
    model = VideoLLM(llm, tokenizer, vision, chat_template_kwargs=options.chat_template_kwargs)
    if "lora" in options.trainable:
        model.add_lora(options.lora or LoraOptions())
    model.train_only(options.trainable)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    return model


def llm_on_meta(source: str | Path, dtype: str) -> tuple[Any, Any]:
    """The LLM that `merv.models.llm.load_llm` loads, on the meta device, and its tokenizer.

    Raises WeightsError if its config cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = smollm2_folder() if source == SMOLLM2 else source
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"The config of the LLM {str(source)!r} could not be loaded: {reason} Pass a hub id, or "
            "the folder of a causal LM in the layout of transformers; its weights are not read."
        ) from error
    saved_dtype = config.get_text_config().dtype or torch.float32
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            config, dtype=saved_dtype if dtype == "auto" else DTYPES[dtype]
        )
    return llm.eval(), tokenizer


# Arithmetic -------------------------------------------------------------------------------------


def _weights(model: VideoLLM) -> dict[str, int]:
    """Bytes of the LLM, the encoders and the fusion."""
    parts: dict[str, nn.Module] = {
        "LLM": model.llm,
        "encoders": model.vision.encoders,
        "fusion": model.fusion,
    }
    return {
        f"weights of {name}": sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
        for name, part in parts.items()
    }


def _saved_by_quantizing(llm: nn.Module, quantize: str | None) -> tuple[float, float]:
    """Bytes that quantization saves, and bytes of the largest Linear, which is dequantized to be used."""
    if quantize is None:
        return 0.0, 0.0
    output = llm.get_output_embeddings()  # type: ignore[operator]
    linears = [
        (m.weight.numel(), m.weight.element_size())
        for name, m in llm.named_modules()
        if isinstance(m, nn.Linear) and m is not output and "lora_" not in name
    ]
    saved = sum(count * (size - BYTES_PER_WEIGHT[quantize]) for count, size in linears)
    return saved, max(count * size for count, size in linears)


def _memory(
    weights: dict[str, int], quantized: tuple[float, float], cost: Cost, model: VideoLLM, setup: Setup
) -> dict[str, float]:
    """Bytes on one device at the moment of the highest use, by what uses them."""
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
    if updating > memory["activations"]:  # the peak is in the optimizer's step, without activations
        del memory["activations"]
        memory["optimizer step"] = updating
    if setup.sharded:
        layers = [m for m in model.llm.modules() if type(m).__name__ in (model.llm._no_split_modules or ())]
        one = max((sum(p.nbytes for p in layer.parameters()) for layer in layers), default=0)
        for name in ("weights of LLM", "weights of fusion", "gradients", "optimizer states"):
            memory[name] /= setup.devices
        memory["gathered layers"] = 2.0 * one  # the current one and the next
    elif setup.devices > 1:
        memory["DDP buckets"] = gradients
    return memory


def _store_bytes(model: VideoLLM, grid: Sequence[int]) -> float:
    """Bytes of the stored features of one video: values, masks and times of each encoder."""
    cells = math.prod(grid)
    return sum(
        cells * (encoder.spec.embed_dim * device_and_dtype(encoder)[1].itemsize + 1) + grid[0] * 8 + 400
        for _, encoder in model.vision.named()
    )


def _steps(setup: Setup, samples: int, global_batch: int) -> int | None:
    """Optimizer steps; None if nothing determines them."""
    by_epochs = None
    if samples and setup.max_epochs not in (None, -1):
        by_epochs = setup.max_epochs * math.ceil(samples / global_batch)  # type: ignore[operator]
    if setup.max_steps > 0:
        return min(setup.max_steps, by_epochs or setup.max_steps)
    return by_epochs
