"""Find packets that show no frame of their own, from the headers of their pictures: nothing is decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

START = b"\0\0\1"  # before each NAL unit of H.264 and each object of MPEG-4
VOP = b"\0\0\1\xb6"  # before a picture of MPEG-4
VOL = re.compile(rb"\0\0\x01[\x20-\x2f]")  # before the header of all pictures
MAX_EMPTY_VOP = 19  # bytes; the limit of FFmpeg
HIGH_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)


class Pictures:
    """Tells which packets of a stream show a frame; pass all of them in the order in which they are stored.

    Others are references that are never shown (VP8), say that the frame before stays (MPEG-4), or are the
    second field of an interlaced frame (H.264). Other codecs combine these with a frame.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self._shows = {"vp8": self._vp8, "mpeg4": self._mpeg4, "h264": self._h264}.get(codec)
        self._extradata = extradata
        self._time_bits = 0  # MPEG-4: length of the time in a picture
        self._packed = False  # MPEG-4: the packet before contained two pictures
        self._field: tuple[int, int] | None = None  # H.264: number of the frame and parity of its first field
        self._length_size = 0  # H.264: length of the length of a NAL unit; 0 if start codes separate them
        self._sps: tuple[int, int] | None = None
        if codec == "h264":
            self._read_sps()

    def shows_frame(self, packet: Any) -> bool:
        """Return whether a packet shows a frame; True if its header is damaged."""
        try:
            return self._shows is None or self._shows(packet)
        except IndexError:
            return True

    def _vp8(self, packet: Any) -> bool:
        return bool(memoryview(packet)[0] & 16)

    def _mpeg4(self, packet: Any) -> bool:
        data = bytes(packet)
        if not self._time_bits and (volume := VOL.search(data) or VOL.search(self._extradata)):
            self._time_bits = _time_bits(Bits(volume.string[volume.end() :]))
        packed, self._packed = self._packed, data.count(VOP) > 1
        # DivX stores two pictures in one packet, followed by an empty one in place of the second.
        if packed or len(data) > MAX_EMPTY_VOP or not self._time_bits or VOP not in data:
            return True
        bits = Bits(data[data.index(VOP) + 4 :])
        bits.u(2)
        while bits.u(1):
            pass
        bits.u(1 + self._time_bits + 1)
        return bool(bits.u(1))

    def _read_sps(self) -> None:
        extradata = self._extradata
        if extradata[:1] == b"\1":  # the format of MP4, with one NAL unit here
            self._length_size = (extradata[4] & 3) + 1
            self._sps = _frame_number(extradata[9:])
            return
        for unit in _units(extradata, 0):
            if unit[0] & 31 == 7:
                self._sps = _frame_number(unit[1:])
                return

    def _h264(self, packet: Any) -> bool:
        if self._sps is None:  # no picture is a field
            return True
        number_bits, plane_bits = self._sps
        for unit in _units(bytes(packet), self._length_size):
            if unit[0] & 31 in (1, 5):
                bits = Bits(_unescaped(unit[1:33]))
                bits.ue(), bits.ue(), bits.ue(), bits.u(plane_bits)
                number, is_field = bits.u(number_bits), bits.u(1)
                field = (number, bits.u(1)) if is_field else None
                is_second = field is not None and self._field == (number, 1 - field[1])
                self._field = None if is_second else field
                return not is_second
        return True


class Bits:
    """Reads bits; raises IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def u(self, size: int) -> int:
        """Read an unsigned number of `size` bits.

        >>> bits = Bits(bytes([0b10100110]))
        >>> bits.u(1), bits.u(2), bits.ue()
        (1, 1, 5)
        """
        value = 0
        for position in range(self._position, self._position + size):
            value = value << 1 | self._data[position >> 3] >> (~position & 7) & 1
        self._position += size
        return value

    def ue(self) -> int:
        """Read an Exp-Golomb number: n zeros, then n + 1 bits, minus 1."""
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros | self.u(zeros)) - 1


def _time_bits(bits: Bits) -> int:
    """Return how many bits the time in a picture has, from the header of an MPEG-4 stream."""
    bits.u(9)
    if bits.u(1):
        bits.u(7)
    if bits.u(4) == 15:  # pixel aspect
        bits.u(16)
    if bits.u(1):
        bits.u(3)
        if bits.u(1):
            bits.u(79)
    bits.u(3)
    return max((bits.u(16) - 1).bit_length(), 1)


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    """Yield the NAL units of H.264 data, separated by start codes or preceded by their lengths."""
    if not length_size:
        yield from (unit for unit in data.split(START)[1:] if unit)
        return
    position = 0
    while position + length_size < len(data):
        begin = position + length_size
        position = begin + int.from_bytes(data[position:begin], "big")
        yield data[begin:position]


def _unescaped(unit: bytes) -> bytes:
    """Remove the bytes that H.264 inserts so that no start code occurs in a unit."""
    return unit.replace(b"\0\0\3", b"\0\0")


def _frame_number(sps: bytes) -> tuple[int, int] | None:
    """Return (bits of the frame's number in a slice, bits before it), or None if no picture is a field."""
    bits, planes = Bits(_unescaped(sps)), 0
    profile = bits.u(8)
    bits.u(16), bits.ue()
    if profile in HIGH_PROFILES:
        chroma = bits.ue()
        if chroma == 3 and bits.u(1):
            planes = 2
        bits.ue(), bits.ue(), bits.u(1)
        if bits.u(1):
            for size in [16] * 6 + [64] * (6 if chroma == 3 else 2):
                if bits.u(1):
                    _skip_scaling_list(bits, size)
    number_bits, order = bits.ue() + 4, bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1), bits.ue(), bits.ue()
        for _ in range(bits.ue()):
            bits.ue()
    bits.ue(), bits.u(1), bits.ue(), bits.ue()
    return None if bits.u(1) else (number_bits, planes)


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.ue()
            following = (last + (code + 1 >> 1) * (1 if code & 1 else -1)) % 256
        last = following or last
