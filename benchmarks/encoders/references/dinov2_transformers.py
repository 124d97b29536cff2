"""DINOv2 in transformers: a second, independent implementation of the same blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from einops import rearrange
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from references import Size, dinov2, inputs_of, rewrite

LIBRARY = "transformers"
ENCODER = dinov2.ENCODER
FRAMES, WIDTH = dinov2.FRAMES, dinov2.WIDTH
BLOCKS = "encoder.layer", "blocks"
PRESETS = {"merv": dinov2.PRESETS["merv"]}  # its processor resizes to another size than timm's transform


def publish(folder: Path, size: Size) -> nn.Module:
    # Position embeddings for 224 pixels: transformers resamples those for 518 pixels differently from timm.
    config = Dinov2WithRegistersConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        patch_size=14,
        image_size=224,
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    rewrite(folder / "model.safetensors")
    return Dinov2WithRegistersModel.from_pretrained(folder)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    with inputs_of(model.encoder.layer[-1]) as seen:
        model(pixels)
    return rearrange(seen[0][:, 5:], "t (h w) d -> t h w d", h=16)  # without class and register tokens


def shrunk(size: Size) -> AbstractContextManager:
    return dinov2.shrunk(size)
