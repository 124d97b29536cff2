"""Preprocessing: equal to torchvision's on PIL images, with the extent of what remains."""

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


def pictures(height: int, width: int, frames: int = 2) -> Tensor:
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
    pixels = pictures(*height_width)
    preset = Preset("crop", (32, 32), interpolation, short, MEAN, STD)  # type: ignore[arg-type]
    geometry = [transforms.Resize(short or 32, MODES[interpolation]), transforms.CenterCrop(32)]
    assert torch.equal(normalize(resize(pixels, preset)[0], preset), by_torchvision(pixels, geometry))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_squash_equals_torchvision(interpolation: str) -> None:
    pixels = pictures(48, 85)
    preset = Preset("squash", (32, 24), interpolation, None, MEAN, STD)  # type: ignore[arg-type]
    geometry = [transforms.Resize((32, 24), MODES[interpolation])]
    assert torch.equal(normalize(resize(pixels, preset)[0], preset), by_torchvision(pixels, geometry))


@pytest.mark.parametrize(("height_width", "long"), [((48, 85), 56), ((85, 48), 56), ((30, 45), 48)])
def test_plain_bilinear_rounds_down_and_does_not_antialias(height_width: tuple[int, int], long: int) -> None:
    pixels = pictures(*height_width)
    wide = height_width[1] > height_width[0]
    whole = torch.nn.functional.interpolate(
        pixels / 255, size=(32, long) if wide else (long, 32), mode="bilinear", align_corners=False
    )
    start = round((long - 32) / 2)
    wanted = whole[..., start : start + 32] if wide else whole[..., start : start + 32, :]
    assert torch.equal(resize(pixels, Preset("crop", (32, 32), "bilinear_plain"))[0], wanted)


@pytest.mark.parametrize("width", [13, 15, 17])
def test_crop_rounded_down_equals_transformers(width: int) -> None:
    from transformers.image_transforms import center_crop

    pixels = pictures(8, width, frames=1)
    cropped, _ = resize(pixels, Preset("crop", (8, 8), center="down"))
    theirs = center_crop(pixels[0].numpy(), (8, 8), input_data_format="channels_first")
    assert torch.equal(cropped[0], torch.from_numpy(theirs))


def test_extent_of_a_crop_is_its_rectangle() -> None:
    pixels, extent = resize(pictures(40, 80), Preset("crop", (40, 40)))
    assert pixels.shape == (2, 3, 40, 40)
    assert extent == (0.0, 0.25, 1.0, 0.75)


def test_extent_of_a_letterbox_reaches_beyond_and_is_filled_with_the_mean() -> None:
    preset = Preset("letterbox", (40, 40), mean=MEAN, std=STD)
    frames = preprocess(Frames.of(pictures(40, 80)[None]), preset)
    assert frames.extent.tolist() == [[-0.5, 0.0, 1.5, 1.0]]
    assert frames.pixels[..., :10, :].abs().max() < 0.01
    assert frames.pixels[..., 10:30, :].abs().max() > 1


def test_extents_are_composed() -> None:
    cropped = Frames.of(pictures(40, 80)[None], extent=torch.tensor([[0.0, 0.5, 1.0, 1.0]]))
    assert preprocess(cropped, Preset("crop", (40, 40))).extent.tolist() == [[0.0, 0.625, 1.0, 0.875]]


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear_plain"])
def test_right_size_passes_through(fit: str, interpolation: str) -> None:
    pixels = pictures(32, 32)
    same, extent = resize(pixels, Preset(fit, (32, 32), interpolation))  # type: ignore[arg-type]
    assert torch.equal(same, pixels if interpolation == "bicubic" else pixels / 255)
    assert extent == (0.0, 0.0, 1.0, 1.0)


def test_batches_keep_times_and_mask() -> None:
    frames = Frames.of(pictures(32, 48, frames=6).reshape(2, 3, 3, 32, 48), torch.rand(2, 3))
    ready = preprocess(frames, Preset("squash", (16, 16)))
    assert ready.pixels.shape == (2, 3, 3, 16, 16)
    assert ready.pixels.dtype == torch.float32
    assert torch.equal(ready.times_s, frames.times_s)
    assert torch.equal(ready.pixels[1, 0], normalize(*resize_one(frames.pixels[1, 0])))


def resize_one(picture: Tensor) -> tuple[Tensor, Preset]:
    preset = Preset("squash", (16, 16))
    return resize(picture[None], preset)[0][0], preset


def test_floats_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"uint8 pixels \[T, 3, H, W\], 0 to 255; got torch.float32"):
        resize(torch.rand(2, 3, 32, 32), Preset("squash", (16, 16)))


@pytest.mark.parametrize("shape", [(32, 40), (40, 32), (36, 36), (7, 200)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear_plain"])
def test_a_crop_that_can_be_made_fits_into_pictures_of_all_shapes(shape, interpolation) -> None:
    preset = Preset("crop", (32, 64), interpolation, resize_short_side=64)
    assert resize(pictures(*shape), preset)[0].shape[2:] == (32, 64)


@pytest.mark.parametrize(
    "options",
    [{"input_size": (32, 64)}, {"input_size": (64, 32)}, {"input_size": (64, 64), "resize_short_side": 60}],
)
def test_a_crop_that_some_pictures_lack_pixels_for_is_refused_when_it_is_made(options) -> None:
    with pytest.raises(
        ShapeError, match=r"does not fit into all pictures .* give resize_short_side=64 or more"
    ):
        Preset("crop", **options)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height_width", [(48, 85), (40, 40), (20, 31)])
def test_fast_is_a_step_or_two_from_pil(interpolation: str, height_width: tuple[int, int]) -> None:
    pixels = pictures(*height_width, frames=8)
    preset = Preset("squash", (32, 32), interpolation)  # type: ignore[arg-type]
    exact, _ = resize(pixels, preset)
    for fast in (resize(pixels, preset, "fast")[0], _two_passes(pixels, (32, 32), preset)):
        off = (fast.int() - exact.int()).abs()
        assert fast.dtype == torch.uint8
        assert off.max() <= 2
        assert off.float().mean() < 0.1


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_fast_has_the_geometry_of_exact(fit: str) -> None:
    preset = Preset(fit, (32, 32))  # type: ignore[arg-type]
    exact, fast = (preprocess(Frames.of(pictures(40, 66)[None]), preset, how) for how in ("exact", "fast"))  # type: ignore[arg-type]
    assert fast.pixels.shape == exact.pixels.shape
    assert torch.equal(fast.extent, exact.extent)


def test_plain_bilinear_is_the_same_fast() -> None:
    pixels, preset = pictures(40, 66), Preset("crop", (32, 32), "bilinear_plain")
    assert torch.equal(resize(pixels, preset)[0], resize(pixels, preset, "fast")[0])


def test_fast_stays_on_the_device_of_the_pixels() -> None:
    frames = Frames.of(torch.zeros(1, 2, 3, 40, 66, dtype=torch.uint8)).to("meta")
    ready = preprocess(frames, Preset("squash", (32, 32)), "fast")
    assert ready.pixels.device.type == "meta"
    assert ready.pixels.shape == (1, 2, 3, 32, 32)


def test_an_unknown_way_to_resample_is_refused() -> None:
    with pytest.raises(
        ShapeError, match=r"resample is 'exact' \(as PIL\) or 'fast' \(by torch\); got 'quick'"
    ):
        resize(pictures(32, 32), Preset("squash", (16, 16)), "quick")  # type: ignore[arg-type]


def test_a_thread_of_a_picture_is_not_scaled_by_its_short_side() -> None:
    thread = torch.zeros(1, 3, 1, 2000, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"1×2000 pixels is too long .* letterboxes takes it"):
        resize(thread, Preset("crop", (224, 224)))
    assert resize(thread, Preset("letterbox", (224, 224)))[0].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop_mode": "squish"}, "crop_mode is one of squash, crop, letterbox; got 'squish'"),
        ({"interpolation": "nearest"}, "interpolation is one of bicubic, bilinear, bilinear_plain"),
        ({"center": "up"}, "center is one of nearest, down"),
        ({"input_size": 112}, "input_size is"),
        ({"resize_short_side": 0}, "resize_short_side one side, in pixels; got .* 0"),
        ({"mean": 0.5}, "mean is a number per channel"),
        ({"mean": ("a", 0.5, 0.5)}, "mean is a number per channel"),
        ({"mean": (123, 117, 104)}, "pixels in .0, 1.; got .* divide it by 255"),
        ({"std": (58.4, 57.1, 57.4)}, "pixels in .0, 1.; got .* divide it by 255"),
        ({"std": (0.5, 0.0, 0.5)}, "std is greater than 0"),
    ],
)
def test_a_preset_that_says_something_else_is_refused(options, said) -> None:
    with pytest.raises(ShapeError, match=said):
        Preset(**{"crop_mode": "crop", "input_size": (16, 16), **options})
