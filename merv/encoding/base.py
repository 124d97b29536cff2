"""The base class of encoders: it turns preprocessed frames into the features of one frozen network.

An encoder is one file with a table of variants, `build` and `encode`. The base class loads and freezes the
weights, checks shapes, and passes times, extents and masks through. `encoders/` has examples to copy;
docs/encoders.md is the guide.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from merv.encoding.modified import TrackedModule
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
from merv.utils.torch_modules import torch_defaults


class Encoder(TrackedModule):
    """A frozen visual encoder: `forward(Frames) -> Grid`.

    A subclass declares `variants`, creates its network in `build`, and computes features in `encode`. The
    weights are converted to float32; use `.to(torch.bfloat16)` for another dtype. See docs/weights.md.

    Args:
        variant: A key of `variants`; None for the first.
        weights: Where the weights come from: "pretrained" (the source that the spec names), a hub id
            ("owner/name" or "owner/name@revision"), a local folder or file, or None for random weights
            (built-in encoders keep their own). merv never falls back to other weights.
        preset: A key of the spec's presets; None for the first.

    An option of an encoder is a variant: a model whose encoder has other constructor arguments cannot be
    saved, and stored features of such an encoder are found by the same object only.

    Attributes:
        variants: Specs by the name of the variant; the first is the default.
        weight_files: File names to look for in a folder or hub repository, best first.
        released_names: Names of this encoder in checkpoints of the released MERV → variant.
        spec: The spec of the variant.
        preset: The preset in use.
        source: The files of the weights, for a `build` that reads a config.json beside them; None if the
            weights do not come from files.
        identity: Name and hash of the weights.
        net: The network, which `build` creates.

    Raises:
        EncoderError: There is no such variant or preset.
        BrokenPlugin: The class declares no valid variants.
        WeightsError: The weights cannot be loaded, or do not fit the network.

    Example:
        >>> from merv import create_encoder, Frames
        >>> encoder = create_encoder("fake")
        >>> encoder(Frames.of(torch.zeros(1, 4, 3, 16, 16))).values.shape
        torch.Size([1, 4, 4, 4, 8])
    """

    variants: ClassVar[dict[str, EncoderSpec]]
    weight_files: ClassVar[tuple[str, ...]] = WEIGHT_FILES
    released_names: ClassVar[dict[str, str]] = {}
    net: Any

    def __init__(
        self, variant: str | None = None, *, weights: str | None = PRETRAINED, preset: str | None = None
    ) -> None:
        super().__init__()
        if fault := self.class_fault():
            raise BrokenPlugin(f"{type(self).__name__} {fault}.")
        self.variant = variant or next(iter(self.variants))
        self.spec = _pick(self.variants, self.variant, f"{type(self).__name__} variant")
        self.preset_name = preset or next(iter(self.spec.presets))
        self.preset: Preset = _pick(self.spec.presets, self.preset_name, f"{self.spec.name} preset")
        self.source = self._locate(weights)
        device = torch.get_default_device()
        # Follows .to(), so that an encoder without parameters has a device and dtype, too.
        self.register_buffer("device_probe", torch.zeros((), dtype=torch.float32, device=device), False)
        build_device = "meta" if device.type == "meta" else "cpu"  # on meta, the caller wants no values
        with torch_defaults(build_device):
            self.build()
            self.identity = self._load()
        if device.type != build_device:
            self.to(device)
        self.requires_grad_(False).eval()
        self.track_weights()

    # Methods that a subclass defines --------------------------------------------------------

    def build(self) -> None:
        """Create `self.net` with random weights. `self.spec` and `self.source` are set already."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def encode(self, pixels: Tensor) -> Tensor:
        """Compute features of preprocessed pixels: [B, T, 3, H, W] → [B, t, h, w, D].

        By default, each window of `spec.window_size` frames goes through `tokens`. An encoder with
        window_size 0 must override `encode`.
        """
        if not self.spec.window_size:
            raise EncoderError(f"{self.spec.name} has window_size 0, so its class must define encode().")
        steps, (_, h, w) = self.spec.window_size // self.spec.tubelet_size, self.spec.grid
        windows = rearrange(pixels, "b (n t) c h w -> (b n) t c h w", t=self.spec.window_size)
        tokens = self.tokens(windows)
        if tokens.ndim != 3 or tokens.shape[1] != steps * h * w:
            raise EncoderError(
                f"{self.spec.name}: tokens() must return [{len(windows)}, {steps * h * w}, "
                f"{self.spec.embed_dim}], a token for each of {steps}×{h}×{w} cells; got "
                f"{list(tokens.shape)}. Remove class and register tokens."
            )
        return rearrange(tokens, "(b n) (t h w) d -> b (n t) h w d", b=pixels.shape[0], t=steps, h=h, w=w)

    def tokens(self, windows: Tensor) -> Tensor:
        """Compute one token per cell of each window, in the order time step, row, column.

        [K, T, 3, H, W] → [K, N, D], for K windows of T = spec.window_size frames.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode() or tokens()")

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of a checkpoint to those of `self.net`. Override it if they differ."""
        return state

    @classmethod
    def class_fault(cls) -> str | None:
        """Describe what is wrong with `variants`; None if they are valid."""
        variants = getattr(cls, "variants", None)
        if not (variants and isinstance(variants, dict)):
            return f"has variants = {variants!r}; expected a dict of name → merv.EncoderSpec, default first"
        for name, spec in variants.items():
            if not isinstance(spec, EncoderSpec):
                return f"has variants[{name!r}] = {spec!r}; expected a merv.EncoderSpec"
        return None

    # Weights --------------------------------------------------------------------------------

    def _locate(self, weights: str | None) -> Source | None:
        if weights == PRETRAINED:
            weights = self.spec.source
            if not weights:
                raise WeightsError(
                    f"{self.spec.name} declares no source of weights. Pass a folder, file or hub id as "
                    "weights=, or None for random weights. If build() creates the weights, declare "
                    f"source={BUILT_IN!r} in the spec."
                )
            if self.spec.revision:
                weights = f"{weights}@{self.spec.revision}"
        if weights == BUILT_IN and self.spec.source != BUILT_IN:
            raise WeightsError(
                f"{self.spec.name} has no built-in weights. Pass a folder, file or hub id as weights=, or "
                "None for random weights."
            )
        return None if weights in (None, BUILT_IN) else locate(weights, self.weight_files)

    def _load(self) -> Identity:
        if self.source is None:
            return identity_of(self) if self.spec.source == BUILT_IN else Identity("random")
        owner = f"{type(self).__name__}({self.variant!r})"
        if not isinstance(getattr(self, "net", None), nn.Module):
            raise EncoderError(f"{owner}: build() must set self.net to the module that gets the weights.")
        load_exactly(self.net, self.rename(self.source.state()), self.source.name, owner)
        return self.source.identity()

    @property
    def modified(self) -> bool:
        """Whether the weights may differ from those of `identity`: trainable, written to or replaced.

        Writes through a parameter's `.data` are not noticed.
        """
        return self.weights_modified or any(parameter.requires_grad for parameter in self.parameters())

    # Features -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Encoder:
        """Keep eval mode: a frozen encoder does not behave differently in training."""
        return super().train(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward` with torch's own defaults, so that features do not depend on what a program set."""
        with torch_defaults():
            return super().__call__(*args, **kwargs)

    def forward(self, frames: Frames) -> Grid:
        """Encode a batch of frames.

        Args:
            frames: Preprocessed frames, pixels of shape [B, T, 3, H, W]. T must be a multiple of the spec's
                window_size (of its tubelet_size if window_size is 0).

        Returns:
            Features on the encoder's own grid, values of shape [B, t, h, w, D].

        Raises:
            ShapeError: The frames do not match the spec and preset.
            EncoderError: `encode` returns features of a wrong shape.
        """
        self._check(frames)
        values = self._encode(frames)  # [B, t, h, w, D]
        num_frames, (t, h, w) = frames.pixels.shape[1], values.shape[1:4]
        if num_frames % t:
            raise EncoderError(
                f"{self.spec.name}: encode() returned {t} time steps for {num_frames} frames, which is not a "
                "whole number of frames per step. An encoder with other time steps must override forward()."
            )
        times_s = reduce(frames.times_s, "b (t k) -> b t", "mean", t=t)
        is_real = reduce(frames.mask, "b (t k) -> b t", "max", t=t)
        return Grid(values, times_s, frames.extent, repeat(is_real, "b t -> b t h w", h=h, w=w))

    def _encode(self, frames: Frames) -> Tensor:
        values = self._check_features(self.encode(frames.pixels), len(frames.pixels))
        if self.spec.window_size:
            return values
        # A network that sees the whole clip must not see its padding: features must not depend on the batch.
        padded = [i for i, mask in enumerate(frames.mask) if mask.any() and not mask.all()]
        values = values.clone() if padded else values  # autograd may need the tensor that encode() returned
        for i in padded:
            unpadded = self.encode(frames.pixels[i : i + 1, frames.mask[i]])[0]
            values[i, : len(unpadded)] = unpadded
        return values

    def _check_features(self, values: Tensor, batch: int) -> Tensor:
        if not isinstance(values, Tensor) or values.ndim != 5 or len(values) != batch:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise EncoderError(
                f"{self.spec.name}: encode() must return a tensor [{batch}, t, h, w, {self.spec.embed_dim}] "
                f"for {batch} clips; got {got}."
            )
        return values

    def _check(self, frames: Frames) -> None:
        name, (height, width) = self.spec.name, self.preset.input_size
        if not isinstance(frames, Frames):
            raise ShapeError(
                f"{name} expects Frames; got {type(frames).__name__}. Use Frames.of(pixels) for a tensor "
                "[B, T, 3, H, W]."
            )
        pixels = frames.pixels
        if tuple(pixels.shape[-2:]) != (height, width) or not pixels.is_floating_point():
            raise ShapeError(
                f"{name} expects normalized floating-point frames [B, T, 3, {height}, {width}]; got "
                f"{list(pixels.shape)}, {pixels.dtype}. Use merv.preprocess(frames, encoder.preset)."
            )
        window = self.spec.window_size or self.spec.tubelet_size
        if frames.pixels.shape[1] % window:
            raise ShapeError(
                f"{name} expects a multiple of {window} frames; got {frames.pixels.shape[1]}. Sample another "
                "number of frames, or repeat the last one."
            )


def _pick(table: dict, key: str, what: str):
    if key not in table:
        raise EncoderError(f"Unknown {what} {key!r}.{nearest(key, table)} Available: {', '.join(table)}.")
    return table[key]
