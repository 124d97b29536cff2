"""LanguageBind (Zhu et al., 2023): a CLIP vision transformer with attention over time in every block.

Source: https://arxiv.org/abs/2310.01852, https://github.com/PKU-YuanGroup/LanguageBind (MIT)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.weights import select
from merv.types import EncoderSpec, Preset

SIZE, PATCH = 224, 14
# The upstream code also flips half of the clips at random; merv does not.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CROP = Preset("crop", (SIZE, SIZE), "bilinear_plain", mean=MEAN, std=STD)
# Tensors of the checkpoint that are not used: the text tower, and position ids from older versions.
UNUSED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
POSITIONS = "vision_model.embeddings.position_ids"

# variant: hub id, channels, layers, heads, parameters
SIZES = {
    "large": ("LanguageBind/LanguageBind_Video_merge", 1024, 24, 16, 404_187_136),
    "large-ft": ("LanguageBind/LanguageBind_Video_FT", 1024, 24, 16, 404_187_136),
    "huge-v1.5": ("LanguageBind/LanguageBind_Video_Huge_V1.5_FT", 1280, 32, 16, 841_054_720),
}


class LanguageBind(Encoder):
    """The hidden state before the last block, without the class token: 16×16 tokens per frame.

    The config.json beside the weights gives the activation and the number of frames that see each other.
    Random weights have "gelu" and 8 frames.

    >>> LanguageBind.variants["large"].grid, LanguageBind.variants["large"].window_size
    ((16, 16, 16), 8)
    """

    variants: ClassVar = {
        variant: EncoderSpec(
            "languagebind",
            num_frames=16,
            grid=(16, SIZE // PATCH, SIZE // PATCH),
            embed_dim=width,
            presets={"merv": CROP, "upstream": CROP},
            window_size=8,
            patch=PATCH,
            layer="before the last block",
            source=source,
            weights_license="MIT",
            parameters=parameters,
        )
        for variant, (source, width, _, _, parameters) in SIZES.items()
    }
    released_names: ClassVar = {"languagebind-video-noclass": "large"}

    def build(self) -> None:
        from merv.encoders._languagebind_tower import Tower, vision_config

        config: dict[str, Any] = {"hidden_act": "gelu", "num_frames": 8}
        if self.source:
            config = vision_config(self.source, max_frames=self.spec.num_frames)
        frames = config["num_frames"]
        _, width, layers, heads, _ = SIZES[self.variant]
        class_tokens = frames if config.get("clip_type") == "vl_new" else 1
        self.spec = replace(self.spec, window_size=frames)
        self.net = Tower(width, layers, heads, PATCH, SIZE, frames, config["hidden_act"], class_tokens)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = select(state, prefix="vision_model.", drop=(*UNUSED, POSITIONS))
        token, patches = "embeddings.class_embedding", "embeddings.patch_embedding.weight"
        if token in state and state[token].ndim == 1:
            state[token] = state[token][None]
        if patches in state and state[patches].ndim == 5:  # version 1.5 has tubelets of one frame
            state[patches] = state[patches].squeeze(2)
        return state

    def encode(self, pixels: Tensor) -> Tensor:
        tokens = self.net(rearrange(pixels, "b t c h w -> (b t) c h w"))[:, 1:]
        return rearrange(tokens, "(b t) (h w) d -> b t h w d", b=pixels.shape[0], h=self.spec.grid[1])
