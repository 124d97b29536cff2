"""The base class of all readers: it returns frames of one source by index."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from merv.errors import DamagedVideo, UnreadableVideo, VideoError
from merv.types import VideoInfo

BACKENDS = {"pyav": ("av",), "torchcodec": ("av", "torchcodec")}  # backend → packages that decode
MAX_PIXELS = 8192 * 8192  # per frame: 200 MB as RGB
FRAMES_IN_MEMORY = 4  # frames of MAX_PIXELS that `read` returns at once: 800 MB, or 32 frames of 4K
PARTIAL = "load_video(…, on_error='partial')"
SKIP = "To skip such files: load_video(…, on_error='skip')."


class VideoReader:
    """Reads frames of one source by index. `open_video` returns one.

    A subclass sets `info` and implements `_decode`, which yields upright frames of any size. `read`
    scales them to the size in `info`, which assumes square pixels.

    Attributes:
        info: What is known without decoding.
        damage: What is wrong with the source as a whole; empty if nothing is.
        missing: Indices of frames that could not be decoded so far.
        max_pixels: Maximum number of pixels of a frame; None for a source that is already in memory.
    """

    info: VideoInfo
    max_pixels: int | None = None
    damage: str = ""
    _frame_error: str = ""  # the first problem with a single frame in the last `read`

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.missing: set[int] = set()
        self._file = file

    def read(self, indices: Iterable[int], on_error: Literal["raise", "partial"] = "raise") -> Tensor:
        """Decode frames into one tensor.

        Args:
            indices: Frame indices in any order. An index may occur more than once.
            on_error: "raise" requires every frame. "partial" leaves out frames that cannot be decoded
                and adds their indices to `missing`.

        Returns:
            Upright uint8 RGB frames in the order of `indices`, shape [len(indices), 3, H, W].

        Raises:
            DamagedVideo: Some frames could not be decoded and `on_error` is "raise".
            UnreadableVideo: No frame could be decoded, or all frames together take too much memory: 800 MB,
                or more if `max_pixels` is larger than the default.
            IndexError: The clip has no frame with one of these indices, or `indices` is empty.
        """
        indices = [operator.index(index) for index in indices]  # tensors are hashed by identity
        unique = self._checked(indices)
        self._check_memory(len(unique))
        pixels = torch.empty(
            (len(unique), 3, self.info.height, self.info.width), dtype=torch.uint8, device="cpu"
        )
        row_of = {index: row for row, index in enumerate(unique)}
        decoded = set()
        for index, frame in self.frames(unique, on_error):
            pixels[row_of[index]] = frame
            decoded.add(index)
        if indices == unique and len(decoded) == len(unique):
            return pixels
        return pixels[[row_of[index] for index in indices if index in decoded]]

    def frames(
        self, indices: Iterable[int], on_error: Literal["raise", "partial"] = "raise"
    ) -> Iterator[tuple[int, Tensor]]:
        """Decode frames one by one, so that only one of them is in memory.

        Args:
            indices: Frame indices. Each frame is decoded once.
            on_error: As in `read`. Errors are raised after the last frame that can be decoded.

        Yields:
            (index, upright uint8 RGB frame of shape [3, H, W]), usually in ascending order.

        Raises:
            DamagedVideo, UnreadableVideo, IndexError: As in `read`.

        Example:
            >>> from merv.video.open import open_video
            >>> with open_video(torch.zeros(4, 3, 32, 48, dtype=torch.uint8)) as video:
            ...     [(index, tuple(frame.shape)) for index, frame in video.frames([2, 0])]
            [(0, (3, 32, 48)), (2, (3, 32, 48))]
        """
        if on_error not in ("raise", "partial"):
            raise VideoError(f"on_error must be 'raise' or 'partial'; got {on_error!r}.")
        unique = self._checked(indices)
        self._frame_error = ""
        missing = set(unique)
        for index, frame in self._decode(unique):  # frame: [3, H, W]
            missing.discard(index)
            yield index, _scaled(frame, self.info.height, self.info.width)
        self.missing |= missing
        self._check(len(unique) - len(missing), len(unique), on_error)

    def _checked(self, indices: Iterable[int]) -> list[int]:
        """Return the distinct indices in ascending order; raise IndexError for those that do not exist."""
        unique = sorted({operator.index(index) for index in indices})
        if not unique or unique[0] < 0 or unique[-1] >= self.info.num_frames:
            invalid = [index for index in unique if not 0 <= index < self.info.num_frames]
            raise IndexError(
                f"{self.info.name}: expected frame indices in 0 to {self.info.num_frames - 1}; "
                f"got {', '.join(map(str, invalid[:5])) or 'an empty list'}."
            )
        return unique

    def _check_memory(self, count: int) -> None:
        """Refuse frames that together take too much memory, because a small file can have many large ones."""
        if self.max_pixels is None:
            return
        pixels = count * self.info.width * self.info.height
        if pixels > FRAMES_IN_MEMORY * max(self.max_pixels, MAX_PIXELS):
            raise unreadable(
                self.info.name,
                f"{count} frames of {self.info.width}×{self.info.height} pixels take {3e-9 * pixels:.1f} GB",
                "Read fewer frames at once, iterate over VideoReader.frames(…), or allow it with "
                f"max_pixels={-(-pixels // FRAMES_IN_MEMORY)}.",
            )

    def close(self) -> None:
        """Close the file, unless the caller opened it."""
        if self._file is not None:
            self._file.close()

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
            f"{PARTIAL} returns the readable frames, on_error='skip' skips such files."
        )


def reason_of(error: Exception) -> str:
    """The message of an error without the advice for callers of `load_video`."""
    return str(error).partition(SKIP)[0].partition(PARTIAL)[0].strip()


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
