"""Align: put every encoder's grid on one common grid of time, rows and columns.

Each target cell takes the mean of what the source cells under it saw, weighted by the
overlap in time, height and width. Nothing is learned, so aligned features can be kept.
Cells know where they are: times in seconds, extents in units of the picture. A cropped
encoder therefore leaves the border cells empty instead of stretching over them.
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

ENOUGH = 0.5  # of a target cell must be covered by real source cells for it to count as seen


class Aligner(nn.Module):
    """Resample any (t, h, w) to one (t, h, w), honoring times, extents and masks.

    grid: the common (t, h, w). A clip without duration (a still) gets one step of time.
    mode: `area` weights by overlap; `official` is the released MERV's AdaptiveAvgPool3d,
        which ignores times and extents (equal to `area` where sizes divide and the whole
        picture is seen; at 14 → 8 its windows overlap instead of sharing cells).

    >>> grid = Grid(torch.rand(2, 16, 14, 14, 768), torch.arange(16.).expand(2, -1),
    ...             torch.tensor([[0., 0., 1., 1.]] * 2), torch.ones(2, 16, 14, 14, dtype=torch.bool))
    >>> Aligner((8, 4, 4))(grid).values.shape
    torch.Size([2, 8, 4, 4, 768])

    Source: the released MERV pools with AdaptiveAvgPool3d (arXiv 2501.01426, §3.2).
    """

    def __init__(
        self, grid: tuple[int, int, int] = (16, 8, 8), mode: Literal["area", "official"] = "area"
    ) -> None:
        super().__init__()
        if not isinstance(grid, Sequence) or len(grid) != 3 or not all(map(is_count, grid)):
            raise ShapeError(f"A grid is (time, rows, columns), whole numbers of at least 1; got {grid!r}.")
        if mode not in ("area", "official"):
            raise ShapeError(f"Unknown aligner mode {mode!r}: 'area' or 'official'.")
        self.grid = (int(grid[0]), int(grid[1]), int(grid[2]))
        self.mode = mode

    def forward(self, grid: Grid, span_s: Tensor | None = None, shown_s: Tensor | None = None) -> Grid:
        """Grid [B, t, h, w, D] → Grid on the common cells.

        span_s: [B, 2], start and end of the clip in seconds, the same for all its encoders;
            None takes what the grid's own cells cover.
        shown_s: [B, 2], the times of the first and the last frame that were chosen to stand for the
            whole clip: cells that hold those reach its ends, wherever in them the frame lies.
        """
        edges_s = cell_edges(grid.times_s)  # [B, t, 2]
        if span_s is None:
            span_s = torch.stack([edges_s[:, 0, 0], edges_s[:, -1, 1]], dim=1)
        elif shown_s is not None:
            edges_s = reach(edges_s, span_s, shown_s)
        still = bool((span_s[:, 0] >= span_s[:, 1]).all())
        t, h, w = (1, *self.grid[1:]) if still else self.grid
        starts_ends = equal_cells(span_s[:, 0], span_s[:, 1], t)  # [B, t, 2]
        whole = torch.tensor(WHOLE_PICTURE, device=grid.extent.device).expand_as(grid.extent)
        if self.mode == "official":
            values, mask = _pool(grid, (t, h, w))
        else:
            time = _share_without_width(overlap(edges_s, starts_ends), edges_s, starts_ends)
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


def cell_edges(times_s: Tensor) -> Tensor:
    """Start and end of cells, from their centers: [B, t] → [B, t, 2].

    Neighbors meet half-way; the outer cells are symmetric. Cells that all have the same
    time (a still repeated) have no width.

    >>> cell_edges(torch.tensor([[1., 3., 5.]]))[0].tolist()
    [[0.0, 2.0], [2.0, 4.0], [4.0, 6.0]]
    """
    half = times_s.diff(dim=1) / 2
    if half.shape[1] == 0:
        return torch.stack([times_s, times_s], dim=2)
    before = torch.cat([half[:, :1], half], dim=1)
    after = torch.cat([half, half[:, -1:]], dim=1)
    return torch.stack([times_s - before, times_s + after], dim=2)


def reach(edges_s: Tensor, span_s: Tensor, shown_s: Tensor) -> Tensor:
    """Edges [B, t, 2] whose outer cells begin and end with the clip, where they hold its outer frames.

    A cell holds a frame that is no further from it than the cell is wide. Cells that all have the same
    time stay without width.

    >>> reach(torch.tensor([[[0.5, 1.0], [1.0, 1.5]]]), torch.tensor([[0., 2.]]), torch.tensor([[0.6, 1.4]]))
    tensor([[[0., 1.],
             [1., 2.]]])
    """
    (first, last), edges_s = edges_s[:, [0, -1]].unbind(dim=1), edges_s.clone()
    wide = first[:, 0] < last[:, 1]
    begins = wide & (shown_s[:, 0] >= first[:, 0] - (first[:, 1] - first[:, 0]))
    ends = wide & (shown_s[:, 1] <= last[:, 1] + (last[:, 1] - last[:, 0]))
    edges_s[:, 0, 0] = torch.where(begins, torch.minimum(first[:, 0], span_s[:, 0]), first[:, 0])
    edges_s[:, -1, 1] = torch.where(ends, torch.maximum(last[:, 1], span_s[:, 1]), last[:, 1])
    return edges_s


def equal_cells(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Edges of `cells` equal cells between start and end: [B], [B] → [B, cells, 2]."""
    steps = torch.arange(cells + 1, device=start.device, dtype=start.dtype) / cells
    edges = start[:, None] + (end - start)[:, None] * steps
    return torch.stack([edges[:, :-1], edges[:, 1:]], dim=2)


def overlap(source: Tensor, target: Tensor) -> Tensor:
    """Share of each target cell that each source cell covers: [B, n, 2], [B, m, 2] → [B, m, n].

    >>> overlap(equal_cells(torch.zeros(1), torch.ones(1), 3), equal_cells(torch.zeros(1), torch.ones(1), 2))
    tensor([[[0.6667, 0.3333, 0.0000],
             [0.0000, 0.3333, 0.6667]]])
    """
    start = torch.maximum(source[:, None, :, 0], target[:, :, None, 0])
    end = torch.minimum(source[:, None, :, 1], target[:, :, None, 1])
    width = (target[..., 1] - target[..., 0])[..., None]
    return (end - start).clamp(min=0) / width.clamp(min=torch.finfo(width.dtype).tiny)


def _share_without_width(weights: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Cells without width (one step of time, a still repeated) count equally everywhere."""
    point = (source[..., 0] == source[..., 1]).all(dim=1) | (target[..., 0] == target[..., 1]).all(dim=1)
    return torch.where(point[:, None, None], torch.full_like(weights, 1 / weights.shape[2]), weights)


def _weighted_mean(grid: Grid, time: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the real source cells under each target cell, and which cells are seen."""

    def resample(x: Tensor) -> Tensor:
        """[B, t, h, w, D] → [B, T, H, W, D], one axis after the other."""
        dtype = x.dtype
        x = einsum(columns.to(dtype), x, "b W w, b t h w d -> b t h W d")
        x = einsum(rows.to(dtype), x, "b H h, b t h W d -> b t H W d")
        return einsum(time.to(dtype), x, "b T t, b t H W d -> b T H W d")

    exact = torch.promote_types(grid.values.dtype, torch.float32)
    real = grid.mask[..., None].to(exact)
    values = torch.where(grid.mask[..., None], grid.values.to(exact), 0)
    seen = resample(real)  # share of each target cell that is covered, in [0, 1]
    mask = seen >= ENOUGH - 1e-4
    mean = resample(values) / seen.clamp(min=1e-6)
    return torch.where(mask, mean, 0).to(grid.values.dtype), mask[..., 0]


def _pool(grid: Grid, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The released aligner: adaptive average pooling by index."""
    values = adaptive_avg_pool3d(grid.values.movedim(-1, 1), shape).movedim(1, -1)
    mask = adaptive_avg_pool3d(grid.mask[:, None].float(), shape)[:, 0] >= ENOUGH
    return torch.where(mask[..., None], values, 0), mask
