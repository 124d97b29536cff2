"""SigLIP (Zhai et al., 2023): an image encoder trained to match captions with a sigmoid loss.

It runs in timm, without the attention pooling. Source: https://arxiv.org/abs/2303.15343
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import joined, renamed, select
from merv.types import EncoderSpec, Preset

# variant: name in timm, image size, patch, channels, short side before timm's crop, parameters
SIZES = {
    "base": ("vit_base_patch16_siglip_224.webli", 224, 16, 768, 248, 85_797_120),
    "base-256": ("vit_base_patch16_siglip_256.webli", 256, 16, 768, 284, 85_843_200),
    "base-384": ("vit_base_patch16_siglip_384.webli", 384, 16, 768, 426, 86_088_960),
    "base-512": ("vit_base_patch16_siglip_512.webli", 512, 16, 768, 568, 86_433_024),
    "large-256": ("vit_large_patch16_siglip_256.webli", 256, 16, 1024, 284, 303_361_024),
    "large-384": ("vit_large_patch16_siglip_384.webli", 384, 16, 1024, 426, 303_688_704),
    "so400m-224": ("vit_so400m_patch14_siglip_224.webli", 224, 14, 1152, 248, 412_442_352),
    "so400m-384": ("vit_so400m_patch14_siglip_384.webli", 384, 14, 1152, 426, 412_987_248),
}

# Names in checkpoints of transformers → names in timm.
FROM_TRANSFORMERS = {
    r"^vision_model\.embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"^vision_model\.embeddings\.position_embedding\.weight$": "pos_embed",
    r"^vision_model\.encoder\.layers\.": "blocks.",
    r"\.self_attn\.([qkv])_proj\.": r".attn.\1.",
    r"\.self_attn\.out_proj\.": ".attn.proj.",
    r"\.layer_norm(\d)\.": r".norm\1.",
    r"^vision_model\.post_layernorm\.": "norm.",
}
UNUSED = ("attn_pool.", "vision_model.head.", "text_model.", "logit_scale", "logit_bias")


def specs(family: str, sizes: Mapping[str, tuple[str, int, int, int, int, int]]) -> dict[str, EncoderSpec]:
    """The specs of a table of variants. SigLIP and SigLIP 2 share the network but have their own tables."""
    return {
        variant: EncoderSpec(
            family,
            num_frames=16,
            grid=(16, size // patch, size // patch),
            embed_dim=width,
            presets={
                "merv": Preset("squash", (size, size), "bicubic"),
                "upstream": Preset("crop", (size, size), "bicubic", resize),
            },
            patch=patch,
            layer="last block but one, no norm",
            source=f"timm/{name}",
            weights_license="Apache-2.0",
            parameters=parameters,
        )
        for variant, (name, size, patch, width, resize, parameters) in sizes.items()
    }


class SigLIP(Encoder):
    """The output of the second-to-last block, without norm: 14×14 tokens per frame.

    >>> SigLIP.variants["base"].grid, SigLIP.variants["base"].embed_dim
    ((16, 14, 14), 768)
    """

    variants: ClassVar = specs("siglip", SIZES)
    released_names: ClassVar = {"siglip-vit-b16-224px-all-no-cls": "base"}

    def build(self) -> None:
        import timm

        name = self.spec.source.removeprefix("timm/")
        self.net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = renamed(select(state, drop=UNUSED), FROM_TRANSFORMERS)
        if "pos_embed" in state and state["pos_embed"].ndim == 2:  # transformers has no batch dimension
            state["pos_embed"] = state["pos_embed"][None]
        return joined(state, ("q", "k", "v"), "qkv")

    def tokens(self, windows: Tensor) -> Tensor:
        layers = [len(self.net.blocks) - 2]
        (tokens,) = self.net.forward_intermediates(
            windows[:, 0], indices=layers, stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return tokens
