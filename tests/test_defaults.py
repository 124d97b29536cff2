"""Pixels and features do not depend on torch's default dtype and device, which a program may set."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from media import make_video
from PIL import Image
from torch import Tensor, nn

import merv
from merv import Frames, MultiEncoder, load_video
from merv.encoders.fake import Fake
from merv.encoding.base import Encoder
from merv.features.reader import EncoderRequest
from merv.features.store import FeatureStore
from merv.types import Grid, Preset
from merv.video.clip import Clip, prepare
from merv.video.sampling import Sampling
from merv.video.transforms import Resample

# What a source passes on its way to features. Encoders run with torch's own defaults: Encoder.__call__.
PACKAGE = Path(merv.__file__).parent
FILES = sorted(
    [
        *(path for folder in ("video", "encoding", "features") for path in (PACKAGE / folder).glob("*.py")),
        *(PACKAGE / name for name in ("types.py", "fusion/align.py", "models/multi_encoder.py")),
    ]
)
CREATION = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
DEFAULTS = [
    (torch.float64, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (None, "meta"),
    (torch.float64, "meta"),
]


def with_unnamed_defaults(code: str) -> list[int]:
    """Return the lines that create a tensor without naming its dtype and its device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in CREATION
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]


@contextmanager
def defaults(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype or torch.float32)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def assert_same(one: Frames | Grid, other: Frames | Grid) -> None:
    for name, tensor in vars(one).items():
        assert_same_tensor(tensor, vars(other)[name])


def assert_same_tensor(one: Tensor | None, other: Tensor | None) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert (one.dtype, one.device) == (other.dtype, other.device)
    assert torch.equal(one, other)


class Positional(Encoder):
    """An encoder whose network, like those of other libraries, names no dtype and no device."""

    variants: ClassVar = {"a": replace(Fake.variants["image"], name="positional", source="")}

    def build(self) -> None:
        self.net = nn.Linear(48, 8)
        self.net.register_buffer("table", torch.linspace(0, 1, 16), persistent=False)

    def encode(self, pixels: Tensor) -> Tensor:
        patches = pixels.reshape(*pixels.shape[:2], 4, 4, 48)
        times = torch.arange(pixels.shape[1]) / 3 + self.net.table[: pixels.shape[1]]
        return self.net(patches) + times[:, None, None, None]


def multi_encoder() -> MultiEncoder:
    torch.manual_seed(0)
    encoders = {"image": Fake(), "video": Fake("video"), "positional": Positional(weights=None)}
    return MultiEncoder(encoders, grid=(4, 2, 2))


def clip_of(video: Path, resample: Resample) -> Clip:
    """Read a clip with every kind of preset."""
    presets = {
        "squash": Preset("squash", (16, 16), "bilinear"),
        "crop": Preset("crop", (16, 16), mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7)),
        "letterbox": Preset("letterbox", (16, 16), mean=(0.1, 0.2, 0.3)),
        "plain": Preset("crop", (16, 16), "bilinear_plain"),
    }
    spec = Fake.variants["image"]
    encoders = {name: EncoderRequest(spec, preset) for name, preset in presets.items()}
    return prepare(video, encoders, Sampling(), resample=resample)


def test_every_created_tensor_names_dtype_and_device() -> None:
    assert len(FILES) > 15
    unnamed = {path.name: with_unnamed_defaults(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in unnamed.items() if lines} == {}


def test_rule_finds_unnamed_defaults() -> None:
    assert with_unnamed_defaults("torch.zeros(3, dtype=torch.uint8)\nx.new_zeros(3)\ntorch.tensor(1)") == [
        1,
        3,
    ]


@pytest.mark.parametrize("resample", ["exact", "fast"])
@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
def test_pixels_do_not_depend_on_the_defaults(
    tmp_path: Path, dtype: torch.dtype | None, device: str | None, resample: Resample
) -> None:
    video = make_video(tmp_path / "a.mp4", pixel_aspect=Fraction(4, 3))
    expected, loaded = clip_of(video, resample), load_video(video)
    with defaults(dtype, device):
        clip, again = clip_of(video, resample), load_video(video)
    assert_same(again, loaded)
    for name, frames in clip.frames.items():
        assert_same(frames, expected.frames[name])


@pytest.mark.parametrize("source", ["video", "array", "image"])
@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
def test_features_do_not_depend_on_the_defaults(
    tmp_path: Path, dtype: torch.dtype | None, device: str | None, source: str
) -> None:
    video: Any = make_video(tmp_path / "a.mp4")
    if source != "video":
        video = load_video(video).pixels[0].numpy()
    if source == "image":
        video = Image.fromarray(video[3].transpose(1, 2, 0))
    vision, store = multi_encoder(), FeatureStore()
    expected = vision.features(video, store=store)
    with defaults(dtype, device):
        features, stored = vision.features(video), vision.features(video, store=store)
    for name, grid in features.items():
        assert_same(grid, expected[name])
        assert_same(stored[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_encoder_does_not_depend_on_the_default_dtype_while_it_is_built(dtype: torch.dtype) -> None:
    expected = dict(multi_encoder().named_parameters()) | dict(multi_encoder().named_buffers())
    with defaults(dtype, None):
        built = multi_encoder()
    for name, tensor in (*built.named_parameters(), *built.named_buffers()):
        assert_same_tensor(tensor, expected[name])


def test_encoder_built_on_meta_has_no_values() -> None:
    with torch.device("meta"):
        assert {p.device.type for p in Positional(weights=None).parameters()} == {"meta"}
