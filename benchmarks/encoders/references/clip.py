"""CLIP in open_clip, with open_clip's own loader and transform."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import open_clip
from einops import rearrange
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from references import Size, crop, each, inputs_of, write

LIBRARY = "open_clip_torch"
ENCODER = "clip/large"
FRAMES, WIDTH = 16, 1024
BLOCKS = "visual.transformer.resblocks", "transformer.resblocks"

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PRESETS = {
    "merv": crop(Image.Resampling.BICUBIC, MEAN, STD),
    "upstream": each(image_transform_v2(PreprocessCfg(), is_train=False)),
}


def publish(folder: Path, size: Size) -> nn.Module:
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"] |= {"layers": size.depth, "width": size.width}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": 99}
    model = open_clip.CLIP(**config)
    write(folder / "open_clip_model.safetensors", model.state_dict())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return open_clip.create_model(f"local-dir:{folder}")


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    with inputs_of(model.visual.transformer.resblocks[-1]) as seen:
        model.encode_image(pixels)
    return rearrange(seen[0][:, 1:], "t (h w) d -> t h w d", h=16)  # without the class token


def shrunk(size: Size) -> AbstractContextManager:
    from merv.encoders import clip

    hub_id, side, patch_size, _, _, shared, parameters = clip.SIZES["large"]
    row = hub_id, side, patch_size, size.width, size.depth, shared, parameters
    return patch.dict(clip.SIZES, large=row)
