"""Data: training and validation samples from files, as batches for `merv fit`.

What a file may hold is in samples.py and sources.py, which samples come when in order.py, how batches
are made and resumed in loader.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from weakref import WeakSet

import numpy as np
from lightning import LightningDataModule

from merv.data.loader import BadSamplePolicy, BatchReader, Loader, OnError
from merv.data.order import KINDS, EpochOrder
from merv.data.samples import Sample, media_parts
from merv.data.sources import Samples, open_samples
from merv.errors import DataError
from merv.features.reader import Reader

if TYPE_CHECKING:
    from merv.models.video_llm import VideoLLM

PIECE = 1 << 16  # bytes
VISUAL = 4096  # characters that weigh as much as a video or image: four for each of 1024 tokens

logger = logging.getLogger(__name__)


class ChatData(LightningDataModule):
    """Training and validation data from files of conversations; see `merv.data.sources.open_samples`.

    train: a file or several, all of which an epoch has once; or a mapping of files to weights, by
        which they are mixed: an epoch is then as long as it can be without a sample that comes twice
        (`merv.data.order.EpochOrder`). val: a file or several, or None.
    batch_size: samples a step, of each process. max_questions: at most so many conversations of a sample in
        one epoch, drawn anew in each.
    seed: of the order of samples and of which conversations are drawn; nothing else decides them.
    group_by_length: batches of one kind (video, image, text) and of like length, the largest first. Reads all
        samples once at the start.
    num_workers: processes that read videos ahead of training, each on one thread. None: as many as this
        process has cores to itself, less one for the training, at most 8; so 1 on two cores, 0 on one.
        Where features are kept in memory there are none, as only this process has that memory.
    on_error: what to do about a sample that cannot be used: `raise`, or `skip` it, with a line in
        the log and in `skipped.jsonl` in the run's folder. Nothing stands in for it.
    max_skipped: stop when a process has skipped more distinct samples; None: 1 % of the samples, or 10.
    root: the folder that paths in rows begin at; None: that of their file.
    stream: read `train` once through and hold nothing, for what is too large to index; then
        `batches_per_epoch` says how many batches an epoch has, and `shuffle_buffer_size` how many samples are
        shuffled together.

    Raises DataError for options and files that cannot be meant.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float],
        val: str | list[str] | None = None,
        batch_size: int = 4,
        max_questions: int = 8,
        seed: int = 0,
        group_by_length: bool = False,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        max_skipped: int | None = None,
        stream: bool = False,
        batches_per_epoch: int | None = None,
        shuffle_buffer_size: int = 256,
        root: str | None = None,
    ) -> None:
        super().__init__()
        if min(batch_size, max_questions, shuffle_buffer_size) < 1 or on_error not in get_args(OnError):
            raise DataError(
                "batch_size, max_questions and shuffle_buffer_size must be at least 1, on_error raise or "
                f"skip; got {batch_size}, {max_questions}, {shuffle_buffer_size} and {on_error!r}."
            )
        if stream and (batches_per_epoch is None or group_by_length or isinstance(train, Mapping)):
            raise DataError(
                "A stream has no length of its own: set data.batches_per_epoch. It cannot be grouped by "
                "length or mixed by weight, because samples are only known when they come."
            )
        self.train_source, self.val_source, self.root = train, val, root
        self.batch_size, self.max_questions, self.seed = batch_size, max_questions, seed
        self.group_by_length, self.num_workers = group_by_length, num_workers
        self.on_error, self.max_skipped = on_error, max_skipped
        self.stream, self.batches_per_epoch = stream, batches_per_epoch
        self.shuffle_buffer_size = shuffle_buffer_size
        self.train: Sequence[Sample] = ()
        self.content = ""  # a hash of it
        self.val: Sequence[Sample] = ()
        self.sizes: list[int] = []
        self.loader: Loader | None = None
        self.made: WeakSet[Loader] = WeakSet()
        self.resumed: dict[str, Any] | None = None  # a place to begin at
        self.known: tuple[np.ndarray, np.ndarray] | None = None  # kind and length of each sample
        if val is not None:  # where there is no such method, Lightning does not validate
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Open the files; what is wrong with them comes now, before anything slow."""
        self.open_files()
        if self.group_by_length and self.known is None:
            self.known = kinds_and_lengths(self.train, self.on_error)

    def open_files(self) -> None:
        """Open the files, and read no more of them than their index."""
        if not self.train and not self.stream:
            source = self.train_source
            sources = source if isinstance(source, Mapping) else [source]
            sets = [open_samples(each, self.root) for each in sources]
            self.sizes = [len(samples) for samples in sets]
            self.train = Samples([file for samples in sets for file in samples.files])
            self.content = content_of([file.path for samples in sets for file in samples.files])
        if self.val_source is not None:
            self.val = self.val or open_samples(self.val_source, self.root)

    # Loaders ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data, for Lightning's checkpoints.

        Lightning would keep it for the loader too, but forgets it where a schedule asks for the number of
        steps before the run is restored.
        """
        return {} if self.loader is None else self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, whether the loader is made already or not."""
        self.resumed = state or None
        if self.loader is not None and state:
            self.loader.load_state_dict(state)

    def train_dataloader(self) -> Loader:
        """The batches of this process."""
        self.loader = self._train_loader()
        if self.resumed is not None:
            self.loader.load_state_dict(self.resumed)
            self.resumed = None
        self.made.add(self.loader)
        return self.loader

    def _train_loader(self) -> Loader:
        reader = self.reader()
        process, processes = self.rank_and_world_size()
        options: dict[str, Any] = {
            "workers": self.worker_count(reader),
            "skips": self.skips(len(self.train) or (self.batches_per_epoch or 0) * self.batch_size),
            "epoch": 0 if self.trainer is None else self.trainer.current_epoch,
            "limit": None if self.trainer is None else lambda: self.trainer.num_training_batches,
        }
        batches = BatchReader(self.train, reader, self.max_questions, self.seed, self.tokenizer())
        if self.stream:
            from merv.data.sources import stream_samples
            from merv.data.stream_loader import StreamLoader, StreamReader

            source = stream_samples(self.train_source, self.root)
            stream = StreamReader(
                source, batches, self.batch_size, self.shuffle_buffer_size, process, processes
            )
            return StreamLoader(stream, length=self.batches_per_epoch or 1, **options)
        weights = list(self.train_source.values()) if isinstance(self.train_source, Mapping) else None
        kinds, lengths = self.known or (None, None)
        order = EpochOrder(
            self.sizes,
            self.batch_size,
            processes,
            self.seed,
            weights=weights,
            kinds=kinds,
            lengths=lengths,
        )
        if isinstance(self.train_source, Mapping):
            mixed = zip(order.portions, self.sizes, self.train_source, strict=True)
            logger.info(
                "An epoch has %s", ", ".join(f"{part} of {all_} of {path}" for part, all_, path in mixed)
            )
        return Loader(batches, order, process=process, content=self.content, **options)

    def _val_dataloader(self) -> Loader:
        """Batches in the order of the file, dealt to the processes, with all conversations."""
        reader = self.reader()
        process, processes = self.rank_and_world_size()
        order = EpochOrder([len(self.val)], self.batch_size, processes, shuffle=False)
        workers, skips = self.worker_count(reader), self.skips(len(self.val))
        batches = BatchReader(self.val, reader, tokenizer=self.tokenizer())
        loader = Loader(batches, order, process=process, workers=workers, skips=skips)
        self.made.add(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the workers of a run that is over."""
        for loader in self.made:
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the workers of a run that failed."""
        self.teardown()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave batches as they are: the model moves what it makes of them."""
        return batch

    # What they depend on ------------------------------------------------------------------

    def model(self) -> VideoLLM | None:
        """What is trained, if it is one."""
        from merv.models.video_llm import VideoLLM

        module = None if self.trainer is None else self.trainer.lightning_module
        model = getattr(module, "model", None)
        return model if isinstance(model, VideoLLM) else None

    def reader(self) -> Reader | None:
        """That of the model which is trained; None, and videos stay as they are, where there is none."""
        model = self.model()
        return None if model is None else model.vision.reader(model.feature_store)

    def tokenizer(self) -> Any:
        """That of the model which is trained, or None."""
        model = self.model()
        return None if model is None else model.tokenizer

    def rank_and_world_size(self) -> tuple[int, int]:
        """Which of how many processes that share the data this is."""
        several = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (several["rank"], several["num_replicas"]) if several else (0, 1)

    def worker_count(self, reader: Reader | None) -> int:
        """How many processes read for this one."""
        in_memory = reader is not None and reader.store is not None and reader.store.folder is None
        if in_memory or self.num_workers is not None:
            return 0 if in_memory else self.num_workers or 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        together = 1 if self.trainer is None else self.trainer.num_devices  # processes on this machine
        return max(0, min(8, cores // together - 1))

    def skips(self, samples: int) -> BadSamplePolicy:
        """What to do about bad ones."""
        most = max(10, samples // 100) if self.max_skipped is None else self.max_skipped
        folder = None if self.trainer is None else self.trainer.default_root_dir
        return BadSamplePolicy(self.on_error, most, folder)

    def videos(self) -> Iterator[tuple[str, Any]]:
        """Each distinct video of both files once, with the first row that has it; a stream's are not known.

        A row that is wrong is an error, or, to be skipped later, passed over.
        """
        seen = set()
        for samples in (self.train, self.val):
            for number in range(len(samples)):
                with suppress(DataError) if self.on_error == "skip" else nullcontext():
                    for video in samples[number].videos():
                        if hash(video) not in seen:
                            seen.add(hash(video))
                            yield samples[number].origin, video


def kinds_and_lengths(
    samples: Sequence[Sample], on_error: OnError = "raise"
) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample, its place in KINDS, and how long it is: its characters, and VISUAL for what is shown.

    Where a sample is wrong, DataError, or, to be skipped later, a text of length 0.
    """
    kinds = np.full(len(samples), KINDS.index("text"), dtype=np.int8)
    lengths = np.zeros(len(samples), dtype=np.int64)
    for number in range(len(samples)):
        try:
            talks = samples[number].conversations
        except DataError:
            if on_error == "raise":
                raise
            continue
        shown = {part["type"] for talk in talks for part in media_parts(talk)}
        kinds[number] = min((KINDS.index(kind) for kind in shown), default=KINDS.index("text"))
        told = sum(said(turn["content"]) for talk in talks for turn in talk)
        lengths[number] = told + VISUAL * max((len(media_parts(talk)) for talk in talks), default=0)
    return kinds, lengths


def content_of(files: Sequence[Path]) -> str:
    """A hash of what is in files or folders, wherever they are; of large ones, size and 64 pieces."""
    digest = hashlib.sha256()
    for root in files:
        for path in sorted(p for p in (root, *root.rglob("*")) if p.is_file()):
            if path.name.startswith("cache-"):  # that `datasets` puts into its folders
                continue
            size = path.stat().st_size
            digest.update(f"{size} ".encode())
            with path.open("rb") as file:
                for piece in range(64):
                    file.seek(max(size - PIECE, 0) * piece // 63)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def said(content: Any) -> int:
    """Characters in the content of a turn.

    >>> said("Who?"), said([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Who?"}])
    (4, 4)
    """
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return sum(map(len, texts))
