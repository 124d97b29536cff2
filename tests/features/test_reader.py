"""Reading: everything before the networks, where the networks are not."""

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


def test_loaded_videos_have_the_features_of_the_videos(vision):
    clips, reader = [video(20), video(3)], vision.reader()
    plain, loaded = vision.features(clips), vision.features([reader(clips[0]), clips[1]])
    for name in plain:
        for field, tensor in vars(plain[name]).items():
            assert torch.equal(tensor, getattr(loaded[name], field))


def test_only_what_the_store_lacks_is_read(vision, tmp_path, monkeypatch):
    clip, store = video(), FeatureStore(tmp_path)
    vision.features(clip, encoders=["fake"], store=store)
    first = vision.reader(store)(clip)
    assert list(first.found) == ["fake"]
    assert list(first.clip.frames) == ["fake_video"]
    made = vision.features(first, store=store)
    monkeypatch.setattr("merv.features.reader.prepare", None)  # reading again would fail
    second = vision.reader(store)(clip)
    assert second.clip is None
    assert torch.equal(vision.features(second)["fake_video"].values, made["fake_video"].values)


def test_the_keys_are_those_of_the_model(vision):
    clip = video()
    keys = vision.reader(FeatureStore())(clip).keys
    assert keys == {name: vision.key(clip, name) for name in ("fake", "fake_video")}


def test_a_reader_is_small_whatever_its_encoders_and_store_hold(vision, tmp_path):
    store = FeatureStore()
    vision.features(video(), store=store)
    vision.encoder("fake").register_buffer("large", torch.zeros(1 << 20))
    assert len(pickle.dumps(vision.reader(store))) < 10_000


def test_another_process_reads_the_same(vision):
    clip, reader = video(), vision.reader()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        there = pool.submit(reader, clip).result().clip
    assert torch.equal(there.frames["fake"].pixels, reader(clip).clip.frames["fake"].pixels)


def test_a_pickled_reader_reads_the_same(vision):  # all that a spawned process adds are its imports
    clip, reader = video(), vision.reader()
    there = pickle.loads(pickle.dumps(reader))(clip).clip
    assert torch.equal(there.frames["fake"].pixels, reader(clip).clip.frames["fake"].pixels)


def test_an_unreadable_video_is_named(vision, tmp_path):
    with pytest.raises(UnreadableVideo, match=r"none\.mp4"):
        vision.reader()(tmp_path / "none.mp4")


def test_presets_are_chosen_by_name():
    model = MultiEncoder(["fake", "fake/video"], presets={"fake": "upstream"})
    assert [encoder.preset_name for _, encoder in model.named()] == ["upstream", "merv"]


def test_presets_of_a_stranger_or_of_a_module_are_refused(vision):
    with pytest.raises(EncoderError, match=r"presets= names 'fke'.*Did you mean 'fake'"):
        MultiEncoder(["fake"], presets={"fke": "upstream"})
    with pytest.raises(EncoderError, match="which is made already"):
        MultiEncoder([vision.encoder("fake")], presets={"fake": "upstream"})
