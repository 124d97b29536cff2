"""Encode: preprocessed frames to the features of one frozen encoder.

An encoder is one file: a table of variants, `build`, `encode`. Everything that all
encoders share (finding and loading weights, freezing, checking shapes, times, extents
and masks) is here. See `encoders/` for examples to copy, docs/encoders.md for a guide.
"""

from __future__ import annotations

import re
import weakref
from importlib.metadata import version as metadata_version
from typing import Any, ClassVar

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from merv.encoding.weights import (
    BUILT_IN,
    PRETRAINED,
    WEIGHT_FILES,
    Identity,
    Source,
    identity_of,
    load_exactly,
    locate,
)
from merv.errors import BrokenPlugin, EncoderError, ShapeError, WeightsError
from merv.types import EncoderSpec, Frames, Grid, Preset
from merv.utils.suggest import nearest

CONTRACT = "1.0"  # between an encoder and merv, major.minor; docs/encoders.md says what a change means


class Encoder(nn.Module):
    """A frozen visual encoder: `forward(Frames) -> Grid`.

    A subclass declares `variants` (name → spec, the first is the default), creates its network
    in `build` as `self.net` and computes features in `encode`. While it builds, `self.source` says
    where the weights were found (None: not in a file), for networks that a config.json describes.

    variant: a key of `variants`.
    weights: "pretrained" (the spec's source), a hub id ("owner/name@revision"), a local folder or file, or
        None for random weights. Nothing is ever substituted for what was asked. Whatever dtype they were
        saved in, they become float32; `.to(torch.bfloat16)` changes that. See docs/weights.md.
    preset: a key of the spec's presets; None takes the first.

    Raises EncoderError for an unknown variant or preset, BrokenPlugin for a class that declares none,
    WeightsError for weights that cannot be loaded or do not fit.

    >>> from merv import create_encoder, Frames
    >>> encoder = create_encoder("fake")
    >>> encoder(Frames.of(torch.zeros(1, 4, 3, 16, 16))).values.shape
    torch.Size([1, 4, 4, 4, 8])
    """

    contract: ClassVar[str] = "1.0"  # what a class that says nothing was made for: the first
    variants: ClassVar[dict[str, EncoderSpec]]
    weight_files: ClassVar[tuple[str, ...]] = WEIGHT_FILES
    released_names: ClassVar[dict[str, str]] = {}  # what checkpoints of the released MERV call it → variant
    net: Any

    def __init__(
        self, variant: str | None = None, *, weights: str | None = PRETRAINED, preset: str | None = None
    ) -> None:
        super().__init__()
        self.weights_modified = False  # whether its weights are others than those that it was made with
        self.parameter_versions: list[tuple[weakref.ref, int]] = []  # its parameters, and their versions then
        # Goes where .to() takes an encoder that has no weights.
        self.register_buffer("here", torch.zeros(()), persistent=False)
        if fault := class_fault(type(self)):
            raise BrokenPlugin(f"{type(self).__name__} {fault}.")
        self.variant = variant or next(iter(self.variants))
        self.spec = _pick(self.variants, self.variant, f"{type(self).__name__} variant")
        self.preset_name = preset or next(iter(self.spec.presets))
        self.preset: Preset = _pick(self.spec.presets, self.preset_name, f"{self.spec.name} preset")
        self.source = self._locate(weights)
        self.build()
        self.identity = self._load()
        self.requires_grad_(False).eval()
        self.register_load_state_dict_post_hook(_seal)
        _seal(self)

    # What a subclass writes ---------------------------------------------------------------

    def build(self) -> None:
        """Create `self.net`, with random weights."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of preprocessed pixels: [B, T, 3, H, W] → [B, t, h, w, D]."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The source's state dict in the names of `self.net`; override where they differ."""
        return state

    # What it gets -------------------------------------------------------------------------

    def _locate(self, weights: str | None) -> Source | None:
        if weights == PRETRAINED:
            weights = self.spec.source
            if not weights:
                raise WeightsError(
                    f"{self.spec.name} declares no source of weights. Pass weights= a folder, file or "
                    f"hub id, or None for random ones; if build() makes them, declare "
                    f"source={BUILT_IN!r} in its spec."
                )
            if self.spec.revision:
                weights = f"{weights}@{self.spec.revision}"
        return None if weights in (None, BUILT_IN) else locate(weights, self.weight_files)

    def _load(self) -> Identity:
        if self.source is None:
            return identity_of(self) if self.spec.source == BUILT_IN else Identity("random")
        owner = f"{type(self).__name__}({self.variant!r})"
        if not isinstance(getattr(self, "net", None), nn.Module):
            raise EncoderError(f"{owner}: build() must set self.net, which the weights are loaded into.")
        load_exactly(self.net, self.rename(self.source.state()), self.source.name, owner)
        return self.source.identity()

    @property
    def modified(self) -> bool:
        """Whether its weights may be others than those of its identity: trainable, written to or replaced.

        What was written by way of a parameter's `.data` torch does not tell.
        """
        return self._rewritten() or any(parameter.requires_grad for parameter in self.parameters())

    def mark_modified(self) -> None:
        """Say that its weights are others now, where torch does not count what was written to them."""
        self.weights_modified = True

    def _rewritten(self) -> bool:
        now = list(self.parameters())
        same = len(now) == len(self.parameter_versions) and all(
            then() is parameter and version == version_of(parameter)
            for parameter, (then, version) in zip(now, self.parameter_versions, strict=True)
        )
        return self.weights_modified or not same

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *how: Any) -> None:
        own = self.state_dict(prefix=prefix)
        self.weights_modified = self._rewritten()
        for name in own.keys() & state.keys():
            was, new = own[name], state[name]
            self.weights_modified |= was.is_meta or new.is_meta or not torch.equal(was, new.to(was))
        super()._load_from_state_dict(state, prefix, *how)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights_modified": self._rewritten(), "parameter_versions": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _seal(self)

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode: a frozen encoder has no training behavior."""
        return super().train(False)

    def forward(self, frames: Frames) -> Grid:
        """Features on the encoder's own grid; T must be a multiple of the spec's window_size.

        Raises ShapeError where the frames are not what the spec and preset declare.
        """
        self._check(frames)
        values = self._encode(frames)  # [B, t, h, w, D]
        t, h, w = values.shape[1:4]
        if frames.pixels.shape[1] % t:
            raise EncoderError(
                f"{self.spec.name} made {t} steps of time of {frames.pixels.shape[1]} frames, which is no "
                "whole number of frames a step. An encoder with its own clock overrides forward()."
            )
        times_s = reduce(frames.times_s, "b (t k) -> b t", "mean", t=t)
        real = reduce(frames.mask, "b (t k) -> b t", "max", t=t)
        return Grid(values, times_s, frames.extent, repeat(real, "b t -> b t h w", h=h, w=w))

    def _encode(self, frames: Frames) -> Tensor:
        values = self._expected(self.encode(frames.pixels), len(frames.pixels))
        if self.spec.window_size:
            return values
        # What sees the whole clip must not see its padding, or a clip would change with its batch.
        short = [i for i, mask in enumerate(frames.mask) if mask.any() and not mask.all()]
        values = values.clone() if short else values  # gradients may need what encode() made
        for i in short:
            real = self.encode(frames.pixels[i : i + 1, frames.mask[i]])[0]
            values[i, : len(real)] = real
        return values

    def _expected(self, values: Tensor, batch: int) -> Tensor:
        if not isinstance(values, Tensor):
            raise EncoderError(
                f"{self.spec.name}: encode() made a {type(values).__name__}; wanted a tensor "
                f"[{batch}, t, h, w, {self.spec.embed_dim}], such as an output's last_hidden_state, reshaped."
            )
        if values.ndim != 5 or len(values) != batch:
            raise EncoderError(
                f"{self.spec.name}: encode() made {list(values.shape)} of {batch} clips; wanted "
                f"[{batch}, t, h, w, {self.spec.embed_dim}]."
            )
        return values

    def _check(self, frames: Frames) -> None:
        name, height_width = self.spec.name, self.preset.input_size
        if not isinstance(frames, Frames):
            raise ShapeError(
                f"{name} expects Frames; got {type(frames).__name__}. Frames.of(pixels) makes them of a "
                "tensor [B, T, 3, H, W]."
            )
        if frames.patches is not None or tuple(frames.pixels.shape[-2:]) != height_width:
            raise ShapeError(
                f"{name} expects frames [B, T, 3, {height_width[0]}, {height_width[1]}]; got "
                f"{list(frames.pixels.shape)}. `merv.preprocess(frames, encoder.preset)` makes them fit."
            )
        if not frames.pixels.is_floating_point():
            raise ShapeError(
                f"{name} expects normalized floating-point frames; got {frames.pixels.dtype}. "
                "`merv.preprocess(frames, encoder.preset)` does it."
            )
        window = self.spec.window_size or self.spec.tubelet_size
        if frames.pixels.shape[1] % window:
            raise ShapeError(
                f"{name} takes frames in windows of {window}; got {frames.pixels.shape[1]}. "
                "Sample a multiple of it, or repeat the last frame."
            )


def class_fault(loaded: object) -> str | None:
    """What keeps `loaded` from being an encoder class of this contract, in words.

    >>> class_fault(3)
    'is 3; wanted a subclass of merv.Encoder'
    """
    if not (isinstance(loaded, type) and issubclass(loaded, Encoder)):
        return f"is {loaded!r}; wanted a subclass of merv.Encoder"
    if fault := _contract_fault(loaded.contract):
        return fault
    variants = getattr(loaded, "variants", None)
    if not (variants and isinstance(variants, dict)):
        return f"has variants = {variants!r}; wanted a dict of name → merv.EncoderSpec, the default first"
    strange = [name for name, spec in variants.items() if not isinstance(spec, EncoderSpec)]
    return f"declares {strange[0]!r} as no merv.EncoderSpec" if strange else None


def _contract_fault(declared: object) -> str | None:
    """Within a major version, what was made for a minor one also fits later ones."""
    if not (isinstance(declared, str) and re.fullmatch(r"\d+\.\d+", declared)):
        return f'has contract = {declared!r}; wanted "major.minor", as in "{CONTRACT}"'
    ours, theirs = (tuple(map(int, text.split("."))) for text in (CONTRACT, declared))
    if theirs[0] == ours[0] and theirs <= ours:
        return None
    mend = "Upgrade merv" if theirs > ours else "Upgrade the plug-in"
    installed = f"merv {metadata_version('merv')} has {CONTRACT}"
    return (
        f"was made for contract {declared} of encoders; {installed}. {mend}, or install the version that fits"
    )


def version_of(tensor: Tensor) -> int:
    """How often it was written to; 0 where torch does not count, as of what was made in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _seal(encoder: Encoder, *_: Any) -> None:
    """From here on `modified` tells of what is written to its parameters."""
    encoder.parameter_versions = [
        (weakref.ref(parameter), version_of(parameter)) for parameter in encoder.parameters()
    ]


def _pick(table: dict, key: str, what: str):
    if key not in table:
        raise EncoderError(f"Unknown {what} {key!r}.{nearest(key, table)} There are: {', '.join(table)}.")
    return table[key]
