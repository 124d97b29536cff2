"""Preprocess: uint8 frames to what one encoder wants, by the preset that it declares.

In two steps, so that encoders which want the same geometry share one resize:
`resize` changes the geometry, `normalise` the numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from merv.errors import ShapeError
from merv.types import WHOLE_PICTURE, Frames, Preset

Extent = tuple[float, float, float, float]


def preprocess(frames: Frames, preset: Preset) -> Frames:
    """Frames as an encoder wants them: uint8 [B, T, 3, H, W] to float32 of the preset's size.

    The extent of the result tells which part of the original picture it shows. Raises
    ShapeError for pixels that are not uint8, and for a crop larger than what it is cut from.

    >>> preset = Preset("crop", size=(32, 32))
    >>> ready = preprocess(Frames.of(torch.zeros(1, 2, 3, 48, 64, dtype=torch.uint8)), preset)
    >>> ready.pixels.shape
    torch.Size([1, 2, 3, 32, 32])
    >>> [round(edge, 3) for edge in ready.extent[0].tolist()]
    [0.0, 0.119, 1.0, 0.881]
    """
    batch = frames.pixels.shape[0]
    pixels, extent = resize(rearrange(frames.pixels, "b t c h w -> (b t) c h w"), preset)
    return replace(
        frames,
        pixels=rearrange(normalise(pixels, preset), "(b t) c h w -> b t c h w", b=batch),
        extent=within(frames.extent, extent),
    )


def resize(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """The preset's geometry alone: uint8 [T, 3, H, W] to [T, 3, *preset.size], and its extent.

    The extent is in units of the pictures that came. Pixels stay uint8, 0 to 255, except with
    `bilinear_plain`, which makes floats, 0 to 1. It depends on the preset's fit, size, resize
    and interpolation, and for a letterbox on its mean. Nothing is resampled to its own size.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ShapeError(
            f"preprocess wants uint8 pixels [T, 3, H, W], 0 to 255; got {pixels.dtype} {list(pixels.shape)}."
        )
    plain = preset.interpolation == "bilinear_plain"
    size = _scaled_size(pixels.shape[2], pixels.shape[3], preset)
    scaled = pixels.float() / 255 if plain else pixels
    if size != tuple(pixels.shape[2:]):
        resample = _resample_plain if plain else _resample_pil
        scaled = torch.stack([resample(picture, size, preset) for picture in scaled])
    place = {"squash": _whole, "crop": _crop, "letterbox": _letterbox}[preset.fit]
    return place(scaled, preset)


def normalise(pixels: Tensor, preset: Preset) -> Tensor:
    """The preset's numbers alone: uint8, or floats in [0, 1], to (pixel − mean) / std in float32.

    >>> pixels = torch.tensor([0, 255, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    >>> normalise(pixels, Preset("squash", (1, 1))).flatten()
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
    if preset.fit == "squash":
        return preset.size
    if preset.fit == "letterbox":
        scale = min(preset.size[0] / height, preset.size[1] / width)
        return max(round(height * scale), 1), max(round(width * scale), 1)
    short = preset.resize or min(preset.size)
    # The long side rounds down: torchvision divides last; pytorchvideo, which LanguageBind
    # uses, divides first, and can so be one pixel smaller.
    if preset.interpolation == "bilinear_plain":
        long = math.floor(max(height, width) / min(height, width) * short)
    else:
        long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def _resample_pil(picture: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """uint8 [3, H, W] to [3, *size] as PIL does it, which torchvision and timm build on."""
    from PIL import Image

    how = Image.Resampling.BICUBIC if preset.interpolation == "bicubic" else Image.Resampling.BILINEAR
    image = Image.fromarray(rearrange(picture, "c h w -> h w c").contiguous().cpu().numpy())
    return rearrange(torch.from_numpy(np.array(image.resize(size[::-1], how))), "h w c -> c h w")


def _resample_plain(picture: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """float [3, H, W] to [3, *size], bilinear without antialiasing."""
    return interpolate(picture[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]


def _whole(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    return pixels, WHOLE_PICTURE


def _crop(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """The centre of `preset.size`, rounded as torchvision's CenterCrop does."""
    (height, width), (want_h, want_w) = pixels.shape[2:], preset.size
    if height < want_h or width < want_w:
        raise ShapeError(
            f"Cannot crop {want_h}×{want_w} pixels from {height}×{width}, what a short side of "
            f"{min(height, width)} makes of this picture. Give the preset a larger `resize`."
        )
    top, left = round((height - want_h) / 2), round((width - want_w) / 2)
    extent = (top / height, left / width, (top + want_h) / height, (left + want_w) / width)
    return pixels[:, :, top : top + want_h, left : left + want_w], extent


def _letterbox(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """Centred on `preset.size`, the rest filled with the preset's mean."""
    (height, width), (want_h, want_w) = pixels.shape[2:], preset.size
    top, left = (want_h - height) // 2, (want_w - width) // 2
    mean = _channels(preset.mean, pixels)
    fill = mean if pixels.is_floating_point() else (mean * 255).round().to(pixels.dtype)
    canvas = fill.expand(len(pixels), 3, want_h, want_w).clone()
    canvas[:, :, top : top + height, left : left + width] = pixels
    return canvas, (-top / height, -left / width, (want_h - top) / height, (want_w - left) / width)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None, None]
