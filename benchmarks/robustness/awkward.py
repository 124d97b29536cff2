"""Cases of awkward videos: edited, cut, copied from another container, or patched."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from io import BytesIO
from itertools import zip_longest
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import av
from burned import HEIGHT, WIDTH, mux, picture, video
from material import SIZE, Case, aspect, clip, turned
from PIL import Image

LONG = 200  # frames, so that reading them in any order seeks
FRAME = Fraction(1, 25)
B_FRAMES = {"bf": "2", "preset": "veryfast"}
Packet = tuple[bytes, int, int, bool]  # content; pts and dts in frames; whether it is a keyframe


def awkward() -> list[Case]:
    """Return all cases."""
    return [*edited(), *clocks(), *keyframes(), *copies(), *shapes(), *streams()]


def patched(path: Path, change: Callable[[bytearray], Any], make: Any = video, **details: Any) -> None:
    """Write a file, then change its bytes; `change` may return new ones."""
    make(path, **details)
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


def renamed(old: bytes, new: bytes) -> Callable[[bytearray], bytes]:
    """Return a function that makes a box of an MP4 unknown."""
    return lambda data: bytes(data.replace(old, new))


def copied(
    path: Path,
    choose: Callable[[list[Packet]], Sequence[Packet]] = list,
    *,
    source: str = "mp4",
    by_filter: str | None = None,
    **details: Any,
) -> None:
    """Encode into a container `source`, then copy some of the packets without decoding."""
    encoded = BytesIO()
    video(encoded, format=source, **details)
    encoded.seek(0)
    with av.open(encoded) as original, av.open(str(path), "w") as copy:
        template = original.streams.video[0]
        tick = template.time_base / FRAME
        packets = [
            (bytes(p), round(p.pts * tick), round((p.pts if p.dts is None else p.dts) * tick), p.is_keyframe)
            for p in original.demux(template)
            if p.size
        ]
        stream = copy.add_stream_from_template(template, opaque=True)
        stream.time_base = FRAME
        change = av.BitStreamFilterContext(by_filter, template, stream) if by_filter else None
        for content, pts, dts, is_keyframe in choose(packets):
            packet = av.Packet(content)
            packet.pts, packet.dts, packet.duration, packet.time_base = pts, dts, 1, FRAME
            packet.is_keyframe = is_keyframe
            for changed in change.filter(packet) if change else [packet]:
                changed.stream = stream
                copy.mux(changed)


# Edit lists and clocks


def edited() -> list[Case]:
    """Cases of edit lists with several parts."""

    def of(name: str, *parts: range, frames: int = 60) -> Case:
        options = {"g": "10", "bf": "0"}
        change = partial(set_edits, parts=parts)
        shown = tuple(index for part in parts for index in part)
        return clip(
            name,
            "edit list",
            indices=shown,
            make=partial(patched, change=change, frames=frames, options=options),
        )

    return [
        of("two_parts.mp4", range(30, 45), range(5, 15)),
        of("inside_groups.mp4", range(13, 27), range(31, 36), range(48, 59)),
        of("three_parts_backward.mp4", range(205, 255), range(127, 177), range(3, 93), frames=300),
    ]


def set_edits(data: bytearray, parts: Sequence[range]) -> None:
    """Replace the edit list of an MP4, whose table is at its end, so that no other offset changes."""
    entries = [struct.pack(">IiI", len(part) * 40, part[0] * 512, 1 << 16) for part in parts]
    replace_box(data, b"elst", b"".join(entries), len(entries))


def replace_box(data: bytearray, kind: bytes, entries: bytes, count: int) -> None:
    """Replace the entries of an edit list and correct the lengths of the boxes around it."""
    begin = data.index(kind) - 4
    end = begin + int.from_bytes(data[begin : begin + 4], "big")
    box = struct.pack(">I4sII", 16 + len(entries), kind, 0, count) + entries
    for outer in (b"moov", b"trak", b"edts"):
        at = data.index(outer) - 4
        length = int.from_bytes(data[at : at + 4], "big") + len(box) - (end - begin)
        data[at : at + 4] = length.to_bytes(4, "big")
    data[begin:end] = box


def clocks() -> list[Case]:
    """Cases of fine clocks, long pauses, dropped frames, pictures without times and clocks that jump."""
    kind, pause, dropped = "clock", [0, 1, 90_000, 90_001], [0, 1, 2, 5, 6, 12]
    at_pause: dict[str, Any] = {"pts": pause, "times_s": tuple(n / 25 for n in pause)}
    at_dropped: dict[str, Any] = {"pts": dropped, "times_s": tuple(n / 25 for n in dropped)}
    without = {"change": without_half_of_its_times, "frames": 60}
    jump = [{"options": B_FRAMES, "container": {"output_ts_offset": begin}} for begin in ("1", "61")]
    return [
        clip("1_GHz.mp4", kind, container={"video_track_timescale": "1000000000"}),
        clip("1_MHz_b_frames.mov", kind, container={"video_track_timescale": "1000000"}, options=B_FRAMES),
        clip(
            "decoded_after_shown.mp4",
            kind,
            30,
            container={"movflags": "negative_cts_offsets"},
            options=B_FRAMES,
        ),
        clip("pause_of_an_hour.mp4", kind, 4, **at_pause),
        clip("pause_of_an_hour.mkv", kind, 4, **at_pause),
        clip("dropped.avi", kind, 6, options={"bf": "0"}, **at_dropped),
        clip("dropped_mpeg4.avi", kind, 6, codec="mpeg4", **at_dropped),
        clip("half_without_times.ts", kind, 60, make=partial(patched, options=B_FRAMES, **without)),
        clip(
            "half_without_times_mpeg2.ts",
            kind,
            60,
            make=partial(patched, codec="mpeg2video", options={"bf": "2"}, **without),
        ),
        clip("jumps_b_frames.ts", kind, 24, whole=False, make=partial(joined, jump, "mpegts")),
    ]


def without_half_of_its_times(data: bytearray) -> None:
    """Remove the times of every second picture of a transport stream."""
    pictures = 0
    for begin in range(0, len(data), 188):
        header = begin + 4 + (1 + data[begin + 4] if data[begin + 3] & 0x20 else 0)
        if data[begin + 1] & 0x40 and data[header : header + 4] == b"\0\0\1\xe0":
            pictures += 1
            if pictures % 2 == 0:
                size = data[header + 8]
                data[header + 7] &= 0x3F
                data[header + 9 : header + 9 + size] = b"\xff" * size


# Keyframes


def keyframes() -> list[Case]:
    """Cases without keyframes at the start, with false ones, and with one that is spread over many frames."""
    kind = "keyframe"
    sparse: dict[str, Any] = {"frames": LONG, "options": {"g": "70"}}
    gop = "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0:open-gop=1:threads=1"
    open_gop: dict[str, Any] = {"options": {"preset": "medium", "x264-params": gop}, "frames": 40}
    spread = {"x264-params": "intra-refresh=1:keyint=30:scenecut=0:bframes=0:threads=1", "preset": "medium"}
    codecs = ("libx264", "libx265", "mpeg4", "libvpx-vp9", "libsvtav1")
    late = ("libx264", "mpeg4", "mpeg2video", "libvpx", "libvpx-vp9", "libsvtav1")
    return [
        clip("only_the_first.mp4", kind, LONG, options={"g": "9999"}),
        *(
            clip(
                f"all_marked_{codec}.mp4",  # without a table of keyframes, every frame counts as one
                kind,
                LONG,
                make=partial(patched, change=renamed(b"stss", b"free"), codec=codec, **sparse),
            )
            for codec in codecs
        ),
        *(clip(f"intra_refresh.{suffix}", kind, LONG, options=spread) for suffix in ("mp4", "mkv", "ts")),
        *(
            clip(
                f"first_is_missing_{codec}.mkv",
                kind,
                indices=tuple(range(12, 36)),
                whole=False,
                make=partial(
                    copied,
                    choose=without_first,
                    source="matroska",
                    frames=36,
                    codec=codec,
                    options={"g": "12"},
                ),
            )
            for codec in late
        ),
        *(
            clip(
                f"cut_at_open_gop.{suffix}",
                kind,
                indices=tuple(range(16, 40)),
                whole=False,
                make=partial(copied, choose=from_third_group, source=source, **open_gop),
            )
            for suffix, source in (("mp4", "mp4"), ("mkv", "mpegts"), ("ts", "mpegts"))
        ),
    ]


def without_first(packets: list[Packet]) -> list[Packet]:
    """Leave out the first keyframe."""
    return packets[1:]


def from_third_group(packets: list[Packet]) -> list[Packet]:
    """Cut at a keyframe; the frames stored after it but shown before it cannot be decoded."""
    marked = [number for number, packet in enumerate(packets) if packet[3]]
    return packets[marked[2] if len(marked) > 2 else 17 :]


# Copies between containers


def copies() -> list[Case]:
    """Cases of packets in containers that usually hold another form of them."""
    kind = "copy"
    of_ts: dict[str, Any] = {"source": "mpegts", "frames": 30, "options": B_FRAMES}
    hidden = tuple(index for index in range(12) if index != 5)
    layers = "ts_number_layers=2:ts_target_bitrate=500,1000:ts_rate_decimator=2,1:ts_periodicity=2"
    lagged = {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "25"}
    each = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
    return [
        clip("ts_to_avi.avi", kind, 30, make=partial(copied, **of_ts)),
        clip("ts_to_mp4.mp4", kind, 30, make=partial(copied, **of_ts)),
        clip(
            "mp4_to_avi.avi",
            kind,
            30,
            make=partial(copied, by_filter="h264_mp4toannexb", frames=30, options={"bf": "0"}),
        ),
        *(
            clip(
                f"hidden_reference.{suffix}",
                kind,
                indices=hidden,
                times_s=tuple(index / 25 for index in hidden),
                make=partial(copied, choose=hide_fifth, source="webm", frames=12, codec="libvpx"),
            )
            for suffix in ("webm", "ivf")
        ),
        clip("hidden_references_vp9.webm", kind, 60, codec="libvpx-vp9", options=lagged),
        clip("temporal_layers.webm", kind, 60, codec="libvpx", options={"ts-parameters": layers}),
        clip("av1_fragments.mp4", kind, 40, codec="libsvtav1", container=each),
    ]


def hide_fifth(packets: list[Packet]) -> list[Packet]:
    """Clear the bit of VP8 that says that a frame is shown."""
    content, *times = packets[5]
    packets[5] = (bytes([content[0] & ~16]) + content[1:], *times)  # type: ignore[arg-type]
    return packets


# Shapes


def shapes() -> list[Case]:
    """Cases of odd angles, pixel aspects, fields, and properties that change within a stream."""
    kind, hevc = "shape", {"codec": "libx265"}
    sideways = {"stored": turned(90)["stored"], "size": SIZE[::-1]}
    deep = {"pix_fmt": "yuv420p10le"}
    parts = [{}, {"pix_fmt": "yuv444p"}]
    return [
        clip("turned_40.mp4", kind, make=partial(patched, change=partial(turn, degrees=40), frames=12)),
        clip(
            "turned_100.mp4",
            kind,
            make=partial(patched, change=partial(turn, degrees=100), frames=12, **sideways),
        ),
        clip(
            "aspect_in_stream_only.mp4",
            kind,
            shown=(128, 64),
            make=partial(patched, change=renamed(b"pasp", b"free"), frames=12, setup=aspect(4, 3)),
        ),
        clip("aspect_changes.h264", kind, 24, make=partial(joined, [{}, {"setup": aspect(4, 3)}], "h264")),
        clip("chroma_changes.h264", kind, 24, make=partial(joined, parts, "h264")),
        clip("depth_changes.h264", kind, 24, make=partial(joined, [{}, deep], "h264")),
        clip("depth_changes.hevc", kind, 24, make=partial(joined, [hevc, hevc | deep], "hevc")),
        clip("gray_12_bit.mkv", kind, codec="libx265", pix_fmt="gray12le", gray=True),
        clip("fields_as_jpegs.avi", kind, make=fields_as_jpegs),
    ]


def turn(data: bytearray, degrees: float) -> None:
    """Set the display matrix of the first track of an MP4 to any angle."""
    c, s = (round(function(radians(degrees)) * 65536) for function in (cos, sin))
    at = data.index(b"tkhd") + 44
    data[at : at + 20] = struct.pack(">5i", c, s, 0, -s, c)


def joined(parts: Sequence[dict[str, Any]], format: str, path: Path) -> None:
    """Concatenate streams of twelve frames."""
    with path.open("wb") as file:
        for number, details in enumerate(parts):
            part = BytesIO()
            video(part, range(12 * number, 12 * number + 12), format=format, **details)
            file.write(part.getvalue())


def fields_as_jpegs(path: Path) -> None:
    """Write an interlaced MJPEG as capture cards did: two JPEGs of half the height in each packet."""

    def field(index: int, first: int) -> bytes:
        target = BytesIO()
        Image.fromarray(picture(index)[first::2]).save(target, "JPEG", quality=95)
        return target.getvalue()

    def choose(packets: list[Packet]) -> list[Packet]:
        return [(field(n, 0) + field(n, 1), *packet[1:]) for n, packet in enumerate(packets)]

    copied(path, choose, source="avi", frames=12, codec="mjpeg", pix_fmt="yuvj420p")


# Several streams


def streams() -> list[Case]:
    """Cases of other streams before the video, tracks without frames, and several programs."""
    kind = "streams"
    return [
        clip("empty_track_first.mp4", kind, make=partial(after_another, other="empty")),
        clip("data_first.ts", kind, make=partial(after_another, other="data")),
        clip("cover_first.mkv", kind, make=partial(after_another, other="cover")),
        clip("two_programs.ts", kind, make=two_programs),
    ]


def after_another(path: Path, other: str) -> None:
    """Write a video after a track without frames, a data stream or a cover."""
    with av.open(str(path), "w") as file:
        if other == "cover":
            cover = BytesIO()
            Image.new("RGB", (300, 200), "red").save(cover, "JPEG")
            file.add_attachment("cover.jpg", "image/jpeg", cover.getvalue())
        data = file.add_data_stream("bin_data") if other == "data" else None
        videos = [file.add_stream("libx264", rate=25) for _ in range(1 + (other == "empty"))]
        for stream in videos:
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(12):
            if data:
                packet = av.Packet(b"data")
                packet.pts = packet.dts = index
                packet.time_base, packet.stream = FRAME, data
                file.mux(packet)
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts = index
            mux(file, videos[-1].encode(frame), 0)
        mux(file, videos[-1].encode(), 0)


def two_programs(path: Path) -> None:
    """Interleave two transport streams under a common table of programs."""
    tables, pids, streams = (0x1000, 0x1100), (0x100, 0x200), []
    for number, (table, pid) in enumerate(zip(tables, pids, strict=True)):
        part = BytesIO()
        options = {"mpegts_pmt_start_pid": str(table), "mpegts_start_pid": str(pid)}
        options["mpegts_service_id"] = str(number + 1)
        video(part, range(100 * number, 100 * number + 12), format="mpegts", container=options)
        data = part.getvalue()
        streams.append([data[at : at + 188] for at in range(0, len(data), 188)])
    section = bytes.fromhex("00b011 0001c10000")
    section += b"".join(struct.pack(">2H", n + 1, 0xE000 | table) for n, table in enumerate(tables))
    section += checksum(section).to_bytes(4, "big")
    packets = [(bytes.fromhex("4740001000") + section).ljust(188, b"\xff")]
    for packet in (packet for pair in zip_longest(*streams) for packet in pair if packet):
        if (packet[1] & 0x1F) << 8 | packet[2] > 0x1F:  # not a table of one stream
            packets.append(packet)
    path.write_bytes(b"".join(packets))


def checksum(data: bytes) -> int:
    """Return the CRC-32 of MPEG."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc
