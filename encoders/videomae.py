"""VideoMAE (Tong et al., 2022): a video transformer trained to reconstruct masked patches.

It runs in transformers, without decoder and classifier. Source: https://arxiv.org/abs/2203.12602
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import by_library, select
from merv.types import EncoderSpec, Preset

FRAMES, SIZE, TUBELET, PATCH = 16, 224, 2, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS = {
    "merv": Preset("squash", (SIZE, SIZE), "bilinear", None, MEAN, STD),
    "upstream": Preset("crop", (SIZE, SIZE), "bilinear", None, MEAN, STD, "down"),
}
# Tensors of the checkpoints that are not used: the decoder of pretraining, the head of fine-tuning.
UNUSED = ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.")

# variant: hub id, channels, layers, heads, final norm (fine-tuned models have it in the head), parameters
SIZES = {
    "base": ("MCG-NJU/videomae-base", 768, 12, 12, True, 86_227_200),
    "large": ("MCG-NJU/videomae-large", 1024, 24, 16, True, 303_860_736),
    "base-kinetics": ("MCG-NJU/videomae-base-finetuned-kinetics", 768, 12, 12, False, 86_225_664),
    "large-kinetics": ("MCG-NJU/videomae-large-finetuned-kinetics", 1024, 24, 16, False, 303_858_688),
    "huge-kinetics": ("MCG-NJU/videomae-huge-finetuned-kinetics", 1280, 32, 16, False, 631_604_480),
}


class VideoMAE(Encoder):
    """The last hidden state: 8×14×14 cells for 16 frames.

    >>> VideoMAE.variants["base"].grid, VideoMAE.variants["base"].embed_dim
    ((8, 14, 14), 768)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "videomae",
            num_frames=FRAMES,
            grid=(FRAMES // TUBELET, SIZE // PATCH, SIZE // PATCH),
            embed_dim=width,
            presets=PRESETS,
            window_size=FRAMES,
            tubelet_size=TUBELET,
            patch=PATCH,
            layer="last, after the final norm" if norm else "last, no norm",
            source=source,
            weights_license="CC-BY-NC-4.0",
            parameters=parameters,
        )
        for variant, (source, width, _, _, norm, parameters) in SIZES.items()
    }

    def build(self) -> None:
        from transformers import VideoMAEConfig, VideoMAEModel

        _, width, layers, heads, norm, _ = SIZES[self.variant]
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        config = VideoMAEConfig(**sizes, intermediate_size=4 * width, use_mean_pooling=not norm)
        self.net = VideoMAEModel(config)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return by_library(self.net, select(state, prefix="videomae.", drop=UNUSED))

    def tokens(self, windows: Tensor) -> Tensor:
        return self.net(windows).last_hidden_state
