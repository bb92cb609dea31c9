"""Boxes around hemorrhages, slice by slice, and how well a detector's boxes agree with the label's.

The files are those of `ich-pipeline phantom`: boxes.csv, a row a box. `box_evaluation` scores a detector by them.
"""

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.bootstrap import Estimate, Floats, Resampler, percentile_estimate
from ich_pipeline.errors import ManifestError
from ich_pipeline.files import write_csv_rows
from ich_pipeline.labels import Subtype
from ich_pipeline.records import NativeMask
from ich_pipeline.volumetry import subtype_values

ANY = "any"  # the class of a box without subtype, and of all boxes taken together
MAX_DETECTIONS = 100  # in one slice, as COCO does; what is dropped is counted
# IoU and recall closer than this to a threshold reach it: MONAI has them in float32, where 0.65 is below 0.65.
ROUNDING = 1e-6
# MONAI aggregates in Python loops: 200 take about 15 s for 30,000 boxes, so fewer than for masks.
REPLICATES = 200


@dataclass(frozen=True)
class Box:
    """Smallest rectangle of whole pixels around blood in one slice of one case; a detector's may cut pixels.

    Pixel (i, j) covers [i, i + 1) x [j, j + 1), so `i1` and `j1` are one past the last pixel: the same numbers slice
    an array, and (i1 - i0) * (j1 - j0) pixels lie inside. `slice` counts along the axial axis of the native array, i
    and j along the other two in their order. `subtype` is a name of `labels.Subtype`, or `any`.

    Raises:
        ValueError: no such slice or subtype, or corners that enclose nothing.
    """

    case_id: str
    slice: int
    subtype: str
    i0: float
    j0: float
    i1: float
    j1: float

    def __post_init__(self) -> None:
        names = [*Subtype.__members__, ANY]
        if not self.case_id or self.slice < 0 or self.subtype not in names:
            raise ValueError(
                f"case {self.case_id!r}, slice {self.slice}, subtype {self.subtype!r}; expected a case, a slice from 0 "
                f"and one of {', '.join(names)}"
            )
        corners = (self.i0, self.j0, self.i1, self.j1)
        if not (all(map(math.isfinite, corners)) and self.i0 < self.i1 and self.j0 < self.j1):
            raise ValueError(f"corners i0, j0, i1, j1 {corners}, expected numbers with i0 < i1 and j0 < j1")


BOX_COLUMNS = tuple(f.name for f in fields(Box))
SLICE_STOP = "slice_stop"  # optional column: one past the last slice of a 3D box


@dataclass(frozen=True)
class ScoredBox(Box):
    """A detector's box; a higher score is a surer one.

    Raises:
        ValueError: the score is no number, or as for Box.
    """

    score: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.score):
            raise ValueError(f"score {self.score}, expected a number")


def read_boxes(path: Path | str) -> list[ScoredBox]:
    """Boxes of a table with BOX_COLUMNS, and `score` where there is one; without it every score is 1.

    A row with a number in the column `slice_stop` is a 3D box: a box in every slice from `slice` to the one before it.

    Raises:
        ManifestError: the table is not there or cannot be read, or a row that is no box; names file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such table of boxes. Check the path.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        try:
            header = reader.fieldnames or []
            if not {*BOX_COLUMNS} <= {*header} or len({*header}) < len(header):
                raise ValueError(f"columns {', '.join(header)}, expected {', '.join(BOX_COLUMNS)}, each once")
            boxes = [box for cells in reader for box in _boxes(cells)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"{path.name}: not a CSV file in UTF-8 ({error}). Save it as CSV UTF-8.") from error
        except ValueError as error:
            row = max(reader.line_num, 1)
            raise ManifestError(f"{path.name} row {row}: {error}. Correct the table.") from error
    return boxes


def _boxes(cells: Mapping[Any, Any]) -> list[ScoredBox]:
    if None in cells or None in cells.values():
        raise ValueError("another number of cells than the header")
    numbers = (float(cells[name]) for name in ("i0", "j0", "i1", "j1"))
    i0, j0, i1, j1 = (int(n) if n.is_integer() else n for n in numbers)  # whole ones slice an array
    score = float(cells.get("score", 1.0))
    first = int(cells["slice"])
    stop = int(cells.get(SLICE_STOP) or first + 1)
    if stop <= first:
        raise ValueError(
            f"{SLICE_STOP} {stop} with slice {first}, expected the number after the last slice, or nothing"
        )
    names = cells["case_id"].strip(), cells["subtype"].strip()
    return [ScoredBox(names[0], k, names[1], i0, j0, i1, j1, score) for k in range(first, stop)]


def write_boxes(path: Path | str, boxes: Sequence[Box]) -> Path:
    """A table that `read_boxes` reads, with the column `score` where the boxes have one; returns its path."""
    scored = any(isinstance(box, ScoredBox) for box in boxes)
    write_csv_rows(path, map(vars, boxes), (*BOX_COLUMNS, "score") if scored else BOX_COLUMNS)
    return Path(path)


def boxes_of_mask(case_id: str, mask: NativeMask, *, subtypes: bool = False, regions: bool = True) -> list[Box]:
    """Boxes around the blood in every axial slice that holds some, by slice.

    Args:
        subtypes: the mask's values are those of `labels.Subtype`, boxed apart; else all above 0 is `any`.
        regions: a box for every region whose pixels share an edge or a corner; else one for the whole slice, as in the
            phantoms' boxes.csv.

    Raises:
        ValueError: a value that is no subtype.
    """
    from scipy import ndimage

    values = subtype_values(case_id, mask.values) if subtypes else mask.values != 0
    values = np.moveaxis(values, mask.grid.slice_axis, 0)
    boxes = []
    for k in np.flatnonzero(values.any(axis=(1, 2))).tolist():
        for value in np.unique(values[k][values[k] != 0]).tolist():
            held = values[k] == value
            numbered = ndimage.label(held, np.ones((3, 3)))[0] if regions else held.astype(np.uint8)
            name = Subtype(value).name if subtypes else ANY
            for i, j in ndimage.find_objects(numbered):
                boxes.append(Box(case_id, k, name, i.start, j.start, i.stop, j.stop))
    return boxes


@dataclass(frozen=True)
class ClassScores:
    """Average precision of one class.

    Attributes:
        n_label, n_pred: boxes; without label boxes there is no average precision.
        missed: label boxes that no prediction of any score takes at IoU 0.5.
        dropped: predictions beyond MAX_DETECTIONS in their slice, the lowest scores; in `n_pred`, not in the scores.
        ap50, ap: at IoU 0.5; mean over IoU 0.5, 0.55, ..., 0.95.
    """

    name: str
    n_label: int
    n_pred: int
    missed: int
    dropped: int
    ap50: Estimate
    ap: Estimate


@dataclass(frozen=True)
class DetectionScores:
    """A detector's boxes against the label's.

    Attributes:
        n_images: slices, those without boxes too.
        classes: every subtype that occurs on either side, in the order of `labels.Subtype`, then `any`; `any` alone
            when a box on either side has no subtype.
        map50, map: mean over the subtypes that have label boxes, mAP@0.5 and mAP@0.5:0.95; those of `any` when it is
            alone. The interval's replicates take the mean over the subtypes that have label boxes in them.
    """

    n_images: int
    n_cases: int
    n_patients: int
    classes: tuple[ClassScores, ...]
    map50: Estimate
    map: Estimate

    def __getitem__(self, name: str) -> ClassScores:
        return next(each for each in self.classes if each.name == name)

    @property
    def without_labels(self) -> tuple[str, ...]:
        """Classes that are in no mean, whatever was predicted, because the label has no box of them."""
        return tuple(each.name for each in self.classes if not each.n_label)


def average_precision(
    pred: Sequence[Box],
    label: Sequence[Box],
    n_slices: Mapping[str, int],
    patient_ids: Mapping[str, str] | None = None,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> DetectionScores:
    """Average precision as COCO defines it (Lin et al., arXiv 1405.0312): 101 recalls, IoU in pixels of the slice.

    Every slice is an image. Equal scores count as one step: neither the order of rows nor that of cases matters.

    Args:
        pred: boxes without a score have score 1.
        n_slices: slices of every case that was looked at, those without boxes too.
        patient_ids: of cases; what the bootstrap resamples. The case itself where it is absent.

    Raises:
        ManifestError: a box of a case or slice that `n_slices` does not have.
    """
    _require_slices(pred, label, n_slices)
    names = {box.subtype for box in (*pred, *label)}
    subtypes = [] if ANY in names else [each.name for each in Subtype if each.name in names]
    matches = [
        _match([p for p in pred if name in (p.subtype, ANY)], [t for t in label if name in (t.subtype, ANY)], n_slices)
        for name in (*subtypes, ANY)
    ]
    patients = [(patient_ids or {}).get(case_id) or case_id for case_id in n_slices]
    drawn = Resampler(patients, replicates, seed).counts
    times = np.vstack([np.ones((1, len(n_slices))), *([] if drawn is None else [drawn])]).astype(int)
    scores = np.array([[_coco(each, row) for each in matches] for row in times])  # replicate (first: all), class, AP
    held = scores[:, : len(subtypes) or 1]
    with np.errstate(invalid="ignore"):
        means = np.nansum(held, axis=1) / np.isfinite(held).sum(axis=1)
    classes = [
        ClassScores(
            name,
            n_label=int(each.n_label.sum()),
            n_pred=each.n_pred,
            missed=each.missed,
            dropped=each.n_pred - each.hits.shape[1],
            ap50=percentile_estimate(scores[0, c, 0], scores[1:, c, 0]),
            ap=percentile_estimate(scores[0, c, 1], scores[1:, c, 1]),
        )
        for c, (name, each) in enumerate(zip((*subtypes, ANY), matches, strict=True))
    ]
    map50, mean_ap = (percentile_estimate(means[0, m], means[1:, m]) for m in (0, 1))
    return DetectionScores(
        sum(n_slices.values()), len(n_slices), len(set(patients)), tuple(classes), map50=map50, map=mean_ap
    )


def _require_slices(pred: Sequence[Box], label: Sequence[Box], n_slices: Mapping[str, int]) -> None:
    for what, boxes in (("predicted", pred), ("labelled", label)):
        for box in boxes:
            n = n_slices.get(box.case_id)
            if n is None or box.slice >= n:
                expected = "a case that is scored" if n is None else f"slices 0 to {n - 1}"
                raise ManifestError(
                    f"{box.case_id}: {what} box in slice {box.slice}, expected {expected}. Give tables of these scans."
                )


@dataclass(frozen=True, eq=False)
class _Matches:
    """Predictions of one class against the label's boxes, all slices together, for T IoU thresholds.

    Attributes:
        score: (D,) falling.
        hits, case: (T, D) whether a prediction is true, and the index of its case, by falling score. Of equal scores
            the false come first: precision then rises up to the end of the tie, and COCO, which takes the best
            precision at this recall or a higher one, sees the tie's end alone.
        n_label: (cases,) label boxes.
    """

    score: Floats
    hits: Floats
    case: NDArray[np.int_]
    n_label: NDArray[np.int_]
    n_pred: int
    missed: int


def _match(pred: Sequence[Box], label: Sequence[Box], n_slices: Mapping[str, int]) -> _Matches:
    from monai.apps.detection.metrics.matching import matching_batch
    from monai.data.box_utils import box_iou

    pred_in, label_in = _by_slice(pred), _by_slice(label)
    keys = sorted({*pred_in, *label_in})
    sides = [[side.get(key, []) for key in keys] for side in (pred_in, label_in)]
    corners = [[_corners(boxes) for boxes in side] for side in sides]
    one_class = [[np.zeros(len(boxes), int) for boxes in side] for side in sides]
    scores = [np.array([getattr(box, "score", 1.0) for box in boxes], dtype=np.float64) for boxes in sides[0]]
    thresholds = _coco_metric().iou_thresholds - ROUNDING
    found = matching_batch(
        *(box_iou, thresholds, corners[0], one_class[0], scores, corners[1], one_class[1]),
        max_detections=MAX_DETECTIONS,
    )
    by_image = [image[0] for image in found]
    index = {case_id: n for n, case_id in enumerate(n_slices)}
    owner = [np.full(len(image["dtScores"]), index[key[0]]) for key, image in zip(keys, by_image, strict=True)]
    none = np.empty((len(thresholds), 0))
    score = np.concatenate([none[0], *(image["dtScores"] for image in by_image)])
    hits = np.concatenate([none, *(image["dtMatches"] for image in by_image)], axis=1)
    order = np.lexsort((hits, np.broadcast_to(-score, hits.shape)))
    return _Matches(
        score=score[order[0]],
        hits=np.take_along_axis(hits, order, axis=1),
        case=np.concatenate([none[0], *owner]).astype(int)[order],
        n_label=np.bincount([index[box.case_id] for box in label], minlength=len(index)),
        n_pred=len(pred),
        missed=sum(int((image["gtMatches"][0] == 0).sum()) for image in by_image),
    )


def _by_slice(boxes: Sequence[Box]) -> dict[tuple[str, int], list[Box]]:
    """Boxes by case and slice, sorted: MONAI matches equal scores in the order in which they come."""
    ordered = sorted(boxes, key=attrgetter(*BOX_COLUMNS))
    return {key: list(held) for key, held in groupby(ordered, key=lambda box: (box.case_id, box.slice))}


def _corners(boxes: Sequence[Box]) -> Floats:
    return np.array([(box.i0, box.j0, box.i1, box.j1) for box in boxes], dtype=np.float64).reshape(-1, 4)


def _coco(matches: _Matches, times: NDArray[np.int_]) -> tuple[float, float]:
    """AP@0.5 and AP@0.5:0.95 when case n is taken `times[n]` times; NaN without label boxes, where MONAI says -1."""
    n_label = int(matches.n_label @ times)
    if not n_label:
        return math.nan, math.nan
    hits = [np.repeat(row, times[case]) for row, case in zip(matches.hits, matches.case, strict=True)]
    image = {
        "dtMatches": np.stack(hits),
        "dtScores": np.repeat(matches.score, times[matches.case[0]]),
        "dtIgnore": np.zeros((len(hits), len(hits[0]))),
        "gtIgnore": np.zeros(n_label),
    }
    found, _ = _coco_metric()([{0: image}])
    values = {key.partition("_MaxDet")[0]: value for key, value in found.items()}
    return values["AP_IoU_0.50"], values["mAP_IoU_0.50_0.95_0.05"]


def _coco_metric() -> Any:
    """MONAI's metric for one class. With several it counts -1 for each class without label boxes into the mean."""
    from monai.apps.detection.metrics.coco import COCOMetric

    # matching_batch has cut each slice to MAX_DETECTIONS; here all slices come as one.
    metric = COCOMetric([ANY], (0.5,), (0.5, 0.95, 0.05), (sys.maxsize,), per_class=False, verbose=False)
    metric.recall_thresholds = metric.recall_thresholds - ROUNDING
    return metric
