"""timm's networks load checkpoints of transformers and then equal transformers' features."""

from functools import partial

import pytest
import torch
from einops import rearrange
from hub import write_hub

from merv.encoders.dinov2 import DINOv2
from merv.encoders.siglip import SigLIP
from merv.errors import WeightsError
from merv.types import Frames

DEPTH = 2


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Create networks with DEPTH blocks. The fixture is a function that sets other sizes, too."""
    import timm

    real = timm.create_model

    def set_to(**sizes):
        monkeypatch.setattr("timm.create_model", partial(real, depth=DEPTH, **sizes))

    set_to()
    return set_to


def scrambled(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.05).add_(1.0 if "layer_scale" in name else 0.0)
    return model.eval()


def before_last(model, pixels):
    """Output of the block before the last one, [T, N, D]."""
    with torch.no_grad():
        return model(pixels[0], output_hidden_states=True).hidden_states[-2]


def assert_same(encoder, pixels, tokens, side):
    expected = rearrange(tokens, "t (h w) d -> 1 t h w d", h=side)
    torch.testing.assert_close(encoder(Frames.of(pixels)).values, expected)


@pytest.mark.parametrize("variant", ["small", "small-without-registers", "giant", "giant-without-registers"])
def test_dinov2(tmp_path, shallow, variant):
    import transformers

    kind = "Dinov2" if variant.endswith("without-registers") else "Dinov2WithRegisters"
    shallow(embed_dim=96, num_heads=6)
    size = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": DEPTH, "image_size": 224}
    config = getattr(transformers, f"{kind}Config")(
        **size, patch_size=14, use_swiglu_ffn=variant.startswith("giant")
    )
    reference = scrambled(getattr(transformers, f"{kind}Model")(config))
    reference.save_pretrained(tmp_path)
    registers = getattr(config, "num_register_tokens", 0)
    pixels = torch.randn(1, 2, 3, 224, 224)
    tokens = before_last(reference, pixels)[:, 1 + registers :]
    assert_same(DINOv2(variant, weights=str(tmp_path)), pixels, tokens, 16)


def test_siglip(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    vision = {"num_hidden_layers": DEPTH, "hidden_act": "gelu"}  # as in timm; see docs/weights.md
    text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    reference = scrambled(
        SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 9}))
    )
    reference.save_pretrained(tmp_path)
    pixels = torch.randn(1, 2, 3, 224, 224)
    assert_same(SigLIP(weights=str(tmp_path)), pixels, before_last(reference.vision_model, pixels), 14)


def test_missing_attention_tensor_is_named(tmp_path):
    from safetensors.torch import load_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=DEPTH)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {f"vision_model.{name.removeprefix('vision_model.')}": state[name] for name in state}
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.bias.*blocks\.1\.attn\.q\.bias"):
        SigLIP(weights=write_hub(tmp_path, state))
