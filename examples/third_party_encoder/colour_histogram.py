"""A third party's encoder: how much there is of each brightness of red, green and blue, by cell.

After `pip install .` in this folder, `merv encoders` lists it; before, it goes by
`colour_histogram:ColourHistogram`.
"""

import torch
from einops import rearrange, reduce

from merv import Encoder, EncoderSpec, Preset

BINS = 8
CELL = 16  # pixels


class ColourHistogram(Encoder):
    """A soft histogram of each color over cells of 16×16 pixels. It has no weights to load."""

    variants = {
        "base": EncoderSpec(
            "colour_histogram",
            num_frames=16,
            grid=(16, 7, 7),
            embed_dim=3 * BINS,
            presets={"squash": Preset("squash", (112, 112), "bilinear", mean=(0, 0, 0), std=(1, 1, 1))},
            patch=CELL,
            layer="histogram",
            source="built-in",  # build() makes all there is
            weights_license="Apache-2.0",
            parameters=0,
        )
    }

    def build(self) -> None:
        self.register_buffer("centers", torch.linspace(0, 1, BINS))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Share of each bin in a cell: [B, T, 3, H, W], in [0, 1], → [B, T, h, w, 3 · bins]."""
        levels = pixels.clamp(0, 1)[..., None]
        near = (1 - (levels - self.centers).abs() * (BINS - 1)).clamp_min(0)  # [..., bins], sums to 1
        cells = reduce(near, "b t c (h p) (w q) n -> b t h w c n", "mean", p=CELL, q=CELL)
        return rearrange(cells, "b t h w c n -> b t h w (c n)")
