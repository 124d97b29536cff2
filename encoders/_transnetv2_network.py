"""The network of TransNetV2, with standard layers and the upstream parameter names."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

LOOKUP = 101  # a frame is compared with the 50 frames before it, itself and the 50 frames after it


class Network(nn.Module):
    """[B, 3, T, 27, 48] in [0, 1] → feature maps [B, 256, T, 3, 6] or features [B, T, 1024].

    Dropout is left out: it is for training. The two classifiers, which find cuts, are loaded but not run.
    """

    def __init__(self, filters: int = 16, width: int = 1024) -> None:
        super().__init__()
        sizes = [(3, filters), (4 * filters, 2 * filters), (8 * filters, 4 * filters)]
        channels = [4 * size for _, size in sizes]
        self.SDDCNN = nn.ModuleList(_Stack(inputs, size) for inputs, size in sizes)
        self.frame_sim_layer = _FrameSimilarity(sum(channels))
        self.color_hist_layer = _ColorHistograms()
        self.fc1 = nn.Linear(channels[-1] * 3 * 6 + 2 * 128, width)
        self.cls_layer1 = nn.Linear(width, 1)
        self.cls_layer2 = nn.Linear(width, 1)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The output of each stack, [B, C, T, h, w], from fine to coarse."""
        maps = [pixels]
        for stack in self.SDDCNN:
            maps.append(stack(maps[-1]))
        return maps[1:]

    def features(self, pixels: Tensor) -> Tensor:
        """The input of the classifiers, [B, T, 1024]."""
        maps = self.maps(pixels)
        parts = [
            self.color_hist_layer(pixels),
            self.frame_sim_layer(maps),
            rearrange(maps[-1], "b c t h w -> b t (h w c)"),
        ]
        return F.relu(self.fc1(torch.cat(parts, dim=2)))


class _Stack(nn.Module):
    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_DilatedConvs(inputs, filters), _DilatedConvs(4 * filters, filters)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(F.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class _DilatedConvs(nn.Module):
    """Four parallel convolutions that see 1, 2, 4 and 8 frames before and after."""

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.Conv3D_1 = _SpaceThenTime(inputs, filters, 1)
        self.Conv3D_2 = _SpaceThenTime(inputs, filters, 2)
        self.Conv3D_4 = _SpaceThenTime(inputs, filters, 4)
        self.Conv3D_8 = _SpaceThenTime(inputs, filters, 8)
        self.bn = nn.BatchNorm3d(4 * filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        convs = (self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8)
        return self.bn(torch.cat([conv(x) for conv in convs], dim=1))


class _SpaceThenTime(nn.Module):
    def __init__(self, inputs: int, filters: int, step: int) -> None:
        super().__init__()
        space = nn.Conv3d(inputs, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(
            2 * filters, filters, (3, 1, 1), dilation=(step, 1, 1), padding=(step, 0, 0), bias=False
        )
        self.layers = nn.Sequential(space, time)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _FrameSimilarity(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, 128)
        self.fc = nn.Linear(LOOKUP, 128)

    def forward(self, maps: list[Tensor]) -> Tensor:
        means = torch.cat([reduce(x, "b c t h w -> b t c", "mean") for x in maps], dim=2)
        return F.relu(self.fc(_around(self.projection(means))))


class _ColorHistograms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(LOOKUP, 128)

    def forward(self, pixels: Tensor) -> Tensor:
        eighths = (pixels * 255).round().clamp(0, 255).long() >> 5  # 8 levels per channel
        r, g, b = rearrange(eighths, "b c t h w -> c b t (h w)")
        bins = (r << 6) + (g << 3) + b  # one of 512 colors per pixel
        counts = pixels.new_zeros(*bins.shape[:2], 512)
        counts = counts.scatter_add(2, bins, torch.ones_like(bins, dtype=counts.dtype))
        return F.relu(self.fc(_around(counts)))


def _around(x: Tensor) -> Tensor:
    """Cosine similarity of each frame with its neighbors, 0 beyond the clip: [B, T, D] → [B, T, LOOKUP]."""
    x = F.normalize(x, dim=2)
    cosines = F.pad(x @ x.mT, (LOOKUP // 2, LOOKUP // 2))  # [B, T, T + 100]
    return cosines.unfold(2, LOOKUP, 1).diagonal(dim1=1, dim2=2).mT
