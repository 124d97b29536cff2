"""torchcodec as decoding backend: the frames, times and errors of PyAV's reader.

Everything runs with a stand-in that has torchcodec's interface and, where torchcodec and FFmpeg's
libraries are there, with torchcodec itself.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import pytest
import torch
from media import indices_of, make_gif, make_video, overwrite

from merv import MultiEncoder, load_video
from merv.errors import DamagedVideo, MissingDependency, UnreadableVideo, VideoError
from merv.video.open import open_video
from merv.video.torchcodec import load_decoder


class StandIn:
    """What is used of torchcodec.decoders.VideoDecoder: frames by index into the list that it gets."""

    late_s = 0.0  # how much too late its frames come

    def __init__(self, source: Any, *, stream_index: int, custom_frame_mappings: str, **options: Any) -> None:
        assert options == {"num_ffmpeg_threads": 1, "device": "cpu"}
        assert source.tell() == 0
        with av.open(source) as container:
            self.frames = {frame.pts: frame for frame in container.decode(container.streams[stream_index])}
        self.all_pts = [frame["pts"] for frame in json.loads(custom_frame_mappings)["frames"]]
        self.metadata = SimpleNamespace(rotation=float(self.frames[self.all_pts[0]].rotation) or None)

    def get_frame_at(self, index: int) -> SimpleNamespace:
        frame = self.frames[self.all_pts[index]]
        data = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        upright = torch.rot90(data, round((self.metadata.rotation or 0) / 90), (1, 2))
        return SimpleNamespace(data=upright, pts_seconds=float(frame.pts * frame.time_base) + self.late_s)


def install(monkeypatch: pytest.MonkeyPatch, decoder: type | None, major: int | None = 5) -> None:
    """Put a torchcodec into sys.modules; without a decoder, none can be imported."""
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.ffmpeg_major_version, decoders.VideoDecoder = major, decoder
    monkeypatch.setitem(sys.modules, "torchcodec", package if decoder else None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """A stand-in that a test may spoil."""
    decoder = type("Own", (StandIn,), {})
    install(monkeypatch, decoder)
    return decoder


@pytest.fixture(params=["stand-in", "torchcodec"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`torchcodec`, first as the stand-in, then as itself if it loads."""
    if request.param == "stand-in":
        install(monkeypatch, StandIn)
    else:
        try:
            load_decoder()
        except MissingDependency as missing:
            pytest.skip(str(missing))
    return "torchcodec"


def read_both(source: Any, backend: str, indices: list[int] | None = None) -> list[int]:
    """The indices that pictures carry, after they and all times turned out to be those of PyAV."""
    with open_video(source) as ours, open_video(source, backend=backend) as theirs:
        assert theirs.info.backend == "torchcodec"
        assert vars(theirs.info) == {**vars(ours.info), "backend": "torchcodec"}
        wanted = list(range(ours.info.frames)) if indices is None else indices
        pixels = theirs.read(wanted)
        assert (pixels.int() - ours.read(wanted).int()).abs().max() <= 1
    return indices_of(pixels)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")],
)
def test_frames_and_times_are_those_of_pyav(tmp_path: Path, backend: str, name: str, codec: str) -> None:
    path = make_video(tmp_path / name, 30, codec=codec, options={"g": "10", "bf": "2"}, start_s=3.0)
    assert read_both(path, backend) == list(range(30))
    assert read_both(path, backend, [29, 1, 14, 1]) == [29, 1, 14, 1]


def test_variable_frame_rate_keeps_its_times(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4", times_ms=[0, 40, 500, 540, 2000, 2040])
    assert read_both(path, backend) == list(range(6))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_video_comes_upright(tmp_path: Path, backend: str, rotation: int) -> None:
    assert read_both(make_video(tmp_path / "a.mp4", rotation=rotation), backend, [5, 6]) == [5, 6]


def test_mirrored_video_comes_upright(tmp_path: Path, backend: str) -> None:
    """torchcodec takes the mirroring of a display matrix for a turn, or leaves it out."""
    path = make_video(tmp_path / "a.mp4", rotation=180)
    data = path.read_bytes()
    place = data.index(b"tkhd") + 44
    sideways = data[: place + 16] + (1 << 16).to_bytes(4, "big") + data[place + 20 :]  # d: 1, not -1
    path.write_bytes(sideways)
    read_both(path, backend, [5, 6])


def test_the_stream_is_that_of_pyav_not_the_largest(tmp_path: Path, backend: str) -> None:
    small = make_video(tmp_path / "a.mp4", options={"crf": "40"})
    large = make_video(tmp_path / "b.mp4", options={"crf": "0"}, rotation=180)  # stored upside down
    with av.open(str(tmp_path / "c.mp4"), "w") as both, av.open(str(small)) as a, av.open(str(large)) as b:
        streams = [both.add_stream_from_template(source.streams.video[0]) for source in (a, b)]
        for source, stream in zip((a, b), streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    both.mux(packet)
    assert read_both(tmp_path / "c.mp4", backend, [0, 19]) == [0, 19]


def test_bytes_and_open_files_are_read(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4")
    assert read_both(path.read_bytes(), backend, [3, 17]) == [3, 17]
    with path.open("rb") as file:
        assert read_both(file, backend, [3, 17]) == [3, 17]
        assert not file.closed


@pytest.mark.parametrize("name", ["a.avi", "a.h264"])
def test_frames_without_times_are_refused(tmp_path: Path, backend: str, name: str) -> None:
    with pytest.raises(VideoError, match=r"carry no times of their own.*backend='pyav'"):
        open_video(make_video(tmp_path / name), backend=backend)


def test_a_cut_off_file_is_refused(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4", 40, options={"g": "5"}, container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DamagedVideo, match=r"a\.mp4: .*backend='pyav'.*on_error='partial'"):
        open_video(path, backend=backend)


def test_a_damaged_file_is_refused_and_may_be_skipped(tmp_path: Path, backend: str) -> None:
    path = overwrite(make_video(tmp_path / "a.mp4", 60, options={"g": "5"}), 0.3, 0.5)
    with pytest.raises(DamagedVideo, match="backend='pyav' may"):
        load_video(path, backend=backend)
    assert load_video(path, backend=backend, on_error="skip") is None


def test_an_error_of_torchcodec_is_told(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: StandIn, index: int) -> None:
        raise RuntimeError("Could not push packet to decoder: Invalid data\nat SingleStreamDecoder.cpp")

    monkeypatch.setattr(stand_in, "get_frame_at", fail)
    with pytest.raises(DamagedVideo, match=r"push packet to decoder: Invalid data\. backend='pyav'"):
        load_video(make_video(tmp_path / "a.mp4"), backend="torchcodec", on_error="partial")


def test_a_frame_of_another_time_is_refused(tmp_path: Path, stand_in: type[StandIn]) -> None:
    stand_in.late_s = 0.04
    with pytest.raises(VideoError, match=r"frame 7 came with a time that is \+0.04 s off"):
        load_video(
            make_video(tmp_path / "a.mp4"), num_frames=1, start_s=0.28, end_s=0.3, backend="torchcodec"
        )


def test_pictures_that_change_in_size_are_refused(tmp_path: Path, stand_in: type[StandIn]) -> None:
    first = stand_in.get_frame_at

    def smaller(self: StandIn, index: int) -> SimpleNamespace:
        frame = first(self, index)
        return SimpleNamespace(data=frame.data[:, ::2], pts_seconds=frame.pts_seconds)

    stand_in.get_frame_at = smaller
    with pytest.raises(VideoError, match="its pictures change in size at frame 2"):
        load_video(
            make_video(tmp_path / "a.mp4"), num_frames=1, start_s=0.08, end_s=0.1, backend="torchcodec"
        )


def test_playlists_are_refused_before_torchcodec_sees_them(tmp_path: Path, stand_in: type[StandIn]) -> None:
    target = make_video(tmp_path / "secret.mp4")
    (tmp_path / "a.txt").write_text(f"ffconcat version 1.0\nfile '{target}'\n")
    stand_in.__init__ = None
    with pytest.raises(UnreadableVideo, match=r"a\.txt"):
        open_video(tmp_path / "a.txt", backend="torchcodec")


def test_without_torchcodec_the_error_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    with pytest.raises(MissingDependency, match=r'pip install "merv\[torchcodec\]"'):
        open_video(make_video(tmp_path / "a.mp4"), backend="torchcodec")


def test_without_ffmpeg_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn, major=None)
    with pytest.raises(
        MissingDependency, match=r"finds no shared libraries of FFmpeg.*apt-get install ffmpeg"
    ):
        load_video(make_video(tmp_path / "a.mp4"), backend="torchcodec", on_error="skip")


def test_a_torchcodec_of_another_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise OSError("undefined symbol: torch_x\nmore")

    monkeypatch.setitem(sys.modules, "torchcodec", Broken("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken("torchcodec.decoders"))
    with pytest.raises(MissingDependency, match=r"undefined symbol: torch_x. Its version has to fit"):
        load_decoder()


def test_pictures_need_no_torchcodec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with open_video(make_gif(tmp_path / "a.gif", [100, 200]), backend="torchcodec") as video:
        assert (video.info.backend, video.info.frames) == ("pillow", 2)


def test_a_multi_encoder_decodes_with_its_backend(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4")
    clips = [MultiEncoder(["fake"], grid=(4, 2, 2), backend=b).read(path) for b in ("pyav", backend)]
    assert [clip.info.backend for clip in clips] == ["pyav", "torchcodec"]
    torch.testing.assert_close(
        clips[0].frames["fake"].pixels, clips[1].frames["fake"].pixels, atol=0.02, rtol=0
    )


def test_the_backend_is_part_of_what_is_stored_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merv.features.reader.version", lambda package: f"{package} 1")
    video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    ours, theirs = (MultiEncoder(["fake"], weights=None, backend=b) for b in ("pyav", "torchcodec"))
    theirs.encoders = ours.encoders
    assert ours.key(video, "fake") != theirs.key(video, "fake")
    assert theirs.backend == "torchcodec"


def test_a_multi_encoder_refuses_an_unknown_backend() -> None:
    with pytest.raises(VideoError, match=r"'decord'. There are: pyav, torchcodec"):
        MultiEncoder(["fake"], backend="decord")
