"""load_video: its options, and what it does with unreadable and damaged files."""

import logging
from pathlib import Path

import pytest
import torch
from media import indices_of, make_video, overwrite, picture

from merv.errors import DamagedVideo, SamplingError, UnreadableVideo, VideoError
from merv.video.load import load_video
from merv.video.sampling import Sampling, released_indices


def test_times_are_those_of_the_returned_frames(tmp_path: Path) -> None:
    frames = load_video(
        make_video(tmp_path / "a.mp4", times_ms=[0, 40, 500, 540, 960]), num_frames=4, end_s=0.96
    )
    assert frames is not None
    assert indices_of(frames.pixels[0]) == [1, 1, 3, 3]
    assert frames.times_s.tolist() == [pytest.approx([0.04, 0.04, 0.54, 0.54])]
    assert frames.pixels.shape == (1, 4, 3, 32, 64)
    assert frames.mask.all()


def test_released_sampling_returns_released_indices(tmp_path: Path) -> None:
    frames = load_video(make_video(tmp_path / "a.mp4", 100), num_frames=16, sampling="released")
    assert frames is not None
    assert indices_of(frames.pixels[0]) == released_indices(100, 16)


def test_range_and_fps_select_frames(tmp_path: Path) -> None:
    frames = load_video(make_video(tmp_path / "a.mp4", 100), fps=5, start_s=1.0, end_s=2.0)
    assert frames is not None
    assert indices_of(frames.pixels[0]) == [27, 32, 37, 42, 47]


def test_short_video_repeats_frames(tmp_path: Path) -> None:
    frames = load_video(make_video(tmp_path / "a.mp4", 2), num_frames=4)
    assert frames is not None
    assert indices_of(frames.pixels[0]) == [0, 0, 1, 1]


def test_still_has_one_frame() -> None:
    frames = load_video(picture(3), num_frames=32)
    assert frames is not None
    assert (frames.pixels.shape[1], frames.times_s.tolist()) == (1, [[0.0]])


def test_sampling_object_excludes_other_options() -> None:
    with pytest.raises(SamplingError, match="fps"):
        load_video(picture(3), sampling=Sampling(), fps=2)


def test_skip_logs_and_returns_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="merv"):
        assert load_video(tmp_path / "gone.mp4", on_error="skip") is None
    assert "gone.mp4" in caplog.text


def test_invalid_range_is_not_skipped(tmp_path: Path) -> None:
    with pytest.raises(SamplingError):
        load_video(make_video(tmp_path / "a.mp4"), start_s=9.0, on_error="skip")


def test_damaged_video_raises_or_returns_intact_frames(tmp_path: Path) -> None:
    path = overwrite(make_video(tmp_path / "a.mp4", 100, options={"g": "10"}), 0.3, 0.4)
    with pytest.raises(DamagedVideo, match=r"a\.mp4"):
        load_video(path, num_frames=50)
    frames = load_video(path, num_frames=50, on_error="partial")
    assert frames is not None
    assert frames.pixels.shape[1] == frames.times_s.shape[1] == frames.mask.sum() < 50
    assert torch.all(frames.times_s.diff() > 0)


def test_partial_raises_if_nothing_is_readable(tmp_path: Path) -> None:
    path = overwrite(make_video(tmp_path / "a.mp4", 20), 0.02, 0.98)
    with pytest.raises(UnreadableVideo, match=r"a\.mp4"):
        load_video(path, on_error="partial")


def test_unknown_on_error_is_rejected() -> None:
    with pytest.raises(VideoError, match="'ignore'"):
        load_video(picture(3), on_error="ignore")  # type: ignore[arg-type]
