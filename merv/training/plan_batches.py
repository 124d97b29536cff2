"""The batch sizes of a planned run, measured with the data file and the language model's tokenizer."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from merv.data.order import portions
from merv.data.samples import media_parts
from merv.data.sources import stream_samples
from merv.errors import DataError
from merv.models.chat import user_message
from merv.models.packing import Tokens, pack, tokens_of
from merv.models.video_llm import VideoLLM
from merv.training.dry_run import BatchShape

log = logging.getLogger(__name__)

NUM_BATCHES = 32  # drawn at random; the median one is the typical batch
QUESTION, ANSWER = "word " * 60, "word " * 20  # assumed if the data cannot be read


@dataclass(frozen=True)
class Batches:
    """Statistics of the training data and its batches.

    Args:
        samples: Number of samples in an epoch.
        videos: Number of videos and images in them.
        conversations: Number of conversations in them.
        tokens_mean: Mean length of a row in tokens.
        tokens_max: Length of the longest row.
        typical: The sizes of a batch of median size.
        largest: The sizes of a batch of the longest samples.
        measured: How many samples were read. 0: the data could not be read, and the sizes are guesses.
    """

    samples: int
    videos: int
    conversations: int
    tokens_mean: float
    tokens_max: int
    typical: BatchShape
    largest: BatchShape
    measured: int


def measure(
    data: Any, model: VideoLLM, packed_length: int | None, max_samples: int, devices: int = 1
) -> Batches:
    """Measure the batches of a run.

    Args:
        data: The `merv.data.module.ChatData` of the run.
        model: The model; only its sizes and its tokenizer are used.
        packed_length: As in the recipe.
        max_samples: How many samples to read at most.
        devices: Number of devices.

    Returns:
        The statistics; guesses if the data cannot be read.
    """
    num_samples, samples = _read(data, max_samples, devices)
    if samples:
        sizes = [_size(sample.conversations[: data.max_questions], model) for sample in samples]
    else:
        sizes = [_size([user_message(QUESTION, "video", answer=ANSWER)], model)]
    lengths = [length for size in sizes for length in size.lengths]
    sizes.sort(key=lambda size: max(size.lengths), reverse=True)
    longest = [sizes[i % len(sizes)] for i in range(data.batch_size)]
    generator = random.Random(0)
    batches = [_batch(_draw(sizes, data, generator), model, packed_length) for _ in range(NUM_BATCHES)]
    batches.sort(key=lambda batch: batch.rows * batch.length)
    scale = num_samples / max(len(samples), 1)
    return Batches(
        samples=num_samples,
        videos=round(scale * sum(size.visuals for size in sizes)) if samples else 0,
        conversations=round(scale * sum(len(sample.conversations) for sample in samples)),
        tokens_mean=sum(lengths) / len(lengths),
        tokens_max=max(lengths),
        typical=batches[NUM_BATCHES // 2],
        largest=_batch(longest, model, packed_length),
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
        log.warning("%s", error)
        return 0, []
    weights = list(data.train_source.values()) if isinstance(data.train_source, Mapping) else None
    step = max(1, math.ceil(len(data.train) / max_samples))
    return sum(portions(data.sizes, weights)), [data.train[i] for i in range(0, len(data.train), step)]


@dataclass(frozen=True, eq=False)
class _SampleSize:
    """groups: conversations as the model packs them. lengths: of their rows. visuals, stills: counts."""

    groups: list[list[Tokens]]
    lengths: list[int]
    visuals: int
    stills: int


def _size(conversations: Sequence[Any], model: VideoLLM) -> _SampleSize:
    """Tokenize the conversations of a sample; a video becomes as many tokens as the model makes of it."""
    t, h, w = model.vision.aligner.grid
    images = {
        str(part["image"])
        for messages in conversations
        for part in media_parts(messages)
        if part["type"] == "image"
    }
    visuals: set[str] = set()
    sequences = []
    for messages in conversations:
        for prompt in model.chat.answers(messages):
            sources = [str(visual.source) for visual in prompt.visuals]
            visuals.update(sources)
            cells = [h * w * (1 if source in images else t) for source in sources]
            ranges = [range(model.fusion.mixer.num_tokens(n)) for n in cells]
            sequences.append(tokens_of(prompt, iter(ranges)))
    groups = [sequences] if model.shares_rows else [[sequence] for sequence in sequences]
    lengths = [len(pack([group], 0).ids[0]) for group in groups]
    return _SampleSize(groups, lengths, len(visuals), len(visuals & images))


def _draw(sizes: Sequence[_SampleSize], data: Any, generator: random.Random) -> list[_SampleSize]:
    """Draw a batch as the data module does: neighbors in length if grouped by length, otherwise any."""
    if not data.group_by_length:
        return [generator.choice(sizes) for _ in range(data.batch_size)]
    start = generator.randrange(max(1, len(sizes) - data.batch_size + 1))
    return [sizes[start + i % (len(sizes) - start)] for i in range(data.batch_size)]


def _batch(sizes: Sequence[_SampleSize], model: VideoLLM, packed_length: int | None) -> BatchShape:
    """The sizes of a batch of these samples."""
    packed = pack([group for size in sizes for group in size.groups], 0, "right", packed_length)
    stills = sum(size.stills for size in sizes)
    return BatchShape(
        videos=sum(size.visuals for size in sizes) - stills,
        stills=stills,
        rows=packed.ids.shape[0],
        length=packed.ids.shape[1],
        answers=int((packed.labels[:, 1:] >= 0).any(dim=0).sum()),
        visual=int((packed.ids < 0).sum()),
        padded=not bool((packed.branches >= 0).all()),
        shared=packed.mask.ndim == 4,
    )
