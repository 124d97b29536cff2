"""What holds of every variant of every encoder."""

from torch import Tensor

from merv.encoding.base import Encoder
from merv.types import EncoderSpec


def check_shape_and_size(spec: EncoderSpec, net: Encoder, values: Tensor) -> None:
    assert values.shape == (1, *spec.grid, spec.width)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.parameters
    assert spec.frames == spec.grid[0] * spec.tubelet
    for preset in spec.presets.values():
        assert spec.patch is None or spec.grid[1:] == tuple(side // spec.patch for side in preset.size)
