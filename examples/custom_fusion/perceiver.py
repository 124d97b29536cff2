"""A mixer of one's own: a fixed number of tokens a video, by learned queries that attend to all cells.

    merv plugins mixers check perceiver:Perceiver
    merv fit --config recipe.yaml --model.mixer=perceiver:Perceiver
    merv ask VIDEO QUESTION --model outputs/custom_fusion/model --trust perceiver:Perceiver

Source: the resampler of Perceiver, arXiv 2103.03206, as Flamingo has it, arXiv 2204.14198.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from merv import Mixer


class Perceiver(Mixer):
    """Learned queries that attend to every cell of every encoder: `tokens` tokens a video.

    tokens: how many. heads: of the attention.
    """

    # One block per encoder along axis 0; an encoder that joins gets a block of zeros.
    per_encoder_parameters = {"key_of_encoder": (0, 0.0)}

    def __init__(self, output_dim: int, num_encoders: int, tokens: int = 16, heads: int = 4) -> None:
        super().__init__(output_dim, num_encoders)
        self.tokens = tokens
        self.queries = nn.Parameter(torch.randn(tokens, output_dim) / output_dim**0.5)
        self.key_of_encoder = nn.Parameter(torch.zeros(num_encoders, output_dim))
        self.attention = nn.MultiheadAttention(output_dim, heads, batch_first=True)

    def num_tokens(self, cells: int) -> int:
        return self.tokens

    def positions(self, cells: Tensor) -> Tensor:
        """All of them in the middle of the video: each token is of all cells."""
        return cells.mean(dim=1, keepdim=True).expand(-1, self.tokens, -1)

    def forward(
        self, streams: Tensor, mask: Tensor, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # streams [B, E, t, h, w, L], mask [B, E, t, h, w] → tokens [B, N, L], their mask [B, N], no weights
        keys = streams + rearrange(self.key_of_encoder, "e l -> e 1 1 1 l")
        real = rearrange(mask, "b ... -> b (...)")
        seen = real.any(dim=1, keepdim=True)  # [B, 1]; where nothing is, attention must look somewhere
        queries = repeat(self.queries, "n l -> b n l", b=len(streams))
        looked, _ = self.attention(
            queries,
            rearrange(keys, "b e t h w l -> b (e t h w) l"),
            rearrange(streams, "b e t h w l -> b (e t h w) l"),
            key_padding_mask=~(real | ~seen),
            need_weights=False,
        )
        return queries + looked, seen.expand(-1, self.tokens), None
