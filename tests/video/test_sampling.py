"""Sampling: the times of one encoder, computed from the properties of the clip."""

import random

import pytest

from merv.errors import SamplingError
from merv.types import VideoInfo
from merv.video.sampling import (
    Sampling,
    fps_times,
    frame_indices_at,
    released_indices,
    segment_times,
    uniform_times,
)


def clip(frames: int = 100, fps: float = 10.0) -> VideoInfo:
    times_s = tuple(i / fps for i in range(frames))
    return VideoInfo("clip.mp4", frames / fps, times_s, width=64, height=32)


STILL = VideoInfo("photo.png", 0.0, (0.0,), width=64, height=32)


def test_uniform_times_are_centers_of_equal_segments() -> None:
    assert uniform_times(8.0, 4, start_s=100.0) == [101.0, 103.0, 105.0, 107.0]


def test_fps_times_are_one_per_period() -> None:
    assert fps_times(3.0, fps=1, max_frames=8) == [0.5, 1.5, 2.5]


def test_fps_times_include_the_last_partial_period() -> None:
    assert fps_times(4.9, fps=1, max_frames=8) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert fps_times(2.2, fps=1, max_frames=8, start_s=1.0) == [1.5, 2.5, 3.2]


def test_fps_times_tolerate_float_rounding() -> None:
    assert len(fps_times(0.1 + 0.2, fps=10, max_frames=8)) == 3
    assert len(fps_times(0.3, fps=10, max_frames=8)) == 3


def test_fps_times_above_max_frames_are_uniform() -> None:
    assert fps_times(100.0, fps=2, max_frames=4) == uniform_times(100.0, 4)


def test_fps_times_has_at_least_one_time() -> None:
    assert fps_times(0.2, fps=1, max_frames=8) == [0.1]


def test_segment_times_are_one_per_segment() -> None:
    times = segment_times(8.0, 8, start_s=1.0, generator=random.Random(3))
    assert [int(time_s - 1.0) for time_s in times] == list(range(8))


def test_released_is_every_kth_of_32() -> None:
    indices = released_indices(300, 32)
    assert (indices[0], indices[1], indices[-1]) == (0, 9, 299)  # 299 / 31 = 9.6, rounded down
    assert released_indices(300, 16) == indices[::2]


def test_released_repeats_frames_of_short_clip() -> None:
    assert released_indices(2, 32) == [0] * 31 + [1]


def test_released_rejects_counts_that_do_not_divide_total() -> None:
    with pytest.raises(SamplingError, match=r"\b32\b.*\b12\b.* 1, 2, 4, 8, 16, 32\b"):
        released_indices(300, 12)


def test_frame_indices_at_is_the_latest_started_frame() -> None:
    frame_times_s = [0.0, 0.04, 2.0, 2.04]
    assert frame_indices_at(frame_times_s, [0.03, 0.04, 1.99, 2.0, 9.0, -1.0]) == [0, 1, 1, 2, 3, 0]


def test_frame_indices_at_tolerates_float_rounding() -> None:
    assert frame_indices_at([0.0, 0.1 + 0.2], [0.3]) == [1]


def test_range_limits_the_times() -> None:
    times = Sampling(start_s=2.0, end_s=4.0).times(clip(), 2)
    assert times == [2.5, 3.5]


def test_end_beyond_clip_is_the_end_of_the_clip() -> None:
    assert Sampling(start_s=8.0, end_s=99.0).times(clip(), 2) == [8.5, 9.5]


def test_range_outside_clip_raises() -> None:
    with pytest.raises(SamplingError, match=r"clip\.mp4: .*start_s=12,.* 10 s"):
        Sampling(start_s=12.0).times(clip(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "unifrom"}, "'unifrom'.* 'uniform'"),
        ({"start_s": -1.0}, "start_s=-1.0"),
        ({"start_s": 3.0, "end_s": 3.0}, "start_s=3.0, end_s=3.0"),
        ({"start_s": float("nan")}, "start_s=nan"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"mode": "released", "fps": 2.0}, "'released'.* fps=2.0"),
    ],
)
def test_invalid_options_are_rejected_at_construction(options: dict, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Sampling(**options)


def test_fps_of_sampling_overrides_fps_of_encoder() -> None:
    assert len(Sampling().times(clip(), 32, fps=1)) == 10
    assert len(Sampling(fps=2).times(clip(), 32, fps=1)) == 20


def test_fps_mode_without_fps_raises() -> None:
    with pytest.raises(SamplingError, match="fps=2"):
        Sampling("fps").times(clip(), 4)


@pytest.mark.parametrize("frames", [0, -1, 2.5, "4"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling("fps", fps=2.0), Sampling("segment")])
def test_num_frames_must_be_a_positive_integer(sampling, frames) -> None:
    with pytest.raises(SamplingError, match=f"got {frames!r}"):
        sampling.times(clip(), frames)


@pytest.mark.parametrize("total", [0, -32, 2.5])
def test_released_total_must_be_a_positive_integer(total) -> None:
    with pytest.raises(SamplingError, match=f"got {total}"):
        Sampling("released", total=total)


def test_seed_makes_random_times_repeatable() -> None:
    first, again = (Sampling("segment", seed=1).times(clip(), 8) for _ in range(2))
    assert first == again != Sampling("segment", seed=2).times(clip(), 8)


def test_released_times_are_frame_times() -> None:
    info = clip(300, fps=30.0)
    assert Sampling("released").times(info, 16) == [info.times_s[i] for i in released_indices(300, 16)]


def test_released_uses_only_frames_in_range() -> None:
    info = clip(100, fps=10.0)
    times = Sampling("released", start_s=2.0, end_s=4.0).times(info, 32)
    assert (times[0], times[-1]) == (2.0, info.times_s[39])


def test_still_has_one_time_in_every_mode() -> None:
    for sampling in (Sampling(), Sampling("released"), Sampling("segment"), Sampling(start_s=5.0)):
        assert sampling.times(STILL, 16) == [0.0]
