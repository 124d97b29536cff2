"""V-JEPA 2 (Assran et al., 2025): a video transformer trained to predict features of masked patches.

It runs in transformers, without the predictor.
Source: https://arxiv.org/abs/2506.09985
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import select
from merv.types import EncoderSpec, Preset

TUBELET, PATCH = 2, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Position embeddings are rotary, so any number of frames works. Most of the training and the authors' probes
# on Kinetics used 16 frames of 256 pixels. The last training phase used 64, which cost 7 times as much.
# variant: hub id, frames that see each other, image size, short side before the processor's crop,
# channels, layers, heads, hidden channels of an MLP, license, parameters
SIZES = {
    "large": ("vitl-fpc64-256", 16, 256, 292, 1024, 24, 16, 4096, "MIT", 303_885_312),
    "large-64-frames": ("vitl-fpc64-256", 64, 256, 292, 1024, 24, 16, 4096, "MIT", 303_885_312),
    "huge": ("vith-fpc64-256", 16, 256, 292, 1280, 32, 16, 5120, "Apache-2.0", 631_648_000),
    "giant": ("vitg-fpc64-256", 16, 256, 292, 1408, 40, 22, 6144, "Apache-2.0", 1_012_173_952),
    "giant-384": ("vitg-fpc64-384", 16, 384, 438, 1408, 40, 22, 6144, "Apache-2.0", 1_012_173_952),
}


class VJEPA2(Encoder):
    """The output after the final norm, on which the authors train probes: 8×16×16 cells for 16 frames.

    >>> VJEPA2.variants["large"].grid, VJEPA2.variants["large"].embed_dim
    ((8, 16, 16), 1024)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "vjepa2",
            num_frames=frames,
            grid=(frames // TUBELET, size // PATCH, size // PATCH),
            embed_dim=width,
            presets={
                "merv": Preset("squash", (size, size), "bilinear", None, MEAN, STD),
                "upstream": Preset("crop", (size, size), "bilinear", resize, MEAN, STD, "down"),
            },
            window_size=frames,
            tubelet_size=TUBELET,
            patch=PATCH,
            layer="last, after the final norm",
            source=f"facebook/vjepa2-{name}",
            weights_license=license,
            parameters=parameters,
        )
        for variant, (name, frames, size, resize, width, _, _, _, license, parameters) in SIZES.items()
    }

    def build(self) -> None:
        from transformers import VJEPA2Config, VJEPA2Model

        _, _, size, _, width, layers, heads, mlp_width, *_ = SIZES[self.variant]
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        config = VJEPA2Config(crop_size=size, mlp_ratio=mlp_width / width, pred_num_hidden_layers=1, **sizes)
        self.net = VJEPA2Model(config).encoder

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return select(state, prefix="encoder.", drop=("predictor.",))

    def tokens(self, windows: Tensor) -> Tensor:
        return self.net(windows).last_hidden_state
