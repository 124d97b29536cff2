"""The five dataclasses that carry everything from a file to the LLM.

Shape legend, used in names and comments all over merv:

    B batch   T frames   t, h, w grid cells (time, rows, columns)   N tokens
    D encoder width   E encoders   L LLM width

Conventions: times are seconds from the start of the clip's own clock; masks are
True where something real is; an extent is the rectangle that a grid or picture
covers, as (top, left, bottom, right) in units of the original, upright picture:
(0, 0, 1, 1) is the whole picture, a center crop lies inside it, a letterbox
reaches beyond it.
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
    """Whether it is a whole number of at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


def _expect(owner: object, name: str, shape: tuple[int | None, ...]) -> None:
    """Raise ShapeError unless the tensor `owner.name` has `shape` (None: any size)."""
    came = tuple(getattr(owner, name).shape)
    if len(came) != len(shape) or any(w not in (None, c) for c, w in zip(came, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(
            f"{type(owner).__name__}.{name} has shape {list(came)}; wanted [{wanted}]. "
            "See the shape legend in merv/types.py."
        )


def _whole(numbers: object, count: int) -> bool:
    """Whether it is a tuple or list of `count` whole numbers from 1."""
    if not isinstance(numbers, (tuple, list)) or len(numbers) != count:
        return False
    return all(map(is_count, numbers))


class _Tensors:
    """What the tensor-carrying dataclasses share: moving to a device or dtype."""

    def to(
        self: Self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Like `Tensor.to`, for every tensor; times, extents, masks and weights keep their dtype, exactly."""
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
        """Some samples of the batch, in every tensor."""
        if not isinstance(samples, slice):
            raise TypeError(f"Index a batch with a slice, as in [2:3]; got {samples!r}.")
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{n: v if v is None else v[samples] for n, v in values.items()})  # type: ignore[type-var]

    @classmethod
    def cat(cls: type[Self], parts: Sequence[Self]) -> Self:
        """One batch of several whose samples have equal shapes."""
        rows = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{n: None if v[0] is None else torch.cat(v) for n, v in rows.items()})


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before a picture of it is decoded.

    `times_s` are the true presentation times of all its frames, ascending, the
    first one at 0; `width` and `height` are those of the picture as it is to be seen: upright,
    after `rotation` (degrees clockwise) has been applied, and in square pixels.
    """

    name: str
    duration_s: float
    times_s: tuple[float, ...]
    width: int
    height: int
    rotation: int = 0
    codec: str = ""
    backend: str = ""

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return len(self.times_s)

    @property
    def fps(self) -> float:
        """Mean frames per second (0 for a still)."""
        return self.frames / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def is_still(self) -> bool:
        """True for an image, and for a video of one frame."""
        return self.frames == 1


@dataclass(frozen=True, eq=False)
class Frames(_Tensors):
    """Pictures on their way to an encoder.

    pixels: [B, T, 3, H, W], RGB; uint8 as decoded, floating point as preprocessed.
        Native-aspect encoders get packed patches instead: [B, P, 3·p·p] with
        `patches` [B, T, 2] telling rows and columns of patches of each frame.
    times_s: [B, T], the time at which each picture is on screen.
    extent: [B, 4], the rectangle of the picture that the pixels show.
    mask: [B, T], True for a real frame, False for padding.
    """

    pixels: Tensor
    times_s: Tensor
    extent: Tensor
    mask: Tensor
    patches: Tensor | None = None

    def __post_init__(self) -> None:
        batch, frames = self.mask.shape
        if self.patches is None:
            _expect(self, "pixels", (batch, frames, 3, None, None))
        else:
            _expect(self, "pixels", (batch, None, None))
            _expect(self, "patches", (batch, frames, 2))
        _expect(self, "times_s", (batch, frames))
        _expect(self, "extent", (batch, 4))

    @classmethod
    def of(cls, pixels: Tensor, times_s: Tensor | None = None, extent: Tensor | None = None) -> Frames:
        """Frames around [B, T, 3, H, W] pixels, all real; times default to 0, 1, 2, … s.

        >>> Frames.of(torch.zeros(2, 8, 3, 32, 32)).mask.shape
        torch.Size([2, 8])
        """
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ShapeError(
                f"Frames want pixels [B, T, 3, H, W]; got {list(pixels.shape)}. Frames are channels-first."
            )
        batch, frames = pixels.shape[:2]
        device = pixels.device
        if times_s is None:
            times_s = torch.arange(frames, dtype=torch.float64, device=device).expand(batch, -1)
        if extent is None:
            extent = torch.tensor(WHOLE_PICTURE, device=device).expand(batch, -1)
        return cls(pixels, times_s, extent, torch.ones(batch, frames, dtype=torch.bool, device=device))


@dataclass(frozen=True, eq=False)
class Grid(_Tensors):
    """Features of an encoder on its own space-time grid, or aligned to a common one.

    values: [B, t, h, w, D].
    times_s: [B, t], the center of each cell.
    extent: [B, 4], the rectangle of the picture that the h×w cells cover.
    mask: [B, t, h, w], True where the value comes from a real part of the video.
    """

    values: Tensor
    times_s: Tensor
    extent: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        _expect(self, "values", (*self.mask.shape, None))
        _expect(self, "times_s", tuple(self.mask.shape[:2]))
        _expect(self, "extent", (self.mask.shape[0], 4))

    @classmethod
    def batch(cls, grids: Sequence[Grid]) -> Grid:
        """One grid of several with equal h, w, D; shorter ones are padded at the end of time."""
        t = max(grid.shape[0] for grid in grids)

        def padded(x: Tensor) -> Tensor:  # [1, t', ...] → [1, t, ...], padding is zero
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
    """Tokens for the LLM, with all that later stages need to know of them.

    tokens: [B, N, L].
    positions: [B, N, 3], float: time in seconds, row, column of the token's cell.
    mask: [B, N], True for a real token, False for padding.
    mix_weights: [B, E, t, h, w], what each encoder contributed to each cell (sums to 1
        over the encoders present there, 0 where none is), or None where the mixer has none.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    mix_weights: Tensor | None = None

    def __post_init__(self) -> None:
        batch, tokens = self.mask.shape
        _expect(self, "tokens", (batch, tokens, None))
        _expect(self, "positions", (batch, tokens, 3))


@dataclass(frozen=True)
class Preset:
    """How an encoder wants its pictures: geometry first, then numbers.

    crop_mode: `squash` to `input_size` whatever the aspect; `crop`: short side to `resize_short_side`,
        then the center `input_size`; `letterbox`: long side to `input_size`, the rest filled with the mean.
    input_size: (height, width) in pixels.
    resize_short_side: short side before a crop, no less than the long side of `input_size`, so that it fits
        into upright and wide pictures; None: the short side of `input_size`, enough where that is a square.
    interpolation: `bicubic` or `bilinear`, antialiased as PIL does it; `bilinear_plain`
        is torch's, on floats, without antialiasing.
    mean, std: per RGB channel, from 0 to 1 as pixels are; after it (pixel − mean) / std.
    center: where a crop lies that leaves an odd number of pixels: half of them rounded to the
        nearest, as torchvision does, or down, as transformers does.

    Raises ShapeError for anything else.
    """

    crop_mode: CropMode
    input_size: tuple[int, int]
    interpolation: Interpolation = "bicubic"
    resize_short_side: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    center: Center = "nearest"

    def __post_init__(self) -> None:
        for name, of in (("crop_mode", CropMode), ("interpolation", Interpolation), ("center", Center)):
            if getattr(self, name) not in get_args(of):
                raise ShapeError(
                    f"A preset's {name} is one of {', '.join(get_args(of))}; got {getattr(self, name)!r}."
                )
        if not _whole(self.input_size, 2) or not (
            self.resize_short_side is None or _whole((self.resize_short_side,), 1)
        ):
            raise ShapeError(
                "A preset's input_size is (height, width) and its resize_short_side one side, in pixels; got "
                f"{self.input_size} and {self.resize_short_side}."
            )
        short = self.resize_short_side or min(self.input_size)
        if self.crop_mode == "crop" and short < max(self.input_size):
            raise ShapeError(
                f"A crop to {self.input_size} does not fit into all pictures whose short side is {short}; "
                f"give resize_short_side={max(self.input_size)} or more."
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if (
                not isinstance(values, (tuple, list))
                or len(values) != 3
                or not all(isinstance(value, Real) for value in values)
            ):
                raise ShapeError(f"A preset's {name} is a number per channel, RGB; got {values!r}.")
            if not all(0 <= value <= 1 for value in values):
                raise ShapeError(
                    f"A preset's {name} is for pixels in [0, 1]; got {values}. If that is for 0 to 255, "
                    "divide it by 255."
                )
        if not min(self.std) > 0:
            raise ShapeError(f"A preset's std is greater than 0; got {self.std}.")


@dataclass(frozen=True)
class EncoderSpec:
    """All that the rest of merv needs to know of an encoder, before it is built.

    num_frames: how many it wants of a clip; fps: instead, a rate (`num_frames` is then the cap).
    window_size: frames that see each other. Windows are independent, so equal ones are encoded
        once; a clip is sampled to a multiple of it. 1 for an image encoder; 0 where all frames
        of a clip, however many, are one window.
    tubelet_size: frames per cell of its time axis.
    grid: (t, h, w) for `num_frames` frames.
    embed_dim: D. layer: which output is taken, in words. source, revision: the hub id of the
        default weights. parameters: how many, all told, as loaded.
    presets: named ways to preprocess; the first is the default.
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
        if not (_whole(self.grid, 3) and _whole((self.num_frames, self.embed_dim, self.tubelet_size), 3)):
            raise ShapeError(
                f"{self.name}: num_frames, embed_dim, tubelet_size and each of the grid (t, h, w) are whole "
                f"numbers from 1; got {self.num_frames}, {self.embed_dim}, {self.tubelet_size}, {self.grid}."
            )
        if self.fps is not None and not (isinstance(self.fps, Real) and 0 < self.fps < math.inf):
            raise ShapeError(f"{self.name}: fps is a rate, in frames a second; got {self.fps!r}.")
        counts = {
            "window_size": self.window_size,
            "patch": self.patch or 0,
            "parameters": self.parameters or 0,
        }
        for name, value in counts.items():
            if not isinstance(value, Integral) or int(value) < 0:
                raise ShapeError(f"{self.name}: {name} is a whole number from 0; got {value!r}.")
        if not isinstance(self.presets, Mapping) or not all(
            isinstance(preset, Preset) for preset in self.presets.values()
        ):
            raise ShapeError(f"{self.name}: presets are a mapping of names to Presets; got {self.presets!r}.")
        window = self.window_size or self.num_frames
        if self.num_frames % window:
            raise ShapeError(
                f"{self.name}: num_frames={self.num_frames} must be a positive multiple of "
                f"window_size={self.window_size}."
            )
        if window % self.tubelet_size:
            raise ShapeError(
                f"{self.name}: window_size={window} must be a multiple of tubelet_size={self.tubelet_size}."
            )
        if not self.presets:
            raise ShapeError(f"{self.name}: an encoder declares at least one preset of preprocessing.")
