"""Encode many videos into a feature store: worker processes decode, the encoders run in this process.

An extraction can be stopped at any time and run again: what is stored is not computed again. Several
extractions, also on several machines, can write to one store.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from merv.data.loader import SAMPLE_ERRORS
from merv.errors import DataError
from merv.extraction.videos import Item
from merv.features.keys import range_of
from merv.features.reader import LoadedVideo, Reader
from merv.features.shard import FeatureKey
from merv.features.store import FeatureStore
from merv.models.multi_encoder import MultiEncoder
from merv.video.open import open_video
from merv.video.reader import reason_of

PREFETCH = 2  # videos that each worker reads ahead
SHORTEST_WINDOW_S = 0.1


@dataclass(frozen=True)
class Failure:
    """A video whose features could not be computed."""

    source: str
    error: str
    reason: str


@dataclass
class Extraction:
    """The result of `extract`.

    Args:
        keys: For each video or window that did not fail: encoder name → the key of its features.
        encoded: Number of videos, or windows of videos, that at least one encoder has encoded.
        stored: Number of those whose features were all in the store.
        failures: Videos and windows that could not be read.
        seconds: Duration of the extraction.
        waited_s: How long the encoders waited for a decoded video.
        decode_cpu_s: CPU time of hashing, decoding and preprocessing, of all workers.
    """

    keys: list[dict[str, FeatureKey]] = field(default_factory=list)
    encoded: int = 0
    stored: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    waited_s: float = 0.0
    decode_cpu_s: float = 0.0

    @property
    def causes(self) -> Counter[str]:
        """Number of failures by kind of error."""
        return Counter(failure.error for failure in self.failures)


def extract(
    encoders: MultiEncoder,
    items: Sequence[Item],
    store: FeatureStore,
    *,
    window_s: float | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    failed: str | Path | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] = bool,
) -> Extraction:
    """Encode videos into a store.

    Args:
        encoders: The encoders, on their device and with their dtype. The fusion is not used.
        items: The videos.
        store: Where the features go; it is flushed at the end.
        window_s: Cut each video into windows of this many seconds, each with features of its own. The last
            one is shorter. None: whole videos.
        batch_size: How many videos or windows to encode at a time. More can be faster on a GPU, but the
            last bits of the features then depend on the other videos of the batch.
        num_workers: Worker processes that decode; 0: this process does it.
        failed: File to which each failure is written as a line of JSON. It is overwritten.
        progress: Show a progress bar with rate, time left, failures and the share of time that the encoders
            waited.
        should_stop: Called after each video; if it returns True, the extraction ends early.

    Returns:
        Counts, times, and the keys of the features.

    Raises:
        DataError: The store or `failed` cannot be written, a worker process was killed, or a GPU has not
            enough memory for a batch. What is stored stays.

    Example:
        >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        >>> store = FeatureStore()
        >>> result = extract(MultiEncoder(["fake"], grid=(4, 2, 2)), [Item("zeros", video)], store)
        >>> result.encoded, len(store)
        (1, 1)
    """
    result, start = Extraction(), time.perf_counter()
    _allow_open_files()
    store.recover()
    len(store)  # reads the index, so that forked workers have it
    loader: Any = DataLoader(
        _Reading(encoders.reader(store), items, window_s),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_start_worker,
    )
    failures = None if failed is None else Path(failed)
    bar = tqdm(total=len(items), desc="Extracting", unit="video", disable=None if progress else True)
    batch: list[LoadedVideo] = []

    def note(failed_videos: Sequence[Failure]) -> None:
        result.failures.extend(failed_videos)
        if failures is not None:
            for failure in failed_videos:
                _write(failures, "a", json.dumps(vars(failure)) + "\n")

    unfinished = list(range(max(num_workers, 1)))  # for each worker, the number of its next item
    try:
        if failures is not None and failures.exists():
            _write(failures, "w", "")
        for index, is_last, loaded, cpu_s in _waiting(loader, result):
            unfinished[index % len(unfinished)] = index + is_last * len(unfinished)
            result.decode_cpu_s += cpu_s
            if isinstance(loaded, Failure):
                note([loaded])
            elif loaded.clip is None:
                result.stored += 1
                result.keys.append(dict(loaded.keys))
            else:
                batch.append(loaded)
            if len(batch) == batch_size:
                note(_encode(encoders, batch, store, result))
                batch.clear()
            bar.update(is_last)
            waiting = result.waited_s / max(time.perf_counter() - start, 1e-9)
            bar.set_postfix(waiting=f"{waiting:.0%}", failed=len(result.failures), refresh=False)
            if should_stop():
                break
        note(_encode(encoders, batch, store, result))
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not num_workers or (isinstance(error, RuntimeError) and not _is_of_killed_worker(error)):
            raise
        _await_signal()
        # It interrupts whatever runs, perhaps the encoding of the video before
        ahead = range(0, (PREFETCH + 1) * num_workers, num_workers)
        numbers = sorted(first + more for first in unfinished for more in ahead)
        names = ", ".join(items[number].name for number in numbers if number < len(items))
        raise DataError(
            f"A worker process was killed while it read one of {names}; often, the memory was full. Run the "
            "same command again with fewer --num-workers, or without that video: stored features are kept."
        ) from error
    finally:
        bar.close()
        _flush(store)
    result.seconds = time.perf_counter() - start
    return result


def _allow_open_files() -> None:
    """Raise the limit of open files: each tensor from a worker has one, and a batch has many tensors."""
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _is_of_killed_worker(error: RuntimeError) -> bool:
    return any(text in str(error) for text in ("exited unexpectedly", "is killed by signal"))


def _await_signal() -> None:
    """Let torch raise the error that a worker was killed here, if it has not yet."""
    with suppress(RuntimeError):
        time.sleep(1)


def _flush(store: FeatureStore) -> None:
    try:
        store.flush()
    except RuntimeError as error:  # torch raises it in whatever runs when a worker is killed
        if not _is_of_killed_worker(error):
            raise
        store.flush()


def _write(file: Path, mode: str, text: str) -> None:
    try:
        with file.open(mode, encoding="utf-8") as lines:
            lines.write(text)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error}. Pass another file as --failed.") from error


def _encode(
    encoders: MultiEncoder, batch: Sequence[LoadedVideo], store: FeatureStore, result: Extraction
) -> list[Failure]:
    """Encode and store some videos; return those whose features cannot be stored."""
    if not batch:
        return []
    try:
        with torch.inference_mode():
            encoders.features(batch, store=store, together=True)
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"There is not enough memory to encode {len(batch)} videos at a time: {error}. Run the same "
            "command again with a smaller --batch-size: stored features are kept."
        ) from error
    except SAMPLE_ERRORS as error:
        if len(batch) > 1:
            return [failure for video in batch for failure in _encode(encoders, [video], store, result)]
        return [_failure(next((key.source for key in batch[0].keys.values()), ""), error)]
    if store.read_only:
        raise DataError(
            f"{store.folder} cannot be written; see the warning above. The features of {len(store)} videos "
            "and encoders are stored. Free space or choose another folder, and run the same command again."
        )
    result.encoded += len(batch)
    result.keys += [dict(video.keys) for video in batch]
    return []


def _waiting(loader: Any, result: Extraction) -> Any:
    """Yield what the loader yields, and measure how long that takes."""
    iterator = iter(loader)
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        result.waited_s += time.perf_counter() - start
        yield item


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends the workers


def windows(span_s: tuple[float, float], window_s: float) -> list[tuple[float, float]]:
    """Cut a range of a video into windows; a rest of less than 0.1 seconds joins the last. A still has none.

    >>> windows((0.0, 25.0), 10.0)
    [(0.0, 10.0), (10.0, 20.0), (20.0, 25.0)]
    """
    start_s, end_s = span_s
    count = max(math.ceil((end_s - start_s - SHORTEST_WINDOW_S) / window_s), int(end_s > start_s))
    starts = [round(start_s + window_s * number, 6) for number in range(count)]
    return list(pairwise([*starts, math.ceil(end_s * 1e6) / 1e6]))  # rounded up: to the end of the video


class _Reading(IterableDataset):
    """Reads videos in worker processes.

    Yields the number of the item, whether this was its last window, what was read or the failure, and the CPU
    time that it took.
    """

    def __init__(self, reader: Reader, items: Sequence[Item], window_s: float | None) -> None:
        if window_s is not None and not window_s >= SHORTEST_WINDOW_S:
            raise DataError(f"Expected window_s to be at least {SHORTEST_WINDOW_S} seconds, got {window_s}.")
        self.reader, self.items, self.window_s = reader, items, window_s

    def __iter__(self) -> Iterator[tuple[int, bool, LoadedVideo | Failure, float]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.items), step):
            start = time.process_time()
            for is_last, loaded in self._read(self.items[index]):
                yield index, is_last, loaded, time.process_time() - start
                start = time.process_time()

    def _read(self, item: Item) -> Iterator[tuple[bool, LoadedVideo | Failure]]:
        with ExitStack() as stack:
            readers, opened = [self.reader], None
            try:
                if item.error:
                    raise DataError(item.error)
                if self.window_s is not None:
                    opened = stack.enter_context(open_video(item.source, backend=self.reader.backend))
                    spans_s = windows(self.reader.sampling.span_s(opened.info), self.window_s)
                    if len(spans_s) > 1:
                        readers = [self.reader.of_range(*span_s) for span_s in spans_s]
            except Exception as error:
                yield True, _failure(item.name, error)
                return
            for reader in readers:
                try:
                    loaded: LoadedVideo | Failure = reader(item.source, name=item.name, opened=opened)
                except Exception as error:  # whatever it is, the others are still read
                    loaded = _failure(item.name + range_of(reader.sampling), error)
                yield reader is readers[-1], loaded


def _failure(source: str, error: Exception) -> Failure:
    return Failure(source, type(error).__name__, reason_of(error))
