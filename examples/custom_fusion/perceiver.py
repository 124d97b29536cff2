"""A custom mixer: a fixed number of learned queries attend to all cells and become the video's tokens.

    merv plugins mixers check perceiver:Perceiver
    merv fit --config recipe.yaml --model.mixer=perceiver:Perceiver --data.train=YOURS.json
    merv ask VIDEO QUESTION --model outputs/custom_fusion/model \\
        --trust perceiver:Perceiver --trust gated:Gated

Training needs `pip install ".[demo]"` in the clone of merv, then `merv download`.

Source: the resampler of Perceiver, arXiv 2103.03206, as used in Flamingo, arXiv 2204.14198.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from merv import Mixer


class Perceiver(Mixer):
    """Learned queries that attend to every cell of every encoder.

    Args:
        output_dim: Embedding dimension of the language model (L).
        num_encoders: Number of encoders (E).
        tokens: Number of tokens for each video.
        heads: Number of attention heads.
    """

    # One block per encoder along axis 0. An encoder that is added later starts with a block of zeros.
    per_encoder_parameters = {"key_of_encoder": (0, 0.0)}

    def __init__(self, output_dim: int, num_encoders: int, tokens: int = 16, heads: int = 4) -> None:
        super().__init__(output_dim, num_encoders)
        self.tokens = tokens
        self.queries = nn.Parameter(torch.randn(tokens, output_dim) / output_dim**0.5)
        self.key_of_encoder = nn.Parameter(torch.zeros(num_encoders, output_dim))
        self.attention = nn.MultiheadAttention(output_dim, heads, batch_first=True)

    def num_tokens(self, cells: int) -> int:
        """The same number for any grid."""
        return self.tokens

    def positions(self, cells: Tensor) -> Tensor:
        """Every token attends to the whole video, so all have its center as their position."""
        return cells.mean(dim=1, keepdim=True).expand(-1, self.tokens, -1)

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # streams [B, E, t, h, w, L], mask [B, E, t, h, w] → tokens [B, N, L], token mask [B, N], no weights
        keys = streams + rearrange(self.key_of_encoder, "e l -> e 1 1 1 l")
        real = rearrange(mask, "b ... -> b (...)")
        has_features = real.any(dim=1, keepdim=True)  # [B, 1]
        queries = repeat(self.queries, "n l -> b n l", b=len(streams))
        attended, _ = self.attention(
            queries,
            rearrange(keys, "b e t h w l -> b (e t h w) l"),
            rearrange(streams, "b e t h w l -> b (e t h w) l"),
            key_padding_mask=real.logical_not() & has_features,  # masking every key would give NaN
            need_weights=False,
        )
        return queries + attended, has_features.expand(-1, self.tokens), None
