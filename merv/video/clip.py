"""Prepare: one video, probed, sampled, decoded once and preprocessed for several encoders.

Each encoder gets its own frames at its own times; what two of them share (the decoding of a
frame, a resize of the same geometry) is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from merv.types import EncoderSpec, Frames, Preset, VideoInfo
from merv.video.open import open_video
from merv.video.sampling import Sampling, frame_indices_at
from merv.video.transforms import Resample, normalize, resize


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


class HasSpecAndPreset(Protocol):
    """An encoder, or whatever stands for it where no network is: its needs."""

    @property
    def spec(self) -> EncoderSpec: ...
    @property
    def preset(self) -> Preset: ...


def prepare(
    source: Any,
    encoders: Mapping[str, HasSpecAndPreset],
    sampling: Sampling,
    num_frames: Mapping[str, int] | None = None,
    resample: Resample = "exact",
    **reading: Any,
) -> Clip:
    """Read `source` for all `encoders`; `reading` goes to `merv.video.open.open_video`.

    num_frames: by encoder, how many frames it gets, if not what its spec says.
    resample: how frames are resized; see `merv.video.transforms.resize`.

    A video of fewer frames than an encoder wants shows frames for longer: a wanted time gets the
    frame that is on screen then. The last frame fills up a last window. Raises the errors of decoding
    and sampling, which name the source.

    >>> from merv import create_encoder
    >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> clip = prepare(video, {"fake": create_encoder("fake")}, Sampling())
    >>> clip.frames["fake"].pixels.shape
    torch.Size([1, 16, 3, 16, 16])
    """
    with open_video(source, **reading) as reader:
        info = reader.info
        times, indices = {}, {}
        for name, encoder in encoders.items():
            wanted = wanted_times(encoder.spec, info, sampling, (num_frames or {}).get(name))
            missing = -len(wanted) % (encoder.spec.window_size or encoder.spec.tubelet_size)
            times[name] = extend_times(wanted, missing)
            shown = frame_indices_at(info.times_s, wanted)
            indices[name] = (*shown, *[shown[-1]] * missing)
        union = sorted({index for chosen in indices.values() for index in chosen})
        pixels = reader.read(union)  # [len(union), 3, H, W], uint8
    presets = {name: encoder.preset for name, encoder in encoders.items()}
    prepared = _preprocess(pixels, union, indices, presets, times, resample)
    end_s = info.duration_s if sampling.end_s is None else min(sampling.end_s, info.duration_s)
    return Clip(info, (0.0, 0.0) if info.is_still else (sampling.start_s, end_s), prepared, indices)


def wanted_times(
    spec: EncoderSpec, info: VideoInfo, sampling: Sampling, frames: int | None = None
) -> list[float]:
    """Times in seconds that an encoder wants of a video; where there is a rate, not in whole windows.

    frames: how many, instead of the number or rate of the spec.
    """
    return sampling.times(info, frames or spec.num_frames, None if frames else spec.fps)


def extend_times(times_s: Sequence[float], more: int) -> list[float]:
    """`more` times after the last, at its pace: what fills a window lies beyond the end of the clip.

    >>> extend_times([0.5, 1.5], 2), extend_times([0.0], 1)
    ([0.5, 1.5, 2.5, 3.5], [0.0, 0.0])
    """
    step_s = times_s[-1] - times_s[-2] if len(times_s) > 1 else 0.0
    return [*times_s, *(times_s[-1] + step_s * i for i in range(1, more + 1))]


def _preprocess(
    pixels: Tensor,
    union: Sequence[int],
    indices: Mapping[str, Sequence[int]],
    presets: Mapping[str, Preset],
    times: Mapping[str, Sequence[float]],
    resample: Resample,
) -> dict[str, Frames]:
    """Resize once per geometry, then pick and normalize for each encoder."""
    place = {index: i for i, index in enumerate(union)}
    geometry = {n: _geometry(preset) for n, preset in presets.items()}
    resized: dict[tuple, tuple[Tensor, tuple[float, float, float, float], dict[int, int]]] = {}
    frames = {}
    for name, preset in presets.items():
        key = geometry[name]
        if key not in resized:
            shared = sorted({i for n, chosen in indices.items() if geometry[n] == key for i in chosen})
            picture, extent = resize(pixels[[place[i] for i in shared]], preset, resample)
            resized[key] = picture, extent, {index: i for i, index in enumerate(shared)}
        picture, extent, row = resized[key]
        chosen = normalize(picture[[row[i] for i in indices[name]]], preset)
        frames[name] = Frames.of(
            chosen[None], torch.tensor([times[name]], dtype=torch.float64), torch.tensor([extent])
        )
    return frames


def _geometry(preset: Preset) -> tuple:
    """All of a preset that `resize` depends on; a letterbox is filled with the mean."""
    fill = preset.mean if preset.crop_mode == "letterbox" else None
    return (
        preset.crop_mode,
        preset.input_size,
        preset.resize_short_side,
        preset.interpolation,
        preset.center,
        fill,
    )
