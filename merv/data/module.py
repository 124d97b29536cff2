"""Data module: training and validation batches for `merv fit`, from files of samples."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from weakref import WeakSet

import numpy as np
from lightning import LightningDataModule

from merv.data.loader import BadSamplePolicy, BatchReader, Loader, OnError
from merv.data.order import MODALITIES, EpochOrder
from merv.data.samples import Sample, media_parts, text_of
from merv.data.sources import Samples, foreign_members, open_samples, stream_samples
from merv.data.stream_loader import StreamLoader, StreamReader
from merv.errors import DataError
from merv.features.reader import Reader

if TYPE_CHECKING:
    from merv.models.video_llm import VideoLLM

HASHED_BYTES = 1 << 16  # size of each of the 64 pieces of a large file that are hashed
VISUAL_LENGTH = 4096  # length of a video or image in characters: 1024 tokens of 4 characters

logger = logging.getLogger(__name__)


class ChatData(LightningDataModule):
    """Training and validation data from files of conversations; docs/data.md describes the formats.

    Args:
        train: One or more files, all of which are used once in an epoch; or a mapping of files to weights,
            by which they are mixed. An epoch is then as long as it can be without a repeated sample.
        val: One or more files, or None.
        batch_size: Samples per batch and process. An optimizer step uses batch_size × processes ×
            trainer.accumulate_grad_batches samples.
        max_questions: Maximum number of conversations per sample and epoch. Each epoch draws different
            ones.
        seed: Seed of the order of samples and of the choice of conversations. The order also depends on the
            number of processes; for a stream also on `num_workers`, so set it. It does not change the initial
            weights: --seed_everything does.
        group_by_length: Make batches of one modality (video, image or text) and of similar lengths. The
            largest batch of each modality comes first. All samples are read once at the start.
        num_workers: Processes that read videos ahead, one thread each. None: one less than the CPU cores per
            training process, at most 8. There are no workers if features are stored in memory, because only
            the training process has that memory.
        on_error: What to do about a sample that cannot be used: `raise`; or `skip`, which logs it and
            appends it to `skipped.jsonl` in the run's folder. A skipped sample is not replaced.
        max_skipped: Stop when a process has skipped more than this many distinct samples. None: 1 % of the
            samples, at least 10.
        stream: Read `train` in passes, for data that is too large to index: Parquet files, or the name of a
            dataset on the hub. Needs `batches_per_epoch`.
        batches_per_epoch: Number of batches of each process in an epoch of a stream.
        shuffle_buffer_size: Samples of a stream that are shuffled together.
        root: The folder that paths in rows start at. None: the folder of each file.

    Raises:
        DataError: Options contradict each other, or a file cannot be read.
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
        if min(batch_size, max_questions, shuffle_buffer_size) < 1:
            raise DataError(
                "Expected batch_size, max_questions and shuffle_buffer_size of at least 1; got "
                f"{batch_size}, {max_questions} and {shuffle_buffer_size}."
            )
        if on_error not in get_args(OnError):
            raise DataError(f"Expected on_error to be 'raise' or 'skip'; got {on_error!r}.")
        if stream and batches_per_epoch is None:
            raise DataError("A stream has no known length. Set data.batches_per_epoch.")
        if stream and (group_by_length or isinstance(train, Mapping)):
            raise DataError(
                "A stream cannot be grouped by length or mixed by weight, because its samples are not known "
                "in advance. Set data.group_by_length to false and give data.train without weights."
            )
        self.train_source, self.val_source, self.root = train, val, root
        self.batch_size, self.max_questions, self.seed = batch_size, max_questions, seed
        self.group_by_length, self.num_workers = group_by_length, num_workers
        self.on_error, self.max_skipped = on_error, max_skipped
        self.stream, self.batches_per_epoch = stream, batches_per_epoch
        self.shuffle_buffer_size = shuffle_buffer_size
        self.train: Sequence[Sample] = ()
        self.content = ""  # hash of the training files
        self.val: Sequence[Sample] = ()
        self.sizes: list[int] = []  # samples in each training source
        self.loader: Loader | None = None
        self.loaders: WeakSet[Loader] = WeakSet()  # their workers are stopped after the run
        self.resume_state: dict[str, Any] | None = None
        self.logged: set[Path] = set()  # shards with members that do not belong to samples
        self.modalities_and_lengths: tuple[np.ndarray, np.ndarray] | None = None
        if val is not None:  # Lightning skips validation if there is no val_dataloader
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Open the files and, with `group_by_length`, read all samples."""
        self.open_files()
        if self.group_by_length and self.modalities_and_lengths is None:
            self.modalities_and_lengths = modalities_and_lengths(self.train, self.on_error)

    def open_files(self) -> None:
        """Open the files and read their indices, without reading samples."""
        if not self.train and not self.stream:
            source = self.train_source
            sources = source if isinstance(source, Mapping) else [source]
            sets = [open_samples(each, self.root) for each in sources]
            files = [file for samples in sets for file in samples.files]
            self.sizes = [len(samples) for samples in sets]
            self.train = Samples(files)
            self.content = content_hash([file.path for file in files])
            self._log_foreign_members(self.train)
        if self.val_source is not None and not self.val:
            self.val = open_samples(self.val_source, self.root)
            self._log_foreign_members(self.val)

    def _log_foreign_members(self, samples: Samples) -> None:
        """Log once for each shard which of its members do not belong to samples."""
        for rows in samples.files:
            if rows.foreign and rows.path not in self.logged:
                self.logged.add(rows.path)
                logger.warning("%s: %s", rows.path, foreign_members(rows))

    # Loaders ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, for Lightning's checkpoints.

        Lightning would save the loader's state too, but loses it if a schedule asks for the number of steps
        before the run is restored.
        """
        return {} if self.loader is None else self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position at which training goes on, whether or not the loader exists yet."""
        self.resume_state = state or None
        if self.loader is not None and state:
            self.loader.load_state_dict(state)

    def train_dataloader(self) -> Loader:
        """Return the training batches of this process."""
        self.loader = self._train_loader()
        if self.resume_state is not None:
            self.loader.load_state_dict(self.resume_state)
            self.resume_state = None
        self.loaders.add(self.loader)
        return self.loader

    def _train_loader(self) -> Loader:
        reader = self.reader()
        rank, world_size = self.rank_and_world_size()
        options: dict[str, Any] = {
            "num_workers": self.worker_count(reader),
            "policy": self.policy(len(self.train) or (self.batches_per_epoch or 0) * self.batch_size),
            "epoch": 0 if self.trainer is None else self.trainer.current_epoch,
            "limit": None if self.trainer is None else lambda: self.trainer.num_training_batches,
        }
        batch_reader = BatchReader(self.train, reader, self.max_questions, self.seed, self.chat())
        if self.stream:
            source = stream_samples(self.train_source, self.root)
            stream = StreamReader(
                source, batch_reader, self.batch_size, self.shuffle_buffer_size, rank, world_size
            )
            return StreamLoader(stream, batches_per_epoch=self.batches_per_epoch or 1, **options)
        weights = list(self.train_source.values()) if isinstance(self.train_source, Mapping) else None
        modalities, lengths = self.modalities_and_lengths or (None, None)
        order = EpochOrder(
            self.sizes,
            self.batch_size,
            world_size,
            self.seed,
            weights=weights,
            modalities=modalities,
            lengths=lengths,
        )
        if isinstance(self.train_source, Mapping):
            mixed = zip(order.portions, self.sizes, self.train_source, strict=True)
            counts = ", ".join(f"{portion} of {size} of {path}" for portion, size, path in mixed)
            logger.info("Samples in an epoch: %s", counts)
        return Loader(batch_reader, order, rank=rank, content=self.content, **options)

    def _val_dataloader(self) -> Loader:
        """Return the validation batches of this process, in the order of the file, with all conversations."""
        reader = self.reader()
        rank, world_size = self.rank_and_world_size()
        order = EpochOrder([len(self.val)], self.batch_size, world_size, shuffle=False)
        batch_reader = BatchReader(self.val, reader, chat=self.chat())
        loader = Loader(
            batch_reader,
            order,
            rank=rank,
            num_workers=self.worker_count(reader),
            policy=self.policy(len(self.val)),
        )
        self.loaders.add(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """Stop the workers after a run."""
        for loader in self.loaders:
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the workers after a run that failed."""
        self.teardown()

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave the batch as it is: the model moves its tensors itself."""
        return batch

    # What the loaders depend on -----------------------------------------------------------

    def model(self) -> VideoLLM | None:
        """Return the model that is trained, if it is a VideoLLM."""
        from merv.models.video_llm import VideoLLM

        module = None if self.trainer is None else self.trainer.lightning_module
        model = getattr(module, "model", None)
        return model if isinstance(model, VideoLLM) else None

    def reader(self) -> Reader | None:
        """Return the model's reader; None leaves videos unread."""
        model = self.model()
        return None if model is None else model.vision.reader(model.feature_store)

    def chat(self) -> Any:
        """Return the model's chat template, or None."""
        model = self.model()
        return None if model is None else model.chat

    def rank_and_world_size(self) -> tuple[int, int]:
        """Return this process's rank, and the number of processes that share the data."""
        sampler = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)

    def worker_count(self, reader: Reader | None) -> int:
        """Return the number of workers of this process."""
        in_memory = reader is not None and reader.store is not None and reader.store.folder is None
        if in_memory or self.num_workers is not None:
            return 0 if in_memory else self.num_workers or 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = 1 if self.trainer is None else self.trainer.num_devices  # on this machine
        return max(0, min(8, cores // processes - 1))

    def policy(self, num_samples: int) -> BadSamplePolicy:
        """Return the policy for samples that cannot be used."""
        max_skipped = max(10, num_samples // 100) if self.max_skipped is None else self.max_skipped
        folder = None if self.trainer is None else self.trainer.default_root_dir
        return BadSamplePolicy(self.on_error, max_skipped, folder)

    def videos(self) -> Iterator[tuple[str, Any]]:
        """Yield each distinct video of the training and validation files, with the first row that has it.

        Streams are left out. A malformed row raises DataError, or is left out if `on_error` is "skip".
        """
        seen = set()
        for sample in chain(self._valid(self.train), self._valid(self.val)):
            for video in sample.videos():
                if hash(video) not in seen:
                    seen.add(hash(video))
                    yield sample.origin, video

    def val_kinds(self) -> list[str]:
        """Return the kinds of questions in the validation files, sorted; "" is left out.

        A malformed row raises DataError, or is left out if `on_error` is "skip".
        """
        return sorted({kind for sample in self._valid(self.val) for kind in sample.kinds} - {""})

    def _valid(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        for number in range(len(samples)):
            with suppress(DataError) if self.on_error == "skip" else nullcontext():
                yield samples[number]


def modalities_and_lengths(
    samples: Sequence[Sample], on_error: OnError = "raise"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the modality of each sample as an index into MODALITIES, and its length in characters.

    A video or image counts as VISUAL_LENGTH characters. A malformed sample raises DataError, or counts as
    text of length 0 if `on_error` is "skip".
    """
    modalities = np.full(len(samples), MODALITIES.index("text"), dtype=np.int8)
    lengths = np.zeros(len(samples), dtype=np.int64)
    for number in range(len(samples)):
        try:
            conversations = samples[number].conversations
        except DataError:
            if on_error == "raise":
                raise
            continue
        media = [media_parts(conversation) for conversation in conversations]
        types = {part["type"] for parts in media for part in parts} or {"text"}
        modalities[number] = min(map(MODALITIES.index, types))
        characters = sum(len(text_of(turn["content"])) for turns in conversations for turn in turns)
        lengths[number] = characters + VISUAL_LENGTH * max(map(len, media), default=0)
    return modalities, lengths


def content_hash(files: Sequence[Path]) -> str:
    """Hash the content of files or folders, but not their paths; of a large file, its size and 64 pieces."""
    digest = hashlib.sha256()
    for root in files:
        for path in sorted(p for p in (root, *root.rglob("*")) if p.is_file()):
            if path.name.startswith("cache-"):  # which `datasets` writes into its folders
                continue
            size = path.stat().st_size
            digest.update(f"{size} ".encode())
            with path.open("rb") as file:
                for piece in range(64):
                    file.seek(max(size - HASHED_BYTES, 0) * piece // 63)
                    digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()[:16]
