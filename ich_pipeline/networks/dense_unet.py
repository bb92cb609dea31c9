"""2D dense encoder with a plain decoder: the coarse network of Qayyum et al., Imaging and Radiation Research 2023.

Section 2.2 gives five dense blocks of six layers (BN-ReLU-1x1, BN-ReLU-3x3), each followed by a transition (BN, 1x1,
2x2 average pool), and a non-dense decoder. It does not give the growth rate, the first layer or the decoder: growth 16
and a first 3x3 convolution are those of FC-DenseNet103 (Jegou et al., arXiv 1611.09326), the 1x1 convolution's width is
that of DenseNet (Huang et al., arXiv 1608.06993), the decoder is MONAI's of a plain U-Net.
"""

import math
from collections.abc import Sequence

import torch
from monai.networks.nets.basic_unet import UpCat
from torch import nn

from ich_pipeline.networks.planned_unet import PRIOR

BOTTLENECK = 4  # the 1x1 convolution of a dense layer gives this many times the growth (DenseNet)


class DenseLayer(nn.Sequential):
    """BN-ReLU-1x1, BN-ReLU-3x3; what it makes is put behind what it got."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, BOTTLENECK * growth, 1, bias=False),
            nn.BatchNorm2d(BOTTLENECK * growth),
            nn.ReLU(inplace=True),
            nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, R, W) in, (B, C + growth, R, W) out."""
        return torch.cat([features, super().forward(features)], dim=1)


class DenseUNet(nn.Module):
    """Dense encoder, plain decoder, skips from every dense block.

    Args:
        layers: dense layers of each block, one block a level; published five blocks of six.
        growth: channels that each dense layer adds.
    """

    def __init__(self, layers: Sequence[int] = (6, 6, 6, 6, 6), growth: int = 16) -> None:
        super().__init__()
        channels = 2 * growth
        self.first = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.blocks, self.transitions, skips = nn.ModuleList(), nn.ModuleList(), []
        for n in layers:
            self.blocks.append(nn.Sequential(*[DenseLayer(channels + i * growth, growth) for i in range(n)]))
            skips.append(channels + n * growth)
            channels = skips[-1] // 2
            self.transitions.append(
                nn.Sequential(nn.BatchNorm2d(skips[-1]), nn.Conv2d(skips[-1], channels, 1, bias=False), nn.AvgPool2d(2))
            )
        self.decoder = nn.ModuleList()
        for level, skip in reversed(list(enumerate(skips))):
            out = 2 * growth * 2 ** max(0, level - 1)
            self.decoder.append(UpCat(2, channels, skip, out, act="relu", norm="batch", bias=False))
            channels = out
        self.head = nn.Conv2d(channels, 1, 1)
        nn.init.constant_(self.head.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        self.divisible = 2 ** len(layers)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """Logit of hemorrhage: (B, 1, R, C) in and out, float32; R and C multiples of 2 ** blocks."""
        features, skips = self.first(slices), []
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            skips.append(block(features))
            features = transition(skips[-1])
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            features = up(features, skip)
        return self.head(features).float()
