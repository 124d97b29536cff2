"""The vision tower of LanguageBind's video model, with standard layers and the upstream parameter names.

It is a CLIP vision transformer. Every block first attends over time: each patch attends to the same patch in
the other frames of its window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from merv.encoding.weights import Source
from merv.errors import WeightsError

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


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


@dataclass(frozen=True)
class Shape:
    """Sizes of the tower.

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

    width: int
    layers: int
    heads: int
    patch: int
    size: int
    frames: int
    activation: str
    class_tokens: int = 1


class Tower(nn.Module):
    """[K·frames, 3, size, size] → tokens [K·frames, 1 + cells, width], class token first.

    The tokens are the hidden state before the last block. The last block is loaded but not run.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = _Embeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(shape.width)
        self.encoder = _Blocks(shape)
        self.post_layernorm = nn.LayerNorm(shape.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(images)))


class _Embeddings(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        cells = (shape.size // shape.patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(shape.class_tokens, shape.width))
        self.patch_embedding = nn.Conv2d(3, shape.width, shape.patch, stride=shape.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + cells, shape.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(images), "k d h w -> k (h w) d")
        windows = images.shape[0] // self.class_embedding.shape[0]
        class_tokens = repeat(self.class_embedding, "t d -> (k t) 1 d", k=windows)
        return torch.cat([class_tokens, patches], dim=1) + self.position_embedding.weight


class _Blocks(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers[:-1]:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.frames = shape.frames
        self.temporal_embedding = nn.Parameter(torch.randn(1, shape.frames, shape.width) * shape.width**-0.5)
        self.temporal_layer_norm1 = nn.LayerNorm(shape.width)
        self.temporal_attn = _Attention(shape)
        self.layer_norm1 = nn.LayerNorm(shape.width)
        self.self_attn = _Attention(shape)
        self.layer_norm2 = nn.LayerNorm(shape.width)
        self.mlp = _MLP(shape)

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
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "k n (m d) -> k m n d", m=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "k m n d -> k n (m d)"))


class _MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape.activation]
        self.fc1 = nn.Linear(shape.width, 4 * shape.width)
        self.fc2 = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
