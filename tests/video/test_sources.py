"""Sources of every kind and their clocks: edit lists, rounded times, pipes, forks, rows of datasets."""

from fractions import Fraction
from pathlib import Path

import av
import pytest
from media import indices_of, make_video

from merv.video.open import open_video, probe
from merv.video.sampling import Sampling, frame_indices_at


@pytest.mark.parametrize(("cut_off", "frames"), [(0, 40), (800, None)])
def test_edit_list_that_delays_and_trims_is_not_damage(
    tmp_path: Path, cut_off: int, frames: int | None
) -> None:
    path = make_video(
        tmp_path / "a.mp4", 60, start_s=0.2, options={"bf": "0"}, container={"movflags": "faststart"}
    )
    data = bytearray(path.read_bytes())
    first, second = (data.index(b"elst") + offset for offset in (12, 24))  # entries; durations are in ms
    assert int.from_bytes(data[first : first + 4], "big") == 200  # nothing is shown
    data[second : second + 4] = (1600).to_bytes(4, "big")
    path.write_bytes(data[: len(data) - cut_off])
    with open_video(path) as video:
        assert bool(video.damage) == bool(cut_off)
        if frames:
            assert (video.info.frames, video.info.duration_s) == (40, pytest.approx(1.6))
            assert indices_of(video.read([0, 39])) == [0, 39]


RATES = [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, Fraction(60000, 1001), 60, 120]


def constant_rate(path: Path, rate: Fraction | int, frames: int = 121, first: int = 0) -> Path:
    """Write frames from number `first` on, as a cut of a longer video."""
    codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, width=16, height=16, pix_fmt="yuv420p")
        for index in range(frames):
            frame = av.VideoFrame(16, 16, "yuv420p")
            frame.pts, frame.time_base = first + index, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".ts", ".mp4"])
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.2f}")
@pytest.mark.parametrize("first", [0, 7])
def test_frame_n_is_on_screen_at_n_over_rate(
    tmp_path: Path, rate: Fraction | int, suffix: str, first: int
) -> None:
    info = probe(constant_rate(tmp_path / f"a{suffix}", rate, first=first))
    assert info.frames == 121
    times_s = [float(n / rate) for n in range(121)]
    centers_s = [float((n + Fraction(1, 2)) / rate) for n in range(121)]
    assert frame_indices_at(info.times_s, times_s, info.time_error_s) == list(range(121))
    assert frame_indices_at(info.times_s, centers_s, info.time_error_s) == list(range(121))
    assert info.time_error_s <= 0.001


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_copy_keeps_the_rounding_of_its_original(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"b{suffix}"
    with av.open(str(constant_rate(tmp_path / "a.mkv", 30))) as original, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    info = probe(path)
    indices = frame_indices_at(info.times_s, [n / 30 for n in range(121)], info.time_error_s)
    assert indices == list(range(121))


def test_range_of_rounded_times_has_the_frames_of_exact_ones(tmp_path: Path) -> None:
    sampling = Sampling("released", start_s=31 / 30, end_s=63 / 30)
    info = probe(constant_rate(tmp_path / "a.mkv", 30))
    assert sampling.times(info, 32) == list(info.times_s[31:63])


def test_rounding_of_uneven_times_is_that_of_the_clock(tmp_path: Path) -> None:
    """Slides of 2 and 3 s have a common divisor of 1 s, which is not a clock."""
    info = probe(make_video(tmp_path / "a.mp4", times_ms=[0, 2000, 5000]))
    assert frame_indices_at(info.times_s, [1.999, 2.0, 4.999], info.time_error_s) == [0, 1, 1]


def test_times_of_a_constant_rate_are_exact(tmp_path: Path) -> None:
    """The clock of an AVI counts frames: half a tick would be half a frame."""
    info = probe(constant_rate(tmp_path / "a.avi", 30))
    assert info.time_error_s == 0
