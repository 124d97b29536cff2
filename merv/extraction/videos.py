"""Find the videos that a user names: files, folders, patterns, and the rows of data files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merv.data.sources import FORMATS, IMAGES, VIDEOS, Samples, open_samples
from merv.errors import DataError, MervError

DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")  # of a folder of `datasets`


@dataclass(frozen=True)
class Item:
    """A video or image to encode.

    Args:
        name: Its path, or where it is: `shard.tar/00017`.
        source: What `MultiEncoder.features` reads. None for a video in a row that could not be read.
        error: Why the row could not be read.
    """

    name: str
    source: Any
    error: str = ""


class Items(Sequence[Item]):
    """The videos of some sources, each once. Rows are read when they are indexed.

    Args:
        sources: Videos, images, folders of them, patterns such as `clips/*.mp4`, and data files: .jsonl,
            .json, .parquet, .tar, or folders of `datasets`.
        root: The folder that paths in rows start at; the folder of each file by default.
        limit: How many videos to keep; None: all.

    Raises:
        DataError: A source does not exist, or there is no video in it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (32, 32)).save(f"{folder}/a.png")
        ...     [os.path.basename(item.name) for item in Items([folder])]
        ['a.png']
    """

    def __init__(
        self, sources: Sequence[str | Path], root: str | Path | None = None, limit: int | None = None
    ) -> None:
        self.samples: list[Samples] = []
        # A path, or the number of `samples`, a row and a position in it
        self.places: list[str | tuple[int, int, int]] = []
        seen: set[str] = set()
        for source in sources:
            found = 0
            for path in _expanded(str(source)):
                if path.suffix.lower() in FORMATS or _is_dataset(path):
                    found += self._add_rows(open_samples(path, root), seen)
                else:
                    found += self._add_paths([path] if not path.is_dir() else _media_below(path), seen)
            if not found:
                raise DataError(
                    f"{source}: there is no video or image. Expected {', '.join((*VIDEOS, *IMAGES))}, a "
                    f"folder of them, or {', '.join(FORMATS)}."
                )
        self.places = self.places[:limit]

    def _add_paths(self, paths: Sequence[Path], seen: set[str]) -> int:
        """Add the paths that are new; return how many there are in all."""
        new = [str(path) for path in paths if str(path) not in seen]
        seen.update(new)
        self.places += new
        return len(paths)

    def _add_rows(self, samples: Samples, seen: set[str]) -> int:
        """Add the videos of rows that are new; return how many there are in all, with the unreadable rows."""
        found = 0
        self.samples.append(samples)
        for row in range(len(samples)):
            try:
                videos = samples[row].videos()
            except MervError:
                self.places.append((len(self.samples) - 1, row, -1))
                found += 1
                continue
            found += len(videos)
            for position, video in enumerate(videos):
                if not isinstance(video, str):
                    self.places.append((len(self.samples) - 1, row, position))
                elif video not in seen:
                    seen.add(video)
                    self.places.append(video)
        return found

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        place = self.places[index]
        if isinstance(place, list):
            return [self[i] for i in range(len(self))[index]]
        if isinstance(place, str):
            return Item(place, place)
        samples, row, position = self.samples[place[0]], place[1], place[2]
        name = samples.origin(row)
        try:
            return Item(f"{name}#{position}" if position else name, samples[row].videos()[position])
        except MervError as error:
            return Item(name, None, str(error))

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


def _expanded(source: str) -> list[Path]:
    """The paths that a pattern stands for, in order; a path that exists stands for itself."""
    path = Path(source).expanduser()
    if path.exists():
        return [path]
    if glob.has_magic(source):
        return sorted(map(Path, glob.glob(str(path), recursive=True)))
    if "{" in source:  # as in data files: shards-{0000..0063}.tar
        from merv.data.sources import expand

        return list(expand(source))
    raise DataError(f"{source} does not exist. Pass a video, a folder, a pattern or a data file.")


def _is_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in DATASET_FILES)


def _media_below(folder: Path) -> list[Path]:
    """All videos and images in a folder and its subfolders, without hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith((*VIDEOS, *IMAGES))
        ]
    return found
