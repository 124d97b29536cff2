"""Load frames of a video, with their true times, in one call."""

from __future__ import annotations

import logging
from typing import Any, Literal, cast

import torch

from merv.errors import SamplingError, VideoError
from merv.types import Frames
from merv.video.open import open_video
from merv.video.reader import MAX_PIXELS
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
    """Load frames of a video, image, animation, folder of images, array or tensor.

    Args:
        source: What to read; see `merv.video.open.open_video`. Audio is ignored.
        num_frames: Number of frames; with `fps`, the maximum. A still image has one frame.
        sampling: A mode of `Sampling` ("uniform", "fps", "segment" or "released"), or a `Sampling`.
        fps: Frames per second to sample.
        start_s: Start of the range to sample, in seconds from the first frame.
        end_s: End of that range; None for the end of the clip.
        on_error: What to do with a source that is unreadable or damaged. "raise" raises an error.
            "skip" logs a warning and returns None. "partial" returns the requested frames that can be
            decoded. Missing frames are never replaced by others.
        backend: Decoding backend, "pyav" or "torchcodec"; see `merv.video.open.open_video`.
        max_pixels: Maximum number of pixels of a frame; larger ones are refused.

    Returns:
        Frames with uint8 RGB pixels of shape [1, T, 3, H, W]. `times_s` holds the presentation times of
        the returned frames, in seconds from the first frame of the clip. None if the source was skipped.

    Raises:
        UnreadableVideo: The source is missing or no requested frame can be decoded.
        DamagedVideo: Some requested frames cannot be decoded.
        SamplingError: The range or the number of frames does not fit the clip, or `fps`, `start_s` or
            `end_s` is passed together with a `Sampling`.
        ShapeError: An array has another dtype or shape.
        MissingDependency: The backend cannot be loaded.
        VideoError: The source is of another type, or `on_error` or `backend` is unknown.

    Example:
        >>> frames = load_video(torch.zeros(50, 3, 32, 48, dtype=torch.uint8), num_frames=4)
        >>> frames.pixels.shape, frames.times_s.tolist()
        (torch.Size([1, 4, 3, 32, 48]), [[0.24, 0.72, 1.24, 1.72]])
    """
    if on_error not in ("raise", "skip", "partial"):
        raise VideoError(f"on_error must be 'raise', 'skip' or 'partial'; got {on_error!r}.")
    if not isinstance(sampling, Sampling):
        sampling = Sampling(cast(Mode, sampling), start_s=start_s, end_s=end_s, fps=fps)
    elif fps is not None or start_s or end_s is not None:
        raise SamplingError(
            f"fps, start_s and end_s must be set in the Sampling that is passed as sampling=, as in "
            f"Sampling(fps=2); got load_video(…, fps={fps}, start_s={start_s}, end_s={end_s})."
        )
    try:
        with open_video(source, backend=backend, max_pixels=max_pixels) as reader:
            info = reader.info
            indices = frame_indices_at(info.times_s, sampling.times(info, num_frames), info.time_error_s)
            pixels = reader.read(indices, on_error="partial" if on_error == "partial" else "raise")
            times_s = [info.times_s[index] for index in indices if index not in reader.missing]
    except VideoError as error:
        if on_error != "skip":
            raise
        logger.warning("skipped: %s", error)
        return None
    return Frames.of(pixels[None], torch.tensor([times_s], dtype=torch.float64, device="cpu"))
