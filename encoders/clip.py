"""CLIP (Radford et al., 2021): an image encoder trained to match captions, with OpenAI's weights.

It runs in open_clip, with the original activation (QuickGELU). Source: https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import select
from merv.types import EncoderSpec, Preset

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")

# variant: hub id, image size, patch, channels, layers, channels of the joint embedding, parameters
SIZES = {
    "large": ("timm/vit_large_patch14_clip_224.openai", 224, 14, 1024, 24, 768, 303_966_208),
    "large-336": ("timm/vit_large_patch14_clip_336.openai", 336, 14, 1024, 24, 768, 304_293_888),
    "base-16": ("timm/vit_base_patch16_clip_224.openai", 224, 16, 768, 12, 512, 86_192_640),
    "base-32": ("timm/vit_base_patch32_clip_224.openai", 224, 32, 768, 12, 512, 87_849_216),
}


class CLIP(Encoder):
    """The output of the second-to-last block, without the class token: 16×16 tokens per frame.

    >>> CLIP.variants["large"].grid, CLIP.variants["large"].embed_dim
    ((16, 16, 16), 1024)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "clip",
            num_frames=16,
            grid=(16, size // patch, size // patch),
            embed_dim=width,
            presets=dict.fromkeys(
                ("merv", "upstream"), Preset("crop", (size, size), "bicubic", None, MEAN, STD)
            ),
            patch=patch,
            layer="last block but one",
            source=source,
            weights_license="MIT",
            parameters=parameters,
        )
        for variant, (source, size, patch, width, _, _, parameters) in SIZES.items()
    }
    weight_files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

    def build(self) -> None:
        from open_clip.transformer import QuickGELU, VisionTransformer

        _, size, patch, width, layers, shared, _ = SIZES[self.variant]
        self.net = VisionTransformer(
            size, patch, width, layers, width // 64, mlp_ratio=4.0, output_dim=shared, act_layer=QuickGELU
        )

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return select(state, prefix="visual.", drop=(*TEXT_TOWER, "logit_scale"))

    def tokens(self, windows: Tensor) -> Tensor:
        layers = [len(self.net.transformer.resblocks) - 2]
        outputs = self.net.forward_intermediates(
            windows[:, 0], layers, stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        (tokens,) = outputs["image_intermediates"]
        return tokens
