"""SigLIP (Zhai et al., 2023) and SigLIP 2: image features trained to match captions, pair by pair.

Through timm, without the attention pooling, of which no token is taken.
https://arxiv.org/abs/2303.15343, https://arxiv.org/abs/2502.14786
"""

from __future__ import annotations

from typing import ClassVar

from einops import rearrange
from torch import Tensor

from merv.encode import Encoder
from merv.types import EncoderSpec, Preset
from merv.weights import select

# variant: timm's name, size, patch, width, short side before timm's crop, parameters
SIZES = {
    "base": ("vit_base_patch16_siglip_224.webli", 224, 16, 768, 248, 85_797_120),
    "base-256": ("vit_base_patch16_siglip_256.webli", 256, 16, 768, 284, 85_843_200),
    "base-384": ("vit_base_patch16_siglip_384.webli", 384, 16, 768, 426, 86_088_960),
    "base-512": ("vit_base_patch16_siglip_512.webli", 512, 16, 768, 568, 86_433_024),
    "large-256": ("vit_large_patch16_siglip_256.webli", 256, 16, 1024, 284, 303_361_024),
    "large-384": ("vit_large_patch16_siglip_384.webli", 384, 16, 1024, 426, 303_688_704),
    "so400m-224": ("vit_so400m_patch14_siglip_224.webli", 224, 14, 1152, 248, 412_442_352),
    "so400m-384": ("vit_so400m_patch14_siglip_384.webli", 384, 14, 1152, 426, 412_987_248),
    "v2-base-224": ("vit_base_patch16_siglip_224.v2_webli", 224, 16, 768, 248, 85_797_120),
    "v2-large-256": ("vit_large_patch16_siglip_256.v2_webli", 256, 16, 1024, 284, 303_361_024),
    "v2-so400m-224": ("vit_so400m_patch14_siglip_224.v2_webli", 224, 14, 1152, 248, 412_442_352),
    "v2-giant-256": ("vit_giantopt_patch16_siglip_256.v2_webli", 256, 16, 1536, 284, 1_134_838_272),
}


class SigLIP(Encoder):
    """The output of the last block but one, without norm: 14×14 a frame.

    >>> SigLIP.variants["base"].grid, SigLIP.variants["base"].width
    ((16, 14, 14), 768)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "siglip",
            frames=16,
            grid=(16, size // patch, size // patch),
            width=width,
            presets={
                "merv": Preset("squash", (size, size), "bicubic"),
                "upstream": Preset("crop", (size, size), "bicubic", resize),
            },
            patch=patch,
            layer="last block but one, no norm",
            source=f"timm/{name}",
            licence="Apache-2.0",
            parameters=parameters,
        )
        for variant, (name, size, patch, width, resize, parameters) in SIZES.items()
    }

    def build(self) -> None:
        import timm

        name, *_ = SIZES[self.variant]
        self.net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return select(state, drop=("attn_pool.",))

    def encode(self, pixels: Tensor) -> Tensor:
        _, height, _ = self.spec.grid
        images = rearrange(pixels, "b t c h w -> (b t) c h w")
        layers = [len(self.net.blocks) - 2]
        (tokens,) = self.net.forward_intermediates(
            images, indices=layers, stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return rearrange(tokens, "(b t) (h w) d -> b t h w d", b=len(pixels), h=height)
