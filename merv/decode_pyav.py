"""Reader of video files by PyAV: true times, upright pictures, damaged files salvaged.

A first pass over the packets, which decodes nothing but the first picture, tells when every
frame is shown; frames are then found by that time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from torch import Tensor

from merv.decode import VideoReader
from merv.errors import UnreadableVideo
from merv.types import VideoInfo

BROKEN = (av.error.FFmpegError, OSError)  # what a bad file raises, in FFmpeg or in the file object
PLAYLISTS = ("hls", "concat", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest")
SEEK_S = 2.0  # passing over less than this is as quick by decoding it


class PyAVReader(VideoReader):
    """Reads a seekable binary file; see `open_video`.

    It is opened as a Python file and with no protocol allowed, so that nothing inside it can
    make FFmpeg open another file or an address. Threads share slices only: with threads that
    share frames, a damaged file can deadlock the process at its exit.
    """

    def __init__(self, file: BinaryIO, name: str, *, owned: bool = False) -> None:
        super().__init__()
        self._file, self._name, self._owned = file, name, owned
        scan = self._scan()
        if scan.first is None or not scan.shown:
            raise UnreadableVideo(f"{name}: it is a {scan.codec} video, but no picture of it can be decoded.")
        self.damage = scan.damage
        self._by_count = scan.by_count
        self._first = scan.first
        self._turn = Turn.of(scan.first)
        self._pts = scan.frame_pts()
        self._keys = sorted(scan.keys)
        self._tick_s = scan.tick_s
        begin, end = self._pts[0], self._pts[-1]
        coded = (scan.first.height, scan.first.width)
        height, width = reversed(coded) if self._turn.swap else coded
        self.info = VideoInfo(
            name,
            duration_s=(end - begin + scan.shown[end]) * self._tick_s,
            times_s=tuple((pts - begin) * self._tick_s for pts in self._pts),
            width=width,
            height=height,
            rotation=self._turn.degrees,
            codec=scan.codec,
            backend="pyav",
        )

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._owned:
            self._file.close()

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        """A quick pass, then a plain one from the start for what the quick one did not meet."""
        index_of = {self._pts[index]: index for index in wanted}
        for fast in (True, False):
            if fast and self._by_count:
                continue
            for pts, frame in self._frames(sorted(index_of), fast):
                with suppress(*BROKEN):
                    yield index_of[pts], self._picture(frame)
                    del index_of[pts]
            if not index_of:
                return

    def _frames(self, wanted: list[int], fast: bool) -> Iterator[tuple[int, Any]]:
        """(pts, frame) of those of `wanted` (ascending) that decode.

        fast: seek over long gaps, and do not decode what neither is wanted nor others build on.
        """
        with self._open() as container:
            stream = _video_stream(container)
            for key, run in self._runs(wanted) if fast else [(None, wanted)]:
                if key is not None:
                    container.seek(key, stream=stream)
                yield from self._run(container, stream, run, fast)

    def _run(self, container: Any, stream: Any, wanted: list[int], fast: bool) -> Iterator[tuple[int, Any]]:
        left, shown = set(wanted), 0
        for packet in _packets(container, stream):
            if fast:
                needed = not packet.size or packet.pts in left
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in self._decoded(packet):
                pts = self._pts[min(shown, len(self._pts) - 1)] if self._by_count else frame.pts
                shown += 1
                if pts in left:
                    left.remove(pts)
                    yield pts, frame
                if pts is not None and pts >= wanted[-1]:
                    return

    def _decoded(self, packet: Any) -> list[Any]:
        """What comes out when a packet goes in. An error spoils the frames that build on it, too."""
        try:
            return packet.decode()
        except BROKEN:
            if packet.pts is None or packet.pts > self._pts[0]:
                self.damage = self.damage or "some of its packets are damaged"
            return []

    def _runs(self, wanted: list[int]) -> Iterator[tuple[int | None, list[int]]]:
        """`wanted` cut where seeking pays: (pts of the keyframe to seek to, frames to read on)."""
        key: int | None = None
        run: list[int] = []
        here = self._pts[0]
        for pts in wanted:
            before = self._keys[bisect_right(self._keys, pts) - 1] if self._keys else here
            if (before - here) * self._tick_s > SEEK_S:
                if run:
                    yield key, run
                key, run = before, []
            run.append(pts)
            here = pts
        yield key, run

    def _picture(self, frame: Any) -> Tensor:
        """Upright uint8 [3, H, W]; of the first frame's size, should the size change on the way."""
        first = self._first
        pixels = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
        return self._turn(torch.from_numpy(pixels).permute(2, 0, 1))

    def _open(self) -> Any:
        self._file.seek(0)
        # Not `options`: before PyAV 18 those crash in files that announce no streams, as mpg.
        options: dict[str, Any] = {"container_options": {"protocol_whitelist": "none"}}
        if int(av.__version__.split(".")[0]) < 19:  # from then on never an error
            options["metadata_errors"] = "replace"
        try:
            container = av.open(self._file, **options)
        except BROKEN as error:
            empty = not self._file.seek(0, 2)
            raise UnreadableVideo(
                f"{self._name}: {'the file is empty' if empty else 'not a video or image, or too damaged'} "
                f"({type(error).__name__}). load_video(…, on_error='skip') passes over such files."
            ) from error
        return closing(container)

    def _scan(self) -> Scan:
        with self._open() as container:
            if container.format.name in PLAYLISTS:
                raise UnreadableVideo(
                    f"{self._name}: a {container.format.name} playlist points to other files, which are "
                    "not opened. Give the video itself."
                )
            stream = _video_stream(container)
            if stream is None:
                raise UnreadableVideo(f"{self._name}: the file holds no video ({container.format.name}).")
            return Scan.of(container, stream)


@dataclass
class Scan:
    """What one pass over the packets of a stream tells; times in ticks of the stream's clock."""

    codec: str
    tick_s: float
    first: Any = None  # the first frame that can be decoded
    shown: dict[int, int] = field(default_factory=dict)  # pts of a frame → its duration
    keys: list[int] = field(default_factory=list)  # pts of the keyframes
    by_count: bool = False  # frames do not carry their pts: the n-th decoded is the n-th shown
    damage: str = ""

    @classmethod
    def of(cls, container: Any, stream: Any) -> Scan:
        scan = cls(stream.codec_context.name, float(stream.time_base))
        rate = stream.average_rate or stream.guessed_rate or 25
        step = max(round(1 / (rate * stream.time_base)), 1)
        scan.by_count = container.format.name == "avi"  # its clock counts packets as stored
        packets = 0
        try:
            for packet in _packets(container, stream, salvage=False):
                if scan.first is None:
                    with suppress(*BROKEN):
                        scan.first = next(iter(packet.decode()), None)
                if not packet.size:
                    continue
                scan.by_count |= packet.pts is None
                pts = packet.dts if scan.by_count else packet.pts
                pts = packets * step if pts is None else pts
                packets += 1
                if not packet.is_discard:
                    scan.shown[pts] = packet.duration or step
                if packet.is_keyframe:
                    scan.keys.append(pts)
        except BROKEN as error:
            scan.damage = f"reading stopped at {type(error).__name__}"
        if packets < stream.frames and scan.end() + step < (stream.start_time or 0) + (stream.duration or 0):
            scan.damage = f"the file is cut off, {packets} of its {stream.frames} frames are there"
        return scan

    def end(self) -> int:
        """When the last frame ends."""
        last = max(self.shown, default=0)
        return last + self.shown.get(last, 0)

    def frame_pts(self) -> list[int]:
        """When frames are shown, ascending, from the first that can be decoded."""
        pts = sorted(self.shown)
        return pts if self.by_count else [p for p in pts if p >= self.first.pts]


@dataclass(frozen=True)
class Turn:
    """What makes a coded picture upright: swap rows and columns, then flip either."""

    swap: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> Turn:
        """From the display matrix that a frame carries, to the nearest right angle.

        The matrix takes a column x and row y to (a·x + c·y, b·x + d·y); see FFmpeg's
        libavutil/display.h.
        """
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        if matrix is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        return cls(True, b < 0, c < 0) if abs(b) > abs(a) else cls(False, d < 0, a < 0)

    @property
    def degrees(self) -> int:
        """Clockwise; a mirrored picture has the angle of its turned rows."""
        if self.swap:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_columns else 0

    def __call__(self, picture: Tensor) -> Tensor:
        """[3, H, W] as coded, to [3, H, W] upright."""
        if self.swap:
            picture = picture.transpose(1, 2)
        return picture.flip([axis for axis, flip in ((1, self.flip_rows), (2, self.flip_columns)) if flip])


def _video_stream(container: Any) -> Any:
    """The first stream of moving pictures; a song's cover is none."""
    covers = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & covers), None)
    if stream is not None:
        stream.thread_type = "SLICE"
    return stream


def _packets(container: Any, stream: Any, salvage: bool = True) -> Iterator[Any]:
    """Packets of the stream up to a last, empty one that flushes the decoder."""
    with suppress(*(BROKEN if salvage else ())):
        yield from container.demux(stream)
