import re

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool3d

from merv.errors import ShapeError
from merv.fusion.align import Aligner
from merv.types import WHOLE_PICTURE, Grid


def grid_of(values, times_s=None, extent=WHOLE_PICTURE, mask=None) -> Grid:
    batch, t, h, w, _ = values.shape
    times_s = torch.arange(t) + 0.5 if times_s is None else torch.as_tensor(times_s)
    mask = torch.ones(batch, t, h, w, dtype=torch.bool) if mask is None else mask
    return Grid(values, times_s.double().expand(batch, -1), torch.tensor(extent).expand(batch, -1), mask)


def position_grid(h: int, w: int, extent=WHOLE_PICTURE, t: int = 1) -> Grid:
    """A grid whose values are the centers of its cells in the picture: (row, column) in [0, 1]."""
    top, left, bottom, right = extent
    rows = top + (torch.arange(h) + 0.5) / h * (bottom - top)
    columns = left + (torch.arange(w) + 0.5) / w * (right - left)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return grid_of(positions.expand(1, t, h, w, 2), extent=extent)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 8, 24), (32, 8, 8)])
def test_area_equals_released_pooling_if_sizes_divide(size):
    values = torch.randn(2, *size, 3)
    out = Aligner((16, 8, 8))(grid_of(values))
    pooled = adaptive_avg_pool3d(values.movedim(-1, 1), (16, 8, 8)).movedim(1, -1)
    torch.testing.assert_close(out.values, pooled)
    assert out.mask.all()


def test_released_mode_pools_14_to_8_with_overlapping_windows():
    values = torch.randn(1, 4, 14, 14, 2)
    out = Aligner((4, 8, 8), mode="released")(grid_of(values))
    torch.testing.assert_close(out.values[0, 0, 1, 3], values[0, 0, 1:4, 5:7].mean(dim=(0, 1)))
    torch.testing.assert_close(out.values[0, 0, 7, 0], values[0, 0, 12:14, 0:2].mean(dim=(0, 1)))


def test_area_weights_cells_by_their_overlap():
    values = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1, 1)
    out = Aligner((1, 2, 1))(grid_of(values))
    torch.testing.assert_close(out.values.flatten(), torch.tensor([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5]))


def test_squashed_and_cropped_features_are_aligned():
    target = Aligner((1, 8, 8))
    squashed = target(position_grid(16, 16))
    other = target(position_grid(24, 40))
    cropped = target(position_grid(16, 16, extent=(0.0, 0.25, 1.0, 0.75)))
    torch.testing.assert_close(squashed.values, other.values)
    assert cropped.mask[0, 0, :, 2:6].all()
    assert not cropped.mask[0, 0, :, :2].any()
    assert not cropped.mask[0, 0, :, 6:].any()
    torch.testing.assert_close(cropped.values[0, 0, :, 2:6], squashed.values[0, 0, :, 2:6])


def test_letterbox_bars_are_left_out():
    boxed = Aligner((1, 4, 4))(position_grid(8, 8, extent=(-0.5, 0.0, 1.5, 1.0)))
    assert boxed.mask.all()
    torch.testing.assert_close(boxed.values, Aligner((1, 4, 4))(position_grid(8, 8)).values)


def test_masked_cells_are_ignored():
    values = torch.tensor([1.0, 100.0, 3.0, 100.0]).reshape(1, 4, 1, 1, 1)
    mask = torch.tensor([True, False, True, False]).reshape(1, 4, 1, 1)
    out = Aligner((2, 1, 1))(grid_of(values, mask=mask))
    assert out.values.flatten().tolist() == [1.0, 3.0]


def test_cells_covered_less_than_half_are_masked():
    mask = torch.tensor([True, False, False, False]).reshape(1, 4, 1, 1)
    out = Aligner((1, 1, 1))(grid_of(torch.ones(1, 4, 1, 1, 1), mask=mask))
    assert not out.mask.any()
    assert out.values.item() == 0


def test_masked_nan_does_not_leak():
    mask = torch.tensor([True, False]).reshape(1, 2, 1, 1)
    values = torch.tensor([1.0, float("nan")]).reshape(1, 2, 1, 1, 1)
    assert Aligner((2, 1, 1))(grid_of(values, mask=mask)).values.flatten().tolist() == [1.0, 0.0]


def test_features_of_half_the_clip_fill_half_of_the_cells():
    late = grid_of(torch.ones(1, 4, 1, 1, 1), times_s=[4.5, 5.5, 6.5, 7.5])
    out = Aligner((8, 1, 1))(late, torch.tensor([[0.0, 8.0]], dtype=torch.float64))
    assert out.mask.flatten().tolist() == [False] * 4 + [True] * 4
    assert out.times_s[0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


def test_uneven_cells_are_weighted_by_duration():
    grid = grid_of(torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1, 1), times_s=[0.5, 1.5, 5.5])
    out = Aligner((1, 1, 1))(grid, torch.tensor([[0.0, 3.5]], dtype=torch.float64))
    assert out.values.item() == pytest.approx((0.0 * 1 + 1.0 * 2.5) / 3.5)


def test_a_still_gets_one_step_of_time():
    repeated = grid_of(torch.randn(1, 16, 2, 2, 3), times_s=[0.0] * 16)
    out = Aligner((8, 2, 2))(repeated, torch.zeros(1, 2, dtype=torch.float64))
    assert out.shape == (1, 2, 2)
    torch.testing.assert_close(out.values[:, 0], repeated.values.mean(dim=1))


def test_single_feature_fills_the_whole_clip():
    out = Aligner((4, 1, 1))(
        grid_of(torch.ones(1, 1, 1, 1, 1), times_s=[3.0]), torch.tensor([[0.0, 6.0]], dtype=torch.float64)
    )
    assert out.mask.all()


def test_bf16_stays_bf16():
    assert Aligner((2, 2, 2))(grid_of(torch.ones(1, 4, 4, 4, 1).bfloat16())).values.dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [(0, 8, 8), (2, 2.5, 2), (2, 2), "222", 4])
def test_invalid_grid_is_rejected(grid):
    with pytest.raises(ShapeError, match=re.escape(repr(grid))):
        Aligner(grid)


def test_shorter_grids_are_padded_in_a_batch():
    batch = Grid.batch([grid_of(torch.ones(1, 1, 2, 2, 3)), grid_of(torch.ones(1, 4, 2, 2, 3))])
    assert batch.values.shape == (2, 4, 2, 2, 3)
    assert batch.mask[:, :, 0, 0].tolist() == [[True, False, False, False], [True] * 4]


def test_cells_of_outer_frames_extend_to_the_ends_of_the_clip():
    grid = grid_of(torch.ones(1, 4, 1, 1, 1), times_s=[1.9, 3.0, 5.0, 6.1])
    span, frames = torch.tensor([[0.0, 8.0]]).double(), torch.tensor([[1.9, 6.1]]).double()
    assert not Aligner((32, 1, 1))(grid, span).mask.all()
    assert Aligner((32, 1, 1))(grid, span, frames).mask.all()


def test_features_of_half_the_sampled_frames_fill_half_of_the_cells():
    late = grid_of(torch.ones(1, 4, 1, 1, 1), times_s=[4.5, 5.5, 6.5, 7.5])
    out = Aligner((8, 1, 1))(late, torch.tensor([[0.0, 8.0]]).double(), torch.tensor([[0.5, 7.5]]).double())
    assert out.mask.flatten().tolist() == [False] * 4 + [True] * 4
