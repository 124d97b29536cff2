"""Hiera, VideoMAE, V-JEPA 2 and SigLIP 2 equal their libraries, with weights in the layout of the hub."""

import sys
import warnings
from functools import partial

import pytest
import timm
import torch
import transformers
from einops import rearrange
from hub import output_of, write_hub
from narrow import HEADS, WIDTH, narrow_networks
from torch.nn.functional import interpolate
from variants import check_shape_and_size

from merv import create_encoder
from merv.encoders import siglip2
from merv.encoders.hiera import Hiera
from merv.encoders.siglip2 import SigLIP2
from merv.encoders.videomae import VideoMAE
from merv.encoders.vjepa2 import VJEPA2
from merv.errors import MissingDependency
from merv.types import Frames
from merv.video.transforms import preprocess

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import hiera

VARIANTS = [
    (encoder, variant) for encoder in (Hiera, VideoMAE, VJEPA2, SigLIP2) for variant in encoder.variants
]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
GREY_LEVEL = 1 / 255 / 0.224


@pytest.fixture
def small(monkeypatch):
    narrow_networks(monkeypatch)


def clip(frames: int, height: int = 96, width: int = 128) -> torch.Tensor:
    """Noise, uint8 [T, 3, H, W]."""
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)


def prepared(encoder, pictures: torch.Tensor) -> Frames:
    return preprocess(Frames.of(pictures[None]), encoder.preset)


def scrambled(model):
    """Randomize all parameters: initial biases and tables would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model.eval()


# Specs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "variant"), VARIANTS)
def test_every_variant_has_the_shape_and_size_of_its_spec(encoder, variant, monkeypatch):
    """Full-size networks on the meta device, which computes shapes but no values."""
    monkeypatch.setattr("torch.linspace", partial(torch.linspace, device="cpu"))  # Hiera reads its values
    table = "transformers.models.videomae.modeling_videomae.get_sinusoid_encoding_table"
    monkeypatch.setattr(table, lambda *shape: torch.empty(1, *shape))  # takes seconds in Python
    spec = encoder.variants[variant]
    with torch.device("meta"):
        net = encoder(variant, weights=None)
        values = net.encode(torch.empty(1, spec.num_frames, 3, *net.preset.input_size))
    check_shape_and_size(spec, net, values)


@pytest.mark.parametrize(("encoder", "variant"), VARIANTS)
def test_every_variant_declares_both_presets_a_source_and_a_license(encoder, variant):
    spec = encoder.variants[variant]
    assert list(spec.presets) == ["merv", "upstream"]
    assert spec.presets["merv"].crop_mode == "squash"
    assert spec.source
    assert spec.weights_license != "unknown"


@pytest.mark.parametrize(
    ("name", "frames", "window", "grid", "width"),
    [
        ("hiera", 32, 16, (16, 7, 7), 896),
        ("videomae", 16, 16, (8, 14, 14), 768),
        ("vjepa2", 16, 16, (8, 16, 16), 1024),
        ("siglip2", 16, 1, (16, 14, 14), 768),
    ],
)
def test_defaults(name, frames, window, grid, width):
    from merv import find_encoder

    spec = next(iter(find_encoder(name).variants.values()))
    assert (spec.name, spec.num_frames, spec.window_size, spec.grid, spec.embed_dim) == (
        name,
        frames,
        window,
        grid,
        width,
    )


@pytest.mark.parametrize(("variant", "model"), [(name, row[0]) for name, row in siglip2.SIZES.items()])
def test_siglip2_upstream_presets_equal_timm(variant, model):
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    preset = SigLIP2.variants[variant].presets["upstream"]
    config = get_pretrained_cfg(model)
    resize, crop, _, normalize = create_transform(**resolve_data_config(config.to_dict())).transforms
    assert SigLIP2.variants[variant].source == config.hf_hub_id
    assert (resize.size, tuple(crop.size)) == (preset.resize_short_side, preset.input_size)
    assert resize.interpolation.value == preset.interpolation
    assert torch.equal(normalize.mean, torch.tensor(preset.mean))
    assert torch.equal(normalize.std, torch.tensor(preset.std))


# Against the libraries -----------------------------------------------------------------------


def test_hiera_equals_its_package(small, tmp_path):
    reference = scrambled(hiera.hiera_base_16x224())
    reference.save_pretrained(tmp_path, config=reference.config)
    encoder = Hiera("base", weights=str(tmp_path), preset="upstream")
    pictures = clip(32)
    frames = (pictures / 255 - 0.45) / 0.225  # as SlowFast does, which cannot be installed
    frames = interpolate(frames, size=(224, 298), mode="bilinear", align_corners=False)[..., 37:-37]
    halves = rearrange(frames, "(n t) c h w -> n c t h w", n=2)
    with torch.no_grad():
        expected = reference(halves, return_intermediates=True)[1][-1]
    values = encoder(prepared(encoder, pictures)).values
    torch.testing.assert_close(values, rearrange(expected, "n t h w d -> 1 (n t) h w d"))


def test_hiera_cells_are_at_their_pixels(small):
    """Without attention and MLPs the network is local: a spot changes only its own cell."""
    encoder = Hiera("base", weights=None)
    for block in encoder.net.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
    still = torch.randn(1, 16, 3, 224, 224)
    spot = still.clone()
    spot[:, 6, :, 80, 176] += 9.0  # tubelet 3, row 2, column 5
    changed = encoder(Frames.of(spot)).values != encoder(Frames.of(still)).values
    assert changed.any(-1).nonzero().tolist() == [[0, 3, 2, 5]]


@pytest.mark.parametrize(
    ("variant", "model"),
    [("base", "VideoMAEForPreTraining"), ("base-kinetics", "VideoMAEForVideoClassification")],
)
def test_videomae_equals_transformers(small, tmp_path, variant, model):
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    decoder = {"decoder_hidden_size": 6, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 8}
    pooled = variant == "base-kinetics"
    config = transformers.VideoMAEConfig(
        **sizes, **decoder, intermediate_size=4 * WIDTH, use_mean_pooling=pooled
    )
    reference = scrambled(getattr(transformers, model)(config))
    reference.save_pretrained(tmp_path)  # with the names of the checkpoint on the hub
    encoder = VideoMAE(variant, weights=str(tmp_path), preset="upstream")
    pictures = clip(16)
    processor = VideoMAEImageProcessorPil(**IMAGENET)
    pixels = processor([picture.numpy() for picture in pictures], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared(encoder, pictures).pixels, pixels)
    with torch.no_grad():
        expected = rearrange(
            reference.videomae(pixels).last_hidden_state, "b (t h w) d -> b t h w d", t=8, h=14
        )
    torch.testing.assert_close(encoder(prepared(encoder, pictures)).values, expected)


def test_vjepa2_equals_transformers(small, tmp_path):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    reference = scrambled(
        transformers.VJEPA2Model(transformers.VJEPA2Config(**sizes, pred_num_hidden_layers=1))
    )
    reference.save_pretrained(tmp_path)
    encoder = VJEPA2(weights=str(tmp_path), preset="upstream")
    pictures = clip(16, 292, 390)  # the size to which its processor resizes
    pixels = transformers.VJEPA2VideoProcessor()(pictures, return_tensors="pt")["pixel_values_videos"]
    with torch.no_grad():
        expected = rearrange(reference.get_vision_features(pixels), "b (t h w) d -> b t h w d", t=8, h=16)
    torch.testing.assert_close(encoder(prepared(encoder, pictures)).values, expected)


@pytest.mark.parametrize(("variant", "size"), [("large", 256), ("giant-384", 384)])
def test_vjepa2_upstream_preset_equals_its_processor_within_one_grey_level(variant, size):
    """The processor resizes uint8 with torchvision, which rounds more than PIL."""
    pictures = clip(2)
    processor = transformers.VJEPA2VideoProcessor(crop_size=size)
    expected = processor(pictures, return_tensors="pt")["pixel_values_videos"]
    frames = preprocess(Frames.of(pictures[None]), VJEPA2.variants[variant].presets["upstream"])
    assert (frames.pixels - expected).abs().max() <= 1.01 * GREY_LEVEL


def test_siglip2_equals_timm(small, tmp_path):
    reference = scrambled(timm.create_model("vit_base_patch16_siglip_224.v2_webli", num_classes=0))
    encoder = SigLIP2(weights=write_hub(tmp_path, reference.state_dict()))
    pixels = torch.randn(1, 2, 3, 224, 224)
    tokens = output_of(reference.blocks[-2], lambda: reference(pixels[0]))
    expected = rearrange(tokens, "t (h w) d -> 1 t h w d", h=14)
    torch.testing.assert_close(encoder(Frames.of(pixels)).values, expected)


# Missing packages ---------------------------------------------------------------------------


def test_hiera_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hiera", None)
    monkeypatch.delitem(sys.modules, "merv.encoders.hiera")
    with pytest.raises(MissingDependency, match=r"\[hiera\]"):
        create_encoder("hiera", weights=None)
