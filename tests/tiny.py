"""A tiny VideoLLM and random videos for tests."""

import torch

from merv.features.reader import Reader
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm


def video(frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Return random uint8 frames [T, 3, H, W]."""
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)


def build(conditioned: bool = False, **llm) -> VideoLLM:
    """Return a VideoLLM with two fake encoders; `conditioned`: the mixer sees the question."""
    model, tokenizer = tiny_llm(**llm)
    options = {"conditioned": True} if conditioned else {}
    vision = MultiEncoder(
        ["fake", "fake/video"], grid=(4, 2, 2), output_dim=model.config.hidden_size, mixer_options=options
    )
    torch.nn.init.normal_(vision.fusion.mixer.gain)
    return VideoLLM(model, tokenizer, vision).eval()


def count_readings(monkeypatch):
    """Return a list that gets an entry whenever a video is read."""
    readings, read = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda *args: readings.append(args) or read(*args))
    return readings
