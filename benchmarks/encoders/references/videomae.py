"""VideoMAE in transformers, with its processor for PIL images; the checkpoint includes the decoder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from references import Size, rewrite, squash

LIBRARY = "transformers"
ENCODER = "videomae/base"
FRAMES, WIDTH = 16, 768
BLOCKS = "videomae.encoder.layer", "encoder.layer"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # from preprocessor_config.json on the hub


def _processor(images: list[Image.Image]) -> Tensor:
    processor = VideoMAEImageProcessorPil(image_mean=MEAN, image_std=STD)
    return processor([np.asarray(image) for image in images], return_tensors="pt")["pixel_values"][0]


PRESETS = {"merv": squash(Image.Resampling.BILINEAR, MEAN, STD), "upstream": _processor}


def publish(folder: Path, size: Size) -> nn.Module:
    config = VideoMAEConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        use_mean_pooling=False,
        decoder_num_hidden_layers=1,
    )
    VideoMAEForPreTraining(config).save_pretrained(folder)
    rewrite(folder / "model.safetensors")
    return VideoMAEForPreTraining.from_pretrained(folder)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    return rearrange(model.videomae(pixels[None]).last_hidden_state[0], "(t h w) d -> t h w d", t=8, h=14)


def shrunk(size: Size) -> AbstractContextManager:
    row = ("MCG-NJU/videomae-base", size.width, size.depth, size.heads, True, None)
    return patch.dict("merv.encoders.videomae.SIZES", base=row)
