"""Streams: the encoders of a MultiEncoder by name, made from what was typed or saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from merv.encoding.base import Encoder
from merv.encoding.registry import ENCODERS, create_encoder
from merv.encoding.weights import PRETRAINED
from merv.errors import CheckpointError, EncoderError, WeightsError
from merv.types import is_count
from merv.utils.suggest import nearest


def by_name(encoders: Sequence[str | Encoder] | Mapping[str, str | Encoder]) -> dict[str, str | Encoder]:
    """Names for the streams: as given, as typed, or the spec's name."""
    if isinstance(encoders, (str, Encoder)):
        encoders = [encoders]
    for encoder in encoders.values() if isinstance(encoders, Mapping) else encoders:
        if not isinstance(encoder, (str, Encoder)):
            came = (
                f"the class {encoder.__name__}"
                if isinstance(encoder, type)
                else f"a {type(encoder).__name__}"
            )
            raise EncoderError(
                f"Expected an encoder name or a merv.Encoder, got {came}. "
                "docs/encoders.md says how to wrap a network."
            )
    if isinstance(encoders, Mapping):
        named = dict(encoders)
    else:
        names = [stream_name(encoder) for encoder in encoders]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise EncoderError(
                f"Two encoders are called {', '.join(twice)}; give them names: "
                f"MultiEncoder({{'{twice[0]}_a': ..., '{twice[0]}_b': ...}})."
            )
        named = dict(zip(names, encoders, strict=True))
    if not named:
        raise EncoderError("A MultiEncoder needs at least one encoder; see `merv encoders` for names.")
    for name in named:
        check_stream(name)
    return named


def check_stream(name: str) -> None:
    """Raise EncoderError for a name that torch does not let a part of a module have."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise EncoderError(f"No encoder can be called {name!r} here: torch keeps that name. Take another.")


def stream_name(encoder: str | Encoder) -> str:
    """`dinov2/base` → dinov2_base, `package.module:Class` → Class, a module → its spec's name."""
    typed = encoder if isinstance(encoder, str) else encoder.spec.name
    return typed.rpartition(":")[2].replace("/", "_").replace(".", "_").replace("-", "_")


def create_all(
    encoders: Mapping[str, str | Encoder],
    weights: str | Mapping[str, str | None] | None,
    presets: Mapping[str, str],
) -> dict[str, Encoder]:
    """The encoders, made where only a name was given."""
    if isinstance(weights, Mapping):
        check_names("weights", weights, encoders)
    check_names("presets", presets, encoders)
    made = {}
    for name, encoder in encoders.items():
        if not isinstance(encoder, str):
            for option, given in (("presets", presets), ("weights", weights)):
                if isinstance(given, Mapping) and name in given:
                    raise EncoderError(
                        f"{option}= names {name!r}, which is made already: give it its {option} then."
                    )
            made[name] = encoder
            continue
        own = weights.get(name, PRETRAINED) if isinstance(weights, Mapping) else weights
        made[name] = create_encoder(encoder, weights=own, preset=presets.get(name))
    return made


def check_names(option: str, given: Any, known: Iterable[str]) -> None:
    """Raise EncoderError where an option is not told by encoder, or names one that is not there."""
    if not isinstance(given, Mapping):
        example = {next(iter(known)): given}
        raise EncoderError(f"{option} must map encoder names to values, e.g. {example}; got {given!r}.")
    for name in given:
        if name not in known:
            raise EncoderError(
                f"{option}= names {name!r}, which is no encoder here.{nearest(name, known)} "
                f"There are: {', '.join(known)}."
            )


def checked_num_frames(num_frames: Mapping[str, int], encoders: Mapping[str, Encoder]) -> dict[str, int]:
    """Numbers of frames by encoder, each a multiple of its window."""
    check_names("num_frames", num_frames, encoders)
    for name, count in num_frames.items():
        window = encoders[name].spec.window_size or encoders[name].spec.tubelet_size
        if not is_count(count) or count % window:
            raise EncoderError(
                f"{name} takes frames in windows of {window}, at least one; got num_frames={count!r}."
            )
    return {name: int(count) for name, count in num_frames.items()}


def recreate(name: str, saved: Mapping[str, Any], weights: Mapping[str, str | None]) -> Encoder:
    """An encoder as it was saved, checked to be the same, of a class that is registered or imported already.

    Raises PluginError for another class, WeightsError where its weights cannot be loaded, CheckpointError for
    other ones.
    """
    path = saved["class"]
    ENCODERS.check_trusted(path, f"Encoder {name!r}")
    was = saved["identity"]
    source = was["source"] if was["revision"] is None else f"{was['source']}@{was['revision']}"
    given = weights.get(name, source)
    try:
        encoder = create_encoder(path, variant=saved["variant"], preset=saved["preset"], weights=given)
    except WeightsError as error:
        raise WeightsError(
            f"{error} If the weights of {name!r} have moved, pass weights={{{name!r}: '/where/they/are'}}."
        ) from error
    now = vars(encoder.identity)
    if now["sha256"] != was["sha256"]:
        raise CheckpointError(
            f"Encoder {name!r} has other weights than when this was saved: {was['source']} "
            f"({was['sha256']}) then, {now['source']} ({now['sha256']}) now. "
            f"Pass weights={{{name!r}: '/folder/with/the/right/ones'}}."
        )
    return encoder
