"""Read video files with PyAV: true times, upright frames, and the readable frames of damaged files.

Opening a file scans its packets to learn when every frame is shown; only the first frame is decoded. Frames
are then found by their times. Frames that depend on damaged data are never returned.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import VideoReformatter
from torch import Tensor

from merv.types import VideoInfo
from merv.video.headers import Pictures
from merv.video.reader import MAX_PIXELS, SKIP, VideoReader, check_size, display_size, unreadable
from merv.video.reports import Report, errors_of, reports

PYAV = int(av.__version__.split(".")[0])
DECODE_ERRORS = (av.error.FFmpegError, OSError)  # raised by FFmpeg or by the file object
TS_DISCONT = av.format.Flags.ts_discont.value
PLAYLISTS = ("hls", "concat", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest")
MIN_SEEK_S = 2.0  # decoding across a shorter gap is as fast as seeking
MILLISECOND_S = 0.001 * (1 + 1e-9)  # the clock of Matroska, FLV and ASF, with float rounding
# Matrices of colors that FFmpeg does not convert to RGB; see ITU-T H.273 for the numbers.
UNSUPPORTED_MATRICES = {
    8: "ycgco",
    10: "bt2020c",
    11: "smpte2085",
    12: "chroma-derived-nc",
    13: "chroma-derived-c",
    14: "ictcp",
    15: "ipt-c2",
    16: "ycgco-re",
    17: "ycgco-ro",
}
MAX_JUMP_S = 10.0  # a clock that jumps further was reset; FFmpeg uses the same limit


class PyAVReader(VideoReader):
    """Reads a seekable binary file; see `open_video`.

    FFmpeg gets a Python file and may use no protocol, so nothing in the file can make it open another file or
    an address. The decoder uses one thread. With slice threads FFmpeg loses the marks of damaged frames, and
    with frame threads a damaged file can deadlock the process at exit.
    """

    _file: BinaryIO
    max_pixels: int

    def __init__(self, file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(file)
        self._name, self.max_pixels = name, max_pixels
        with reports() as log, self._open() as container:
            stream = self._stream(container)
            self._scan = scan = Scan(container, stream)
            errors = self._open_errors + errors_of(log, container.format.name)
            self.damage = scan.damage or self._damage_of_fragments(container, stream)
        if errors and not self.damage:
            self.damage = f"FFmpeg reports {errors[0]!r}, so data is missing or invalid"
        first = scan.first_frame
        if first is None or not scan.durations:
            raise unreadable(name, f"no frame of the {scan.codec} video can be decoded")
        if not first.format.is_rgb:
            check_matrix(name, UNSUPPORTED_MATRICES.get(first.colorspace, ""))
        self._orientation = Orientation.of(first)
        self._pts = scan.frame_pts()
        start, last = self._pts[0], self._pts[-1]
        size = display_size(first.width, first.height, scan.pixel_aspect)
        width, height = reversed(size) if self._orientation.swap else size
        check_size(name, width, height, max_pixels)
        self.info = VideoInfo(
            name,
            duration_s=(last - start + scan.durations[last]) * scan.tick_s,
            times_s=tuple((pts - start) * scan.tick_s for pts in self._pts),
            width=width,
            height=height,
            rotation=self._orientation.degrees,
            codec=scan.codec,
            backend="pyav",
            time_error_s=rounding_s(self._pts, scan.tick_s),
        )

    # Decoding

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Decode in a fast pass, then read what it missed in a plain pass from the start."""
        index_of = {self._pts[index]: index for index in indices}
        converter = VideoReformatter()
        for fast in (False,) if self._scan.by_count else (True, False):
            for pts, frame in self._frames(sorted(index_of), fast):
                with suppress(*DECODE_ERRORS):
                    yield index_of[pts], self._upright(frame, converter)
                    del index_of[pts]
            if not index_of:
                return

    def _frames(self, targets: list[int], fast: bool) -> Iterator[tuple[int, Any]]:
        """Yield (pts, frame) for each of the ascending pts in `targets` that can be decoded.

        A fast pass seeks across long gaps and skips frames that are neither targets nor references of others.
        """
        with self._open() as container, suppress(*DECODE_ERRORS):
            stream = video_stream(container, self.max_pixels)
            # Ogg gives a time to some packets only. FFmpeg counts the others, wrongly if some were lost.
            permanent = self._scan.untimed or container.format.name == "ogg"
            if self._open_errors:  # they concern packets that FFmpeg read ahead, so read those again
                if permanent or self._scan.by_count:
                    return
                container.seek(self._pts[0], stream=stream)
            for keyframe, run in self._runs(targets) if fast else [(None, targets)]:
                if keyframe is not None:
                    container.seek(keyframe, stream=stream)
                damage = Damage(permanent, keyframe)
                yield from self._frames_of_run(container, stream, run, fast, damage)

    def _runs(self, targets: list[int]) -> Iterator[tuple[int | None, list[int]]]:
        """Split `targets` where seeking is faster than decoding.

        Yield (pts of the keyframe to seek to, or None to stay; targets to decode from there).
        """
        seek_to: int | None = None
        run: list[int] = []
        position, keyframes = self._pts[0], self._scan.keyframes
        for pts in targets:
            keyframe = keyframes[bisect_right(keyframes, pts) - 1] if keyframes else position
            if (keyframe - position) * self._scan.tick_s > MIN_SEEK_S:
                if run:
                    yield seek_to, run
                seek_to, run = keyframe, []
            run.append(pts)
            position = pts
        yield seek_to, run

    def _frames_of_run(
        self, container: Any, stream: Any, targets: list[int], fast: bool, damage: Damage
    ) -> Iterator[tuple[int, Any]]:
        """Yield (pts, frame) for `targets`, decoding onward from the current position."""
        remaining, num_shown = set(targets), 0
        packet_numbers: dict[int | None, int] = {}  # pts → number of the packet in storage order
        packets = pairwise(_packets_and_logs(container, stream))
        for number, ((packet, log), (_, next_log)) in enumerate(packets):
            damage.check_packet(packet, number, log, next_log)
            if fast:
                needed = not packet.size or packet.pts in remaining
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            if self._scan.by_count and packet.size:
                packet.pts = number  # identifies the packet that a decoded frame comes from
            packet_numbers[packet.pts] = number
            with reports() as log:
                frames = decoded(packet)
            if errors_of(log) and not damage.leads(packet):
                damage.mark(number)
            for frame in frames:
                origin, was_damaged = packet_numbers.get(frame.pts, number), damage.active
                intact = not damage.affects(frame, origin)
                intact = intact and frame.width * frame.height <= self.max_pixels
                if was_damaged and not damage.active:  # also count the frames lost to the damage
                    num_shown = origin
                pts = self._pts[min(num_shown, len(self._pts) - 1)] if self._scan.by_count else frame.pts
                num_shown += 1
                if intact and pts in remaining:
                    remaining.remove(pts)
                    yield pts, frame
                if pts is not None and pts >= targets[-1]:
                    return

    def _upright(self, frame: Any, converter: VideoReformatter) -> Tensor:
        """Return an upright uint8 [3, H, W].

        The converter uses one thread. If each frame had its own, with threads that a fork does not copy, a
        forked process could hang when it frees the frames of its parent.
        """
        # Each JPEG has its own EXIF data, which differ within a timelapse if the camera was turned.
        orientation = Orientation.of(frame) if self.info.codec == "mjpeg" else self._orientation
        one_thread = {"threads": 1} if PYAV >= 17 else {}  # earlier versions always use one
        rgb = converter.reformat(frame, format="rgb24", **one_thread).to_ndarray()  # [H, W, 3]
        return orientation(torch.from_numpy(rgb).permute(2, 0, 1))

    # Opening

    def _open(self) -> Any:
        if not self._file.seek(0, 2):
            raise unreadable(self._name, "the file is empty")
        self._file.seek(0)
        # Before PyAV 18, `options` crashes for files that announce no streams, such as mpg.
        options: dict[str, Any] = {"container_options": {"protocol_whitelist": "none"}}
        if PYAV < 19:  # later versions never raise
            options["metadata_errors"] = "replace"
        try:
            with reports() as log:
                container = av.open(self._file, **options)
        except DECODE_ERRORS as error:
            reason = f"it is not a video or image, or too damaged ({type(error).__name__})"
            raise unreadable(self._name, reason) from error
        # MP4 has a table of all frames; errors in the rest of its header do no harm.
        format_name = container.format.name
        self._open_errors = [] if format_name.startswith("mov") else errors_of(log, format_name)
        return closing(container)

    def _stream(self, container: Any) -> Any:
        """Return the video stream; raise UnreadableVideo if there is none that can be read."""
        kind = container.format.name
        if kind in PLAYLISTS:
            reason = f"it is a {kind} playlist, whose files are not opened"
            raise unreadable(self._name, reason, "Pass the video itself.")
        if is_tiled(container):
            raise unreadable(
                self._name,
                "the picture is stored as tiles, which FFmpeg does not join",
                "Save it as JPEG or PNG, or open it with pillow-heif and pass the PIL image.",
            )
        stream = video_stream(container, self.max_pixels)
        if stream is None:
            raise unreadable(self._name, f"the file contains no video that can be decoded ({kind})")
        context = stream.codec_context
        check_size(self._name, context.width, context.height, self.max_pixels)
        return stream

    def _damage_of_fragments(self, container: Any, stream: Any) -> str:
        """Return what is wrong with a fragmented MP4, which does not say how many frames there should be."""
        is_fragmented = container.format.name.startswith("mov") and not stream.frames
        if is_fragmented and ends_inside_fragment(self._file):
            return f"the file is cut off and contains only {len(self._scan.durations)} frames"
        return ""


def video_stream(container: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """Return the main video stream, or None. Its decoder fails for frames well above `max_pixels`.

    Streams marked as default are preferred to others, such as thumbnails; videos are preferred to stills,
    which accompany the animation in AVIF and HEIC files. Cover art and the tiles of a picture are skipped.
    """
    skipped = av.stream.Disposition.attached_pic | av.stream.Disposition.dependent
    videos = [s for s in container.streams.video if s.codec_context and not s.disposition & skipped]
    default = av.stream.Disposition.default
    videos.sort(key=lambda s: (s.frames == 1, not s.disposition & default))  # the first of equals stays first
    stream = next(iter(videos), None)
    if stream is not None:
        stream.codec_context.thread_count = 1
        padding = 64 << 16  # FFmpeg counts the padding of rows, too
        stream.codec_context.options = {"max_pixels": str(max_pixels + padding)}
    return stream


def is_tiled(container: Any) -> bool:
    """Return whether the picture of an AVIF or HEIC file consists of tiles, which FFmpeg does not join."""
    flags = [stream.disposition for stream in container.streams.video]
    dependent, default = av.stream.Disposition.dependent, av.stream.Disposition.default
    return any(flag & dependent for flag in flags) and not any(flag & default for flag in flags)


def _packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Yield the packets of these streams, ending with empty ones, which flush the decoder.

    An error that ends the file early is logged like those after which FFmpeg goes on.
    """
    try:
        yield from container.demux(*streams)
    except DECODE_ERRORS as error:
        av.logging.log(av.logging.ERROR, container.format.name, str(error))


def _packets_and_logs(container: Any, stream: Any) -> Iterator[tuple[Any, list[Report]]]:
    """Yield (packet, what FFmpeg logs when it reads it); at the end (None, what it logs there)."""
    packets = _packets(container, stream)
    while True:
        with reports() as log:
            packet = next(packets, None)
        yield packet, log
        if packet is None:
            return


def decoded(packet: Any) -> list[Any]:
    """Decode a packet. An error is logged like those that FFmpeg conceals."""
    if not packet.size and packet.dts is not None:  # it repeats the frame before, and would be an error
        return []
    context = packet.stream.codec_context
    try:
        try:
            return packet.decode()
        except av.error.BlockingIOError:  # VP9 accepts no more packets after eight that failed
            context.flush_buffers()
            return packet.decode()
    except DECODE_ERRORS as error:
        av.logging.log(av.logging.ERROR, context.name, str(error))
        return []


def ends_inside_fragment(file: BinaryIO) -> bool:
    """Return whether an MP4 file ends in a fragment: in its table (moof), its frame data (mdat) or between.

    A file is a sequence of boxes. A box starts with its length in 4 bytes and its kind in 4 bytes. Length 1
    means that 8 bytes of length follow the kind. Length 0 means that the box extends to the end of the file.
    """
    offset, kind, size = 0, b"", file.seek(0, 2)
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        kind, length = header[4:8], int.from_bytes(header[:4], "big")
        length = int.from_bytes(header[8:], "big") if length == 1 else length or size - offset
        if length < 8 or offset + length > size:
            return kind in (b"moof", b"mdat")
        offset += length
    return kind == b"moof"  # a table without its frame data


class Scan:
    """The result of one pass over the packets of a stream. Times (pts) are in ticks of the stream's clock.

    Attributes:
        first_frame: The first frame that can be decoded.
        durations: pts of each frame → its duration.
        keyframes: Ascending pts of the keyframes.
        untimed: Whether packets do not say when they are shown.
        by_count: Whether pts do not identify frames: the n-th decoded frame is the n-th one shown.
        damage: What is wrong with the file as a whole.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.codec = stream.codec_context.name
        self.tick_s, self.pixel_aspect = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
        self.first_frame: Any = None
        self.untimed = container.format.name == "avi"  # its times are in storage order
        self.damage = ""
        rate = stream.average_rate or stream.guessed_rate or 25
        step = max(round(1 / (rate * stream.time_base)), 1)
        # If the header has only the duration of the whole file, any stream may be the longest one.
        file_s = 0.0 if stream.duration else (container.duration or 0) / av.time_base
        packets = _packets(container, *(container.streams if file_s else [stream]))
        has_resets = container.format.flags & TS_DISCONT
        clock = Clock(step, round(MAX_JUMP_S / self.tick_s)) if has_resets else None
        pictures = Pictures(stream)
        count, end_s, last_is_corrupt, next_dts = 0, 0.0, False, 0
        shown: list[list] = []  # of each packet that shows a frame: pts, dts, duration, two flags
        failed: set[int | None] = set()  # times of packets that cannot be decoded, until one can
        for packet in packets:
            if packet.size and packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:  # `packet.stream_index` is 0 for all empty packets
                continue
            if self.first_frame is None:
                with reports() as log:
                    frames = decoded(packet)
                self.first_frame = next((frame for frame in frames if not frame.is_corrupt), None)
                if errors_of(log) or any(frame.is_corrupt for frame in frames):
                    failed.update({packet.pts, packet.dts})
            if not packet.size:
                continue
            count += 1
            last_is_corrupt = packet.is_corrupt
            if not pictures.shows_frame(packet):
                if shown:  # the frame before stays
                    shown[-1][2] += packet.duration or 0
                continue
            offset = clock.offset_of(packet) if clock else 0
            self.untimed |= packet.pts is None
            pts = None if packet.pts is None else packet.pts + offset
            dts = next_dts if packet.dts is None else packet.dts + offset
            next_dts = dts + step
            shown.append([pts, dts, packet.duration or step, packet.is_keyframe, packet.is_discard])
        stored = [(dts if self.untimed else pts, *properties) for pts, dts, *properties in shown]
        self.durations = {pts: duration for pts, duration, _, is_discard in stored if not is_discard}
        self.keyframes = sorted(pts for pts, _, is_keyframe, _ in stored if is_keyframe)
        self.by_count = self.untimed or bool(clock and clock.was_reset)
        if self.first_frame and not failed.isdisjoint(self.keyframes_before(self.first_frame.pts, stream)):
            self.damage = "its first frames cannot be decoded"
        is_short = last_is_corrupt or file_s - end_s > 0.1 + step * self.tick_s
        num_frames = frames_in_header(container, stream)
        if is_short or (count < num_frames and self.ends_early(stream, num_frames, step)):
            of_total = f" of its {num_frames}" if num_frames > count else ""
            self.damage = f"the file is cut off and contains only {count}{of_total} frames"

    def ends_early(self, stream: Any, num_frames: int, step: int) -> bool:
        """Return whether the last frame ends before the time that the header announces."""
        # In AVI, FFmpeg takes the duration from the packets if some are lost.
        header_ticks = max(stream.duration or 0, num_frames * step if self.untimed else 0)
        rounding = 0 if self.untimed else step
        last = max(self.durations, default=0)
        end = last + self.durations.get(last, 0)
        return end + rounding < (stream.start_time or 0) + header_ticks

    def keyframes_before(self, pts: int | None, stream: Any) -> set[int]:
        """Return the times of the keyframes before `pts`, also those that only the file's index marks.

        A file may begin with frames that refer to a keyframe that was never in it. That is no damage.
        """
        entries = getattr(stream, "index_entries", ())  # since PyAV 16
        keyframes = {entry.timestamp for entry in entries if entry.is_keyframe}.union(self.keyframes)
        return {time for time in keyframes if pts is not None and time < pts}

    def frame_pts(self) -> list[int]:
        """Return the ascending pts of all frames from the first that can be decoded."""
        pts = sorted(self.durations)
        return pts if self.by_count else [p for p in pts if p >= self.first_frame.pts]


def rounding_s(pts: Sequence[int], tick_s: float) -> float:
    """Return how far the times of frames, from the first one on, may be off because they were rounded.

    If every distance of frames is a multiple of the shortest one, the rate is constant and times are exact.

    >>> [rounding_s(pts, 0.001) for pts in ([0, 40, 80, 160], [0, 33, 67, 100], [7, 40, 74])]
    [0.0, 0.0005, 0.001]
    """
    distances = [after - before for before, after in pairwise(pts)]
    common = math.gcd(*distances)
    if common == min(distances, default=0):
        return 0.0
    # Copies of a file that counts milliseconds keep its times, whatever their own clock is.
    error_s = (common if common * tick_s <= MILLISECOND_S else 1) * tick_s / 2
    return error_s if pts[0] == 0 else 2 * error_s  # the time of the first frame may be rounded, too


def check_matrix(name: str, matrix: str | None) -> None:
    """Raise UnreadableVideo for colors whose matrix, by FFmpeg's name, is not converted to RGB."""
    if matrix in UNSUPPORTED_MATRICES.values():
        raise unreadable(
            name,
            f"its colors have the matrix {matrix}, which cannot be converted to RGB",
            "Convert the video to BT.709. " + SKIP,
        )


def frames_in_header(container: Any, stream: Any) -> int:
    """Return how many packets the header announces; 0 if it does not say.

    MP4 counts all stored frames. FFmpeg's index of it lacks those that an edit list leaves out.
    """
    if container.format.name.startswith("mov") and hasattr(stream, "index_entries"):  # since PyAV 16
        return min(stream.frames, len(stream.index_entries))
    return stream.frames


@dataclass
class Clock:
    """Makes the times of a broadcast continuous if its clock is reset.

    Attributes:
        step: Duration of a frame, in ticks.
        max_jump: A clock that jumps further than this number of ticks, or backward, was reset.
        last_dts: Decoding time of the last packet, in ticks.
        offset: Ticks to add to the current times.
        was_reset: Whether the clock was reset at least once.
    """

    step: int
    max_jump: int
    last_dts: int | None = None
    offset: int = 0
    was_reset: bool = False

    def offset_of(self, packet: Any) -> int:
        """Return what to add to the times of a packet so that it follows the packet before."""
        if packet.dts is not None:
            if self.last_dts is not None and not 0 <= packet.dts - self.last_dts <= self.max_jump:
                self.offset += self.last_dts + self.step - packet.dts
                self.was_reset = True
            self.last_dts = packet.dts
        return self.offset


@dataclass
class Damage:
    """Tracks which frames depend on damage: those stored after it, until a later keyframe is decoded.

    Attributes:
        permanent: Trust no later frame, because it is unknown how many frames were lost.
        keyframe: pts of the keyframe at which decoding starts, or None for the start of the file.
    """

    permanent: bool
    keyframe: int | None = None
    first: int = -1  # numbers of the first and the last damaged packet
    last: int = -1
    active: bool = False
    after_corrupt: bool = False
    keyframes: set[int] = field(default_factory=set)  # numbers of packets that the file calls keyframes

    def check_packet(self, packet: Any, number: int, log: list[Report], next_log: list[Report]) -> None:
        """Mark a packet that is torn, follows lost data or starts with zeros.

        Packets may be missing after a corrupt one, unless a keyframe follows. If the demuxer
        reports an error while it reads a packet, packets before it may be missing. The packet before it may
        also be incomplete, except in formats with a table of packet sizes, such as MP4.
        H.264 and HEVC packets that start with zeros come from a hole in the file, which FFmpeg ignores.
        """
        if packet.is_keyframe:
            self.keyframes.add(number)
        context = packet.stream.codec_context
        has_hole = packet.size and context.name in ("h264", "hevc") and not any(memoryview(packet)[:4])
        container = packet.stream.container.format.name
        follows_loss = self.after_corrupt or bool(errors_of(log, container))
        if (
            has_hole
            or (follows_loss and not packet.is_keyframe)
            or (errors_of(next_log, container) and not container.startswith("mov"))
            or (errors_of(log, context.name, context.codec.name) and not self.leads(packet))
        ):
            self.mark(number)
        self.after_corrupt = packet.is_corrupt

    def leads(self, packet: Any) -> bool:
        """Return whether a packet is stored after the first keyframe but shown before it.

        It may refer to frames before that keyframe, so it may not be decodable. No later frame refers to it.
        """
        return self.keyframe is not None and packet.pts is not None and packet.pts < self.keyframe

    def mark(self, number: int) -> None:
        """Note that packet `number` cannot be decoded, or that its frame is corrupt."""
        self.first = min(self.first, number) if self.active else number
        self.last, self.active = max(self.last, number), True

    def affects(self, frame: Any, number: int) -> bool:
        """Return whether the frame of packet `number` cannot be trusted.

        Damaged data may call any frame a keyframe, so the file must call it one, too.
        """
        if frame.is_corrupt and not self.leads(frame):
            self.mark(number)
        elif frame.key_frame and number in self.keyframes and number > self.last and not self.permanent:
            self.active = False
        return self.active and number >= self.first


def side_data(frame: Any) -> Any:
    """Return the side data of a frame, except kinds that PyAV has no name for: PyAV 18 raises for EXIF.

    `frame.side_data` would tie frame and side data in a cycle, which keeps the frame in memory.
    """
    try:
        return SideDataContainer(frame)  # type: ignore[call-arg]
    except ValueError:
        unnamed = sorted(set(range(64)) - {kind.value for kind in Type})
        graph = av.filter.Graph()
        filters = [graph.add_buffer(None, frame.width, frame.height, frame.format, time_base=frame.time_base)]
        filters += [graph.add("sidedata", f"mode=delete:type={kind}") for kind in unnamed]
        filters.append(graph.add("buffersink"))
        graph.link_nodes(*filters).configure()
        graph.push(frame)
        return SideDataContainer(graph.pull())  # type: ignore[call-arg]


@dataclass(frozen=True)
class Orientation:
    """Makes a coded frame upright: swaps rows and columns, then flips either."""

    swap: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """Read the display matrix of a frame, to the nearest right angle.

        The matrix maps column x and row y to (a·x + c·y, b·x + d·y); see FFmpeg's libavutil/display.h.
        """
        matrix = side_data(frame).get(Type.DISPLAYMATRIX)
        if matrix is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        return cls(True, b < 0, c < 0) if abs(b) > abs(a) else cls(False, d < 0, a < 0)

    @property
    def degrees(self) -> int:
        """Clockwise rotation; for a mirrored frame, the rotation of its left-to-right direction."""
        if self.swap:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_columns else 0

    def __call__(self, frame: Tensor) -> Tensor:
        """Turn a coded frame [3, H, W] upright."""
        if self.swap:
            frame = frame.transpose(1, 2)
        return frame.flip([axis for axis, flip in ((1, self.flip_rows), (2, self.flip_columns)) if flip])
