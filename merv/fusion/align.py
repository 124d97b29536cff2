"""Resample the grid of every encoder to one common grid of time, rows and columns.

Each target cell is the mean of the source cells that it overlaps, weighted by the overlap in time,
height and width. The aligner has no parameters, so aligned features can be stored. Cells are
compared in seconds and in units of the original image. If an encoder crops the image, the border cells
are therefore empty; its features are not stretched over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d

from merv.errors import ShapeError
from merv.types import WHOLE_PICTURE, Grid, is_count

MIN_COVERAGE = 0.5  # a target cell is masked if real source cells cover a smaller share of it


class Aligner(nn.Module):
    """Resample a grid of any size to a common size, using its times, extent and mask.

    Args:
        grid: The common size (t, h, w). A still, which has no duration, gets one step of time. None: each
            encoder keeps its own grid.
        mode: "area" weights source cells by their overlap. "released" is the AdaptiveAvgPool3d of the
            released MERV, which ignores times and extents. The two are equal if the encoder's size is a
            multiple of the common size and it sees the whole image. From 14 to 8 cells, the windows of
            "released" overlap, whereas "area" divides a source cell among its targets.

    Raises:
        ShapeError: The grid is not three integers of at least 1, or the mode is unknown.

    Example:
        >>> grid = Grid(torch.rand(2, 16, 14, 14, 768), torch.arange(16.).expand(2, -1),
        ...             torch.tensor([[0., 0., 1., 1.]] * 2), torch.ones(2, 16, 14, 14, dtype=torch.bool))
        >>> Aligner((8, 4, 4))(grid).values.shape
        torch.Size([2, 8, 4, 4, 768])

    Source: the released MERV pools with AdaptiveAvgPool3d (arXiv 2501.01426, §3.2).
    """

    def __init__(
        self, grid: tuple[int, int, int] | None = (16, 8, 8), mode: Literal["area", "released"] = "area"
    ) -> None:
        super().__init__()
        is_size = isinstance(grid, Sequence) and len(grid) == 3 and all(map(is_count, grid))
        if grid is not None and not is_size:
            raise ShapeError(
                f"Expected a grid (time, rows, columns), three integers of at least 1; got {grid!r}."
            )
        if mode not in ("area", "released"):
            raise ShapeError(f"Unknown aligner mode {mode!r}. Available: 'area', 'released'.")
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]), int(grid[2]))
        self.mode = mode

    @property
    def size(self) -> tuple[int, int, int]:
        """The common size (t, h, w). Raises ShapeError if each encoder keeps its own grid."""
        if self.grid is None:
            raise ShapeError("Each encoder keeps its own grid, as grid=None says. Pass a grid (t, h, w).")
        return self.grid

    def forward(self, grid: Grid, span_s: Tensor | None = None, shown_s: Tensor | None = None) -> Grid:
        """Resample a batch of features.

        Args:
            grid: Features of one encoder, values of shape [B, t, h, w, D].
            span_s: Start and end of each clip in seconds, shape [B, 2]; the same for all encoders. By
                default, the time that the cells of the grid cover.
            shown_s: Times of the first and last sampled frame in seconds, shape [B, 2]. The cells of these
                frames are extended to the start and end of the clip. Only used together with `span_s`.

        Returns:
            Features on the common cells, values of shape [B, T, H, W, D] for an aligner of size (T, H, W).
            Without a common size: the features as they are, of a still only the first step.
        """
        edges_s = cell_edges(grid.times_s)  # [B, t, 2]
        if span_s is None:
            span_s = torch.stack([edges_s[:, 0, 0], edges_s[:, -1, 1]], dim=1)
        elif shown_s is not None:
            edges_s = extend_to_span(edges_s, span_s, shown_s)
        still = bool((span_s[:, 0] >= span_s[:, 1]).all())
        if self.grid is None:
            return first_step(grid) if still else grid
        t, h, w = (1, *self.grid[1:]) if still else self.grid
        starts_ends = equal_cells(span_s[:, 0], span_s[:, 1], t)  # [B, t, 2]
        whole = grid.extent.new_tensor(WHOLE_PICTURE).expand_as(grid.extent)
        if self.mode == "released":
            values, mask = _pool(grid, (t, h, w))
        else:
            time = _uniform_if_instant(overlap(edges_s, starts_ends), edges_s, starts_ends)
            rows = overlap(
                equal_cells(grid.extent[:, 0], grid.extent[:, 2], grid.shape[1]),
                equal_cells(whole[:, 0], whole[:, 2], h),
            )
            columns = overlap(
                equal_cells(grid.extent[:, 1], grid.extent[:, 3], grid.shape[2]),
                equal_cells(whole[:, 1], whole[:, 3], w),
            )
            values, mask = _weighted_mean(grid, time, rows, columns)
        return Grid(values, starts_ends.mean(dim=2), whole, mask)


def first_step(grid: Grid) -> Grid:
    """The features without the steps after the first one."""
    return Grid(grid.values[:, :1], grid.times_s[:, :1], grid.extent, grid.mask[:, :1])


def cell_edges(times_s: Tensor) -> Tensor:
    """Compute the start and end of cells from their centers: [B, t] → [B, t, 2].

    Neighbors meet half-way. The first and last cells are symmetric. If all cells have the same time, as
    those of a repeated still, their start and end are equal.

    >>> cell_edges(torch.tensor([[1., 3., 5.]]))[0].tolist()
    [[0.0, 2.0], [2.0, 4.0], [4.0, 6.0]]
    """
    half = times_s.diff(dim=1) / 2
    if half.shape[1] == 0:
        return torch.stack([times_s, times_s], dim=2)
    before = torch.cat([half[:, :1], half], dim=1)
    after = torch.cat([half, half[:, -1:]], dim=1)
    return torch.stack([times_s - before, times_s + after], dim=2)


def extend_to_span(edges_s: Tensor, span_s: Tensor, shown_s: Tensor) -> Tensor:
    """Extend the first and last cell to the start and end of the clip.

    The first cell is extended unless the first sampled frame is more than one cell length before it, and the
    last cell accordingly. Edges are of shape [B, t, 2]. Cells whose start and end are equal are not changed.

    >>> edges_s = torch.tensor([[[0.5, 1.0], [1.0, 1.5]]])
    >>> extend_to_span(edges_s, torch.tensor([[0., 2.]]), torch.tensor([[0.6, 1.4]]))
    tensor([[[0., 1.],
             [1., 2.]]])
    """
    (first, last), edges_s = edges_s[:, [0, -1]].unbind(dim=1), edges_s.clone()
    has_duration = first[:, 0] < last[:, 1]
    extend_start = has_duration & (shown_s[:, 0] >= first[:, 0] - (first[:, 1] - first[:, 0]))
    extend_end = has_duration & (shown_s[:, 1] <= last[:, 1] + (last[:, 1] - last[:, 0]))
    edges_s[:, 0, 0] = torch.where(extend_start, torch.minimum(first[:, 0], span_s[:, 0]), first[:, 0])
    edges_s[:, -1, 1] = torch.where(extend_end, torch.maximum(last[:, 1], span_s[:, 1]), last[:, 1])
    return edges_s


def equal_cells(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Divide the range from start to end into equal cells: [B], [B] → [B, cells, 2]."""
    steps = torch.arange(cells + 1, device=start.device, dtype=start.dtype) / cells
    edges = start[:, None] + (end - start)[:, None] * steps
    return torch.stack([edges[:, :-1], edges[:, 1:]], dim=2)


def overlap(source: Tensor, target: Tensor) -> Tensor:
    """Compute the share of each target cell that each source cell covers: [B, n, 2], [B, m, 2] → [B, m, n].

    >>> overlap(equal_cells(torch.zeros(1), torch.ones(1), 3), equal_cells(torch.zeros(1), torch.ones(1), 2))
    tensor([[[0.6667, 0.3333, 0.0000],
             [0.0000, 0.3333, 0.6667]]])
    """
    start = torch.maximum(source[:, None, :, 0], target[:, :, None, 0])
    end = torch.minimum(source[:, None, :, 1], target[:, :, None, 1])
    width = (target[..., 1] - target[..., 0])[..., None]
    return (end - start).clamp(min=0) / width.clamp(min=torch.finfo(width.dtype).tiny)


def _uniform_if_instant(weights: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Weight all source cells equally where source or target has no duration (a single step, or a still)."""
    instant = (source[..., 0] == source[..., 1]).all(dim=1) | (target[..., 0] == target[..., 1]).all(dim=1)
    return torch.where(instant[:, None, None], torch.full_like(weights, 1 / weights.shape[2]), weights)


def _weighted_mean(grid: Grid, time: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the real source cells under each target cell, and the mask of the target cells."""

    def resample(x: Tensor) -> Tensor:
        """Resample [B, t, h, w, D] → [B, T, H, W, D], one axis at a time."""
        dtype = x.dtype
        x = einsum(columns.to(dtype), x, "b W w, b t h w d -> b t h W d")
        x = einsum(rows.to(dtype), x, "b H h, b t h W d -> b t H W d")
        return einsum(time.to(dtype), x, "b T t, b t H W d -> b T H W d")

    dtype = torch.promote_types(grid.values.dtype, torch.float32)
    real = grid.mask[..., None].to(dtype)
    values = torch.where(grid.mask[..., None], grid.values.to(dtype), 0)
    coverage = resample(real)  # share of each target cell that real source cells cover, in [0, 1]
    mask = coverage >= MIN_COVERAGE - 1e-4
    mean = resample(values) / coverage.clamp(min=1e-6)
    return torch.where(mask, mean, 0).to(grid.values.dtype), mask[..., 0]


def _pool(grid: Grid, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Pool by index, as the released MERV does."""
    values = adaptive_avg_pool3d(grid.values.movedim(-1, 1), shape).movedim(1, -1)
    mask = adaptive_avg_pool3d(grid.mask[:, None].float(), shape)[:, 0] >= MIN_COVERAGE
    return torch.where(mask[..., None], values, 0), mask
