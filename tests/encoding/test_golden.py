"""The encoders give what their upstream libraries give, stage by stage, so that a failure says where.

tests/golden is made by benchmarks/encoders/golden.py, which runs upstream code and none of merv's: networks
of three blocks, 128 wide, on 320×240 frames, with weights that follow from their names.
"""

import importlib
import json
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from golden import FOLDER, SIZE, sliced
from hub import write_hub
from references import inputs_of, moving_picture, weight
from safetensors import safe_open
from torch import Tensor

from merv.encoding.base import Encoder
from merv.encoding.registry import create_encoder
from merv.encoding.windows import encode_distinct
from merv.types import Frames
from merv.video.transforms import preprocess

NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


@dataclass(frozen=True)
class Golden:
    """Upstream's numbers, merv's encoder of the same weights, and frames for it by preset."""

    numbers: dict[str, Tensor]
    encoder: Encoder
    blocks: torch.nn.ModuleList
    frames: dict[str, Frames]

    def stage(self, name: str, preset: str) -> tuple[Tensor, Tensor]:
        """Ours and theirs, the same slice of both."""
        return sliced(name, OURS[name](self, self.frames[preset])), self.numbers[f"{preset}.{name}"]


def embeddings(golden: Golden, frames: Frames) -> Tensor:
    with inputs_of(golden.blocks[0]) as seen:
        golden.encoder(frames)
    return seen[0]


OURS = {
    "pixels": lambda golden, frames: frames.pixels[0],
    "embeddings": embeddings,
    "tokens": lambda golden, frames: golden.encoder(frames).values[0],
}


@pytest.fixture(scope="module", params=NAMES)
def golden(request, tmp_path_factory) -> Golden:
    reference = importlib.import_module(f"references.{request.param}")
    with safe_open(FOLDER / f"{request.param}.safetensors", "pt") as file:
        numbers, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    state = {name: weight(name, shape) for name, shape in json.loads(said["shapes"]).items()}
    folder = tmp_path_factory.mktemp(request.param)
    write_hub(folder, state, file=said["file"], config=json.loads(said["config"]))
    with reference.shrunk(SIZE):
        encoder = create_encoder(reference.ENCODER, weights=str(folder))
    pictures = torch.from_numpy(moving_picture(reference.FRAMES)).permute(0, 3, 1, 2)[None]
    frames = {
        preset: preprocess(Frames.of(pictures), encoder.spec.presets[preset]) for preset in reference.PRESETS
    }
    return Golden(numbers, encoder, encoder.net.get_submodule(reference.BLOCKS[1]), frames)


def test_there_are_golden_tensors_of_the_five():
    assert set(NAMES) >= {"clip", "dinov2", "languagebind", "siglip", "vivit"}


def test_pixels_are_upstreams(golden):
    for preset in golden.frames:
        torch.testing.assert_close(*golden.stage("pixels", preset), atol=2e-6, rtol=0)


@pytest.mark.parametrize("stage", ["embeddings", "tokens"])
def test_features_are_upstreams(golden, stage):
    ours, theirs = golden.stage(stage, "merv")
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# What else holds of these small networks ------------------------------------------------------


def some(golden: Golden, windows: int = 1) -> Frames:
    """A few windows of the frames (of an image encoder: two frames each)."""
    frames = windows * max(golden.encoder.spec.window_size, 2)
    return Frames.of(golden.frames["merv"].pixels[:, :1].expand(-1, frames, -1, -1, -1))


def test_bf16_stays_within_the_bounds_of_the_table(golden):
    encoder = deepcopy(golden.encoder).bfloat16()
    values = encoder(golden.frames["merv"].to(torch.bfloat16)).values[0]
    assert values.dtype == torch.bfloat16
    theirs = golden.numbers["merv.tokens"]
    apart = (sliced("tokens", values).float() - theirs).abs() / theirs.std()
    assert apart.max() < 0.1
    assert apart.mean() < 0.01


def test_a_block_after_the_one_that_is_taken_is_not_run(golden):
    with inputs_of(golden.blocks[-1]) as seen:
        golden.encoder(some(golden))
    layer = golden.encoder.spec.layer
    assert bool(seen) != ("but one" in layer or "before the last" in layer)


def test_a_still_encoded_once_equals_it_repeated(golden):
    still = some(golden, windows=2)
    (once,) = encode_distinct(golden.encoder, [still], [[0] * still.mask.shape[1]])
    torch.testing.assert_close(once.values, golden.encoder(still).values)


def test_all_of_it_moves_to_another_device(golden):
    """To torch's meta device, where an operation with a tensor left on the CPU fails."""
    frames = some(golden)
    grid = deepcopy(golden.encoder).to("meta")(frames.to("meta"))
    assert {t.device.type for t in (grid.values, grid.times_s, grid.extent, grid.mask)} == {"meta"}
    assert grid.values.shape == golden.encoder(frames).values.shape
