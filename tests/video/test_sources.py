"""Sources of every kind and their clocks: edit lists, rounded times, pipes, forks, rows of datasets."""

from pathlib import Path

import pytest
from media import indices_of, make_video

from merv.video.open import open_video


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
