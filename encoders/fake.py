"""Two tiny encoders with fixed weights, for tests, docs and bug reports."""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from merv.encoding.base import Encoder
from merv.encoding.weights import BUILT_IN
from merv.types import EncoderSpec, Preset

PRESETS = {"merv": Preset("squash", (16, 16), "bilinear"), "upstream": Preset("crop", (16, 16), "bilinear")}


class Fake(Encoder):
    """A linear patch embedding with weights from a fixed seed.

    "image" encodes each frame by itself to 4×4 cells. "video" has 2 frames per cell and adds the mean of the
    window of 8 frames to every cell, so that a change anywhere in the window is visible.

    >>> from merv import Frames
    >>> Fake("video")(Frames.of(torch.zeros(1, 16, 3, 16, 16))).values.shape
    torch.Size([1, 8, 2, 2, 12])
    """

    variants: ClassVar = {
        "image": EncoderSpec(
            "fake",
            num_frames=16,
            grid=(16, 4, 4),
            embed_dim=8,
            presets=PRESETS,
            patch=4,
            source=BUILT_IN,
            weights_license="Apache-2.0",
            parameters=392,
        ),
        "video": EncoderSpec(
            "fake",
            num_frames=16,
            grid=(8, 2, 2),
            embed_dim=12,
            presets=PRESETS,
            window_size=8,
            tubelet_size=2,
            patch=8,
            source=BUILT_IN,
            weights_license="Apache-2.0",
            parameters=4620,
        ),
    }
    released_names: ClassVar = {"fake": "image", "fake-video": "video"}  # names in the checkpoints of tests

    def build(self) -> None:
        spec = self.spec
        inputs = 3 * spec.tubelet_size * spec.patch**2
        self.net = nn.utils.skip_init(nn.Linear, inputs, spec.embed_dim)  # does not use the global seed
        seed = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.normal_(0.0, inputs**-0.5, generator=seed)

    def encode(self, pixels: Tensor) -> Tensor:
        k, p = self.spec.tubelet_size, self.spec.patch
        patches = rearrange(pixels, "b (t k) c (h p) (w q) -> b t h w (c k p q)", k=k, p=p, q=p)
        cells = self.net(patches)  # [B, t, h, w, D]
        if self.spec.window_size == 1:
            return cells
        steps = self.spec.window_size // k
        window_mean = reduce(cells, "b (n s) h w d -> b n d", "mean", s=steps)
        return cells + repeat(window_mean, "b n d -> b (n s) 1 1 d", s=steps)
