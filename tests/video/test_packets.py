"""Packets that show no frame of their own, or do not say when: the other frames keep their times."""

import io
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from media import indices_of, make_video

from merv.video.open import open_video

Change = Callable[[list[bytes]], list[bytes]]


def copied(path: Path, original: Path, change: Change) -> Path:
    """Copy the packets of a video at 25 frames/s without B-frames into another file."""
    with av.open(str(original)) as source, av.open(str(path), "w") as target:
        template = source.streams.video[0]
        stream = target.add_stream_from_template(template)
        stream.time_base = Fraction(1, 25)
        contents = change([bytes(packet) for packet in source.demux(template) if packet.size])
        for number, content in enumerate(contents):
            if not content:
                continue
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.duration, packet.time_base = 1, Fraction(1, 25)
            packet.is_keyframe, packet.stream = number == 0, stream
            target.mux(packet)
    return path


def hide_fifth(packets: list[bytes]) -> list[bytes]:
    """Clear the bit of VP8 that says that a frame is shown, as in an alternate reference frame."""
    packets[5] = bytes([packets[5][0] & ~16]) + packets[5][1:]
    return packets


def empty_vop(packet: bytes) -> bytes:
    """Return the picture of MPEG-4 that says that the one before stays: its header without content."""
    start = packet.index(b"\0\0\1\xb6") + 4
    bits = "".join(f"{byte:08b}" for byte in packet[start : start + 4])
    header = bits[: bits.index("0", 2) + 1 + 1 + 5 + 1] + "00"  # seconds, marker, time at 25/s, marker, coded
    header += "1" * (-len(header) % 8)
    return packet[:start] + int(header, 2).to_bytes(len(header) // 8, "big")


def empty_fifth(packets: list[bytes]) -> list[bytes]:
    packets[5] = empty_vop(packets[5])
    return packets


@pytest.mark.parametrize(
    ("name", "codec", "change"),
    [
        ("a.webm", "libvpx", hide_fifth),
        ("a.ivf", "libvpx", hide_fifth),
        ("a.mp4", "mpeg4", empty_fifth),
        ("a.mkv", "mpeg4", empty_fifth),
        ("a.avi", "mpeg4", empty_fifth),
    ],
)
def test_packet_without_a_frame_is_none(tmp_path: Path, name: str, codec: str, change: Change) -> None:
    options = {"b": "1M"} if codec == "libvpx" else {}
    original = make_video(tmp_path / "original.mkv", 12, codec=codec, options=options)
    with open_video(copied(tmp_path / name, original, change)) as video:
        assert video.info.times_s == pytest.approx([n / 25 for n in range(12) if n != 5], abs=1e-3)
        assert indices_of(video.read(range(11))) == [n for n in range(12) if n != 5]


def test_empty_picture_at_the_end_prolongs_the_frame_before(tmp_path: Path) -> None:
    original = make_video(tmp_path / "original.mkv", 12, codec="mpeg4")
    path = copied(tmp_path / "a.mp4", original, lambda packets: [*packets[:-1], empty_vop(packets[-1])])
    with open_video(path) as video:
        assert (video.info.num_frames, video.info.duration_s) == (11, pytest.approx(12 / 25))


def test_packet_of_two_pictures_shows_both(tmp_path: Path) -> None:
    """DivX stores a P-picture with the B-picture after it, and an empty picture in place of the latter."""

    def pack(packets: list[bytes]) -> list[bytes]:
        first, rest = packets[0].replace(b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p\0\0\1\xb6"), packets[1:]
        pairs = [(rest[n] + rest[n + 1], empty_vop(rest[n])) for n in range(0, len(rest), 2)]
        return [first, *(packet for pair in pairs for packet in pair)]

    original = make_video(
        tmp_path / "original.mp4", 11, codec="mpeg4", options={"bf": "1", "b_strategy": "0"}
    )
    with open_video(copied(tmp_path / "a.avi", original, pack)) as video:
        assert video.info.times_s == pytest.approx([n / 25 for n in range(11)])
        assert indices_of(video.read(range(11))) == list(range(11))


def golomb(number: int) -> str:
    bits = f"{number + 1:b}"
    return "0" * (len(bits) - 1) + bits


def unit(kind: int, bits: str) -> bytes:
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return b"\0\0\0\1" + bytes([kind]) + re.sub(rb"\0\0(?=[\0-\x03])", b"\0\0\3", data)


def fields(levels: list[int]) -> list[bytes]:
    """Return H.264 packets of the two fields of each interlaced frame, 16×32 pixels of one gray level."""
    sequence = f"{77:08b}{0:08b}{30:08b}" + "".join(map(golomb, (0, 0, 0, 0, 1))) + "0" + golomb(0) * 2
    sequence += "0" + "0" + "1" + "0" + "0"  # frames may be fields
    picture = golomb(0) * 2 + "00" + golomb(0) * 3 + "000" + golomb(0) * 3 + "000"
    packets = []
    for frame, level in enumerate(levels):
        for bottom in (0, 1):
            is_first = frame + bottom == 0
            bits = golomb(0) + golomb(7) + golomb(0) + f"{frame % 16:04b}1{bottom}" + golomb(0) * is_first
            bits += f"{(2 * frame + bottom) % 16:04b}" + ("00" if is_first else "0") + golomb(0) + golomb(25)
            bits += "0" * (-len(bits) % 8) + f"{level:08b}" * 256 + f"{128:08b}" * 128
            header = unit(0x67, sequence) + unit(0x68, picture) if is_first else b""
            packets.append(b"\0\0\0\1\x09\x10" + header + unit(0x65 if is_first else 0x61, bits))
    return packets


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("suffix", [".h264", ".ts", ".mkv", ".mp4"])
def test_two_fields_are_one_frame(tmp_path: Path, suffix: str, in_pairs: bool) -> None:
    levels = [20 + 10 * frame for frame in range(20)]
    packets = fields(levels)
    stream = io.BytesIO(b"".join(packets))
    path = tmp_path / f"a{suffix}"
    if in_pairs:
        packets = [first + second for first, second in zip(packets[::2], packets[1::2], strict=True)]
    with av.open(stream, format="h264") as source, av.open(str(path), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for number, content in enumerate(packets):
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.duration, packet.time_base = 1, Fraction(1, 25 if in_pairs else 50)
            packet.is_keyframe, packet.stream = number == 0, copy
            target.mux(packet)
    with open_video(path) as video:
        assert (video.info.width, video.info.height) == (16, 32)
        assert video.info.times_s == pytest.approx([n / 25 for n in range(20)], abs=1e-3)
        gray = video.read(range(20)).float().mean((1, 2, 3))
        expected = (torch.tensor(levels, dtype=torch.float32) - 16) * 255 / 219
        assert torch.allclose(gray, expected, atol=2)


def without_half_of_its_times(data: bytearray) -> bytes:
    """Remove the times of every second picture of a transport stream, as broadcasters do."""
    pictures = 0
    for begin in range(0, len(data), 188):
        header = begin + 4 + (1 + data[begin + 4] if data[begin + 3] & 0x20 else 0)
        if data[begin + 1] & 0x40 and data[header : header + 4] == b"\0\0\1\xe0":
            pictures += 1
            if pictures % 2 == 0:
                data[header + 7] &= 0x3F
                size = data[header + 8]
                data[header + 9 : header + 9 + size] = b"\xff" * size
    return bytes(data)


@pytest.mark.parametrize("start_s", [0.0, 100.0])
def test_pictures_without_times_are_counted(tmp_path: Path, start_s: float) -> None:
    options = {"bf": "2", "g": "10", "preset": "veryfast"}
    path = make_video(tmp_path / "a.ts", 60, start_s=start_s, options=options)
    with open_video(without_half_of_its_times(bytearray(path.read_bytes()))) as video:
        assert video.info.times_s == pytest.approx([n / 25 for n in range(60)], abs=1e-3)
        assert indices_of(video.read(range(60))) == list(range(60))


def test_vp9_is_read_from_its_first_keyframe(tmp_path: Path) -> None:
    original = make_video(tmp_path / "original.mkv", 36, codec="libvpx-vp9", options={"g": "12", "b": "1M"})
    path = copied(tmp_path / "a.mkv", original, lambda packets: [b"", *packets[1:]])
    with open_video(path) as video:
        pixels = video.read(range(video.info.num_frames), on_error="partial")
        assert indices_of(pixels) == list(range(12, 36))
