"""Invalid requests to a MultiEncoder are errors, not ignored."""

import pytest
import torch

from merv.errors import EncoderError, ShapeError, UnknownPlugin
from merv.models.multi_encoder import MultiEncoder

VIDEO = torch.ones(4, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mixer", "gate"),
        ("projector", "mlp"),
        ("norm", False),
        ("mixer_options", {"hidden": 8}),
        ("projector_options", {}),
    ],
)
def test_fusion_options_need_output_dim(option, value):
    with pytest.raises(ShapeError, match=f"{option}.*output_dim="):
        MultiEncoder(["fake"], **{option: value})


def test_misspelled_mixer_suggests_a_name():
    with pytest.raises(UnknownPlugin, match="'gate'"):
        MultiEncoder(["fake"], output_dim=8, mixer="gaet")


@pytest.mark.parametrize("output_dim", [None, 8])
def test_question_that_the_mixer_ignores_is_an_error(output_dim):
    model = MultiEncoder(["fake"], grid=(2, 2, 2), output_dim=output_dim)
    with pytest.raises(ShapeError, match="question"):
        model(VIDEO, torch.zeros(1, 8))


def test_encoders_may_be_a_single_name():
    model = MultiEncoder(["fake", "fake/video"], grid=(2, 2, 2))
    assert list(model.features(VIDEO, encoders="fake_video")) == ["fake_video"]


def test_video_loaded_for_fewer_encoders_names_the_missing_ones():
    model = MultiEncoder(["fake", "fake/video"], grid=(2, 2, 2))
    loaded = model.reader(encoders=["fake"])(VIDEO)
    with pytest.raises(EncoderError, match="fake_video"):
        model.features(loaded)
    assert list(model.features(loaded, encoders=["fake"])) == ["fake"]


def test_store_must_be_a_feature_store():
    with pytest.raises(EncoderError, match="kept"):
        MultiEncoder(["fake"]).features(VIDEO, store="kept")
