"""Read videos in other processes, such as data loader workers, without loading the encoders there.

A `Reader` is small and has no weights, so each worker of a data loader can have one. Workers decode and
preprocess videos, or load stored features, while the model trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merv.errors import DataError
from merv.features.keys import content_digest, printable, range_of, source_name
from merv.features.shard import FeatureKey
from merv.features.store import FeatureStore
from merv.types import EncoderSpec, Grid, Preset
from merv.video.clip import Clip, prepare
from merv.video.reader import VideoReader
from merv.video.sampling import Sampling
from merv.video.transforms import Resample


@dataclass(frozen=True)
class EncoderRequest:
    """What a `Reader` needs to know about an encoder.

    Args:
        spec: The encoder's spec.
        preset: The encoder's preprocessing.
        cache_key: Everything that the features depend on except the video; see `feature_cache_key`. Empty if
            there is no store.
        stored_only: Whether the features can only come from the store.
    """

    spec: EncoderSpec
    preset: Preset
    cache_key: str = ""
    stored_only: bool = False


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
    keys: Mapping[str, FeatureKey]


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

    def __call__(
        self,
        video: Any,
        seed: int | None = None,
        name: str | None = None,
        opened: VideoReader | None = None,
    ) -> LoadedVideo:
        """Read one video, or load its features from the store.

        Args:
            video: Anything that `load_video` reads.
            seed: Seed for the sampling mode "segment", if the sampling has none.
            name: Name of the video in the store; its path by default.
            opened: The open reader of `video`, if there is one, so that it need not be opened again.

        Returns:
            Stored features, and frames for the other encoders.

        Raises:
            VideoError: The video cannot be read.
            SamplingError: The sampling does not fit the video.
            DataError: There is a store, but the video has no content that can be hashed, or the store lacks
                features that only it can have.
        """
        if seed is not None and self.sampling.seed is None:
            return replace(self, sampling=replace(self.sampling, seed=seed))(video, None, name, opened)
        if self.store is None:
            return LoadedVideo(self.read(opened or video), {}, {})
        keys = self.keys(video, name)
        entries = {name: self.store.get(key) for name, key in keys.items()}
        stored = {name: grid for name, grid in entries.items() if grid is not None}
        missing = [name for name in keys if name not in stored]
        if lacking := [name for name in missing if self.requests[name].stored_only]:
            raise DataError(
                f"{keys[lacking[0]].source or keys[lacking[0]].video}: {self.store} has no features of "
                f"{', '.join(lacking)}. Add them with `merv extract` and the options that `merv store stats` "
                "shows. Windows are found if the model's `sampling` has their range."
            )
        return LoadedVideo(self.read(opened or video, missing) if missing else None, stored, keys)

    def of_range(self, start_s: float, end_s: float) -> Reader:
        """Return the reader for a range of videos, in seconds."""
        return replace(self, sampling=replace(self.sampling, start_s=start_s, end_s=end_s))

    def keys(self, video: Any, source: str | None = None) -> dict[str, FeatureKey]:
        """Return encoder name → key of this video's features in a store, where `source` names it."""
        span, source = range_of(self.sampling), source_name(video) if source is None else printable(source)
        digest, source = content_digest(video) + span, source and source + span
        return {
            name: FeatureKey(request.cache_key, digest, name, source)
            for name, request in self.requests.items()
        }

    def read(self, video: Any, encoders: Iterable[str] | None = None) -> Clip:
        """Probe, sample, decode and preprocess a video, for all encoders or those named."""
        requests = self.requests if encoders is None else {name: self.requests[name] for name in encoders}
        return prepare(
            video, requests, self.sampling, self.num_frames, resample=self.resample, backend=self.backend
        )
