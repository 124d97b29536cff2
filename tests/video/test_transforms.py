"""Preprocessing: equal to torchvision on PIL images; the extent says which part of the image is left."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from merv.errors import ShapeError
from merv.types import Frames, Preset
from merv.video.transforms import _two_passes, normalize, preprocess, resize

MODES = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_pixels(height: int, width: int, frames: int = 2) -> Tensor:
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)


def by_torchvision(pixels: Tensor, geometry: list) -> Tensor:
    pipeline = transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return torch.stack([pipeline(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height_width", [(48, 85), (85, 48), (33, 33), (20, 31), (32, 45)])
@pytest.mark.parametrize("short", [None, 37])
def test_crop_equals_torchvision(
    interpolation: str, height_width: tuple[int, int], short: int | None
) -> None:
    pixels = random_pixels(*height_width)
    preset = Preset("crop", (32, 32), interpolation, short, MEAN, STD)  # type: ignore[arg-type]
    geometry = [transforms.Resize(short or 32, MODES[interpolation]), transforms.CenterCrop(32)]
    assert torch.equal(normalize(resize(pixels, preset)[0], preset), by_torchvision(pixels, geometry))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_squash_equals_torchvision(interpolation: str) -> None:
    pixels = random_pixels(48, 85)
    preset = Preset("squash", (32, 24), interpolation, None, MEAN, STD)  # type: ignore[arg-type]
    geometry = [transforms.Resize((32, 24), MODES[interpolation])]
    assert torch.equal(normalize(resize(pixels, preset)[0], preset), by_torchvision(pixels, geometry))


@pytest.mark.parametrize(("height_width", "long"), [((48, 85), 56), ((85, 48), 56), ((30, 45), 48)])
def test_plain_bilinear_rounds_down_and_does_not_antialias(height_width: tuple[int, int], long: int) -> None:
    pixels = random_pixels(*height_width)
    wide = height_width[1] > height_width[0]
    whole = torch.nn.functional.interpolate(
        pixels / 255, size=(32, long) if wide else (long, 32), mode="bilinear", align_corners=False
    )
    start = round((long - 32) / 2)
    expected = whole[..., start : start + 32] if wide else whole[..., start : start + 32, :]
    assert torch.equal(resize(pixels, Preset("crop", (32, 32), "bilinear_plain"))[0], expected)


@pytest.mark.parametrize("width", [13, 15, 17])
def test_crop_rounded_down_equals_transformers(width: int) -> None:
    from transformers.image_transforms import center_crop

    pixels = random_pixels(8, width, frames=1)
    cropped, _ = resize(pixels, Preset("crop", (8, 8), center="down"))
    expected = center_crop(pixels[0].numpy(), (8, 8), input_data_format="channels_first")
    assert torch.equal(cropped[0], torch.from_numpy(expected))


def test_extent_of_crop_is_its_rectangle() -> None:
    pixels, extent = resize(random_pixels(40, 80), Preset("crop", (40, 40)))
    assert pixels.shape == (2, 3, 40, 40)
    assert extent == (0.0, 0.25, 1.0, 0.75)


def test_letterbox_extends_beyond_the_image_and_is_filled_with_the_mean() -> None:
    preset = Preset("letterbox", (40, 40), mean=MEAN, std=STD)
    frames = preprocess(Frames.of(random_pixels(40, 80)[None]), preset)
    assert frames.extent.tolist() == [[-0.5, 0.0, 1.5, 1.0]]
    assert frames.pixels[..., :10, :].abs().max() < 0.01
    assert frames.pixels[..., 10:30, :].abs().max() > 1


def test_extents_compose() -> None:
    cropped = Frames.of(random_pixels(40, 80)[None], extent=torch.tensor([[0.0, 0.5, 1.0, 1.0]]))
    assert preprocess(cropped, Preset("crop", (40, 40))).extent.tolist() == [[0.0, 0.625, 1.0, 0.875]]


@pytest.mark.parametrize("crop_mode", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear_plain"])
def test_frames_of_the_right_size_are_not_resampled(crop_mode: str, interpolation: str) -> None:
    pixels = random_pixels(32, 32)
    resized, extent = resize(pixels, Preset(crop_mode, (32, 32), interpolation))  # type: ignore[arg-type]
    assert torch.equal(resized, pixels if interpolation == "bicubic" else pixels / 255)
    assert extent == (0.0, 0.0, 1.0, 1.0)


def test_preprocess_keeps_times_and_mask() -> None:
    frames = Frames.of(random_pixels(32, 48, frames=6).reshape(2, 3, 3, 32, 48), torch.rand(2, 3))
    preset = Preset("squash", (16, 16))
    ready = preprocess(frames, preset)
    assert ready.pixels.shape == (2, 3, 3, 16, 16)
    assert ready.pixels.dtype == torch.float32
    assert torch.equal(ready.times_s, frames.times_s)
    resized, _ = resize(frames.pixels[1], preset)
    assert torch.equal(ready.pixels[1], normalize(resized, preset))


def test_float_pixels_are_rejected() -> None:
    with pytest.raises(ShapeError, match=r"uint8.*torch\.float32 \[2, 3, 32, 32\]"):
        resize(torch.rand(2, 3, 32, 32), Preset("squash", (16, 16)))


@pytest.mark.parametrize("shape", [(32, 40), (40, 32), (36, 36), (7, 200)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear_plain"])
def test_valid_crop_fits_into_frames_of_all_shapes(shape, interpolation) -> None:
    preset = Preset("crop", (32, 64), interpolation, resize_short_side=64)
    assert resize(random_pixels(*shape), preset)[0].shape[2:] == (32, 64)


@pytest.mark.parametrize(
    "options",
    [{"input_size": (32, 64)}, {"input_size": (64, 32)}, {"input_size": (64, 64), "resize_short_side": 60}],
)
def test_crop_larger_than_the_resized_frame_is_rejected_at_construction(options) -> None:
    with pytest.raises(ShapeError, match="resize_short_side=64"):
        Preset("crop", **options)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height_width", [(48, 85), (40, 40), (20, 31)])
def test_fast_differs_from_pil_by_at_most_two_levels(
    interpolation: str, height_width: tuple[int, int]
) -> None:
    pixels = random_pixels(*height_width, frames=8)
    preset = Preset("squash", (32, 32), interpolation)  # type: ignore[arg-type]
    exact, _ = resize(pixels, preset)
    for fast in (resize(pixels, preset, "fast")[0], _two_passes(pixels, (32, 32), preset)):
        difference = (fast.int() - exact.int()).abs()
        assert fast.dtype == torch.uint8
        assert difference.max() <= 2
        assert difference.float().mean() < 0.1


@pytest.mark.parametrize("crop_mode", ["squash", "crop", "letterbox"])
def test_fast_and_exact_have_the_same_geometry(crop_mode: str) -> None:
    preset = Preset(crop_mode, (32, 32))  # type: ignore[arg-type]
    exact, fast = (
        preprocess(Frames.of(random_pixels(40, 66)[None]), preset, mode) for mode in ("exact", "fast")
    )  # type: ignore[arg-type]
    assert fast.pixels.shape == exact.pixels.shape
    assert torch.equal(fast.extent, exact.extent)


def test_plain_bilinear_is_the_same_in_fast_mode() -> None:
    pixels, preset = random_pixels(40, 66), Preset("crop", (32, 32), "bilinear_plain")
    assert torch.equal(resize(pixels, preset)[0], resize(pixels, preset, "fast")[0])


def test_fast_stays_on_the_device_of_the_pixels() -> None:
    frames = Frames.of(torch.zeros(1, 2, 3, 40, 66, dtype=torch.uint8)).to("meta")
    ready = preprocess(frames, Preset("squash", (32, 32)), "fast")
    assert ready.pixels.device.type == "meta"
    assert ready.pixels.shape == (1, 2, 3, 32, 32)


def test_unknown_resample_is_rejected() -> None:
    with pytest.raises(ShapeError, match="'quick'"):
        resize(random_pixels(32, 32), Preset("squash", (16, 16)), "quick")  # type: ignore[arg-type]


def test_extremely_long_frame_cannot_be_cropped() -> None:
    pixels = torch.zeros(1, 3, 1, 2000, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="1×2000"):
        resize(pixels, Preset("crop", (224, 224)))
    assert resize(pixels, Preset("letterbox", (224, 224)))[0].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_mode": "squish"}, "crop_mode.* squash, crop, letterbox.* 'squish'"),
        ({"interpolation": "nearest"}, "interpolation.* bicubic, bilinear, bilinear_plain.* 'nearest'"),
        ({"center": "up"}, "center.* nearest, down.* 'up'"),
        ({"input_size": 112}, "input_size.* 112"),
        ({"resize_short_side": 0}, r"resize_short_side.*\b0\b"),
        ({"mean": 0.5}, r"mean.*\b0\.5"),
        ({"mean": ("a", 0.5, 0.5)}, r"mean.*\('a'"),
        ({"mean": (123, 117, 104)}, r"mean.*\(123.* 255"),
        ({"std": (58.4, 57.1, 57.4)}, r"std.*\(58\.4.* 255"),
        ({"std": (0.5, 0.0, 0.5)}, r"std.*\b0\.0"),
    ],
)
def test_invalid_preset_is_rejected(options, message) -> None:
    with pytest.raises(ShapeError, match=message):
        Preset(**{"crop_mode": "crop", "input_size": (16, 16), **options})
