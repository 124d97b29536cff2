"""The dataclasses that describe videos, encoders and features on the way from a file to the LLM.

Shape symbols, used in names and comments throughout merv:

    B batch   T frames   t, h, w grid cells (time, rows, columns)   N tokens
    D channels of an encoder   E encoders   L channels of the LLM

Times are in seconds from the start of the clip. Masks are True for real content and False for padding. An
extent is the rectangle that a grid or image covers, (top, left, bottom, right), in units of the original
upright image: (0, 0, 1, 1) is the whole image, a center crop lies inside it, a letterbox reaches beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from merv.errors import ShapeError

WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)

CropMode = Literal["squash", "crop", "letterbox"]
Interpolation = Literal["bicubic", "bilinear", "bilinear_plain"]
Center = Literal["nearest", "down"]

Self = TypeVar("Self", bound="_Tensors")


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def _check_shape(owner: object, name: str, expected: tuple[int | None, ...]) -> None:
    """Raise ShapeError unless the tensor `owner.name` has the expected shape. None stands for any size."""
    shape = tuple(getattr(owner, name).shape)
    if len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ShapeError(
            f"{type(owner).__name__}.{name} has shape {list(shape)}; expected [{sizes}]. "
            "merv/types.py explains the shapes."
        )


def _are_counts(values: object, length: int) -> bool:
    """Whether `values` is a tuple or list of `length` integers of at least 1."""
    return isinstance(values, (tuple, list)) and len(values) == length and all(map(is_count, values))


class _Tensors:
    """Moving, slicing and concatenating, for the dataclasses that hold tensors."""

    def to(
        self: Self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Like `Tensor.to`, for all tensors. A dtype applies to pixels, values and tokens only."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                cast_to = dtype if f.name in ("pixels", "values", "tokens") else None
                moved[f.name] = value.to(device=device, dtype=cast_to)
        return replace(self, **moved)  # type: ignore[type-var]

    def __getitem__(self: Self, samples: slice) -> Self:
        """A slice of the batch."""
        if not isinstance(samples, slice):
            raise TypeError(f"Index a batch with a slice, such as [2:3]; got {samples!r}.")
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{n: v if v is None else v[samples] for n, v in values.items()})  # type: ignore[type-var]

    @classmethod
    def cat(cls: type[Self], parts: Sequence[Self]) -> Self:
        """Concatenate batches whose samples have equal shapes."""
        rows = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{n: None if v[0] is None else torch.cat(v) for n, v in rows.items()})


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video that are known before its frames are decoded.

    Args:
        name: Path or description, for messages.
        duration_s: Duration in seconds.
        times_s: Presentation time of each frame in seconds, ascending. The first is 0.
        width: Display width in pixels, after rotation and correction for non-square pixels.
        height: Display height in pixels, after rotation and correction for non-square pixels.
        rotation: Clockwise rotation in degrees that has been applied to width and height.
        codec: Name of the codec.
        backend: Name of the decoding backend.
        time_error_s: How far `times_s` may be off because the file rounds them, in seconds; 0 if they
            are exact.

    Example:
        >>> VideoInfo("clip.mp4", duration_s=2.0, times_s=(0.0, 0.5, 1.0, 1.5), width=640, height=360).fps
        2.0
    """

    name: str
    duration_s: float
    times_s: tuple[float, ...]
    width: int
    height: int
    rotation: int = 0
    codec: str = ""
    backend: str = ""
    time_error_s: float = 0.0

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.times_s)

    @property
    def fps(self) -> float:
        """Mean number of frames per second; 0 if the duration is 0."""
        return self.num_frames / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def is_still(self) -> bool:
        """True for an image, and for a video with one frame."""
        return self.num_frames == 1


@dataclass(frozen=True, eq=False)
class Frames(_Tensors):
    """A batch of clips, decoded or preprocessed for an encoder.

    Args:
        pixels: RGB images [B, T, 3, H, W]: uint8 as decoded, floating point as preprocessed.
        times_s: Time of each frame in seconds, [B, T].
        extent: Rectangle of the original image that the pixels show, [B, 4].
        mask: True for a real frame, False for padding, [B, T].

    Raises:
        ShapeError: The shapes do not match.
    """

    pixels: Tensor
    times_s: Tensor
    extent: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        batch, frames = self.mask.shape
        _check_shape(self, "pixels", (batch, frames, 3, None, None))
        _check_shape(self, "times_s", (batch, frames))
        _check_shape(self, "extent", (batch, 4))

    @classmethod
    def of(cls, pixels: Tensor, times_s: Tensor | None = None, extent: Tensor | None = None) -> Frames:
        """Create Frames without padding.

        Args:
            pixels: Images [B, T, 3, H, W].
            times_s: Times in seconds, [B, T]; 0, 1, 2, … by default.
            extent: Extents [B, 4]; the whole image by default.

        Raises:
            ShapeError: The pixels have another shape.

        Example:
            >>> Frames.of(torch.zeros(2, 8, 3, 32, 32)).mask.shape
            torch.Size([2, 8])
        """
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ShapeError(
                f"Expected pixels [B, T, 3, H, W], got {list(pixels.shape)}. Frames are channels-first."
            )
        batch, frames = pixels.shape[:2]
        device = pixels.device
        if times_s is None:
            times_s = torch.arange(frames, dtype=torch.float64, device=device).expand(batch, -1)
        if extent is None:
            extent = torch.tensor(WHOLE_PICTURE, dtype=torch.float32, device=device).expand(batch, -1)
        return cls(pixels, times_s, extent, torch.ones(batch, frames, dtype=torch.bool, device=device))


@dataclass(frozen=True, eq=False)
class Grid(_Tensors):
    """Features of an encoder on its own space-time grid, or aligned to a common grid.

    Args:
        values: Features [B, t, h, w, D].
        times_s: Time of the center of each step in seconds, [B, t].
        extent: Rectangle of the original image that the h×w cells cover, [B, 4].
        mask: True where the features come from a real part of the video, [B, t, h, w].

    Raises:
        ShapeError: The shapes do not match.

    Example:
        >>> times_s, extent = torch.arange(4.0)[None], torch.tensor([WHOLE_PICTURE])
        >>> mask = torch.ones(1, 4, 2, 2, dtype=torch.bool)
        >>> Grid(torch.zeros(1, 4, 2, 2, 768), times_s, extent, mask).shape
        (4, 2, 2)
    """

    values: Tensor
    times_s: Tensor
    extent: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        _check_shape(self, "values", (*self.mask.shape, None))
        _check_shape(self, "times_s", tuple(self.mask.shape[:2]))
        _check_shape(self, "extent", (self.mask.shape[0], 4))

    @classmethod
    def batch(cls, grids: Sequence[Grid]) -> Grid:
        """Concatenate grids with equal h, w and D. Grids with fewer steps get masked steps at the end."""
        t = max(grid.shape[0] for grid in grids)

        def padded(x: Tensor) -> Tensor:  # [B, t', ...] → [B, t, ...], padded with zeros
            return torch.cat([x, x.new_zeros((x.shape[0], t - x.shape[1], *x.shape[2:]))], dim=1)

        return cls(
            torch.cat([padded(grid.values) for grid in grids]),
            torch.cat([padded(grid.times_s) for grid in grids]),
            torch.cat([grid.extent for grid in grids]),
            torch.cat([padded(grid.mask) for grid in grids]),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(t, h, w)."""
        t, h, w = self.mask.shape[1:]
        return t, h, w


@dataclass(frozen=True, eq=False)
class Fused(_Tensors):
    """The fused features of several encoders: visual tokens for the LLM.

    Args:
        tokens: Tokens [B, N, L].
        positions: Time in seconds, row and column (from 0) of each token's cell, [B, N, 3].
        mask: True for a real token, False for padding, [B, N].
        mix_weights: Contribution of each encoder to each cell, [B, E, t, h, w]. It sums to 1 over the
            encoders that cover the cell, and is 0 in padding. None if the mixer has no weights.

    Raises:
        ShapeError: The shapes do not match.

    Example:
        >>> mask = torch.ones(1, 16, dtype=torch.bool)
        >>> Fused(torch.zeros(1, 16, 576), torch.zeros(1, 16, 3), mask).tokens.shape
        torch.Size([1, 16, 576])
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    mix_weights: Tensor | None = None

    def __post_init__(self) -> None:
        batch, tokens = self.mask.shape
        _check_shape(self, "tokens", (batch, tokens, None))
        _check_shape(self, "positions", (batch, tokens, 3))


@dataclass(frozen=True)
class Preset:
    """How to preprocess frames for an encoder: first resize and crop, then normalize.

    Args:
        crop_mode: "squash" resizes to `input_size` and ignores the aspect ratio. "crop" resizes the short
            side to `resize_short_side` and takes the center. "letterbox" resizes the long side to
            `input_size` and pads with the mean.
        input_size: (height, width) in pixels.
        interpolation: "bicubic" or "bilinear", antialiased as in PIL; or "bilinear_plain", torch's
            `F.interpolate` of floating-point pixels without antialiasing.
        resize_short_side: Short side before the crop, in pixels. It must be at least the long side of
            `input_size`. None means the short side of `input_size`, which is enough for a square.
        mean: Mean of each RGB channel, for pixels in [0, 1].
        std: Standard deviation of each RGB channel. The result is (pixel − mean) / std.
        center: How to round the offset of a centered crop if an odd number of pixels is cut off: "nearest" as
            in torchvision, or "down" as in transformers.

    Raises:
        ShapeError: A value is invalid.

    Example:
        >>> Preset("crop", (224, 224), resize_short_side=256).interpolation
        'bicubic'
    """

    crop_mode: CropMode
    input_size: tuple[int, int]
    interpolation: Interpolation = "bicubic"
    resize_short_side: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    center: Center = "nearest"

    def __post_init__(self) -> None:
        for name, names in {"crop_mode": CropMode, "interpolation": Interpolation, "center": Center}.items():
            value = getattr(self, name)
            known = f"one of {', '.join(get_args(names))}"
            _require(value in get_args(names), f"Preset {name} must be {known}; got {value!r}.")
        size, resize = self.input_size, self.resize_short_side
        _require(_are_counts(size, 2), f"Preset input_size must be (height, width) in pixels; got {size}.")
        _require(
            resize is None or is_count(resize),
            f"Preset resize_short_side must be a number of pixels; got {resize}.",
        )
        short_side = resize or min(size)
        _require(
            self.crop_mode != "crop" or short_side >= max(size),
            f"A crop of {size} does not fit into an image with a short side of {short_side}. "
            f"Set resize_short_side={max(size)} or more.",
        )
        for name, values in {"mean": self.mean, "std": self.std}.items():
            _require(
                isinstance(values, (tuple, list))
                and len(values) == 3
                and all(isinstance(value, Real) and 0 <= value <= 1 for value in values),
                f"Preset {name} must be three numbers, for R, G and B of pixels in [0, 1]; got {values!r}. "
                "Divide values for [0, 255] by 255.",
            )
        _require(min(self.std) > 0, f"Preset std must be greater than 0; got {self.std}.")


@dataclass(frozen=True)
class EncoderSpec:
    """What merv knows about an encoder before it is built.

    Args:
        name: Name of the encoder.
        num_frames: Number of frames to sample from a clip; if `fps` is set, the maximum number.
        grid: (t, h, w) of the features of `num_frames` frames.
        embed_dim: Channels of the features (D).
        presets: Ways to preprocess frames, by name. The first is the default.
        fps: Sample at this rate, in frames per second, instead of a fixed number of frames.
        window_size: Number of frames that the network processes together: 1 for an image encoder, 0 if it
            takes a whole clip of any length. Windows are independent, so equal ones are encoded once. The
            last frame of a clip is repeated to complete a window.
        tubelet_size: Number of frames in one step of the encoder's time axis.
        patch: Pixels per cell of the grid, along one side; None if they do not divide the image.
        layer: Description of the layer that the features come from.
        source: Where the default weights come from: a hub id, "package:MODULE/GLOB" or "built-in".
        revision: Commit, tag or branch of the hub repository.
        weights_license: License of the weights.
        parameters: Number of parameters of the loaded network.

    Raises:
        ShapeError: A value is invalid.

    Example:
        >>> presets = {"squash": Preset("squash", (112, 112))}
        >>> EncoderSpec("mine", num_frames=16, grid=(16, 7, 7), embed_dim=384, presets=presets).window_size
        1
    """

    name: str
    num_frames: int
    grid: tuple[int, int, int]
    embed_dim: int
    presets: Mapping[str, Preset] = field(hash=False)
    fps: float | None = None
    window_size: int = 1
    tubelet_size: int = 1
    patch: int | None = None
    layer: str = "last"
    source: str = ""
    revision: str | None = None
    weights_license: str = "unknown"
    parameters: int | None = None

    def __post_init__(self) -> None:
        counts = {"num_frames": 1, "embed_dim": 1, "tubelet_size": 1}
        for name, least in {**counts, "window_size": 0, "patch": 0, "parameters": 0}.items():
            value = getattr(self, name)
            _require(
                (isinstance(value, Integral) and int(value) >= least)
                or (value is None and name in ("patch", "parameters")),
                f"{self.name}: {name} must be an integer of at least {least}; got {value!r}.",
            )
        _require(
            _are_counts(self.grid, 3),
            f"{self.name}: grid (t, h, w) must be three integers of at least 1; got {self.grid}.",
        )
        _require(
            self.fps is None or (isinstance(self.fps, Real) and 0 < self.fps < math.inf),
            f"{self.name}: fps must be a positive number; got {self.fps!r}.",
        )
        presets = self.presets
        _require(
            isinstance(presets, Mapping)
            and len(presets) > 0
            and all(isinstance(preset, Preset) for preset in presets.values()),
            f"{self.name}: presets must map at least one name to a Preset; got {presets!r}.",
        )
        window = self.window_size or self.num_frames
        _require(
            self.num_frames % window == 0,
            f"{self.name}: num_frames={self.num_frames} must be a multiple of window_size={window}.",
        )
        _require(
            window % self.tubelet_size == 0,
            f"{self.name}: window_size={window} must be a multiple of tubelet_size={self.tubelet_size}.",
        )
