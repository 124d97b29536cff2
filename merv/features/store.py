"""Store aligned features, so that frozen encoders run once per video.

Features are found by a hash of the content of the video and of everything else that they depend on. What is
read back equals what was stored, bit for bit, unless the store has a smaller `dtype`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from merv.errors import DataError
from merv.features.places import LocalFolder, RemoteFolder, place_at
from merv.features.shard import (
    FeatureKey,
    InvalidShard,
    Packed,
    Record,
    ShardWriter,
    digest_of,
    grid_of,
    header_size,
    pack,
    parse,
    recover,
)
from merv.types import Grid
from merv.utils.files import is_abandoned, temporaries_beside

log = logging.getLogger(__name__)
VIDEOS_PER_SHARD = 64
StoreDtype = Literal["float32", "float16", "bfloat16", "int8"]


class FeatureStore:
    """A dictionary of features, in memory or in one or more folders of safetensors files.

    Features are written to a file that is published, for other processes to read, when it has 64 videos, and
    by `flush`, `close` or the end of the process. If the process is killed, the next one that writes to the
    folder publishes what was complete. Any number of processes and machines can read and write one folder.

    Args:
        folder: Where to store features: a folder or an address of fsspec (`s3://…`). Of several, the first
            is written to. None stores them in memory.
        dtype: How to store the features: "float32", "float16", "bfloat16", or "int8" with a scale per cell.
            None: as they are.
        verify: Check each record's digest when it is read: 0.1 ms per MB. A damaged record counts as
            missing, and a warning is logged.
        read_only: Never write. Features that are not in the store are computed each time.

    Raises:
        DataError: `folder` is not a folder, or holds features of an older version of merv.

    Example:
        >>> from merv import MultiEncoder
        >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        >>> store, encoders = FeatureStore(), MultiEncoder(["fake"], grid=(4, 2, 2))
        >>> features = encoders.features(video, store=store)
        >>> store
        FeatureStore(in memory: 1 video, 1 encoder)
        >>> store.get(encoders.key(video, "fake")).shape
        (4, 2, 2)
    """

    def __init__(
        self,
        folder: str | Path | Sequence[str | Path] | None = None,
        *,
        dtype: StoreDtype | None = None,
        verify: bool = True,
        read_only: bool = False,
    ) -> None:
        if dtype is not None and dtype not in get_args(StoreDtype):
            raise DataError(f"Expected dtype= to be one of {', '.join(get_args(StoreDtype))}; got {dtype!r}.")
        folders = [] if folder is None else [folder] if isinstance(folder, (str, Path)) else list(folder)
        self.places = [place_at(address) for address in folders]
        self.dtype, self.verify, self.read_only = dtype, verify, read_only
        self.memory: dict[FeatureKey, Grid] = {}
        self._open()

    def _open(self) -> None:
        for number, place in enumerate(self.places):
            _check_folder(place, is_written=number == 0 and not self.read_only)
        self._lock = threading.RLock()
        self._writer: ShardWriter | None = None
        self._index: dict[str, list[tuple[Any, Record]]] = {}  # id → its records, and their places
        self._known: dict[tuple[str, str], list[str]] = {}  # address and name of a shard → ids
        self._versions: dict[str, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        kept = {"places": [place.address for place in self.places]}
        return kept | {"dtype": self.dtype, "verify": self.verify, "read_only": self.read_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("places") or None, **state)  # type: ignore[misc]

    @property
    def folder(self) -> str | None:
        """Where features are written; None in memory."""
        return self.places[0].address if self.places else None

    # As a dictionary --------------------------------------------------------------------------

    def get(self, key: FeatureKey) -> Grid | None:
        """Return the features stored under `key`, or None."""
        if not self.places:
            return self.memory.get(key)
        for place, record in self._find(key.id):
            try:
                return self._read(place, record)
            except (OSError, InvalidShard) as error:
                if not self._is_gone(place, record):
                    log.warning(
                        "%s/%s: the features of %s are damaged: %s",
                        *(place.address, record.shard, record.key.source or record.key.video, error),
                    )
                self._forget(place, record)
                self._versions.clear()  # the record may be in a newer shard
                return self.get(key)
        return None

    def put(self, key: FeatureKey, grid: Grid) -> Grid:
        """Store `grid` under `key` and return it on the CPU, as `get` will."""
        return self.put_all({key: grid})[key]

    def put_all(self, grids: Mapping[FeatureKey, Grid]) -> dict[FeatureKey, Grid]:
        """Store the features of one video from several encoders; return them on the CPU, as `get` will.

        If the store cannot be written to, a warning is logged once, and the features are only returned.
        """
        with torch.inference_mode(False):  # training cannot use tensors made in inference mode
            copies = {
                key: Grid(**{name: tensor.detach().cpu().clone() for name, tensor in vars(grid).items()})
                for key, grid in grids.items()
            }
        if not self.places and self.dtype is None:
            self.memory |= copies
            return copies
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        packed = [pack(key, grid, dtype) for key, grid in copies.items()]
        if dtype is not None:
            copies = {record.key: grid_of(np.concatenate(record.pieces), record) for record in packed}
        if not self.places:
            self.memory |= copies
        elif not self.read_only:
            try:
                self._append(packed)
            except OSError as error:
                self._stop_writing(error)
        return copies

    def __contains__(self, key: FeatureKey) -> bool:
        return key in self.memory if not self.places else bool(self._find(key.id))

    def __bool__(self) -> bool:
        """True, also for an empty store."""
        return True

    def __len__(self) -> int:
        """Number of records: pairs of a video and an encoder."""
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[FeatureKey]:
        if not self.places:
            return iter(list(self.memory))
        unpublished = () if self._writer is None else list(self._writer.records.values())
        return (record.key for record in (*self.records(), *unpublished))

    def __repr__(self) -> str:
        keys = list(self)
        videos = len({key.video.partition("@")[0] for key in keys})  # without ranges
        encoders = len({key.options for key in keys})
        where = ", ".join(place.address for place in self.places) or "in memory"
        return (
            f"FeatureStore({where}: {videos} video{'s' * (videos != 1)}, "
            f"{encoders} encoder{'s' * (encoders != 1)})"
        )

    # Writing ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Publish the features that were put since the last shard was full.

        If that fails, a warning is logged. In a local folder, the next process that writes to it tries again.
        """
        with self._lock:
            if self._writer is None or self._process != os.getpid():
                return
            writer = self._writer
            try:
                name = publish(writer, self.places[0])
            except OSError as error:
                self._close_writer()
                self._stop_writing(error, f" What was not published yet stays in {writer.path}.")
            else:
                self._close_writer()
                if name:
                    for record in writer.records.values():
                        self._add(self.places[0], record._replace(shard=name))
                    self._known[self.places[0].address, name] = list(writer.records)

    close = flush

    def _forked(self) -> None:
        """Leave the file of the parent process to it, and write to one of this process's own."""
        self._lock, self._process = threading.RLock(), os.getpid()
        if self._writer is not None:
            self._close_writer()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._finalizer.detach()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _stop_writing(self, error: OSError, more: str = "") -> None:
        self.read_only = True
        log.warning(
            "The feature store %s cannot be written: %s. Features that it lacks are computed each time that "
            "they are needed. To store them, free space or choose another folder, and start again.%s",
            *(self.places[0].address, error, more),
        )

    def _append(self, packed: Sequence[Packed]) -> None:
        if self._process != os.getpid():
            self._forked()
        with self._lock:
            videos = {record.key.video for record in packed}
            if self._writer is not None and self._writer.is_full and not videos <= self._writer.videos:
                self.flush()
            while not self.read_only and not self._open_writer().append(packed):
                self.flush()  # its header had no room; a new one is made for these records

    def _open_writer(self) -> ShardWriter:
        if self._writer is not None:
            return self._writer
        place = self.places[0]
        self.recover()
        self._writer = ShardWriter(place.temporary(), VIDEOS_PER_SHARD)
        self._finalizer = weakref.finalize(self, _finish, self._writer, place, self._process)
        return self._writer

    def recover(self) -> None:
        """Publish what killed processes of this machine had written; the first `put` does it, too."""
        place = self.places[0] if self.places else None
        if isinstance(place, LocalFolder) and not self.read_only:
            for temporary in temporaries_beside(place.folder / "shard"):
                if is_abandoned(temporary):
                    with suppress(OSError):  # another process was faster, or the folder is read-only
                        recovered = recover(temporary)
                        if recovered is None:
                            temporary.unlink()
                        else:
                            place.publish(temporary, recovered[0])
                            log.info("%s: kept %d records of a killed process", place.address, recovered[1])

    # Reading ----------------------------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """The place of each published record, without repeats."""
        self._refresh()
        return iter([records[0][1] for records in list(self._index.values()) if records])

    def _find(self, key_id: str) -> list[tuple[Any, Record]]:
        if self._writer is not None and key_id in self._writer.records:
            return [(self._writer, self._writer.records[key_id])]
        if key_id not in self._index:
            self._refresh()
        return self._index.get(key_id, [])

    def _read(self, place: Any, record: Record) -> Grid:
        if isinstance(place, ShardWriter):
            data = place.read(record)
        else:
            data = place.read(record.shard, record.offset, record.size)
        if self.verify and digest_of(data) != record.digest:
            raise InvalidShard("the digest is another one")
        return grid_of(data, record)

    def _refresh(self) -> None:
        """Index the shards that came since the last time, and forget those that went."""
        for place in self.places:
            version = place.version()
            if version is None or version == self._versions.get(place.address):
                continue
            self._versions[place.address] = version
            names = place.names()
            for address, name in list(self._known):
                if address == place.address and name not in names:
                    self._drop(place, name)
            for name, size in names.items():
                if (place.address, name) not in self._known:
                    self._known[place.address, name] = []
                    try:
                        records = read_records(place, name, size)
                    except (OSError, InvalidShard) as error:
                        log.warning("%s/%s is left out: %s.", place.address, name, error)
                        continue
                    for record in records:
                        self._add(place, record)
                    self._known[place.address, name] = [record.key.id for record in records]

    def _add(self, place: Any, record: Record) -> None:
        self._index.setdefault(record.key.id, []).append((place, record))

    def _drop(self, place: Any, name: str) -> None:
        for key_id in self._known.pop((place.address, name)):
            for found in self._index.get(key_id, []):
                if (found[0], found[1].shard) == (place, name):
                    self._forget(*found)
                    break

    def _is_gone(self, place: Any, record: Record) -> bool:
        """Whether a shard was removed while this process had it in its index."""
        return not isinstance(place, ShardWriter) and record.shard not in place.names()

    def _forget(self, place: Any, record: Record) -> None:
        if isinstance(place, ShardWriter):
            del place.records[record.key.id]
            return
        kept = [found for found in self._index.pop(record.key.id, []) if found != (place, record)]
        if kept:
            self._index[record.key.id] = kept


def read_records(place: LocalFolder | RemoteFolder, name: str, size: int) -> list[Record]:
    """Read the header of a shard. Raises OSError or InvalidShard."""
    if size < 8:
        raise InvalidShard("it is cut short")
    length = header_size(place.read(name, 0, 8).tobytes())
    if length > size:
        raise InvalidShard("it is cut short")
    return parse(name, place.read(name, 0, length).tobytes(), size)


def _check_folder(place: LocalFolder | RemoteFolder, is_written: bool) -> None:
    """Raise DataError at once, not after hours, if a folder cannot be used."""
    if not isinstance(place, LocalFolder):
        return
    folder = place.folder
    try:
        if is_written:
            folder.mkdir(parents=True, exist_ok=True)
        names = os.listdir(folder)
    except (OSError, ValueError) as error:  # ValueError: a null byte or half of a surrogate pair
        raise DataError(
            f"The folder {folder} cannot be used as a feature store: {error}. Choose another folder for "
            "feature_store."
        ) from error
    if any(re.fullmatch("[0-9a-f]{2}", name) and (folder / name).is_dir() for name in names):
        raise DataError(
            f"{folder} holds features of an older version of merv, which this version does not read. Delete "
            "it, or choose another folder."
        )


def publish(writer: ShardWriter, place: LocalFolder | RemoteFolder) -> str:
    """Make the file of a writer a shard, and return its name. Raises OSError; the file then stays."""
    name = writer.finish() if writer.records else ""
    if name:
        place.publish(writer.path, name)
    else:
        place.discard(writer.path)
    writer.close()  # only now: if anything interrupts this, it can be done again
    return name


def _finish(writer: ShardWriter, place: LocalFolder | RemoteFolder, process: int) -> None:
    """Publish what a store has written that nobody closed."""
    if process == os.getpid() and not writer.file.closed:  # a forked process has a copy of the writer
        try:
            publish(writer, place)
        except OSError as error:
            log.warning("%s: the last features could not be published: %s", place.address, error)
