"""Two stages: dense 2D networks give a coarse mask, an nnU-Net's second channel (Qayyum et al., 2023)."""

from collections.abc import Callable, Sequence

import torch
from monai.inferers import SliceInferer
from torch import nn
from torch.nn import functional as F

from ich_pipeline.networks.dense_unet import DenseUNet
from ich_pipeline.networks.planned_unet import PlannedUNet


def to_coarse_grid(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A head as the coarse stage takes it: resized linearly, its minimum 0 and its maximum 1 (section 2.4).

    Args:
        image: (B, 1, S, R, C) on the model grid.
        size: (slices, rows, columns); published 16 x 256 x 256.

    Returns:
        (B, 1, *size) float32; 0 where an image has one value only.
    """
    resized = F.interpolate(image.float(), size=tuple(size), mode="trilinear")
    low, high = (f(resized, dim=(1, 2, 3, 4), keepdim=True) for f in (torch.amin, torch.amax))
    return (resized - low) / (high - low).clamp_min(1e-6)


def coarse_probability(
    image: torch.Tensor, stage: Callable[[torch.Tensor], torch.Tensor], size: Sequence[int]
) -> torch.Tensor:
    """Probability of hemorrhage, slice by slice on the coarse grid, and back.

    Args:
        image: (B, 1, S, R, C) on the model grid.
        stage: takes (N, 1, R, C) slices to probabilities.
        size: coarse grid.

    Returns:
        (B, 1, S, R, C) float32 on the model grid.
    """
    slices = SliceInferer(roi_size=tuple(size[1:]), sw_batch_size=size[0], spatial_dim=0)
    probability = slices(to_coarse_grid(image, size), stage)
    return F.interpolate(probability.float(), size=image.shape[2:], mode="trilinear")


class CoarseEnsemble(nn.Module):
    """The networks of all folds; their probabilities are averaged.

    Args:
        folds: how many.
        layers: see `DenseUNet`.
        growth: see `DenseUNet`.
    """

    def __init__(self, folds: int, layers: Sequence[int], growth: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(DenseUNet(layers, growth) for _ in range(folds))

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """Mean probability of (N, 1, R, C) slices."""
        return torch.stack([torch.sigmoid(network(slices)) for network in self.networks]).mean(dim=0)


class CoarseMaskUNet(nn.Module):
    """Both stages. What the second gets is a mask, not a probability.

    It is trained on masks of one network each and used with those of an ensemble, whose probabilities are softer; a
    threshold takes that difference away.

    Args:
        filters: of the fine stage, as `kernels`, `strides` and `supervised`; see `PlannedUNet`.
        kernels: likewise.
        strides: likewise.
        supervised: likewise.
        coarse_folds: networks in the coarse stage.
        coarse_layers: dense layers of each block.
        coarse_growth: channels that each dense layer adds.
        coarse_size: grid of the coarse stage.
        coarse_threshold: probability above which a voxel of the model grid belongs to the coarse mask.
    """

    # Submodules that a compiler may take one by one: what lies between them resizes.
    stage_names = ("coarse_stage", "fine_stage")

    def __init__(
        self,
        filters: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        supervised: int,
        coarse_folds: int = 5,
        coarse_layers: Sequence[int] = (6, 6, 6, 6, 6),
        coarse_growth: int = 16,
        coarse_size: Sequence[int] = (16, 256, 256),
        coarse_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.coarse_stage = CoarseEnsemble(coarse_folds, coarse_layers, coarse_growth)
        self.fine_stage = PlannedUNet(filters, kernels, strides, supervised, in_channels=2)
        self.coarse_size = tuple(coarse_size)
        self.coarse_threshold = coarse_threshold

    def coarse_mask(self, image: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """What the coarse stage finds in a (B, 1, S, R, C) head: 0 or 1, on the model grid; `size` is another grid."""
        return (coarse_probability(image, self.coarse_stage, size or self.coarse_size) > self.coarse_threshold).float()

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits of a (B, 1, S, R, C) patch, which the coarse stage takes at its own size: a head goes by the inferer.

        Slices, rows and columns as for `PlannedUNet`, and rows and columns as for `DenseUNet`.
        """
        return self.fine_stage(torch.cat([image, self.coarse_mask(image, image.shape[2:])], dim=1))
