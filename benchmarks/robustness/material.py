"""Cases of hard video files, which are generated, and the expected result of each.

    python benchmarks/robustness/material.py FOLDER

The script writes the valid video files into FOLDER, to try decoders with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from burned import HEIGHT, WIDTH, video

MS = Fraction(1, 1000)
SIZE = (WIDTH, HEIGHT)
UNREADABLE, DAMAGED = ("UnreadableVideo",), ("DamagedVideo",)
EITHER = UNREADABLE + DAMAGED


@dataclass(frozen=True)
class Case:
    """A hard input and its expected result.

    Args:
        name: File name.
        kind: Group in the table.
        make: Writes the input to a path; may return what to open instead of that path.
        times_s: When the frames are shown; for a damaged file, the times of the undamaged one.
        indices: The indices that the frames show; for a damaged file, those of the undamaged one.
        whole: Whether all frames must be returned.
        error: Names of the errors that reading may raise; None if it must not raise. If not `whole`,
            DamagedVideo is always allowed.
        size: (width, height) as displayed.
        gray: Whether the video has no colors.
        pixels: Whether the frames are large enough to show an index.
        color: Allowed error of the colors, in levels of 255.
        reading: Options of `open_video`.
    """

    name: str
    kind: str
    make: Callable[[Path], Any]
    times_s: tuple[float, ...] = ()
    indices: tuple[int, ...] = ()
    whole: bool = True
    error: tuple[str, ...] | None = None
    size: tuple[int, int] = SIZE
    gray: bool = False
    pixels: bool = True
    color: float = 80.0
    reading: tuple[tuple[str, Any], ...] = ()


def clip(name: str, kind: str, frames: int = 12, fps: float = 25, **details: Any) -> Case:
    """A case that `burned.video` writes.

    `details` are fields of Case, arguments of `burned.video`, and two more: `shown` is the display size if it
    differs from the stored size, and `make` replaces `burned.video`.
    """
    fields = ("times_s", "indices", "gray", "pixels", "reading", "color", "error", "whole")
    values: dict[str, Any] = {key: details.pop(key) for key in fields if key in details}
    size = details.pop("shown", details.get("size", SIZE))
    indices = values.pop("indices", tuple(range(frames)))
    times_s = values.pop("times_s", steady(len(indices), fps))
    make = details.pop("make", None) or partial(video, frames=frames, fps=fps, **details)
    return Case(name, kind, make, times_s, indices, size=size, **values)


def steady(frames: int, fps: float = 25, start_s: float = 0.0) -> tuple[float, ...]:
    """Return times at a constant rate."""
    return tuple(start_s + i / fps for i in range(frames))


# Time


def timing() -> list[Case]:
    """Cases with unusual clocks, and with frames that are not stored in display order."""
    uneven = (0, 40, 500, 540, 541, 2000, 2040, 9000)
    variable: dict[str, Any] = {"pts": uneven, "tick": MS, "times_s": tuple(t / 1000 for t in uneven)}
    b_frames: dict[str, Any] = {"options": {"bf": "3", "g": "10", "preset": "veryfast"}}
    gop = "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0:open-gop=1"
    avc: dict[str, Any] = {"options": {"preset": "medium", "x264-params": f"{gop}:threads=1"}}
    hevc = {"options": {"preset": "medium", "x265-params": f"{gop}:log-level=none:pools=1:frame-threads=1"}}
    every_40_ms: dict[str, Any] = {"pts": [40 * i for i in range(12)], "tick": MS}
    return [
        clip("variable_rate.mp4", "time", 8, **variable),
        clip("variable_rate.mkv", "time", 8, **variable),
        clip("variable_rate_b_frames.mov", "time", 8, **variable, **b_frames),
        clip("starts_at_100_s.mkv", "time", shift=100_000, **every_40_ms),
        clip("starts_at_100_s.ts", "time", container={"output_ts_offset": "100"}),
        clip("starts_at_100_s.mp4", "time", shift=100_000, **every_40_ms),
        clip("negative_times.mp4", "time", shift=-200, indices=tuple(range(5, 12)), **every_40_ms),
        clip("clock_wraps.ts", "time", 50, container={"output_ts_offset": "95442.9"}),
        joined("clock_jumps_on.ts", 1, 61),
        joined("clock_jumps_back.ts", 61, 1),
        clip("b_frames.mp4", "time", 30, **b_frames),
        clip("b_frames.ts", "time", 30, **b_frames),
        clip("b_frames.avi", "time", 30, **b_frames),
        clip("open_gop.mp4", "time", 120, **avc),
        clip("open_gop.ts", "time", 120, **avc),
        clip("open_gop_hevc.mkv", "time", 120, codec="libx265", **hevc),
        clip("edit_list_trims.mp4", "time", indices=tuple(range(5, 15)), make=trimmed),
        clip("ntsc_rate.mp4", "time", 30, 30000 / 1001),
        clip("equal_times.mkv", "time", 12, 4000, pixels=False, times_s=(0.0, 0.001, 0.002, 0.003)),
        clip("fast_1000.mp4", "time", 40, 1000),
        clip("one_a_minute.mp4", "time", 5, 1 / 60),
        clip("long_3_hours.mp4", "time", 10_800, 1),
        clip("short_1_ms.mp4", "time", 1, 1000),
        clip("two_frames.mp4", "time", 2),
        clip("one_frame.mkv", "time", 1),
    ]


def joined(name: str, first_s: float, second_s: float) -> Case:
    """Two concatenated transport streams whose clocks start at these times.

    The second part must continue where the first ends: a jump of the clock is not a pause. A frame at the
    joint may be missing, because the packet counter jumps there as if packets were lost.
    """

    def make(path: Path) -> None:
        parts = []
        for begin_s, frames in ((first_s, range(12)), (second_s, range(12, 24))):
            part = BytesIO()
            video(part, frames, format="mpegts", container={"output_ts_offset": str(begin_s)})
            parts.append(part.getvalue())
        path.write_bytes(b"".join(parts))

    return Case(name, "time", make, steady(24), tuple(range(24)), whole=False)


def trimmed(path: Path) -> None:
    """Write 20 frames, of which the edit list shows 5 to 14; frame 5 is inside a group of pictures."""
    video(path, 20, options={"g": "10"})
    data = bytearray(path.read_bytes())
    offset = data.index(b"elst") + 12  # duration in ms, then the media's time: 512 ticks a frame
    data[offset : offset + 8] = (400).to_bytes(4, "big") + (5 * 512).to_bytes(4, "big")
    path.write_bytes(data)


# Color


def tagged(space: int, full: bool = False) -> dict[str, Any]:
    """Return options to convert to, and tag, a matrix (1: BT.709, 5: BT.601) and a range."""

    def setup(stream: Any) -> None:
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full else 1

    matrix = {1: "ITU709", 5: "ITU601"}[space]
    return {
        "setup": setup,
        "levels": {"dst_colorspace": matrix, "dst_color_range": "JPEG" if full else "MPEG"},
    }


def colors() -> list[Case]:
    """Cases of bit depths, chroma subsampling, RGB, gray, alpha, ranges and matrices."""

    def of(name: str, codec: str, pix_fmt: str, **details: Any) -> Case:
        return clip(name, "color", codec=codec, pix_fmt=pix_fmt, **details)

    return [
        of("10_bit.mp4", "libx264", "yuv420p10le"),
        of("12_bit.mkv", "libx265", "yuv420p12le"),
        of("10_bit_av1.mkv", "libsvtav1", "yuv420p10le"),
        of("422.mp4", "libx264", "yuv422p"),
        of("422_10_bit.mkv", "libx264", "yuv422p10le"),
        of("444.mp4", "libx264", "yuv444p"),
        of("444_12_bit.mkv", "libx265", "yuv444p12le"),
        of("gray.mp4", "libx264", "gray", gray=True),
        of("gray_16_bit.avi", "ffvhuff", "gray16le", gray=True),
        of("rgb_hevc.mkv", "libx265", "gbrp", color=24),
        of("rgb_ffv1.mkv", "ffv1", "bgr0", color=0),
        of("16_bit_ffv1.mkv", "ffv1", "yuv444p16le", color=8),
        of("rgb_huffyuv.avi", "huffyuv", "rgb24", color=0),
        of("rgb_utvideo.avi", "utvideo", "gbrp", color=0),
        of("410_svq1.mov", "svq1", "yuv410p", size=(192, 128)),
        of("411_ffv1.mkv", "ffv1", "yuv411p"),
        of("alpha_vp9.webm", "libvpx-vp9", "yuva420p"),
        of("alpha_prores_4444.mov", "prores_ks", "yuva444p10le"),
        of("alpha_qtrle.mov", "qtrle", "argb", color=0),
        of("alpha_png.mov", "png", "rgba", color=0),
        of("alpha_ffv1.mkv", "ffv1", "bgra", color=0),
        of("full_range.avi", "mjpeg", "yuvj444p", color=16),
        of("full_range.mp4", "libx264", "yuvj444p", **tagged(5, full=True), color=24),
        of("bt601.mkv", "ffv1", "yuv444p", **tagged(5), color=8),
        of("bt709.mkv", "ffv1", "yuv444p", **tagged(1), color=8),
        of("bt709_full_range.mkv", "ffv1", "yuv444p", **tagged(1, full=True), color=8),
    ]


# Geometry


def turned(degrees: int, mirror: bool = False) -> dict[str, Any]:
    """Return options to store frames that a player must rotate clockwise by `degrees` and then mirror."""

    def stored(rgb: np.ndarray) -> np.ndarray:
        return np.rot90(rgb[:, ::-1] if mirror else rgb, degrees // 90)

    swap = degrees % 180 != 0
    return {
        "stored": stored,
        "setup": lambda stream: stream.set_display_rotation(-degrees, hflip=mirror),
        "size": SIZE[::-1] if swap else SIZE,
        "shown": SIZE,
    }


def aspect(width: int, height: int) -> Callable[[Any], None]:
    """Return a setup function for a pixel aspect."""

    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(width, height)

    return setup


def shapes() -> list[Case]:
    """Cases of rotated, mirrored, non-square, interlaced, odd, tiny, huge and changing frames."""
    mpeg2: dict[str, Any] = {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme"}}
    sideways = turned(90)
    wide = {**sideways, "setup": lambda stream: (sideways["setup"](stream), aspect(4, 3)(stream))}
    return [
        *(clip(f"turned_{d}.mp4", "geometry", **turned(d)) for d in (90, 180, 270)),
        clip("turned_90.mov", "geometry", **turned(90)),
        clip("mirrored.mp4", "geometry", **turned(0, mirror=True)),
        clip("mirrored_turned_90.mp4", "geometry", **turned(90, mirror=True)),
        clip("mirrored_turned_270.mov", "geometry", **turned(270, mirror=True)),
        clip("wide_pixels.mp4", "geometry", setup=aspect(4, 3), shown=(128, 64)),
        clip("wide_pixels.mkv", "geometry", setup=aspect(16, 11), shown=(140, 64)),
        clip("tall_pixels.mp4", "geometry", setup=aspect(8, 9), shown=(96, 72)),
        clip("wide_pixels.ts", "geometry", codec="mpeg2video", setup=aspect(32, 27), shown=(114, 64)),
        clip("nearly_square_pixels.mp4", "geometry", setup=aspect(640, 639)),
        clip("turned_wide_pixels.mp4", "geometry", **{**wide, "shown": (96, 85)}),
        clip("interlaced.mpg", "geometry", **mpeg2),
        clip("interlaced_h264.ts", "geometry", options={"x264-params": "tff=1:threads=1"}),
        clip("interlaced_h264_bff.mkv", "geometry", options={"x264-params": "bff=1:threads=1"}),
        clip("odd_33x17.mp4", "geometry", pix_fmt="yuv444p", size=(33, 17)),
        clip("odd_33x17.webm", "geometry", codec="libvpx-vp9", size=(33, 17)),
        clip("odd_33x17.avi", "geometry", codec="ffv1", size=(33, 17)),
        clip("1x1.mkv", "geometry", codec="ffv1", size=(1, 1), pixels=False),
        clip("1x1.webm", "geometry", codec="libvpx-vp9", size=(1, 1), pixels=False),
        clip("2x2.mp4", "geometry", size=(2, 2), pixels=False),
        clip("ribbon_16384x64.mp4", "geometry", 2, size=(16384, 64)),
        clip("ribbon_64x8192.mkv", "geometry", 2, codec="ffv1", size=(64, 8192)),
        clip("huge_8192x8192.avi", "geometry", 1, codec="mjpeg", pix_fmt="yuvj420p", size=(8192, 8192)),
        clip("size_changes.h264", "geometry", make=partial(resized, format="h264"), indices=tuple(range(24))),
        clip(
            "size_changes.ts",
            "geometry",
            make=partial(resized, format="mpegts"),
            indices=tuple(range(24)),
            whole=False,
        ),
    ]


def resized(path: Path, format: str) -> None:
    """Write twelve frames, then twelve of twice the size; players keep showing the first size."""
    parts = []
    for scale, frames in ((1, range(12)), (2, range(12, 24))):
        part, begins = BytesIO(), {"output_ts_offset": str(frames[0] / 25)}
        options = begins if format == "mpegts" else {}
        video(part, frames, size=(WIDTH * scale, HEIGHT * scale), format=format, container=options)
        parts.append(part.getvalue())
    path.write_bytes(b"".join(parts))


# Containers and codecs


def containers() -> list[Case]:
    """Cases of codecs and containers, raw streams, missing durations and several streams."""

    def of(name: str, codec: str = "libx264", frames: int = 12, **details: Any) -> Case:
        return clip(name, "container", frames, codec=codec, **details)

    cif = {"size": (176, 144), "shown": (192, 144)}  # the standard has 12:11 pixels
    pal: dict[str, Any] = {"size": (720, 576), "shown": (768, 576)}
    fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    return [
        of("av1.mp4", "libsvtav1"),
        of("av1.webm", "libsvtav1"),
        of("av1.ivf", "libsvtav1"),
        of("av1.obu", "libsvtav1"),
        of("vp8.webm", "libvpx"),
        of("vp8.ivf", "libvpx"),
        of("vp8.ogv", "libvpx"),
        of("vp9.webm", "libvpx-vp9", 30),
        of("vp9.mp4", "libvpx-vp9"),
        of("hevc.mp4", "libx265", 30),
        of("hevc.ts", "libx265"),
        of("mpeg1.mpg", "mpeg1video"),
        of("mpeg2.vob", "mpeg2video"),
        of("mpeg2.ts", "mpeg2video", 30, options={"bf": "2"}),
        of("mpeg2.mxf", "mpeg2video"),
        of("mpeg4.mp4", "mpeg4", 30, options={"bf": "2"}),
        of("mpeg4.avi", "mpeg4"),
        of("mpeg4_b_frames.avi", "mpeg4", 30, options={"bf": "2"}),
        of("msmpeg4.avi", "msmpeg4v3", options={"g": "1"}),
        of("wmv2.wmv", "wmv2"),
        of("wmv2.asf", "wmv2"),
        of("h264.flv", options={"bf": "2", "preset": "veryfast"}),
        of("flv1.flv", "flv"),
        of("h263.3gp", "h263", **cif),
        of("rv20.rm", "rv20", size=(176, 144)),
        of("mjpeg.mov", "mjpeg", pix_fmt="yuvj422p"),
        of("mjpeg.mkv", "mjpeg", pix_fmt="yuvj420p"),
        of("prores.mov", "prores_ks", pix_fmt="yuv422p10le"),
        of("cinepak.avi", "cinepak", pix_fmt="rgb24"),
        of("ffv1.nut", "ffv1"),
        of("raw.avi", "rawvideo", pix_fmt="bgr24", color=0),
        of("raw.y4m", "wrapped_avframe"),
        of("dv.dv", "dvvideo", **pal),
        of("raw_stream.h264", options={"bf": "2", "preset": "veryfast", "g": "10"}, frames=30),
        of("raw_stream.hevc", "libx265", 30),
        of("raw_stream.m4v", "mpeg4"),
        of("raw_stream.m2v", "mpeg2video"),
        of("fragments.mp4", frames=30, container=fragments, options={"g": "10"}),
        of("live.mkv", container={"live": "1"}),
        of("live.webm", "libvpx-vp9", container={"live": "1"}),
        of("sound_first.mkv", sound="before"),
        of("sound_first.mp4", sound="before"),
        of("sound_after.ts", sound="after"),
        of("sound_after.webm", "libvpx", sound="after"),
        of("three_pictures.mp4", streams=3),
        of("three_pictures.mkv", streams=3),
        of("three_pictures.ts", streams=3),
    ]


def valid_videos() -> list[Case]:
    """Return every case that is a valid video file."""
    return [*timing(), *colors(), *shapes(), *containers()]


def generate(folder: Path) -> list[tuple[Case, Path]]:
    """Write every valid video file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for case in valid_videos():
        case.make(folder / case.name)
        made.append((case, folder / case.name))
    return made


if __name__ == "__main__":
    av.logging.set_level(None)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    print(f"{len(generate(parser.parse_args().folder))} videos written")
