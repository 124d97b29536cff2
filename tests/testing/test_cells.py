"""The contract finds features in the wrong cells, and merv's own encoders satisfy it."""

import pytest
import torch
from einops import rearrange
from narrow import narrow_encoder

from merv.testing import check_encoder

CELLS = "cells are at their pixels"
OWN = [
    "clip",
    "dinov2/small",
    "efficientnet_lite",
    "fake/image",
    "fake/video",
    "hiera/base",
    "languagebind",
    "siglip",
    "siglip2",
    "transnetv2/grid",
    "transnetv2/head",
    "videomae",
    "vivit",
    "vjepa2",
]


def not_passed(encoder, variant=None):
    return [str(finding) for finding in check_encoder(encoder, variant=variant) if not finding.passed]


@pytest.mark.parametrize("name", OWN)
def test_own_encoder_satisfies_the_contract(monkeypatch, name):
    encoder, variant = narrow_encoder(monkeypatch, name)
    assert not_passed(encoder, variant) == []


def shift_cells(values, count):
    """Shift the cells of each step in raster order, as tokens that were not cut off do."""
    return rearrange(values, "b t h w d -> b t (h w) d").roll(count, 2).reshape(values.shape)


def keep_registers(encoder, pixels):
    """Take the first tokens after the class token, although four registers follow it."""
    tokens = encoder.net.forward_features(rearrange(pixels, "b t c h w -> (b t) c h w"))
    return rearrange(tokens[:, 1:257], "(b t) (h w) d -> b t h w d", b=len(pixels), h=16)


IN_SPACE = {
    "rows and columns exchanged": lambda values: values.transpose(2, 3),
    "upside down": lambda values: values.flip(2),
    "mirrored": lambda values: values.flip(3),
    "class token not cut off": lambda values: shift_cells(values, 1),
    "one token too many cut off": lambda values: shift_cells(values, -1),
}
IN_TIME = {
    "reversed": lambda values: values.flip(1),
    "one step late": lambda values: values.roll(1, 1),
    "frames after rows": lambda values: values.permute(0, 2, 3, 1, 4).reshape(values.shape),
}


@pytest.mark.parametrize("name", ["dinov2/small", "efficientnet_lite"])
@pytest.mark.parametrize("fault", IN_SPACE)
def test_cells_of_an_image_in_the_wrong_place_are_found(monkeypatch, name, fault):
    encoder, variant = narrow_encoder(monkeypatch, name)
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda self, pixels: IN_SPACE[fault](encode(self, pixels)))
    failed = [finding.name for finding in check_encoder(encoder, variant=variant) if finding.status == "FAIL"]
    assert failed == [CELLS]


@pytest.mark.parametrize("name", ["hiera/base", "vjepa2"])
@pytest.mark.parametrize("fault", IN_TIME)
def test_steps_of_a_video_in_the_wrong_order_are_found(monkeypatch, name, fault):
    encoder, variant = narrow_encoder(monkeypatch, name)
    encode = encoder.encode

    def encode_wrongly(self, pixels):
        windows = rearrange(encode(self, pixels), "b (n t) h w d -> (b n) t h w d", t=8)
        return rearrange(IN_TIME[fault](windows), "(b n) t h w d -> b (n t) h w d", b=len(pixels))

    monkeypatch.setattr(encoder, "encode", encode_wrongly)
    failed = [finding.name for finding in check_encoder(encoder, variant=variant) if finding.status == "FAIL"]
    assert failed == [CELLS]


def test_registers_that_are_not_cut_off_are_found(monkeypatch):
    encoder, variant = narrow_encoder(monkeypatch, "dinov2/small")
    monkeypatch.setattr(encoder, "encode", keep_registers)
    (fault,) = not_passed(encoder, variant)
    assert "(0, 0, 15)" in fault  # the cell in the top right corner


def test_features_that_ignore_some_pixels_are_found(monkeypatch):
    encoder, variant = narrow_encoder(monkeypatch, "fake/image")
    encode = encoder.encode
    cropped = torch.ones(16, 16)
    cropped[:, 12:] = 0
    monkeypatch.setattr(encoder, "encode", lambda self, pixels: encode(self, pixels * cropped))
    (fault,) = not_passed(encoder, variant)
    assert "(0, 0, 3)" in fault
