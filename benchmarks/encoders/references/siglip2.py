"""SigLIP 2 in timm. It has the network of SigLIP and its own transform."""

from __future__ import annotations

from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from references import each, siglip
from references.siglip import BLOCKS, FRAMES, LIBRARY, WIDTH, publish, shrunk, tokens

__all__ = ["BLOCKS", "ENCODER", "FRAMES", "LIBRARY", "PRESETS", "WIDTH", "publish", "shrunk", "tokens"]

ENCODER = "siglip2/base"
NAME = "vit_base_patch16_siglip_224.v2_webli"
CONFIG = resolve_data_config(pretrained_cfg=get_pretrained_cfg(NAME).to_dict())
PRESETS = siglip.PRESETS | {"upstream": each(create_transform(**CONFIG))}
