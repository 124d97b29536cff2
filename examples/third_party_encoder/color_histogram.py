"""An encoder in a package of its own: a histogram of each color channel, for each cell of the picture.

After `pip install .` in this folder, `merv encoders` lists it as `color_histogram`. Without installing it,
use `color_histogram:ColorHistogram`.
"""

import torch
from einops import rearrange, reduce

from merv import Encoder, EncoderSpec, Preset

BINS = 8
CELL = 16  # pixels


class ColorHistogram(Encoder):
    """A soft histogram of each color channel over cells of 16×16 pixels. It has no weights to load."""

    variants = {
        "base": EncoderSpec(
            "color_histogram",
            num_frames=16,
            grid=(16, 7, 7),
            embed_dim=3 * BINS,
            presets={"squash": Preset("squash", (112, 112), "bilinear", mean=(0, 0, 0), std=(1, 1, 1))},
            patch=CELL,
            layer="histogram",
            source="built-in",  # build() creates everything; there is no file to load
            weights_license="Apache-2.0",
            parameters=0,
        )
    }

    def build(self) -> None:
        self.register_buffer("centers", torch.linspace(0, 1, BINS))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The share of each bin in each cell: pixels [B, T, 3, H, W] in [0, 1] → [B, T, h, w, 3 · BINS]."""
        levels = pixels.clamp(0, 1)[..., None]
        shares = (1 - (levels - self.centers).abs() * (BINS - 1)).clamp_min(0)  # [..., BINS], sums to 1
        cells = reduce(shares, "b t c (h p) (w q) n -> b t h w c n", "mean", p=CELL, q=CELL)
        return rearrange(cells, "b t h w c n -> b t h w (c n)")
