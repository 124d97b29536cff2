"""What a training run needs, predicted before it starts and without reading weights.

Batch sizes come from the data file and the LLM's tokenizer, memory and FLOPs of a step from a dry run on fake
tensors (dry_run.py); the rest is arithmetic.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from merv.data.module import ChatData
from merv.data.order import portions
from merv.data.samples import media_parts
from merv.data.sources import stream_samples
from merv.errors import BrokenPlugin, DataError, TrainingError, WeightsError
from merv.models.chat import user_message
from merv.models.llm import SMOLLM2, LoraOptions, load_tokenizer, parse_dtype
from merv.models.multi_encoder import MultiEncoder
from merv.models.packing import Tokens, pack, tokens_of
from merv.models.video_llm import VideoLLM
from merv.training.dry_run import ENCODE, OPTIMIZER, BatchShape, Cost, dry_step
from merv.training.module import Training
from merv.utils.assets import smollm2_folder
from merv.utils.private import layer_classes
from merv.utils.torch_modules import device_and_dtype, without_weights

logger = logging.getLogger(__name__)

BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # nf4 has an fp32 scale for each block of 64
NUM_BATCHES = 32  # drawn at random; the median one is the typical batch
QUESTION, ANSWER = "word " * 60, "word " * 20  # assumed if the data cannot be read


@dataclass(frozen=True)
class Batches:
    """Statistics of the training data and its batches.

    Args:
        samples: Number of samples in an epoch.
        videos: Number of videos and images in them.
        conversations: Number of conversations in them.
        tokens_mean: Mean length of a sequence that the LLM reads, in tokens.
        tokens_max: Length of the longest sequence.
        typical: The sizes of a batch of median size.
        largest: The sizes of a batch of the longest samples.
        measured: How many samples were read. 0 means that the data could not be read and the sizes are
            guesses.
    """

    samples: int
    videos: int
    conversations: int
    tokens_mean: float
    tokens_max: int
    typical: BatchShape
    largest: BatchShape
    measured: int


@dataclass(frozen=True)
class Setup:
    """The trainer options that matter for a plan.

    Args:
        devices: Number of devices, of all nodes.
        accumulate: Batches per optimizer step.
        max_steps: As for Lightning's Trainer; -1 for no limit.
        max_epochs: As for Lightning's Trainer.
        limit_train_batches: As for Lightning's Trainer.
        precision: As for Lightning's Trainer.
        sharded: Whether weights, gradients and optimizer states are split over the devices.
        every_n_steps: Steps between two checkpoints; 0: only at the end.
        save_total_limit: How many checkpoints to keep; None: all.
        saves_checkpoints: Whether checkpoints are saved; the trained model always is.
        keeps_best: Whether the best checkpoint is kept as well.
    """

    devices: int = 1
    accumulate: int = 1
    max_steps: int = -1
    max_epochs: int | None = None
    limit_train_batches: float = 1.0
    precision: str = "32-true"
    sharded: bool = False
    every_n_steps: int = 500
    save_total_limit: int | None = 2
    saves_checkpoints: bool = True
    keeps_best: bool = False


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
        checkpoints: How many checkpoints there are at the end; None if all are kept and `steps` is None.
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
    checkpoints: int | None
    global_batch: int
    setup: Setup

    @property
    def peak(self) -> float:
        """Peak memory of each device, in bytes."""
        return sum(self.memory.values())

    def hours(self, tflops: float, utilization: float) -> float | None:
        """Return the duration of the run in hours.

        Args:
            tflops: Peak speed of a device, in 10¹² FLOPs per second.
            utilization: Fraction of the peak speed that the run reaches.

        Returns:
            The hours, without decoding and validation; None if the number of steps is unknown.
        """
        if self.steps is None:
            return None
        encoding = self.encode_flops * self.batches.videos / self.setup.devices if self.stores_features else 0
        return (self.steps * sum(self.flops.values()) + encoding) / (tflops * 1e12 * utilization) / 3600


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
    if setup.precision in ("bf16-true", "16-true"):
        raise TrainingError(f"merv fit does not train with precision {setup.precision}. Use bf16-mixed.")
    model = on_meta(training)
    training.model = model
    visual_tokens = model.fusion.mixer.num_tokens(math.prod(options.grid))
    batches = measure(data, model, options.packed_length, num_samples, setup.devices)
    stores_features = options.feature_store is not None
    step = partial(dry_step, training, accumulate=setup.accumulate, precision=setup.precision, gpu=gpu)
    largest = step(batches.largest, encode=not stores_features)
    typical = largest
    if batches.typical != batches.largest:
        typical = step(batches.typical, encode=not stores_features)
    if stores_features:
        one_video = BatchShape(videos=1, rows=1, length=visual_tokens + 8, answers=1, visual=visual_tokens)
        encode_flops: float = step(one_video, encode=True).flops[ENCODE]
    else:
        encode_flops = typical.flops[ENCODE] / max(batches.typical.videos + batches.typical.stills, 1)
    on_disk = stores_features and options.feature_store != "memory"
    steps = _steps(setup, batches.samples, data.batch_size)
    return Plan(
        visual_tokens=visual_tokens,
        batches=batches,
        parts={
            name: (sum(p.numel() for p in parameters.values()), name in model.trained)
            for name, parameters in model.parts().items()
            if "." not in name
        },
        memory=_memory(model, setup, options.quantize, largest),
        flops={name: n * setup.accumulate for name, n in typical.flops.items() if name != OPTIMIZER},
        encode_flops=encode_flops,
        stores_features=stores_features,
        store_bytes=_stored_bytes(model, options.grid) * batches.videos if on_disk else 0.0,
        trained_bytes=_trained_bytes(model),
        steps=steps,
        checkpoints=_checkpoints(setup, steps),
        global_batch=data.batch_size * setup.devices * setup.accumulate,
        setup=setup,
    )


# The model --------------------------------------------------------------------------------------


def on_meta(training: Training) -> VideoLLM:
    """The VideoLLM that `training` will build, on the meta device: shapes without values.

    Raises WeightsError if the config of the LLM cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = training.options
    source = smollm2_folder() if options.llm == SMOLLM2 else options.llm
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The config of the LLM {source!r} could not be loaded: {str(error).rstrip('.')}. Set "
            "model.llm to a folder or a hub id."
        ) from error
    saved_dtype = config.get_text_config().dtype or torch.float32
    dtype = saved_dtype if options.dtype == "auto" else parse_dtype(options.dtype)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
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
    return model


# The data ---------------------------------------------------------------------------------------


def measure(
    data: ChatData, model: VideoLLM, packed_length: int | None, max_samples: int, devices: int
) -> Batches:
    """Measure the batches of a run.

    Args:
        data: The data of the run.
        model: The model; only its sizes and its tokenizer are used.
        packed_length: As in the recipe.
        max_samples: How many samples to read at most.
        devices: Number of devices.

    Returns:
        The statistics; guesses if the data cannot be read.
    """
    num_samples, samples = _read(data, max_samples, devices)
    guess = [user_message(QUESTION, "video", answer=ANSWER)]
    conversations = [sample.conversations for sample in samples]
    sizes = [_size(each[: data.max_questions], model) for each in conversations or [guess]]
    lengths = [length for size in sizes for length in size.lengths]
    sizes.sort(key=lambda size: max(size.lengths), reverse=True)
    longest = [sizes[i % len(sizes)] for i in range(data.batch_size)]
    generator = random.Random(0)
    batches = [_batch(_draw(sizes, data, generator), packed_length) for _ in range(NUM_BATCHES)]
    batches.sort(key=lambda batch: batch.rows * batch.length)
    scale = num_samples / max(len(samples), 1)
    return Batches(
        samples=num_samples,
        videos=round(scale * sum(len(size.visuals) for size in sizes)),
        conversations=round(scale * sum(map(len, conversations))),
        tokens_mean=sum(lengths) / len(lengths),
        tokens_max=max(lengths),
        typical=batches[NUM_BATCHES // 2],
        largest=_batch(longest, packed_length),
        measured=len(samples),
    )


def _read(data: Any, max_samples: int, devices: int) -> tuple[int, list[Any]]:
    """The number of samples in an epoch, and up to `max_samples` of them; nothing if there is no file."""
    try:
        if data.stream:
            samples = list(islice(stream_samples(data.train_source, data.root), max_samples))
            return data.batches_per_epoch * data.batch_size * devices, samples
        data.open_files()  # setup() would read every sample if they are grouped by length
    except DataError as error:
        logger.warning("%s", error)
        return 0, []
    weights = list(data.train_source.values()) if isinstance(data.train_source, Mapping) else None
    step = max(1, math.ceil(len(data.train) / max_samples))
    return sum(portions(data.sizes, weights)), [data.train[i] for i in range(0, len(data.train), step)]


class _Size(NamedTuple):
    """The sizes of a sample: conversations as the model packs them, and the sources of videos and images."""

    groups: list[list[Tokens]]
    lengths: list[int]  # of the rows
    visuals: set[str]
    images: set[str]


def _size(conversations: Sequence[Any], model: VideoLLM) -> _Size:
    """Tokenize the conversations of a sample; a video becomes as many tokens as the model makes of it."""
    t, h, w = model.vision.aligner.size
    parts = [part for messages in conversations for part in media_parts(messages)]
    images = {str(part["image"]) for part in parts if part["type"] == "image"}
    visuals: set[str] = set()
    sequences = []
    for messages in conversations:
        for prompt in model.chat.training_prompts(messages):
            sources = [str(visual.source) for visual in prompt.visuals]
            visuals.update(sources)
            cells = [h * w * (1 if source in images else t) for source in sources]
            ranges = [range(model.fusion.mixer.num_tokens(n)) for n in cells]
            sequences.append(tokens_of(prompt, iter(ranges)))
    groups = [sequences] if model.supports_shared_prefix else [[sequence] for sequence in sequences]
    return _Size(groups, [len(pack([group], 0).ids[0]) for group in groups], visuals, visuals & images)


def _draw(sizes: Sequence[_Size], data: ChatData, generator: random.Random) -> list[_Size]:
    """Draw a batch as the data module does: neighbors in length if grouped by length, otherwise any."""
    if not data.group_by_length:
        return [generator.choice(sizes) for _ in range(data.batch_size)]
    start = generator.randrange(max(1, len(sizes) - data.batch_size + 1))
    return [sizes[start + i % (len(sizes) - start)] for i in range(data.batch_size)]


def _batch(sizes: Sequence[_Size], packed_length: int | None) -> BatchShape:
    """The sizes of a batch of these samples."""
    packed = pack([group for size in sizes for group in size.groups], 0, "right", packed_length)
    return BatchShape(
        videos=sum(len(size.visuals - size.images) for size in sizes),
        stills=sum(len(size.images) for size in sizes),
        rows=packed.ids.shape[0],
        length=packed.ids.shape[1],
        answers=int((packed.labels[:, 1:] >= 0).any(dim=0).sum()),
        visual=int((packed.ids < 0).sum()),
        padded=not bool((packed.conversations >= 0).all()),
        shared=packed.mask.ndim == 4,
    )


# Arithmetic -------------------------------------------------------------------------------------


def _memory(model: VideoLLM, setup: Setup, quantize: str | None, cost: Cost) -> dict[str, float]:
    """Bytes on one device at the moment of the highest use, by what uses them."""
    parts = {"LLM": model.llm, "encoders": model.vision.encoders, "fusion": model.fusion}
    memory: dict[str, float] = {
        f"weights of {name}": sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
        for name, part in parts.items()
    }
    memory["gradients"] = _trained_bytes(model)
    memory["optimizer states"] = 2 * memory["gradients"]
    held = sum(memory.values())
    updating = (cost.peaks[OPTIMIZER] - held) / (setup.devices if setup.sharded else 1)
    others = max(peak for phase, peak in cost.peaks.items() if phase != OPTIMIZER)
    saved, unpacked = _quantization(model.llm, quantize)
    memory["weights of LLM"] -= saved
    activations = max(others - held, 0) + unpacked
    if updating > activations:  # the peak is in the optimizer's step, without activations
        memory["optimizer step"] = updating
    else:
        memory["activations"] = activations
    if setup.sharded:
        names = layer_classes(model.llm)
        layers = [module for module in model.llm.modules() if type(module).__name__ in names]
        one = max((sum(p.nbytes for p in layer.parameters()) for layer in layers), default=0)
        for name in ("weights of LLM", "weights of fusion", "gradients", "optimizer states"):
            memory[name] /= setup.devices
        memory["gathered layers"] = 2.0 * one  # the current one and the next
    elif setup.devices > 1:
        memory["DDP buckets"] = memory["gradients"]
    return memory


def _quantization(llm: nn.Module, quantize: str | None) -> tuple[float, float]:
    """Bytes that quantization saves, and bytes of the largest Linear, which is dequantized to be used."""
    if quantize is None:
        return 0.0, 0.0
    output = llm.get_output_embeddings()  # type: ignore[operator]
    weights = [
        m.weight
        for name, m in llm.named_modules()
        if isinstance(m, nn.Linear) and m is not output and "lora_" not in name
    ]
    saved = sum(w.nbytes - w.numel() * BYTES_PER_WEIGHT[quantize] for w in weights)
    return saved, max(w.nbytes for w in weights)


def _trained_bytes(model: VideoLLM) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _stored_bytes(model: VideoLLM, grid: Sequence[int]) -> float:
    """Bytes of the stored features of one video: values, masks and times of each encoder."""
    cells = math.prod(grid)
    return sum(
        cells * (encoder.spec.embed_dim * device_and_dtype(encoder)[1].itemsize + 1) + grid[0] * 8 + 400
        for _, encoder in model.vision.named()
    )


def _steps(setup: Setup, samples: int, batch_size: int) -> int | None:
    """Optimizer steps; None if nothing determines them."""
    limits = [setup.max_steps] if setup.max_steps > 0 else []
    if samples and setup.max_epochs is not None and setup.max_epochs != -1:
        per_epoch, limit = math.ceil(samples / (batch_size * setup.devices)), setup.limit_train_batches
        # As in Lightning, a float is a fraction
        per_epoch = min(per_epoch, limit) if isinstance(limit, int) else int(per_epoch * limit)
        limits.append(setup.max_epochs * math.ceil(per_epoch / setup.accumulate))
    return min(limits, default=None)


def _checkpoints(setup: Setup, steps: int | None) -> int | None:
    """Number of checkpoints at the end of the run, the last step's included; None if it is not known."""
    if not setup.saves_checkpoints:
        return 0
    written = steps and math.ceil(steps / (setup.every_n_steps or steps))
    kept = min((n for n in (written, setup.save_total_limit) if n is not None), default=None)
    return None if kept is None else kept + setup.keeps_best
