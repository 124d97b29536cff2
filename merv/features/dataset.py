"""What a feature store has, video by video: as a list, and as a Dataset for torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from merv.errors import DataError
from merv.features.shard import KEY_VERSION, FeatureKey, options_id
from merv.features.store import FeatureStore
from merv.types import Grid


@dataclass(frozen=True)
class StoredVideo:
    """A video of a store, with its features' keys by encoder.

    Args:
        source: Its path or name.
        digest: Hash of its content.
        keys: Name of each encoder → the key of its features.
    """

    source: str
    digest: str
    keys: dict[str, FeatureKey]

    def read(self, store: FeatureStore, encoder: str) -> Grid:
        """Read the features of an encoder. Raises DataError if they are damaged or gone."""
        grid = store.get(self.keys[encoder])
        if grid is None:
            raise DataError(
                f"{self.source}: the features of {encoder} are damaged or gone: see `merv store verify`."
            )
        return grid


def videos_of(store: FeatureStore, encoders: Sequence[str] = ()) -> list[StoredVideo]:
    """The videos of a store, ordered by name; the windows of a video by time.

    Args:
        store: The store. If it has features of one encoder with different options, the encoder's name is
            followed by a part of their hash.
        encoders: Names of the encoders to include; all by default.

    Raises:
        DataError: The store has no features of an encoder.
    """
    keys = list(store)
    names = encoder_names(keys)
    wanted = [name for name in names.values() if not encoders or name in encoders]
    if missing := [name for name in encoders if name not in wanted]:
        available = ", ".join(sorted(set(names.values()))) or "none"
        raise DataError(f"The store has no features of {', '.join(missing)}. Available: {available}.")
    videos: dict[str, StoredVideo] = {}
    for key in keys:
        name = names[key.encoder, key.options]
        if name in wanted:
            video = videos.setdefault(key.video, StoredVideo(key.source or key.video, key.video, {}))
            video.keys[name] = key
    return sorted(videos.values(), key=_order)


def _order(video: StoredVideo) -> tuple[str, float]:
    """By name; windows of a video by time."""
    if "@" not in video.digest:
        return video.source, 0.0
    return video.source.rpartition("@")[0], float(video.digest.partition("@")[2].partition("-")[0])


def encoder_names(keys: Iterable[FeatureKey]) -> dict[tuple[str, str], str]:
    """(Name, options) of each encoder in a store → a name that no other has.

    >>> encoder_names([FeatureKey("{}", "v", "clip"), FeatureKey("[]", "v", "clip")]).values()
    dict_values(['clip-44136fa3', 'clip-4f53cda1'])
    """
    found = dict.fromkeys((key.encoder, key.options) for key in keys)
    names = [encoder for encoder, _ in found]
    return {
        (encoder, options): encoder
        if names.count(encoder) == 1
        else f"{encoder}-{options_id(FeatureKey(options, ''))[:8]}"
        for encoder, options in found
    }


def choose_encoders(store: FeatureStore, encoders: Sequence[str] | str | None = None) -> dict[str, str]:
    """Choose encoders of a store: name in a model → options of its features.

    Args:
        store: The store.
        encoders: Names as in `encoder_names`, in the order of the result; by default all, sorted by name. If
            one setting of each encoder is chosen, the result has the names without the hash of the options.

    Raises:
        DataError: The store is empty, lacks an encoder, or its features are of another version of merv.
    """
    names = {name: key for key, name in encoder_names(store).items()}
    if not names:
        raise DataError(f"{store} has no features. Add some with `merv extract`.")
    chosen = sorted(names) if not encoders else [encoders] if isinstance(encoders, str) else list(encoders)
    if missing := [name for name in chosen if name not in names]:
        raise DataError(f"{store} has no features of {', '.join(missing)}. Available: {', '.join(names)}.")
    for name in chosen:
        if json.loads(names[name][1]).get("version") != KEY_VERSION:
            raise DataError(
                f"{store}: the features of {name} were made by another version of merv. Make them again with "
                "`merv extract`, or choose others with encoders=."
            )
    short = [names[name][0] for name in chosen]
    keep = chosen if len(set(short)) < len(short) else short
    return {name: names[stored][1] for name, stored in zip(keep, chosen, strict=True)}


class FeatureDataset(Dataset):
    """The videos of a store that have features of all encoders, for `torch.utils.data.DataLoader`.

    An item is a dict: `source` (path or name), `video` (hash of the content) and `features` (encoder name →
    features, values of shape [1, t, h, w, D]). Pass `collate` to the loader; `MultiEncoder.fuse` accepts the
    features of a batch.

    Args:
        store: A store, or its folder or address.
        encoders: Names of the encoders, in the order of `features`; by default all of the store, sorted by
            name. `merv store ls` shows them.

    Raises:
        DataError: The store has no features of an encoder, or no video has features of all of them.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from merv import FeatureStore, MultiEncoder
        >>> store, encoders = FeatureStore(), MultiEncoder(["fake"], grid=(4, 2, 2), output_dim=16)
        >>> for number in range(3):
        ...     clip = torch.full((8, 3, 32, 32), number, dtype=torch.uint8)
        ...     _ = encoders.features(clip, store=store)
        >>> dataset = FeatureDataset(store)
        >>> loader = DataLoader(dataset, batch_size=3, collate_fn=dataset.collate)
        >>> for batch in loader:
        ...     print(encoders.fuse(batch["features"]).tokens.shape)
        torch.Size([3, 16, 16])
    """

    def __init__(self, store: FeatureStore | str | Path, encoders: Sequence[str] | str | None = None) -> None:
        self.store = store if isinstance(store, FeatureStore) else FeatureStore(store, read_only=True)
        self.store.flush()  # worker processes see only what is published
        self.encoders = choose_encoders(self.store, encoders)
        options = {options: name for name, options in self.encoders.items()}
        videos: dict[str, StoredVideo] = {}
        for key in self.store:
            if key.options in options:
                video = videos.setdefault(key.video, StoredVideo(key.source or key.video, key.video, {}))
                video.keys[options[key.options]] = key
        self.videos = sorted((v for v in videos.values() if len(v.keys) == len(options)), key=_order)
        if not self.videos:
            raise DataError(
                f"{self.store} has no video with features of all of: {', '.join(self.encoders)}. Choose some "
                "with encoders=; `merv store ls` lists them."
            )

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        video = self.videos[index]
        features = {name: video.read(self.store, name) for name in self.encoders}
        return {"source": video.source, "video": video.digest, "features": features}

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items: lists of sources and hashes, and features [B, t, h, w, D]."""
        return {
            "source": [item["source"] for item in items],
            "video": [item["video"] for item in items],
            "features": {
                name: Grid.batch([item["features"][name] for item in items]) for name in items[0]["features"]
            },
        }
