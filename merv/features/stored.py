"""Stand-ins for encoders whose features are all in a store, so that the encoders need not be loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from merv.encoding.base import Encoder
from merv.errors import DataError
from merv.features.dataset import choose_encoders
from merv.features.store import FeatureStore
from merv.types import EncoderSpec, Preset

SHARED = ("aligner", "sampling")  # options that all encoders of a model have in common


class StoredEncoder(Encoder):
    """An encoder without a network: its features are read from a store.

    Args:
        name: Name of the encoder in the store.
        options: The options of its features; see `feature_cache_key`.
    """

    variants: ClassVar = {
        "stored": EncoderSpec("stored", 1, (1, 1, 1), embed_dim=1, presets={"none": Preset("squash", (1, 1))})
    }

    def __init__(self, name: str, options: str) -> None:
        super().__init__(weights=None)
        self.options, values = options, json.loads(options)
        _, layer, _, embed_dim, _, _ = values["variant"]
        self.spec = replace(self.spec, name=name, embed_dim=embed_dim, layer=layer, fps=values["rate"])

    def build(self) -> None:
        """There is nothing to build."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Raise DataError."""
        raise DataError(
            f"{self.spec.name} has no network: this model was created by MultiEncoder.from_store, and reads "
            "its features from a store. Pass it videos that the store has."
        )


def stored_encoders(
    store: FeatureStore, encoders: Sequence[str] | str | None = None
) -> tuple[dict[str, StoredEncoder], dict[str, Any]]:
    """Create a stand-in for each encoder of a store; also return the options that they have in common.

    Raises:
        DataError: See `choose_encoders`; or the features have different grids or sampling.
    """
    chosen = choose_encoders(store, encoders)
    values = {name: json.loads(options) for name, options in chosen.items()}
    first, *others = values
    for name in others:
        if different := [option for option in SHARED if values[name][option] != values[first][option]]:
            raise DataError(
                f"{store}: the features of {first} and {name} differ in {' and '.join(different)}, so they "
                "do not fit into one model. Choose some with encoders=; `merv store stats` shows the options."
            )
    shared = {option: values[first][option] for option in SHARED}
    return {name: StoredEncoder(name, options) for name, options in chosen.items()}, shared
