"""Sources: open files of samples without loading them into memory.

JSON and JSONL files and WebDataset shards are indexed once and then read at byte offsets. Parquet files and
folders of Hugging Face `datasets` are memory-mapped by that library.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

from merv.data.samples import Sample, sample_of
from merv.errors import DataError
from merv.utils.files import PositionedFile, check_regular

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
BLOCK_ROWS = 1000  # rows of a table that are validated together
CAPTION_QUESTION = "Describe what is shown."  # the .txt of a WebDataset sample is the answer
FOREIGN_FILE = re.compile(r"(readme|license|notice)\.(md|rst|txt)|thumbs\.db|desktop\.ini", re.IGNORECASE)
FOREIGN_FOLDERS = (".", "__MACOSX", "PaxHeader")  # prefixes of folder names
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
Source = str | Path | Sequence[str | Path]


class Samples(Sequence[Sample]):
    """The samples of some files, each read when it is indexed; see `open_samples`.

    It pickles as its index, so each worker of a data loader can have a copy.
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
        rows, row_index = self._locate(index)
        origin = rows.origin(row_index)
        with _data_errors(origin):
            row, members = rows.row(row_index), rows.members(row_index)
        return sample_of(row, origin, rows.root, members)

    def origin(self, index: int) -> str:
        """Return `samples[index].origin` without reading the row."""
        rows, row_index = self._locate(index)
        return rows.origin(row_index)

    def _locate(self, index: int) -> tuple[Rows, int]:
        index = range(len(self))[index]  # resolves negative indices and raises IndexError
        file = bisect_right(self._ends, index) - 1
        return self.files[file], index - self._ends[file]


@contextmanager
def _data_errors(origin: str) -> Iterator[None]:
    """Turn every exception into a DataError that starts with `origin`.

    Damaged files raise errors of many types, of several libraries.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{origin}: could not be read: {reason}.") from error


@dataclass
class Rows:
    """The rows of one file. Relative paths in them start at `root`.

    `foreign` names the members of a shard that do not belong to samples.
    """

    path: Path
    root: Path
    foreign: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Index the file; raises any exception if that fails."""

    def __len__(self) -> int:
        raise NotImplementedError

    def origin(self, index: int) -> str:
        """Return where a row is, for error messages."""
        return f"{self.path}[{index}]"

    def row(self, index: int) -> Any:
        """Read a row; raises any exception if that fails."""
        raise NotImplementedError

    def members(self, index: int) -> dict[str, list[FilePart]]:
        """Return the files that are stored with a row, by "video" and "image"."""
        return {}


def open_samples(source: Source, root: str | Path | None = None) -> Samples:
    """Open one or more files as a sequence of samples, which reads them one by one.

    Args:
        source: .jsonl, .json, .parquet or .tar files, or folders written by `save_to_disk` of `datasets`.
            A path may be a pattern: `*` and `{0000..0003}` expand to several files.
        root: The folder that relative paths in rows start at; the folder of each file by default.

    Returns:
        A sequence of `Sample`. `samples[i]` raises DataError if that row is malformed.

    Raises:
        DataError: A file is missing, empty, or not in one of the formats.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.jsonl")
        ...     _ = file.write_text('{"video": "a.mp4", "questions": [{"question": "?", "answer": "!"}]}')
        ...     samples = open_samples(file)
        ...     len(samples), samples[0].origin.endswith("a.jsonl:1")
        (1, True)
    """
    return Samples([_open(path, Path(os.path.expanduser(root or path.parent))) for path in expand(source)])


def stream_samples(source: Any, root: str | Path | None = None, split: str = "train") -> SampleStream:
    """Stream the samples of a dataset that is too large to index.

    Args:
        source: Parquet files, with patterns as in `open_samples`; the name of a dataset on the Hugging Face
            Hub; or a `datasets.IterableDataset`.
        root: The folder that relative paths in rows start at. None: the folder of the first Parquet file; for
            other sources, the current folder.
        split: The split of a dataset on the hub.

    Returns:
        An iterable of `Sample` that can be sharded and resumed.

    Raises:
        DataError: The source cannot be streamed.

    Example:
        >>> from datasets import IterableDataset
        >>> row = {"video": "a.mp4", "questions": [{"question": "Who?", "answer": "A cat."}]}
        >>> stream = stream_samples(IterableDataset.from_generator(lambda: iter([row])), root="clips")
        >>> next(iter(stream)).videos()
        ['clips/a.mp4']
    """
    from datasets import IterableDataset, load_dataset

    if isinstance(source, IterableDataset):
        return SampleStream(source, root, "stream")
    last = Path(source if isinstance(source, (str, Path)) else source[-1])
    if last.suffix == ".parquet":
        paths = expand(source)
        rows = IterableDataset.from_parquet([str(path) for path in paths])
        return SampleStream(rows, root or paths[0].parent, str(source))
    if last.suffix in FORMATS or last.exists():
        raise DataError(
            f"{source} cannot be streamed; expected Parquet files, or the name of a dataset on the hub. Use "
            "open_samples, which reads other formats row by row (data.stream: false)."
        )
    try:
        return SampleStream(load_dataset(str(source), split=split, streaming=True), root, str(source))
    except (OSError, ValueError) as error:  # no such dataset or split, no connection
        raise DataError(f"Could not stream the dataset {str(source)!r}: {error}") from error


class SampleStream:
    """Samples of a `datasets.IterableDataset`, in its order. A malformed row raises DataError.

    Args:
        rows: The `datasets.IterableDataset`.
        root: The folder that relative paths in rows start at. None: the current folder.
        name: Name of the stream, with which the origin of a sample starts: `name[16]`.
    """

    def __init__(self, rows: Any, root: str | Path | None, name: str) -> None:
        self.rows, self.root, self.name = rows.with_format("arrow"), Path(root or ""), name
        self.num_read = 0

    def __iter__(self) -> Iterator[Sample]:
        for parse in self.unparsed():
            yield parse()

    def unparsed(self) -> Iterator[Callable[[], Sample]]:
        """Yield a function per row that parses it, so that iteration can go on after a malformed row."""
        tables = iter(self.rows.iter(batch_size=1))  # in a worker, iter(rows) would shard it again
        while True:
            origin = f"{self.name}[{self.num_read}]"
            with _data_errors(origin):
                if (table := next(tables, None)) is None:
                    break
            self.num_read += 1
            yield partial(_parse_table, table, origin, self.root)
        self.num_read = 0

    def shard(self, index: int, count: int) -> SampleStream:
        """Return shard `index` of `count`. Each process reads one; together they are the whole stream."""
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.rows, index, count)
        return SampleStream(rows, self.root, f"{self.name}, shard {index} of {count}")

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, after the samples that were already yielded."""
        return {"rows": self.rows.state_dict(), "num_read": self.num_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position at which the next `iter` starts."""
        self.rows.load_state_dict(state["rows"])
        self.num_read = state["num_read"]


def _parse_table(table: Any, origin: str, root: Path) -> Sample:
    """Parse a table of one row."""
    with _data_errors(origin):
        (row,) = table.to_pylist()
    return sample_of(row, origin, root)


class FilePart(PositionedFile):
    """A file object over a range of bytes of a file, such as a member of a shard.

    It opens the file only while it reads, and pickles as path and range.

    Args:
        path: The file.
        start: Where the range starts, in bytes.
        size: Size of the range in bytes.
        name: Name of this part, for error messages.
    """

    def __init__(self, path: str, start: int, size: int, name: str) -> None:
        super().__init__(size)
        self.location, self.name = (path, start, size, name), name

    def _read_at(self, offset: int, size: int) -> bytes:
        path, start, *_ = self.location
        with open(path, "rb") as file:
            file.seek(start + offset)
            return file.read(size)

    def __reduce__(self) -> tuple[type, tuple]:
        return FilePart, self.location

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FilePart) and self.location == other.location

    def __hash__(self) -> int:
        return hash(self.location)

    def __repr__(self) -> str:
        return self.name


def expand(source: Source) -> list[Path]:
    """Expand one or more patterns to paths; raises DataError if a pattern matches no file.

    >>> [path.name for path in expand([__file__])]
    ['sources.py']
    """
    paths: list[Path] = []
    for pattern in [source] if isinstance(source, (str, Path)) else source:
        name = os.path.expanduser(pattern)
        names = [name] if os.path.exists(name) else [path for one in _braces(name) for path in _glob(one)]
        if missing := next((path for path in names or [name] if not os.path.exists(path)), None):
            raise DataError(f"No such data file: {missing}. Relative paths start at the current folder.")
        paths += map(Path, names)
    return paths


def _braces(name: str) -> list[str]:
    """Expand `a{08..10}.tar` to a08.tar, a09.tar and a10.tar, and `{train,val}.json` to both."""
    if not (braces := BRACES.search(name)):
        return [name]
    first, last, words = braces.groups()
    choices = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    before, after = name[: braces.start()], name[braces.end() :]
    return [expanded for choice in choices for expanded in _braces(before + choice + after)]


def _glob(name: str) -> list[str]:
    return sorted(glob(name)) if any(sign in name for sign in "*?[") else [name]


def _open(path: Path, root: Path) -> Rows:
    with _data_errors(str(path)):
        rows_class = TableRows if path.is_dir() else FORMATS.get(path.suffix.lower())
        if rows_class is None:
            raise DataError(
                f"Unknown data format: {path}. Expected .jsonl, .json, .parquet, .tar (not compressed), or a "
                "folder written by `save_to_disk` of `datasets`."
            )
        check_regular(path)
        rows = rows_class(path, root)
        if not len(rows):
            raise DataError(f"{path} is empty. Expected at least one row.")
        return rows


class JsonRows(Rows):
    """Rows of a JSONL file, or of a file that is one JSON list, read at byte offsets."""

    def __post_init__(self) -> None:
        with self.path.open("rb") as file:
            start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
        self.is_list = start[:1] == b"["
        first, _, rest = start.partition(b"\n")
        if first.strip() == b"{" and rest.strip():
            raise ValueError("it is one object over several lines; expected a list, or one object per line")
        index = array("Q", chain.from_iterable(_items(self.path) if self.is_list else _lines(self.path)))
        self.offsets, self.sizes, self.numbers = index[::3], index[1::3], index[2::3]

    def __len__(self) -> int:
        return len(self.offsets)

    def origin(self, index: int) -> str:
        return super().origin(index) if self.is_list else f"{self.path}:{self.numbers[index]}"

    def row(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return _parse(file.read(self.sizes[index]), self.origin(index))


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield offset in bytes, size in bytes, and line number of each line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield offset, len(line), number
            offset += len(line)


def _items(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield offset in bytes, size in bytes, and index of each item of a JSON list."""
    text = path.read_bytes().decode("utf-8")  # read_text would turn \r\n into one character
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def skip_space(position: int) -> int:
        return space.match(text, position).end()  # type: ignore[union-attr]

    position = text.index("[") + 1
    offset = len(text[:position].encode())  # of `position`, in bytes
    item, index = skip_space(position), 0
    while index or text[item : item + 1] != "]":
        offset += item - position  # only ASCII between items, so characters are bytes
        try:
            _, end = decoder.raw_decode(text, item)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"item {index}: {error}") from error
        size = len(text[item:end].encode())
        yield offset, size, index
        offset, position, index = offset + size, end, index + 1
        after = skip_space(end)
        if text[after : after + 1] == "]":
            item = after
            break
        if text[after : after + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        item = skip_space(after + 1)
    if skip_space(item + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, item + 1)


def _parse(data: bytes, origin: str) -> Any:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed in JSON")

    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=reject)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError or a UnicodeDecodeError, too
        raise DataError(f"{origin}: not JSON in UTF-8: {error}; got {data[:60]!r}.") from error


class ShardRows(Rows):
    """Samples of a WebDataset shard: the members with the same key are a row and its videos and images.

    The library webdataset can only stream a shard; this class reads samples in any order. Members that do not
    belong to samples are left out and named in `foreign`: hidden files, `__MACOSX/`, README, LICENSE and
    NOTICE files, `Thumbs.db`, `desktop.ini`, links, and files without an extension, which have no key.
    """

    def __post_init__(self) -> None:
        offsets: dict[str, dict[str, tuple[int, int]]] = {}  # key → suffix → start and size in bytes
        with tarfile.open(self.path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if member.issparse():  # its bytes are not in one piece
                    raise ValueError(
                        f"{member.name} is stored as a sparse file; write the shard without that"
                    )
                if not member.isfile() or _is_foreign(member.name):
                    self.foreign.append(member.name)
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}".lstrip("/")
                offsets.setdefault(key, {})[f".{suffix.lower()}"] = member.offset_data, member.size
            _check_end(self.path, tar.offset, len(offsets))
        self.keys, self.offsets = list(offsets), list(offsets.values())

    def __len__(self) -> int:
        return len(self.keys)

    def origin(self, index: int) -> str:
        return f"{self.path}/{self.keys[index]}"

    def row(self, index: int) -> Any:
        origin, members = self.origin(index), self._by_suffix(index)
        if ".json" in members:
            return _parse(members[".json"].read(), origin)
        if ".txt" in members:
            caption = members[".txt"].read().decode(errors="replace")
            return {"questions": [{"question": CAPTION_QUESTION, "answer": caption}]}
        raise DataError(f"{origin}: expected a .json or .txt member; got {', '.join(sorted(members))}.")

    def members(self, index: int) -> dict[str, list[FilePart]]:
        """Return the videos and images of a row as file objects, not read yet."""
        members = self._by_suffix(index).items()
        files = {
            kind: [member for suffix, member in members if suffix.endswith(suffixes)]
            for kind, suffixes in (("video", VIDEOS), ("image", IMAGES))
        }
        return {kind: found for kind, found in files.items() if found}

    def _by_suffix(self, index: int) -> dict[str, FilePart]:
        origin, path = self.origin(index), str(self.path)
        return {s: FilePart(path, *range_, f"{origin}{s}") for s, range_ in self.offsets[index].items()}


def _is_foreign(name: str) -> bool:
    """Return whether a member of a shard does not belong to a sample.

    >>> [_is_foreign(name) for name in ("./a/0.json", "a/._0.json", "__MACOSX/0.json", "README")]
    [False, True, True, True]
    """
    *folders, file = [part for part in name.split("/") if part not in ("", ".", "..")] or [""]
    stem, _, suffix = file.partition(".")
    return (
        not stem
        or not suffix
        or FOREIGN_FILE.fullmatch(file) is not None
        or any(folder.startswith(FOREIGN_FOLDERS) for folder in folders)
    )


def foreign_members(rows: Rows) -> str:
    """Describe the members of a shard that do not belong to samples."""
    names = ", ".join(rows.foreign[:3]) + (", …" if len(rows.foreign) > 3 else "")
    return f"skipped {len(rows.foreign)} members that do not belong to samples: {names}"


def _check_end(path: Path, end: int, num_samples: int) -> None:
    """Raise ValueError unless a tar file has only zeros from a byte on.

    tarfile ends at a damaged header, and at one that was zeroed, as it does at the zeros that end an archive.
    """
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        is_end = block == bytes(tarfile.BLOCKSIZE)
        while is_end and (block := file.read(1 << 20)):
            is_end = not block.strip(b"\0")
    if not is_end:
        raise ValueError(f"it is cut off or damaged at byte {end}, after {num_samples} samples")


class TableRows(Rows):
    """Rows of a Parquet file, or of a folder written by `datasets`. Videos and images are not decoded."""

    def __post_init__(self) -> None:
        from datasets import Dataset
        from pyarrow.parquet import read_metadata

        path = str(self.path)
        if self.path.is_dir():
            table = Dataset.load_from_disk(path)
        elif read_metadata(path).num_rows:
            try:
                table = Dataset.from_parquet(path)
            except Exception:
                _check_row_groups(path)  # says where the file is damaged
                raise
        else:
            table = Dataset.from_list([])
        self.table = table.with_format("arrow")
        self.is_valid: dict[int, bool] = {}  # for blocks of rows that were validated

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Any:
        table = self.table[index : index + 1]
        if not self._block_is_valid(index // BLOCK_ROWS):
            table.validate(full=True)
        (row,) = table.to_pylist()
        return row

    def _block_is_valid(self, block: int) -> bool:
        """Validate a block of rows, once: damaged offsets would make to_pylist read other memory, and crash.

        Validating a row takes as long, because its lists lie in the columns of many rows.
        """
        if block not in self.is_valid:
            try:
                self.table[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS].validate(full=True)
            except Exception:  # which row it is will be seen when that is read
                self.is_valid[block] = False
            else:
                self.is_valid[block] = True
        return self.is_valid[block]


def _check_row_groups(path: str) -> None:
    """Raise ValueError for the first row group of a Parquet file that cannot be decoded."""
    from pyarrow.parquet import ParquetFile

    first = 0
    with ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows - 1
            try:
                file.read_row_group(group)
            except Exception as error:
                raise ValueError(f"row group {group} (rows {first} to {last}): {error}") from error
            first = last + 1


FORMATS: dict[str, type[Rows]] = {
    ".json": JsonRows, ".jsonl": JsonRows, ".parquet": TableRows, ".tar": ShardRows
}  # fmt: skip
