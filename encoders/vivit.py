"""ViViT (Arnab et al., 2021): a video transformer over tubelets, trained for action recognition.

It runs in transformers, without pooling and classifier. Source: https://arxiv.org/abs/2103.15691
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import by_library, select
from merv.types import EncoderSpec, Preset

FRAMES, SIZE, TUBELET, PATCH = 32, 224, 2, 16
PRESETS = {
    "merv": Preset("squash", (SIZE, SIZE), "bilinear"),
    # Its processor scales pixels to [-1, 1] and then normalizes them again: (2p - 1 - 0.5) / 0.5.
    "upstream": Preset("crop", (SIZE, SIZE), "bilinear", 256, (0.75,) * 3, (0.25,) * 3, "down"),
}


class ViViT(Encoder):
    """The last hidden state after the final norm, without the class token: 16×14×14 cells for 32 frames.

    >>> ViViT.variants["b-16x2-kinetics400"].window_size
    32
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "vivit",
            num_frames=FRAMES,
            grid=(FRAMES // TUBELET, SIZE // PATCH, SIZE // PATCH),
            embed_dim=768,
            presets=PRESETS,
            window_size=FRAMES,
            tubelet_size=TUBELET,
            patch=PATCH,
            layer="last, after the final norm",
            source=f"google/vivit-{variant}",
            weights_license="MIT",
            parameters=88_646_400,
        )
        for variant in ("b-16x2-kinetics400", "b-16x2")
    }
    released_names: ClassVar = {"vivit-google-b-all-no-cls-16frames": "b-16x2-kinetics400"}

    def build(self) -> None:
        from transformers import VivitConfig, VivitModel

        self.net = VivitModel(VivitConfig(), add_pooling_layer=False)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        unused = ("classifier.", "vivit.pooler.", "pooler.")
        return by_library(self.net, select(state, prefix="vivit.", drop=unused))

    def tokens(self, windows: Tensor) -> Tensor:
        return self.net(windows).last_hidden_state[:, 1:]
