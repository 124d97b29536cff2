"""DINOv2 (Oquab et al., 2023): a self-supervised image encoder that captures parts and geometry.

It runs in timm. timm resamples the position embeddings of the 518-pixel checkpoints to 224 pixels.
Source: https://arxiv.org/abs/2304.07193, with registers: https://arxiv.org/abs/2309.16588
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import joined, renamed
from merv.types import EncoderSpec, Preset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, PATCH = 224, 14

# variant: name in timm, channels, parameters
SIZES = {
    "large": ("vit_large_patch14_reg4_dinov2", 1024, 303_230_976),
    "small": ("vit_small_patch14_reg4_dinov2", 384, 21_629_952),
    "base": ("vit_base_patch14_reg4_dinov2", 768, 85_727_232),
    "giant": ("vit_giant_patch14_reg4_dinov2", 1536, 1_134_774_272),
    "large-without-registers": ("vit_large_patch14_dinov2", 1024, 303_227_904),
    "small-without-registers": ("vit_small_patch14_dinov2", 384, 21_628_800),
    "base-without-registers": ("vit_base_patch14_dinov2", 768, 85_724_928),
    "giant-without-registers": ("vit_giant_patch14_dinov2", 1536, 1_134_769_664),
}

# Names in checkpoints of transformers → upstream names.
FROM_TRANSFORMERS = {
    r"^(dinov2|dinov2_with_registers)\.": "",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.attention\.(query|key|value)\.": r".attn.\1.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.weights_in\.": ".mlp.w12.",
    r"\.mlp\.weights_out\.": ".mlp.w3.",
    r"^layernorm\.": "norm.",
}


class DINOv2(Encoder):
    """The output of the second-to-last block, without norm, class and register tokens: 16×16 per frame.

    >>> DINOv2.variants["large"].grid, DINOv2.variants["large"].embed_dim
    ((16, 16, 16), 1024)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "dinov2",
            num_frames=16,
            grid=(16, SIZE // PATCH, SIZE // PATCH),
            embed_dim=width,
            presets={
                "merv": Preset("squash", (SIZE, SIZE), "bicubic", None, MEAN, STD),
                "upstream": Preset("crop", (SIZE, SIZE), "bicubic", None, MEAN, STD),
            },
            patch=PATCH,
            layer="last block but one, no norm",
            source=f"timm/{name}.lvd142m",
            weights_license="Apache-2.0",
            parameters=parameters,
        )
        for variant, (name, width, parameters) in SIZES.items()
    }
    released_names: ClassVar = {"dinov2-video-all-tokens": "large"}

    def build(self) -> None:
        import timm

        name, *_ = SIZES[self.variant]
        self.net = timm.create_model(name, pretrained=False, img_size=SIZE, num_classes=0)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        from timm.models.vision_transformer import checkpoint_filter_fn

        upstream_state = joined(renamed(state, FROM_TRANSFORMERS), ("query", "key", "value"), "qkv")
        return checkpoint_filter_fn(upstream_state, self.net)

    def tokens(self, windows: Tensor) -> Tensor:
        layers = [len(self.net.blocks) - 2]
        (tokens,) = self.net.forward_intermediates(
            windows[:, 0], indices=layers, stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return tokens
