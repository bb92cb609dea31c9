"""U-Net whose skip connections are center-surround differences (Chang et al., JBHI 2023, section III-B)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks import Convolution
from torch import nn
from torch.nn import functional as F

PRIOR = 0.05  # what an untrained network holds for the chance that a pixel is hemorrhage or beside it
GROUPS = 4  # of group normalisation; the paper names none, and its batch is one slice


def resized(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A (B, C, R, C) map on the grid of another, bilinear, corners not aligned."""
    if image.shape[2:] == like.shape[2:]:
        return image
    return F.interpolate(image, size=like.shape[2:], mode="bilinear", align_corners=False)


def _two_convolutions(in_channels: int, channels: int) -> nn.Sequential:
    norm = ("GROUP", {"num_groups": GROUPS})
    return nn.Sequential(
        Convolution(2, in_channels, channels, act="RELU", norm=norm, bias=False),
        Convolution(2, channels, channels, act="RELU", norm=norm, bias=False),
    )


class CenterSurround(nn.Module):
    """Equation 6: the maps S_x that replace the skips of a U-Net.

    Printed is S_x = sum over k = x..n-1 of sum over y = x+1..n of |F_k - F_y| = sum of CSD_k. Read here as
    CSD_k = sum over y = k+1..n of |F_k - F_y|: a center is compared with what is coarser than it (equation 5), and the
    second sum, printed without k, would not be a CSD_k. F_0 to F_n are the last maps of the encoder's levels, with n
    downsamplings, so S_0 to S_(n-1) are its skips. F_y is projected to the channels of F_k (1x1 convolution) and
    resized to its grid; so is CSD_k to F_x where k > x.

    Args:
        channels: of F_0 to F_n.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        n = len(channels) - 1
        # Keys are `k_y` and `x_k`: the level that is gone to, and the one that it comes from.
        self.surround = nn.ModuleDict(
            {f"{k}_{y}": nn.Conv2d(channels[y], channels[k], 1) for k in range(n) for y in range(k + 1, n + 1)}
        )
        self.center = nn.ModuleDict(
            {f"{x}_{k}": nn.Conv2d(channels[k], channels[x], 1) for x in range(n) for k in range(x + 1, n)}
        )

    def differences(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """CSD_0 to CSD_(n-1) of F_0 to F_n."""
        n = len(maps) - 1
        return [
            sum(
                ((maps[k] - resized(self.surround[f"{k}_{y}"](maps[y]), maps[k])).abs() for y in range(k + 1, n + 1)),
                start=torch.zeros_like(maps[k]),
            )
            for k in range(n)
        ]

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """S_0 to S_(n-1), each with the size and channels of F_x."""
        found = self.differences(maps)
        return [
            sum(
                (resized(self.center[f"{x}_{k}"](found[k]), found[x]) for k in range(x + 1, len(found))),
                start=found[x],
            )
            for x in range(len(found))
        ]


class CSDUNet(nn.Module):
    """Hemorrhage and what surrounds it, slice by slice.

    Args:
        filters: channels of each level, multiples of 4; published are three downsamplings, so four levels.
        dropout: share of the deepest maps that is dropped in training.
    """

    def __init__(self, filters: Sequence[int] = (32, 64, 128, 256), dropout: float = 0.75) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_two_convolutions(a, b) for a, b in zip([1, *filters], filters, strict=False))
        self.dropout = nn.Dropout(dropout)
        self.skips = CenterSurround(filters)
        pairs = list(pairwise(filters))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, high, 2, stride=2) for high, deep in pairs)
        self.decoder = nn.ModuleList(_two_convolutions(2 * high, high) for high, _ in pairs)
        self.head = nn.Conv2d(filters[0], 1, 1)
        # From one half, hundreds of steps only taught it that hemorrhage is rare.
        nn.init.constant_(self.head.get_parameter("bias"), math.log(PRIOR / (1 - PRIOR)))
        self.multiple = 2 ** (len(filters) - 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, R, C) of (B, 1, R, C) slices of any size."""
        rows, columns = image.shape[2:]
        x = F.pad(image, (0, -columns % self.multiple, 0, -rows % self.multiple), mode="replicate")
        maps = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        x = self.dropout(x)
        skips = self.skips(maps)
        for level in reversed(range(len(skips))):
            x = self.decoder[level](torch.cat([self.up[level](x), skips[level]], dim=1))
        return self.head(x)[..., :rows, :columns]


def dilated(mask: torch.Tensor, times: int) -> torch.Tensor:
    """A mask dilated `times` times by a 3x3 kernel in its last two axes: the weak target of section III-B.

    Args:
        mask: (..., R, C) with 0 and 1; two to four axes before them keep their meaning.
        times: published 3.

    Returns:
        float32 of the same shape.
    """
    planes = mask.float().reshape(-1, 1, *mask.shape[-2:])
    for _ in range(times):
        planes = F.max_pool2d(planes, 3, stride=1, padding=1)
    return planes.reshape(mask.shape)
