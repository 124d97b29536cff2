"""Sources: files of samples, opened without being read whole.

JSON and JSONL files and the shards of WebDataset are indexed once and then read at offsets;
Parquet files and the folders of Hugging Face `datasets` are memory-mapped by that library.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

from merv.data.samples import Sample, sample_of
from merv.errors import DataError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
CAPTION = "Describe what is shown."  # what a caption, the .txt of a shard, answers
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
Source = str | Path | Sequence[str | Path]


class Samples(Sequence[Sample]):
    """The samples of some files, each read when it is asked for; see `open_samples`.

    It pickles as the index that it is, for workers of a loader.
    """

    def __init__(self, files: Sequence[Rows]) -> None:
        self.files = files
        self._ends = list(accumulate(map(len, files), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows, at = self._place(index)
        return sample_of(rows.row(at), rows.origin(at), rows.root)

    def origin(self, index: int) -> str:
        """What `samples[index].origin` is, without reading the row."""
        rows, at = self._place(index)
        return rows.origin(at)

    def _place(self, index: int) -> tuple[Rows, int]:
        index = range(len(self))[index]  # an IndexError, and what negative ones mean
        file = bisect_right(self._ends, index) - 1
        return self.files[file], index - self._ends[file]


@dataclass
class Rows:
    """The rows of one file. Paths in them begin at `root`."""

    path: Path
    root: Path

    def __post_init__(self) -> None:
        """Index the file; an OSError, ValueError or TarError where it cannot be."""

    def __len__(self) -> int:
        raise NotImplementedError

    def origin(self, index: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.path}[{index}]"

    def row(self, index: int) -> Any:
        """What stands there; raises DataError where that is no JSON."""
        raise NotImplementedError


def open_samples(source: Source, root: str | Path | None = None) -> Samples:
    """The samples of one or more files, as a sequence that reads them one by one.

    source: .jsonl, .json, .parquet or .tar files, or a folder that `datasets` saved; `*` and
        `{0000..0003}` in a path stand for several. root: the folder that paths in rows begin
        at, by default the one that the file is in.

    Raises DataError for a file that is missing, empty or no such file at all; for a row that is
    wrong, `samples[i]` raises it, with the row's origin.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "a.jsonl")
    ...     _ = file.write_text('{"video": "a.mp4", "questions": [{"question": "?", "answer": "!"}]}')
    ...     samples = open_samples(file)
    ...     len(samples), samples[0].origin.endswith("a.jsonl:1")
    (1, True)
    """
    return Samples([_open(path, Path(root or path.parent).expanduser()) for path in expand(source)])


def read_samples(path: str | Path) -> list[Sample]:
    """All samples of a file, as `open_samples` reads it; raises its DataError."""
    return list(open_samples(path))


def stream_samples(source: Any, root: str | Path | None = None, split: str = "train") -> SampleStream:
    """The samples of a dataset too large to hold, one after the other.

    source: Parquet files, as of `open_samples`; the name of a dataset on the hub, of which `split` is
        taken; or a `datasets.IterableDataset`. root: the folder that paths in rows begin at.
    """
    from datasets import IterableDataset, load_dataset

    if isinstance(source, IterableDataset):
        return SampleStream(source, root, "stream")
    last = Path(source if isinstance(source, (str, Path)) else source[-1])
    if last.suffix == ".parquet":
        paths = expand(source)
        rows = IterableDataset.from_parquet([str(path) for path in paths])
        return SampleStream(rows, root or paths[0].parent, str(source))
    if last.suffix in FORMS or last.exists():
        raise DataError(f"{source} needs no streaming: open_samples reads it row by row. Parquet can stream.")
    try:
        return SampleStream(load_dataset(str(source), split=split, streaming=True), root, str(source))
    except (OSError, ValueError) as error:  # not there, no connection, no such split
        raise DataError(f"The dataset {str(source)!r} cannot be streamed: {error}") from error


class SampleStream:
    """Samples of a `datasets.IterableDataset`, in its order. A row that is wrong raises DataError."""

    def __init__(self, rows: Any, root: str | Path | None, name: str) -> None:
        self.rows, self.root, self.name = rows.with_format("arrow"), Path(root or ""), name
        self.taken = 0

    def __iter__(self) -> Iterator[Sample]:
        for table in self.rows.iter(batch_size=1):  # in a worker, iter(rows) would split it once more
            (row,) = table.to_pylist()
            self.taken += 1
            yield sample_of(row, f"{self.name}[{self.taken - 1}]", self.root)
        self.taken = 0

    def part(self, index: int, count: int) -> SampleStream:
        """Part `index` of `count`, for one of so many processes; together they are the whole."""
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.rows, index, count)
        return SampleStream(rows, self.root, f"{self.name}, part {index} of {count}")

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: what was handed out is not handed out again."""
        return {"rows": self.rows.state_dict(), "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, at the next `iter`."""
        self.rows.load_state_dict(state["rows"])
        self.taken = state["taken"]


class FilePart(io.RawIOBase):
    """Some bytes in the middle of a file, as a file of their own: a member of a shard.

    It opens the file only while it reads, and pickles as its place.
    """

    def __init__(self, path: str, start: int, size: int, name: str) -> None:
        self.place, self.name, self.size = (path, start, size, name), name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, place + (0, self._at, self.size)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._at)
        path, start, *_ = self.place
        with open(path, "rb") as file:
            file.seek(start + self._at)
            data = file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def __reduce__(self) -> tuple[type, tuple]:
        return FilePart, self.place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FilePart) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    def __repr__(self) -> str:
        return self.name


def expand(source: Source) -> list[Path]:
    """The paths that a pattern, or several, stand for; raises DataError where there is none.

    >>> [path.name for path in expand([__file__])]
    ['sources.py']
    """
    found: list[Path] = []
    for pattern in [source] if isinstance(source, (str, Path)) else source:
        name = str(Path(pattern).expanduser())
        names = [name] if Path(name).exists() else [each for one in _braces(name) for each in _glob(one)]
        if missing := next((each for each in names or [name] if not Path(each).exists()), None):
            raise DataError(f"No data at {missing}: no such file. Paths are relative to where you are.")
        found += map(Path, names)
    return found


def _braces(name: str) -> list[str]:
    """`a{08..10}.tar` as a08.tar, a09.tar, a10.tar; `{train,val}.json` as both."""
    if not (braces := BRACES.search(name)):
        return [name]
    first, last, words = braces.groups()
    inner = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [
        whole for each in inner for whole in _braces(name[: braces.start()] + each + name[braces.end() :])
    ]


def _glob(name: str) -> list[str]:
    return sorted(glob(name)) if any(sign in name for sign in "*?[") else [name]


def _open(path: Path, root: Path) -> Rows:
    form = TableRows if path.is_dir() else FORMS.get(path.suffix.lower())
    if form is None:
        raise DataError(
            f"{path} is no file of samples; wanted .jsonl, .json, .parquet, .tar (not compressed), or a "
            "folder that save_to_disk of `datasets` wrote."
        )
    try:
        rows = form(path, root)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error
    if not len(rows):
        raise DataError(f"{path} is empty; wanted one row or more.")
    return rows


class JsonRows(Rows):
    """Rows of a JSONL file, or of a file that is one JSON list, found by their places in it."""

    def __post_init__(self) -> None:
        with self.path.open("rb") as file:
            self.listed = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        places = array("Q", chain.from_iterable(_items(self.path) if self.listed else _lines(self.path)))
        self.starts, self.sizes, self.lines = places[::3], places[1::3], places[2::3]

    def __len__(self) -> int:
        return len(self.starts)

    def origin(self, index: int) -> str:
        return super().origin(index) if self.listed else f"{self.path}:{self.lines[index]}"

    def row(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return _parsed(file.read(self.sizes[index]), self.origin(index))


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Start, size and number of each line that is not blank."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield start, len(line), number
            start += len(line)


def _items(path: Path) -> Iterator[tuple[int, int, int]]:
    """Start and size in bytes, and index, of each item of the list that a file is."""
    text = path.read_bytes().decode("utf-8")  # read_text would make one character of \r\n
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def skip(place: int) -> int:
        return space.match(text, place).end()  # type: ignore[union-attr]

    place = text.index("[") + 1
    start, begin, index = len(text[:place].encode()), skip(place), 0
    while index or text[begin : begin + 1] != "]":
        start += begin - place  # between items all is ASCII
        _, end = decoder.raw_decode(text, begin)
        size = len(text[begin:end].encode())
        yield start, size, index
        start, place, after, index = start + size, end, skip(end), index + 1
        if text[after : after + 1] == "]":
            begin = after
            break
        if text[after : after + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        begin = skip(after + 1)
    if skip(begin + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, begin + 1)


def _parsed(data: bytes, origin: str) -> Any:
    def no_number(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=no_number)
    except ValueError as error:  # of the encoding as of the form
        raise DataError(f"{origin}: no JSON in UTF-8: {error}; got {data[:60]!r}.") from error


class ShardRows(Rows):
    """Samples of a WebDataset shard: the members of one key are a row and its videos and images."""

    def __post_init__(self) -> None:
        found: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(self.path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                place = member.offset_data, member.size
                found.setdefault(f"{folder}/{key}".lstrip("/"), {})[f".{suffix.lower()}"] = place
        self.keys, self.members = list(found), list(found.values())

    def __len__(self) -> int:
        return len(self.keys)

    def origin(self, index: int) -> str:
        return f"{self.path}/{self.keys[index]}"

    def row(self, index: int) -> Any:
        """A row whose videos and images are files, read at their places in the shard."""
        origin, path = self.origin(index), str(self.path)
        members = {s: FilePart(path, *at, f"{origin}{s}") for s, at in self.members[index].items()}
        row: Any
        if ".json" in members:
            row = _parsed(members[".json"].read(), origin)
        elif ".txt" in members:
            caption = members[".txt"].read().decode(errors="replace")
            row = {"questions": [{"question": CAPTION, "answer": caption}]}
        else:
            raise DataError(f"{origin}: no .json or .txt among its members {sorted(members)}.")
        for kind, suffixes in ("video", VIDEOS), ("image", IMAGES):
            files = [part for suffix, part in members.items() if suffix.endswith(suffixes)]
            if files and isinstance(row, dict):
                row[kind] = files
        return row


class TableRows(Rows):
    """Rows of a Parquet file, or of a folder that `datasets` saved; media stay undecoded."""

    def __post_init__(self) -> None:
        from datasets import Dataset
        from pyarrow.parquet import read_metadata

        path = str(self.path)
        if self.path.is_dir():
            table = Dataset.load_from_disk(path)
        elif read_metadata(path).num_rows:  # an ArrowInvalid, a ValueError, where it is none
            table = Dataset.from_parquet(path)
        else:
            table = Dataset.from_list([])
        self.table = table.with_format("arrow")  # which decodes neither videos nor images

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Any:
        (row,) = self.table[index : index + 1].to_pylist()
        return row


FORMS: dict[str, type[Rows]] = {
    ".json": JsonRows, ".jsonl": JsonRows, ".parquet": TableRows, ".tar": ShardRows
}  # fmt: skip
