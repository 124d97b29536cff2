"""The base class of all readers: it returns frames of one source by index."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from merv.errors import DamagedVideo, UnreadableVideo, VideoError
from merv.types import VideoInfo

BACKENDS = {"pyav": ("av",), "torchcodec": ("av", "torchcodec")}  # backend → packages that decode
MAX_PIXELS = 8192 * 8192  # per frame: 200 MB as RGB
SKIP = "To skip such files: load_video(…, on_error='skip')."


class VideoReader:
    """Reads frames of one source by index. `open_video` returns one.

    A subclass sets `info` and implements `_decode`, which yields upright frames of any size. `read`
    scales them to the size in `info`, which assumes square pixels.

    Attributes:
        info: What is known without decoding.
        damage: What is wrong with the source as a whole; empty if nothing is.
        missing: Indices of frames that could not be decoded so far.
    """

    info: VideoInfo
    damage: str = ""
    _frame_error: str = ""  # the first problem with a single frame in the last `read`

    def __init__(self) -> None:
        self.missing: set[int] = set()

    def read(self, indices: Iterable[int], on_error: Literal["raise", "partial"] = "raise") -> Tensor:
        """Decode frames.

        Args:
            indices: Frame indices in any order. An index may occur more than once.
            on_error: "raise" requires every frame. "partial" leaves out frames that cannot be decoded
                and adds their indices to `missing`.

        Returns:
            Upright uint8 RGB frames in the order of `indices`, shape [len(indices), 3, H, W].

        Raises:
            DamagedVideo: Some frames could not be decoded and `on_error` is "raise".
            UnreadableVideo: No frame could be decoded.
            IndexError: The clip has no frame with one of these indices, or `indices` is empty.
        """
        if on_error not in ("raise", "partial"):
            raise VideoError(f"on_error must be 'raise' or 'partial'; got {on_error!r}.")
        indices = [operator.index(index) for index in indices]  # tensors are hashed by identity
        unique = sorted(set(indices))
        if not unique or unique[0] < 0 or unique[-1] >= self.info.frames:
            invalid = [index for index in unique if not 0 <= index < self.info.frames]
            raise IndexError(
                f"{self.info.name}: expected frame indices in 0 to {self.info.frames - 1}; "
                f"got {', '.join(map(str, invalid[:5])) or 'an empty list'}."
            )
        pixels = torch.empty(len(unique), 3, self.info.height, self.info.width, dtype=torch.uint8)
        row_of = {index: row for row, index in enumerate(unique)}
        decoded = set()
        self._frame_error = ""
        for index, frame in self._decode(unique):  # frame: [3, H, W]
            pixels[row_of[index]] = _scaled(frame, self.info.height, self.info.width)
            decoded.add(index)
        self.missing |= set(unique) - decoded
        self._check(len(decoded), len(unique), on_error)
        if indices == unique and len(decoded) == len(unique):
            return pixels
        return pixels[[row_of[index] for index in indices if index in decoded]]

    def close(self) -> None:
        """Close the file, unless the caller opened it."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, uint8 [3, H, W]) for each of the ascending `indices` that can be decoded."""
        raise NotImplementedError

    def _check(self, decoded: int, requested: int, on_error: str) -> None:
        reason = self.damage or self._frame_error
        reason = reason and f"; {reason}"
        if not decoded:
            raise unreadable(
                self.info.name, f"none of the {requested} requested frames could be decoded{reason}"
            )
        if on_error == "partial" or (decoded == requested and not self.damage):
            return
        raise DamagedVideo(
            f"{self.info.name}: {decoded} of the {requested} requested frames could be decoded{reason}. "
            "load_video(…, on_error='partial') returns the readable frames, on_error='skip' skips such files."
        )


def unreadable(name: str, reason: str, advice: str = SKIP) -> UnreadableVideo:
    """Return the error for a source that cannot be used: its name, the reason and what to do."""
    return UnreadableVideo(f"{name}: {reason}. {advice}")


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise UnreadableVideo for frames of more than `max_pixels`."""
    if width * height > max_pixels:
        raise unreadable(
            name,
            f"its frames have {width}×{height} pixels, more than max_pixels={max_pixels}",
            f"If you trust the file: open_video(…, max_pixels={width * height}).",
        )


def display_size(width: int, height: int, pixel_aspect: float) -> tuple[int, int]:
    """Return the display size (width, height) after correcting for non-square pixels.

    `pixel_aspect` is the width of a pixel over its height. One side is enlarged; neither is shrunk.
    Pixels within 5 % of a square count as square, because encoders that round sizes write aspects such
    as 640:639. Aspects of 0 (unknown) and beyond 1:8 or 8:1 (errors in the file) are ignored.

    >>> display_size(720, 576, 16 / 11), display_size(720, 480, 8 / 9), display_size(426, 320, 640 / 639)
    ((1047, 576), (720, 540), (426, 320))
    """
    if not 1 / 8 <= pixel_aspect <= 8 or abs(pixel_aspect - 1) < 0.05:
        return width, height
    return round(width * max(pixel_aspect, 1)), round(height / min(pixel_aspect, 1))


def _scaled(frame: Tensor, height: int, width: int) -> Tensor:
    if frame.shape[1:] == (height, width):
        return frame
    return interpolate(frame[None], (height, width), mode="bilinear", antialias=True)[0]
