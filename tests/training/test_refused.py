"""What a MultiEncoder is asked for in vain is refused in words, not ignored."""

import pytest
import torch

from merv.errors import EncoderError, ShapeError, UnknownPlugin
from merv.models.multi_encoder import MultiEncoder


def test_options_of_a_mixer_want_a_mixer():
    with pytest.raises(ShapeError, match=r"mixer_options= .* output_dim="):
        MultiEncoder(["fake"], mixer_options={"hidden": 8})
    with pytest.raises(UnknownPlugin, match="Did you mean 'gate'"):
        MultiEncoder(["fake"], mixer="gaet")


@pytest.mark.parametrize(
    ("width", "message"), [(None, "Without output_dim="), (8, "is not conditioned on the question")]
)
def test_a_question_that_nothing_looks_at_is_refused(width, message):
    model, video = (
        MultiEncoder(["fake"], grid=(2, 2, 2), output_dim=width),
        torch.ones(4, 3, 16, 16, dtype=torch.uint8),
    )
    with pytest.raises(ShapeError, match=message):
        model(video, torch.zeros(1, 8))


def test_only_takes_the_name_of_one_encoder():
    model, video = (
        MultiEncoder(["fake", "fake/video"], grid=(2, 2, 2)),
        torch.ones(4, 3, 16, 16, dtype=torch.uint8),
    )
    assert list(model.features(video, encoders="fake_video")) == ["fake_video"]


def test_a_video_that_was_loaded_for_fewer_encoders_names_the_others():
    model, video = (
        MultiEncoder(["fake", "fake/video"], grid=(2, 2, 2)),
        torch.ones(4, 3, 16, 16, dtype=torch.uint8),
    )
    loaded = model.reader(encoders=["fake"])(video)
    with pytest.raises(EncoderError, match="loaded without fake_video"):
        model.features(loaded)
    assert list(model.features(loaded, encoders=["fake"])) == ["fake"]


def test_a_store_is_a_feature_store():
    with pytest.raises(EncoderError, match="kept"):
        MultiEncoder(["fake"]).features(torch.ones(4, 3, 16, 16, dtype=torch.uint8), store="kept")
