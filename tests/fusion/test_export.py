"""torch.export and ONNX run the fusion for batches and grids of other sizes than it was exported with."""

import pytest
import torch
from torch import Tensor, nn

from merv.fusion.fusion import Fusion
from merv.types import WHOLE_PICTURE, Grid

MIXERS = ["cross_attention", "gate", "scalar", "mean", "concat", "concat_channels"]
EMBED_DIMS = {"a": 8, "b": 12}
SIZES = [(3, 5, 4, 6), (1, 2, 1, 1)]  # [B, t, h, w]


class Fuse(nn.Module):
    """`Fusion.forward` with tensors in and out."""

    def __init__(self, mixer: str) -> None:
        super().__init__()
        options = {"hidden": 16} if mixer in ("cross_attention", "gate") else {}
        self.fusion = Fusion(EMBED_DIMS, 16, mixer, mixer_options=options).eval()
        if mixer == "cross_attention":
            nn.init.normal_(self.fusion.mixer.gain)  # zeros would hide the weights

    def forward(self, a: Tensor, b: Tensor, mask: Tensor, times_s: Tensor) -> tuple[Tensor, ...]:
        extent = torch.tensor(WHOLE_PICTURE).expand(a.shape[0], -1)
        fused = self.fusion({name: Grid(x, times_s, extent, mask) for name, x in (("a", a), ("b", b))})
        return fused.tokens, fused.positions, fused.mask


def features(batch: int, t: int, h: int, w: int) -> tuple[Tensor, ...]:
    mask = torch.rand(batch, t, h, w) < 0.8
    times_s = torch.rand(batch, t).cumsum(dim=1)
    return *(torch.randn(batch, t, h, w, embed_dim) for embed_dim in EMBED_DIMS.values()), mask, times_s


def exported(module: Fuse) -> torch.export.ExportedProgram:
    sizes = {axis: torch.export.Dim(name) for axis, name in enumerate(("batch", "t", "h", "w"))}
    shapes = (sizes, sizes, sizes, {axis: sizes[axis] for axis in (0, 1)})
    return torch.export.export(module, features(2, 4, 3, 2), dynamic_shapes=shapes)


@pytest.mark.parametrize("mixer", MIXERS)
def test_fusion_is_exported_for_any_size(mixer):
    module = Fuse(mixer)
    program = exported(module).module()
    for size in SIZES:
        inputs = features(*size)
        torch.testing.assert_close(program(*inputs), module(*inputs))


def test_onnx_agrees_with_torch(tmp_path):
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    module = Fuse("cross_attention")
    torch.onnx.export(exported(module), dynamo=True, verbose=False).save(tmp_path / "fusion.onnx")
    session = runtime.InferenceSession(tmp_path / "fusion.onnx")
    names = [value.name for value in session.get_inputs()]
    for size in SIZES:
        inputs = features(*size)
        outputs = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        for output, expected in zip(outputs, module(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-6, rtol=1e-6)
