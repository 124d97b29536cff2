"""LanguageBind's tower equals the upstream code and loads the upstream checkpoints."""

import pytest
import torch
from hub import write_hub

from merv.encoders import languagebind
from merv.encoders._languagebind_tower import Tower
from merv.encoders.languagebind import LanguageBind
from merv.errors import WeightsError
from merv.types import Frames

CONFIG = {"hidden_act": "gelu", "num_frames": 8, "add_time_attn": True}
TINY = {"width": 8, "layers": 3, "heads": 2, "patch": 4, "size": 8, "frames": 4, "activation": "quick_gelu"}

# Two windows of 4 frames through languagebind 0.1.0's CLIPVisionTransformer of the same shape:
# hidden_states[-2] without the class token, mean over the patches, the first 4 numbers of each frame.
UPSTREAM = [
    [-19.069319, -2.470112, -17.743774, 8.775684],
    [-18.289305, -2.002058, -17.624548, 8.279429],
    [-17.735325, -1.380431, -17.209251, 8.281089],
    [-17.653671, -0.821448, -16.561647, 8.872679],
    [-19.111427, -2.509200, -17.753531, 8.776384],
    [-18.384529, -2.083402, -17.695288, 8.346721],
    [-17.787003, -1.422197, -17.195368, 8.311802],
    [-17.669689, -0.886958, -16.623516, 8.764265],
]


def wave(like: torch.Tensor, phase: float) -> torch.Tensor:
    """Values that do not depend on the machine."""
    return torch.sin(torch.arange(like.numel()) * 0.7 + phase).view(like.shape)


def tiny_tower() -> Tower:
    tower = Tower(**TINY)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.copy_(wave(parameter, len(name)) * 0.5)
    return tower


@torch.no_grad()
def test_tower_equals_the_upstream_one():
    tokens = tiny_tower()(wave(torch.empty(8, 3, 8, 8), 0))
    torch.testing.assert_close(tokens[:, 1:].mean(1)[:, :4], torch.tensor(UPSTREAM), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_windows_do_not_see_each_other():
    images = wave(torch.empty(8, 3, 8, 8), 0)
    tower = tiny_tower()
    before = tower(images)
    images[6] += 1.0
    changed = (tower(images) != before).flatten(1).any(1)
    assert changed.tolist() == [False] * 4 + [True] * 4


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(
        languagebind.SIZES, "large", ("LanguageBind/LanguageBind_Video_merge", 1024, 2, 16, 0)
    )


def upstream_state(encoder: LanguageBind) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the hub's pytorch_model.bin, including the text tower."""
    state = {f"vision_model.{name}": tensor for name, tensor in encoder.net.state_dict().items()}
    token = "vision_model.embeddings.class_embedding"
    state[token] = state[token][0]
    state["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    rest = ["text_model.final_layer_norm.weight", "text_projection.weight", "visual_projection.weight"]
    return {**state, **dict.fromkeys([*rest, "logit_scale"], torch.ones(2))}


def test_hub_folder_is_loaded_with_its_frames_and_activation(shallow, tmp_path):
    pixels = torch.randn(1, 8, 3, 224, 224)
    original = LanguageBind(weights=None)
    folder = write_hub(
        tmp_path,
        upstream_state(original),
        file="pytorch_model.bin",
        config={"vision_config": {**CONFIG, "hidden_act": "gelu"}},
    )
    encoder = LanguageBind(weights=folder)
    assert encoder.spec.window_size == 8
    torch.testing.assert_close(encoder(Frames.of(pixels)).values, original(Frames.of(pixels)).values)


def test_version_1_5_has_a_class_token_for_each_frame(shallow, tmp_path):
    state = upstream_state(LanguageBind(weights=None))
    state["vision_model.embeddings.class_embedding"] = torch.randn(4, 1024)
    state["vision_model.embeddings.patch_embedding.weight"] = torch.randn(1024, 3, 1, 14, 14)
    for key in [key for key in state if key.endswith("temporal_embedding")]:
        state[key] = torch.randn(1, 4, 1024)
    config = {"vision_config": {**CONFIG, "num_frames": 4, "clip_type": "vl_new"}}
    encoder = LanguageBind(weights=write_hub(tmp_path, state, config=config))
    assert encoder.spec.window_size == 4
    assert encoder(Frames.of(torch.zeros(1, 4, 3, 224, 224))).values.shape == (1, 4, 16, 16, 1024)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", None),
        ("hidden_act", "relu"),
        ("num_frames", None),
        ("add_time_attn", False),
    ],
)
def test_config_values_have_no_default(tmp_path, key, value):
    folder = write_hub(tmp_path, {}, config={"vision_config": {**CONFIG, key: value}})
    with pytest.raises(WeightsError, match=f"{key}.*{value!r}"):
        LanguageBind(weights=folder)


def test_weights_without_config_raise(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json"):
        LanguageBind(weights=write_hub(tmp_path, {}, file="pytorch_model.bin"))


def test_only_the_text_tower_is_dropped(shallow, tmp_path):
    state = {**upstream_state(LanguageBind(weights=None)), "vision_model.extra": torch.ones(1)}
    folder = write_hub(tmp_path, state, config={"vision_config": CONFIG})
    with pytest.raises(WeightsError, match=r"LanguageBind\('large'\).*1 unexpected \(extra\)"):
        LanguageBind(weights=folder)
