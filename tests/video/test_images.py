"""Pictures and animations of all formats: orientation, tiles, times and damage."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from media import indices_of, picture
from PIL import Image
from torch import Tensor

from merv.errors import DamagedVideo, UnreadableVideo, VideoError
from merv.types import VideoInfo
from merv.video.images import ImagesReader
from merv.video.open import open_video

ORIENTATION = 0x0112
STORED = {  # EXIF orientation → how an upright picture is stored; see the table of row 0 and column 0 in EXIF
    1: lambda rgb: rgb,
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.swapaxes(0, 1),
    6: lambda rgb: rgb.swapaxes(0, 1)[::-1],
    7: lambda rgb: rgb[::-1, ::-1].swapaxes(0, 1),
    8: lambda rgb: rgb.swapaxes(0, 1)[:, ::-1],
}
LOSSY = {"quality": 95, "subsampling": "4:4:4"}


def upright() -> np.ndarray:
    """Return uint8 [32, 96, 3] with four different quarters."""
    rgb = np.zeros((32, 96, 3), np.uint8)
    rgb[:16, :48], rgb[:16, 48:], rgb[16:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return rgb


def encode(image: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    image.save(file, file_format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def encode_oriented(file_format: str, orientation: int) -> bytes:
    """Store `upright()` turned, with the orientation that makes it upright."""
    stored = STORED[orientation](upright())
    if file_format == "TIFF":
        return encode(stored, "TIFF", tiffinfo={ORIENTATION: orientation})
    if file_format == "HEIF":  # PIL does not read this brand, so FFmpeg does
        return encode_oriented("AVIF", orientation).replace(b"ftypavif", b"ftypheic", 1)
    options = {"lossless": True} if file_format == "WEBP" else {} if file_format == "PNG" else LOSSY
    if file_format == "MPO":
        options = {**options, "save_all": True, "append_images": [Image.new("RGB", (8, 8))]}
    return encode(stored, file_format, exif=exif(orientation), **options)


def assert_shows(data: bytes, rgb: np.ndarray) -> None:
    """Check that a picture has the size and roughly the pixels of uint8 [H, W, 3]."""
    with open_video(data) as video:
        assert (video.info.height, video.info.width, video.info.num_frames) == (*rgb.shape[:2], 1)
        pixels = video.read([0])[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - rgb).mean() < 12


TEXT = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\x006\0\0\0\0\0\0\0"  # the orientation is "6"


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "MPO"])
def test_orientation_is_applied_to_size_and_pixels(file_format: str, orientation: int) -> None:
    assert_shows(encode_oriented(file_format, orientation), upright())


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("data", [exif(0), exif(9), TEXT], ids=["0", "9", "text"])
def test_invalid_orientation_means_as_stored(file_format: str, data: Image.Exif | bytes) -> None:
    assert_shows(encode(upright(), file_format, exif=data, quality=95), upright())


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(file_format: str) -> None:
    assert_shows(encode(upright(), file_format, exif=b"Exif\0\0garbage", quality=95), upright())


def test_picture_of_another_size_is_never_scaled() -> None:
    info = VideoInfo("a.xyz", 0.0, (0.0,), width=8, height=4)
    with pytest.raises(UnreadableVideo, match=r"a\.xyz.* 4×8"):
        ImagesReader(info, lambda _: Tensor(3, 8, 4)).read([0])


def test_pil_image_of_three_rows_is_a_picture() -> None:
    with open_video(Image.new("RGB", (3, 3), (1, 2, 3))) as image:
        assert image.read([0])[0, :, 2, 2].tolist() == [1, 2, 3]


# Pixels


def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((96, 64))


@pytest.mark.parametrize(
    ("file_format", "mode", "options"),
    [
        ("JPEG", "CMYK", LOSSY),
        ("JPEG", "L", {"progressive": True, **LOSSY}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "1", {"compression": "group4"}),
        ("PNG", "1", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "P", {"transparency": bytes([0, 128, 255])}),
        ("PNG", "LA", {}),
        ("GIF", "P", {"transparency": 2}),
        ("WEBP", "RGBA", {"lossless": True}),
    ],
)
def test_modes_are_converted_to_rgb(file_format: str, mode: str, options: dict) -> None:
    image = gradient().quantize(16) if mode == "P" else gradient().convert(mode)
    assert_shows(encode(image, file_format, **options), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_scaled(file_format: str) -> None:
    sixteen = Image.fromarray(np.asarray(gradient()).astype(np.uint16) * 257)
    assert_shows(encode(sixteen, file_format), np.asarray(gradient().convert("RGB")))


def test_strips_of_a_tall_picture_are_joined() -> None:
    tall = np.asarray(Image.linear_gradient("L").resize((8, 1300)).convert("RGB"))
    assert_shows(encode(tall, "PNG"), tall)


def test_largest_picture_of_an_icon_is_read() -> None:
    icon = encode(Image.new("RGB", (64, 64), (200, 0, 0)), "ICO", sizes=[(16, 16), (64, 64), (32, 32)])
    assert_shows(icon, np.full((64, 64, 3), (200, 0, 0)))


def test_first_page_of_a_tiff_is_read() -> None:
    pages = encode(upright(), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert_shows(pages, upright())


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\x0a" + bytes(range(64)),
        b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl \0\0\0\x0cjxlc\xff\x0a\0\0",
        encode(gradient().convert("RGB"), "JPEG", progressive=True)[:700],
        encode(gradient().convert("RGB"), "PNG")[:120],
    ],
    ids=["jxl", "jxl in boxes", "half of a progressive jpeg", "half of a png"],
)
def test_unsupported_and_cut_off_pictures_are_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableVideo, match="picture"), open_video(data, name="picture") as video:
        video.read([0])


# Frames of videos that carry EXIF


def timelapse(orientations: Sequence[int]) -> bytes:
    """Copy camera JPEGs into an MP4 at 12 frames per second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuvj444p"
        for index, orientation in enumerate(orientations):
            packet = av.Packet(encode_oriented("JPEG", orientation))
            packet.stream, packet.time_base = stream, Fraction(1, 12)
            packet.pts = packet.dts = index
            container.mux(packet)
    return file.getvalue()


def test_timelapse_of_jpegs_with_exif_is_upright() -> None:
    with open_video(timelapse([1, 2, 3, 4] * 3)) as video:
        assert video.info.times_s == pytest.approx([index / 12 for index in range(12)])
        frames = video.read(range(12)).permute(0, 2, 3, 1).numpy()
    assert np.abs(frames.astype(int) - upright()).mean((1, 2, 3)).max() < 12


def test_timelapse_turned_by_exif_has_upright_size() -> None:
    assert_shows(timelapse([7]), upright())


def test_exif_of_a_heif_picture_is_no_error() -> None:
    data = Image.Exif()
    data[0x010F] = "camera"
    stored = encode(upright(), "AVIF", exif=data, **LOSSY).replace(b"ftypavif", b"ftypheic", 1)
    assert_shows(stored, upright())


# Tiles


def box(kind: bytes, *content: bytes, version: int | None = None) -> bytes:
    """Return a box of an MP4 file; with `version`, a full box."""
    data = b"".join((b"" if version is None else struct.pack(">I", version << 24), *content))
    return struct.pack(">I4s", 8 + len(data), kind) + data


def tiled(brand: bytes, size: int = 64) -> bytes:
    """Return a picture of 2×2 equal tiles and a thumbnail, coded as AV1."""
    tile = encode(Image.new("RGB", (size, size), (200, 30, 30)), "AVIF")
    start = {kind: tile.index(kind) - 4 for kind in (b"av1C", b"pixi", b"mdat")}
    av1c, pixi, coded = (tile[i : i + int.from_bytes(tile[i : i + 4], "big")] for i in start.values())
    coded = coded[8:]
    items = {1: b"grid", 2: b"av01", 3: b"av01", 4: b"av01", 5: b"av01", 6: b"av01"}
    references = (
        box(b"dimg", struct.pack(">2H4H", 1, 4, 2, 3, 4, 5)),
        box(b"thmb", struct.pack(">3H", 6, 1, 1)),
    )
    sizes = [box(b"ispe", struct.pack(">2I", side, side), version=0) for side in (size, 2 * size)]
    # properties: 1 size of a tile, 2 decoder, 3 bits, 4 size of the whole
    used = [struct.pack(">H3B", item, 2, 4, 3) if item == 1 else struct.pack(">H4B", item, 3, 1, 130, 3)
            for item in items]  # fmt: skip
    kinds = [box(b"infe", struct.pack(">2H4sx", item, 0, kind), version=2) for item, kind in items.items()]

    def meta(offset: int) -> bytes:
        places = [
            struct.pack(">4H2I", item, 1, 0, 1, 0, 8)
            if item == 1
            else struct.pack(">4H2I", item, 0, 0, 1, offset, len(coded))
            for item in items
        ]
        return box(
            b"meta",
            box(b"hdlr", struct.pack(">I4s13x", 0, b"pict"), version=0),
            box(b"pitm", struct.pack(">H", 1), version=0),
            box(b"iloc", b"\x44\0", struct.pack(">H", len(items)), *places, version=1),
            box(b"iinf", struct.pack(">H", len(items)), *kinds, version=0),
            box(b"iref", *references, version=0),
            box(
                b"iprp",
                box(b"ipco", sizes[0], av1c, pixi, sizes[1]),
                box(b"ipma", struct.pack(">I", len(items)), *used, version=0),
            ),
            box(b"idat", struct.pack(">4B2H", 0, 0, 1, 1, 2 * size, 2 * size)),
            version=0,
        )

    header = box(b"ftyp", brand, bytes(4), b"mif1", brand)
    return header + meta(len(header) + len(meta(0)) + 8) + box(b"mdat", coded)


def test_tiles_of_an_avif_are_joined() -> None:
    assert_shows(tiled(b"avif"), np.full((128, 128, 3), (200, 30, 30)))


def test_tiles_that_ffmpeg_does_not_join_are_refused() -> None:
    with pytest.raises(UnreadableVideo, match=r"a\.heic.*tiles.*pillow-heif"):
        open_video(tiled(b"heic"), name="a.heic")


# Animations

DURATIONS_MS = [50, 200, 100, 70, 10]
ANIMATED = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "AVIF": LOSSY}


def animation(file_format: str) -> bytes:
    first, *others = [Image.fromarray(picture(index)) for index in range(5)]
    return encode(
        first,
        file_format,
        save_all=True,
        append_images=others,
        duration=DURATIONS_MS,
        **ANIMATED[file_format],
    )


@pytest.mark.parametrize("brand", [b"avis", b"hevc"])  # the second is read by FFmpeg
def test_animated_avif_is_read_whole(brand: bytes) -> None:
    with open_video(animation("AVIF").replace(b"ftypavis", b"ftyp" + brand, 1)) as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.25, 0.35, 0.42])
        assert indices_of(video.read([4, 0, 3, 1, 2])) == [4, 0, 3, 1, 2]


@pytest.mark.parametrize("file_format", ANIMATED)
def test_opening_an_animation_decodes_nothing(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Image.Image) -> None:
        raise AssertionError

    data = animation(file_format)
    with Image.open(io.BytesIO(data)) as image:
        if file_format != "PNG":  # its first frame is decoded, because EXIF may follow it
            monkeypatch.setattr(type(image), "load", fail)
    with open_video(data) as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.25, 0.35, 0.42])
        assert video.info.duration_s == pytest.approx(0.52)  # 10 ms are shown for 100 ms


@pytest.mark.parametrize(("file_format", "marker"), [("GIF", b"\0,"), ("PNG", b"fdAT")])
def test_frames_after_a_broken_one_are_missing(file_format: str, marker: bytes) -> None:
    data = bytearray(animation(file_format))
    offset = 0
    for _ in range(3 if file_format == "GIF" else 2):  # the data of frame 2
        offset = data.index(marker, offset + 1)
    offset += 30 if file_format == "GIF" else 10
    data[offset : offset + 8] = b"\xff" * 8
    with open_video(bytes(data)) as video:
        assert video.info.num_frames == 5
        for _ in range(2):
            assert indices_of(video.read(range(5), on_error="partial")) == [0, 1]
        assert indices_of(video.read([1])) == [1]
        with pytest.raises(DamagedVideo):
            video.read([1, 4])


def test_larger_frame_of_a_gif_is_missing() -> None:
    data = bytearray(animation("GIF"))
    second = data.index(b"\0,", data.index(b"\0,") + 1) + 2  # left, top, width, height
    data[second : second + 8] = struct.pack("<4H", 0, 0, 2000, 1000)
    with open_video(bytes(data)) as video:
        assert indices_of(video.read(range(5), on_error="partial")) == [0]
        with pytest.raises(DamagedVideo, match="2000×1000"):
            video.read([0, 1])


def test_apng_restores_the_canvas_before_a_frame() -> None:
    first, *others = [Image.fromarray(picture(index)).convert("RGBA") for index in (0, 1, 2, 4)]
    options = {"save_all": True, "append_images": others, "duration": 100}
    with open_video(encode(first, "PNG", disposal=[0, 2, 2, 2], blend=1, **options)) as video:
        assert indices_of(video.read([3, 0, 1, 2])) == [4, 0, 1, 2]


def test_apng_skips_the_picture_for_other_viewers() -> None:
    default, *frames = [Image.fromarray(picture(index)) for index in range(4)]
    data = encode(default, "PNG", save_all=True, append_images=frames, default_image=True, duration=50)
    with open_video(data) as video:
        assert video.info.times_s == pytest.approx([0.0, 0.05, 0.1])
        assert indices_of(video.read([2, 0, 1])) == [3, 1, 2]


@pytest.mark.parametrize("file_format", ANIMATED)
def test_cut_off_animation_raises_a_named_error_or_is_damaged(file_format: str) -> None:
    data = animation(file_format)
    for length in range(16, len(data) - 20, 37):
        with pytest.raises(VideoError), open_video(data[:length]) as video:
            video.read(range(video.info.num_frames))


def test_tiny_gif_with_huge_frames_is_refused() -> None:
    screen = b"GIF89a" + struct.pack("<2H3B", 8192, 8192, 0, 0, 0)
    frame = b"," + struct.pack("<4HB", 0, 0, 8192, 8192, 0) + b"\x02\x02\x4c\x01\0"
    with pytest.raises(UnreadableVideo, match=r"8192×8192.*max_pixels=\d+.*max_pixels=134217728"):
        open_video(screen + frame * 100 + b";")
    with open_video(screen + frame * 100 + b";", max_pixels=2 * 8192 * 8192) as video:
        assert video.info.num_frames == 100
