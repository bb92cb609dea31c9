"""nnU-Net's U-Net, whose kernels, strides and channels come from a plan (Isensee et al., Nat Methods 2021;18:203)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import DynUNet
from torch import nn

# What an untrained network holds for the probability of hemorrhage (Lin et al., arXiv 1708.02002, section 4.1): from
# one half, the first hundreds of steps only teach it that hemorrhage is rare.
PRIOR = 0.01


class PlannedUNet(DynUNet):
    """MONAI's DynUNet as a plan describes it (`ich-pipeline plan`), with deep supervision while it is trained.

    Args:
        filters: channels from the input level to the bottleneck, one number a level.
        kernels: size of the convolutions of each level.
        strides: step of each level's first convolution; that of the first level is 1 everywhere.
        supervised: decoder levels below the highest that the loss sees; at most the number of levels less two.
        in_channels: image channels.
        out_channels: classes, background included.
        norm_name: normalisation, as MONAI names it.
        act_name: activation, as MONAI names it.
        res_block: residual blocks in place of nnU-Net's plain ones.
    """

    def __init__(
        self,
        filters: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        supervised: int,
        in_channels: int = 1,
        out_channels: int = 2,
        norm_name: str | Sequence[Any] = ("instance", {"affine": True}),
        act_name: str | Sequence[Any] = ("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
        res_block: bool = False,
    ) -> None:
        super().__init__(
            spatial_dims=len(strides[0]),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernels,
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=list(filters),
            norm_name=norm_name,
            act_name=act_name,
            res_block=res_block,
            deep_supervision=supervised > 0,
            deep_supr_num=supervised,
        )
        for head in (self.output_block, *(self.deep_supervision_heads if supervised else ())):
            bias = torch.zeros(out_channels)
            bias[0] = math.log((1 - PRIOR) * (out_channels - 1) / PRIOR)
            head.conv.conv.bias.data.copy_(bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits of a (B, C, ...) image whose sizes are multiples of the product of the strides.

        Returns:
            In evaluation mode (B, out, ...). In training mode the same first, then each supervised decoder level at
            its own resolution, all in float32, as a loss that sums over a patch needs under mixed precision. DynUNet
            itself would enlarge them all, which costs a third of a training step.
        """
        logits = self.output_block(self.skip_layers(image))
        return [level.float() for level in (logits, *self.heads)] if self.training else logits


class PlannedLoss(nn.Module):
    """nnU-Net's deep supervision: each level below counts half of the one above it, and all weights add up to 1.

    nnU-Net leaves the lowest decoder level out; here `PlannedUNet` does not make it (`supervised` of a plan).

    Args:
        loss: of one level against a (B, 1, ...) label; Dice and cross-entropy, each with weight 1.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, levels: Sequence[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Weighted mean over levels; the label is taken to each level by its nearest voxel."""
        weights = [0.5**n for n in range(len(levels))]
        total = torch.zeros((), device=label.device)
        for weight, logits in zip(weights, levels, strict=True):
            reduced = nn.functional.interpolate(label.float(), size=logits.shape[2:], mode="nearest-exact")
            total = total + weight / sum(weights) * self.loss(logits, reduced)
        return total
