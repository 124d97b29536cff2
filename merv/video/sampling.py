"""Choose the times, in seconds, at which an encoder sees a clip.

This is arithmetic only: nothing is decoded. Time 0 is the first frame of the clip.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from merv.errors import SamplingError
from merv.types import VideoInfo, is_count
from merv.utils.suggest import nearest

Mode = Literal["uniform", "fps", "segment", "released"]

RELEASED_FRAMES = 32  # the released MERV reads 32 frames of a clip; its encoders take every k-th
TOLERANCE_S = 1e-6  # float rounding (0.1 + 0.2 > 0.3) must not select the frame before


def uniform_times(duration_s: float, num_frames: int, start_s: float = 0.0) -> list[float]:
    """Return the centers of `num_frames` equal segments of the `duration_s` seconds from `start_s` on.

    >>> uniform_times(8.0, 4)
    [1.0, 3.0, 5.0, 7.0]
    """
    step_s = duration_s / _checked_count(num_frames)
    return [start_s + step_s * (i + 0.5) for i in range(num_frames)]


def fps_times(duration_s: float, fps: float, max_frames: int, start_s: float = 0.0) -> list[float]:
    """Return the centers of consecutive segments of 1/fps seconds; at least one time.

    More than `max_frames` times are replaced by `uniform_times(duration_s, max_frames)`. The last segment
    may extend beyond the end of the clip; its time does not.

    >>> fps_times(2.0, fps=2, max_frames=8)
    [0.25, 0.75, 1.25, 1.75]
    >>> fps_times(60.0, fps=2, max_frames=4)
    [7.5, 22.5, 37.5, 52.5]
    """
    num_frames = max(math.ceil(duration_s * fps - TOLERANCE_S), 1)
    if num_frames == 1 or num_frames > _checked_count(max_frames):
        return uniform_times(duration_s, min(num_frames, max_frames), start_s)
    return [start_s + min((i + 0.5) / fps, duration_s) for i in range(num_frames)]


def segment_times(
    duration_s: float, num_frames: int, start_s: float = 0.0, generator: random.Random | None = None
) -> list[float]:
    """Return one random time in each of `num_frames` equal segments, for training.

    `generator` defaults to Python's global one. Idea: Temporal Segment Networks,
    https://arxiv.org/abs/1608.00859.

    >>> times = segment_times(8.0, 4, generator=random.Random(0))
    >>> [int(time_s // 2) for time_s in times]
    [0, 1, 2, 3]
    """
    draw = generator.random if generator else random.random
    step_s = duration_s / _checked_count(num_frames)
    return [start_s + step_s * (i + draw()) for i in range(num_frames)]


def released_indices(clip_frames: int, num_frames: int, total: int = RELEASED_FRAMES) -> list[int]:
    """Return which of a clip's `clip_frames` frames the released MERV gives to an encoder.

    It reads `total` frames at linspace(0, clip_frames - 1), rounded down; the encoder takes every
    (total / num_frames)-th of them. Raises SamplingError if `num_frames` does not divide `total`; there the
    release silently returns another number of frames (16 for 12).

    >>> released_indices(100, 4)
    [0, 25, 51, 76]
    """
    if total % _checked_count(num_frames):
        divisors = ", ".join(str(k) for k in range(1, total + 1) if total % k == 0)
        raise SamplingError(
            f"sampling='released' takes every k-th of {total} frames, so num_frames must divide {total}; got "
            f"{num_frames}. Set num_frames to one of {divisors}, or use sampling='uniform'."
        )
    indices = np.linspace(0, clip_frames - 1, total).astype(int)
    return indices[:: total // num_frames].tolist()


def frame_indices_at(
    frame_times_s: Sequence[float], times_s: Sequence[float], time_error_s: float = 0.0
) -> list[int]:
    """Return the index of the frame that is on screen at each of `times_s`: the latest that has started.

    Times before the first frame give the first frame. `frame_times_s` must be ascending. A frame counts as
    started `time_error_s` earlier, so that frame n of a clip with rounded times is on screen at n / rate.

    >>> frame_indices_at([0.0, 0.5, 1.0], [0.1, 0.5, 0.99, 7.0])
    [0, 1, 1, 2]
    >>> frame_indices_at([0.0, 0.042, 0.083], [1 / 24], time_error_s=0.0005)
    [1]
    """
    tolerance_s = time_error_s + TOLERANCE_S
    return [max(bisect_right(frame_times_s, time_s + tolerance_s) - 1, 0) for time_s in times_s]


@dataclass(frozen=True)
class Sampling:
    """How to choose times, and from which range of a clip.

    Args:
        mode: "uniform" takes the centers of equal segments, or samples at a rate if `fps` or the encoder
            sets one. "fps" always samples at a rate, and raises an error if neither sets one. "segment"
            takes a random time in each of equal segments. "released" takes the same frames as the
            released MERV.
        start_s: Start of the range, in seconds from the first frame.
        end_s: End of the range; None, or a time after the end, for the end of the clip.
        fps: Frames per second, instead of the encoder's own rate.
        seed: Makes "segment" repeatable. With None, Python's `random` draws the times; `merv fit` draws them
            from its own seed.
        total: Number of frames that "released" reads, of which an encoder takes every k-th. In the
            release, it is the largest number of frames of any of its encoders.

    Raises:
        SamplingError: An option is invalid, or, in `times`, does not fit the clip.

    Example:
        >>> clip = VideoInfo("clip", 4.0, times_s=(0.0, 1.0, 2.0, 3.0), width=8, height=8)
        >>> Sampling(start_s=2.0).times(clip, num_frames=2)
        [2.5, 3.5]
    """

    mode: Mode = "uniform"
    start_s: float = 0.0
    end_s: float | None = None
    fps: float | None = None
    seed: int | None = None
    total: int = RELEASED_FRAMES

    def __post_init__(self) -> None:
        modes = get_args(Mode)
        if self.mode not in modes:
            raise SamplingError(
                f"Unknown sampling mode {self.mode!r}.{nearest(str(self.mode), modes)} "
                f"Available: {', '.join(modes)}."
            )
        if not 0 <= self.start_s < (float("inf") if self.end_s is None else self.end_s):
            raise SamplingError(
                f"A range must satisfy 0 ≤ start_s < end_s, in seconds; got start_s={self.start_s}, "
                f"end_s={self.end_s}."
            )
        if self.fps is not None and self.mode in ("segment", "released"):
            raise SamplingError(
                f"sampling={self.mode!r} does not support fps; got fps={self.fps}. Use 'fps' or 'uniform'."
            )
        if self.fps is not None and not self.fps > 0:
            raise SamplingError(f"fps must be greater than 0; got fps={self.fps}.")
        _checked_count(self.total)

    def times(self, info: VideoInfo, num_frames: int, fps: float | None = None) -> list[float]:
        """Choose times for one encoder.

        Args:
            info: The clip.
            num_frames: Number of times; with a rate, the maximum. A still image has one time, 0.
            fps: The encoder's own rate in frames per second, if it has one.

        Returns:
            Times in seconds from the first frame of the clip, ascending.

        Raises:
            SamplingError: The range starts after the end of the clip, or `num_frames` is invalid.
        """
        if info.is_still:
            return [0.0]
        start_s, end_s = self.span_s(info)
        duration_s = end_s - start_s
        rate = self.fps or fps
        if self.mode == "released":
            return self._released_times(info, num_frames, end_s)
        if self.mode == "segment":
            generator = None if self.seed is None else random.Random(self.seed)
            return segment_times(duration_s, num_frames, self.start_s, generator)
        if rate:
            return fps_times(duration_s, rate, num_frames, self.start_s)
        if self.mode == "fps":
            raise SamplingError(
                "sampling='fps' needs a rate, but neither fps= nor the encoder sets one. Use "
                "Sampling('fps', fps=2) in Python, or sampling='uniform'."
            )
        return uniform_times(duration_s, num_frames, self.start_s)

    def span_s(self, info: VideoInfo) -> tuple[float, float]:
        """Return the start and the end of the range in a clip, in seconds; (0, 0) for a still.

        Raises SamplingError if the range starts after the end of the clip.
        """
        if info.is_still:
            return 0.0, 0.0
        if self.start_s >= info.duration_s:
            raise SamplingError(
                f"{info.name}: the range starts at start_s={self.start_s:g}, but the clip lasts "
                f"{info.duration_s:g} s. Times are seconds from the first frame of the clip."
            )
        return self.start_s, info.duration_s if self.end_s is None else min(self.end_s, info.duration_s)

    def _released_times(self, info: VideoInfo, num_frames: int, end_s: float) -> list[float]:
        times_s = info.times_s
        (first,) = frame_indices_at(times_s, [self.start_s], info.time_error_s)
        error_s = info.time_error_s if end_s < info.duration_s else 0.0
        stop = max(bisect_left(times_s, end_s - error_s - TOLERANCE_S), first + 1)
        return [times_s[first + i] for i in released_indices(stop - first, num_frames, self.total)]


def _checked_count(num_frames: int) -> int:
    if not is_count(num_frames):
        raise SamplingError(f"The number of frames must be a whole number of at least 1; got {num_frames!r}.")
    return num_frames
