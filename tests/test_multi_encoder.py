from dataclasses import replace

import pytest
import torch

from merv.encoders.fake import Fake
from merv.errors import CheckpointError, EncoderError, UnknownEncoder
from merv.multi_encoder import MultiEncoder
from merv.store import FeatureStore
from merv.types import Frames, Grid
from merv.windows import encode_distinct


def video(frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)


@pytest.fixture
def both() -> MultiEncoder:
    return MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2), width=16).eval()


def test_without_a_width_tokens_are_the_channels_side_by_side():
    out = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))(video(20))
    assert out.tokens.shape == (1, 16, 8 + 12)
    assert out.weights is None
    torch.testing.assert_close(out.tokens[0, 0, :8], out.features["fake"].values[0, 0, 0, 0])
    torch.testing.assert_close(out.tokens[0, 5, 8:], out.features["fake_video"].values[0, 1, 0, 1])


def test_with_a_width_tokens_are_fused_and_weights_returned(both):
    out = both([video(20), video(9)])
    assert out.tokens.shape == (2, 16, 16)
    assert out.weights.shape == (2, 2, 4, 2, 2)
    assert out.times_s.shape == (2, 16)
    assert out.mask.all()


def test_times_are_the_centres_of_the_cells(both):
    out = both(video(50))  # 25 frames a second unless said
    assert out.times_s[0, ::4].tolist() == pytest.approx([0.25, 0.75, 1.25, 1.75])


def test_a_batch_equals_one_by_one(both):
    clips = [video(1), video(5), video(60, 48, 20)]
    together = both(clips)
    for i, clip in enumerate(clips):
        alone = both(clip)
        torch.testing.assert_close(together.tokens[i][together.mask[i]], alone.tokens[0])


def test_a_still_gets_one_step_of_time(both):
    assert both(video(1)).tokens.shape == (1, 4, 16)


class Counting(Fake):
    """A Fake that counts the frames it sees."""

    def encode(self, pixels):
        self.seen = getattr(self, "seen", 0) + pixels.shape[0] * pixels.shape[1]
        return super().encode(pixels)


@pytest.mark.parametrize(("frames", "seen"), [(1, 1), (5, 5), (40, 16)])
def test_an_image_encoder_sees_each_distinct_frame_once(frames, seen):
    encoder = Counting("image")
    MultiEncoder({"counting": encoder})(video(frames))
    assert encoder.seen == seen


def test_equal_windows_of_a_video_encoder_are_encoded_once():
    encoder = Counting("video")
    pixels = torch.randn(1, 8, 3, 16, 16)
    clip = Frames.of(torch.cat([pixels, pixels], dim=1))
    (once,) = encode_distinct(encoder, [clip], [[*range(8), *range(8)]])
    assert encoder.seen == 8
    whole = encoder(clip)
    torch.testing.assert_close(once.values, whole.values)
    torch.testing.assert_close(once.times_s, whole.times_s)


@pytest.mark.parametrize("only", [["fake"], ["fake_video"]])
def test_any_subset_of_the_encoders_works(both, only):
    out = both(video(20), only=only)
    present = [name in only for name in both.encoders]
    assert out.weights[0, :, 0, 0, 0].tolist() == [float(p) for p in present]
    assert out.tokens.isfinite().all()


def test_a_cropping_encoder_leaves_the_border_to_the_others():
    model = MultiEncoder(
        {"squash": Fake("image"), "crop": Fake("image", preset="upstream")}, grid=(2, 4, 4), width=16
    )
    out = model(video(4, 32, 64))
    assert out.features["crop"].mask[0, 0, 0].tolist() == [False, True, True, False]
    torch.testing.assert_close(out.weights[0, 1, 0, 0], torch.tensor([0.0, 0.5, 0.5, 0.0]))


class OwnCoordinates(Fake):
    """An encoder with its own clock: features for the second half of what it sees only."""

    variants = {"video": replace(Fake.variants["video"], window=16)}

    def forward(self, frames):
        grid = super().forward(frames)
        half = grid.shape[0] // 2
        return Grid(grid.values[:, half:], grid.times_s[:, half:], grid.extent, grid.mask[:, half:])


def test_an_encoder_may_return_its_own_times():
    out = MultiEncoder({"late": OwnCoordinates("video")}, grid=(8, 1, 1))(video(64))
    assert out.features["late"].mask.flatten().tolist() == [False] * 4 + [True] * 4


def test_features_come_from_the_store_the_second_time(both, tmp_path):
    clip = video(20)
    made = both.features(clip, store=FeatureStore(tmp_path))
    both.read = None  # decoding again would fail
    kept = both.features(clip, store=FeatureStore(tmp_path))
    for name in made:
        assert torch.equal(made[name].values, kept[name].values)
        assert torch.equal(made[name].times_s, kept[name].times_s)


def test_another_grid_or_video_has_another_key(both):
    other = MultiEncoder(["fake"], grid=(2, 2, 2))
    clip = video(20)
    keys = {both.key(clip, "fake"), both.key(clip, "fake_video"), other.key(clip, "fake")}
    assert len(keys | {both.key(video(20), "fake")}) == 4


def test_saved_and_loaded_gives_the_same_tokens(both, tmp_path):
    both.save_pretrained(tmp_path / "model")
    again = MultiEncoder.from_pretrained(tmp_path / "model").eval()
    clip = video(20)
    assert torch.equal(both(clip).tokens, again(clip).tokens)


def test_other_weights_than_when_saved_are_refused(both, tmp_path, monkeypatch):
    both.save_pretrained(tmp_path / "model")
    build = Fake.build

    def another(self):
        build(self)
        self.net.bias.data.add_(1)

    monkeypatch.setattr(Fake, "build", another)
    with pytest.raises(CheckpointError, match="'fake' has other weights than when this was saved"):
        MultiEncoder.from_pretrained(tmp_path / "model")


class Unknown(Fake):
    """A Fake that admits to random weights."""

    variants = {"image": replace(Fake.variants["image"], source="")}

    def __init__(self, variant=None):
        super().__init__(variant, weights=None)


def test_random_weights_are_not_saved(tmp_path):
    model = MultiEncoder({"random": Unknown("image")})
    with pytest.raises(CheckpointError, match="random has random weights"):
        model.save_pretrained(tmp_path / "model")


def test_a_misspelt_encoder_suggests_the_nearest():
    with pytest.raises(UnknownEncoder, match="Did you mean 'fake'"):
        MultiEncoder(["fak"])


def test_two_encoders_of_one_name_need_names():
    with pytest.raises(EncoderError, match="Two encoders are called fake; give them names"):
        MultiEncoder(["fake", Fake()])


def test_no_encoder_is_an_error():
    with pytest.raises(EncoderError, match="at least one encoder"):
        MultiEncoder([])


def test_only_of_a_stranger_is_an_error(both):
    with pytest.raises(EncoderError, match=r"no encoder 'fak'. Did you mean 'fake'"):
        both(video(4), only=["fak"])


def test_weights_for_a_stranger_are_an_error():
    with pytest.raises(EncoderError, match="weights= names 'dino'"):
        MultiEncoder(["fake"], weights={"dino": "/folder"})


def test_how_many_frames_an_encoder_gets_can_be_chosen():
    model = MultiEncoder(["fake", "fake/video"], frames={"fake": 5, "fake_video": 24})
    frames = model.read(video(50)).frames
    assert frames["fake"].pixels.shape[1] == 5
    assert frames["fake_video"].pixels.shape[1] == 24


def test_frames_that_do_not_fill_windows_are_refused():
    with pytest.raises(EncoderError, match="fake_video takes frames in windows of 8; frames=12"):
        MultiEncoder(["fake/video"], frames={"fake_video": 12})
