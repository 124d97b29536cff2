"""Preprocess: uint8 frames to what one encoder wants, by the preset that it declares.

In two steps, so that encoders which want the same geometry share one resize:
`resize` changes the geometry, `normalize` the numbers. The geometry is `exact`, as the installed
Pillow does it, or `fast`, by torch on the device that the pixels are on, a step or two of 255 away.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from merv.errors import ShapeError
from merv.types import WHOLE_PICTURE, Frames, Preset

Extent = tuple[float, float, float, float]
Resample = Literal["exact", "fast"]
LONGEST = 32  # times its short side: a picture of a few bytes is not to fill the memory when that is scaled


def preprocess(frames: Frames, preset: Preset, resample: Resample = "exact") -> Frames:
    """Frames as an encoder wants them: uint8 [B, T, 3, H, W] to float32 of the preset's size.

    The extent of the result tells which part of the original picture it shows. The result is where
    `frames` are. Raises ShapeError for pixels that are not uint8, and for a crop from a picture that is
    more than 32 times as long as it is wide, or as wide as it is long.

    >>> preset = Preset("crop", input_size=(32, 32))
    >>> ready = preprocess(Frames.of(torch.zeros(1, 2, 3, 48, 64, dtype=torch.uint8)), preset)
    >>> ready.pixels.shape
    torch.Size([1, 2, 3, 32, 32])
    >>> [round(edge, 3) for edge in ready.extent[0].tolist()]
    [0.0, 0.119, 1.0, 0.881]
    """
    batch = frames.pixels.shape[0]
    pixels, extent = resize(rearrange(frames.pixels, "b t c h w -> (b t) c h w"), preset, resample)
    return replace(
        frames,
        pixels=rearrange(normalize(pixels, preset), "(b t) c h w -> b t c h w", b=batch),
        extent=within(frames.extent, extent),
    )


def resize(pixels: Tensor, preset: Preset, resample: Resample = "exact") -> tuple[Tensor, Extent]:
    """The preset's geometry alone: uint8 [T, 3, H, W] to [T, 3, *preset.input_size], and its extent.

    The extent is in units of the pictures that came. Pixels stay uint8, 0 to 255, except with
    `bilinear_plain`, which makes floats, 0 to 1. It depends on the preset's crop_mode, input_size,
    resize_short_side, interpolation and center, and for a letterbox on its mean. Nothing is resampled to its
    own size.

    resample: `exact` resamples as PIL does, one picture after the other, on the CPU; `fast` by torch,
    columns before rows, as PIL did before version 13 (now it begins with rows where the height shrinks
    much more than the width). `bilinear_plain` is the same either way.
    """
    check_resample(resample)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ShapeError(
            f"preprocess wants uint8 pixels [T, 3, H, W], 0 to 255; got {pixels.dtype} {list(pixels.shape)}."
        )
    plain = preset.interpolation == "bilinear_plain"
    size = _scaled_size(pixels.shape[2], pixels.shape[3], preset)
    scaled = pixels.float() / 255 if plain else pixels
    if size != tuple(pixels.shape[2:]):
        ways = {"exact": _resample_pil, "fast": _resample_torch}
        scaled = (_resample_plain if plain else ways[resample])(scaled, size, preset)
    place = {"squash": _whole, "crop": _crop, "letterbox": _letterbox}[preset.crop_mode]
    return place(scaled, preset)


def normalize(pixels: Tensor, preset: Preset) -> Tensor:
    """The preset's numbers alone: uint8, or floats in [0, 1], to (pixel − mean) / std in float32.

    >>> pixels = torch.tensor([0, 255, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    >>> normalize(pixels, Preset("squash", (1, 1))).flatten()
    tensor([-1.,  1.,  1.])
    """
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return (values - _channels(preset.mean, pixels)) / _channels(preset.std, pixels)


def within(outer: Tensor, inner: Extent) -> Tensor:
    """`inner`, given in units of the rectangles `outer` [B, 4], in units of the whole picture.

    >>> within(torch.tensor([[0.0, 0.5, 1.0, 1.0]]), (0.0, 0.0, 1.0, 0.5))
    tensor([[0.0000, 0.5000, 1.0000, 0.7500]])
    """
    corner, far = outer[:, [0, 1, 0, 1]], outer[:, [2, 3, 2, 3]]
    return corner + (far - corner) * torch.tensor(inner, dtype=outer.dtype, device=outer.device)


def _scaled_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """(height, width) after scaling, before anything is cut off or added."""
    if preset.crop_mode == "squash":
        return preset.input_size
    if preset.crop_mode == "letterbox":
        scale = min(preset.input_size[0] / height, preset.input_size[1] / width)
        return max(round(height * scale), 1), max(round(width * scale), 1)
    if max(height, width) > LONGEST * min(height, width):
        raise ShapeError(
            f"A picture of {height}×{width} pixels is too long to be scaled by its short side, as this crop "
            f"wants: more than {LONGEST} times. A preset that squashes or letterboxes takes it."
        )
    short = preset.resize_short_side or min(preset.input_size)
    # The long side rounds down: torchvision divides last; pytorchvideo, which LanguageBind
    # uses, divides first, and can so be one pixel smaller.
    if preset.interpolation == "bilinear_plain":
        long = math.floor(max(height, width) / min(height, width) * short)
    else:
        long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def check_resample(resample: str) -> None:
    """Raise ShapeError unless it is one of the two ways to resample."""
    if resample not in get_args(Resample):
        raise ShapeError(f"resample is 'exact' (as PIL) or 'fast' (by torch); got {resample!r}.")


def _resample_pil(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """uint8 [T, 3, H, W] to [T, 3, *size] as PIL does it, which torchvision and timm build on."""
    from PIL import Image

    how = Image.Resampling.BICUBIC if preset.interpolation == "bicubic" else Image.Resampling.BILINEAR
    pictures = (
        Image.fromarray(p) for p in rearrange(pixels, "t c h w -> t h w c").contiguous().cpu().numpy()
    )
    resized = np.stack([np.array(picture.resize(size[::-1], how)) for picture in pictures])
    return rearrange(torch.from_numpy(resized), "t h w c -> t c h w").to(pixels.device)


def _resample_torch(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """The same by torch: its kernels for bytes on a CPU; elsewhere there are none, and floats do it.

    In two passes, then, rounded to bytes after each, as PIL does; in one, up to a fifth of them differ.
    """
    if pixels.device.type == "cpu":
        return interpolate(pixels, size, mode=preset.interpolation, antialias=True)
    return _two_passes(pixels, size, preset)


def _two_passes(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    values = pixels.float()
    for step in ((pixels.shape[2], size[1]), size):
        values = interpolate(values, step, mode=preset.interpolation, antialias=True)
        values = (values + 0.5).floor().clamp(0, 255)
    return values.to(torch.uint8)


def _resample_plain(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """float [T, 3, H, W] to [T, 3, *size], bilinear without antialiasing."""
    return interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)


def _whole(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    return pixels, WHOLE_PICTURE


def _crop(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """The center of `preset.input_size`, where `preset.center` puts it."""
    (height, width), (want_h, want_w) = pixels.shape[2:], preset.input_size
    place = round if preset.center == "nearest" else math.floor
    top, left = place((height - want_h) / 2), place((width - want_w) / 2)
    extent = (top / height, left / width, (top + want_h) / height, (left + want_w) / width)
    return pixels[:, :, top : top + want_h, left : left + want_w], extent


def _letterbox(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """Centered on `preset.input_size`, the rest filled with the preset's mean."""
    (height, width), (want_h, want_w) = pixels.shape[2:], preset.input_size
    top, left = (want_h - height) // 2, (want_w - width) // 2
    mean = _channels(preset.mean, pixels)
    fill = mean if pixels.is_floating_point() else (mean * 255).round().to(pixels.dtype)
    canvas = fill.expand(len(pixels), 3, want_h, want_w).clone()
    canvas[:, :, top : top + height, left : left + width] = pixels
    return canvas, (-top / height, -left / width, (want_h - top) / height, (want_w - left) / width)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None, None]
