"""Sampling: times of one consumer, from what is known of the clip."""

import random

import pytest

from merv.errors import SamplingError
from merv.types import VideoInfo
from merv.video.sampling import (
    Sampling,
    fps_times,
    frame_indices_at,
    official_indices,
    segment_times,
    uniform_times,
)


def clip(frames: int = 100, fps: float = 10.0) -> VideoInfo:
    times_s = tuple(i / fps for i in range(frames))
    return VideoInfo("clip.mp4", frames / fps, times_s, width=64, height=32)


STILL = VideoInfo("photo.png", 0.0, (0.0,), width=64, height=32)


def test_uniform_times_are_centres_of_equal_segments() -> None:
    assert uniform_times(8.0, 4, start_s=100.0) == [101.0, 103.0, 105.0, 107.0]


def test_rate_gives_one_time_per_period() -> None:
    assert fps_times(3.0, fps=1, max_frames=8) == [0.5, 1.5, 2.5]


def test_rate_looks_at_the_tail_too() -> None:
    assert fps_times(4.9, fps=1, max_frames=8) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert fps_times(2.2, fps=1, max_frames=8, start_s=1.0) == [1.5, 2.5, 3.2]


def test_rate_does_not_lose_or_add_a_frame_by_float_noise() -> None:
    assert len(fps_times(0.1 + 0.2, fps=10, max_frames=8)) == 3
    assert len(fps_times(0.3, fps=10, max_frames=8)) == 3


def test_rate_with_too_many_frames_becomes_uniform() -> None:
    assert fps_times(100.0, fps=2, max_frames=4) == uniform_times(100.0, 4)


def test_rate_gives_at_least_one_frame() -> None:
    assert fps_times(0.2, fps=1, max_frames=8) == [0.1]


def test_segment_times_lie_one_in_each_segment() -> None:
    times = segment_times(8.0, 8, start_s=1.0, generator=random.Random(3))
    assert [int(time_s - 1.0) for time_s in times] == list(range(8))


def test_official_is_every_kth_of_32() -> None:
    every = official_indices(300, 32)
    assert (every[0], every[1], every[-1]) == (0, 9, 299)  # 299 / 31 = 9.6, cut
    assert official_indices(300, 16) == every[::2]


def test_official_repeats_frames_of_a_short_clip() -> None:
    assert official_indices(2, 32) == [0] * 31 + [1]


def test_official_refuses_what_the_release_gets_wrong() -> None:
    with pytest.raises(SamplingError, match=r"12 does not divide 32. Ask for one of 1, 2, 4, 8, 16, 32"):
        official_indices(300, 12)


def test_on_screen_is_the_latest_frame_that_has_begun() -> None:
    uneven = [0.0, 0.04, 2.0, 2.04]
    assert frame_indices_at(uneven, [0.03, 0.04, 1.99, 2.0, 9.0, -1.0]) == [0, 1, 1, 2, 3, 0]


def test_on_screen_forgives_float_noise() -> None:
    assert frame_indices_at([0.0, 0.1 + 0.2], [0.3]) == [1]


def test_range_limits_the_times() -> None:
    times = Sampling(start_s=2.0, end_s=4.0).times(clip(), 2)
    assert times == [2.5, 3.5]


def test_end_beyond_the_clip_is_its_end() -> None:
    assert Sampling(start_s=8.0, end_s=99.0).times(clip(), 2) == [8.5, 9.5]


def test_range_outside_the_clip_is_an_error_that_names_it() -> None:
    with pytest.raises(SamplingError, match=r"clip.mp4: the range begins at start_s=12, .* lasts 10 s"):
        Sampling(start_s=12.0).times(clip(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "unifrom"}, "Did you mean 'uniform'"),
        ({"start_s": -1.0}, "0 ≤ start_s < end_s"),
        ({"start_s": 3.0, "end_s": 3.0}, "0 ≤ start_s < end_s"),
        ({"start_s": float("nan")}, "0 ≤ start_s < end_s"),
        ({"fps": 0.0}, "positive rate"),
        ({"mode": "official", "fps": 2.0}, "does not go with sampling='official'"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Sampling(**options)


def test_encoders_rate_is_used_and_the_users_wins() -> None:
    assert len(Sampling().times(clip(), 32, fps=1)) == 10
    assert len(Sampling(fps=2).times(clip(), 32, fps=1)) == 20


def test_fps_mode_without_a_rate_says_what_to_type() -> None:
    with pytest.raises(SamplingError, match="Try fps=2"):
        Sampling("fps").times(clip(), 4)


@pytest.mark.parametrize("frames", [0, -1, 2.5, "4"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling("fps", fps=2.0), Sampling("segment")])
def test_frames_are_a_whole_number(sampling, frames) -> None:
    with pytest.raises(SamplingError, match=f"at least 1; got {frames!r}"):
        sampling.times(clip(), frames)


@pytest.mark.parametrize("total", [0, -32, 2.5])
def test_official_reads_at_least_one_frame(total) -> None:
    with pytest.raises(SamplingError, match=f"at least 1 frame of a clip; got total={total}"):
        Sampling("official", total=total)


@pytest.mark.parametrize("option", ["start_s", "end_s", "fps"])
def test_times_and_rates_are_numbers(option) -> None:
    with pytest.raises(SamplingError, match=r"start_s, end_s and fps are numbers; got .*'1'"):
        Sampling(**{option: "1"})


def test_seed_repeats_random_times() -> None:
    first, again = (Sampling("segment", seed=1).times(clip(), 8) for _ in range(2))
    assert first == again != Sampling("segment", seed=2).times(clip(), 8)


def test_official_times_are_those_of_its_frames() -> None:
    info = clip(300, fps=30.0)
    assert Sampling("official").times(info, 16) == [info.times_s[i] for i in official_indices(300, 16)]


def test_official_within_a_range_counts_the_frames_inside() -> None:
    info = clip(100, fps=10.0)
    times = Sampling("official", start_s=2.0, end_s=4.0).times(info, 32)
    assert (times[0], times[-1]) == (2.0, info.times_s[39])


def test_still_has_one_time_whatever_is_asked() -> None:
    for sampling in (Sampling(), Sampling("official"), Sampling("segment"), Sampling(start_s=5.0)):
        assert sampling.times(STILL, 16) == [0.0]
