"""Preprocess uint8 frames for one encoder, as its preset says.

There are two steps, so that encoders with the same geometry share one resize: `resize` changes the geometry
and `normalize` the pixel values. `resize` is "exact" (it uses the installed Pillow) or "fast" (it uses torch,
on the device of the pixels, and differs by a few levels of 255).
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

Extent = tuple[float, float, float, float]  # (top, left, bottom, right); (0, 0, 1, 1) is the whole image
Resample = Literal["exact", "fast"]
# Long side over short side. Without a limit, scaling the short side of a tiny file could fill the memory.
MAX_ASPECT = 32


def preprocess(frames: Frames, preset: Preset, resample: Resample = "exact") -> Frames:
    """Preprocess frames for an encoder.

    Args:
        frames: uint8 RGB frames, pixels of shape [B, T, 3, H, W].
        preset: The encoder's preprocessing; see `merv.types.Preset`.
        resample: "exact" or "fast"; see `resize`.

    Returns:
        Normalized float32 frames of the preset's size, on the device of `frames`. Their extent says which
        part of the original image they show.

    Raises:
        ShapeError: The pixels are not uint8 RGB, or the preset crops and one side is more than 32 times as
            long as the other.

    Example:
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
    """Apply only the geometry of a preset: scale, then crop or pad.

    The result depends on the preset's crop_mode, input_size, resize_short_side, interpolation and center, and
    for a letterbox on its mean. Frames that already have the right size are not resampled.

    Args:
        pixels: uint8 frames of shape [T, 3, H, W].
        preset: The encoder's preprocessing.
        resample: "exact" resamples each frame with PIL on the CPU. "fast" resamples with torch, columns
            before rows, as PIL did before version 13 (newer versions start with the rows if the height
            shrinks much more than the width). Both are the same for the interpolation "bilinear_plain".

    Returns:
        The frames, shape [T, 3, *preset.input_size], and their extent in units of the input frames. Pixels
        stay uint8, except with "bilinear_plain", which returns floats in [0, 1].

    Raises:
        ShapeError: The pixels are not uint8 RGB, `resample` is unknown, or the preset crops and one side is
            more than 32 times as long as the other.
    """
    check_resample(resample)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ShapeError(
            f"Expected uint8 pixels [T, 3, H, W] in 0 to 255; got {pixels.dtype} {list(pixels.shape)}."
        )
    plain = preset.interpolation == "bilinear_plain"
    size = _scaled_size(pixels.shape[2], pixels.shape[3], preset)
    scaled = pixels.float().contiguous() / 255 if plain else pixels
    if size != tuple(pixels.shape[2:]):
        if plain:
            scaled = interpolate(scaled, size, mode="bilinear", align_corners=False, antialias=False)
        else:
            scaled = {"exact": _resample_pil, "fast": _resample_torch}[resample](scaled, size, preset)
    if preset.crop_mode == "squash":
        return scaled, WHOLE_PICTURE
    return {"crop": _crop, "letterbox": _letterbox}[preset.crop_mode](scaled, preset)


def normalize(pixels: Tensor, preset: Preset) -> Tensor:
    """Convert uint8 pixels, or floats in [0, 1], to (pixel - mean) / std in float32.

    >>> pixels = torch.tensor([0, 255, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    >>> normalize(pixels, Preset("squash", (1, 1))).flatten()
    tensor([-1.,  1.,  1.])
    """
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return (values - _channels(preset.mean, pixels)) / _channels(preset.std, pixels)


def within(outer: Tensor, inner: Extent) -> Tensor:
    """Convert `inner`, in units of the rectangles `outer` [B, 4], to units of the original image.

    >>> within(torch.tensor([[0.0, 0.5, 1.0, 1.0]]), (0.0, 0.0, 1.0, 0.5))
    tensor([[0.0000, 0.5000, 1.0000, 0.7500]])
    """
    near, far = outer[:, [0, 1, 0, 1]], outer[:, [2, 3, 2, 3]]
    return near + (far - near) * torch.tensor(inner, dtype=outer.dtype, device=outer.device)


def check_resample(resample: str) -> None:
    """Raise ShapeError unless `resample` is "exact" or "fast"."""
    if resample not in get_args(Resample):
        raise ShapeError(f"resample must be 'exact' (PIL) or 'fast' (torch); got {resample!r}.")


# Scaling


def _scaled_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """Return (height, width) after scaling, before cropping or padding."""
    if preset.crop_mode == "squash":
        return preset.input_size
    if preset.crop_mode == "letterbox":
        scale = min(preset.input_size[0] / height, preset.input_size[1] / width)
        return max(round(height * scale), 1), max(round(width * scale), 1)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ShapeError(
            f"Cannot crop frames of {height}×{width} pixels: the long side is more than {MAX_ASPECT} times "
            "the short side. Use a preset whose crop_mode is 'squash' or 'letterbox'."
        )
    short = preset.resize_short_side or min(preset.input_size)
    # The long side rounds down. torchvision divides last; pytorchvideo, which LanguageBind uses, divides
    # first, so its result can be one pixel smaller.
    if preset.interpolation == "bilinear_plain":
        long = math.floor(max(height, width) / min(height, width) * short)
    else:
        long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def _resample_pil(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """Resample uint8 [T, 3, H, W] to [T, 3, *size] with PIL, which torchvision and timm use too."""
    from PIL import Image

    filter_ = Image.Resampling.BICUBIC if preset.interpolation == "bicubic" else Image.Resampling.BILINEAR
    images = (Image.fromarray(p) for p in rearrange(pixels, "t c h w -> t h w c").contiguous().cpu().numpy())
    resized = np.stack([np.array(image.resize(size[::-1], filter_)) for image in images])
    return rearrange(torch.from_numpy(resized), "t h w c -> t c h w").to(pixels.device)


def _resample_torch(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """Resample with torch. It has uint8 kernels for the CPU only; other devices compute in floats."""
    pixels = pixels.contiguous()  # decoded frames have the channels last, where rounding may differ
    if pixels.device.type == "cpu":
        return interpolate(pixels, size, mode=preset.interpolation, antialias=True)
    return _two_passes(pixels, size, preset)


def _two_passes(pixels: Tensor, size: tuple[int, int], preset: Preset) -> Tensor:
    """Resample in floats, rounding to uint8 after each axis as PIL does.

    In a single pass, up to a fifth of the values would differ from PIL's.
    """
    values = pixels.float()
    for step in ((pixels.shape[2], size[1]), size):
        values = interpolate(values, step, mode=preset.interpolation, antialias=True)
        values = (values + 0.5).floor().clamp(0, 255)
    return values.to(torch.uint8)


# Fitting scaled frames to the input size


def _crop(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """Crop the center; `preset.center` says how an odd margin is rounded."""
    (height, width), (crop_h, crop_w) = pixels.shape[2:], preset.input_size
    round_margin = round if preset.center == "nearest" else math.floor
    top, left = round_margin((height - crop_h) / 2), round_margin((width - crop_w) / 2)
    extent = (top / height, left / width, (top + crop_h) / height, (left + crop_w) / width)
    return pixels[:, :, top : top + crop_h, left : left + crop_w], extent


def _letterbox(pixels: Tensor, preset: Preset) -> tuple[Tensor, Extent]:
    """Center the frames on a canvas of the input size that is filled with the preset's mean."""
    (height, width), (canvas_h, canvas_w) = pixels.shape[2:], preset.input_size
    top, left = (canvas_h - height) // 2, (canvas_w - width) // 2
    mean = _channels(preset.mean, pixels)
    fill = mean if pixels.is_floating_point() else (mean * 255).round().to(pixels.dtype)
    canvas = fill.expand(len(pixels), 3, canvas_h, canvas_w).clone()
    canvas[:, :, top : top + height, left : left + width] = pixels
    return canvas, (-top / height, -left / width, (canvas_h - top) / height, (canvas_w - left) / width)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return per-channel values as a tensor [3, 1, 1] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]
