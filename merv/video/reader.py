"""Reader: frames of one source by index, whatever decodes them; `merv.video.open` picks the reader."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from merv.errors import DamagedVideo, UnreadableVideo, VideoError
from merv.types import VideoInfo

BACKENDS = {"pyav": ("av",), "torchcodec": ("av", "torchcodec")}  # and the packages that decode
MAX_PIXELS = 8192 * 8192  # of a frame: 200 MB as RGB
SKIP = "load_video(…, on_error='skip') passes over such files."


class VideoReader:
    """Reads frames of one source by index; what `open_video` returns.

    info: what is known without decoding. missing: indices that turned out to be unreadable.
    damage: what is wrong with the source as a whole, or "".

    A subclass sets `info` and yields upright pictures in `_decode`, of any size: they are scaled
    to that of `info`, which counts in square pixels.
    """

    info: VideoInfo
    damage: str = ""
    _met: str = ""  # what was wrong with a frame of the last read

    def __init__(self) -> None:
        self.missing: set[int] = set()

    def read(self, indices: Iterable[int], on_error: Literal["raise", "partial"] = "raise") -> Tensor:
        """Frames of these indices, in this order: uint8 RGB [len(indices), 3, H, W], upright.

        An index may come twice. With `partial`, unreadable frames are left out (see
        `missing`); with `raise`, they raise DamagedVideo. Raises UnreadableVideo where no
        frame could be read at all, IndexError for an index that the clip does not have.
        """
        if on_error not in ("raise", "partial"):
            raise VideoError(f"on_error is 'raise' or 'partial' here; got {on_error!r}.")
        indices = [operator.index(index) for index in indices]  # tensors are not equal to their like
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.info.frames:
            raise IndexError(f"{self.info.name} has frames 0 to {self.info.frames - 1}; asked for {indices}.")
        pixels = torch.empty(len(wanted), 3, self.info.height, self.info.width, dtype=torch.uint8)
        place = {index: i for i, index in enumerate(wanted)}
        got = set()
        self._met = ""
        for index, picture in self._decode(wanted):  # picture: [3, H, W]
            pixels[place[index]] = _scaled(picture, self.info.height, self.info.width)
            got.add(index)
        self.missing |= set(wanted) - got
        self._check(len(got), len(wanted), on_error)
        if indices == wanted and len(got) == len(wanted):
            return pixels
        return pixels[[place[index] for index in indices if index in got]]

    def close(self) -> None:
        """Close what was opened; a file that was handed over open stays open."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        """(index, uint8 [3, H, W]) of those of `wanted` (ascending) that can be read."""
        raise NotImplementedError

    def _check(self, got: int, wanted: int, on_error: str) -> None:
        fault = self.damage or self._met
        fault = fault and f"; {fault}"
        if not got:
            raise unreadable(self.info.name, f"none of the {wanted} wanted frames could be decoded{fault}")
        if on_error == "partial" or (got == wanted and not self.damage):
            return
        raise DamagedVideo(
            f"{self.info.name}: {got} of the {wanted} wanted frames could be decoded{fault}. "
            "load_video(…, on_error='partial') takes what is readable, 'skip' passes over such files."
        )


def unreadable(name: str, why: str, advice: str = SKIP) -> UnreadableVideo:
    """The error for a source that cannot be used: what it is, why, and what to do about it."""
    return UnreadableVideo(f"{name}: {why}. {advice}")


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise UnreadableVideo for pictures of more than `max_pixels`."""
    if width * height > max_pixels:
        raise unreadable(
            name,
            f"its pictures have {width}×{height} pixels, more than max_pixels={max_pixels}",
            f"If the file is to be trusted: open_video(…, max_pixels={width * height}).",
        )


def display_size(width: int, height: int, pixel_aspect: float) -> tuple[int, int]:
    """(width, height) of a picture as it is to be seen, whose pixels are `pixel_aspect` as wide as high.

    It is enlarged, never shrunk. Pixels within 5 % of a square count as square, because encoders
    that round sizes write aspects such as 640:639; 0 is unknown; beyond 1:8 or 8:1 it is an error
    of the file.

    >>> display_size(720, 576, 16 / 11), display_size(720, 480, 8 / 9), display_size(426, 320, 640 / 639)
    ((1047, 576), (720, 540), (426, 320))
    """
    if not 1 / 8 <= pixel_aspect <= 8 or abs(pixel_aspect - 1) < 0.05:
        return width, height
    return round(width * max(pixel_aspect, 1)), round(height / min(pixel_aspect, 1))


def _scaled(picture: Tensor, height: int, width: int) -> Tensor:
    """[3, H, W] in the size of its clip, where its own is another."""
    if picture.shape[1:] == (height, width):
        return picture
    return interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]
