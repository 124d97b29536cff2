"""One shard of a feature store: a safetensors file with the features of many videos.

A shard never changes after it was published. It starts with the 8 bytes and the JSON header of a safetensors
file, padded with spaces. The records follow. A record is the tensors of one `Grid`, in one piece:

    KEY/times_s, KEY/extent, KEY/values, KEY/mask    and KEY/scale, if the values are int8

The header's metadata has, for each record, where the features come from and the XXH3-128 of its bytes. The
name of the file is the XXH3-128 of the 8 bytes and the header. So a flipped bit anywhere is noticed, and a
store needs no other file: it is a folder of shards. Folders of shards can be copied into each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from merv.errors import DataError, ShapeError
from merv.features.direct import BLOCK, Appender, write_all
from merv.types import Grid

FORMAT = "1"
KEY_VERSION = 6  # part of each key; increase it if the same options produce other features
SUFFIX = ".safetensors"
ALIGNMENT = 8  # bytes; every record starts at a multiple of it
MAX_HEADER = 100 << 20  # bytes, as in safetensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FeatureKey:
    """Names the features of one video from one encoder.

    Args:
        options: Everything that the features depend on except the video, as JSON; see `feature_cache_key`.
        video: Hash of the content of the video, and the range that was sampled.
        encoder: Name of the encoder in its model. It does not matter for finding features.
        source: Path or description of the video. It does not matter for finding features.
    """

    options: str
    video: str
    encoder: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @cached_property
    def id(self) -> str:
        """The key of the record: a hash of `options` and `video`."""
        return hashlib.sha256(f"{self.options}{self.video}".encode()).hexdigest()


class Field(NamedTuple):
    """Where a tensor is in its record."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Record(NamedTuple):
    """Where the features of one video from one encoder are."""

    key: FeatureKey
    shard: str
    offset: int
    size: int
    digest: str
    dtype: torch.dtype  # of the values after reading
    fields: tuple[Field, ...]


# Grids as bytes -------------------------------------------------------------------------------


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round features to int8, with one scale per cell: [..., D] → int8 [..., D], float32 [...].

    Raises DataError if a value is not finite.

    >>> values, scale = quantize(torch.tensor([[0.5, -2.0]]))
    >>> values.tolist(), round(scale.item(), 6)
    ([[32, -127]], 0.015748)
    """
    scale = values.abs().amax(dim=-1).float() / 127
    if not scale.isfinite().all():
        raise DataError("Features that are not finite cannot be stored as int8. Store them as bfloat16.")
    steps = values.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


class Packed(NamedTuple):
    """A record that is ready to be written."""

    key: FeatureKey
    dtype: torch.dtype  # of the values after reading
    fields: tuple[Field, ...]
    pieces: tuple[np.ndarray, ...]  # the bytes of the record
    digest: str

    @property
    def size(self) -> int:
        return sum(len(piece) for piece in self.pieces)


def pack(key: FeatureKey, grid: Grid, dtype: torch.dtype | None) -> Packed:
    """Turn a grid into the bytes of its record, with the values in `dtype`; None: as they are."""
    tensors = {name: tensor.contiguous() for name, tensor in vars(grid).items()}
    if dtype == torch.int8:
        tensors["values"], tensors["scale"] = quantize(grid.values)
    elif dtype is not None:
        tensors["values"] = tensors["values"].to(dtype)
        if _overflowed(grid.values, tensors["values"]):
            raise DataError(f"Features are too large for {dtype}. Store them as bfloat16.")
    fields, pieces, start, digest = [], [], 0, xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so aligned
        if tensor.dtype not in CODES:
            raise DataError(f"Cannot store {name} of dtype {tensor.dtype}; possible: {', '.join(DTYPES)}.")
        fields.append(Field(name, tensor.dtype, tuple(tensor.shape), start))
        pieces.append(tensor.flatten().view(torch.uint8).numpy())
        start += tensor.nbytes
    pieces.append(np.zeros(-start % ALIGNMENT, np.uint8))
    for piece in pieces:
        digest.update(piece)
    restored = grid.values.dtype if dtype in (None, torch.int8) else dtype
    return Packed(key, restored, tuple(fields), tuple(pieces), digest.hexdigest())


def _overflowed(values: Tensor, converted: Tensor) -> bool:
    """Whether a value became infinite."""
    if not values.numel() or converted.abs().max().isfinite():  # NaN and infinity reach the maximum
        return False
    return not bool((converted.isfinite() | ~values.isfinite()).all())


def grid_of(data: np.ndarray, record: Record | Packed) -> Grid:
    """Read a grid from the bytes of its record; its tensors share their memory."""
    tensors = {}
    for part in record.fields:
        size = part.dtype.itemsize * int(np.prod(part.shape))
        piece = torch.from_numpy(data[part.start : part.start + size])
        tensors[part.name] = piece.view(part.dtype).reshape(part.shape)
    scale = tensors.pop("scale", None)
    if scale is not None:
        tensors["values"] = (tensors["values"] * scale[..., None]).to(record.dtype)
    return Grid(**tensors)


def digest_of(data: Any) -> str:
    """XXH3-128 of some bytes."""
    return xxhash.xxh3_128(data).hexdigest()


# Writing --------------------------------------------------------------------------------------


class ShardWriter:
    """Writes a shard to a temporary file.

    The file is complete after each `append`, except that a part of a block may follow the records. So the
    records of a killed process can be saved: see `recover`.

    Args:
        path: The temporary file.
        max_videos: How many videos fit. The size of the header is chosen for it.
    """

    def __init__(self, path: Path, max_videos: int) -> None:
        self.path, self.max_videos = path, max_videos
        self.file: BinaryIO = path.open("x+b", buffering=0)
        self._data = Appender(path, self.file.fileno())
        self.records: dict[str, Record] = {}  # by id
        self.videos: set[str] = set()
        self.header_size = 0  # with the 8 bytes; known after the first `append`
        self._entries: list[str] = []  # the members of the header's JSON
        self._metadata: dict[str, str] = {"format": "pt", "merv": FORMAT}
        self._end = 0

    @property
    def is_full(self) -> bool:
        return len(self.videos) >= self.max_videos

    def append(self, packed: Sequence[Packed]) -> bool:
        """Write the features of one video; False if another shard is needed for them.

        That is so if the header has no room, or if a record with the same key was damaged after it was
        written. Records that the shard has are not written again.

        Raises:
            OSError: There is no space, for example. The records before it stay.
        """
        packed = [record for record in packed if record.key.id not in self.records]
        if any(record.key.id in self._metadata for record in packed):
            return False
        entries, metadata, records, end = list(self._entries), dict(self._metadata), {}, self._end
        for record in packed:
            key, start = record.key, end
            end += record.size
            bounds = [start + part.start for part in record.fields] + [end]
            last = record.fields[-1]
            bounds[-1] = bounds[-2] + last.dtype.itemsize * int(np.prod(last.shape))
            for part, first, after in zip(record.fields, bounds, bounds[1:], strict=False):
                entries.append(_entry(f"{key.id}/{part.name}", part.dtype, part.shape, first, after))
            if end > bounds[-1]:  # safetensors allows no holes
                size = end - bounds[-1]
                entries.append(_entry(f"{key.id}/padding", torch.uint8, (size,), bounds[-1], end))
            metadata[f"options/{options_id(key)}"] = key.options
            metadata[key.id] = json.dumps(
                {
                    "encoder": key.encoder,
                    "source": key.source,
                    "video": key.video,
                    "options": options_id(key),
                    "dtype": CODES[record.dtype],
                    "digest": record.digest,
                }
            )
            place = (self.path.name, start, record.size, record.digest, record.dtype, record.fields)
            records[key.id] = Record(key, *place)
        size = self.header_size or _room(entries, metadata, self.max_videos)
        header = _header(entries, metadata)
        if 8 + len(header) > size:
            return False
        try:
            self._data.append([piece for record in packed for piece in record.pieces], size + self._end)
            write_all(self.file.fileno(), [_with_length(header, size)], 0)
        except BaseException:
            with suppress(OSError):
                self._restore()
            raise
        self.header_size, self._entries, self._metadata, self._end = size, entries, metadata, end
        self.records |= {i: record._replace(offset=size + record.offset) for i, record in records.items()}
        self.videos |= {record.key.video for record in packed}
        return True

    def _restore(self) -> None:
        """Write the header of the records so far, and cut off what follows them."""
        if self.header_size:
            header = _with_length(_header(self._entries, self._metadata), self.header_size)
            write_all(self.file.fileno(), [header], 0)  # first: a header must not name what was cut off
            os.ftruncate(self.file.fileno(), self.header_size + self._end)

    def read(self, record: Record) -> np.ndarray:
        """Read the bytes of a record that was appended."""
        return np.frombuffer(bytearray(os.pread(self.file.fileno(), record.size, record.offset)), np.uint8)

    def close(self) -> None:
        """Close the file."""
        self._data.close()
        self.file.close()

    def finish(self) -> str:
        """Write all of the file to the disk; return the name that the shard must get. Raises OSError."""
        self._restore()  # cuts off what follows the records
        os.fsync(self.file.fileno())
        if hasattr(os, "posix_fadvise"):  # the next shard can reuse the memory
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        name = digest_of(os.pread(self.file.fileno(), self.header_size, 0)) + SUFFIX
        return name


def _room(entries: Sequence[str], metadata: Mapping[str, str], max_videos: int) -> int:
    """The size of a header, with its 8 bytes, for as many videos like the one that is given."""
    spare = 64 * (len(entries) + len(metadata))  # longer names and offsets
    options = sum(
        len(json.dumps(text)) + 64 for name, text in metadata.items() if name.startswith("options/")
    )
    per_video = len(_header(entries, metadata)) - options + spare
    return _padded(options + per_video * max_videos)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _entry(name: str, dtype: torch.dtype, shape: Sequence[int], start: int, end: int) -> str:
    content = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    return f'"{name}":{json.dumps(content, separators=(",", ":"))}'


def options_id(key: FeatureKey) -> str:
    """A short hash of a key's options."""
    return hashlib.sha256(key.options.encode()).hexdigest()[:16]


def _header(entries: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    return f'{{"__metadata__":{json.dumps(metadata)},{",".join(entries)}}}'.encode()


def _with_length(header: bytes, size: int) -> bytes:
    """The first `size` bytes of a file: the length of the header, and the header padded with spaces."""
    return struct.pack("<Q", size - 8) + header.ljust(size - 8)


# Reading --------------------------------------------------------------------------------------


class InvalidShard(Exception):
    """A file is not a valid shard. The message says why."""


class OtherFormat(InvalidShard):
    """A shard has a format that this version of merv does not read."""


def header_size(first_bytes: bytes) -> int:
    """The size of the header with its 8 bytes. Raises InvalidShard if it cannot be right."""
    size = struct.unpack("<Q", first_bytes)[0] if len(first_bytes) == 8 else 0
    if not 2 <= size <= MAX_HEADER:
        raise InvalidShard("it is not a safetensors file")
    return 8 + size


def parse(name: str, header: bytes, file_size: int, check_name: bool = True) -> list[Record]:
    """Read the records of a shard from its header.

    Args:
        name: Name of the file.
        header: Its first bytes, up to the end of the header.
        file_size: Size of the file in bytes.
        check_name: Whether the name must be the hash of the header; not so for a temporary file.

    Raises:
        InvalidShard: The file is damaged, or no shard.
    """
    if check_name and digest_of(header) + SUFFIX != name:
        raise InvalidShard("its header is damaged")
    try:
        return _records(name, header, file_size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ShapeError) as error:
        raise InvalidShard(f"its header is not that of a shard ({type(error).__name__}: {error})") from error


def _records(name: str, header: bytes, file_size: int) -> list[Record]:
    entries = json.loads(header[8:])
    metadata = entries.pop("__metadata__")
    if metadata["merv"] != FORMAT:
        raise OtherFormat(f"it has format {metadata['merv']}; this version of merv reads {FORMAT}")
    tensors: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path, entry in entries.items():
        key, _, part = path.rpartition("/")
        tensors.setdefault(key, []).append((part, entry))
    layouts: dict[tuple[Field, ...], tuple[Field, ...]] = {}  # most records share one
    records, position = [], 0
    for key_id, parts in tensors.items():
        about = json.loads(metadata[key_id])
        options = metadata[f"options/{about['options']}"]
        key = FeatureKey(options, about["video"], about["encoder"], about["source"])
        start, end = parts[0][1]["data_offsets"][0], parts[-1][1]["data_offsets"][1]
        if start != position:
            raise InvalidShard(f"its records do not follow each other at {start}")
        position = end
        fields = tuple(
            Field(part, DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0] - start)
            for part, entry in parts
            if part != "padding"
        )
        if len(header) + end > file_size:
            raise InvalidShard(f"it has {file_size} bytes; expected at least {len(header) + end}")
        records.append(
            Record(
                key,
                name,
                len(header) + start,
                end - start,
                about["digest"],
                DTYPES[about["dtype"]],
                layouts.setdefault(fields, fields),
            )
        )
    return records


def _is_valid(file: BinaryIO, record: Record) -> bool:
    file.seek(record.offset)
    return digest_of(file.read(record.size)) == record.digest


def recover(path: Path) -> tuple[str, int] | None:
    """Complete the temporary file of a writer that was killed.

    Args:
        path: The temporary file.

    Returns:
        The name that the shard must get, and the number of its records. None if it holds nothing to keep.
    """
    with path.open("r+b") as file:
        try:
            size = header_size(file.read(8))
            file.seek(0)
            header = file.read(size)
            records = parse(path.name, header, path.stat().st_size, check_name=False)
        except InvalidShard:
            return None
        if not any(_is_valid(file, record) for record in records):
            return None  # a damaged one beside valid ones is found when it is read
        file.truncate(max(record.offset + record.size for record in records))
        os.fsync(file.fileno())
    return digest_of(header) + SUFFIX, len(records)
