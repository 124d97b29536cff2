"""The torchcodec backend: the same frames and times as the PyAV reader, and its errors.

The tests run with a fake that has torchcodec's interface, and with torchcodec itself if it can be loaded.
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


class FakeDecoder:
    """The part of torchcodec.decoders.VideoDecoder that merv uses."""

    delay_s = 0.0  # added to the times of its frames

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
        return SimpleNamespace(data=upright, pts_seconds=float(frame.pts * frame.time_base) + self.delay_s)


def install(monkeypatch: pytest.MonkeyPatch, decoder: type | None, major: int | None = 5) -> None:
    """Put a fake torchcodec into sys.modules; with decoder None, importing it fails."""
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.ffmpeg_major_version, decoders.VideoDecoder = major, decoder
    monkeypatch.setitem(sys.modules, "torchcodec", package if decoder else None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


@pytest.fixture
def fake_decoder(monkeypatch: pytest.MonkeyPatch) -> type[FakeDecoder]:
    """An installed fake that a test may modify."""
    decoder = type("Modifiable", (FakeDecoder,), {})
    install(monkeypatch, decoder)
    return decoder


@pytest.fixture(params=["fake", "torchcodec"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`torchcodec`, first as the fake, then as itself if it can be loaded."""
    if request.param == "fake":
        install(monkeypatch, FakeDecoder)
    else:
        try:
            load_decoder()
        except MissingDependency as missing:
            pytest.skip(str(missing))
    return "torchcodec"


def read_both(source: Any, backend: str, indices: list[int] | None = None) -> list[int]:
    """Read with both backends, check that frames and times are the same, and return the burned-in indices."""
    with open_video(source) as pyav, open_video(source, backend=backend) as torchcodec:
        assert vars(torchcodec.info) == {**vars(pyav.info), "backend": "torchcodec"}
        if indices is None:
            indices = list(range(pyav.info.num_frames))
        pixels = torchcodec.read(indices)
        assert (pixels.int() - pyav.read(indices).int()).abs().max() <= 1
    return indices_of(pixels)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")],
)
def test_frames_and_times_equal_those_of_pyav(tmp_path: Path, backend: str, name: str, codec: str) -> None:
    path = make_video(tmp_path / name, 30, codec=codec, options={"g": "10", "bf": "2"}, start_s=3.0)
    assert read_both(path, backend) == list(range(30))
    assert read_both(path, backend, [29, 1, 14, 1]) == [29, 1, 14, 1]


def test_variable_frame_rate_keeps_true_times(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4", times_ms=[0, 40, 500, 540, 2000, 2040])
    assert read_both(path, backend) == list(range(6))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_video_is_upright(tmp_path: Path, backend: str, rotation: int) -> None:
    assert read_both(make_video(tmp_path / "a.mp4", rotation=rotation), backend, [5, 6]) == [5, 6]


def test_mirrored_video_is_upright(tmp_path: Path, backend: str) -> None:
    """torchcodec reads the mirroring in a display matrix as a rotation, or ignores it."""
    path = make_video(tmp_path / "a.mp4", rotation=180)
    data = path.read_bytes()
    offset = data.index(b"tkhd") + 44
    mirrored = data[: offset + 16] + (1 << 16).to_bytes(4, "big") + data[offset + 20 :]  # d: 1, not -1
    path.write_bytes(mirrored)
    read_both(path, backend, [5, 6])


def test_first_stream_is_read_not_the_largest(tmp_path: Path, backend: str) -> None:
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
def test_video_without_times_is_rejected(tmp_path: Path, backend: str, name: str) -> None:
    with pytest.raises(VideoError, match=rf"{name}: .*backend='pyav'"):
        open_video(make_video(tmp_path / name), backend=backend)


def test_cut_off_file_is_rejected(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4", 40, options={"g": "5"}, container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DamagedVideo, match=r"a\.mp4: .*backend='pyav'.*on_error='partial'"):
        open_video(path, backend=backend)


def test_damaged_file_is_rejected_or_skipped(tmp_path: Path, backend: str) -> None:
    path = overwrite(make_video(tmp_path / "a.mp4", 60, options={"g": "5"}), 0.3, 0.5)
    with pytest.raises(DamagedVideo, match=r"a\.mp4: .*backend='pyav'"):
        load_video(path, backend=backend)
    assert load_video(path, backend=backend, on_error="skip") is None


def test_error_of_torchcodec_is_reported(
    tmp_path: Path, fake_decoder: type[FakeDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeDecoder, index: int) -> None:
        raise RuntimeError("Could not push packet to decoder: Invalid data\nat SingleStreamDecoder.cpp")

    monkeypatch.setattr(fake_decoder, "get_frame_at", fail)
    with pytest.raises(DamagedVideo, match=r"push packet to decoder: Invalid data\. .*backend='pyav'"):
        load_video(make_video(tmp_path / "a.mp4"), backend="torchcodec", on_error="partial")


def test_frame_with_wrong_time_is_rejected(tmp_path: Path, fake_decoder: type[FakeDecoder]) -> None:
    fake_decoder.delay_s = 0.04
    with pytest.raises(VideoError, match=r"frame 7 .*\+0\.04 s"):
        load_video(
            make_video(tmp_path / "a.mp4"), num_frames=1, start_s=0.28, end_s=0.3, backend="torchcodec"
        )


def test_change_of_frame_size_is_rejected(tmp_path: Path, fake_decoder: type[FakeDecoder]) -> None:
    get_frame_at = fake_decoder.get_frame_at

    def smaller(self: FakeDecoder, index: int) -> SimpleNamespace:
        frame = get_frame_at(self, index)
        return SimpleNamespace(data=frame.data[:, ::2], pts_seconds=frame.pts_seconds)

    fake_decoder.get_frame_at = smaller
    with pytest.raises(VideoError, match="frame 2"):
        load_video(
            make_video(tmp_path / "a.mp4"), num_frames=1, start_s=0.08, end_s=0.1, backend="torchcodec"
        )


def test_playlist_is_rejected_before_torchcodec_opens_it(
    tmp_path: Path, fake_decoder: type[FakeDecoder]
) -> None:
    target = make_video(tmp_path / "secret.mp4")
    (tmp_path / "a.txt").write_text(f"ffconcat version 1.0\nfile '{target}'\n")
    fake_decoder.__init__ = None
    with pytest.raises(UnreadableVideo, match=r"a\.txt"):
        open_video(tmp_path / "a.txt", backend="torchcodec")


def test_error_without_torchcodec_has_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    with pytest.raises(MissingDependency, match=r"\[torchcodec\]"):
        open_video(make_video(tmp_path / "a.mp4"), backend="torchcodec")


def test_error_without_ffmpeg_has_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDecoder, major=None)
    with pytest.raises(MissingDependency, match="apt-get install ffmpeg"):
        load_video(make_video(tmp_path / "a.mp4"), backend="torchcodec", on_error="skip")


def test_torchcodec_for_another_torch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise OSError("undefined symbol: torch_x\nmore")

    monkeypatch.setitem(sys.modules, "torchcodec", Broken("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken("torchcodec.decoders"))
    with pytest.raises(MissingDependency, match=r"undefined symbol: torch_x\)"):
        load_decoder()


def test_images_do_not_need_torchcodec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with open_video(make_gif(tmp_path / "a.gif", [100, 200]), backend="torchcodec") as video:
        assert (video.info.backend, video.info.num_frames) == ("pillow", 2)


def test_multi_encoder_decodes_with_its_backend(tmp_path: Path, backend: str) -> None:
    path = make_video(tmp_path / "a.mp4")
    clips = [MultiEncoder(["fake"], grid=(4, 2, 2), backend=b).read(path) for b in ("pyav", backend)]
    assert [clip.info.backend for clip in clips] == ["pyav", "torchcodec"]
    torch.testing.assert_close(
        clips[0].frames["fake"].pixels, clips[1].frames["fake"].pixels, atol=0.02, rtol=0
    )


def test_backend_is_part_of_the_feature_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merv.features.keys.version", lambda package: f"{package} 1")
    video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    pyav, torchcodec = (MultiEncoder(["fake"], weights=None, backend=b) for b in ("pyav", "torchcodec"))
    torchcodec.encoders = pyav.encoders
    assert pyav.key(video, "fake") != torchcodec.key(video, "fake")
    assert torchcodec.backend == "torchcodec"


def test_multi_encoder_rejects_unknown_backend() -> None:
    with pytest.raises(VideoError, match=r"'decord'.* pyav, torchcodec"):
        MultiEncoder(["fake"], backend="decord")
