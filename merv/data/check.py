"""Check a data set before training: read every row and open every video and image, in worker processes.

There are three rounds: the rows; the videos and images in them, each once; and the content of those files
that may be copies of each other because they have the same size.
"""

from __future__ import annotations

import json
import os
import re
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

from merv.data.samples import Conversation, media_parts, text_of
from merv.data.sources import FilePart, Rows, Samples, Source, expand, foreign_members, open_samples
from merv.errors import DataError, MervError
from merv.models.chat_template import ChatTemplate
from merv.video.open import open_video
from merv.video.reader import reason_of

CHARACTERS_PER_TOKEN = 4  # of English, for an estimate without a tokenizer
MIN_SIDE = 16  # pixels: a patch of the common encoders
DECODED_FRAMES = 8  # of each video with media="decode", evenly spaced
FOLLOW_UP_TURNS = 4  # a conversation with this many messages has at least two questions
CHUNK_SIZE = 32  # rows or files that a worker takes at once

Media = Any  # a video or image: a path, FilePart or EmbeddedMedia


@dataclass(frozen=True)
class Finding:
    """A remark about a sample or file.

    Args:
        origin: The row (such as `train.jsonl:17`) or the file that the remark is about.
        kind: What it is about. "file": a data file. "row": the form of a row. "media": a video or image.
            "length": the length of a conversation. "duplicate": content that occurred before. "leak": content
            that is also in the evaluation data.
        reason: The remark, as text.
    """

    origin: str
    kind: Literal["file", "row", "media", "length", "duplicate", "leak"]
    reason: str


@dataclass
class Report:
    """The result of `check_data`.

    Args:
        samples: The samples that were checked.
        invalid: Findings about files and samples that training cannot use or must not use.
        notes: Findings that do not make a sample invalid.
        valid: Indices of the samples without an invalid finding.
        counts: Counts by name and category, such as `counts["rows"]["valid"]`.
        numbers: Measured values by name: "turns" and "tokens" of each conversation; "width" and "height"
            (pixels), "duration_s" and "fps" of each video, the first two also of each image.
    """

    samples: Samples
    invalid: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    valid: list[int] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class EmbeddedMedia:
    """Names a video or image whose bytes are in a row, so that workers need not send the bytes."""

    set_index: int
    row_index: int
    position: int


@dataclass(frozen=True)
class RowCheck:
    """The result of checking a row. A malformed row has only `origin` and `error`."""

    origin: str
    error: str = ""
    conversation_hashes: tuple[bytes, ...] = ()
    question_hashes: tuple[bytes, ...] = ()  # of each question with its answer
    num_turns: tuple[int, ...] = ()  # of each conversation
    num_tokens: tuple[int, ...] = ()  # of each conversation
    media: tuple[Media, ...] = ()  # without repeats
    media_types: str = ""


@dataclass(frozen=True)
class MediaCheck:
    """The result of checking a video or image."""

    num_bytes: int  # 0 if it cannot be read
    error: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)  # size, duration and rate
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
    num_workers: int = 0,
    progress: bool = False,
) -> Report:
    """Check all samples of some files.

    Args:
        files: Files of samples, as in `open_samples`.
        root: The folder that paths in rows start at; the folder of each file by default.
        media: "probe" opens each video and image, "decode" also decodes some of its frames. "none" opens
            none, and only finds files with the same content.
        tokenizer: The language model's tokenizer, which renders conversations and measures their lengths.
            None: lengths are estimated from characters.
        visual_tokens: How many tokens to count for each video or image.
        max_tokens: Conversations with more tokens are invalid. None: no limit.
        against: Files of evaluation data, which must not be in the training data.
        num_workers: Worker processes; 0: this process does the work.
        progress: Show progress bars in a terminal.

    Returns:
        The findings and statistics. A file that cannot be opened is a finding, too.

    Raises:
        DataError: A file of `against` cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.jsonl")
        ...     _ = file.write_text('{"messages": [{"role": "user", "content": "Who?"}]}')
        ...     report = check_data(file)
        >>> report.valid, report.invalid[0].kind
        ([], 'row')
    """
    samples, report = _open_files(files, root)
    sets = [samples, open_samples(against, root) if against else Samples([])]
    parallel_map = partial(_parallel_map, num_workers=num_workers, progress=progress)
    rows, eval_rows = (
        parallel_map(
            partial(_check_row, sets[i], i, tokenizer, visual_tokens),
            partial(_failed_row, sets[i]),
            range(len(sets[i])),
            "rows",
        )
        for i in range(2)
    )
    # Dicts keep the order and drop repeats
    train_media = dict.fromkeys(source for row in rows for source in row.media)
    eval_media = dict.fromkeys(
        source for row in eval_rows for source in row.media if source not in train_media
    )
    checks: dict[Media, MediaCheck] = {}
    for sources, mode in (train_media, media), (eval_media, "none"):
        check = partial(_check_media, sets, mode)
        results = parallel_map(check, _failed_media, list(sources), "videos and images")
        checks.update(zip(sources, results, strict=True))
    sizes = Counter(check.num_bytes for check in checks.values())
    same_size = [s for s, check in checks.items() if check.num_bytes and sizes[check.num_bytes] > 1]
    keys = parallel_map(partial(_content_key, sets), _failed_key, same_size, "contents of equal size")
    content = {source: source for source in checks} | dict(zip(same_size, keys, strict=True))
    builder = _ReportBuilder(report, checks, content, eval_rows, max_tokens)
    for index, row in enumerate(rows):
        builder.add_row(index, row)
    builder.add_media(train_media)
    builder.add_follow_ups(rows)
    return report


def _open_files(files: Source, root: str | Path | None) -> tuple[Samples, Report]:
    """Open the files that can be opened, and start a report with findings about the others."""
    opened: list[Rows] = []
    invalid = []
    for pattern in [files] if isinstance(files, (str, Path)) else files:
        try:
            paths: Sequence[str | Path] = expand(pattern)
        except DataError as error:
            invalid.append(Finding(str(pattern), "file", str(error)))
            continue
        for path in paths:
            try:
                opened += open_samples(path, root).files
            except DataError as error:
                invalid.append(Finding(str(path), "file", str(error)))
    samples = Samples(opened)
    return samples, Report(samples, invalid, _foreign_members(opened))


def _foreign_members(files: Sequence[Rows]) -> list[Finding]:
    """Return a note about each shard with members that do not belong to samples."""
    return [Finding(str(rows.path), "file", foreign_members(rows)) for rows in files if rows.foreign]


def _parallel_map(
    work: Callable[[Any], Any],
    failed: Callable[[Any, str], Any],
    items: Sequence[Any],
    name: str,
    *,
    num_workers: int,
    progress: bool,
) -> list[Any]:
    """Return `work(item)` of each item; `failed(item, reason)` if it raises or its process is killed."""
    results: list[Any] = []
    with tqdm(total=len(items), desc=name, disable=None if progress else True) as bar:
        while len(results) < len(items):
            was_killed = False
            try:
                for chunk in _map_chunks(work, failed, items[len(results) :], CHUNK_SIZE, num_workers):
                    results += chunk
                    bar.update(len(chunk))
            except RuntimeError:  # a worker was killed, perhaps at this chunk
                was_killed = True
            if was_killed:  # after `except`, because the exception keeps the other workers alive
                chunk = [
                    _isolated(work, failed, item) for item in items[len(results) : len(results) + CHUNK_SIZE]
                ]
                results += chunk
                bar.update(len(chunk))
    return results


def _map_chunks(
    work: Callable[[Any], Any],
    failed: Callable[[Any, str], Any],
    items: Sequence[Any],
    chunk_size: int,
    num_workers: int,
) -> Iterator[list[Any]]:
    """Yield the results of each chunk. RuntimeError: a worker was killed.

    A DataLoader sends `work`, which holds the index of all samples, to each worker once; a process pool would
    send it with each chunk.
    """
    loader: Any = DataLoader(
        items,  # type: ignore[arg-type]
        batch_size=chunk_size,
        collate_fn=partial(_map_chunk, work, failed),
        num_workers=min(num_workers, -(-len(items) // chunk_size)),
    )
    return iter(loader)


def _map_chunk(
    work: Callable[[Any], Any], failed: Callable[[Any, str], Any], chunk: Sequence[Any]
) -> list[Any]:
    results = []
    for item in chunk:
        try:
            results.append(work(item))
        except Exception as error:  # whatever it is, the other items are still checked
            results.append(failed(item, f"unexpected {type(error).__name__}: {error}"))
    return results


def _isolated(work: Callable[[Any], Any], failed: Callable[[Any, str], Any], item: Any) -> Any:
    """Return `work(item)`, computed in a process of its own."""
    try:
        (results,) = _map_chunks(work, failed, [item], 1, 1)
    except RuntimeError as error:
        signal = re.search(r"signal: ([^.]*)", f"{error} {error.__cause__}")
        ended = f"was killed ({signal[1]})" if signal else "ended"
        return failed(item, f"the process that read it {ended}: a crash, or not enough memory")
    return results[0]


def _failed_row(samples: Samples, index: int, reason: str) -> RowCheck:
    return RowCheck(samples.origin(index), reason)


def _failed_media(media: Media, reason: str) -> MediaCheck:
    return MediaCheck(0, f"{_name_of(media)}: {reason}")


def _failed_key(media: Media, reason: str) -> Media:
    return media


def _check_row(samples: Samples, set_index: int, tokenizer: Any, visual_tokens: int, index: int) -> RowCheck:
    try:
        sample = samples[index]
        num_tokens = tuple(_num_tokens(turns, tokenizer, visual_tokens) for turns in sample.conversations)
    except MervError as error:
        return RowCheck(samples.origin(index), str(error))
    parts = media_parts(sample.conversations[0])  # all conversations of a sample have the same
    sources = [part[part["type"]] for part in parts]
    media = [EmbeddedMedia(set_index, index, n) if isinstance(s, bytes) else s for n, s in enumerate(sources)]
    texts = [[(turn["role"], text_of(turn["content"])) for turn in turns] for turns in sample.conversations]
    return RowCheck(
        sample.origin,
        conversation_hashes=tuple(map(_hash, texts)),
        question_hashes=tuple(
            _hash((question.strip().lower(), answer.strip().lower()))
            for turns in texts
            for (_, question), (role, answer) in pairwise(turns)
            if role == "assistant"
        ),
        num_turns=tuple(len(turns) for turns in texts),
        num_tokens=num_tokens,
        media=tuple(dict.fromkeys(media)),
        media_types=" and ".join(sorted({part["type"] for part in parts})) or "text only",
    )


def _hash(value: Any) -> bytes:
    return blake2b(json.dumps(value).encode(), digest_size=10).digest()


def _num_tokens(conversation: Conversation, tokenizer: Any, visual_tokens: int) -> int:
    """Return the length of a conversation in tokens, measured by the tokenizer or estimated without one."""
    if tokenizer is None:
        text = sum(len(text_of(turn["content"])) for turn in conversation) // CHARACTERS_PER_TOKEN
    else:
        sequences = ChatTemplate(tokenizer).training_prompts(conversation)
        text = max(len(sequence.items) - len(sequence.visuals) for sequence in sequences)
    return text + visual_tokens * len(media_parts(conversation))


def _check_media(sets: Sequence[Samples], mode: str, media: Media) -> MediaCheck:
    """Measure the size of a video or image and, unless the mode is "none", open it."""
    source = _source_of(sets, media)
    num_bytes = _num_bytes(source)
    if mode == "none":
        return MediaCheck(num_bytes)
    try:
        with open_video(source) as video:
            info = video.info
            if video.damage:
                return MediaCheck(num_bytes, f"{info.name}: {video.damage}")
            if info.backend != "pillow" and info.num_frames == 1:
                return MediaCheck(num_bytes, f"{info.name}: only one frame; expected at least 2")
            if min(info.width, info.height) < MIN_SIDE:
                size = f"{info.width}×{info.height} pixels; expected at least {MIN_SIDE}×{MIN_SIDE}"
                return MediaCheck(num_bytes, f"{info.name}: {size}")
            if mode == "decode":
                count = min(DECODED_FRAMES, info.num_frames)
                video.read([i * info.num_frames // count for i in range(count)])
    except MervError as error:
        return MediaCheck(num_bytes, reason_of(error))
    numbers: dict[str, float] = {"width": info.width, "height": info.height}
    if not info.is_still:
        numbers |= {"duration_s": info.duration_s, "fps": info.fps}
    return MediaCheck(num_bytes, numbers=numbers, codec=info.codec)


def _source_of(sets: Sequence[Samples], media: Media) -> Any:
    if isinstance(media, EmbeddedMedia):
        return sets[media.set_index][media.row_index].videos()[media.position]
    return media


def _num_bytes(source: Any) -> int:
    """Return the size in bytes, for a folder that of its files; 0 if it cannot be read."""
    if isinstance(source, (bytes, FilePart)):
        return len(source) if isinstance(source, bytes) else source.size
    try:
        if os.path.isdir(source):
            return sum(file.stat().st_size for file in os.scandir(source) if file.is_file())
        return os.stat(source).st_size
    except (OSError, ValueError):
        return 0


def _content_key(sets: Sequence[Samples], media: Media) -> Any:
    """Return a hash of the content; `media` itself if it cannot be read."""
    from merv.features.keys import content_digest

    try:
        return content_digest(_source_of(sets, media))
    except MervError:
        return media


class _ReportBuilder:
    """Builds the report from the checks of rows and media.

    `content` maps each video and image to a key, which is the same for equal content.
    """

    def __init__(
        self,
        report: Report,
        checks: Mapping[Media, MediaCheck],
        content: Mapping[Media, Any],
        eval_rows: Sequence[RowCheck],
        max_tokens: int | None,
    ) -> None:
        self.report, self.checks, self.content, self.max_tokens = report, checks, content, max_tokens
        # Each of these maps to the origin of a row
        self.eval_content = {content[source]: row.origin for row in eval_rows for source in row.media}
        self.eval_questions = {question: row.origin for row in eval_rows for question in row.question_hashes}
        self.first_conversation: dict[Any, str] = {}
        self.first_use: dict[Media, str] = {}

    def add_row(self, index: int, row: RowCheck) -> None:
        """Add the findings about a row and its statistics."""
        findings = list(self._findings(row))
        invalid = [finding for finding, is_invalid in findings if is_invalid]
        self.report.invalid += invalid
        self.report.notes += [finding for finding, is_invalid in findings if not is_invalid]
        if not invalid:
            self.report.valid.append(index)
        counts, numbers = self.report.counts, self.report.numbers
        counts["rows"]["invalid" if invalid else "valid"] += 1
        if not row.error:
            counts["conversations"]["total"] += len(row.conversation_hashes)
            counts["rows by content"][row.media_types] += 1
            numbers["turns"] += row.num_turns
            numbers["tokens"] += row.num_tokens

    def _findings(self, row: RowCheck) -> Iterator[tuple[Finding, bool]]:
        """Yield each finding about a row, and whether it makes the row invalid."""
        if row.error:
            yield Finding(row.origin, "row", row.error.removeprefix(f"{row.origin}: ")), True
            return
        for source in row.media:
            self.first_use.setdefault(source, row.origin)
            if error := self.checks[source].error:
                yield Finding(row.origin, "media", error), True
            elif eval_origin := self.eval_content.get(self.content[source]):
                reason = f"{_name_of(source)} is also in the evaluation data, at {eval_origin}"
                yield Finding(row.origin, "leak", reason), True
        if self.max_tokens and max(row.num_tokens) > self.max_tokens:
            reason = f"{max(row.num_tokens)} tokens, but the limit is {self.max_tokens}"
            yield Finding(row.origin, "length", reason), True
        shared = [question for question in row.question_hashes if question in self.eval_questions]
        if shared:
            reason = (
                f"question and answer are also in the evaluation data, at {self.eval_questions[shared[0]]}"
            )
            yield Finding(row.origin, "leak", reason), not row.media
        content = tuple(self.content[source] for source in row.media)
        distinct = dict.fromkeys(row.conversation_hashes)
        origins = [self.first_conversation.setdefault((one, content), row.origin) for one in distinct]
        earlier = [origin for origin in origins if origin != row.origin]
        if earlier or len(distinct) < len(row.conversation_hashes):
            reason = f"repeats a conversation of {(earlier or origins)[0]}"
            yield Finding(row.origin, "duplicate", reason), len(earlier) == len(distinct)

    def add_follow_ups(self, rows: Sequence[RowCheck]) -> None:
        """Add one note about all rows with follow-up questions about their videos."""
        chats = [row for row in rows if row.media and max(row.num_turns) >= FOLLOW_UP_TURNS]
        if chats:
            reason = (
                f"{len(chats)} of {len(rows)} rows (this is the first) have several questions as turns of "
                "one conversation. All answers but the first are then learned as answers to follow-up "
                "questions. "
                "If each question will be asked alone, use rows with 'questions' (docs/data.md)"
            )
            self.report.notes.append(Finding(chats[0].origin, "row", reason))

    def add_media(self, sources: Iterable[Media]) -> None:
        """Add statistics of the videos and images, and a note about each copy."""
        first: dict[Any, Media] = {}
        counts = self.report.counts["videos and images"]
        for source in sources:
            check = self.checks[source]
            counts[check.codec or ("invalid" if check.error else "not opened")] += 1
            for name, number in check.numbers.items():
                self.report.numbers[name].append(number)
            original = first.setdefault(self.content[source], source)
            if original is not source and not isinstance(source, EmbeddedMedia):
                reason = f"{_name_of(source)} has the same content as {_name_of(original)}"
                self.report.notes.append(Finding(self.first_use[source], "duplicate", reason))


def _name_of(media: Media) -> str:
    return "the embedded video or image" if isinstance(media, EmbeddedMedia) else str(media)
