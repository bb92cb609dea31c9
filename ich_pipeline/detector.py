"""Boxes of a scan by a trained detector.

For other stages: `detect(network, scan)` gives the boxes of every native axial slice, `detect_in_slices(network,
slices_hu)` those of any slices that lie as a radiologist looks at them (rows to the back, columns to the patient's
left, as the model grid SPL has them), in pixels of these slices. The network is a `SliceDetector`, which does its own
windowing: build it from `network_def` of the detector's inference.yaml and give it to `engines.load_network`, or take
`load_detector(folder)` for a trained run's `bundle/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from torch import Tensor

from ich_pipeline.box_linking import link_boxes
from ich_pipeline.bundles import find_bundle
from ich_pipeline.detection import ANY, ScoredBox, write_boxes
from ich_pipeline.engines import autocast, load_network
from ich_pipeline.errors import ConfigError
from ich_pipeline.finding import find_scans
from ich_pipeline.geometry import Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.networks.slice_detector import SliceDetector
from ich_pipeline.reading import read_scan
from ich_pipeline.records import Scan

CLASS_NAMES = (*(each.name for each in Subtype), ANY)  # by the number that networks use
AIR_HU = -1024.0


@dataclass(frozen=True)
class SliceView:
    """Axial slices of a native array turned and mirrored to what a radiologist sees; no pixel is interpolated.

    Attributes:
        slice_axis: of the native array.
        swapped: rows come from the second in-plane axis.
        flips: whether rows, columns run backwards.
        shape: (rows, columns) of a turned slice.
    """

    slice_axis: int
    swapped: bool
    flips: tuple[bool, bool]
    shape: tuple[int, int]

    @classmethod
    def of(cls, grid: Grid) -> "SliceView":
        """The view of a scan's slices."""
        axes = grid.plane_axes
        # Along the patient's axes of RAS+, which run to the right and to the front.
        flips = bool(grid.affine[1, axes[0]] > 0), bool(grid.affine[0, axes[1]] > 0)
        return cls(grid.slice_axis, axes[0] > axes[1], flips, (grid.shape[axes[0]], grid.shape[axes[1]]))

    def slices(self, image: NDArray[Any]) -> NDArray[Any]:
        """(I, J, K) native as (slices, rows, columns)."""
        turned = np.moveaxis(image, self.slice_axis, 0)
        turned = turned.swapaxes(1, 2) if self.swapped else turned
        return np.flip(turned, tuple(axis + 1 for axis, flip in enumerate(self.flips) if flip))

    def tensor(self, image: NDArray[Any]) -> Tensor:
        """A copy of `slices`."""
        return torch.from_numpy(np.array(self.slices(image), order="C"))

    def to_native(self, boxes: NDArray[Any]) -> NDArray[Any]:
        """(N, 4) row0, column0, row1, column1 as i0, j0, i1, j1."""
        mirrored = self._mirrored(boxes)
        return mirrored[:, [1, 0, 3, 2]] if self.swapped else mirrored

    def from_native(self, boxes: NDArray[Any]) -> NDArray[Any]:
        """(N, 4) i0, j0, i1, j1 as row0, column0, row1, column1."""
        return self._mirrored(boxes[:, [1, 0, 3, 2]] if self.swapped else boxes)

    def _mirrored(self, boxes: NDArray[Any]) -> NDArray[Any]:
        mirrored = boxes.astype(np.float64)
        for axis in (axis for axis, flip in enumerate(self.flips) if flip):
            mirrored[:, [axis, axis + 2]] = self.shape[axis] - boxes[:, [axis + 2, axis]]
        return mirrored


def fitted(slices_hu: Tensor, image_size: int) -> tuple[Tensor, float]:
    """(N, H, W) slices at (N, image_size, image_size), with air below and to the right, and the scale that did it."""
    rows, columns = slices_hu.shape[1:]
    scale = image_size / max(rows, columns)
    images = slices_hu[:, None].float()
    if scale != 1:
        size = [max(1, round(n * scale)) for n in (rows, columns)]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    padding = (0, image_size - images.shape[3], 0, image_size - images.shape[2])
    return F.pad(images, padding, value=AIR_HU)[:, 0], scale


@torch.inference_mode()
def detect_in_slices(
    network: SliceDetector, slices_hu: Tensor, *, batch_size: int = 16, amp: str | bool = "off"
) -> list[Tensor]:
    """Boxes in slices of any size.

    Args:
        network: in evaluation mode, on its device.
        slices_hu: (N, H, W) HU; rows to the back, columns to the patient's left.
        batch_size: slices at once.
        amp: see `engines.autocast`.

    Returns:
        For each slice (M, 6) on the CPU: row0, column0, row1, column1 in pixels of the slice, score, class (index in
        CLASS_NAMES), the surest first.
    """
    device = next(network.parameters()).device
    found: list[Tensor] = []
    for part in torch.as_tensor(slices_hu).split(batch_size):
        images, scale = fitted(part.to(device), network.image_size)
        with autocast(device, amp):
            boxes = network(images[:, None])
        limit = images.new_tensor([*part.shape[1:], *part.shape[1:]])
        for rows in boxes:
            rows = torch.cat([torch.minimum(rows[:, :4] / scale, limit), rows[:, 4:]], dim=1)
            found.append(rows[(rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])].cpu())
    return found


def detect(
    network: SliceDetector, scan: Scan, *, batch_size: int = 16, amp: str | bool = "off"
) -> list[list[ScoredBox]]:
    """Boxes in every axial slice of a scan, on its own grid.

    Args:
        network: in evaluation mode, on its device.
        scan: as it was read.

    Returns:
        A list for each native axial slice, the surest first; empty where nothing was found.
    """
    view = SliceView.of(scan.grid)
    slices = view.tensor(scan.image_hu)
    found = detect_in_slices(network, slices, batch_size=batch_size, amp=amp)
    return [_scored(scan.case_id, k, rows, view) for k, rows in enumerate(found)]


def _scored(case_id: str, k: int, rows: Tensor, view: SliceView) -> list[ScoredBox]:
    corners = view.to_native(rows[:, :4].numpy().astype(np.float64)).tolist()
    return [
        ScoredBox(case_id, k, CLASS_NAMES[int(kind)], i0, j0, i1, j1, score)
        for (i0, j0, i1, j1), (score, kind) in zip(corners, rows[:, 4:].tolist(), strict=True)
    ]


def load_detector(
    folder: Path | str, device: str | torch.device = "auto", changes: Mapping[str, Any] | None = None
) -> SliceDetector:
    """The network of a trained detector, in evaluation mode.

    Args:
        folder: a bundle, such as `runs/NAME/bundle` of a training with stage=detector.
        device: see `engines.pick_device`.
        changes: keys of its inference.yaml with other values, such as score_threshold.

    Raises:
        ConfigError: no bundle, or one that is not trained, whose weights are not those of its metadata, or whose
            network is no detector.
    """
    bundle = find_bundle(str(folder))
    parser = ConfigParser({**bundle.config("inference"), **(changes or {}), "bundle_root": str(bundle.path)})
    network = parser.get_parsed_content("network_def")
    if not isinstance(network, SliceDetector):
        raise ConfigError(f"{folder}: its network is a {type(network).__name__}, expected a detector of boxes.")
    load_network(network, bundle.path / "models" / "model.pt", device)
    return network


class Finder:
    """A detector made ready, with what its config says of batches and of boxes in neighbouring slices.

    Args:
        network: in evaluation mode, on its device.
        batch_size: slices at once.
        amp: see `engines.autocast`.
        link_overlap: see `box_linking.link_boxes`.
        min_slices: boxes of lesions that lie in fewer slices are dropped; 1 drops none.
    """

    def __init__(
        self,
        network: SliceDetector,
        batch_size: int = 16,
        amp: str | bool = "auto",
        link_overlap: float = 0.25,
        min_slices: int = 1,
    ) -> None:
        self.network, self.batch_size, self.amp = network, batch_size, amp
        self.link_overlap, self.min_slices = link_overlap, min_slices

    def __call__(self, scan: Scan) -> list[ScoredBox]:
        """Boxes of a scan on its own grid, by slice, the surest first."""
        by_slice = detect(self.network, scan, batch_size=self.batch_size, amp=self.amp)
        boxes = [box for held in by_slice for box in held]
        if self.min_slices == 1:
            return boxes
        lesions = link_boxes(boxes, min_overlap=self.link_overlap, min_slices=self.min_slices)
        kept = {box for lesion in lesions for box in lesion.boxes}
        return [box for box in boxes if box in kept]

    def write(self, scans: str | Sequence[str], folder: Path | str) -> Path:
        """Look at files, folders or manifests; returns the table `boxes.csv` in `folder`."""
        given = [scans] if isinstance(scans, str) else scans
        found: list[ScoredBox] = []
        for case in find_scans([Path(each) for each in given]):
            found += self(read_scan(case.image, case.case_id, case.series))
        return write_boxes(Path(folder) / "boxes.csv", found)
