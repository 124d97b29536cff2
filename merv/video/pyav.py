"""Reader of video files by PyAV: true times, upright pictures, damaged files salvaged.

A first pass over the packets, which decodes nothing but the first picture, tells when every
frame is shown; frames are then found by that time. What builds on damage is never given out.
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

from merv.types import VideoInfo
from merv.video.reader import MAX_PIXELS, VideoReader, check_size, display_size, unreadable

BROKEN = (av.error.FFmpegError, OSError)  # what a bad file raises, in FFmpeg or in the file object
TS_DISCONT = av.format.Flags.ts_discont.value
PLAYLISTS = ("hls", "concat", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest")
SEEK_S = 2.0  # passing over less than this is as quick by decoding it
JUMP_S = 10.0  # a clock that leaps by more has been set anew; FFmpeg's own bound


class PyAVReader(VideoReader):
    """Reads a seekable binary file; see `open_video`.

    It is opened as a Python file and with no protocol allowed, so that nothing inside it can
    make FFmpeg open another file or an address. Threads share slices only: with threads that
    share frames, a damaged file can deadlock the process at its exit.
    """

    def __init__(
        self, file: BinaryIO, name: str, *, owned: bool = False, max_pixels: int = MAX_PIXELS
    ) -> None:
        super().__init__()
        self._file, self._name, self._owned, self._max_pixels = file, name, owned, max_pixels
        self._size = file.seek(0, 2)
        scan = self._scan()
        if scan.first is None or not scan.shown:
            raise unreadable(name, f"it is a {scan.codec} video, but no picture of it can be decoded")
        self.damage = scan.damage
        self._by_count, self._clockless = scan.by_count, scan.clockless
        self._first = scan.first
        self._turn = Turn.of(scan.first)
        self._pts = scan.frame_pts()
        self._keys = sorted(scan.keys)
        self._tick_s = scan.tick_s
        begin, end = self._pts[0], self._pts[-1]
        seen = display_size(scan.first.width, scan.first.height, scan.pixel_aspect)
        width, height = reversed(seen) if self._turn.swap else seen
        check_size(name, width, height, max_pixels)
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
            stream = _video_stream(container, self._max_pixels)
            for key, run in self._runs(wanted) if fast else [(None, wanted)]:
                if key is not None:
                    container.seek(key, stream=stream)
                yield from self._run(container, stream, run, fast)

    def _run(self, container: Any, stream: Any, wanted: list[int], fast: bool) -> Iterator[tuple[int, Any]]:
        left, shown, damage = set(wanted), 0, Damage(for_good=self._clockless)
        places: dict[int | None, int] = {}  # pts of a packet → how many were stored before it
        for place, packet in enumerate(self._packets(container, stream)):
            if fast:
                needed = not packet.size or packet.pts in left
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            if self._by_count and packet.size:
                packet.pts = place  # only to know the frame again
            places[packet.pts] = place
            for frame in self._decoded(packet, place, damage):
                origin, lasted = places.get(frame.pts, place), damage.lasts
                sound = not damage.spoils(frame, origin) and frame.width * frame.height <= self._max_pixels
                if lasted and not damage.lasts:  # so many would have been shown before
                    shown = origin
                pts = self._pts[min(shown, len(self._pts) - 1)] if self._by_count else frame.pts
                shown += 1
                if sound and pts in left:
                    left.remove(pts)
                    yield pts, frame
                if pts is not None and pts >= wanted[-1]:
                    return

    def _decoded(self, packet: Any, place: int, damage: Damage) -> list[Any]:
        """What comes out when a packet goes in."""
        damage.feed(packet, place)
        try:
            return packet.decode()
        except BROKEN:
            damage.meet(place)
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
        """Upright uint8 [3, H, W]."""
        return self._turn(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))

    def _open(self) -> Any:
        if not self._size:
            raise unreadable(self._name, "the file is empty")
        self._file.seek(0)
        # Not `options`: before PyAV 18 those crash in files that announce no streams, as mpg.
        options: dict[str, Any] = {"container_options": {"protocol_whitelist": "none"}}
        if int(av.__version__.split(".")[0]) < 19:  # from then on never an error
            options["metadata_errors"] = "replace"
        try:
            return closing(av.open(Part(self._file, self._size), **options))
        except BROKEN as error:
            why = f"not a video or image, or too damaged ({type(error).__name__})"
            raise unreadable(self._name, why) from error

    def _packets(self, container: Any, *streams: Any) -> Iterator[Any]:
        """Packets of these streams up to last, empty ones, which flush the decoder."""
        with suppress(*BROKEN):
            yield from container.demux(*streams)

    def _scan(self) -> Scan:
        with self._open() as container:
            if container.format.name in PLAYLISTS:
                why = f"a {container.format.name} playlist points to other files, which are not opened"
                raise unreadable(self._name, why, "Give the video itself.")
            stream = _video_stream(container, self._max_pixels)
            if stream is None:
                why = f"the file holds no video that can be decoded ({container.format.name})"
                raise unreadable(self._name, why)
            context = stream.codec_context
            check_size(self._name, context.width, context.height, self._max_pixels)
            # Where a header tells the duration of the whole file only, any stream may be what lasts so long.
            lasts_s = 0.0 if stream.duration else (container.duration or 0) / av.time_base
            streams = container.streams if lasts_s else [stream]
            scan = Scan.of(container, stream, self._packets(container, *streams), lasts_s)
            # MP4 in fragments does not tell how many frames there should be.
            if (
                container.format.name.startswith("mov")
                and not stream.frames
                and overhangs(self._file, self._size)
            ):
                scan.damage = f"the file is cut off, {len(scan.shown)} frames are there"
            return scan


@dataclass(frozen=True)
class Part:
    """The first `size` bytes of a file, for reading: the file may grow meanwhile, or never end."""

    file: BinaryIO
    size: int

    def read(self, size: int) -> bytes:
        """At most so many bytes."""
        return self.file.read(max(min(size, self.size - self.file.tell()), 0))

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a place, counted from the beginning, from here or from the end."""
        return self.file.seek(place + self.size) if whence == 2 else self.file.seek(place, whence)

    def tell(self) -> int:
        """The place."""
        return self.file.tell()


def overhangs(file: BinaryIO, size: int) -> bool:
    """Whether the pictures of an MP4 file, or the table of them, go on behind its end.

    Boxes: a length of 4 bytes, or 1 and a longer length behind the kind, or 0 to the end; then 4 of kind.
    """
    place, kind = 0, b""
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        kind, length = head[4:8], int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:], "big") if length == 1 else length or size - place
        if length < 8 or place + length > size:
            return kind in (b"moof", b"mdat")
        place += length
    return kind == b"moof"  # without its pictures


@dataclass
class Scan:
    """What one pass over the packets of a stream tells; times in ticks of the stream's clock."""

    codec: str
    tick_s: float
    pixel_aspect: float = 1.0
    first: Any = None  # the first frame that can be decoded
    shown: dict[int, int] = field(default_factory=dict)  # pts of a frame → its duration
    keys: list[int] = field(default_factory=list)  # pts of the keyframes
    clockless: bool = False  # packets do not tell when they are shown
    by_count: bool = False  # frames cannot be told by their pts: the n-th decoded is the n-th shown
    damage: str = ""

    @classmethod
    def of(cls, container: Any, stream: Any, packets: Iterator[Any], lasts_s: float) -> Scan:
        """From the packets of a stream; lasts_s: how long the file says that its streams last, or 0."""
        scan = cls(stream.codec_context.name, float(stream.time_base), float(stream.sample_aspect_ratio or 1))
        rate = stream.average_rate or stream.guessed_rate or 25
        step = max(round(1 / (rate * stream.time_base)), 1)
        clock = Clock(step, round(JUMP_S / scan.tick_s)) if container.format.flags & TS_DISCONT else None
        scan.clockless = container.format.name == "avi"  # it counts packets as stored
        count, end_s, cut = 0, 0.0, False
        for packet in packets:
            if packet.size and packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            if scan.first is None:
                with suppress(*BROKEN):
                    scan.first = next((frame for frame in packet.decode() if not frame.is_corrupt), None)
            if not packet.size:
                continue
            scan.clockless |= packet.pts is None
            pts = packet.dts if scan.clockless else packet.pts
            pts = count * step if pts is None else pts
            if clock:
                pts += clock.lag(packet)
            count += 1
            cut = packet.is_corrupt
            if not packet.is_discard:
                scan.shown[pts] = packet.duration or step
            if packet.is_keyframe:
                scan.keys.append(pts)
        scan.by_count = scan.clockless or bool(clock and clock.set_anew)
        short = count < stream.frames and scan.end() + step < (stream.start_time or 0) + (
            stream.duration or 0
        )
        if short or cut or lasts_s - end_s > 0.1 + step * scan.tick_s:
            of_all = f" of its {stream.frames}" if stream.frames > count else ""
            scan.damage = f"the file is cut off, {count}{of_all} frames are there"
        return scan

    def end(self) -> int:
        """When the last frame ends."""
        last = max(self.shown, default=0)
        return last + self.shown.get(last, 0)

    def frame_pts(self) -> list[int]:
        """When frames are shown, ascending, from the first that can be decoded."""
        pts = sorted(self.shown)
        return pts if self.by_count else [p for p in pts if p >= self.first.pts]


@dataclass
class Clock:
    """Makes one clock of a broadcast whose clock is set anew on the way; in ticks."""

    step: int
    jump: int
    last: int | None = None
    behind: int = 0
    set_anew: bool = False

    def lag(self, packet: Any) -> int:
        """What to add to the times of a packet, so that it follows the one before."""
        if packet.dts is not None:
            if self.last is not None and not 0 <= packet.dts - self.last <= self.jump:
                self.behind += self.last + self.step - packet.dts
                self.set_anew = True
            self.last = packet.dts
        return self.behind


@dataclass
class Damage:
    """Tells which frames build on damage: what is stored after it, until a later keyframe comes out.

    for_good: there is no telling how many frames the damage swallowed, so nothing later is trusted.
    """

    for_good: bool
    begin: int = -1  # places of the first and the last damaged packet
    end: int = -1
    lasts: bool = False
    gap: bool = False

    def feed(self, packet: Any, place: int) -> None:
        """Packets may be missing after one that is marked as corrupt, where no keyframe follows.

        Zeros where H.264 or HEVC begins are a hole in the file, which FFmpeg passes over in silence.
        """
        hole = packet.size and packet.stream.codec_context.name in ("h264", "hevc")
        if (self.gap and not packet.is_keyframe) or (hole and not any(memoryview(packet)[:4])):
            self.meet(place)
        self.gap = packet.is_corrupt

    def meet(self, place: int) -> None:
        """The packet stored at `place` could not be decoded, or what came of it is corrupt."""
        self.begin = min(self.begin, place) if self.lasts else place
        self.end, self.lasts = max(self.end, place), True

    def spoils(self, frame: Any, place: int) -> bool:
        """Whether the frame of the packet stored at `place` is not to be trusted."""
        if frame.is_corrupt:
            self.meet(place)
        elif frame.key_frame and place > self.end and not self.for_good:
            self.lasts = False
        return self.lasts and place >= self.begin


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


def _video_stream(container: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """The first stream of moving pictures, whose far larger frames are errors; a song's cover is none."""
    covers = av.stream.Disposition.attached_pic
    moving = (s for s in container.streams.video if s.codec_context and not s.disposition & covers)
    stream = next(moving, None)
    if stream is not None:
        stream.thread_type = "SLICE"
        slack = 64 << 16  # FFmpeg counts the padding of lines, too
        stream.codec_context.options = {"max_pixels": str(max_pixels + slack)}
    return stream
