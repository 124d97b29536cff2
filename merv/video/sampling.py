"""Sample: from what is known of a clip to the times, in seconds, that one encoder wants.

Pure arithmetic: nothing is decoded here. Times are on the clip's own clock, where the
first frame is at 0.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from merv.errors import SamplingError
from merv.types import VideoInfo, is_count
from merv.utils.suggest import nearest

Mode = Literal["uniform", "fps", "segment", "official"]

OFFICIAL_FRAMES = 32  # the released MERV reads these of a clip; its encoders take every k-th
NOISE_S = 1e-6  # 0.1 + 0.2 is not 0.3: a time this little before a frame still sees it


def uniform_times(duration_s: float, frames: int, start_s: float = 0.0) -> list[float]:
    """Centers of `frames` equal segments of the `duration_s` seconds that begin at `start_s`.

    >>> uniform_times(8.0, 4)
    [1.0, 3.0, 5.0, 7.0]
    """
    step_s = duration_s / _positive(frames)
    return [start_s + step_s * (i + 0.5) for i in range(frames)]


def fps_times(duration_s: float, fps: float, max_frames: int, start_s: float = 0.0) -> list[float]:
    """Centers of consecutive stretches of 1/fps seconds; `uniform_times` where that is too many.

    The last stretch may run past the end of the clip, its time does not. At least one time comes
    out, however short the clip.

    >>> fps_times(2.0, fps=2, max_frames=8)
    [0.25, 0.75, 1.25, 1.75]
    >>> fps_times(60.0, fps=2, max_frames=4)
    [7.5, 22.5, 37.5, 52.5]
    """
    frames = max(math.ceil(duration_s * fps - NOISE_S), 1)
    if frames == 1 or frames > _positive(max_frames):
        return uniform_times(duration_s, min(frames, max_frames), start_s)
    return [start_s + min((i + 0.5) / fps, duration_s) for i in range(frames)]


def segment_times(
    duration_s: float, frames: int, start_s: float = 0.0, generator: random.Random | None = None
) -> list[float]:
    """One random time in each of `frames` equal segments, for training. generator: None is Python's own.

    Idea: Temporal Segment Networks, https://arxiv.org/abs/1608.00859.

    >>> times = segment_times(8.0, 4, generator=random.Random(0))
    >>> [int(time_s // 2) for time_s in times]
    [0, 1, 2, 3]
    """
    draw = generator.random if generator else random.random
    step_s = duration_s / _positive(frames)
    return [start_s + step_s * (i + draw()) for i in range(frames)]


def official_indices(n_frames: int, frames: int, total: int = OFFICIAL_FRAMES) -> list[int]:
    """The frames of a clip of `n_frames` that the released MERV gives an encoder of `frames`.

    It reads `total` at linspace(0, n_frames − 1), cut to whole numbers, and an encoder takes
    every (total / frames)-th of them. Raises SamplingError where `frames` does not divide
    `total`: the release silently gives another number of frames there (16 for 12).

    >>> official_indices(100, 4)
    [0, 25, 51, 76]
    """
    if total % _positive(frames):
        divisors = ", ".join(str(k) for k in range(1, total + 1) if total % k == 0)
        raise SamplingError(
            f"Official sampling takes every k-th of {total} frames; {frames} does not divide {total}. "
            f"Ask for one of {divisors} frames, or use sampling='uniform'."
        )
    every = np.linspace(0, n_frames - 1, total).astype(int)
    return every[:: total // frames].tolist()


def frame_indices_at(times_s: Sequence[float], wanted_s: Sequence[float]) -> list[int]:
    """Index of the frame on screen at each wanted time: the latest that has begun by then.

    Before the first frame that is the first. `times_s` must ascend.

    >>> frame_indices_at([0.0, 0.5, 1.0], [0.1, 0.5, 0.99, 7.0])
    [0, 1, 1, 2]
    """
    return [max(bisect_right(times_s, wanted + NOISE_S) - 1, 0) for wanted in wanted_s]


@dataclass(frozen=True)
class Sampling:
    """How times are chosen, and from which part of a clip.

    mode: `uniform`, centers of equal segments, or at a rate where `fps` or the encoder gives
        one; `fps`, always at a rate; `segment`, random within equal segments; `official`,
        index for index as the released MERV.
    start_s, end_s: the part of the clip to look at; an end beyond the clip's is the clip's.
    fps: frames per second, instead of the encoder's own rate.
    seed: makes `segment` repeatable; None: Python's `random` draws, and `merv fit` from its own seed.
    total: how many frames `official` reads, of which an encoder takes every k-th; the release reads
        as many as its encoder with the most frames takes.

    Raises SamplingError for what cannot be meant, here or once the clip is known.

    >>> clip = VideoInfo("clip", 4.0, times_s=(0.0, 1.0, 2.0, 3.0), width=8, height=8)
    >>> Sampling(start_s=2.0).times(clip, frames=2)
    [2.5, 3.5]
    """

    mode: Mode = "uniform"
    start_s: float = 0.0
    end_s: float | None = None
    fps: float | None = None
    seed: int | None = None
    total: int = OFFICIAL_FRAMES

    def __post_init__(self) -> None:
        modes = get_args(Mode)
        if self.mode not in modes:
            raise SamplingError(
                f"Unknown sampling {self.mode!r}.{nearest(str(self.mode), modes)} "
                f"There are: {', '.join(modes)}."
            )
        numbers = (self.start_s, self.end_s, self.fps)
        if any(isinstance(each, str) for each in numbers):
            raise SamplingError(f"start_s, end_s and fps are numbers; got {', '.join(map(repr, numbers))}.")
        if not 0 <= self.start_s < (float("inf") if self.end_s is None else self.end_s):
            raise SamplingError(
                f"A clip range wants 0 ≤ start_s < end_s, in seconds; got start_s={self.start_s}, "
                f"end_s={self.end_s}."
            )
        if self.fps is not None and (not self.fps > 0 or self.mode in ("segment", "official")):
            raise SamplingError(
                f"fps={self.fps} does not go with sampling={self.mode!r}: it is a positive rate, for "
                "'fps' and 'uniform'."
            )
        if not is_count(self.total):
            raise SamplingError(
                f"Official sampling reads at least 1 frame of a clip; got total={self.total!r}."
            )

    def times(self, info: VideoInfo, frames: int, fps: float | None = None) -> list[float]:
        """The times that a consumer of `frames` frames wants of the clip, or of `fps` a second.

        With a rate, `frames` is the most that come out. A still has one time, 0. Raises
        SamplingError where the range does not meet the clip, or `frames` does not suit `official`.
        """
        if info.is_still:
            return [0.0]
        end_s = self._end_s(info)
        duration_s = end_s - self.start_s
        rate = self.fps or fps
        if self.mode == "official":
            return self._official(info, frames, end_s)
        if self.mode == "segment":
            return segment_times(duration_s, frames, self.start_s, self._generator())
        if rate:
            return fps_times(duration_s, rate, frames, self.start_s)
        if self.mode == "fps":
            raise SamplingError("sampling='fps' wants a rate, and none is given. Try fps=2.")
        return uniform_times(duration_s, frames, self.start_s)

    def _generator(self) -> random.Random | None:
        return None if self.seed is None else random.Random(self.seed)

    def _end_s(self, info: VideoInfo) -> float:
        if self.start_s >= info.duration_s:
            raise SamplingError(
                f"{info.name}: the range begins at start_s={self.start_s:g}, and the clip lasts "
                f"{info.duration_s:g} s. Times are seconds from the clip's first frame."
            )
        return info.duration_s if self.end_s is None else min(self.end_s, info.duration_s)

    def _official(self, info: VideoInfo, frames: int, end_s: float) -> list[float]:
        first = frame_indices_at(info.times_s, [self.start_s])[0]
        inside = [time_s for time_s in info.times_s[first:] if time_s < end_s - NOISE_S]
        return [inside[i] for i in official_indices(len(inside), frames, self.total)]


def _positive(frames: int) -> int:
    if not is_count(frames):
        raise SamplingError(f"Sampling wants a whole number of frames, at least 1; got {frames!r}.")
    return frames
