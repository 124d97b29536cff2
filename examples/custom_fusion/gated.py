"""A custom projector: a learned gate scales each channel of the projection.

    merv plugins projectors check gated:Gated
    merv fit --config recipe.yaml --model.projector=gated:Gated --data.train=YOURS.json

Training needs `pip install ".[demo]"` in the clone of merv, then `merv download`.

Source: gated linear units, arXiv 1612.08083.
"""

from torch import Tensor, nn

from merv import Projector


class Gated(Projector):
    """linear(x) · sigmoid(gate(x)), where x are normalized features.

    Args:
        input_dim: Channels of the encoder (D).
        output_dim: Embedding dimension of the language model (L).
        norm: Whether to normalize the features first.
        bias: Initial bias of the gate. With the default, the gate starts almost open.
    """

    def __init__(self, input_dim: int, output_dim: int, norm: bool = True, bias: float = 2.0) -> None:
        super().__init__(input_dim, output_dim, norm)
        self.gate = nn.Linear(input_dim, output_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, features: Tensor) -> Tensor:  # [..., D] → [..., L]
        x = self.before(features)
        return self.linear(x) * self.gate(x).sigmoid()
