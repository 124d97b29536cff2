"""Features of a store without the encoders: FeatureDataset and MultiEncoder.from_store."""

import pytest
import torch
from torch.utils.data import DataLoader

from merv import FeatureDataset, FeatureStore, MultiEncoder
from merv.errors import CheckpointError, DataError, ShapeError
from merv.features.dataset import encoder_names
from merv.features.stored import StoredEncoder

CLIPS = [torch.full((8, 3, 32, 32), 40 * number, dtype=torch.uint8) for number in range(3)]


@pytest.fixture
def encoders() -> MultiEncoder:
    return MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2), output_dim=16)


@pytest.fixture
def folder(encoders, tmp_path):
    with FeatureStore(tmp_path / "store") as store:
        encoders.features(CLIPS, store=store)
    return tmp_path / "store"


def test_dataset_yields_the_features_of_each_video(folder, encoders):
    dataset = FeatureDataset(str(folder))
    assert len(dataset) == 3
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=dataset.collate)
    for batch in loader:
        videos = [next(c for c in CLIPS if encoders.key(c, "fake").video == v) for v in batch["video"]]
        expected = encoders.features(videos)
        for name, grid in batch["features"].items():
            assert torch.equal(grid.values, expected[name].values)


def test_dataset_leaves_out_videos_that_lack_an_encoder(folder, encoders):
    with FeatureStore(folder) as store:
        encoders.features(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), ["fake"], store)
    assert len(FeatureDataset(folder)) == 3
    assert len(FeatureDataset(folder, ["fake"])) == 4


@pytest.mark.parametrize("make", [FeatureDataset, MultiEncoder.from_store])
def test_store_without_the_features_is_an_error(folder, tmp_path, make):
    with pytest.raises(DataError, match=r"no features of other\. Available: fake, fake_video"):
        make(FeatureStore(folder), ["other"])
    with pytest.raises(DataError, match=r"no features|no video"):
        make(FeatureStore(tmp_path / "empty"))


def test_model_from_a_store_equals_the_one_with_encoders(folder, encoders):
    model = MultiEncoder.from_store(folder, output_dim=16)
    assert all(isinstance(encoder, StoredEncoder) for _, encoder in model.named())
    model.fusion.load_state_dict(encoders.fusion.state_dict())
    assert torch.equal(model(CLIPS).tokens, encoders(CLIPS).tokens)
    assert torch.equal(model.fuse(model.features(CLIPS)).tokens, encoders(CLIPS).tokens)


def test_encoders_have_one_order(tmp_path):
    encoders = MultiEncoder(["fake/video", "fake"], grid=(4, 2, 2))
    for name in ("fake", "fake_video"):  # each in a shard of its own
        with FeatureStore(tmp_path) as store:
            encoders.features(CLIPS, [name], store)
    dataset, model = FeatureDataset(tmp_path), MultiEncoder.from_store(tmp_path)
    assert list(dataset[0]["features"]) == list(model.encoders) == ["fake", "fake_video"]
    model = MultiEncoder.from_store(tmp_path, ["fake_video", "fake"])
    assert torch.equal(model(CLIPS).tokens, encoders(CLIPS).tokens)
    features = FeatureDataset(tmp_path).collate(list(FeatureDataset(tmp_path)))["features"]
    order = [encoders.key(clip, "fake").video for clip in CLIPS]
    rows = [[item["video"] for item in FeatureDataset(tmp_path)].index(video) for video in order]
    assert torch.equal(model.fuse(features).tokens[rows], encoders(CLIPS).tokens)


def test_one_setting_of_an_encoder_keeps_its_name(folder):
    with FeatureStore(folder) as store:
        MultiEncoder(["fake"], grid=(2, 1, 1)).features(CLIPS, store=store)
    names = [name for name in encoder_names(FeatureStore(folder)).values() if name.startswith("fake-")]
    assert len(names) == 2
    for name in names:
        assert list(MultiEncoder.from_store(folder, name).encoders) == ["fake"]
        assert FeatureDataset(folder, name)[0]["features"]["fake"].shape in ((2, 1, 1), (4, 2, 2))


def test_features_of_another_version_are_refused(folder, monkeypatch):
    monkeypatch.setattr("merv.features.dataset.KEY_VERSION", 99)
    with pytest.raises(DataError, match="another version of merv"):
        MultiEncoder.from_store(folder)


def test_model_from_a_store_names_a_video_that_is_not_stored(folder, tmp_path):
    model = MultiEncoder.from_store(folder)
    with pytest.raises(DataError, match=r"has no features of fake, fake_video.*merv extract"):
        model(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match="has no network"):
        model.encode([model.read(CLIPS[0])])


def test_model_from_a_store_cannot_be_saved(folder, tmp_path):
    with pytest.raises(CheckpointError, match="from_store"):
        MultiEncoder.from_store(folder).save_pretrained(tmp_path / "model")


def test_features_on_different_grids_make_no_model(folder):
    with FeatureStore(folder) as store:
        MultiEncoder({"other": "fake"}, grid=(2, 1, 1)).features(CLIPS, store=store)
    with pytest.raises(DataError, match="fake and other differ in aligner"):
        MultiEncoder.from_store(folder)
    assert MultiEncoder.from_store(folder, ["other"]).aligner.grid == (2, 1, 1)


def test_own_grids_are_kept_and_cannot_be_fused(tmp_path):
    model = MultiEncoder(["fake", "fake/video"], grid=None)
    clip = model.read(CLIPS[0])
    features = model.features(CLIPS[0])
    for name, (own,) in model.encode([clip]).items():
        assert torch.equal(features[name].values, own.values)
    with pytest.raises(ShapeError, match=r"one grid to fuse.*grid=\(t, h, w\)"):
        model(CLIPS[0])
    with pytest.raises(ShapeError, match="common grid"):
        MultiEncoder(["fake"], grid=None, output_dim=8)
    assert model.from_config(model.config(), {}).aligner.grid is None


def test_own_grid_of_a_still_is_one_step(tmp_path):
    still = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert MultiEncoder(["fake"], grid=None).features(still)["fake"].shape == (1, 4, 4)
