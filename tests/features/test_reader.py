"""Reader: everything before the networks, in another process and without them."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from merv.errors import EncoderError, UnreadableVideo
from merv.features.store import FeatureStore
from merv.models.multi_encoder import MultiEncoder


def video(frames: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def vision() -> MultiEncoder:
    return MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))


def test_features_of_loaded_and_unloaded_videos_are_equal(vision):
    clips, reader = [video(20), video(3)], vision.reader()
    plain, loaded = vision.features(clips), vision.features([reader(clips[0]), clips[1]])
    for name in plain:
        for field, tensor in vars(plain[name]).items():
            assert torch.equal(tensor, getattr(loaded[name], field))


def test_videos_and_stills_are_encoded_together(vision, tmp_path):
    clips, store = [video(20), video(1), video(7), video(1)], FeatureStore(tmp_path)
    vision.features(clips[2], encoders=["fake"], store=store)
    together = vision.features(clips, store=store, together=True)
    for name, grid in vision.features(clips).items():
        for field, tensor in vars(grid).items():
            torch.testing.assert_close(getattr(together[name], field), tensor)


def test_reader_reads_only_for_features_that_are_not_stored(vision, tmp_path, monkeypatch):
    clip, store = video(), FeatureStore(tmp_path)
    vision.features(clip, encoders=["fake"], store=store)
    first = vision.reader(store)(clip)
    assert list(first.stored) == ["fake"]
    assert list(first.clip.frames) == ["fake_video"]
    computed = vision.features(first, store=store)
    monkeypatch.setattr("merv.features.reader.prepare", None)  # reading again would fail
    second = vision.reader(store)(clip)
    assert second.clip is None
    assert torch.equal(vision.features(second)["fake_video"].values, computed["fake_video"].values)


def test_reader_and_model_use_the_same_keys(vision):
    clip = video()
    keys = vision.reader(FeatureStore())(clip).keys
    assert keys == {name: vision.key(clip, name) for name in ("fake", "fake_video")}


def test_pickled_reader_contains_no_weights_or_features(vision, tmp_path):
    store = FeatureStore()
    vision.features(video(), store=store)
    vision.encoder("fake").register_buffer("large", torch.zeros(1 << 20))
    assert len(pickle.dumps(vision.reader(store))) < 10_000


def test_reader_in_forked_process_returns_the_same_frames(vision):
    clip, reader = video(), vision.reader()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        forked = pool.submit(reader, clip).result().clip
    assert torch.equal(forked.frames["fake"].pixels, reader(clip).clip.frames["fake"].pixels)


def test_pickled_reader_returns_the_same_frames(vision):  # as in a spawned process, apart from its imports
    clip, reader = video(), vision.reader()
    unpickled = pickle.loads(pickle.dumps(reader))(clip).clip
    assert torch.equal(unpickled.frames["fake"].pixels, reader(clip).clip.frames["fake"].pixels)


def test_unreadable_video_is_named_in_error(vision, tmp_path):
    with pytest.raises(UnreadableVideo, match=r"none\.mp4"):
        vision.reader()(tmp_path / "none.mp4")


def test_presets_are_selected_by_encoder_name():
    model = MultiEncoder(["fake", "fake/video"], presets={"fake": "upstream"})
    assert [encoder.preset_name for _, encoder in model.named()] == ["upstream", "merv"]


def test_presets_of_unknown_encoder_or_of_module_are_rejected(vision):
    with pytest.raises(EncoderError, match=r"'fke'.* 'fake'"):
        MultiEncoder(["fake"], presets={"fke": "upstream"})
    with pytest.raises(EncoderError, match="fake"):
        MultiEncoder([vision.encoder("fake")], presets={"fake": "upstream"})
