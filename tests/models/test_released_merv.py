"""Configurations and mixers of the released MERV, translated to merv."""

import pytest
import torch
from official import config_of

from merv.errors import CheckpointError
from merv.models.released_merv import ReleasedConfig, read_config, translate_fusion


def test_default_configuration_of_the_release_is_translated():
    released = config_of(
        [
            "languagebind-video-noclass",
            "dinov2-video-all-tokens",
            "vivit-google-b-all-no-cls-16frames",
            "siglip-vit-b16-224px-all-no-cls",
        ],
        [16, 16, 32, 16],
        16,
        projector_token_length=64,
        visual_feature_length=1024,
    )
    encoders = {
        "languagebind": "languagebind/large",
        "dinov2": "dinov2/large",
        "vivit": "vivit/b-16x2-kinetics400",
        "siglip": "siglip/base",
    }
    frames = {"languagebind": 16, "dinov2": 16, "vivit": 32, "siglip": 16}
    expected = ReleasedConfig(
        encoders, frames, (16, 8, 8), 32, "linear", "cross_attention_avg_lq", "llama2-7b-pure"
    )
    assert read_config(released) == expected


@pytest.mark.parametrize(
    ("specifier", "steps", "projector"),
    [
        ("3davg+linear", 16, "linear"),
        ("no-align+avg+gelu-mlp", 16, "mlp"),
        ("3davg+frame4+linear", 4, "linear"),
    ],
)
def test_architectures_of_the_release_are_translated(specifier, steps, projector):
    released = read_config(config_of(["fake"], [16], steps, arch_specifier=specifier))
    assert (released.grid, released.projector) == ((steps, 2, 2), projector)


@pytest.mark.parametrize("kind", [None, "first"])
def test_one_encoder_without_a_mixer_becomes_the_mean_of_one(kind):
    released = read_config(config_of(["fake"], [16], 16, feature_fusion=kind))
    translated = translate_fusion(released.fusion, {})
    assert (translated.mixer, translated.state) == ("mean", {})


def test_tensors_of_a_missing_mixer_are_rejected():
    with pytest.raises(CheckpointError, match=r"unknown Q"):
        translate_fusion(None, {"Q": torch.ones(1)})
