"""Look after the folders of a feature store: check every byte, merge small shards, delete leftovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from merv.errors import DataError
from merv.features.places import LocalFolder, RemoteFolder
from merv.features.shard import InvalidShard, OtherFormat, Packed, Record, ShardWriter, digest_of
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
                try:
                    reason = "" if _packed(place, record) else "they are damaged"
                except OSError as error:
                    reason = str(error)
                valid += not reason
                if reason:
                    source = record.key.source or record.key.video
                    damaged.append(Damage(path, f"the features of {record.key.encoder}: {reason}", source))
    return valid, damaged


@dataclass(frozen=True)
class Collected:
    """What `collect_garbage` did.

    Args:
        shards_before: Number of files before.
        shards_after: Number of files after.
        bytes_freed: How much smaller the store is.
        dropped: Number of records that were repeated, damaged, or not to be kept.
        unreadable: Number of files that were deleted because their header is damaged.
    """

    shards_before: int
    shards_after: int
    bytes_freed: int
    dropped: int
    unreadable: int


def collect_garbage(
    store: FeatureStore, keep: Callable[[Record], bool] = lambda record: True, progress: bool = False
) -> Collected:
    """Rewrite shards that are small, damaged, or hold records that are repeated or not to be kept.

    New shards are published before old ones are deleted, so others can read and write the store meanwhile.
    Shards of another format are left alone.

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
    try:
        old, move, dropped, unreadable = _to_rewrite(place, before, keep)
        new = list(_rewritten(place, move, progress))
    except OSError as error:
        raise DataError(f"{place.address} could not be rewritten: {error}. Nothing was deleted.") from error
    for name in old - set(new):
        place.remove(name)
    after = place.names() if place.version() is not None else {}
    freed = sum(before.values()) - sum(after.values())
    return Collected(len(before), len(after), freed, dropped, unreadable)


def _to_rewrite(
    place: LocalFolder | RemoteFolder, shards: Mapping[str, int], keep: Callable[[Record], bool]
) -> tuple[set[str], list[Record], int, int]:
    """The shards to delete, their records to keep, and the numbers of dropped records and bad shards."""
    old: set[str] = set()
    move: list[Record] = []
    seen: set[str] = set()
    dropped = unreadable = 0
    for name, size in sorted(shards.items(), key=lambda item: -item[1]):
        try:
            records = read_records(place, name, size)
        except OtherFormat:
            continue
        except InvalidShard:
            old.add(name)
            unreadable += 1
            continue
        kept = [r for r in records if r.key.id not in seen and keep(r) and _packed(place, r) is not None]
        seen |= {record.key.id for record in kept}
        if len(kept) < len(records) or len({record.key.video for record in records}) < VIDEOS_PER_SHARD:
            old.add(name)
            dropped += len(records) - len(kept)
            move += kept
    if len(old) == 1 and not dropped and not unreadable:
        return set(), [], 0, 0  # one small shard, as a store has at its end
    return old, move, dropped, unreadable


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
            writer.close()
            place.discard(writer.path)
    bar.close()


def _packed(place: LocalFolder | RemoteFolder, record: Record) -> Packed | None:
    """A record as it is; None if it is damaged, so that it is computed again when it is needed."""
    data: np.ndarray = place.read(record.shard, record.offset, record.size)
    if digest_of(data) != record.digest:
        return None
    return Packed(record.key, record.dtype, record.fields, (data,), record.digest)
