"""Projectors: features of one encoder to the width of the language model.

A projector is registered in the group `merv.projectors`, or named as `module:Class`; see docs/fusion.md.
"""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """Features of one encoder to the LLM's width: [..., D] → [..., L]; this one by a Linear, as released.

    features: D. width: L.
    norm: first bring each feature vector to mean 0 and variance 1. The release does not;
        encoders differ in scale by orders of magnitude, and without it the largest one
        decides what is learned first.

    A subclass makes other layers in `build`. As long as `forward` stays `linear(before(…))`, `linear` is
    applied once, after mixing, when nothing is trained; a subclass with a `forward` of its own runs as it is.

    >>> Projector(48, 64)(torch.zeros(5, 48)).shape
    torch.Size([5, 64])
    """

    def __init__(self, features: int, width: int, norm: bool = True) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.norm: nn.Module = nn.LayerNorm(features, elementwise_affine=False) if norm else nn.Identity()
        self.build()

    def build(self) -> None:
        """Create the layers: whatever `before` needs, and `linear`, the last one."""
        self.hidden: nn.Module = nn.Identity()
        self.linear = nn.Linear(self.features, self.width)

    @property
    def foldable(self) -> bool:
        """Whether the last Linear may be applied after mixing instead of before."""
        plain = type(self.linear) is nn.Linear and self.linear.bias is not None
        return plain and type(self).forward is Projector.forward

    def before(self, features: Tensor) -> Tensor:
        """Everything but the last Linear."""
        return self.hidden(self.norm(features))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.before(features))

    def scale_to(self, rms: float) -> None:
        """Random weights of `linear` that make tokens of that root mean square of inputs of variance 1."""
        nn.init.normal_(self.linear.weight, std=rms / self.linear.in_features**0.5)
        nn.init.zeros_(self.linear.bias)


class MLP(Projector):
    """Linear, GELU, Linear."""

    def build(self) -> None:
        self.hidden = nn.Sequential(nn.Linear(self.features, self.width), nn.GELU())
        self.linear = nn.Linear(self.width, self.width)
