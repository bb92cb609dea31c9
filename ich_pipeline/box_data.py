"""Slices with boxes to train a detector on: cases of a manifest with a table of boxes, drawn, mixed and varied.

A case of the manifest without a row in the table has no hemorrhage. Masks are not looked at.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ich_pipeline.detection import Box, boxes_of_mask, read_boxes
from ich_pipeline.detector import AIR_HU, CLASS_NAMES, SliceView, fitted
from ich_pipeline.errors import ManifestError
from ich_pipeline.manifest import read_manifest
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord
from ich_pipeline.training import Draw, n_processes, rank, split_records

BOXES_FILE = "boxes.csv"  # beside the manifest, where no other table is named
KEPT_SHARE, KEPT_SIDE_PX = 0.1, 2.0  # of a box that the picture's edge cuts: less is no target


@dataclass(frozen=True)
class BoxCase:
    """One scan and its boxes, none where it has no hemorrhage."""

    record: CaseRecord
    boxes: tuple[Box, ...] = ()


def boxes_table(manifest: Path | str, boxes: Path | str | None) -> Path:
    """The table of boxes that goes with a manifest.

    Raises:
        ManifestError: none was named and none lies beside the manifest.
    """
    path = Path(boxes) if boxes else Path(manifest).with_name(BOXES_FILE)
    if not path.is_file():
        raise ManifestError(
            f"{path}: no such table of boxes. Name one with boxes=, or make it of the labels: ich-pipeline data boxes."
        )
    return path


def with_boxes(records: Sequence[CaseRecord], table: Path | str) -> list[BoxCase]:
    """Cases with their boxes; boxes of other cases are left out."""
    held: dict[str, list[Box]] = defaultdict(list)
    for box in read_boxes(table):
        held[box.case_id].append(box)
    return [BoxCase(record, tuple(held.get(record.case_id, ()))) for record in records]


def load_box_cases(
    manifest: str | Path | None, boxes: str | Path | None = None, fold: int | None = None
) -> dict[str, list[BoxCase]]:
    """Training and validation cases with boxes, as `training.load_cases` deals them out; labels are not needed.

    Args:
        manifest: see `load_cases`.
        boxes: a table as `detection.read_boxes` takes it; by default boxes.csv beside the manifest.
        fold: see `load_cases`.

    Raises:
        ConfigError: no manifest was named.
        ManifestError: manifest or table cannot be used, or no training case has a box.
    """
    records = split_records(manifest, fold, require_label=False)
    table = boxes_table(str(manifest), boxes)
    train, val = (with_boxes(records[name], table) for name in ("train", "val"))
    if not any(case.boxes for case in train):
        raise ManifestError(
            f"{table}: no box of the {len(train)} training cases of {manifest}, expected some. Check that table and "
            "manifest have the same case ids."
        )
    return {"train": train, "val": val[rank() :: n_processes()]}


def boxes_of_labels(manifest: Path | str, *, subtypes: bool, regions: bool) -> list[Box]:
    """Boxes around the blood in the labels of a manifest's cases; see `detection.boxes_of_mask`.

    Raises:
        ManifestError: no case has a label.
        ValueError: `subtypes`, and a label with a value that is none; names the case.
    """
    held = [(record.case_id, record.label) for record in read_manifest(manifest) if record.label]
    if not held:
        raise ManifestError(f"{manifest}: no case has a label, expected some. Fill the column `label`.")
    boxes: list[Box] = []
    for case_id, label in held:
        boxes += boxes_of_mask(case_id, read_mask(label, case_id)[0], subtypes=subtypes, regions=regions)
    return boxes


@dataclass(frozen=True, eq=False)
class _Slices:
    """A scan as the network sees it: (K, S, S) int16 HU, and by slice (M, 5) class and box in pixels of it."""

    images_hu: Tensor
    targets: list[NDArray[np.float64]]

    @property
    def bleeding(self) -> list[int]:
        return [k for k, rows in enumerate(self.targets) if len(rows)]


def _read(case: BoxCase, image_size: int) -> _Slices:
    record = case.record
    scan = read_scan(record.image, record.case_id, record.series)
    view = SliceView.of(scan.grid)
    slices = view.tensor(scan.image_hu)
    images, scale = fitted(slices, image_size)
    targets: list[list[list[float]]] = [[] for _ in range(len(slices))]
    for box in case.boxes:
        if box.slice >= len(slices):
            raise ManifestError(
                f"{record.case_id}: box in slice {box.slice}, expected slices 0 to {len(slices) - 1}. Give a table of "
                "boxes of this scan."
            )
        corners = view.from_native(np.array([[box.i0, box.j0, box.i1, box.j1]])) * scale
        targets[box.slice].append([float(CLASS_NAMES.index(box.subtype)), *corners[0].tolist()])
    held = [np.array(rows, dtype=np.float64).reshape(-1, 5) for rows in targets]
    return _Slices(images.round().to(torch.int16), held)


def _read_all(cases: Sequence[BoxCase], image_size: int) -> list[_Slices]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda case: _read(case, image_size), cases))


@dataclass(frozen=True)
class Variation:
    """How a drawn slice is varied, as Rajapakse et al. (IEEE Access 2024, section II-B) name it.

    Attributes:
        mosaic: how often four slices are put together around a random point.
        scale: the picture is 1 - scale to 1 + scale as large.
        translate: and moved by up to this share of its side.
        flip_columns, flip_rows: how often it is mirrored left-right, up-down.
        gain, shift_hu: contrast changes by up to this factor more or less, brightness by so many HU: what changing
            saturation and value is to a colour picture. A slice has no hue.
    """

    mosaic: float = 1.0
    scale: float = 0.5
    translate: float = 0.1
    flip_columns: float = 0.5
    flip_rows: float = 0.0
    gain: float = 0.2
    shift_hu: float = 8.0


class BoxSlices(Dataset[dict[str, Tensor]]):
    """Training slices; a `Draw` (of `training.CaseSampler`) names a case and the seed of everything random.

    All slices stay in memory: 2 bytes a pixel, half a megabyte a slice at 512 x 512.

    Args:
        cases: with boxes.
        image_size: pixels along each side.
        positive_share: how often a slice with hemorrhage is drawn from a case that has one.
        variation: keys of `Variation`.
    """

    def __init__(
        self,
        cases: Sequence[BoxCase],
        image_size: int,
        positive_share: float = 0.8,
        variation: Mapping[str, float] | None = None,
    ) -> None:
        self.slices = _read_all(cases, image_size)
        self.image_size, self.positive_share = image_size, positive_share
        self.variation = Variation(**(variation or {}))

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def sizes_px(self) -> NDArray[np.float64]:
        """(N, 2) heights and widths of all boxes."""
        rows = np.concatenate([rows for case in self.slices for rows in case.targets])
        return rows[:, 3:] - rows[:, 1:3]

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        rng = np.random.default_rng(draw.seed)
        cases = [draw.case]
        if rng.random() < self.variation.mosaic:
            cases += rng.integers(len(self.slices), size=3).tolist()
        chosen = [self._slice(case, rng) for case in cases]
        image, rows = mosaic(chosen, rng) if len(chosen) > 1 else chosen[0]
        image, rows = rescaled(image, rows, self.image_size, self.variation, rng)
        return _varied(image, rows, self.variation, rng)

    def _slice(self, case: int, rng: np.random.Generator) -> tuple[Tensor, NDArray[np.float64]]:
        held = self.slices[case]
        positive = rng.random() < self.positive_share and held.bleeding
        k = int(rng.choice(held.bleeding) if positive else rng.integers(len(held.targets)))
        return held.images_hu[k].float(), held.targets[k]


def mosaic(
    slices: Sequence[tuple[Tensor, NDArray[np.float64]]], rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.float64]]:
    """Four S x S slices around a random point in the middle of a 2S x 2S picture, each cut where it leaves it.

    Returns:
        Picture and boxes, which may reach beyond it.
    """
    size = slices[0][0].shape[0]
    canvas = torch.full((2 * size, 2 * size), AIR_HU)
    centre = rng.integers(size // 2, size + size // 2 + 1, size=2)
    moved = []
    for n, (image, rows) in enumerate(slices):
        # Upper left, upper right, lower left, lower right: the corner towards the point touches it.
        start = centre - size * np.array([n < 2, n % 2 == 0])
        low, high = np.maximum(start, 0), np.minimum(start + size, 2 * size)
        part = image[low[0] - start[0] : high[0] - start[0], low[1] - start[1] : high[1] - start[1]]
        canvas[low[0] : high[0], low[1] : high[1]] = part
        moved.append(rows + np.array([0, *start, *start]))
    return canvas, np.concatenate(moved)


def rescaled(
    image: Tensor, rows: NDArray[np.float64], size: int, variation: Variation, rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.float64]]:
    """A random window of a picture, at S x S: scaled and moved, with air where it leaves the picture."""
    scale = rng.uniform(1 - variation.scale, 1 + variation.scale)
    side = max(1, round(size / scale))
    moved = rng.uniform(-variation.translate, variation.translate, size=2) * size
    start = np.rint((np.array(image.shape) - side) / 2 + moved).astype(int)
    stop = start + side
    padding = [max(0, -start[1]), max(0, stop[1] - image.shape[1]), max(0, -start[0]), max(0, stop[0] - image.shape[0])]
    part = image[max(0, start[0]) : max(0, stop[0]), max(0, start[1]) : max(0, stop[1])]
    window = F.pad(part, [int(p) for p in padding], value=AIR_HU)
    whole = F.interpolate(window[None, None], size=(size, size), mode="bilinear", antialias=True)[0, 0]
    moved_rows = rows.copy()
    moved_rows[:, 1:] = (rows[:, 1:] - np.array([*start, *start])) * (size / side)
    return whole, _cut(moved_rows, size)


def _cut(rows: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Boxes cut at the picture's edge, without those of which too little is left."""
    cut = rows.copy()
    cut[:, 1:] = rows[:, 1:].clip(0, size)
    before, after = ((r[:, 3:] - r[:, 1:3]) for r in (rows, cut))
    kept = (after.min(axis=1) >= KEPT_SIDE_PX) & (after.prod(axis=1) > KEPT_SHARE * before.prod(axis=1))
    return cut[kept]


def _varied(
    image: Tensor, rows: NDArray[np.float64], variation: Variation, rng: np.random.Generator
) -> dict[str, Tensor]:
    size, middle_hu = image.shape[0], 40.0  # brain stays brain whatever the contrast
    gain = rng.uniform(1 - variation.gain, 1 + variation.gain)
    image = (image - middle_hu) * gain + middle_hu + rng.uniform(-variation.shift_hu, variation.shift_hu)
    rows = rows.copy()
    for axis, chance in enumerate((variation.flip_rows, variation.flip_columns)):
        if rng.random() < chance:
            image = image.flip(axis)
            rows[:, [1 + axis, 3 + axis]] = size - rows[:, [3 + axis, 1 + axis]]
    return {"image": image[None], "boxes": torch.from_numpy(rows).float()}


class WholeSlices(Dataset[dict[str, Any]]):
    """Every slice of cases, unchanged, to validate on; each names its case and slice."""

    def __init__(self, cases: Sequence[BoxCase], image_size: int) -> None:
        slices = _read_all(cases, image_size)
        self.images = [
            (case.record.case_id, case.record.patient_id, k, held.images_hu[k], rows)
            for case, held in zip(cases, slices, strict=True)
            for k, rows in enumerate(held.targets)
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case_id, patient_id, k, image, rows = self.images[index]
        boxes = torch.from_numpy(rows).float()
        return {"image": image[None].float(), "boxes": boxes, "place": (case_id, patient_id, k)}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: `image` (B, 1, S, S), `targets` (T, 6) image, class and box, and `places` of whole slices."""
    targets = [F.pad(item["boxes"], (1, 0), value=float(n)) for n, item in enumerate(items)]
    batch: dict[str, Any] = {"image": torch.stack([item["image"] for item in items]), "targets": torch.cat(targets)}
    return batch | {"places": [item["place"] for item in items if "place" in item]}
