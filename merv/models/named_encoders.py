"""Create the encoders of a MultiEncoder by name, from what the user passes or from a saved config."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from merv.encoding.base import Encoder
from merv.encoding.registry import ENCODERS, create_encoder
from merv.encoding.weights import PRETRAINED
from merv.errors import CheckpointError, EncoderError, WeightsError
from merv.types import is_count
from merv.utils.suggest import nearest

RESERVED = ("projector", "mixer", "lora", "llm")  # parts that can be trained, beside the encoders


def by_name(encoders: Sequence[str | Encoder] | Mapping[str, str | Encoder]) -> dict[str, str | Encoder]:
    """Return the encoders with names: the keys of a mapping, or else a default name for each.

    Raises EncoderError if there is no encoder, or if a name is invalid or used twice.
    """
    if isinstance(encoders, (str, Encoder)):
        encoders = [encoders]
    pairs: Iterable[tuple[str | None, str | Encoder]] = (
        encoders.items() if isinstance(encoders, Mapping) else [(None, encoder) for encoder in encoders]
    )
    named: dict[str, str | Encoder] = {}
    for name, encoder in pairs:
        if not isinstance(encoder, (str, Encoder)):
            is_class = isinstance(encoder, type)
            got = f"the class {encoder.__name__}" if is_class else f"a {type(encoder).__name__}"
            raise EncoderError(
                f"Expected an encoder name or a merv.Encoder, got {got}. See docs/encoders.md for how to "
                "wrap a network."
            )
        name = default_name(encoder) if name is None else name
        check_name(name)
        if name in named:
            raise EncoderError(
                f"Two encoders are called {name}. Give them names: "
                f"MultiEncoder({{'{name}_a': ..., '{name}_b': ...}})."
            )
        named[name] = encoder
    if not named:
        raise EncoderError("Expected at least one encoder. `merv encoders` lists the available names.")
    return named


def default_name(encoder: str | Encoder) -> str:
    """Return the name of an encoder that the user did not name.

    >>> default_name("dinov2/base")
    'dinov2_base'
    >>> default_name("package.module:Class")
    'Class'
    """
    name = encoder if isinstance(encoder, str) else encoder.spec.name
    return name.rpartition(":")[2].replace("/", "_").replace(".", "_").replace("-", "_")


def check_name(name: object) -> None:
    """Raise EncoderError for a name that torch does not allow, or that a part of a VideoLLM has."""
    if name in RESERVED:
        raise EncoderError(
            f"An encoder cannot be called {name!r}, which is a part of a VideoLLM. Choose another name."
        )
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise EncoderError(
            f"An encoder cannot be called {name!r}, because torch does not allow it as the name of a "
            "submodule. Choose another name."
        )


def create_all(
    encoders: Mapping[str, str | Encoder],
    weights: str | Mapping[str, str | None] | None,
    presets: Mapping[str, str],
) -> dict[str, Encoder]:
    """Create the encoders that are given by name, with their weights and presets."""
    to_create = [name for name, encoder in encoders.items() if isinstance(encoder, str)]
    note = " that are given by name; pass it to the others when you create them"
    check_keys("presets", presets, to_create, note)
    if isinstance(weights, Mapping):
        check_keys("weights", weights, to_create, note)
        sources = {name: weights.get(name, PRETRAINED) for name in to_create}
    else:
        sources = dict.fromkeys(to_create, weights)
    return {
        name: create_encoder(encoder, weights=sources[name], preset=presets.get(name))
        if isinstance(encoder, str)
        else encoder
        for name, encoder in encoders.items()
    }


def check_keys(option: str, values: Any, encoders: Collection[str], note: str = "") -> None:
    """Raise EncoderError unless `values` is a mapping whose keys are among the names of the encoders."""
    if not isinstance(values, Mapping):
        example = {next(iter(encoders), "NAME"): values}
        raise EncoderError(f"{option} must map encoder names to values, e.g. {example}; got {values!r}.")
    for name in values:
        if name not in encoders:
            raise EncoderError(
                f"{option}= names {name!r}, which is not one of the encoders{note}.{nearest(name, encoders)} "
                f"Available: {', '.join(encoders) or 'none'}."
            )


def checked_num_frames(num_frames: Mapping[str, int], encoders: Mapping[str, Encoder]) -> dict[str, int]:
    """Return the numbers of frames as int; each must be a multiple of the window or tubelet."""
    check_keys("num_frames", num_frames, encoders)
    for name, count in num_frames.items():
        window = encoders[name].spec.window_size or encoders[name].spec.tubelet_size
        if not is_count(count) or count % window:
            raise EncoderError(
                f"Expected num_frames of {name} to be a positive multiple of {window}, its window_size or "
                f"tubelet_size; got {count!r}."
            )
    return {name: int(count) for name, count in num_frames.items()}


def recreate(name: str, saved: Mapping[str, Any], weights: Mapping[str, str | None]) -> Encoder:
    """Create an encoder from its entry in a saved config and verify its weights.

    Raises:
        PluginError: The class is neither registered nor imported.
        WeightsError: The weights could not be loaded.
        CheckpointError: The weights are not those of the saved encoder.
    """
    path = saved["class"]
    ENCODERS.check_trusted(path, f"Encoder {name!r}")
    identity = saved["identity"]
    source = identity["source"]
    if identity["revision"] is not None:
        source = f"{source}@{identity['revision']}"
    try:
        encoder = create_encoder(
            path, variant=saved["variant"], preset=saved["preset"], weights=weights.get(name, source)
        )
    except WeightsError as error:
        raise WeightsError(
            f"{error} If the weights of {name!r} have moved, pass weights={{{name!r}: '/path/to/weights'}}."
        ) from error
    if encoder.identity.sha256 != identity["sha256"]:
        raise CheckpointError(
            f"Encoder {name!r} has other weights than when the model was saved. Saved: {identity['source']} "
            f"(sha256 {identity['sha256']}). Loaded: {encoder.identity.source} (sha256 "
            f"{encoder.identity.sha256}). Pass weights={{{name!r}: '/path/to/saved/weights'}}."
        )
    return encoder
