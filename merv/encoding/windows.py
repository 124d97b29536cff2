"""Encode each distinct window of frames once, and reuse its features where the window is repeated.

The features of a window depend on no other window, so the result is exact. Windows are repeated in a still
image, in a frame that stays on screen, and in a short clip that is stretched over many frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merv.encoding.base import Encoder
from merv.types import Frames, Grid
from merv.utils.torch_modules import device_and_dtype

FRAMES_AT_ONCE = 8  # frames of a clip in one forward pass: more are not faster on a CPU, and need more memory


def encode_distinct(
    encoder: Encoder, clips: Sequence[Frames], indices: Sequence[Sequence[int]]
) -> list[Grid]:
    """Encode clips, each distinct window once.

    Args:
        encoder: The encoder.
        clips: Frames of one clip each, pixels of shape [1, T, 3, H, W].
        indices: For each clip, the index in the video of each of its frames. Two windows of a clip are equal
            if they have the same indices at the same intervals in time.

    Returns:
        Features of each clip on the encoder's own grid, values of shape [1, t, h, w, D].

    Example:
        >>> from merv import create_encoder
        >>> repeated_still = Frames.of(torch.zeros(1, 16, 3, 16, 16))
        >>> encode_distinct(create_encoder("fake"), [repeated_still], [[0] * 16])[0].shape
        (16, 4, 4)
    """
    distinct: dict[tuple, Frames] = {}
    starts: list[list[tuple]] = []  # for each clip and window: key of the distinct window, start time
    for number, (clip, shown) in enumerate(zip(clips, indices, strict=True)):
        size = encoder.spec.window_size or len(shown)
        starts.append([])
        for start in range(0, len(shown), size):
            window = _window(clip, start, size)
            pace_s = (window.times_s[0] - window.times_s[0, 0]).tolist()
            key = (number, *shown[start : start + size], *(round(time_s, 6) for time_s in pace_s))
            distinct.setdefault(key, window)
            starts[-1].append((key, clip.times_s[:, start]))
    encoded = _encode(encoder, list(distinct.values()), FRAMES_AT_ONCE * len(clips))
    grids = dict(zip(distinct, encoded, strict=True))
    return [
        _join([_shifted(grids[key], start_s - distinct[key].times_s[:, 0]) for key, start_s in windows])
        for windows in starts
    ]


def _window(clip: Frames, start: int, size: int) -> Frames:
    part = slice(start, start + size)
    return Frames(clip.pixels[:, part], clip.times_s[:, part], clip.extent, clip.mask[:, part])


def _encode(encoder: Encoder, windows: Sequence[Frames], max_frames: int) -> list[Grid]:
    device, dtype = device_and_dtype(encoder)
    grids: list[Grid] = []
    for group in _groups(windows, max_frames):
        grid = encoder(Frames.cat(group).to(device=device, dtype=dtype))
        grids += [grid[i : i + 1] for i in range(len(group))]
    return grids


def _groups(windows: Sequence[Frames], max_frames: int) -> Iterator[list[Frames]]:
    """Group consecutive windows of equal length, at most `max_frames` frames or one window each."""
    group: list[Frames] = []
    for window in windows:
        size = window.mask.shape[1]
        if group and (group[0].mask.shape[1] != size or (len(group) + 1) * size > max_frames):
            yield group
            group = []
        group.append(window)
    yield group


def _shifted(grid: Grid, by_s: torch.Tensor) -> Grid:
    """The same features at times shifted by `by_s` seconds, of shape [1]."""
    by_s = by_s.to(grid.times_s)
    return Grid(grid.values, grid.times_s + by_s[:, None], grid.extent, grid.mask)


def _join(windows: Sequence[Grid]) -> Grid:
    """Concatenate the windows of one clip in time."""
    return Grid(
        torch.cat([grid.values for grid in windows], dim=1),
        torch.cat([grid.times_s for grid in windows], dim=1),
        windows[0].extent,
        torch.cat([grid.mask for grid in windows], dim=1),
    )
