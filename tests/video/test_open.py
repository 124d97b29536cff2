"""Readers: the right frames at the right times, upright, from every kind of source; and their errors."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import indices_of, make_folder, make_gif, make_video, overwrite, picture
from PIL import Image

import merv.video.pyav
from merv.errors import DamagedVideo, DataError, ShapeError, UnreadableVideo, VideoError
from merv.features.keys import content_digest
from merv.video.load import load_video
from merv.video.open import open_video, probe
from merv.video.sampling import frame_indices_at


def test_frames_are_returned_in_requested_order(tmp_path: Path) -> None:
    with open_video(make_video(tmp_path / "a.mp4", 40)) as video:
        pixels = video.read([39, 3, 17, 3])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (4, 3, 32, 64)
    assert indices_of(pixels) == [39, 3, 17, 3]


def test_read_accepts_any_iterable_of_integers() -> None:
    with open_video(np.stack([picture(i) for i in range(5)])) as video:
        for indices in (torch.tensor([3, 1]), np.array([3, 1]), (i for i in (3, 1)), {3: "", 1: ""}):
            assert indices_of(video.read(indices)) == [3, 1]
        with pytest.raises(TypeError, match="float"):
            video.read([3.0])  # type: ignore[list-item]


def test_probe_returns_times_size_and_codec(tmp_path: Path) -> None:
    info = probe(make_video(tmp_path / "a.mp4", 10, fps=20))
    assert (info.width, info.height, info.codec, info.backend) == (64, 32, "h264", "pyav")
    assert info.times_s == pytest.approx([i / 20 for i in range(10)])
    assert (info.duration_s, info.fps) == pytest.approx((0.5, 20.0))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "libx264"),  # its times are in storage order
        ("a.h264", "libx264"),  # no times
        ("a.mpg", "mpeg2video"),
    ],
)
def test_b_frames_have_the_right_times(tmp_path: Path, name: str, codec: str) -> None:
    with open_video(make_video(tmp_path / name, 30, codec=codec, options={"g": "10", "bf": "2"})) as video:
        assert video.info.times_s == pytest.approx([i / 25 for i in range(30)], abs=1e-4)
        assert indices_of(video.read(range(30))) == list(range(30))
        assert indices_of(video.read([29, 1, 14])) == [29, 1, 14]


def test_variable_frame_rate_keeps_true_times(tmp_path: Path) -> None:
    times_ms = [0, 40, 500, 540, 2000, 2040]
    with open_video(make_video(tmp_path / "a.mp4", times_ms=times_ms)) as video:
        assert video.info.times_s == pytest.approx([ms / 1000 for ms in times_ms])
        at = frame_indices_at(video.info.times_s, [0.45, 1.9, 2.01])
        assert indices_of(video.read(at)) == [1, 3, 4]


def test_time_zero_is_the_first_frame(tmp_path: Path) -> None:
    info = probe(make_video(tmp_path / "a.mkv", 5, start_s=60.0))
    assert info.times_s == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_video_is_upright(tmp_path: Path, rotation: int) -> None:
    with open_video(make_video(tmp_path / "a.mp4", rotation=rotation)) as video:
        assert (video.info.rotation, video.info.width, video.info.height) == (rotation, 64, 32)
        assert indices_of(video.read([5, 6])) == [5, 6]


def test_reader_seeks_to_distant_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", 200, options={"g": "20", "bf": "2"})
    decoded = 0
    decode = merv.video.pyav.decoded

    def count(packet: av.Packet) -> list:
        nonlocal decoded
        decoded += 1
        return decode(packet)

    monkeypatch.setattr(merv.video.pyav, "decoded", count)
    with open_video(path) as video:
        assert indices_of(video.read([190, 2, 95])) == [190, 2, 95]
    assert decoded < 100


def test_fast_and_plain_passes_return_the_same_pixels(tmp_path: Path) -> None:
    indices = [1, 30, 77, 78, 150]
    with open_video(make_video(tmp_path / "a.mp4", 200, options={"g": "20", "bf": "3"})) as video:
        fast = video.read(indices)
        video._scan.by_count = True  # type: ignore[attr-defined]  # decodes everything, in order
        assert torch.equal(fast, video.read(indices))


def test_path_bytes_and_file_return_the_same_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    data = path.read_bytes()
    with path.open("rb") as file:
        for source in (path, str(path), data, bytearray(data), io.BytesIO(data), file):
            with open_video(source) as video:
                assert indices_of(video.read([0, 9])) == [0, 9]
        assert not file.closed


def test_closed_file_is_named_in_error(tmp_path: Path) -> None:
    with make_video(tmp_path / "a.mp4").open("rb") as file:
        pass
    with pytest.raises(UnreadableVideo, match=r"a\.mp4"):
        open_video(file)


def test_read_rejects_unknown_on_error(tmp_path: Path) -> None:
    with open_video(make_video(tmp_path / "a.mp4")) as video, pytest.raises(VideoError, match="'skip'"):
        video.read([0], on_error="skip")  # type: ignore[arg-type]


def test_file_opened_by_reader_is_closed(tmp_path: Path) -> None:
    with open_video(make_video(tmp_path / "a.mp4")) as video:
        pass
    assert video._file.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_borrowed_reader_stays_open(tmp_path: Path, name: str) -> None:
    path = make_gif(tmp_path / name, [50] * 20) if name == "a.gif" else make_video(tmp_path / name)
    with open_video(path) as video:
        assert probe(video) == video.info
        frames = load_video(video, num_frames=2)
        assert frames is not None
        assert indices_of(frames.pixels[0]) == [5, 15]
        assert indices_of(video.read([7])) == [7]


def test_image_is_a_still(tmp_path: Path) -> None:
    Image.fromarray(picture(7)).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", Image.fromarray(picture(7)), picture(7)):
        with open_video(source) as image:
            assert image.info.is_still
            assert image.info.duration_s == 0
            assert indices_of(image.read([0])) == [7]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90° clockwise
    Image.fromarray(np.rot90(picture(9)).copy()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with open_video(tmp_path / "a.jpg") as image:
        assert (image.info.width, image.info.height) == (64, 32)
        assert indices_of(image.read([0])) == [9]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animation_uses_its_frame_durations(tmp_path: Path, suffix: str) -> None:
    with open_video(make_gif(tmp_path / f"a.{suffix}", [50, 200, 100])) as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.25])
        assert video.info.duration_s == pytest.approx(0.35)
        assert indices_of(video.read([2, 0, 1])) == [2, 0, 1]


def test_cut_off_animation_is_damaged(tmp_path: Path) -> None:
    path = make_gif(tmp_path / "a.gif", [50, 200, 100])
    path.write_bytes(path.read_bytes()[:-60])
    with open_video(path) as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05])
        assert indices_of(video.read([0, 1], on_error="partial")) == [0, 1]
        with pytest.raises(DamagedVideo, match=r"a\.gif: .*\b2\b"):
            video.read([0, 1])
    assert load_video(path, on_error="skip") is None


@pytest.mark.parametrize("length", [20, 60, 100])
def test_animation_without_complete_frame_is_unreadable(tmp_path: Path, length: int) -> None:
    data = make_gif(tmp_path / "a.gif", [50, 200, 100]).read_bytes()[:length]
    with pytest.raises(UnreadableVideo, match=r"a\.gif: "):
        open_video(data, name="a.gif")


def test_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames", ["f2.png", "f9.png", "f10.png"])
    (folder / "notes.txt").write_text("no picture")
    with open_video(folder, fps=2) as video:
        assert video.info.times_s == (0.0, 0.5, 1.0)
        assert indices_of(video.read([0, 1, 2])) == [0, 1, 2]


def test_broken_image_in_folder_is_damage(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes(b"")
    with open_video(folder) as video:
        assert indices_of(video.read([0, 1, 2], on_error="partial")) == [0, 2]
        assert video.missing == {1}
        with pytest.raises(DamagedVideo, match=r"frames: .*\b2\b.*\b3\b"):
            video.read([0, 1, 2])


def test_broken_image_does_not_affect_later_reads(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes(b"")
    with open_video(folder) as video:
        with pytest.raises(DamagedVideo, match=r"\b2\b.*\b3\b.*2\.png"):
            video.read([0, 1, 2])
        assert indices_of(video.read([0, 2])) == [0, 2]
        assert not video.damage


def test_folder_with_different_image_sizes_is_rejected(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames", ["1.png", "2.png"])
    Image.new("RGB", (8, 8)).save(folder / "2.png")
    with open_video(folder) as video, pytest.raises(UnreadableVideo, match=r"2\.png .*8×8.* 64×32"):
        video.read([0, 1])


@pytest.mark.parametrize("channels_first", [True, False])
def test_array_and_tensor_channels_are_detected(channels_first: bool) -> None:
    array = np.stack([picture(i) for i in range(5)])
    tensor = torch.from_numpy(array)
    for source in (array, tensor):
        moved = source.transpose(0, 3, 1, 2) if source is array else source.permute(0, 3, 1, 2)
        with open_video(moved if channels_first else source, fps=5) as video:
            assert video.info.duration_s == 1.0
            assert indices_of(video.read([4, 2])) == [4, 2]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 3), np.uint8), r"\[3, 8, 3\]"),
        (np.zeros((4, 8, 8), np.uint8), r"\[4, 8, 8\]"),
        (np.array([[None] * 3] * 4), "uint8.* object"),
        (np.zeros((0, 3, 8, 8), np.uint8), r"\[0, 3, 8, 8\]"),
        (np.zeros((2, 5, 3, 8, 8), np.uint8), r"\[2, 5, 3, 8, 8\]"),
        (np.zeros((4, 3, 8, 8), np.float32), "uint8.* float32"),
    ],
)
def test_ambiguous_and_float_arrays_are_rejected(array: np.ndarray, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        open_video(array)


def test_lost_packets_are_damage_and_other_frames_are_read(tmp_path: Path) -> None:
    path = overwrite(make_video(tmp_path / "a.mp4", 100, options={"g": "10"}), 0.3, 0.4)
    with open_video(path) as video:
        with pytest.raises(DamagedVideo, match=r"a\.mp4: \d+ .*\b100\b.* on_error='partial'"):
            video.read(range(100))
        intact = video.read(range(100), on_error="partial")
    assert len(intact) == 100 - len(video.missing)
    assert 60 < len(intact) < 100
    assert indices_of(intact[:20]) == list(range(20))


def test_frames_away_from_damage_are_read_without_error(tmp_path: Path) -> None:
    path = overwrite(make_video(tmp_path / "a.mp4", 100, options={"g": "10"}), 0.5, 0.6)
    with open_video(path) as video:
        assert indices_of(video.read([0, 5, 12])) == [0, 5, 12]


def cut_off(path: Path) -> Path:
    """An mp4 with its index at the start, whose second half of frame data is missing."""
    whole = make_video(path, 100, options={"g": "10"}, container={"movflags": "faststart"})
    data = whole.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2])
    return path


def test_cut_off_file_is_damaged(tmp_path: Path) -> None:
    with open_video(cut_off(tmp_path / "a.mp4")) as video:
        assert 20 < video.info.num_frames < 80
        with pytest.raises(DamagedVideo, match=r"a\.mp4: .*\b100\b"):
            video.read([0])
        assert indices_of(video.read([0], on_error="partial")) == [0]


def test_edit_list_is_not_damage(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 100, options={"g": "10"})
    data = bytearray(path.read_bytes())
    offset = data.index(b"elst") + 12  # duration of the edit, in ms
    data[offset : offset + 4] = (2000).to_bytes(4, "big")
    path.write_bytes(data)
    with open_video(path) as video:
        assert (video.info.num_frames, video.info.duration_s) == (50, 2.0)
        assert indices_of(video.read([0, 49])) == [0, 49]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://%s\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '%s'\n"


@pytest.mark.parametrize("text", [PLAYLIST, CONCAT])
def test_file_that_refers_to_another_is_rejected(tmp_path: Path, text: bytes) -> None:
    target = make_video(tmp_path / "secret.mp4")
    (tmp_path / "a.m3u8").write_bytes(text % str(target).encode())
    with pytest.raises(UnreadableVideo, match=r"a\.m3u8"):
        open_video(tmp_path / "a.m3u8")


def test_audio_file_is_unreadable(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(UnreadableVideo, match=r"a\.wav"):
        open_video(tmp_path / "a.wav")


def test_missing_file_is_named_in_error() -> None:
    with pytest.raises(UnreadableVideo, match=r"nowhere/clip\.mp4"):
        open_video("nowhere/clip.mp4")


def test_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture(1)).save(tmp_path / "cover.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableVideo, match="''"):
        load_video("")
    with pytest.raises(UnreadableVideo, match="''"):
        content_digest("")
    assert load_video(".") is not None


def test_url_is_rejected() -> None:
    with pytest.raises(UnreadableVideo, match=r"https://example\.org/clip\.mp4"):
        open_video("https://example.org/clip.mp4")


@pytest.mark.parametrize("data", [b"", b"no video " * 99])
def test_file_without_video_is_named_in_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(UnreadableVideo, match=r"clip\.mp4: "):
        open_video(tmp_path / "clip.mp4")


def test_folder_without_images_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match=tmp_path.name):
        open_video(tmp_path)


@pytest.mark.parametrize(("indices", "message"), [([3, 5], r"\b4\b.*\b5\b"), ([-1], "-1"), ([], r"\b4\b")])
def test_indices_outside_the_clip_raise(tmp_path: Path, indices: list[int], message: str) -> None:
    with open_video(make_video(tmp_path / "a.mp4", 5)) as video, pytest.raises(IndexError, match=message):
        video.read(indices)


def test_unknown_backend_and_source_are_rejected() -> None:
    with pytest.raises(VideoError, match=r"'decord'.* pyav"):
        open_video("a.mp4", backend="decord")
    with pytest.raises(VideoError, match=r"\bint\b"):
        open_video(3)


@pytest.mark.parametrize("text", [io.StringIO("no pictures"), io.TextIOWrapper(io.BytesIO(b"none"))])
def test_text_stream_is_rejected(text: Any) -> None:
    with pytest.raises(VideoError, match=type(text).__name__):
        open_video(text)
    with pytest.raises(DataError, match=type(text).__name__):
        content_digest(text)


@pytest.mark.parametrize("fps", [0, -5, float("nan")])
def test_fps_must_be_positive(fps: float) -> None:
    with pytest.raises(VideoError, match=str(fps)):
        open_video(picture(1), fps=fps)


def test_name_is_used_in_errors() -> None:
    with pytest.raises(UnreadableVideo, match="upload 7"):
        open_video(b"", name="upload 7")
