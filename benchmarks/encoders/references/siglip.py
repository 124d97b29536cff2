"""SigLIP in timm, with timm's own loader and transform; the checkpoint includes the attention pooling."""

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
ENCODER = "siglip/base"
FRAMES, WIDTH = 16, 768
BLOCKS = "blocks", "blocks"

NAME = "vit_base_patch16_siglip_224.webli"
CONFIG = resolve_data_config(pretrained_cfg=get_pretrained_cfg(NAME).to_dict())
PRESETS = {
    "merv": squash(Image.Resampling.BICUBIC, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "upstream": each(create_transform(**CONFIG)),
}


def _sizes(size: Size) -> dict[str, int]:
    return {"depth": size.depth, "embed_dim": size.width, "num_heads": size.heads}


def publish(folder: Path, size: Size) -> nn.Module:
    create = partial(timm.create_model, NAME, num_classes=0, **_sizes(size))
    file = write(folder / "model.safetensors", create().state_dict())
    return create(pretrained=True, pretrained_cfg_overlay={"file": str(file)})


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    with inputs_of(model.blocks[-1]) as seen:
        model(pixels)
    return rearrange(seen[0], "t (h w) d -> t h w d", h=14)


def shrunk(size: Size) -> AbstractContextManager:
    return patch("timm.create_model", partial(timm.create_model, **_sizes(size)))
