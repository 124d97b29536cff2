"""Check of data: every row, every video and image, read before training does, by all cores.

Three passes, each in worker processes: rows; the videos and images in them, each once; and the
content of those files that could be equal, because their sizes are.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader
from tqdm import tqdm

from merv.data.samples import media_parts
from merv.data.sources import FilePart, Rows, Samples, Source, expand, open_samples
from merv.errors import DataError, MervError
from merv.models.chat import render
from merv.video.open import open_video
from merv.video.reader import SKIP

CHARACTERS = 4  # of English, to a token, where no tokenizer is given
SMALLEST = 16  # pixels: a patch of the common encoders
DECODED = 8  # frames of each video, spread evenly, with media="decode"
CHUNK = 32  # rows or files that a worker takes at once


@dataclass(frozen=True)
class Finding:
    """Something about a sample: where its row is, what kind of thing, in words."""

    origin: str
    kind: Literal["file", "row", "media", "length", "duplicate", "leak"]
    reason: str


@dataclass
class Report:
    """What a check found.

    bad: what training would fail on, or should not see. notes: what is worth knowing. good: the
    samples without anything bad, by their indices. counts, numbers: statistics, by what is counted
    or measured. samples: what was checked.
    """

    samples: Samples
    bad: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    good: list[int] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Cell:
    """A video or image whose bytes are in a row: which one of which sample of which set."""

    group: int
    index: int
    place: int


@dataclass(frozen=True)
class Row:
    """What a worker tells of a sample; with `reason`, only that."""

    origin: str
    reason: str = ""
    talks: tuple[bytes, ...] = ()  # a hash of the words of each conversation
    asked: tuple[bytes, ...] = ()  # of each question with its answer
    turns: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    media: tuple[Any, ...] = ()  # paths, FileParts, Cells, each once
    kinds: str = ""  # of media


@dataclass(frozen=True)
class Medium:
    """What a worker tells of a video or image."""

    size: int = 0
    reason: str = ""
    shape: Mapping[str, float] = field(default_factory=dict)
    codec: str = ""


def check_data(
    files: Source,
    *,
    root: str | Path | None = None,
    media: Literal["none", "probe", "decode"] = "probe",
    tokenizer: Any = None,
    visual_tokens: int = 1024,
    max_tokens: int | None = None,
    against: Source = (),
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Read all samples of `files` and say what is wrong with them.

    root: as of `open_samples`. media: open each video and image (`probe`), decode some frames too,
    or neither. tokenizer: the language model's, which renders conversations and measures lengths; without,
    they are estimated from characters. visual_tokens: of one video or image, for those lengths. max_tokens:
    longer conversations are bad. against: files of evaluation data, which should not be in these.
    workers: processes besides this one. progress: whether a terminal shows bars.
    """
    opened, report = _open(files, root)
    sets = [opened, open_samples(against, root) if against else Samples([])]
    run = partial(_run, workers=workers, progress=progress)
    rows, known = (
        list(run(partial(_row, samples, group, tokenizer, visual_tokens), range(len(samples)), "rows"))
        for group, samples in enumerate(sets)
    )
    own = dict.fromkeys(medium for row in rows for medium in row.media)
    others = dict.fromkeys(medium for row in known for medium in row.media if medium not in own)
    about: dict[Any, Medium] = {}
    for found, way in (own, media), (others, "none"):
        about.update(
            zip(found, run(partial(_medium, sets, way), list(found), "videos and images"), strict=True)
        )
    sizes = Counter(medium.size for medium in about.values())
    alike = [source for source, medium in about.items() if medium.size and sizes[medium.size] > 1]
    content = dict(zip(alike, run(partial(_digest, sets), alike, "contents of equal size"), strict=True))
    judge = _Judge(report, about, {**{source: source for source in about}, **content}, known, max_tokens)
    for index, row in enumerate(rows):
        judge(index, row)
    judge.copies(own)
    return report


def _open(files: Source, root: str | Path | None) -> tuple[Samples, Report]:
    """The files that can be opened, as one, and a report that names the others."""
    opened: list[Rows] = []
    bad = []
    for pattern in [files] if isinstance(files, (str, Path)) else files:
        try:
            paths: Sequence[str | Path] = expand(pattern)
        except DataError as error:
            bad.append(Finding(str(pattern), "file", str(error)))
            continue
        for path in paths:
            try:
                opened += open_samples(path, root).files
            except DataError as error:
                bad.append(Finding(str(path), "file", str(error)))
    samples = Samples(opened)
    return samples, Report(samples, bad)


def _run(
    work: Callable[[Any], Any], items: Sequence[Any], about: str, *, workers: int, progress: bool
) -> Iterator[Any]:
    """`work` of each item, in order; a loader's workers have one thread each."""
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    if not chunks:
        return
    loader: Any = DataLoader(_Chunks(work, chunks), batch_size=None, num_workers=min(workers, len(chunks)))  # type: ignore[arg-type]
    with tqdm(total=len(items), desc=about, disable=None if progress else True) as bar:
        for done in loader:
            yield from done
            bar.update(len(done))


@dataclass(frozen=True)
class _Chunks:
    work: Callable[[Any], Any]
    chunks: Sequence[Sequence[Any]]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.work(item) for item in self.chunks[index]]


def _row(samples: Samples, group: int, tokenizer: Any, visual_tokens: int, index: int) -> Row:
    try:
        sample = samples[index]
        tokens = tuple(_tokens(talk, tokenizer, visual_tokens) for talk in sample.conversations)
    except MervError as error:
        return Row(samples.origin(index), str(error))
    parts = media_parts(sample.conversations[0])  # others of a sample have the same
    sources = [part[part["type"]] for part in parts]
    media = [Cell(group, index, n) if isinstance(s, bytes) else s for n, s in enumerate(sources)]
    talks = [[(turn["role"], _words(turn)) for turn in talk] for talk in sample.conversations]
    return Row(
        sample.origin,
        talks=tuple(map(_hash, talks)),
        asked=tuple(
            _hash((said.strip().lower(), answer.strip().lower()))
            for talk in talks
            for (_, said), (role, answer) in pairwise(talk)
            if role == "assistant"
        ),
        turns=tuple(len(talk) for talk in talks),
        tokens=tokens,
        media=tuple(dict.fromkeys(media)),
        kinds=" and ".join(sorted({part["type"] for part in parts})) or "text only",
    )


def _words(turn: Mapping[str, Any]) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _hash(value: Any) -> bytes:
    return blake2b(json.dumps(value).encode(), digest_size=10).digest()


def _tokens(talk: list[dict[str, Any]], tokenizer: Any, visual_tokens: int) -> int:
    if tokenizer is None:
        text = sum(len(_words(turn)) for turn in talk) // CHARACTERS
    else:
        text = sum(len(piece) for piece in render(talk, tokenizer).pieces if isinstance(piece, list))
    return text + visual_tokens * len(media_parts(talk))


def _held(sets: Sequence[Samples], medium: Any) -> Any:
    return sets[medium.group][medium.index].videos()[medium.place] if isinstance(medium, Cell) else medium


def _medium(sets: Sequence[Samples], way: str, medium: Any) -> Medium:
    """Size in bytes of a video or image; unless `way` is none, what reading it shows."""
    source = _held(sets, medium)
    size = _size(source)
    if way == "none":
        return Medium(size)
    try:
        with open_video(source) as video:
            info = video.info
            if video.damage:
                return Medium(size, f"{info.name}: {video.damage}")
            if info.backend != "pillow" and info.frames == 1:
                return Medium(size, f"{info.name}: a video of one frame")
            if min(info.width, info.height) < SMALLEST:
                return Medium(size, f"{info.name}: {info.width}×{info.height} pixels show nothing")
            if way == "decode":
                steps = min(DECODED, info.frames)
                video.read([i * info.frames // steps for i in range(steps)])
    except MervError as error:
        return Medium(size, str(error).removesuffix(SKIP).strip())
    shape: dict[str, float] = {"width": info.width, "height": info.height}
    if not info.is_still:
        shape |= {"duration_s": info.duration_s, "fps": info.fps}
    return Medium(size, shape=shape, codec=info.codec)


def _size(source: Any) -> int:
    """In bytes; 0 for what cannot be read."""
    if isinstance(source, (bytes, FilePart)):
        return len(source) if isinstance(source, bytes) else source.size
    try:
        if os.path.isdir(source):
            return sum(file.stat().st_size for file in os.scandir(source) if file.is_file())
        return os.stat(source).st_size
    except (OSError, ValueError):
        return 0


def _digest(sets: Sequence[Samples], medium: Any) -> Any:
    from merv.features.store import video_key

    try:
        return video_key(_held(sets, medium), "")
    except MervError:
        return medium


@dataclass
class _Judge:
    """Puts what the workers told into the report, row by row.

    content: of each medium what is equal where its content is. known: rows of evaluation data.
    """

    report: Report
    about: Mapping[Any, Medium]
    content: Mapping[Any, Any]
    known: Sequence[Row]
    max_tokens: int | None

    def __post_init__(self) -> None:
        self.seen: dict[Any, str] = {}
        self.users: dict[Any, str] = {}
        self.known_media = {self.content[m]: row.origin for row in self.known for m in row.media}
        self.known_asked = {asked: row.origin for row in self.known for asked in row.asked}

    def __call__(self, index: int, row: Row) -> None:
        found = list(self._findings(row))
        bad = [finding for finding, is_bad in found if is_bad]
        self.report.bad += bad
        self.report.notes += [finding for finding, is_bad in found if not is_bad]
        if not bad:
            self.report.good.append(index)
        self.report.counts["rows"]["bad" if bad else "sound"] += 1
        self._count(row)

    def _findings(self, row: Row) -> Iterator[tuple[Finding, bool]]:
        """What there is to say about a row, and whether that is bad."""
        if row.reason:
            yield Finding(row.origin, "row", row.reason.removeprefix(f"{row.origin}: ")), True
            return
        for medium in row.media:
            self.users.setdefault(medium, row.origin)
            if reason := self.about[medium].reason:
                yield Finding(row.origin, "media", reason), True
            elif where := self.known_media.get(self.content[medium]):
                yield Finding(row.origin, "leak", f"{_named(medium)} is evaluated on, at {where}"), True
        if self.max_tokens and max(row.tokens) > self.max_tokens:
            yield Finding(row.origin, "length", f"{max(row.tokens)} tokens, over {self.max_tokens}"), True
        if where := next((self.known_asked[a] for a in row.asked if a in self.known_asked), None):
            reason = f"question and answer are those of evaluation data, at {where}"
            yield Finding(row.origin, "leak", reason), not row.media
        media = tuple(self.content[medium] for medium in row.media)
        first = [self.seen.setdefault((talk, media), row.origin) for talk in dict.fromkeys(row.talks)]
        again = [where for where in first if where != row.origin]
        if again or len(first) < len(row.talks):
            reason = f"a conversation that is at {(again or first)[0]} already"
            yield Finding(row.origin, "duplicate", reason), len(again) == len(first)

    def _count(self, row: Row) -> None:
        counts, numbers = self.report.counts, self.report.numbers
        if row.reason:
            return
        counts["conversations"]["all"] += len(row.talks)
        counts["rows by content"][row.kinds] += 1
        numbers["turns"] += row.turns
        numbers["tokens"] += row.tokens

    def copies(self, media: Iterable[Any]) -> None:
        """Statistics of the videos and images, and a note of each that is another one's copy."""
        first: dict[Any, Any] = {}
        counts = self.report.counts["videos and images"]
        for medium in media:
            about = self.about[medium]
            counts[about.codec or ("bad" if about.reason else "not opened")] += 1
            for name, number in about.shape.items():
                self.report.numbers[name].append(number)
            other = first.setdefault(self.content[medium], medium)
            if other is not medium and not isinstance(medium, Cell):
                reason = f"{_named(medium)} has the content of {_named(other)}"
                self.report.notes.append(Finding(self.users[medium], "duplicate", reason))


def _named(medium: Any) -> str:
    return "its video or image" if isinstance(medium, Cell) else str(medium)
