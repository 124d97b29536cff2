"""DINOv2 in timm, with timm's own loader and transform; its position embeddings are for 518 pixels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import timm
from einops import rearrange
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from references import Size, each, inputs_of, squash, write

LIBRARY = "timm"
ENCODER = "dinov2/large"
FRAMES, WIDTH = 16, 1024
BLOCKS = "blocks", "blocks"

NAME = "vit_large_patch14_reg4_dinov2.lvd142m"
CONFIG = resolve_data_config({"input_size": (3, 224, 224)}, get_pretrained_cfg(NAME).to_dict())
PRESETS = {
    "merv": squash(Image.Resampling.BICUBIC, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "upstream": each(create_transform(**CONFIG)),
}


def _sizes(size: Size) -> dict[str, int]:
    return {"depth": size.depth, "embed_dim": size.width, "num_heads": size.heads}


def publish(folder: Path, size: Size) -> nn.Module:
    create = partial(timm.create_model, NAME, **_sizes(size))
    file = write(folder / "model.safetensors", create(num_classes=0).state_dict())
    return create(pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=224, num_classes=0)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    with inputs_of(model.blocks[-1]) as seen:
        model(pixels)
    return rearrange(seen[0][:, 5:], "t (h w) d -> t h w d", h=16)  # without class and register tokens


def shrunk(size: Size) -> AbstractContextManager:
    return patch("timm.create_model", partial(timm.create_model, **_sizes(size)))
