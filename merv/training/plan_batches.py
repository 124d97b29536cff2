"""The sizes of a plan's batches: from the data file and the language model's tokenizer, else guessed."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from merv.data.order import portions
from merv.data.sources import stream_samples
from merv.errors import DataError
from merv.models.chat import render, user_message
from merv.models.llm import supports_shared_prefix
from merv.models.packing import Tokens, pack, tokens_of
from merv.models.video_llm import VideoLLM
from merv.training.dry_run import BatchShape

log = logging.getLogger(__name__)

DRAWN = 32  # batches, of which the middle one stands for all
GUESS = ("word " * 60, "word " * 20)  # a question and its answer, where the data cannot be read


@dataclass(frozen=True)
class Batches:
    """What the data are like. samples, videos (of all samples, stills too), conversations: counts.
    tokens_mean, tokens_most: of a row. typical, largest: batches. measured: of how many samples; 0: guessed.
    """

    samples: int
    videos: int
    conversations: int
    tokens_mean: float
    tokens_most: int
    typical: BatchShape
    largest: BatchShape
    measured: int


def measure(data: Any, model: VideoLLM, fill: int | None, probe: int, devices: int = 1) -> Batches:
    """Sizes of batches, of up to `probe` samples of the training data; guessed where there is no file."""
    samples, chosen = _samples(data, probe, devices)
    rows = [_rows(sample.conversations, model, data.max_questions) for sample in chosen]
    if not rows:
        rows = [_rows([user_message(GUESS[0], "video", answer=GUESS[1])], model, 1)]
    rows = [row for row in rows if row.groups]
    lengths = [length for row in rows for length in row.lengths]
    ordered = sorted(rows, key=lambda row: -max(row.lengths))
    largest = _batch(_cycled(ordered, data.batch_size), model, fill)
    draw = random.Random(0)
    drawn = [_batch(_some(ordered, data, draw), model, fill) for _ in range(DRAWN)]
    typical = sorted(drawn, key=lambda load: load.rows * load.length)[DRAWN // 2]
    share = samples / max(len(chosen), 1)
    return Batches(
        samples=samples,
        videos=round(share * sum(row.visuals for row in rows)) if chosen else 0,
        conversations=round(share * sum(len(sample.conversations) for sample in chosen)),
        tokens_mean=sum(lengths) / len(lengths),
        tokens_most=max(lengths),
        typical=typical,
        largest=largest,
        measured=len(chosen),
    )


def _samples(data: Any, probe: int, devices: int) -> tuple[int, list[Any]]:
    """How many samples an epoch has, and up to `probe` of them; none where there is no file."""
    try:
        if data.stream:
            samples = list(islice(stream_samples(data.train_source, data.root), probe))
            return data.batches_per_epoch * data.batch_size * devices, samples  # each has batches of its own
        data.open_files()  # not set up, which reads all samples where they are grouped
    except DataError as error:
        log.warning("%s", error)
        return 0, []
    weights = data.train_source.values() if isinstance(data.train_source, Mapping) else None
    step = max(1, -(-len(data.train) // probe))
    count = sum(portions(data.sizes, None if weights is None else list(weights)))
    return count, [data.train[i] for i in range(0, len(data.train), step)]


@dataclass(frozen=True, eq=False)
class _Sample:
    """groups: as the model packs them. lengths: of a row each. visuals, stills: how many it has."""

    groups: list[list[Tokens]]
    lengths: list[int]
    visuals: int
    stills: int


def _rows(conversations: Sequence[Any], model: VideoLLM, most: int) -> _Sample:
    """The conversations of a sample as token ids, their videos as that many places."""
    t, h, w = model.vision.aligner.grid
    mixer = model.fusion.mixer
    stills = {
        str(part["image"])
        for talk in conversations
        for turn in talk
        if not isinstance(turn["content"], str)
        for part in turn["content"]
        if part["type"] == "image"
    }
    seen: set[str] = set()
    sequences = []
    for talk in list(conversations)[:most]:
        prompt = render(talk, model.tokenizer)
        names = [str(visual.source) for visual in prompt.visuals]
        seen |= set(names)
        sizes = [mixer.num_tokens(h * w * (1 if name in stills else t)) for name in names]
        sequences.append(tokens_of(prompt, iter([range(size) for size in sizes])))
    groups = [sequences] if supports_shared_prefix(model.llm) else [[one] for one in sequences]
    lengths = [len(pack([group], 0).ids[0]) for group in groups]
    return _Sample(groups, lengths, len(seen), len(seen & stills))


def _some(rows: Sequence[_Sample], data: Any, draw: random.Random) -> list[_Sample]:
    """A batch as the data module draws it: of neighbors in length, or of any."""
    if data.group_by_length:
        start = draw.randrange(max(1, len(rows) - data.batch_size + 1))
        return _cycled(rows[start:], data.batch_size)
    return [draw.choice(rows) for _ in range(data.batch_size)]


def _cycled(rows: Sequence[_Sample], count: int) -> list[_Sample]:
    return [rows[i % len(rows)] for i in range(count)]


def _batch(samples: Sequence[_Sample], model: VideoLLM, fill: int | None) -> BatchShape:
    """What a batch of these is to the model."""
    packed = pack([group for sample in samples for group in sample.groups], 0, "right", fill)
    stills = sum(sample.stills for sample in samples)
    return BatchShape(
        videos=sum(sample.visuals for sample in samples) - stills,
        stills=stills,
        rows=packed.ids.shape[0],
        length=packed.ids.shape[1],
        answers=int((packed.labels[:, 1:] >= 0).any(dim=0).sum()),
        visual=int((packed.ids < 0).sum()),
        padded=not bool((packed.branches >= 0).all()),
        shared=packed.mask.ndim == 4,
    )
