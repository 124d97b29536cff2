"""Preparing: what encoders share is shared only where it is the same."""

from dataclasses import replace

import pytest
import torch

from merv.encoders.fake import Fake
from merv.multi_encoder import MultiEncoder
from merv.prepare import prepare
from merv.sample import Sampling
from merv.types import Preset


class Boxed(Fake):
    """A Fake with two letterboxes that differ in what fills them."""

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
    """A Fake that sees all frames of a clip at once, two to a cell."""

    variants = {"video": replace(Fake.variants["video"], window=0)}

    def encode(self, pixels):
        cells = pixels.mean(dim=(2, 3, 4)).unflatten(1, (-1, 2)).mean(dim=2)
        return cells[:, :, None, None, None].expand(-1, -1, 2, 2, self.spec.width).clone()


def test_letterboxes_of_other_means_are_filled_apart() -> None:
    encoders = {name: Boxed(preset=name) for name in ("dark", "light")}
    clip = prepare(torch.full((1, 3, 16, 32), 99, dtype=torch.uint8), encoders, Sampling())
    for frames in clip.frames.values():
        bar = frames.pixels[..., 0, :]
        torch.testing.assert_close(bar, torch.zeros_like(bar))  # the mean, normalised


@pytest.mark.parametrize(("frames", "rate"), [(1, None), (75, 1.0)])
def test_an_encoder_of_whole_clips_gets_whole_tubelets(frames: int, rate: float | None) -> None:
    model = MultiEncoder({"whole": Whole("video")}, grid=(4, 2, 2), sampling=Sampling(fps=rate))
    video = torch.zeros(frames, 3, 16, 16, dtype=torch.uint8)
    assert model.read(video).frames["whole"].pixels.shape[1] % 2 == 0
    assert model(video).mask.all()
