"""The vision tower of LanguageBind's video model, with standard layers and the upstream parameter names.

It is a CLIP vision transformer. Every block first attends over time: each patch attends to the same patch in
the other frames of its window.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from timm.layers import Mlp, QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

from merv.encoding.weights import Source
from merv.errors import WeightsError

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


def vision_config(source: Source, max_frames: int) -> dict:
    """Read the `vision_config` of the config.json beside the weights.

    The tensors do not show which activation the tower has, how many frames see each other, and that there is
    attention over time. So these values have no default.

    Raises:
        WeightsError: One of the values is missing or not supported.
    """
    config = source.config().get("vision_config", {})
    counts = range(1, 1 + max_frames)
    for key, known in {"hidden_act": ACTIVATIONS, "num_frames": counts, "add_time_attn": [True]}.items():
        if config.get(key) not in known:
            raise WeightsError(
                f"{source.name}: config.json has vision_config.{key} = {config.get(key)!r}; expected one of "
                f"{', '.join(map(str, known))}. Use the config.json of the checkpoint."
            )
    return config


class Tower(nn.Module):
    """[K·frames, 3, size, size] → tokens [K·frames, 1 + cells, width], class token first.

    The tokens are the hidden state before the last block. The last block is loaded but not run.

    Args:
        width: Channels.
        layers: Number of blocks.
        heads: Number of attention heads.
        patch: Side of a patch in pixels.
        size: Side of an image in pixels.
        frames: Number of frames that see each other.
        activation: A key of ACTIVATIONS.
        class_tokens: 1, or the number of frames in the models of version 1.5.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        patch: int,
        size: int,
        frames: int,
        activation: str,
        class_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.embeddings: Any = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(class_tokens, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding(1 + (size // patch) ** 2, width)
        self.pre_layrnorm = nn.LayerNorm(width)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(_Block(width, heads, frames, activation) for _ in range(layers))
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.embeddings
        patches = rearrange(embeddings.patch_embedding(images), "k d h w -> k (h w) d")
        windows = len(images) // len(embeddings.class_embedding)
        class_tokens = repeat(embeddings.class_embedding, "t d -> (k t) 1 d", k=windows)
        x = torch.cat([class_tokens, patches], dim=1) + embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for block in self.encoder.layers[:-1]:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, frames: int, activation: str) -> None:
        super().__init__()
        self.frames = frames
        self.temporal_embedding = nn.Parameter(torch.randn(1, frames, width) * width**-0.5)
        self.temporal_layer_norm1 = nn.LayerNorm(width)
        self.temporal_attn = _Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = _Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, act_layer=ACTIVATIONS[activation])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        x = rearrange(x, "(k t) n d -> (k n) t d", t=self.frames)
        if self.frames > 1:
            x = x + self.temporal_embedding
        x = x + self.temporal_attn(self.temporal_layer_norm1(x))
        x = rearrange(x, "(k n) t d -> (k t) n d", n=tokens)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "k n (m d) -> k m n d", m=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "k m n d -> k n (m d)"))
