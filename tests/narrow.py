"""Narrow versions of the networks of merv's encoders, with one or two blocks and random weights."""

import warnings
from dataclasses import replace

import timm
import transformers

from merv.encoders import clip, languagebind, videomae, vjepa2
from merv.encoding.registry import find_encoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import hiera

WIDTH, HEADS = 64, 1  # 64 channels per head, as in the real ones


def narrow_networks(monkeypatch) -> None:
    """Let all encoders build narrow networks; convolutional ones keep their size."""
    create_model, create_hiera, create_config = (
        timm.create_model,
        hiera.hiera_base_16x224,
        transformers.VivitConfig,
    )

    def create_narrow_model(name, **options):
        if name.startswith("vit_"):
            options |= {"depth": 2, "embed_dim": WIDTH, "num_heads": HEADS}
        if "dinov2" in name:
            options["init_values"] = 1.0  # timm starts with a LayerScale of 1e-5, which hides the attention
        return create_model(name, **options)

    def create_narrow_config():
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
        return create_config(**sizes, intermediate_size=4 * WIDTH)

    monkeypatch.setattr("timm.create_model", create_narrow_model)
    monkeypatch.setattr("hiera.hiera_base_16x224", lambda: create_hiera(embed_dim=8, stages=[1] * 4))
    _ = transformers.VivitModel  # its module is imported lazily, and would undo the next line
    monkeypatch.setattr("transformers.VivitConfig", create_narrow_config)
    for variant, (source, _, _, _, norm, parameters) in videomae.SIZES.items():
        monkeypatch.setitem(videomae.SIZES, variant, (source, WIDTH, 1, HEADS, norm, parameters))
    for variant, (name, frames, size, resize, *_, license, parameters) in vjepa2.SIZES.items():
        row = (name, frames, size, resize, WIDTH, 1, HEADS, 4 * WIDTH, license, parameters)
        monkeypatch.setitem(vjepa2.SIZES, variant, row)
    for variant, (source, size, patch, *_, parameters) in clip.SIZES.items():
        monkeypatch.setitem(clip.SIZES, variant, (source, size, patch, WIDTH, 2, WIDTH, parameters))
    for variant, (source, *_, parameters) in languagebind.SIZES.items():
        monkeypatch.setitem(languagebind.SIZES, variant, (source, WIDTH, 2, HEADS, parameters))


def narrow_encoder(monkeypatch, name: str):
    """Return the class of an encoder, "name/variant", and the variant, whose spec fits the narrow network."""
    narrow_networks(monkeypatch)
    encoder, variant = find_encoder(name.partition("/")[0]), name.partition("/")[2]
    variant = variant or next(iter(encoder.variants))
    if name.partition("/")[0] not in ("efficientnet_lite", "fake", "transnetv2"):
        spec = replace(encoder.variants[variant], embed_dim=WIDTH, parameters=None)
        monkeypatch.setitem(encoder.variants, variant, spec)
    return encoder, variant
