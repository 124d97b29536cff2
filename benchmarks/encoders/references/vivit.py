"""ViViT in transformers, with its own processor; the checkpoint has the parameter names of the hub."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import VivitConfig, VivitForVideoClassification, VivitImageProcessor

from references import Size, squash, write

LIBRARY = "transformers"
ENCODER = "vivit/b-16x2-kinetics400"
FRAMES, WIDTH = 32, 768
BLOCKS = "vivit.layers", "layers"


def _processor(images: list[Image.Image]) -> Tensor:
    pictures = [np.asarray(image) for image in images]
    return VivitImageProcessor()(pictures, return_tensors="pt")["pixel_values"][0]


PRESETS = {
    "merv": squash(Image.Resampling.BILINEAR, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "upstream": _processor,
}
# Names in transformers 5 → older names, which the checkpoints have.
OLDER_NAMES = {
    r"\.layers\.": ".encoder.layer.",
    r"\.attention\.([qkv])_proj\.": lambda found: f".attention.attention.{QKV[found[1]]}.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
QKV = {"q": "query", "k": "key", "v": "value"}


def _sizes(size: Size) -> dict[str, int]:
    return {
        "num_hidden_layers": size.depth,
        "hidden_size": size.width,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
    }


def publish(folder: Path, size: Size) -> nn.Module:
    model = VivitForVideoClassification(VivitConfig(num_labels=5, **_sizes(size)))
    state = model.state_dict()
    for new, old in OLDER_NAMES.items():
        state = {re.sub(new, old, name): tensor for name, tensor in state.items()}
    write(folder / "model.safetensors", state)
    model.config.save_pretrained(folder)
    return VivitForVideoClassification.from_pretrained(folder)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    seen = model.vivit(pixels[None]).last_hidden_state[0, 1:]  # without the class token
    return rearrange(seen, "(t h w) d -> t h w d", t=FRAMES // 2, h=14)


def shrunk(size: Size) -> AbstractContextManager:
    return patch("transformers.VivitConfig", partial(VivitConfig, **_sizes(size)))
