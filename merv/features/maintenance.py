"""Look after the folders of a feature store: check every byte, merge small shards, delete leftovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from merv.errors import DataError
from merv.features.places import LocalFolder, RemoteFolder
from merv.features.shard import InvalidShard, Packed, Record, ShardWriter, digest_of
from merv.features.store import VIDEOS_PER_SHARD, FeatureStore, publish, read_records


@dataclass(frozen=True)
class Damage:
    """Something in a store that cannot be read.

    Args:
        shard: Path of the file.
        reason: What is wrong.
        source: The video, if only its record is damaged.
    """

    shard: str
    reason: str
    source: str = ""


def verify(store: FeatureStore, progress: bool = False) -> tuple[int, list[Damage]]:
    """Read every byte of a store and compare it with its digests.

    Returns:
        The number of valid records, and what is damaged.
    """
    valid, damaged = 0, []
    for place in store.places:
        names = place.names() if place.version() is not None else {}
        for name, size in tqdm(names.items(), "Verifying", unit="shard", disable=None if progress else True):
            path = f"{place.address}/{name}"
            try:
                records = read_records(place, name, size)
            except (OSError, InvalidShard) as error:
                damaged.append(Damage(path, str(error)))
                continue
            end = max((record.offset + record.size for record in records), default=size)
            if end != size:
                damaged.append(Damage(path, f"it has {size} bytes; expected {end}"))
            for record in records:
                if _packed(place, record) is not None:
                    valid += 1
                else:
                    source = record.key.source or record.key.video
                    damaged.append(Damage(path, f"the {record.key.encoder} features are damaged", source))
    return valid, damaged


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` did: numbers of shards before and after, bytes freed, records dropped."""

    shards_before: int
    shards_after: int
    bytes_freed: int
    dropped: int


def collect_garbage(
    store: FeatureStore, keep: Callable[[Record], bool] = lambda record: True, progress: bool = False
) -> Collected:
    """Rewrite shards that are small, damaged, or hold records that are repeated or not to be kept.

    New shards are published before old ones are deleted, so others can read and write the store meanwhile.

    Args:
        store: A store with one folder.
        keep: Whether to keep a record.
        progress: Show a progress bar.

    Raises:
        DataError: The store is in memory, has several folders, or could not be written.
    """
    if len(store.places) != 1:
        raise DataError("Expected a store with one folder. Pass its folder alone.")
    (place,) = store.places
    store.flush()
    store.recover()  # publishes or removes what killed processes left
    before = place.names() if place.version() is not None else {}
    old: dict[str, int] = {}
    move: list[Record] = []
    seen: set[str] = set()
    dropped = 0
    for name, size in sorted(before.items(), key=lambda item: -item[1]):
        try:
            records = read_records(place, name, size)
        except (OSError, InvalidShard):
            old[name] = size
            continue
        kept = [r for r in records if r.key.id not in seen and keep(r) and _packed(place, r) is not None]
        seen |= {record.key.id for record in kept}
        videos = len({record.key.video for record in records})
        if len(kept) < len(records) or videos < VIDEOS_PER_SHARD:
            old[name], dropped = size, dropped + len(records) - len(kept)
            move += kept
    if len(old) <= 1 and not dropped and all(name in {r.shard for r in move} for name in old):
        old, move = {}, []  # one small shard, as a store has at its end
    try:
        new = list(_rewritten(place, move, progress)) if old else []
    except OSError as error:
        raise DataError(f"{place.address} could not be rewritten: {error}. Nothing was deleted.") from error
    for name in old:
        if name not in new:
            place.remove(name)
    after = place.names() if place.version() is not None else {}
    return Collected(len(before), len(after), sum(before.values()) - sum(after.values()), dropped)


def _rewritten(place: LocalFolder | RemoteFolder, records: list[Record], progress: bool) -> Iterator[str]:
    """Write records to new shards, all of a video together; yield the names of the shards."""
    by_video: dict[str, list[Record]] = {}
    for record in records:
        by_video.setdefault(record.key.video, []).append(record)
    videos = list(by_video.values())
    bar = tqdm(total=len(videos), desc="Rewriting", unit="video", disable=None if progress else True)
    start = 0
    while start < len(videos):
        writer = ShardWriter(place.temporary(), VIDEOS_PER_SHARD)
        try:
            while start < len(videos) and not writer.is_full:
                packed = [p for record in videos[start] if (p := _packed(place, record))]
                if packed and not writer.append(packed):
                    break  # no room for this video; it begins the next shard
                start += 1
                bar.update()
            yield publish(writer, place)
        finally:
            place.discard(writer.path)
    bar.close()


def _packed(place: LocalFolder | RemoteFolder, record: Record) -> Packed | None:
    """A record as it is; None if it is damaged, so that it is computed again when it is needed."""
    try:
        data: np.ndarray = place.read(record.shard, record.offset, record.size)
    except OSError:
        return None
    if digest_of(data) != record.digest:
        return None
    return Packed(record.key, record.dtype, record.fields, (data,), record.digest)
