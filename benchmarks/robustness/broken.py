"""Cases of truncated and damaged files, files that are not videos, and files that refer to other files."""

from __future__ import annotations

import io
import os
import socket
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from burned import HEIGHT, WIDTH, add_sound, mux_sound, picture, video
from material import DAMAGED, EITHER, UNREADABLE, Case, steady
from PIL import Image

TOUCHED: list[str] = []  # what was opened because a file referred to it


# Truncated and damaged files


def altered(
    name: str, alter: Callable[[bytes], bytes], error: tuple[str, ...] | None, **details: Any
) -> Case:
    """A file of 50 frames in five groups of pictures (GOPs), damaged by `alter`."""

    def make(path: Path) -> None:
        if path.suffix in (".gif", ".webp"):
            images = [Image.fromarray(picture(i)) for i in range(50)]
            images[0].save(path, save_all=True, append_images=images[1:], duration=40, lossless=True)
        else:
            video(path, 50, **{"options": {"g": "10"}, **details})
        path.write_bytes(alter(path.read_bytes()))

    return Case(name, "damage", make, steady(50), tuple(range(50)), whole=False, error=error)


def silent(*arguments: Any, **details: Any) -> Case:
    """Like `altered`, for a codec whose decoder conceals some damage silently."""
    return replace(altered(*arguments, **details), pixels=False)


def cut(fraction: float) -> Callable[[bytes], bytes]:
    """Keep only the start of the file, like an interrupted download."""
    return lambda data: data[: int(fraction * len(data))]


def flipped(bits: int) -> Callable[[bytes], bytes]:
    """Flip single bits across the second half of the file."""

    def flip(data: bytes) -> bytes:
        noise, copy = np.random.default_rng(0), bytearray(data)
        for offset in noise.integers(len(data) // 2, len(data), bits):
            copy[offset] ^= 1 << int(noise.integers(8))
        return bytes(copy)

    return flip


def hole(data: bytes) -> bytes:
    """Replace a tenth of the file with zeros, like a download in parts of which one is missing."""
    begin, end = int(0.45 * len(data)), int(0.55 * len(data))
    return data[:begin] + bytes(end - begin) + data[end:]


def lost(data: bytes) -> bytes:
    """Remove three transport packets."""
    middle = len(data) // 188 // 2 * 188
    return data[:middle] + data[middle + 3 * 188 :]


def damaged() -> list[Case]:
    """Truncated and damaged files.

    Some formats (MPEG streams, live FLV) do not say how long a file should be. A truncated one is read to
    its end.
    """
    faststart = {"movflags": "faststart"}
    webm = {"codec": "libvpx-vp9"}
    mpeg4: dict[str, Any] = {"codec": "mpeg4"}
    unknown = None
    return [
        altered("index_missing.mp4", cut(0.9), UNREADABLE),
        altered("half.mp4", cut(0.5), DAMAGED, container=faststart),
        altered("last_group_cut.mp4", cut(0.95), DAMAGED, container=faststart),
        altered("half_fragments.mp4", cut(0.5), DAMAGED, container={"movflags": "frag_keyframe+empty_moov"}),
        altered("half.mkv", cut(0.5), DAMAGED),
        altered("last_group_cut.mkv", cut(0.95), DAMAGED),
        altered("half.webm", cut(0.5), DAMAGED, **webm),
        altered("half_sound.mkv", cut(0.5), DAMAGED, sound="after"),
        altered("half.avi", cut(0.5), DAMAGED, **mpeg4),
        altered("half.flv", cut(0.5), DAMAGED),
        altered("half.asf", cut(0.5), DAMAGED, codec="wmv2"),
        altered("half.ts", cut(0.5), unknown),
        altered("half.h264", cut(0.5), unknown),
        altered("half.gif", cut(0.5), DAMAGED),
        altered("half.webp", cut(0.5), EITHER),
        altered("head_only.mp4", lambda data: data[:600], UNREADABLE, container=faststart),
        altered("flipped.mp4", flipped(30), DAMAGED, container=faststart),
        altered("flipped.mkv", flipped(30), DAMAGED),
        silent("flipped.webm", flipped(30), DAMAGED, **webm),
        altered("flipped.avi", flipped(30), DAMAGED, **mpeg4),
        altered("flipped.ts", flipped(30), DAMAGED),
        silent("flipped_hevc.mp4", flipped(30), DAMAGED, codec="libx265", container=faststart),
        altered("hole.mp4", hole, DAMAGED, container=faststart),
        altered("hole.mkv", hole, DAMAGED),
        altered("packets_lost.ts", lost, DAMAGED),
        Case("half.jpg", "damage", half_photo, (0.0,), (), whole=False, error=EITHER),
    ]


def half_photo(path: Path) -> None:
    """Write a truncated photo."""
    Image.fromarray(picture(7, 960, 640)).save(path)
    path.write_bytes(cut(0.5)(path.read_bytes()))


# Files that are not videos


def text(name: str, content: str | bytes) -> Case:
    """A file with this content, which is not a video."""

    def make(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return Case(name, "no video", make, error=UNREADABLE)


def archive(path: Path) -> None:
    """Write a zip file."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("clip.txt", "no video")


def song(cover: bool, path: Path) -> None:
    """Write an audio file, with or without cover art."""
    with av.open(str(path), "w") as file:
        stream = add_sound(file)
        if cover:
            art = io.BytesIO()
            Image.fromarray(picture(3)).save(art, "JPEG")
            attached = file.add_stream("mjpeg", rate=1)
            attached.width, attached.height, attached.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            attached.disposition = av.stream.Disposition.attached_pic
            packet = av.Packet(art.getvalue())
            packet.stream, packet.pts, packet.dts = attached, 0, 0
        mux_sound(file, stream, 1.0)
        if cover:
            file.mux(packet)


def no_video() -> list[Case]:
    """Files that are not videos."""
    return [
        text("empty.mp4", ""),
        text("one_byte.mp4", "x"),
        text("text.mp4", "no video\n" * 500),
        text("error_page.mp4", "<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>" * 20),
        text("random.mp4", np.random.default_rng(0).bytes(50_000)),
        text("random.mkv", b"\x1aE\xdf\xa3" + np.random.default_rng(1).bytes(50_000)),
        text("zeros.mp4", bytes(100_000)),
        text("svg.svg", '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'),
        text("subtitles.srt", "1\n00:00:00,000 --> 00:00:01,000\nhello\n"),
        Case("archive.mp4", "no video", archive, error=UNREADABLE),
        Case("sound_only.mp4", "no video", partial(song, False), error=UNREADABLE),
        Case("sound_only.mkv", "no video", partial(song, False), error=UNREADABLE),
        Case("song_with_cover.mp4", "no video", partial(song, True), error=UNREADABLE),
        Case("no_images", "no video", lambda path: path.mkdir(), error=UNREADABLE),
    ]


# Files that refer to others


def pointing(name: str, content: str) -> Case:
    """A file that refers to a pipe next to it, which would block forever if opened, and to a local port."""

    def make(path: Path) -> None:
        pipe = path.with_suffix(".secret.ts")
        os.mkfifo(pipe)
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=lambda: TOUCHED.append(str(server.accept()[1])), daemon=True).start()
        path.write_text(content.format(file=pipe, name=pipe.name, port=server.getsockname()[1]))

    return Case(name, "points elsewhere", make, error=UNREADABLE)


def pointers() -> list[Case]:
    """Playlists and similar files. Nothing that they refer to may be opened."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        'bandwidth="1"><BaseURL>http://127.0.0.1:{port}/a.mp4</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>"
    )
    sdp = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    )
    return [
        pointing("playlist_file.m3u8", hls % "file://{file}"),
        pointing("playlist_relative.m3u8", hls % "{name}"),
        pointing("playlist_port.m3u8", hls % "http://127.0.0.1:{port}/a.ts"),
        pointing("playlist_named.mp4", hls % "{file}"),
        pointing("script.ffconcat", "ffconcat version 1.0\nfile '{file}'\n"),
        pointing("script_named.mp4", "ffconcat version 1.0\nfile 'http://127.0.0.1:{port}/a.ts'\n"),
        pointing("manifest.mpd", dash),
        pointing("session.sdp", sdp),
        pointing("list.smil", '<smil><body><video src="http://127.0.0.1:{port}/a.mp4"/></body></smil>'),
        pointing("picture.svg", '<svg xmlns="http://www.w3.org/2000/svg"><image href="{file}"/></svg>'),
        pointing("reference.asx", '<asx version="3.0"><entry><ref href="{file}"/></entry></asx>'),
        pointing("reference.rtsp.mov", "rtsptextrtsp://127.0.0.1:{port}/a.sdp"),
    ]
