"""Modified weights of an encoder are noticed: features get another key, saving without them is refused."""

import pickle
from copy import deepcopy

import pytest
import torch

from merv.encoders.fake import Fake
from merv.errors import CheckpointError
from merv.features.store import FeatureStore
from merv.models.multi_encoder import MultiEncoder
from merv.types import Frames


def test_loaded_weights_get_another_feature_key(tmp_path):
    model, video = MultiEncoder(["fake"], grid=(2, 2, 2)), torch.ones(4, 3, 16, 16, dtype=torch.uint8)
    store = FeatureStore()
    before = model.features(video, store=store)["fake"].values
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
    assert not torch.equal(model.features(video, store=store)["fake"].values, before)
    with pytest.raises(CheckpointError, match="fake"):
        model.save_pretrained(tmp_path / "model")


def test_loading_into_a_meta_encoder_modifies_it():
    encoder = Fake().to("meta")
    encoder.load_state_dict(Fake().state_dict(), assign=True)
    assert encoder.modified


def load_inner(encoder):
    encoder.net.load_state_dict({name: 2 * tensor for name, tensor in encoder.net.state_dict().items()})


def replace_net(encoder):
    encoder.net = torch.nn.Linear(48, 8).requires_grad_(False)


def train_and_freeze(encoder):
    encoder.requires_grad_(True)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    values_of(encoder).sum().backward()
    optimizer.step()
    encoder.requires_grad_(False)


def values_of(encoder):
    return encoder(Frames.of(torch.ones(1, 1, 3, 16, 16))).values


@pytest.mark.parametrize("change", [load_inner, replace_net, train_and_freeze])
@pytest.mark.parametrize(
    "transfer", [lambda model: model, deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_modified_weights_are_noticed(change, transfer, tmp_path):
    model, video = MultiEncoder(["fake"], grid=(2, 2, 2)), torch.ones(4, 3, 16, 16, dtype=torch.uint8)
    key = model.key(video, "fake")
    change(model.encoders["fake"])
    model = transfer(model)
    assert model.key(video, "fake") != key
    with pytest.raises(CheckpointError, match="fake"):
        model.save_pretrained(tmp_path / "model")


def to_double_and_back(model):
    return model.double().float()


@pytest.mark.parametrize(
    "move",
    [
        to_double_and_back,
        torch.inference_mode()(to_double_and_back),
        deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
)
def test_moving_and_copying_does_not_modify(move):
    model, video = MultiEncoder(["fake"], grid=(2, 2, 2)), torch.ones(4, 3, 16, 16, dtype=torch.uint8)
    moved = move(model)
    assert not moved.modified_parts()
    assert moved.key(video, "fake") == MultiEncoder(["fake"], grid=(2, 2, 2)).key(video, "fake")


def test_loading_the_same_weights_does_not_modify(tmp_path):
    model, video = MultiEncoder(["fake"], grid=(2, 2, 2)), torch.ones(4, 3, 16, 16, dtype=torch.uint8)
    key = model.key(video, "fake")
    model.load_state_dict(model.state_dict())
    assert model.key(video, "fake") == key
    model.save_pretrained(tmp_path / "model")


def test_trainable_encoder_is_not_saved_without_its_weights(tmp_path):
    model = MultiEncoder(["fake"], grid=(2, 2, 2))
    model.encoder("fake").requires_grad_(True)
    with pytest.raises(CheckpointError, match="fake"):
        model.save_pretrained(tmp_path / "model")
