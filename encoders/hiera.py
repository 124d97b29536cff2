"""Hiera (Ryali et al., 2023): a hierarchical video transformer trained for action recognition.

It runs in the package hiera-transformer; timm and transformers have only the image version.
Source: https://arxiv.org/abs/2306.00989, https://github.com/facebookresearch/hiera (code Apache-2.0)
"""

from __future__ import annotations

import warnings
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from merv.encoding.base import Encoder
from merv.encoding.weights import select
from merv.errors import MissingDependency
from merv.types import EncoderSpec, Preset

WINDOW, SIZE, TUBELET, CELL = 16, 224, 2, 32  # a cell of the last stage covers 32×32 pixels
MEAN, STD = (0.45,) * 3, (0.225,) * 3
PRESETS = {
    "merv": Preset("squash", (SIZE, SIZE), "bilinear", None, MEAN, STD),
    # As in SlowFast's loader, which the authors recommend: F.interpolate, with the long side rounded down.
    "upstream": Preset("crop", (SIZE, SIZE), "bilinear_plain", None, MEAN, STD),
}
# variant: name in the package, channels of the last stage, parameters
SIZES = {
    "base-plus": ("hiera_base_plus_16x224", 896, 69_031_648),
    "base": ("hiera_base_16x224", 768, 50_783_424),
    "large": ("hiera_large_16x224", 1152, 212_628_096),
    "huge": ("hiera_huge_16x224", 2048, 670_803_968),
}


class Hiera(Encoder):
    """The output of the last stage, as in the released MERV: 8×7×7 cells for each window of 16 frames.

    The norm and the head are left out: they work on the mean of all cells.

    >>> Hiera.variants["base-plus"].grid, Hiera.variants["base-plus"].embed_dim
    ((16, 7, 7), 896)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "hiera",
            num_frames=2 * WINDOW,
            grid=(2 * WINDOW // TUBELET, SIZE // CELL, SIZE // CELL),
            embed_dim=width,
            presets=PRESETS,
            window_size=WINDOW,
            tubelet_size=TUBELET,
            patch=CELL,
            layer="last stage, no norm",
            source=f"facebook/{name}.mae_k400_ft_k400",
            weights_license="CC-BY-NC-4.0",
            parameters=parameters,
        )
        for variant, (name, width, parameters) in SIZES.items()
    }
    released_names: ClassVar = {"hiera-base-plus-video": "base-plus", "hiera-large-video": "large"}

    def build(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it imports timm.layers by an older name
                import hiera
        except ImportError as error:
            raise MissingDependency(
                f'Hiera needs another package ({error}): pip install ".[hiera]" in the clone'
            ) from error
        name, *_ = SIZES[self.variant]
        self.net = getattr(hiera, name)()
        self.net.norm = self.net.head = nn.Identity()

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return select(state, drop=("norm.", "head."))

    def encode(self, pixels: Tensor) -> Tensor:
        windows = rearrange(pixels, "b (n t) c h w -> (b n) c t h w", t=WINDOW)
        _, stages = self.net(windows, return_intermediates=True)  # cells in raster order
        return rearrange(stages[-1], "(b n) t h w d -> b (n t) h w d", b=pixels.shape[0])
