import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from merv.encoders.fake import Fake
from merv.encoding.registry import create_encoder
from merv.encoding.windows import encode_distinct
from merv.errors import CheckpointError, EncoderError, ShapeError, UnknownPlugin, WeightsError
from merv.features.store import FeatureStore
from merv.fusion.registry import create_mixer
from merv.models.multi_encoder import MultiEncoder
from merv.testing import make_video
from merv.types import Frames, Grid
from merv.utils.torch_modules import device_and_dtype
from merv.video.sampling import Sampling


class Bare(Fake):
    """A Fake without any weights."""

    def build(self):
        self.net = None

    def encode(self, pixels):
        return pixels.mean(dim=(2, 3, 4))[:, :, None, None, None].expand(-1, -1, 4, 4, 8)


def video(frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)


@pytest.fixture
def both() -> MultiEncoder:
    return MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2), output_dim=16).eval()


def test_without_a_width_tokens_are_the_channels_side_by_side():
    out = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))(video(20))
    assert out.tokens.shape == (1, 16, 8 + 12)
    assert out.mix_weights is None
    torch.testing.assert_close(out.tokens[0, 0, :8], out.features["fake"].values[0, 0, 0, 0])
    torch.testing.assert_close(out.tokens[0, 5, 8:], out.features["fake_video"].values[0, 1, 0, 1])


def test_with_a_width_tokens_are_fused_and_weights_returned(both):
    out = both([video(20), video(9)])
    assert out.tokens.shape == (2, 16, 16)
    assert out.mix_weights.shape == (2, 2, 4, 2, 2)
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
    out = both(video(20), encoders=only)
    present = [name in only for name in both.encoders]
    assert out.mix_weights[0, :, 0, 0, 0].tolist() == [float(p) for p in present]
    assert out.tokens.isfinite().all()


def test_a_cropping_encoder_leaves_the_border_to_the_others():
    model = MultiEncoder(
        {"squash": Fake("image"), "crop": Fake("image", preset="upstream")}, grid=(2, 4, 4), output_dim=16
    )
    out = model(video(4, 32, 64))
    assert out.features["crop"].mask[0, 0, 0].tolist() == [False, True, True, False]
    torch.testing.assert_close(out.mix_weights[0, 1, 0, 0], torch.tensor([0.0, 0.5, 0.5, 0.0]))


class OwnCoordinates(Fake):
    """An encoder with its own clock: features for the second half of what it sees only."""

    variants = {"video": replace(Fake.variants["video"], window_size=16)}

    def forward(self, frames):
        grid = super().forward(frames)
        half = grid.shape[0] // 2
        return Grid(grid.values[:, half:], grid.times_s[:, half:], grid.extent, grid.mask[:, half:])


def test_an_encoder_may_return_its_own_times():
    out = MultiEncoder({"late": OwnCoordinates("video")}, grid=(8, 1, 1))(video(64))
    assert out.features["late"].mask.flatten().tolist() == [False] * 4 + [True] * 4


def test_features_come_from_the_store_the_second_time(both, tmp_path, monkeypatch):
    clip = video(20)
    made = both.features(clip, store=FeatureStore(tmp_path))
    monkeypatch.setattr("merv.features.reader.prepare", None)  # decoding again would fail
    kept = both.features(clip, store=FeatureStore(tmp_path))
    for name in made:
        assert torch.equal(made[name].values, kept[name].values)
        assert torch.equal(made[name].times_s, kept[name].times_s)


def test_another_grid_or_video_has_another_key(both):
    other = MultiEncoder(["fake"], grid=(2, 2, 2))
    clip = video(20)
    keys = {both.key(clip, "fake"), both.key(clip, "fake_video"), other.key(clip, "fake")}
    assert len(keys | {both.key(video(20), "fake")}) == 4


def test_another_class_or_decoder_has_another_key(monkeypatch):
    clip = video(4)
    models = [MultiEncoder({"fake": kind("image")}, grid=(4, 2, 2)) for kind in (Fake, Counting)]
    keys = [model.key(clip, "fake") for model in models]
    monkeypatch.setattr("merv.features.reader.version", lambda package: "0.1")
    assert len({*keys, models[0].key(clip, "fake")}) == 3


def test_frames_that_do_not_fill_tubelets_are_refused():
    class Whole(Fake):
        variants = {"video": replace(Fake.variants["video"], window_size=0)}

    with pytest.raises(
        EncoderError, match="whole takes frames in windows of 2, at least one; got num_frames=5"
    ):
        MultiEncoder({"whole": Whole("video")}, num_frames={"whole": 5})


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


def test_weights_that_have_moved_are_asked_for_by_name(tmp_path):
    torch.save(Fake().net.state_dict(), tmp_path / "a.pt")
    MultiEncoder([Fake(weights=str(tmp_path / "a.pt"))]).save_pretrained(tmp_path / "model")
    moved = (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    with pytest.raises(WeightsError, match=r"have moved, pass weights=\{'fake': '/where/they/are'\}"):
        MultiEncoder.from_pretrained(tmp_path / "model")
    MultiEncoder.from_pretrained(tmp_path / "model", weights={"fake": str(moved)})


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
    with pytest.raises(UnknownPlugin, match="Did you mean 'fake'"):
        MultiEncoder(["fak"])


def test_two_encoders_of_one_name_need_names():
    with pytest.raises(EncoderError, match="Two encoders are called fake; give them names"):
        MultiEncoder(["fake", Fake()])


def test_no_encoder_is_an_error():
    with pytest.raises(EncoderError, match="at least one encoder"):
        MultiEncoder([])


def test_only_of_a_stranger_is_an_error(both):
    with pytest.raises(EncoderError, match=r"no encoder 'fak'. Did you mean 'fake'"):
        both(video(4), encoders=["fak"])


def test_weights_for_a_stranger_are_an_error():
    with pytest.raises(EncoderError, match="weights= names 'dino'"):
        MultiEncoder(["fake"], weights={"dino": "/folder"})


def test_how_many_frames_an_encoder_gets_can_be_chosen():
    model = MultiEncoder(["fake", "fake/video"], num_frames={"fake": 5, "fake_video": 24})
    frames = model.read(video(50)).frames
    assert frames["fake"].pixels.shape[1] == 5
    assert frames["fake_video"].pixels.shape[1] == 24


def test_frames_that_do_not_fill_windows_are_refused():
    with pytest.raises(
        EncoderError, match="fake_video takes frames in windows of 8, at least one; got num_frames=12"
    ):
        MultiEncoder(["fake/video"], num_frames={"fake_video": 12})


@pytest.mark.parametrize("count", [0, 2.5, [4], "4"])
def test_frames_are_counted_in_whole_numbers(count):
    with pytest.raises(EncoderError, match=re.escape(f"at least one; got num_frames={count!r}")):
        MultiEncoder(["fake"], num_frames={"fake": count})


def test_what_is_told_by_encoder_is_told_by_encoder():
    with pytest.raises(
        EncoderError,
        match=re.escape("presets must map encoder names to values, e.g. {'fake': 'box'}; got 'box'"),
    ):
        MultiEncoder(["fake"], presets="box")
    with pytest.raises(
        EncoderError, match=re.escape("num_frames must map encoder names to values, e.g. {'fake': 8}; got 8")
    ):
        MultiEncoder(["fake"], num_frames=8)


@pytest.mark.parametrize("width", [0, 8.5])
def test_a_width_is_a_whole_number(width):
    with pytest.raises(ShapeError, match=f"at least 1; got {width}"):
        MultiEncoder(["fake"], output_dim=width)


def test_a_video_file_is_the_first_thing_anyone_gives(tmp_path):
    path = make_video(tmp_path / "clip.mp4", frames=16, fps=8)
    out = MultiEncoder(["fake"])(str(path))
    assert out.tokens.shape == (1, 16 * 8 * 8, 8)
    assert out.times_s[0, ::64].tolist() == pytest.approx([(i + 0.5) / 8 for i in range(16)])
    bright = out.features["fake"].values[0, :, 3:5].std(dim=(1, 2, 3))  # the square crosses the picture
    assert bright.min() > 0
    assert torch.equal(out.tokens, MultiEncoder(["fake"])(path.read_bytes()).tokens)


def test_encoders_in_bf16_feed_a_fusion_in_fp32(both):
    clip = video(20)
    exact = both(clip)
    both.encoders.bfloat16()
    out = both(clip)
    assert out.features["fake"].values.dtype == torch.bfloat16
    assert out.tokens.dtype == torch.float32
    torch.testing.assert_close(out.tokens, exact.tokens, atol=0.05, rtol=0.05)
    assert torch.equal(out.times_s, exact.times_s)  # not rounded to bf16 on the way


def test_all_of_it_in_bf16(both):
    clip = video(20)
    exact = both(clip).tokens
    tokens = both.bfloat16()(clip).tokens
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), exact, atol=0.1, rtol=0.1)


def test_random_weights_are_told_apart_in_the_store():
    class Other(Fake):
        variants = {"image": replace(Fake.variants["image"], source="")}

    models = [MultiEncoder({"fake": Other("image", weights=None)}) for _ in range(2)]
    models[1].encoders["fake"].net.weight.data.add_(1)
    clip = video(4)
    assert models[0].key(clip, "fake") != models[1].key(clip, "fake")


def test_a_rate_that_leaves_a_window_short_leaves_no_hole_at_the_end():
    model = MultiEncoder(["fake/video"], grid=(16, 1, 1), sampling=Sampling("fps", fps=2))
    out = model(video(113))  # 4.5 seconds: 9 frames, one more than a window
    assert out.mask.all()


def test_no_video_is_an_error(both):
    with pytest.raises(ShapeError, match="no video in the list"):
        both([])


def test_weights_for_a_stranger_are_an_error_when_loading_too(both, tmp_path):
    both.save_pretrained(tmp_path / "model")
    with pytest.raises(EncoderError, match=r"weights= names 'fke'.*Did you mean 'fake'"):
        MultiEncoder.from_pretrained(tmp_path / "model", weights={"fke": "/folder"})


# What is told at once ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "keys", "train", "", 3])
def test_a_name_that_torch_keeps_is_refused_before_anything_changes(name):
    with pytest.raises(EncoderError, match="torch keeps that name"):
        MultiEncoder({name: "fake"})
    model = MultiEncoder(["fake"], output_dim=8, grid=(2, 2, 2))
    with pytest.raises(EncoderError, match="torch keeps that name"):
        model.add_encoder(name, "fake")
    assert model(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)).tokens.shape == (1, 8, 8)


def test_weights_of_an_encoder_that_is_made_already_are_refused():
    with pytest.raises(EncoderError, match="weights= names 'fake', which is made already"):
        MultiEncoder([create_encoder("fake")], weights={"fake": "/no/such/file"})


def test_a_class_is_no_encoder_yet():
    with pytest.raises(EncoderError, match=r"Expected an encoder name or a merv.Encoder, got the class"):
        MultiEncoder([Fake])


def test_a_mixer_that_could_not_be_saved_is_refused():
    with pytest.raises(ShapeError, match="takes its mixer by name"):
        MultiEncoder(["fake"], output_dim=8, mixer=create_mixer("mean", 8, 1))


def test_numbers_of_numpy_can_be_saved(tmp_path):
    two = np.int64(2)
    model = MultiEncoder(["fake"], output_dim=np.int64(8), grid=(two, two, two), num_frames={"fake": two})
    model.save_pretrained(tmp_path / "model")
    assert MultiEncoder.from_pretrained(tmp_path / "model").aligner.grid == (2, 2, 2)


def test_a_crop_of_a_wide_film_that_fills_no_cell_is_told():
    model = MultiEncoder([create_encoder("fake", preset="upstream")], grid=(1, 1, 1))
    with pytest.warns(UserWarning, match="fake sees less than half of each cell"):
        model(torch.zeros(2, 3, 16, 40, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(1, 2, 4, 8), (2, 2, 4, 4, 8)])
def test_features_that_are_no_grid_of_the_batch_are_refused(shape, monkeypatch):
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: torch.zeros(shape))
    with pytest.raises(EncoderError, match=r"encode\(\) made .* wanted \[1, t, h, w, 8\]"):
        Fake()(Frames.of(torch.zeros(1, 2, 3, 16, 16)))


def test_features_of_another_width_than_the_spec_says_are_refused(monkeypatch):
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: torch.zeros(len(pixels), 1, 8, 4, 4))
    with pytest.raises(EncoderError, match=r"fake made features \[1, 1, 8, 4, 4\]; .* \[1, t, h, w, 8\]"):
        MultiEncoder(["fake"], grid=(2, 2, 2))(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_an_encoder_without_weights_goes_where_the_others_go():
    assert device_and_dtype(Bare().to("meta"))[0].type == "meta"
    assert device_and_dtype(Bare().to(torch.bfloat16))[1] == torch.bfloat16
    assert not Bare().state_dict()
