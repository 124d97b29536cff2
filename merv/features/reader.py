"""Read videos in other processes, such as data loader workers, without loading the encoders there.

A `Reader` is small and has no weights, so each worker of a data loader can have one. Workers decode and
preprocess videos, or load stored features, while the model trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

from merv.encoding.base import Encoder
from merv.encoding.weights import values_digest
from merv.errors import EncoderError
from merv.features.store import FeatureStore, video_key
from merv.fusion.align import Aligner
from merv.types import EncoderSpec, Grid, Preset
from merv.utils.plugins import class_path
from merv.utils.private import version_of
from merv.utils.torch_modules import device_and_dtype
from merv.video.clip import Clip, prepare
from merv.video.reader import BACKENDS
from merv.video.sampling import Sampling
from merv.video.transforms import Resample

VERSION = 4  # part of the key; increase it if the same options produce other features
# Encoder → (state of its tensors, digest of its weights)
DIGESTS: WeakKeyDictionary[Encoder, tuple[list[Any], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class EncoderRequest:
    """What a `Reader` needs to know about an encoder.

    Args:
        spec: The encoder's spec.
        preset: The encoder's preprocessing.
        cache_key: Everything that the features depend on except the video; see `feature_cache_key`. Empty if
            there is no store.
    """

    spec: EncoderSpec
    preset: Preset
    cache_key: str = ""


@dataclass(frozen=True, eq=False)
class LoadedVideo:
    """A video that a `Reader` has read; `MultiEncoder.features` accepts it instead of a video.

    Args:
        clip: Frames for the encoders whose features are not stored yet; None if all features are stored.
        stored: Encoder name → its features from the store.
        keys: Encoder name → key of its features in the store; empty without a store.
    """

    clip: Clip | None
    stored: Mapping[str, Grid]
    keys: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Reader:
    """Does the part of `MultiEncoder.features` that needs no network; `MultiEncoder.reader` creates one.

    Args:
        requests: Encoder name → what the reader needs to know about the encoder.
        sampling: How to choose times.
        num_frames: Encoder name → number of frames, to override the encoder's spec.
        backend: Decoding backend; see `merv.video.open.open_video`.
        resample: How frames are resized; see `merv.video.transforms.resize`.
        store: Where to look up features; it is never written to. Pickling drops the entries of a store in
            memory.

    Example:
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
        """Read one video, or load its features from the store.

        Args:
            video: Anything that `load_video` reads.
            seed: Seed for the sampling mode "segment", if the sampling has none.

        Returns:
            Stored features, and frames for the other encoders.

        Raises:
            VideoError: The video cannot be read.
            SamplingError: The sampling does not fit the video.
            DataError: There is a store, but the video has no content for a key; see `video_key`.
        """
        if seed is not None and self.sampling.seed is None:
            return replace(self, sampling=replace(self.sampling, seed=seed))(video)
        if self.store is None:
            return LoadedVideo(self.read(video), {}, {})
        keys = self.keys(video)
        entries = {name: self.store.get(key) for name, key in keys.items()}
        stored = {name: grid for name, grid in entries.items() if grid is not None}
        missing = [name for name in keys if name not in stored]
        return LoadedVideo(self.read(video, missing) if missing else None, stored, keys)

    def keys(self, video: Any) -> dict[str, str]:
        """Return encoder name → key of this video's features in a store."""
        return {name: video_key(video, request.cache_key) for name, request in self.requests.items()}

    def read(self, video: Any, encoders: Iterable[str] | None = None) -> Clip:
        """Probe, sample, decode and preprocess a video, for all encoders or those named."""
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
    """Describe everything that an encoder's aligned features depend on, except the video.

    Args:
        encoder: The encoder, with its final weights and dtype.
        num_frames: Number of frames per video; None for that of the encoder's spec.
        sampling: How times are chosen.
        aligner: The aligner.
        backend: Decoding backend.
        resample: How frames are resized.

    Returns:
        A JSON text, which `video_key` hashes together with the content of the video.

    Raises:
        EncoderError: The aligner is a custom one; merv does not know what its output depends on.
    """
    if type(aligner) is not Aligner:
        raise EncoderError(
            f"Features of the custom aligner {type(aligner).__name__} cannot be stored. Use merv.Aligner, "
            "or do not pass a store."
        )
    hash_values = encoder.modified or encoder.identity.sha256 is None  # the identity does not describe them
    spec, preset = encoder.spec, encoder.preset
    key = {
        "version": VERSION,
        "class": class_path(type(encoder)),
        "weights": weights_digest(encoder) if hash_values else encoder.identity.sha256,
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
        "resize": [preset.interpolation, resample, version("pillow")],  # Pillow versions differ
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
        "aligner": (aligner.grid, aligner.mode),
    }
    return json.dumps(key, sort_keys=True, default=str)


def weights_digest(encoder: Encoder) -> str:
    """Return a hash of an encoder's weights; it is recomputed only if they were modified or moved."""
    tensors = encoder.state_dict(keep_vars=True).values()
    state = [(t.data_ptr(), t.dtype, version_of(t)) for t in tensors]
    if encoder not in DIGESTS or DIGESTS[encoder][0] != state:
        DIGESTS[encoder] = state, values_digest(encoder)
    return DIGESTS[encoder][1]
