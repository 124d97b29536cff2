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
from merv.fusion.registry import MIXERS
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


def test_tokens_without_output_dim_are_the_concatenated_channels():
    out = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))(video(20))
    assert out.tokens.shape == (1, 16, 8 + 12)
    assert out.mix_weights is None
    torch.testing.assert_close(out.tokens[0, 0, :8], out.features["fake"].values[0, 0, 0, 0])
    torch.testing.assert_close(out.tokens[0, 5, 8:], out.features["fake_video"].values[0, 1, 0, 1])


def test_tokens_with_output_dim_are_fused(both):
    out = both([video(20), video(9)])
    assert out.tokens.shape == (2, 16, 16)
    assert out.mix_weights.shape == (2, 2, 4, 2, 2)
    assert out.times_s.shape == (2, 16)
    assert out.mask.all()


def test_times_are_the_centers_of_the_cells(both):
    out = both(video(50))  # a tensor has 25 frames per second by default
    assert out.times_s[0, ::4].tolist() == pytest.approx([0.25, 0.75, 1.25, 1.75])


def test_tokens_do_not_depend_on_the_batch(both):
    clips = [video(1), video(5), video(60, 48, 20)]
    together = both(clips)
    for i, clip in enumerate(clips):
        alone = both(clip)
        torch.testing.assert_close(together.tokens[i][together.mask[i]], alone.tokens[0])


def test_a_still_gets_one_step_of_time(both):
    assert both(video(1)).tokens.shape == (1, 4, 16)


class Counting(Fake):
    """A Fake that counts the frames it encodes."""

    def encode(self, pixels):
        self.num_encoded = getattr(self, "num_encoded", 0) + pixels.shape[0] * pixels.shape[1]
        return super().encode(pixels)


@pytest.mark.parametrize(("frames", "num_encoded"), [(1, 1), (5, 5), (40, 16)])
def test_image_encoder_encodes_each_distinct_frame_once(frames, num_encoded):
    encoder = Counting("image")
    MultiEncoder({"counting": encoder})(video(frames))
    assert encoder.num_encoded == num_encoded


def test_video_encoder_encodes_equal_windows_once():
    encoder = Counting("video")
    pixels = torch.randn(1, 8, 3, 16, 16)
    clip = Frames.of(torch.cat([pixels, pixels], dim=1))
    (once,) = encode_distinct(encoder, [clip], [[*range(8), *range(8)]])
    assert encoder.num_encoded == 8
    whole = encoder(clip)
    torch.testing.assert_close(once.values, whole.values)
    torch.testing.assert_close(once.times_s, whole.times_s)


@pytest.mark.parametrize("encoders", [["fake"], ["fake_video"]])
def test_any_subset_of_the_encoders_works(both, encoders):
    out = both(video(20), encoders=encoders)
    present = [name in encoders for name in both.encoders]
    assert out.mix_weights[0, :, 0, 0, 0].tolist() == [float(p) for p in present]
    assert out.tokens.isfinite().all()


def test_border_cells_use_the_encoders_that_do_not_crop():
    model = MultiEncoder(
        {"squash": Fake("image"), "crop": Fake("image", preset="upstream")}, grid=(2, 4, 4), output_dim=16
    )
    out = model(video(4, 32, 64))
    assert out.features["crop"].mask[0, 0, 0].tolist() == [False, True, True, False]
    torch.testing.assert_close(out.mix_weights[0, 1, 0, 0], torch.tensor([0.0, 0.5, 0.5, 0.0]))


class SecondHalf(Fake):
    """An encoder with features of the second half of its frames only."""

    variants = {"video": replace(Fake.variants["video"], window_size=16)}

    def forward(self, frames):
        grid = super().forward(frames)
        half = grid.shape[0] // 2
        return Grid(grid.values[:, half:], grid.times_s[:, half:], grid.extent, grid.mask[:, half:])


def test_encoder_can_return_other_times():
    out = MultiEncoder({"late": SecondHalf("video")}, grid=(8, 1, 1))(video(64))
    assert out.features["late"].mask.flatten().tolist() == [False] * 4 + [True] * 4


def test_features_are_taken_from_the_store_the_second_time(both, tmp_path, monkeypatch):
    clip = video(20)
    encoded = both.features(clip, store=FeatureStore(tmp_path))
    monkeypatch.setattr("merv.features.reader.prepare", None)  # reading again would fail
    stored = both.features(clip, store=FeatureStore(tmp_path))
    for name in encoded:
        assert torch.equal(encoded[name].values, stored[name].values)
        assert torch.equal(encoded[name].times_s, stored[name].times_s)


def test_keys_depend_on_grid_encoder_and_video(both):
    other = MultiEncoder(["fake"], grid=(2, 2, 2))
    clip = video(20)
    keys = {both.key(clip, "fake"), both.key(clip, "fake_video"), other.key(clip, "fake")}
    assert len(keys | {both.key(video(20), "fake")}) == 4


def test_keys_depend_on_class_and_decoder_version(monkeypatch):
    clip = video(4)
    models = [MultiEncoder({"fake": kind("image")}, grid=(4, 2, 2)) for kind in (Fake, Counting)]
    keys = [model.key(clip, "fake") for model in models]
    monkeypatch.setattr("merv.features.keys.version", lambda package: "0.1")
    assert len({*keys, models[0].key(clip, "fake")}) == 3


def test_num_frames_must_be_a_multiple_of_the_tubelet_size():
    class Whole(Fake):
        variants = {"video": replace(Fake.variants["video"], window_size=0)}

    with pytest.raises(EncoderError, match=r"whole.* 2\b.* 5\b"):
        MultiEncoder({"whole": Whole("video")}, num_frames={"whole": 5})


def test_saved_model_gives_the_same_tokens_after_loading(both, tmp_path):
    both.save_pretrained(tmp_path / "model")
    again = MultiEncoder.from_pretrained(tmp_path / "model").eval()
    clip = video(20)
    assert torch.equal(both(clip).tokens, again(clip).tokens)


def test_encoder_with_other_weights_than_saved_is_rejected(both, tmp_path, monkeypatch):
    both.save_pretrained(tmp_path / "model")
    build = Fake.build

    def build_other(self):
        build(self)
        self.net.bias.data.add_(1)

    monkeypatch.setattr(Fake, "build", build_other)
    with pytest.raises(CheckpointError, match="'fake'"):
        MultiEncoder.from_pretrained(tmp_path / "model")


def test_moved_weights_are_passed_by_name(tmp_path):
    torch.save(Fake().net.state_dict(), tmp_path / "a.pt")
    MultiEncoder([Fake(weights=str(tmp_path / "a.pt"))]).save_pretrained(tmp_path / "model")
    moved = (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    with pytest.raises(WeightsError, match=r"weights=\{'fake': "):
        MultiEncoder.from_pretrained(tmp_path / "model")
    MultiEncoder.from_pretrained(tmp_path / "model", weights={"fake": str(moved)})


class Random(Fake):
    """A Fake with random weights."""

    variants = {"image": replace(Fake.variants["image"], source="")}

    def __init__(self, variant=None):
        super().__init__(variant, weights=None)


def test_random_weights_are_not_saved(tmp_path):
    model = MultiEncoder({"random": Random("image")})
    with pytest.raises(CheckpointError, match="random"):
        model.save_pretrained(tmp_path / "model")


def test_misspelled_encoder_suggests_the_nearest_name():
    with pytest.raises(UnknownPlugin, match=r"'fak'.*'fake'"):
        MultiEncoder(["fak"])


def test_two_encoders_with_the_same_default_name_need_names():
    with pytest.raises(EncoderError, match="fake_a"):
        MultiEncoder(["fake", Fake()])


def test_empty_list_of_encoders_is_an_error():
    with pytest.raises(EncoderError):
        MultiEncoder([])


def test_subset_with_an_unknown_encoder_is_an_error(both):
    with pytest.raises(EncoderError, match=r"'fak'.*'fake'"):
        both(video(4), encoders=["fak"])


def test_weights_for_an_unknown_encoder_are_an_error():
    with pytest.raises(EncoderError, match=r"weights=.*'dino'"):
        MultiEncoder(["fake"], weights={"dino": "/folder"})


def test_num_frames_sets_the_number_of_frames():
    model = MultiEncoder(["fake", "fake/video"], num_frames={"fake": 5, "fake_video": 24})
    frames = model.read(video(50)).frames
    assert frames["fake"].pixels.shape[1] == 5
    assert frames["fake_video"].pixels.shape[1] == 24


def test_num_frames_must_be_a_multiple_of_the_window_size():
    with pytest.raises(EncoderError, match=r"fake_video.* 8\b.* 12\b"):
        MultiEncoder(["fake/video"], num_frames={"fake_video": 12})


@pytest.mark.parametrize("count", [0, 2.5, [4], "4"])
def test_num_frames_must_be_a_positive_whole_number(count):
    with pytest.raises(EncoderError, match=re.escape(f"got {count!r}")):
        MultiEncoder(["fake"], num_frames={"fake": count})


def test_options_by_encoder_must_be_mappings():
    with pytest.raises(EncoderError, match=r"presets .*\{'fake': 'box'\}"):
        MultiEncoder(["fake"], presets="box")
    with pytest.raises(EncoderError, match=r"num_frames .*\{'fake': 8\}"):
        MultiEncoder(["fake"], num_frames=8)


@pytest.mark.parametrize("output_dim", [0, 8.5])
def test_output_dim_must_be_a_positive_whole_number(output_dim):
    with pytest.raises(ShapeError, match=f"output_dim .* {output_dim}"):
        MultiEncoder(["fake"], output_dim=output_dim)


def test_video_file_gives_features_at_true_times(tmp_path):
    path = make_video(tmp_path / "clip.mp4", frames=16, fps=8)
    out = MultiEncoder(["fake"])(str(path))
    assert out.tokens.shape == (1, 16 * 8 * 8, 8)
    assert out.times_s[0, ::64].tolist() == pytest.approx([(i + 0.5) / 8 for i in range(16)])
    spread = out.features["fake"].values[0, :, 3:5].std(dim=(1, 2, 3))  # a square crosses the picture
    assert spread.min() > 0
    assert torch.equal(out.tokens, MultiEncoder(["fake"])(path.read_bytes()).tokens)


def test_encoders_in_bf16_with_a_fusion_in_fp32(both):
    clip = video(20)
    exact = both(clip)
    both.encoders.bfloat16()
    out = both(clip)
    assert out.features["fake"].values.dtype == torch.bfloat16
    assert out.tokens.dtype == torch.float32
    torch.testing.assert_close(out.tokens, exact.tokens, atol=0.05, rtol=0.05)
    assert torch.equal(out.times_s, exact.times_s)  # not rounded to bf16


def test_everything_in_bf16(both):
    clip = video(20)
    exact = both(clip).tokens
    tokens = both.bfloat16()(clip).tokens
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), exact, atol=0.1, rtol=0.1)


def test_keys_depend_on_random_weights():
    class Other(Fake):
        variants = {"image": replace(Fake.variants["image"], source="")}

    models = [MultiEncoder({"fake": Other("image", weights=None)}) for _ in range(2)]
    models[1].encoders["fake"].net.weight.data.add_(1)
    clip = video(4)
    assert models[0].key(clip, "fake") != models[1].key(clip, "fake")


def test_last_window_with_too_few_frames_leaves_no_cells_empty():
    model = MultiEncoder(["fake/video"], grid=(16, 1, 1), sampling=Sampling("fps", fps=2))
    out = model(video(113))  # 4.5 seconds: 9 frames, one more than a window
    assert out.mask.all()


def test_empty_list_of_videos_is_an_error(both):
    with pytest.raises(ShapeError):
        both([])


def test_weights_for_an_unknown_encoder_are_an_error_when_loading(both, tmp_path):
    both.save_pretrained(tmp_path / "model")
    with pytest.raises(EncoderError, match=r"weights=.*'fke'.*'fake'"):
        MultiEncoder.from_pretrained(tmp_path / "model", weights={"fke": "/folder"})


# Invalid arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "keys", "train", "", 3, "llm", "mixer"])
def test_name_that_cannot_be_used_is_rejected_before_anything_changes(name):
    with pytest.raises(EncoderError, match=re.escape(repr(name))):
        MultiEncoder({name: "fake"})
    model = MultiEncoder(["fake"], output_dim=8, grid=(2, 2, 2))
    with pytest.raises(EncoderError, match=re.escape(repr(name))):
        model.add_encoder(name, "fake")
    assert model(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)).tokens.shape == (1, 8, 8)


def test_weights_of_an_encoder_object_are_rejected():
    with pytest.raises(EncoderError, match=r"weights=.*'fake'"):
        MultiEncoder([create_encoder("fake")], weights={"fake": "/no/such/file"})


def test_encoder_class_instead_of_an_object_is_rejected():
    with pytest.raises(EncoderError, match="class Fake"):
        MultiEncoder([Fake])


def test_mixer_instance_is_rejected():
    with pytest.raises(ShapeError, match="mixer="):
        MultiEncoder(["fake"], output_dim=8, mixer=MIXERS.create("mean", 8, 1))


def test_numpy_integers_can_be_saved(tmp_path):
    two = np.int64(2)
    model = MultiEncoder(["fake"], output_dim=np.int64(8), grid=(two, two, two), num_frames={"fake": two})
    model.save_pretrained(tmp_path / "model")
    assert MultiEncoder.from_pretrained(tmp_path / "model").aligner.grid == (2, 2, 2)


def test_encoder_that_covers_no_cell_gives_a_warning():
    model = MultiEncoder([create_encoder("fake", preset="upstream")], grid=(1, 1, 1))
    with pytest.warns(UserWarning, match="fake"):
        model(torch.zeros(2, 3, 16, 40, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(1, 2, 4, 8), (2, 2, 4, 4, 8)])
def test_features_of_another_shape_are_rejected(shape, monkeypatch):
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: torch.zeros(shape))
    with pytest.raises(EncoderError, match=r"\[1, t, h, w, 8\]"):
        Fake()(Frames.of(torch.zeros(1, 2, 3, 16, 16)))


def test_features_with_other_channels_than_in_the_spec_are_rejected(monkeypatch):
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: torch.zeros(len(pixels), 1, 8, 4, 4))
    with pytest.raises(EncoderError, match=r"\[1, t, h, w, 8\] from fake.*\[1, 1, 8, 4, 4\]"):
        MultiEncoder(["fake"], grid=(2, 2, 2))(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_encoder_without_weights_has_a_device_and_dtype():
    assert device_and_dtype(Bare().to("meta"))[0].type == "meta"
    assert device_and_dtype(Bare().to(torch.bfloat16))[1] == torch.bfloat16
    assert not Bare().state_dict()


def test_loaded_model_is_in_eval_mode(both, tmp_path):
    both.train().save_pretrained(tmp_path / "saved")
    loaded = MultiEncoder.from_pretrained(tmp_path / "saved")
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("parts", [["fusion"], ["encoders"], ["fusion", "encoders"], []])
def test_loaded_model_has_the_saved_dtypes(both, tmp_path, parts):
    for part in parts:
        both.get_submodule(part).bfloat16()
    both.save_pretrained(tmp_path / "saved")
    loaded = MultiEncoder.from_pretrained(tmp_path / "saved")
    clip = video(20)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in both.state_dict().items()
    }
    assert torch.equal(loaded(clip).tokens, both(clip).tokens)
    assert not loaded.modified_parts()


def test_dtype_of_one_encoder_is_saved(tmp_path):
    model = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))
    model.encoder("fake_video").bfloat16()
    model.save_pretrained(tmp_path / "saved")
    loaded = MultiEncoder.from_pretrained(tmp_path / "saved")
    dtypes = {name: device_and_dtype(encoder)[1] for name, encoder in loaded.named()}
    assert dtypes == {"fake": torch.float32, "fake_video": torch.bfloat16}


def test_unknown_dtype_in_the_config_is_named(both, tmp_path):
    both.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    file.write_text(file.read_text().replace('"fusion_dtype": "float32"', '"fusion_dtype": "int3"'))
    with pytest.raises(CheckpointError, match="int3"):
        MultiEncoder.from_pretrained(tmp_path / "saved")


def test_sampling_at_a_rate_needs_a_rate() -> None:
    with pytest.raises(EncoderError, match=r"sampling='fps'.*fake"):
        MultiEncoder(["fake"], grid=(4, 2, 2), sampling="fps")
    MultiEncoder(["fake"], grid=(4, 2, 2), sampling=Sampling("fps", fps=2))


def test_encoder_with_constructor_arguments_of_its_own_cannot_be_saved(tmp_path):
    class Scaled(Fake):
        def __init__(self, *arguments, scale=1.0, **options):
            super().__init__(*arguments, **options)
            self.scale = scale

    with pytest.raises(CheckpointError, match="scale"):
        MultiEncoder({"x": Scaled(scale=2.0)}, grid=(4, 2, 2)).save_pretrained(tmp_path / "model")
