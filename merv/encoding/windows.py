"""Windows: run an encoder on each distinct window of frames once.

By the encoder's spec a window's features depend on no other window. A still, a frame that stays
on screen, a short clip stretched over many frames: each is encoded once and the result reused,
which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merv.encoding.base import Encoder
from merv.types import Frames, Grid
from merv.utils.torch_modules import device_and_dtype

FRAMES_AT_ONCE = 8  # in one forward: more is no faster on a CPU, and costs memory


def encode_distinct(
    encoder: Encoder, clips: Sequence[Frames], indices: Sequence[Sequence[int]]
) -> list[Grid]:
    """Encode clips of batch 1: one Grid each, on the encoder's own grid.

    indices: per clip, which frame of its video each frame is; equal windows are found by them, and
        by their pace.

    >>> from merv import create_encoder
    >>> still_repeated = Frames.of(torch.zeros(1, 16, 3, 16, 16))
    >>> encode_distinct(create_encoder("fake"), [still_repeated], [[0] * 16])[0].shape
    (16, 4, 4)
    """
    distinct: dict[tuple, Frames] = {}
    placed: list[list[tuple]] = []  # per clip and window: which distinct one, and when it starts
    for number, (clip, shown) in enumerate(zip(clips, indices, strict=True)):
        size = encoder.spec.window_size or len(shown)
        placed.append([])
        for start in range(0, len(shown), size):
            window = _window(clip, start, size)
            pace_s = (window.times_s[0] - window.times_s[0, 0]).tolist()
            key = (number, *shown[start : start + size], *(round(time_s, 6) for time_s in pace_s))
            distinct.setdefault(key, window)
            placed[-1].append((key, clip.times_s[:, start]))
    made = dict(zip(distinct, _encode(encoder, list(distinct.values())), strict=True))
    return [
        _join([_shifted(made[key], start_s - distinct[key].times_s[:, 0]) for key, start_s in windows])
        for windows in placed
    ]


def _window(clip: Frames, start: int, size: int) -> Frames:
    part = slice(start, start + size)
    return Frames(clip.pixels[:, part], clip.times_s[:, part], clip.extent, clip.mask[:, part])


def _encode(encoder: Encoder, windows: Sequence[Frames]) -> list[Grid]:
    device, dtype = device_and_dtype(encoder)
    grids: list[Grid] = []
    for group in _groups(windows):
        grid = encoder(Frames.cat(group).to(device=device, dtype=dtype))
        grids += [grid[i : i + 1] for i in range(len(group))]
    return grids


def _groups(windows: Sequence[Frames]) -> Iterator[list[Frames]]:
    """Neighbors of equal length, together at most FRAMES_AT_ONCE frames (or one window)."""
    group: list[Frames] = []
    for window in windows:
        frames = window.mask.shape[1]
        if group and (group[0].mask.shape[1] != frames or (len(group) + 1) * frames > FRAMES_AT_ONCE):
            yield group
            group = []
        group.append(window)
    yield group


def _shifted(grid: Grid, by_s: torch.Tensor) -> Grid:
    by_s = by_s.to(grid.times_s)
    return Grid(grid.values, grid.times_s + by_s[:, None], grid.extent, grid.mask)


def _join(windows: Sequence[Grid]) -> Grid:
    """Windows of one clip, in order of time."""
    return Grid(
        torch.cat([grid.values for grid in windows], dim=1),
        torch.cat([grid.times_s for grid in windows], dim=1),
        windows[0].extent,
        torch.cat([grid.mask for grid in windows], dim=1),
    )
