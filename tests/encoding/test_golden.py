"""The encoders equal their upstream libraries stage by stage, so that a failure shows where they differ.

benchmarks/encoders/golden.py creates tests/golden with upstream code only: networks of three blocks with 128
channels, on 320×240 frames, with weights that are computed from their names.
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
    """Upstream's values, merv's encoder with the same weights, and preprocessed frames by preset."""

    numbers: dict[str, Tensor]
    encoder: Encoder
    blocks: torch.nn.ModuleList
    frames: dict[str, Frames]

    def stage(self, name: str, preset: str) -> tuple[Tensor, Tensor]:
        """The same slice of merv's values and of upstream's values."""
        return sliced(name, STAGES[name](self, self.frames[preset])), self.numbers[f"{preset}.{name}"]


def embeddings(golden: Golden, frames: Frames) -> Tensor:
    with inputs_of(golden.blocks[0]) as seen:
        golden.encoder(frames)
    return seen[0]


STAGES = {
    "pixels": lambda golden, frames: frames.pixels[0],
    "embeddings": embeddings,
    "tokens": lambda golden, frames: golden.encoder(frames).values[0],
}


@pytest.fixture(scope="module", params=NAMES)
def golden(request, tmp_path_factory) -> Golden:
    reference = importlib.import_module(f"references.{request.param}")
    with safe_open(FOLDER / f"{request.param}.safetensors", "pt") as file:
        numbers, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    state = {name: weight(name, shape) for name, shape in json.loads(metadata["shapes"]).items()}
    folder = tmp_path_factory.mktemp(request.param)
    write_hub(folder, state, file=metadata["file"], config=json.loads(metadata["config"]))
    with reference.shrunk(SIZE):
        encoder = create_encoder(reference.ENCODER, weights=str(folder))
    pictures = torch.from_numpy(moving_picture(reference.FRAMES)).permute(0, 3, 1, 2)[None]
    frames = {
        preset: preprocess(Frames.of(pictures), encoder.spec.presets[preset]) for preset in reference.PRESETS
    }
    return Golden(numbers, encoder, encoder.net.get_submodule(reference.BLOCKS[1]), frames)


def test_there_are_golden_tensors_of_the_five():
    assert set(NAMES) >= {"clip", "dinov2", "languagebind", "siglip", "vivit"}


def test_pixels_equal_upstream(golden):
    for preset in golden.frames:
        torch.testing.assert_close(*golden.stage("pixels", preset), atol=2e-6, rtol=0)


@pytest.mark.parametrize("stage", ["embeddings", "tokens"])
def test_features_equal_upstream(golden, stage):
    actual, expected = golden.stage(stage, "merv")
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# Other properties of these small networks ----------------------------------------------------


def few_frames(golden: Golden, windows: int = 1) -> Frames:
    """The first frame, repeated over a few windows (for an image encoder, of two frames each)."""
    frames = windows * max(golden.encoder.spec.window_size, 2)
    return Frames.of(golden.frames["merv"].pixels[:, :1].expand(-1, frames, -1, -1, -1))


def test_bf16_stays_within_the_documented_bounds(golden):
    encoder = deepcopy(golden.encoder).bfloat16()
    values = encoder(golden.frames["merv"].to(torch.bfloat16)).values[0]
    assert values.dtype == torch.bfloat16
    expected = golden.numbers["merv.tokens"]
    difference = (sliced("tokens", values).float() - expected).abs() / expected.std()
    assert difference.max() < 0.1
    assert difference.mean() < 0.01


def test_blocks_after_the_chosen_layer_do_not_run(golden):
    with inputs_of(golden.blocks[-1]) as seen:
        golden.encoder(few_frames(golden))
    layer = golden.encoder.spec.layer
    assert bool(seen) != ("but one" in layer or "before the last" in layer)


def test_still_encoded_once_equals_repeated_frames(golden):
    still = few_frames(golden, windows=2)
    (once,) = encode_distinct(golden.encoder, [still], [[0] * still.mask.shape[1]])
    torch.testing.assert_close(once.values, golden.encoder(still).values)


def test_encoder_moves_to_another_device(golden):
    """To the meta device, where operations with a tensor on the CPU fail."""
    frames = few_frames(golden)
    grid = deepcopy(golden.encoder).to("meta")(frames.to("meta"))
    assert {t.device.type for t in (grid.values, grid.times_s, grid.extent, grid.mask)} == {"meta"}
    assert grid.values.shape == golden.encoder(frames).values.shape
