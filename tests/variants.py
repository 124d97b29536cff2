"""A check for every variant of every encoder."""

from torch import Tensor

from merv.encoding.base import Encoder
from merv.types import EncoderSpec


def check_shape_and_size(spec: EncoderSpec, net: Encoder, values: Tensor) -> None:
    assert values.shape == (1, *spec.grid, spec.embed_dim)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.parameters
    assert spec.num_frames == spec.grid[0] * spec.tubelet_size
    for preset in spec.presets.values():
        assert spec.patch is None or spec.grid[1:] == tuple(side // spec.patch for side in preset.input_size)
