"""SigLIP 2 (Tschannen et al., 2025): SigLIP with captioning, localization and self-supervised losses.

The checkpoints with a fixed image size run in timm. NaFlex, which keeps the aspect ratio, is not
supported yet. Source: https://arxiv.org/abs/2502.14786
"""

from __future__ import annotations

from typing import ClassVar

from merv.encoders.siglip import SigLIP, specs

# variant: name in timm, image size, patch, channels, short side before timm's crop, parameters
SIZES = {
    "base": ("vit_base_patch16_siglip_224.v2_webli", 224, 16, 768, 248, 85_797_120),
    "base-256": ("vit_base_patch16_siglip_256.v2_webli", 256, 16, 768, 284, 85_843_200),
    "base-384": ("vit_base_patch16_siglip_384.v2_webli", 384, 16, 768, 426, 86_088_960),
    "base-512": ("vit_base_patch16_siglip_512.v2_webli", 512, 16, 768, 568, 86_433_024),
    "large-256": ("vit_large_patch16_siglip_256.v2_webli", 256, 16, 1024, 284, 303_361_024),
    "large-384": ("vit_large_patch16_siglip_384.v2_webli", 384, 16, 1024, 426, 303_688_704),
    "large-512": ("vit_large_patch16_siglip_512.v2_webli", 512, 16, 1024, 568, 304_147_456),
    "so400m-224": ("vit_so400m_patch14_siglip_224.v2_webli", 224, 14, 1152, 248, 412_442_352),
    "so400m-256": ("vit_so400m_patch16_siglip_256.v2_webli", 256, 16, 1152, 284, 412_649_712),
    "so400m-378": ("vit_so400m_patch14_siglip_378.v2_webli", 378, 14, 1152, 420, 412_987_248),
    "so400m-384": ("vit_so400m_patch16_siglip_384.v2_webli", 384, 16, 1152, 426, 413_018_352),
    "so400m-512": ("vit_so400m_patch16_siglip_512.v2_webli", 512, 16, 1152, 568, 413_534_448),
    "giant-256": ("vit_giantopt_patch16_siglip_256.v2_webli", 256, 16, 1536, 284, 1_134_838_272),
    "giant-384": ("vit_giantopt_patch16_siglip_384.v2_webli", 384, 16, 1536, 426, 1_135_329_792),
}


class SigLIP2(SigLIP):
    """The output of the second-to-last block, without norm: 14×14 tokens per frame.

    >>> SigLIP2.variants["base"].grid, SigLIP2.variants["base"].embed_dim
    ((16, 14, 14), 768)
    """

    variants: ClassVar = specs("siglip2", SIZES)
