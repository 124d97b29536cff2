"""Load: the one call from a source to uint8 frames with their true times."""

from __future__ import annotations

import logging
from typing import Any, Literal, cast

import torch

from merv.errors import SamplingError, VideoError
from merv.types import Frames
from merv.video.open import open_video
from merv.video.reader import MAX_PIXELS, VideoReader
from merv.video.sampling import Mode, Sampling, frame_indices_at

logger = logging.getLogger(__name__)


def load_video(
    source: Any,
    *,
    num_frames: int = 32,
    sampling: str | Sampling = "uniform",
    fps: float | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    on_error: Literal["raise", "skip", "partial"] = "raise",
    backend: str = "pyav",
    max_pixels: int = MAX_PIXELS,
) -> Frames | None:
    """Frames of a video, image, GIF, folder, array or tensor: uint8 RGB, pixels [1, T, 3, H, W].

    source, backend, max_pixels: as `open_video` takes them. Sound is ignored.
    num_frames: how many; with `fps`, the most that come. A still has one.
    sampling, fps, start_s, end_s: which; see `Sampling`, which may be given instead.
    on_error: `raise`; `skip`, which logs a warning and returns None for a source that is
        unreadable or damaged; `partial`, which returns those of the wanted frames that can
        be read. Never a substitute.

    `times_s` of the result are when the frames that came are shown, in seconds from the first
    of the clip. Raises UnreadableVideo, DamagedVideo, and SamplingError for a range or count
    that does not fit the clip.

    >>> frames = load_video(torch.zeros(50, 3, 32, 48, dtype=torch.uint8), num_frames=4)
    >>> frames.pixels.shape, frames.times_s.tolist()
    (torch.Size([1, 4, 3, 32, 48]), [[0.24, 0.72, 1.24, 1.72]])
    """
    choice = _sampling(sampling, fps, start_s, end_s)
    if on_error not in ("raise", "skip", "partial"):
        raise VideoError(f"on_error is 'raise', 'skip' or 'partial'; got {on_error!r}.")
    try:
        with open_video(source, backend=backend, max_pixels=max_pixels) as reader:
            return _load(reader, choice, num_frames, partial=on_error == "partial")
    except VideoError as error:
        if on_error != "skip":
            raise
        logger.warning("skipped: %s", error)
        return None


def _sampling(sampling: str | Sampling, fps: float | None, start_s: float, end_s: float | None) -> Sampling:
    if not isinstance(sampling, Sampling):
        return Sampling(cast(Mode, sampling), start_s=start_s, end_s=end_s, fps=fps)
    if fps is not None or start_s or end_s is not None:
        raise SamplingError("fps, start_s and end_s go into the Sampling that is given, not beside it.")
    return sampling


def _load(reader: VideoReader, sampling: Sampling, num_frames: int, *, partial: bool) -> Frames:
    info = reader.info
    indices = frame_indices_at(info.times_s, sampling.times(info, num_frames))
    pixels = reader.read(indices, on_error="partial" if partial else "raise")
    times_s = [info.times_s[index] for index in indices if index not in reader.missing]
    return Frames.of(pixels[None], torch.tensor([times_s], dtype=torch.float64))
