"""Reader: all that is done to a video before a network sees it, away from the networks.

A `Reader` is small and has no weights, so the workers of a data loader can have one each: they
probe, sample, decode and preprocess, or fetch kept features, while the model trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from merv.encoding.base import Encoder, version_of
from merv.encoding.weights import values_digest
from merv.errors import EncoderError
from merv.features.store import FeatureStore, video_key
from merv.fusion.align import Aligner
from merv.types import EncoderSpec, Grid, Preset
from merv.utils.plugins import class_path
from merv.utils.torch_modules import device_and_dtype
from merv.video.clip import Clip, prepare
from merv.video.reader import BACKENDS
from merv.video.sampling import Sampling
from merv.video.transforms import Resample

VERSION = 3  # one more wherever the same options come to give other features
DIGESTS: WeakKeyDictionary[Encoder, tuple[list[Any], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class EncoderRequest:
    """What a reader knows of an encoder. cache_key: all that its features depend on, but the video."""

    spec: EncoderSpec
    preset: Preset
    cache_key: str = ""


@dataclass(frozen=True, eq=False)
class LoadedVideo:
    """A video as a `Reader` leaves it; `MultiEncoder.features` takes it in a video's place.

    clip: frames for the encoders whose features are not kept yet; None where all are.
    found: encoder name → its kept Grid. keys: encoder name → where the store keeps its features.
    """

    clip: Clip | None
    found: Mapping[str, Grid]
    keys: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Reader:
    """`reader(video)`: the part of `MultiEncoder.features` that needs no network; see `MultiEncoder.reader`.

    requests: encoder name → what it is. num_frames: by name, how many frames an encoder gets, if not what
        its spec says. sampling, backend, resample: as of the MultiEncoder. store: looked up, never
        written. One in memory stays in its process: pickled, it arrives empty.

    Raises the errors of decoding and sampling, which name the video, and those of `video_key`.

    >>> from merv import MultiEncoder
    >>> vision = MultiEncoder(["fake"], grid=(4, 2, 2))
    >>> loaded = vision.reader()(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
    >>> loaded.clip.frames["fake"].pixels.shape
    torch.Size([1, 16, 3, 16, 16])
    >>> vision.features(loaded)["fake"].values.shape
    torch.Size([1, 4, 2, 2, 8])
    """

    requests: Mapping[str, EncoderRequest]
    sampling: Sampling
    num_frames: Mapping[str, int]
    backend: str = "pyav"
    resample: Resample = "exact"
    store: FeatureStore | None = None

    def __call__(self, video: Any, seed: int | None = None) -> LoadedVideo:
        """Everything for one video, of anything that `load_video` reads. seed: for `segment` without one."""
        if seed is not None and self.sampling.seed is None:
            return replace(self, sampling=replace(self.sampling, seed=seed))(video)
        if self.store is None:
            return LoadedVideo(self.read(video), {}, {})
        keys = self.keys(video)
        kept = {name: self.store.get(key) for name, key in keys.items()}
        found = {name: grid for name, grid in kept.items() if grid is not None}
        missing = [name for name in keys if name not in found]
        return LoadedVideo(self.read(video, missing) if missing else None, found, keys)

    def keys(self, video: Any) -> dict[str, str]:
        """Encoder name → where a store keeps this video's features."""
        return {name: video_key(video, request.cache_key) for name, request in self.requests.items()}

    def read(self, video: Any, encoders: Iterable[str] | None = None) -> Clip:
        """Probe, sample, decode and preprocess, for all encoders or some of them."""
        requests = self.requests if encoders is None else {name: self.requests[name] for name in encoders}
        return prepare(
            video, requests, self.sampling, self.num_frames, resample=self.resample, backend=self.backend
        )


def feature_cache_key(
    encoder: Encoder,
    num_frames: int | None,
    sampling: Sampling,
    aligner: Aligner,
    backend: str,
    resample: Resample,
) -> str:
    """All that an encoder's aligned features depend on, but the video: half of what `video_key` hashes.

    Raises EncoderError where the aligner is trained: then what is aligned cannot be kept.
    """
    by_value = encoder.modified or encoder.identity.sha256 is None  # nothing else tells such weights apart
    spec, preset = encoder.spec, encoder.preset
    key = {
        "version": VERSION,
        "class": class_path(type(encoder)),
        "weights": digest(encoder) if by_value else encoder.identity.sha256,
        "dtype": str(device_and_dtype(encoder)[1]),
        "variant": [
            encoder.variant,
            spec.layer,
            spec.grid,
            spec.embed_dim,
            spec.window_size,
            spec.tubelet_size,
        ],
        "frames": spec.num_frames if num_frames is None else num_frames,
        "rate": spec.fps if num_frames is None else None,
        "crop": [preset.crop_mode, preset.input_size, preset.resize_short_side, preset.center],
        "resize": [preset.interpolation, resample, version("pillow")],  # not the same in all its versions
        "normalization": [preset.mean, preset.std],
        "decoder": [(package, version(package)) for package in BACKENDS[backend]],
        "sampling": [
            sampling.mode,
            sampling.start_s,
            sampling.end_s,
            sampling.fps,
            sampling.seed,
            sampling.total,
        ],
        "aligner": aligner_key(aligner),
    }
    return json.dumps(key, sort_keys=True, default=str)


def aligner_key(aligner: nn.Module) -> tuple[Any, ...]:
    """What features depend on of an aligner; of one put in by hand, its class and all that it holds.

    Raises EncoderError where it is trained, or holds what has no value to compare.
    """
    if type(aligner) is Aligner:
        return aligner.grid, aligner.mode
    if any(parameter.requires_grad for parameter in aligner.parameters()):
        raise EncoderError(
            f"The aligner, {type(aligner).__name__}, is trained, so that its results cannot be kept in a "
            "store. What is learned belongs behind the store: make it a mixer."
        )
    own = vars(nn.Module())  # what torch keeps on every module
    parts = [
        (
            name,
            class_path(type(module)),
            [(k, _fact(v)) for k, v in sorted(vars(module).items()) if k not in own],
        )
        for name, module in aligner.named_modules()
    ]
    return *parts, values_digest(aligner)


def _fact(value: Any) -> Any:
    """A value of a module as something whose repr is equal for equal values encoders."""
    if isinstance(value, torch.Tensor):
        return values_digest(nn.ParameterList([nn.Parameter(value, requires_grad=False)]))
    if isinstance(value, (list, tuple)):
        return [_fact(item) for item in value]
    if isinstance(value, dict):
        return [(key, _fact(item)) for key, item in sorted(value.items(), key=str)]
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    raise EncoderError(
        f"The aligner holds a {type(value).__name__}, by which a store cannot tell features apart. Let it "
        "hold numbers, texts and tensors, or use no store."
    )


def digest(encoder: Encoder) -> str:
    """Hash of an encoder's weights as they are; taken again only when they were written to or moved."""
    tensors = encoder.state_dict(keep_vars=True).values()
    state = [(t.data_ptr(), t.dtype, version_of(t)) for t in tensors]
    if encoder not in DIGESTS or DIGESTS[encoder][0] != state:
        DIGESTS[encoder] = state, values_digest(encoder)
    return DIGESTS[encoder][1]
