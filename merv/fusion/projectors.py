"""Projectors: map the features of one encoder to the embedding dimension of the language model.

A projector is registered in the entry point group `merv.projectors` or named as `module:Class`; see
docs/fusion.md.
"""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """Map features of one encoder to the dimension of the LLM by a Linear, as the released MERV does.

    A subclass creates other layers in `build`. `forward` is `linear(before(features))`. In eval mode, a
    `Fusion` may apply `linear` after mixing, with the same result. If a subclass overrides `forward`, it is
    always applied before mixing. A subclass without `linear` overrides `forward` and `init_scale`. The
    constructor of a subclass accepts `norm`; its further arguments are passed as `projector_options`.

    Args:
        input_dim: Channels of the encoder (D).
        output_dim: Embedding dimension of the LLM (L).
        norm: Normalize each feature vector to mean 0 and variance 1 first. The scales of encoders differ by
            orders of magnitude; without normalization, the encoder with the largest features dominates
            early training. The released MERV does not normalize.

    Example:
        >>> Projector(48, 64)(torch.zeros(5, 48)).shape
        torch.Size([5, 64])
    """

    def __init__(self, input_dim: int, output_dim: int, norm: bool = True) -> None:
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.norm: nn.Module = nn.LayerNorm(input_dim, elementwise_affine=False) if norm else nn.Identity()
        self.build()

    def build(self) -> None:
        """Create the layers: `hidden`, which `before` applies, and the last one, `linear`."""
        self.hidden: nn.Module = nn.Identity()
        self.linear = nn.Linear(self.input_dim, self.output_dim)

    @property
    def foldable(self) -> bool:
        """Whether `linear` can be applied after mixing instead of before."""
        if type(self).forward is not Projector.forward:
            return False
        return type(self.linear) is nn.Linear and self.linear.bias is not None

    def before(self, features: Tensor) -> Tensor:
        """Apply everything before `linear`: [..., D] to the input of `linear`."""
        return self.hidden(self.norm(features))

    def forward(self, features: Tensor) -> Tensor:
        """Project features [..., D] to [..., L]."""
        return self.linear(self.before(features))

    def init_scale(self, rms: float) -> None:
        """Initialize `linear` again: inputs of variance 1 then give outputs of root mean square `rms`."""
        linear = getattr(self, "linear", None)
        if not isinstance(linear, nn.Linear):
            raise NotImplementedError(
                f"{type(self).__name__} has no Linear `linear`, so it must define init_scale()"
            )
        nn.init.normal_(linear.weight, std=rms / linear.in_features**0.5)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


class MLP(Projector):
    """Linear, GELU, Linear."""

    def build(self) -> None:
        self.hidden = nn.Sequential(nn.Linear(self.input_dim, self.output_dim), nn.GELU())
        self.linear = nn.Linear(self.output_dim, self.output_dim)
