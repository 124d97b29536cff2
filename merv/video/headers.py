"""Find packets that show no frame of their own, from the headers of their pictures: nothing is decoded."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import av

from merv.video.reports import reports

SLICE = re.compile(
    rb"\0\0\x01[\x01\x21\x41\x61\x05\x25\x45\x65](.{1,32})", re.DOTALL
)  # a part of a picture of H.264
VOP = b"\0\0\1\xb6"  # before a picture of MPEG-4
VOL = re.compile(rb"\0\0\x01[\x20-\x2f]")  # before the header of all pictures
VOL_BITS = re.compile(
    r"""
    .{9}                        # kind of object
    (0|1.{7})                   # version
    (1111.{16}|(?!1111).{4})    # pixel aspect
    (0|1.{3}(0|1.{79}))         # control
    .{3}                        # shape
    (?P<ticks_per_s>.{16})
    """,
    re.VERBOSE,
)
MAX_EMPTY_VOP = 19  # bytes; the limit of FFmpeg


class Pictures:
    """Tells which packets of a stream show a frame; pass all of them in the order in which they are stored.

    Others are references that are never shown (VP8), say that the frame before stays (MPEG-4), or are the
    second field of an interlaced frame (H.264). Other codecs combine these with a frame.
    """

    def __init__(self, stream: Any) -> None:
        codec = stream.codec_context
        self._shows = {"vp8": self._vp8, "mpeg4": self._mpeg4, "h264": self._h264}.get(codec.name)
        self._extradata = codec.extradata or b""
        self._time_bits = 0  # MPEG-4: length of the time in a picture
        self._packed = False  # MPEG-4: the packet before contained two pictures
        self._field: tuple[str, str] | None = None  # H.264: number of the frame and parity of its first field
        self._sps = _sps(stream) if codec.name == "h264" else {}
        self._with_start_codes: Any = None  # H.264: a filter for packets; None if no picture is a field
        if self._sps.get("frame_mbs_only_flag") == 0:
            with suppress(av.error.FFmpegError):
                self._with_start_codes = av.BitStreamFilterContext("h264_mp4toannexb", stream)

    def shows_frame(self, packet: Any) -> bool:
        """Return whether a packet shows a frame; True if its header is damaged."""
        return self._shows is None or self._shows(packet)

    def _vp8(self, packet: Any) -> bool:
        return bool(memoryview(packet)[0] & 16)

    def _mpeg4(self, packet: Any) -> bool:
        data = bytes(packet)
        self._time_bits = self._time_bits or _time_bits(data) or _time_bits(self._extradata)
        packed, self._packed = self._packed, data.count(VOP) > 1
        # DivX stores two pictures in one packet, followed by an empty one in place of the second.
        if packed or len(data) > MAX_EMPTY_VOP or not self._time_bits:
            return True
        picture = _bits(data.partition(VOP)[2])
        # VOP header: type (2 bits), seconds (ones, then 0), marker, time, marker, vop_coded; vop_coded 0
        # repeats the frame before
        return not re.match(f"..1*0.{{{1 + self._time_bits + 1}}}0", picture)

    def _h264(self, packet: Any) -> bool:
        if self._with_start_codes is None:
            return True
        number_bits = self._sps["log2_max_frame_num_minus4"] + 4
        with suppress(av.error.FFmpegError, ValueError, IndexError):
            (copy,) = self._with_start_codes.filter(av.Packet(packet))  # a filter takes the content
            if header := SLICE.search(bytes(copy)):
                bits = _bits(header[1].replace(b"\0\0\3", b"\0\0"))  # undo the escape of start codes
                position = 0
                for _ in range(3):  # Exp-Golomb numbers: n zeros and n + 1 bits
                    position = 2 * bits.index("1", position) - position + 1
                position += 2 * self._sps.get("separate_colour_plane_flag", 0)
                number, position = bits[position : position + number_bits], position + number_bits
                # field_pic_flag, then bottom_field_flag
                field = (number, bits[position + 1]) if bits[position] == "1" else None
                is_second = field is not None and self._field == (number, "10"[int(field[1])])
                self._field = None if is_second else field
                return not is_second
        return True


def _time_bits(data: bytes) -> int:
    """Return the number of bits of the time field in a picture header; 0 if `data` has no MPEG-4 header."""
    volume = VOL.search(data)
    header = volume and VOL_BITS.match(_bits(data[volume.end() :][:40]))
    return max((int(header["ticks_per_s"], 2) - 1).bit_length(), 1) if header else 0


def _bits(data: bytes) -> str:
    """Return the bits of some bytes.

    >>> _bits(b"\\x05")
    '00000101'
    """
    return "".join(f"{byte:08b}" for byte in data)


def _sps(stream: Any) -> dict[str, int]:
    """Return the values in the header of an H.264 stream, named as in the standard, which FFmpeg logs.

    It is empty if the header is damaged or not stored apart from the pictures.
    """
    with reports(av.logging.INFO) as log, suppress(av.error.FFmpegError):
        av.BitStreamFilterContext("trace_headers", stream)
        lines = (message.split() for _, _, message in log)  # position, name, bits, "=", value
        return {line[1]: int(line[4]) for line in lines if len(line) == 5 and line[3] == "="}
    return {}
