"""Prepare: one video, probed, sampled, decoded once and preprocessed for several encoders.

Each encoder gets its own frames at its own times; what two of them share (the decoding of a
frame, a resize of the same geometry) is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merv.decode import open_video
from merv.encode import Encoder
from merv.preprocess import normalise, resize
from merv.sample import Sampling, on_screen
from merv.types import EncoderSpec, Frames, Preset, VideoInfo


@dataclass(frozen=True, eq=False)
class Clip:
    """One video as its encoders will see it.

    span_s: start and end of what is looked at, in seconds; equal for a still.
    frames: encoder name → preprocessed Frames of batch 1.
    indices: encoder name → which frame of the video each of those is.
    """

    info: VideoInfo
    span_s: tuple[float, float]
    frames: dict[str, Frames]
    indices: dict[str, tuple[int, ...]]


def prepare(
    source: Any,
    encoders: Mapping[str, Encoder],
    sampling: Sampling,
    frames: Mapping[str, int] | None = None,
    **reading: Any,
) -> Clip:
    """Read `source` for all `encoders`; `reading` goes to `merv.decode.open_video`.

    frames: by encoder, how many frames it gets, if not what its spec says.

    A video of fewer frames than an encoder wants shows frames for longer: a wanted time gets the
    frame that is on screen then. Raises the errors of decoding and sampling, which name the source.

    >>> from merv import create_encoder
    >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> clip = prepare(video, {"fake": create_encoder("fake")}, Sampling())
    >>> clip.frames["fake"].pixels.shape
    torch.Size([1, 16, 3, 16, 16])
    """
    with open_video(source, **reading) as reader:
        info = reader.info
        times = {
            name: wanted_times(encoder.spec, info, sampling, (frames or {}).get(name))
            for name, encoder in encoders.items()
        }
        indices = {name: tuple(on_screen(info.times_s, wanted)) for name, wanted in times.items()}
        union = sorted({index for chosen in indices.values() for index in chosen})
        pixels = reader.read(union)  # [len(union), 3, H, W], uint8
    prepared = _preprocess(pixels, union, indices, {n: e.preset for n, e in encoders.items()}, times)
    end_s = info.duration_s if sampling.end_s is None else min(sampling.end_s, info.duration_s)
    return Clip(info, (0.0, 0.0) if info.is_still else (sampling.start_s, end_s), prepared, indices)


def wanted_times(
    spec: EncoderSpec, info: VideoInfo, sampling: Sampling, frames: int | None = None
) -> list[float]:
    """Times in seconds that an encoder wants of a video, in whole windows.

    frames: how many, instead of the number or rate of the spec.
    A still fills one window; where a rate leaves the last window short, its last time repeats.
    """
    window = max(spec.window, 1)
    if info.is_still:
        return [0.0] * window
    times = sampling.times(info, frames or spec.frames, None if frames else spec.fps)
    return times + [times[-1]] * (-len(times) % window)


def _preprocess(
    pixels: Tensor,
    union: Sequence[int],
    indices: Mapping[str, Sequence[int]],
    presets: Mapping[str, Preset],
    times: Mapping[str, Sequence[float]],
) -> dict[str, Frames]:
    """Resize once per geometry, then pick and normalise for each encoder."""
    place = {index: i for i, index in enumerate(union)}
    geometry = {n: (p.fit, p.size, p.resize, p.interpolation) for n, p in presets.items()}
    resized: dict[tuple, tuple[Tensor, tuple[float, float, float, float], dict[int, int]]] = {}
    frames = {}
    for name, preset in presets.items():
        key = geometry[name]
        if key not in resized:
            shared = sorted({i for n, chosen in indices.items() if geometry[n] == key for i in chosen})
            picture, extent = resize(pixels[[place[i] for i in shared]], preset)
            resized[key] = picture, extent, {index: i for i, index in enumerate(shared)}
        picture, extent, row = resized[key]
        chosen = normalise(picture[[row[i] for i in indices[name]]], preset)
        frames[name] = Frames.of(
            chosen[None], torch.tensor([times[name]], dtype=torch.float64), torch.tensor([extent])
        )
    return frames
