"""prepare: encoders share frames and resizes only if these are the same for them."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch

from merv.encoders.fake import Fake
from merv.errors import ShapeError, UnreadableVideo
from merv.models.multi_encoder import MultiEncoder
from merv.types import Frames, Preset, VideoInfo
from merv.video.clip import prepare
from merv.video.reader import VideoReader
from merv.video.sampling import Sampling
from merv.video.transforms import normalize, resize


class Boxed(Fake):
    """A Fake with two letterbox presets that are filled with different means."""

    variants = {
        "image": replace(
            Fake.variants["image"],
            presets={
                "dark": Preset("letterbox", (16, 16), "bilinear", mean=(0.0, 0.0, 0.0)),
                "light": Preset("letterbox", (16, 16), "bilinear", mean=(1.0, 1.0, 1.0)),
            },
        )
    }


class Whole(Fake):
    """A Fake with one window for all frames of a clip and two frames per cell."""

    variants = {"video": replace(Fake.variants["video"], window_size=0)}

    def encode(self, pixels):
        cells = pixels.mean(dim=(2, 3, 4)).unflatten(1, (-1, 2)).mean(dim=2)
        return cells[:, :, None, None, None].expand(-1, -1, 2, 2, self.spec.embed_dim).clone()


def test_letterboxes_with_different_means_are_not_shared() -> None:
    encoders = {name: Boxed(preset=name) for name in ("dark", "light")}
    clip = prepare(torch.full((1, 3, 16, 32), 99, dtype=torch.uint8), encoders, Sampling())
    for frames in clip.frames.values():
        bar = frames.pixels[..., 0, :]
        torch.testing.assert_close(bar, torch.zeros_like(bar))  # the mean, normalized


@pytest.mark.parametrize(("frames", "fps"), [(1, None), (75, 1.0)])
def test_encoder_of_whole_clips_gets_complete_tubelets(frames: int, fps: float | None) -> None:
    model = MultiEncoder({"whole": Whole("video")}, grid=(4, 2, 2), sampling=Sampling(fps=fps))
    video = torch.zeros(frames, 3, 16, 16, dtype=torch.uint8)
    assert model.read(video).frames["whole"].pixels.shape[1] % 2 == 0
    assert model(video).mask.all()


def test_encoders_with_equal_geometry_share_one_resize(monkeypatch) -> None:
    resized: Counter[str] = Counter()

    def count(pixels, preset, resample):
        resized[preset.crop_mode] += len(pixels)
        return resize(pixels, preset, resample)

    monkeypatch.setattr("merv.video.clip.resize", count)
    other_mean = replace(Fake.variants["image"].presets["merv"], mean=(0.1, 0.2, 0.3))
    encoders = {"a": Fake(), "b": Fake("video"), "c": Fake(), "d": Fake(preset="upstream")}
    encoders["c"].preset = other_mean
    clip = prepare(torch.randint(0, 256, (16, 3, 24, 40), dtype=torch.uint8), encoders, Sampling())
    assert resized == {"squash": 16, "crop": 16}
    assert torch.equal(clip.frames["a"].pixels, clip.frames["b"].pixels)
    assert not torch.equal(clip.frames["a"].pixels, clip.frames["c"].pixels)


class Large(VideoReader):
    """Twelve frames of 8192×8192 pixels; `alive` refers to those in memory when each was decoded."""

    info = VideoInfo("large", 12.0, tuple(map(float, range(12))), 8192, 8192)
    max_pixels = 8192 * 8192

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[list[weakref.ref]] = []

    def _decode(self, indices):
        decoded = []
        for index in indices:
            frame = torch.zeros(1, dtype=torch.uint8).expand(3, 8192, 8192)
            decoded.append(weakref.ref(frame))
            self.alive.append([reference for reference in decoded if reference() is not None])
            yield index, frame


def test_frames_are_resized_as_they_are_decoded(monkeypatch) -> None:
    monkeypatch.setattr("merv.video.clip.resize", lambda *_: (torch.zeros(1, 3, 16, 16), (0, 0, 1, 1)))
    reader = Large()
    prepare(reader, {"fake": Fake()}, Sampling(), {"fake": 12})
    assert len(reader.alive) == 12
    assert max(map(len, reader.alive)) <= 2


def test_frames_that_fill_the_memory_are_not_read_at_once() -> None:
    with pytest.raises(UnreadableVideo, match=f"max_pixels={3 * 8192 * 8192}"):
        Large().read(range(12))
    assert len(list(Large().frames(range(12)))) == 12


def test_resample_applies_to_frames_key_and_saved_model(tmp_path) -> None:
    video = torch.randint(0, 256, (16, 3, 24, 40), dtype=torch.uint8)
    exact, fast = (MultiEncoder(["fake"], grid=(4, 2, 2), resample=mode) for mode in ("exact", "fast"))
    preset = fast.encoder("fake").preset
    expected = normalize(resize(video, preset, "fast")[0], preset)
    assert torch.equal(fast.read(video).frames["fake"].pixels[0], expected)
    assert exact.key(video, "fake") != fast.key(video, "fake")
    fast.save_pretrained(tmp_path / "saved")
    assert MultiEncoder.from_pretrained(tmp_path / "saved").key(video, "fake") == fast.key(video, "fake")
    with pytest.raises(ShapeError, match="'quick'"):
        MultiEncoder(["fake"], resample="quick")


@pytest.mark.parametrize("seed", range(4))
def test_random_times_cover_every_time_step(seed) -> None:
    model = MultiEncoder(["fake", "fake/video"], grid=(32, 2, 2), sampling=Sampling("segment", seed=seed))
    features = model.features(torch.zeros(200, 3, 16, 16, dtype=torch.uint8))
    assert all(grid.mask.all() for grid in features.values())


@pytest.mark.parametrize("sampling", [Sampling("released"), Sampling("fps", fps=1.0)])
@pytest.mark.parametrize("frames", [3, 4, 26, 30, 60])
def test_sampled_times_cover_every_time_step(sampling, frames) -> None:
    model = MultiEncoder(["fake"], grid=(16, 2, 2), sampling=sampling)
    assert model(torch.zeros(frames, 3, 16, 16, dtype=torch.uint8)).mask.all()


def test_crops_with_different_rounding_are_not_shared() -> None:
    preset = Preset("crop", (16, 16), "bilinear")
    encoders = {name: Fake() for name in ("nearest", "down")}
    encoders["nearest"].preset, encoders["down"].preset = preset, replace(preset, center="down")
    clip = prepare(torch.randint(0, 256, (1, 3, 16, 19), dtype=torch.uint8), encoders, Sampling())
    alone = prepare(torch.zeros(1, 3, 16, 19, dtype=torch.uint8), {"down": encoders["down"]}, Sampling())
    extents = {name: frames.extent[0, 1].item() for name, frames in clip.frames.items()}
    assert extents["down"] == alone.frames["down"].extent[0, 1].item() != extents["nearest"]


def test_encoder_of_whole_clips_can_be_trained_on_padded_clips() -> None:
    class Trainable(Whole):
        def encode(self, pixels):
            return torch.sigmoid(self.net.weight.mean() * super().encode(pixels))

    encoder = Trainable("video").requires_grad_(True)
    frames = Frames.of(torch.ones(2, 8, 3, 16, 16))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    encoder(replace(frames, mask=mask)).values.sum().backward()
    assert encoder.net.weight.grad is not None
