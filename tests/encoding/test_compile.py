"""torch.compile and torch.export work on an encoder and keep its features."""

import pytest
import torch
from references import Size, siglip
from torch import Tensor, nn

from merv.encoding.base import Encoder
from merv.encoding.registry import create_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    with siglip.shrunk(Size(depth=2, width=64)):
        return create_encoder("siglip", weights=None)


def test_encoder_compiles_into_one_graph(encoder):
    pixels = torch.randn(1, 2, 3, 224, 224)
    compiled = torch.compile(encoder.encode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels), encoder.encode(pixels))


class Encode(nn.Module):
    """`encode` as a forward method, which torch.export needs."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder.encode(pixels)


def test_encoder_is_exported_for_any_batch_size(encoder):
    program = torch.export.export(
        Encode(encoder),
        (torch.randn(2, 2, 3, 224, 224),),
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
    )
    pixels = torch.randn(5, 2, 3, 224, 224)
    torch.testing.assert_close(program.module()(pixels), encoder.encode(pixels))
