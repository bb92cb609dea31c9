"""The U-Nets of Li et al. (JBHI 2021, section II-B): 10 or 6 blocks, and 6 with dilated convolutions.

A block is two 3x3 convolutions, each with batch normalisation and activation. UNet10 is "the original UNet" (section
III): five blocks on the way down with a 2x2 max-pooling between them, four on the way up, and the output convolution
counts as the tenth. UNet6 leaves the two deepest levels out: three, two and the output. The paper states no dilation
rates; here they grow with depth (1, 2, 4), so that no pixel of the receptive field is left out.
"""

import torch
from monai.networks.blocks import Convolution
from torch import nn

from ich_pipeline.errors import ConfigError

# Dilation by level; as many levels as there are rates.
ARCHITECTURES = {"unet10": (1, 1, 1, 1, 1), "unet6": (1, 1, 1), "unet6_dilated": (1, 2, 4)}


class BlockUNet(nn.Module):
    """One of the three U-Nets, on (B, in_channels, R, C) with rows and columns that can be halved at every level.

    Args:
        architecture: a key of ARCHITECTURES.
        in_channels: 1, or 2 with the mirror image.
        width: channels of the first level; each level below has twice as many.
        out_channels: of the logits.
        negative_slope: of LeakyReLU; 0 is ReLU. The adversarial variants take LeakyReLU (section II-C).
        dropout: share of the deepest level's channels that is dropped in training: the noise z of G(x, z), as Isola et
            al. (arXiv 1611.07004, section 2.2) put it in; the paper does not say how.

    Raises:
        ConfigError: no such architecture.
    """

    def __init__(
        self,
        architecture: str = "unet6",
        in_channels: int = 1,
        width: int = 64,
        out_channels: int = 2,
        negative_slope: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ConfigError(f"architecture={architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
        rates = ARCHITECTURES[architecture]
        filters = [width * 2**level for level in range(len(rates))]
        self.down = nn.ModuleList(
            _block(before, after, rate, negative_slope)
            for before, after, rate in zip([in_channels, *filters], filters, rates, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.noise = nn.Dropout2d(dropout)
        levels = range(len(rates) - 2, -1, -1)
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(filters[n + 1], filters[n], 2, stride=2) for n in levels)
        self.up = nn.ModuleList(_block(2 * filters[n], filters[n], rates[n], negative_slope) for n in levels)
        self.head = nn.Conv2d(width, out_channels, 1)
        self.to(memory_format=torch.channels_last)  # a training step on CPU takes three quarters of the time

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, R, C) to (B, out_channels, R, C) logits."""
        kept: list[torch.Tensor] = []
        for block in self.down:
            image = block(self.pool(image) if kept else image)
            kept.append(image)
        image = self.noise(kept.pop())
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            image = block(torch.cat([kept.pop(), enlarge(image)], dim=1))
        return self.head(image)


def _block(before: int, after: int, dilation: int, negative_slope: float) -> nn.Sequential:
    act = ("leakyrelu", {"negative_slope": negative_slope}) if negative_slope else "relu"
    layers = [
        Convolution(2, n, after, kernel_size=3, dilation=dilation, bias=False, norm="batch", act=act)
        for n in (before, after)
    ]
    return nn.Sequential(*layers)
