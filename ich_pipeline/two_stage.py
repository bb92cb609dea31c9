"""The second stage of Rajapakse et al. (IEEE Access 2024, section II-D): crops of slices in, scores pasted back."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_dst_type
from torch import nn
from torch.nn import functional as F

from ich_pipeline.boxes import boxes_on_native_grid, rectangle, require_inside
from ich_pipeline.detection import Box
from ich_pipeline.geometry import require_same_grid
from ich_pipeline.inference import Loaded, Segmenter, Stage, no_stage
from ich_pipeline.networks.transdeeplab import foreground
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.transforms import scan_of

Rectangle = tuple[slice, slice]  # rows, columns
# Edge of a training box where there is no blood, as a share of the slice's.
CLEAN_BOX = (1 / 16, 1 / 2)


class Crop:
    """How a box of a slice becomes the network's input: with a margin around it, resized bicubically.

    Args:
        size: rows and columns that the network takes.
        margin_mm: what it sees around a box.
        spacing_mm: of the model grid: slices, rows, columns.
    """

    def __init__(self, size: Sequence[int], margin_mm: float, spacing_mm: Sequence[float]) -> None:
        self.size = tuple(size)
        self.margin = tuple(round(margin_mm / edge) for edge in spacing_mm[1:])

    def around(self, box: Rectangle, shape: Sequence[int]) -> Rectangle:
        """The box with its margin, inside a slice of `shape`."""
        rows, columns = (
            slice(max(0, side.start - margin), min(n, side.stop + margin))
            for side, margin, n in zip(box, self.margin, shape, strict=True)
        )
        return rows, columns

    def resize(self, plane: torch.Tensor, window: Rectangle) -> torch.Tensor:
        """A window of a (R, C) slice as (1, 1, *size), within the slice's range 0 to 1."""
        crop = plane[window][None, None].float()
        return F.interpolate(crop, size=self.size, mode="bicubic", antialias=True).clamp(0, 1)

    def back(self, score: torch.Tensor, window: Rectangle) -> torch.Tensor:
        """A (1, 1, *size) score at the window's own size, (rows, columns)."""
        shape = [side.stop - side.start for side in window]
        return F.interpolate(score, size=shape, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


class TwoStageInferer(Inferer):
    """Every slice with a box goes through the network as one crop; the others are empty without it.

    Args:
        size: see `Crop`, as the two others.
        margin_mm: likewise. It is seen, not segmented: no score leaves the box.
        spacing_mm: likewise.
        slices_at_once: crops in one forward pass.

    Attributes:
        regions: (B, 1, S, R, C) bool of the last call: the boxes.
    """

    def __init__(
        self, size: Sequence[int], margin_mm: float, spacing_mm: Sequence[float], slices_at_once: int = 8
    ) -> None:
        self.crop = Crop(size, margin_mm, spacing_mm)
        self.slices_at_once = slices_at_once
        self.regions: torch.Tensor | None = None

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        """Foreground probability.

        Args:
            inputs: (B, 2, S, R, C) on the model grid: the windowed scan, and 1 inside a box (`BoxChanneld`).
            network: takes (N, 1, *size) to (N, 2, *size) logits; in evaluation mode.

        Returns:
            (B, 1, S, R, C) float32 in [0, 1]; 0 outside the boxes.
        """
        # MetaTensor bookkeeping costs more than some of the steps below.
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        scan, boxes = image[:, 0], image[:, 1]
        self.regions = image[:, 1:] > 0
        found = [
            (n, k, box)
            for n, k in torch.nonzero(boxes.flatten(2).any(dim=2)).tolist()
            if (box := rectangle(boxes[n, k])) is not None
        ]
        score = torch.zeros_like(scan, dtype=torch.float32)
        for first in range(0, len(found), self.slices_at_once):
            chunk = found[first : first + self.slices_at_once]
            windows = [self.crop.around(box, scan.shape[2:]) for _, _, box in chunk]
            pairs = list(zip(chunk, windows, strict=True))
            crops = torch.cat([self.crop.resize(scan[n, k], window) for (n, k, _), window in pairs])
            for each, ((n, k, box), window) in zip(foreground(network, crops).split(1), pairs, strict=True):
                inner = tuple(
                    slice(side.start - around.start, side.stop - around.start)
                    for side, around in zip(box, window, strict=True)
                )
                score[(n, k, *box)] = self.crop.back(each, window)[inner]
        return convert_to_dst_type(score[:, None], inputs)[0]


class RandBoxCropd(Randomizable, MapTransform):
    """Training crops of slices of a case on the model grid, as `TwoStageInferer` cuts them.

    A slice without a box, which no reference mask has, is seen through a box of any size around any of its tissue: a
    detector is wrong at times, and the network has to leave such a box empty.

    Args:
        keys: the image with its boxes (2, S, R, C), and the label (1, S, R, C).
        size: see `Crop`, as the two others.
        margin_mm: likewise.
        spacing_mm: likewise.
        slices_per_case: crops of a case, each a sample.
        positive_share: share of crops from slices with blood, where a case has both.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int],
        margin_mm: float,
        spacing_mm: Sequence[float],
        slices_per_case: int,
        positive_share: float,
    ) -> None:
        super().__init__(keys)
        self.crop = Crop(size, margin_mm, spacing_mm)
        self.slices_per_case, self.positive_share = slices_per_case, positive_share

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """(1, *size) image and label for each sample."""
        image, label = (data[key] for key in self.keys)
        bleeding = np.asarray(label[0].flatten(1).any(dim=1))
        samples = []
        for _ in range(self.slices_per_case):
            with_blood = self.R.rand() < self.positive_share
            wanted = np.flatnonzero(bleeding == with_blood)
            k = int(self.R.choice(wanted if wanted.size else len(bleeding)))
            box = rectangle(image[1, k]) or self._anywhere(image[0, k])
            window = self.crop.around(box, image.shape[2:])
            cut = self.crop.resize(image[0, k], window)[0]
            mask = (self.crop.resize(label[0, k], window)[0] >= 0.5).float()
            samples.append(dict(zip(self.keys, (cut, mask), strict=True)))
        return samples

    def _anywhere(self, plane: torch.Tensor) -> Rectangle:
        tissue = torch.nonzero((plane > 0) & (plane < 1))
        centre = tissue[self.R.randint(len(tissue))].tolist() if len(tissue) else [n // 2 for n in plane.shape]
        sides = []
        for at, n in zip(centre, plane.shape, strict=True):
            half = max(1, round(self.R.uniform(*CLEAN_BOX) * n / 2))
            sides.append(slice(max(0, at - half), min(n, at + half)))
        return sides[0], sides[1]


def resegment(
    segmenter: Segmenter,
    case: CaseRecord,
    boxes: Sequence[Box],
    mask: NativeMask | None = None,
    stage: Stage = no_stage,
) -> NativeMask:
    """Segment a scan anew inside boxes that a person gave or moved; what lies outside stays as it is.

    Args:
        segmenter: of a bundle with a second stage, whatever its own `boxes` are.
        case: the scan.
        boxes: in its native axial slices; one 3D box is a box for each of its slices.
        mask: what is there already, on the scan's grid; None is empty.
        stage: see `Segmenter.read`.

    Raises:
        ManifestError: a box reaches out of the scan.
        GeometryError: the mask is on another grid.
    """
    data = segmenter.reading(case.item())
    scan = scan_of(data["image"], case)
    require_inside(boxes, scan.grid, "the call")
    if mask is not None:
        require_same_grid(case.case_id, "mask", mask.grid, scan.grid)
    with stage("preprocess"):
        loaded = Loaded(scan, segmenter.preprocessing({**data, "boxes": list(boxes)}))
    found = segmenter.segment(loaded, stage).mask
    before = np.zeros(scan.grid.shape, np.uint8) if mask is None else mask.values
    inside = boxes_on_native_grid(boxes, scan.grid)
    return NativeMask(np.where(inside, found.values, before).astype(before.dtype), scan.grid)
