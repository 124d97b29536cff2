"""Read one video for several encoders: probe it, sample, decode each frame once, preprocess.

Each encoder gets its own frames at its own times. Encoders share the work that is the same for them: a frame
is decoded once, and resized once per geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from merv.types import EncoderSpec, Frames, Preset, VideoInfo
from merv.video.open import open_video
from merv.video.reader import VideoReader
from merv.video.sampling import Sampling, frame_indices_at
from merv.video.transforms import Extent, Resample, normalize, resize


@dataclass(frozen=True, eq=False)
class Clip:
    """One video, preprocessed for its encoders.

    Args:
        info: Properties of the video.
        span_s: Start and end of the sampled range, in seconds; (0, 0) for a still.
        frames: Encoder name → preprocessed Frames with batch size 1.
        indices: Encoder name → the index of each frame in the video.
    """

    info: VideoInfo
    span_s: tuple[float, float]
    frames: dict[str, Frames]
    indices: dict[str, tuple[int, ...]]

    def only(self, encoders: Sequence[str]) -> Clip | None:
        """The clip for those of its encoders that are named; None if there are none."""
        frames = {name: self.frames[name] for name in encoders if name in self.frames}
        return replace(self, frames=frames, indices={n: self.indices[n] for n in frames}) if frames else None


class HasSpecAndPreset(Protocol):
    """What `prepare` needs to know of an encoder; the network itself is not needed."""

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
    **open_options: Any,
) -> Clip:
    """Read `source` for all `encoders`.

    If a video has fewer frames than an encoder expects, frames are repeated: each sampled time gets the frame
    that is on screen then. The last frame is repeated to complete a window or tubelet.

    Args:
        source: What to read; see `merv.video.open.open_video`.
        encoders: Encoder name → its spec and preset.
        sampling: How to choose times.
        num_frames: Encoder name → number of frames, to override the encoder's spec.
        resample: How frames are resized; see `merv.video.transforms.resize`.
        open_options: Options of `merv.video.open.open_video`.

    Returns:
        The frames of each encoder.

    Raises:
        VideoError: The video cannot be read.
        SamplingError: The sampling does not fit the video.
        ShapeError: An array has another dtype or shape, or a preset cannot crop frames that are this long.
        MissingDependency: The decoding backend cannot be loaded.

    Example:
        >>> from merv import create_encoder
        >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        >>> clip = prepare(video, {"fake": create_encoder("fake")}, Sampling())
        >>> clip.frames["fake"].pixels.shape
        torch.Size([1, 16, 3, 16, 16])
    """
    with open_video(source, **open_options) as reader:
        info = reader.info
        times_s, indices = {}, {}
        for name, encoder in encoders.items():
            count = (num_frames or {}).get(name)  # overrides the rate of the spec, too
            sampled_s = sampling.times(
                info, count or encoder.spec.num_frames, None if count else encoder.spec.fps
            )
            padding = -len(sampled_s) % (encoder.spec.window_size or encoder.spec.tubelet_size)
            times_s[name] = extend_times(sampled_s, padding)
            shown = frame_indices_at(info.times_s, sampled_s, info.time_error_s)
            indices[name] = (*shown, *[shown[-1]] * padding)
        presets = {name: encoder.preset for name, encoder in encoders.items()}
        frames = _preprocess(reader, indices, presets, times_s, resample)
    return Clip(info, sampling.span_s(info), frames, indices)


def extend_times(times_s: Sequence[float], count: int) -> list[float]:
    """Append `count` times at the same spacing, for padding frames after the end of the clip.

    >>> extend_times([0.5, 1.5], 2), extend_times([0.0], 1)
    ([0.5, 1.5, 2.5, 3.5], [0.0, 0.0])
    """
    step_s = times_s[-1] - times_s[-2] if len(times_s) > 1 else 0.0
    return [*times_s, *(times_s[-1] + step_s * i for i in range(1, count + 1))]


def _preprocess(
    reader: VideoReader,
    indices: Mapping[str, Sequence[int]],
    presets: Mapping[str, Preset],
    times_s: Mapping[str, Sequence[float]],
    resample: Resample,
) -> dict[str, Frames]:
    """Resize each frame as it is decoded, once per geometry; then select and normalize for each encoder."""
    geometry = {name: _geometry(preset) for name, preset in presets.items()}
    # Geometry → (a preset with it, the frames to resize). Encoders with the same geometry share them.
    wanted: dict[tuple, tuple[Preset, set[int]]] = {}
    for name, preset in presets.items():
        wanted.setdefault(geometry[name], (preset, set()))[1].update(indices[name])
    resized: dict[tuple, dict[int, Tensor]] = {key: {} for key in wanted}  # geometry → index → [3, H, W]
    extents: dict[tuple, Extent] = {}
    for index, frame in reader.frames({index for _, chosen in wanted.values() for index in chosen}):
        for key, (preset, chosen) in wanted.items():
            if index in chosen:
                scaled, extents[key] = resize(frame[None], preset, resample)
                resized[key][index] = scaled[0].contiguous()  # a crop would keep the whole frame
    frames = {}
    for name, preset in presets.items():
        key = geometry[name]
        normalized = normalize(torch.stack([resized[key][index] for index in indices[name]]), preset)
        frames[name] = Frames.of(
            normalized[None],
            torch.tensor([times_s[name]], dtype=torch.float64, device="cpu"),
            torch.tensor([extents[key]], dtype=torch.float32, device="cpu"),
        )
    return frames


def _geometry(preset: Preset) -> tuple:
    """Return everything in a preset that `resize` depends on; a letterbox is filled with the mean."""
    fill = preset.mean if preset.crop_mode == "letterbox" else None
    size = preset.input_size, preset.resize_short_side
    return preset.crop_mode, size, preset.interpolation, preset.center, fill
