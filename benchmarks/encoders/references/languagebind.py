"""LanguageBind in its own package, languagebind. It needs transformers 4, so it has its own environment:

    uv venv --python 3.11 FOLDER
    uv pip install --python FOLDER/bin/python "languagebind[all]==0.1.0" transformers==4.46.3 \\
        "accelerate<1.2" torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0

The transform is the package's, without the step that flips half of the clips at random.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from references import Size, inputs_of, rewrite

LIBRARY = "languagebind"
ENCODER = "languagebind/large"
FRAMES, WIDTH = 16, 1024
BLOCKS = "vision_model.encoder.layers", "encoder.layers"
CLIP_FRAMES = 8  # frames that see each other, according to the config on the hub; 16 frames are two clips


def _library(module: str) -> ModuleType:
    """Import a module of languagebind. Its dependency pytorchvideo uses an old name in torchvision."""
    from torchvision.transforms import _functional_tensor

    sys.modules.setdefault("torchvision.transforms.functional_tensor", _functional_tensor)
    return import_module(f"languagebind.video.{module}")


def _config(size: Size):
    vision = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
        "add_time_attn": True,
        "num_frames": CLIP_FRAMES,
        "projection_dim": 64,
        "lora_r": 0,
        "video_decode_backend": "decord",
    }
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return _library("configuration_video").LanguageBindVideoConfig(
        text_config=text | {"projection_dim": 64, "vocab_size": 99}, vision_config=vision, projection_dim=64
    )


def _transform(images: list[Image.Image]) -> Tensor:
    processing = _library("processing_video")
    transform = processing.get_video_transform(_config(Size(1, 64)))
    flip = processing.RandomHorizontalFlipVideo
    transform.transforms = [step for step in transform.transforms if not isinstance(step, flip)]
    clip = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(transform(rearrange(clip, "t h w c -> c t h w")), "c t h w -> t c h w")


def _formula(images: list[Image.Image]) -> Tensor:
    """Normalize, resize the short side to 224 (bilinear on floats, no antialiasing), and crop the center."""
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))
    clip = (torch.from_numpy(np.stack([np.asarray(image) for image in images])) / 255 - mean) / std
    pictures = rearrange(clip, "t h w c -> t c h w")
    height, width = pictures.shape[2:]
    size = [int(length / min(height, width) * 224) for length in (height, width)]
    scaled = nn.functional.interpolate(pictures, size, mode="bilinear", align_corners=False)
    top, left = (round((length - 224) / 2) for length in size)
    return scaled[..., top : top + 224, left : left + 224]


PRESETS = {"merv": _formula, "upstream": _transform}


def publish(folder: Path, size: Size) -> nn.Module:
    cls = _library("modeling_video").LanguageBindVideo
    model = cls(_config(size))
    model.save_pretrained(folder, safe_serialization=False)
    rewrite(folder / "pytorch_model.bin")
    return cls.from_pretrained(folder)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    with inputs_of(model.vision_model.encoder.layers[-1]) as seen:
        model.vision_model(rearrange(pixels, "t c h w -> 1 c t h w"))
    return rearrange(seen[0][:, 1:], "t (h w) d -> t h w d", h=16)  # without the class token


def shrunk(size: Size) -> AbstractContextManager:
    from merv.encoders import languagebind

    hub_id, *_, parameters = languagebind.SIZES["large"]
    row = hub_id, size.width, size.depth, size.heads, parameters
    return patch.dict(languagebind.SIZES, large=row)
