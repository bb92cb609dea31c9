"""Two residual 3D U-Nets, coarse to fine, with weights of their own (Xu et al., arXiv 2401.04570, section 4)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from monai.losses import DeepSupervisionLoss
from torch import nn
from torch.nn import functional as F

from ich_pipeline.networks.planned_unet import PlannedUNet

Window = tuple[slice, slice, slice]  # voxels of the model grid, in (slices, rows, columns)


class ResidualUNet(PlannedUNet):
    """One stage: MONAI's DynUNet with residual blocks, as deep as `filters` is long.

    Section 4.1 fixes six in-plane and two through-plane halvings (16 x 320 x 320 to 4 x 5 x 5) and says nothing of
    where the two lie or how large the kernels are. Both follow nnU-Net's rule for 5 x 0.5 x 0.5 mm: an axis is
    neither pooled nor convolved until the others are about as coarse as it is, after two in-plane halvings.

    Args:
        filters: channels from the input level to the bottleneck; the paper's size is 32 to 320.
        spatial_dims: 3, or 2 for the paper's "2D-Model".
        in_channels: image channels.
        out_channels: classes, background included.
        norm_name: `batch` as published, or a name with its arguments as MONAI takes them.
    """

    def __init__(
        self,
        filters: Sequence[int],
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        norm_name: str | Sequence[Any] = "batch",
    ) -> None:
        levels = len(filters)
        across = [1, 1, 1, 2, 2] + [1] * levels  # stride across slices, level by level
        strides = [[1, 1, 1]] + [[across[level], 2, 2] for level in range(1, levels)]
        kernels = [[1 if level < 2 else 3, 3, 3] for level in range(levels)]
        if spatial_dims == 2:
            strides, kernels = [s[1:] for s in strides], [k[1:] for k in kernels]
        super().__init__(
            filters,
            kernels,
            strides,
            supervised=levels - 2,
            in_channels=in_channels,
            out_channels=out_channels,
            norm_name=norm_name,
            act_name="relu",
            res_block=True,
        )


class CascadeOutput(NamedTuple):
    """What one training step of the cascade gives: logits of every decoder level, the highest resolution first."""

    coarse: list[torch.Tensor]
    fine: list[torch.Tensor]
    windows: list[Window]  # where stage two looked, a window a batch item


class CascadeUNet(nn.Module):
    """Stage one on the whole patch at lower resolution, stage two on the region that stage one found.

    Args:
        filters: channels of both stages, see `ResidualUNet`.
        norm_name: normalisation of both stages.
        coarse_scale: in-plane reduction before stage one; 1 is the published full resolution.
        fine_size: (S, R, C) of stage two's window while training.
        resize: True resizes the enlarged region to `fine_size` as published; False cuts a window of that size at the
            model grid's own resolution, so that stage two always sees the same pixel size.
        margin: how far the region is enlarged, in (slices, rows, columns) of the model grid.
    """

    # Submodules that a compiler may take one by one: what lies between them depends on the data.
    stage_names = ("coarse_stage", "fine_stage")

    def __init__(
        self,
        filters: Sequence[int],
        norm_name: str | Sequence[Any] = "batch",
        coarse_scale: int = 1,
        fine_size: Sequence[int] = (16, 320, 320),
        resize: bool = True,
        margin: Sequence[int] = (1, 16, 16),
    ) -> None:
        super().__init__()
        self.coarse_stage = ResidualUNet(filters, norm_name=norm_name)
        self.fine_stage = ResidualUNet(filters, norm_name=norm_name)
        self.coarse_scale = coarse_scale
        self.fine_size = tuple(fine_size)
        self.resize = resize
        self.margin = tuple(margin)
        in_plane = 2 ** (len(filters) - 1)
        self.divisible = (4, in_plane, in_plane)

    def reduce(self, image: torch.Tensor) -> torch.Tensor:
        """Model grid to stage one's grid: block means in plane."""
        return F.avg_pool3d(image, (1, self.coarse_scale, self.coarse_scale)) if self.coarse_scale > 1 else image

    def enlarge(self, score: torch.Tensor) -> torch.Tensor:
        """Stage one's grid back to the model grid."""
        scale = (1.0, float(self.coarse_scale), float(self.coarse_scale))
        return F.interpolate(score, scale_factor=scale, mode="trilinear") if self.coarse_scale > 1 else score

    def fine_in(self, image: torch.Tensor, window: Window) -> torch.Tensor:
        """Stage two's logits inside one window of a (B, 1, S, R, C) image, at the window's own size."""
        crop = image[(..., *window)]
        if not self.resize:
            return self.fine_stage(crop)
        logits = self.fine_stage(F.interpolate(crop, size=self.fine_size, mode="trilinear"))
        return F.interpolate(logits, size=crop.shape[2:], mode="trilinear")

    def forward(self, image: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor | CascadeOutput:
        """Train both stages on a patch, or run both on it.

        Args:
            image: (B, 1, S, R, C) on the model grid.
            label: (B, 1, S, R, C), needed in training mode: stage two's window is drawn around a voxel that stage one
                or the label calls hemorrhage, so it learns from true regions and from stage one's false ones.

        Returns:
            In training mode a CascadeOutput; else (B, 2, S, R, C) logits, stage two's inside the coarse region and
            certain background (-10 against 10) outside.
        """
        if self.training:
            if label is None:
                raise ValueError("CascadeUNet needs `label` in training mode: stage two's window is drawn around it")
            return self._train_step(image, label)
        regions = self.enlarge(torch.softmax(self.coarse_stage(self.reduce(image)), dim=1)[:, 1:]) > 0.5
        logits = torch.empty((image.shape[0], 2, *image.shape[2:]), device=image.device)
        logits[:, 0], logits[:, 1] = 10.0, -10.0
        for item, region in enumerate(regions[:, 0]):
            # A patch is small: one window around everything that was found, the whole patch when nothing was.
            window = self._around(region, image.shape[2:])
            logits[(slice(item, item + 1), slice(None), *window)] = self.fine_in(image[item : item + 1], window).float()
        return logits

    def _train_step(self, image: torch.Tensor, label: torch.Tensor) -> CascadeOutput:
        coarse = self.coarse_stage(self.reduce(image))
        with torch.no_grad():
            found = torch.softmax(coarse[0].float(), dim=1)[:, 1:] > 0.5
            found = self.enlarge(found.float()) > 0.5
            regions = (found | (label > 0))[:, 0]
        windows, crops = [], []
        for item, region in enumerate(regions):
            window = self._around(region, image.shape[2:]) if self.resize else self._drawn(region)
            crop = image[(slice(item, item + 1), slice(None), *window)]
            crops.append(F.interpolate(crop, size=self.fine_size, mode="trilinear") if self.resize else crop)
            windows.append(window)
        return CascadeOutput(coarse, self.fine_stage(torch.cat(crops)), windows)

    def _around(self, region: torch.Tensor, shape: Sequence[int]) -> Window:
        """Enlarged bounding box of a region, rounded out to what the stage can halve; all of it when empty."""
        where = torch.nonzero(region)
        if not len(where):
            return tuple(slice(0, n) for n in shape)  # type: ignore[return-value]
        low, high = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
        return window_around(low, high, shape, self.margin, self.divisible)

    def _drawn(self, region: torch.Tensor) -> Window:
        """Window of `fine_size` around a random voxel of the region, somewhere in the patch when it is empty."""
        where = torch.nonzero(region)
        shape = region.shape
        if len(where):
            centre = where[int(torch.randint(len(where), (1,)))].tolist()
        else:
            centre = [int(torch.randint(n, (1,))) for n in shape]
        window = []
        for c, size, n in zip(centre, self.fine_size, shape, strict=True):
            # Off centre by up to a quarter: at inference a region is rarely in the middle of its window.
            c += int(torch.randint(-(size // 4), size // 4 + 1, (1,)))
            start = min(max(0, c - size // 2), max(0, n - size))
            window.append(slice(start, start + size))
        return tuple(window)  # type: ignore[return-value]


def window_around(
    low: Sequence[int], high: Sequence[int], shape: Sequence[int], margin: Sequence[int], divisible: Sequence[int]
) -> Window:
    """Box enlarged by `margin`, its size rounded up to multiples of `divisible`, kept inside `shape`.

    Where the image is smaller than the rounded size the window is the whole axis; the caller pads the image to
    multiples of `divisible` beforehand, so the whole axis fits too.
    """
    window = []
    for a, b, n, m, d in zip(low, high, shape, margin, divisible, strict=True):
        a, b = max(0, a - m), min(n, b + m)
        size = min(n, -(-(b - a) // d) * d)
        start = min(max(0, (a + b - size) // 2), n - size)
        window.append(slice(start, start + size))
    return tuple(window)  # type: ignore[return-value]


class CascadeLoss(nn.Module):
    """Section 4.2: the loss of every decoder level of both stages, all added.

    Args:
        loss: loss of one level against a (B, 1, S, R, C) label; Dice + cross-entropy as published.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.levels = DeepSupervisionLoss(loss, weight_mode="same")

    def forward(self, output: CascadeOutput, label: torch.Tensor) -> torch.Tensor:
        """Sum over stages and levels; `label` is that of the whole patch."""
        coarse_label = F.interpolate(label.float(), size=output.coarse[0].shape[2:], mode="trilinear").round()
        crops = [
            F.interpolate(
                label[(slice(item, item + 1), slice(None), *window)].float(),
                size=output.fine[0].shape[2:],
                mode="trilinear",
            ).round()
            for item, window in enumerate(output.windows)
        ]
        return self.levels(output.coarse, coarse_label) + self.levels(output.fine, torch.cat(crops))
