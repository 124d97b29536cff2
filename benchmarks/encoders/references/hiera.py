"""Hiera in hiera-transformer; the checkpoint includes the head.

Frames are preprocessed like test clips in SlowFast's loader, as the authors recommend.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import hiera
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from references import Size, rewrite, squash

LIBRARY = "hiera-transformer"
ENCODER = "hiera/base-plus"
FRAMES, WIDTH = 32, 112  # channels of the first stage
BLOCKS = "blocks", "blocks"


def _slowfast(images: list[Image.Image]) -> Tensor:
    """Normalize, resize the short side with F.interpolate, and crop the center. For landscape images."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    pixels = rearrange((pixels - 0.45) / 0.225, "t h w c -> t c h w")
    width = math.floor(pixels.shape[3] / pixels.shape[2] * 224)
    scaled = interpolate(pixels, size=(224, width), mode="bilinear", align_corners=False)
    left = math.ceil((width - 224) / 2)
    return scaled[..., left : left + 224]


PRESETS = {
    "merv": squash(Image.Resampling.BILINEAR, mean=(0.45,) * 3, std=(0.225,) * 3),
    "upstream": _slowfast,
}


def _model_class(size: Size) -> partial:
    stages = (1, 1, size.depth - 2, 1)
    return partial(hiera.hiera_base_16x224, embed_dim=size.width, num_heads=2, stages=stages)


def publish(folder: Path, size: Size) -> nn.Module:
    model = _model_class(size)()
    model.save_pretrained(folder, config=model.config)
    rewrite(folder / "model.safetensors")
    return hiera.Hiera.from_pretrained(folder)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    _, stages = model(rearrange(pixels, "(n t) c h w -> n c t h w", t=16), return_intermediates=True)
    return rearrange(stages[-1], "n t h w d -> (n t) h w d")


def shrunk(size: Size) -> AbstractContextManager:
    return patch("hiera.hiera_base_plus_16x224", _model_class(size))
