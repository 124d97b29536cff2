"""V-JEPA 2 in transformers, with its own processor; the checkpoint includes the predictor."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

from references import Size, rewrite, squash

LIBRARY = "transformers"
ENCODER = "vjepa2/large"
FRAMES, WIDTH = 16, 1024
BLOCKS = "encoder.layer", "layer"


def _processor(images: list[Image.Image]) -> Tensor:
    pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pictures = rearrange(pictures, "t h w c -> t c h w")
    return VJEPA2VideoProcessor()(pictures, return_tensors="pt")["pixel_values_videos"][0]


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PRESETS = {"merv": squash(Image.Resampling.BILINEAR, **IMAGENET, side=256), "upstream": _processor}


def publish(folder: Path, size: Size) -> nn.Module:
    config = VJEPA2Config(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        pred_num_hidden_layers=1,
    )
    VJEPA2Model(config).save_pretrained(folder)
    rewrite(folder / "model.safetensors")
    return VJEPA2Model.from_pretrained(folder)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    return rearrange(model.get_vision_features(pixels[None])[0], "(t h w) d -> t h w d", t=8, h=16)


def shrunk(size: Size) -> AbstractContextManager:
    row = ("vitl-fpc64-256", 16, 256, 292, size.width, size.depth, size.heads, 4 * size.width, "MIT", None)
    return patch.dict("merv.encoders.vjepa2.SIZES", large=row)
