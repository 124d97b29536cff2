"""Decoding what is hard: stretched, deep, huge, cut, damaged, endless; benchmarks/robustness has 200 more."""

import io
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import indices_of, make_video, overwrite, picture
from PIL import Image

import merv.video.open
from merv.errors import DamagedVideo, ShapeError, UnreadableVideo
from merv.video.load import load_video
from merv.video.open import open_video, probe


@pytest.mark.parametrize(
    ("aspect", "rotation", "size"),
    [((4, 3), 0, (85, 32)), ((1, 2), 0, (64, 64)), ((4, 3), 90, (64, 43)), ((640, 639), 0, (64, 32))],
)
def test_pixels_that_are_not_square_are_scaled(
    tmp_path: Path, aspect: tuple[int, int], rotation: int, size: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "a.mp4", 6, rotation=rotation, pixel_aspect=Fraction(*aspect))
    with open_video(path) as video:
        assert (video.info.width, video.info.height) == size
        pixels = video.read([5, 2])
        assert pixels.shape == (2, 3, size[1], size[0])
        narrow = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((64, 32)) for p in pixels]
        assert [indices_of(open_video(image).read([0]))[0] for image in narrow] == [5, 2]


def test_sixteen_bit_picture_keeps_its_levels(tmp_path: Path) -> None:
    levels = picture(9)[:, :, 0].astype(np.uint16) * 257
    Image.fromarray(levels // 2).save(tmp_path / "a.png")
    with open_video(tmp_path / "a.png") as image:
        assert image.read([0]).max() == 127


def test_levels_of_no_known_range_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(np.ones((8, 8), np.float32))
    image.save(tmp_path / "a.tif")
    with open_video(tmp_path / "a.tif") as video, pytest.raises(UnreadableVideo, match="no known range"):
        video.read([0])
    with pytest.raises(ShapeError, match=r"<array>: its levels .* convert it to 8 or 16 bits"):
        open_video(image)


def test_animated_png_is_a_video(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(i)) for i in range(3)]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], duration=[50, 200, 100])
    with open_video(tmp_path / "a.png") as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.25])
        assert indices_of(video.read([2, 1])) == [2, 1]


def test_picture_for_who_cannot_animate_is_no_frame(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(i)) for i in range(4)]
    images[3].save(
        tmp_path / "a.png",
        save_all=True,
        append_images=images[:3],
        duration=[50, 200, 100],
        default_image=True,
    )
    with open_video(tmp_path / "a.png") as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.25])
        assert video.info.duration_s == pytest.approx(0.35)
        assert indices_of(video.read([2, 0, 1])) == [2, 0, 1]


def test_animation_cut_off_after_that_picture_is_named(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(i)) for i in range(3)]
    images[2].save(tmp_path / "a.png", save_all=True, append_images=images[:2], default_image=True)
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UnreadableVideo, match=r"its first picture cannot be read"):
        open_video(data[: data.index(b"fcTL") + 8])


def test_picture_object_that_is_cut_off_is_unreadable(tmp_path: Path) -> None:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(
        target, "JPEG"
    )
    image = Image.open(io.BytesIO(target.getvalue()[:5000]))
    with pytest.raises(UnreadableVideo, match="<array>: image file is truncated"):
        open_video(image)


def test_bound_on_the_size_is_max_pixels_and_not_pils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture(9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for path in (tmp_path, tmp_path / "a.png"):
        with open_video(path, max_pixels=64 * 32) as video:
            assert indices_of(video.read([0])) == [9]
    with pytest.raises(UnreadableVideo, match="more than max_pixels=2047"):
        open_video(tmp_path / "a.png", max_pixels=2047)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")


def test_bound_that_is_pils_own_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.fromarray(picture(i)) for i in range(2)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], disposal=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableVideo, match=r"the limit is PIL's own: 2 \* PIL.Image.MAX_IMAGE_PIXELS"):
        open_video(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "frames"])
def test_pictures_beyond_the_bound_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.mp4":
        make_video(path, 2)
    else:
        path.parent.mkdir(exist_ok=True)
        path = path if path.suffix else path.with_suffix(".png")
        Image.fromarray(picture(1)).save(path)
        path = tmp_path if name == "frames" else path
    assert load_video(path, num_frames=1, max_pixels=64 * 32) is not None
    with pytest.raises(UnreadableVideo, match=r"64×32 pixels, more than max_pixels=2047\. .*max_pixels=2048"):
        load_video(path, num_frames=1, max_pixels=2047)


def test_frames_that_grow_beyond_the_bound_are_damage(tmp_path: Path) -> None:
    small, large = make_video(tmp_path / "a.h264", 10), tmp_path / "b.h264"
    make_video(large, 10, rotation=0)
    data = small.read_bytes()
    with open_video(data + larger(), max_pixels=64 * 32) as video:
        assert indices_of(video.read(range(10))) == list(range(10))
        with pytest.raises(DamagedVideo):
            video.read(range(video.info.frames))


def larger() -> bytes:
    """A raw stream of pictures of twice that width and height."""
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="h264") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for index in range(5):
            rgb = picture(index).repeat(2, 0).repeat(2, 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        file.mux(stream.encode())
    return target.getvalue()


def test_size_that_changes_is_scaled_to_the_first(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.h264", 10).read_bytes() + larger()
    with open_video(data) as video:
        assert indices_of(video.read(range(video.info.frames))) == [*range(10), *range(5)]


@pytest.mark.parametrize("begins_s", [(1, 61), (61, 1)])
def test_clock_that_is_set_anew_goes_on(tmp_path: Path, begins_s: tuple[int, int]) -> None:
    parts = [
        make_video(tmp_path / f"{s}.ts", 10, container={"output_ts_offset": str(s)}).read_bytes()
        for s in begins_s
    ]
    with open_video(parts[0] + parts[1]) as video:
        assert video.info.times_s == pytest.approx([i / 25 for i in range(20)], abs=1e-4)
        assert indices_of(video.read([0, 7, 13, 19])) == [0, 7, 3, 9]


@pytest.mark.parametrize("name", ["a.mkv", "a.flv"])
def test_cut_off_is_noticed_where_the_header_tells_the_duration(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, 100, options={"g": "10"})
    data = path.read_bytes()
    with open_video(data) as video:
        assert indices_of(video.read([0, 99])) == [0, 99]
    with open_video(data[: len(data) // 2]) as video:
        with pytest.raises(DamagedVideo, match="the file is cut off"):
            video.read([0])
        assert indices_of(video.read([0], on_error="partial")) == [0]


@pytest.mark.parametrize("behind_mdat", [-4, 4])  # where a fragment's table ends; where its pictures begin
def test_fragments_that_are_cut_off_are_noticed(tmp_path: Path, behind_mdat: int) -> None:
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    path = make_video(tmp_path / "a.mp4", 30, options={"g": "10"}, container=fragments)
    data = path.read_bytes()
    with open_video(data) as video:
        assert indices_of(video.read([0, 29])) == [0, 29]
    with open_video(data[: data.rindex(b"mdat") + behind_mdat]) as video:
        with pytest.raises(DamagedVideo, match="the file is cut off, 20 frames are there"):
            video.read([0])
        assert indices_of(video.read([19], on_error="partial")) == [19]


@pytest.mark.parametrize(("name", "at"), [("a.mp4", 0.45), ("a.mkv", 0.6), ("a.avi", 0.7), ("a.ts", 0.45)])
def test_what_builds_on_damage_is_left_out(tmp_path: Path, name: str, at: float) -> None:
    path = overwrite(make_video(tmp_path / name, 100, options={"g": "20", "bf": "2"}), at, at + 0.02)
    with open_video(path) as video:
        frames = range(video.info.frames)
        salvaged = video.read(frames, on_error="partial")
        times_s = [video.info.times_s[i] for i in frames if i not in video.missing]
    assert 30 < len(salvaged) < 100
    shown = [round(time_s * 25) for time_s in times_s]
    assert indices_of(salvaged) == shown


def test_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UnreadableVideo, match=r"a\.mp4: a pipe or a device.*open file"):
        open_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["\0.mp4", "link.mp4"])
def test_path_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "link.mp4").symlink_to("link.mp4")
    with pytest.raises(UnreadableVideo, match=r"mp4: .*Check the path"):
        open_video(tmp_path / name)


class Stream(io.RawIOBase):
    """An open file that cannot be wound back."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read = read  # type: ignore[method-assign,assignment]

    def readable(self) -> bool:
        return True


def test_stream_is_read_to_its_end_and_no_further_than_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_video(tmp_path / "a.mp4").open("rb") as file, open_video(Stream(file.read)) as video:
        assert indices_of(video.read([3])) == [3]
    monkeypatch.setattr(merv.video.open, "MAX_STREAM", 1 << 21)
    with pytest.raises(UnreadableVideo, match=r"more than 2 MiB came from it. Save it as a file"):
        open_video(Stream(lambda size: bytes(size)))


def test_file_is_read_as_long_as_it_was_when_opened(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.ts", 50).read_bytes()

    class Growing(io.BytesIO):
        def seek(self, place: int, whence: int = 0) -> int:
            return super().seek(len(data), 0) if whence == 2 else super().seek(place, whence)

    with open_video(Growing(data * 20)) as video:
        assert video.info.frames < 100


def test_error_of_a_file_object_is_named() -> None:
    class Gone(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(UnreadableVideo, match=r"upload: .*Input/output error"):
        open_video(Gone(b"x"), name="upload")


def test_picture_without_a_decoder_is_no_video() -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
    with pytest.raises(UnreadableVideo, match="no video that can be decoded"):
        probe(svg)
