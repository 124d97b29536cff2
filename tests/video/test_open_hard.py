"""Hard inputs: non-square pixels, 16 bits, huge, cut off, damaged or endless files.

benchmarks/robustness has 200 more.
"""

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
def test_non_square_pixels_are_scaled(
    tmp_path: Path, aspect: tuple[int, int], rotation: int, size: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "a.mp4", 6, rotation=rotation, pixel_aspect=Fraction(*aspect))
    with open_video(path) as video:
        assert (video.info.width, video.info.height) == size
        pixels = video.read([5, 2])
        assert pixels.shape == (2, 3, size[1], size[0])
        narrow = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((64, 32)) for p in pixels]
        assert [indices_of(open_video(image).read([0]))[0] for image in narrow] == [5, 2]


def test_sixteen_bit_image_keeps_its_levels(tmp_path: Path) -> None:
    levels = picture(9)[:, :, 0].astype(np.uint16) * 257
    Image.fromarray(levels // 2).save(tmp_path / "a.png")
    with open_video(tmp_path / "a.png") as image:
        assert image.read([0]).max() == 127


def test_float_image_is_rejected(tmp_path: Path) -> None:
    image = Image.fromarray(np.ones((8, 8), np.float32))
    image.save(tmp_path / "a.tif")
    with open_video(tmp_path / "a.tif") as video, pytest.raises(UnreadableVideo, match=r"a\.tif"):
        video.read([0])
    with pytest.raises(ShapeError, match="<array>"):
        open_video(image)


def test_animated_png_is_a_video(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(i)) for i in range(3)]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], duration=[50, 200, 100])
    with open_video(tmp_path / "a.png") as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.25])
        assert indices_of(video.read([2, 1])) == [2, 1]


def test_default_image_of_apng_is_not_a_frame(tmp_path: Path) -> None:
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


def test_apng_cut_off_after_default_image_is_unreadable(tmp_path: Path) -> None:
    images = [Image.fromarray(picture(i)) for i in range(3)]
    images[2].save(tmp_path / "a.png", save_all=True, append_images=images[:2], default_image=True)
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UnreadableVideo, match="bytes>: "):
        open_video(data[: data.index(b"fcTL") + 8])


def test_truncated_pil_image_is_unreadable(tmp_path: Path) -> None:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(
        target, "JPEG"
    )
    image = Image.open(io.BytesIO(target.getvalue()[:5000]))
    with pytest.raises(UnreadableVideo, match="<array>"):
        open_video(image)


def test_max_pixels_is_the_limit_not_pils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture(9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for path in (tmp_path, tmp_path / "a.png"):
        with open_video(path, max_pixels=64 * 32) as video:
            assert indices_of(video.read([0])) == [9]
    with pytest.raises(UnreadableVideo, match="max_pixels=2047"):
        open_video(tmp_path / "a.png", max_pixels=2047)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")


def test_limit_of_pil_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.fromarray(picture(i)) for i in range(2)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], disposal=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableVideo, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
        open_video(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "frames"])
def test_frames_above_max_pixels_are_rejected(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.mp4":
        make_video(path, 2)
    else:
        path.parent.mkdir(exist_ok=True)
        path = path if path.suffix else path.with_suffix(".png")
        Image.fromarray(picture(1)).save(path)
        path = tmp_path if name == "frames" else path
    assert load_video(path, num_frames=1, max_pixels=64 * 32) is not None
    with pytest.raises(UnreadableVideo, match=r"64×32 .*max_pixels=2047\. .*max_pixels=2048"):
        load_video(path, num_frames=1, max_pixels=2047)


def test_later_frames_above_max_pixels_are_damage(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.h264", 10).read_bytes()
    with open_video(data + larger_stream(), max_pixels=64 * 32) as video:
        assert indices_of(video.read(range(10))) == list(range(10))
        with pytest.raises(DamagedVideo):
            video.read(range(video.info.num_frames))


def larger_stream() -> bytes:
    """A raw H.264 stream of frames with twice the width and height of those of `make_video`."""
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


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.h264", 10).read_bytes() + larger_stream()
    with open_video(data) as video:
        assert indices_of(video.read(range(video.info.num_frames))) == [*range(10), *range(5)]


@pytest.mark.parametrize("starts_s", [(1, 61), (61, 1)])
def test_time_continues_when_clock_is_reset(tmp_path: Path, starts_s: tuple[int, int]) -> None:
    parts = [
        make_video(tmp_path / f"{s}.ts", 10, container={"output_ts_offset": str(s)}).read_bytes()
        for s in starts_s
    ]
    with open_video(parts[0] + parts[1]) as video:
        assert video.info.times_s == pytest.approx([i / 25 for i in range(20)], abs=1e-4)
        assert indices_of(video.read([0, 7, 13, 19])) == [0, 7, 3, 9]


@pytest.mark.parametrize("name", ["a.mkv", "a.flv"])
def test_cut_off_file_is_damaged_if_header_has_duration(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, 100, options={"g": "10"})
    data = path.read_bytes()
    with open_video(data) as video:
        assert indices_of(video.read([0, 99])) == [0, 99]
    with open_video(data[: len(data) // 2]) as video:
        with pytest.raises(DamagedVideo, match="bytes>: "):
            video.read([0])
        assert indices_of(video.read([0], on_error="partial")) == [0]


@pytest.mark.parametrize(
    "behind_mdat", [-4, 4]
)  # after the table of a fragment; after the start of its frame data
def test_cut_off_fragmented_mp4_is_damaged(tmp_path: Path, behind_mdat: int) -> None:
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    path = make_video(tmp_path / "a.mp4", 30, options={"g": "10"}, container=fragments)
    data = path.read_bytes()
    with open_video(data) as video:
        assert indices_of(video.read([0, 29])) == [0, 29]
    with open_video(data[: data.rindex(b"mdat") + behind_mdat]) as video:
        with pytest.raises(DamagedVideo, match=r"\b20\b"):
            video.read([0])
        assert indices_of(video.read([19], on_error="partial")) == [19]


@pytest.mark.parametrize(("name", "at"), [("a.mp4", 0.45), ("a.mkv", 0.6), ("a.avi", 0.7), ("a.ts", 0.45)])
def test_frames_that_build_on_damage_are_left_out(tmp_path: Path, name: str, at: float) -> None:
    path = overwrite(make_video(tmp_path / name, 100, options={"g": "20", "bf": "2"}), at, at + 0.02)
    with open_video(path) as video:
        frames = range(video.info.num_frames)
        intact = video.read(frames, on_error="partial")
        times_s = [video.info.times_s[i] for i in frames if i not in video.missing]
    assert 30 < len(intact) < 100
    assert indices_of(intact) == [round(time_s * 25) for time_s in times_s]


def test_pipe_is_rejected_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UnreadableVideo, match=r"a\.mp4: "):
        open_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["\0.mp4", "link.mp4"])
def test_invalid_path_is_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / "link.mp4").symlink_to("link.mp4")
    with pytest.raises(UnreadableVideo, match="mp4"):
        open_video(tmp_path / name)


class Stream(io.RawIOBase):
    """An open file that is not seekable."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read = read  # type: ignore[method-assign,assignment]

    def readable(self) -> bool:
        return True


def test_stream_is_read_up_to_max_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_video(tmp_path / "a.mp4").open("rb") as file, open_video(Stream(file.read)) as video:
        assert indices_of(video.read([3])) == [3]
    monkeypatch.setattr(merv.video.open, "MAX_STREAM", 1 << 21)
    with pytest.raises(UnreadableVideo, match=r"2 MiB"):
        open_video(Stream(lambda size: bytes(size)))


def test_growing_file_is_read_to_its_initial_size(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.ts", 50).read_bytes()

    class Growing(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            return super().seek(len(data), 0) if whence == 2 else super().seek(offset, whence)

    with open_video(Growing(data * 20)) as video:
        assert video.info.num_frames < 100


def test_error_of_file_object_is_reported() -> None:
    class Unavailable(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(UnreadableVideo, match=r"upload: .*Input/output error"):
        open_video(Unavailable(b"x"), name="upload")


def test_svg_is_unreadable() -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
    with pytest.raises(UnreadableVideo, match="svg"):
        probe(svg)
