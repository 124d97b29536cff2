"""Small features for tests of the feature store. Imports little, for tests that start processes."""

import json

import torch

from merv.features.shard import FeatureKey
from merv.types import WHOLE_PICTURE, Grid


def some_grid(seed: int = 0, t: int = 2, dtype: torch.dtype = torch.bfloat16) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    return Grid(
        torch.randn(1, t, 3, 3, 4, generator=generator).to(dtype),
        torch.arange(t, dtype=torch.float64)[None] + 0.25,
        torch.tensor([WHOLE_PICTURE]),
        torch.rand(1, t, 3, 3, generator=generator) > 0.5,
    )


def some_key(number: int = 0, encoder: str = "clip") -> FeatureKey:
    return FeatureKey(json.dumps({"class": encoder}), f"video {number}", encoder, f"clips/{number}.mp4")
