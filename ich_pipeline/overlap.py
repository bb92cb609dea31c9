"""How well a mask agrees with its label: scores of a case, and their aggregates over cases.

Every score is stated for the empty cases as well (docs/measurement.md), so that no case drops out of a mean unseen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.abc2 import Box, lesion_box
from ich_pipeline.bootstrap import REPLICATES, Estimate, Resampler, ratio, weighted_median
from ich_pipeline.geometry import Grid, require_same_grid
from ich_pipeline.precision_recall import average_precision, score_histogram
from ich_pipeline.records import NativeMask

Bools = NDArray[np.bool_]

# Lower edges, in mL, of the bins that lesion recall is reported in; a lesion of 5 mL counts in the bin from 5.
LESION_BINS_ML = (0.0, 1.0, 5.0, 30.0)
LESION_BIN_NAMES = ("under_1ml", "1_to_5ml", "5_to_30ml", "from_30ml")
# Heights of a region in pixels of a 512-pixel slice: below the first small, above the second large (Chang et al., JBHI
# 2023, section IV-A, d, UH data set).
SLICE_HEIGHTS_PX = (64, 128)
SLICE_GROUP_NAMES = ("small", "medium", "large")
SLICE_SCORES = ("dice", "iou", "hausdorff_px")
# Beyond this a boundary is wrong: about half a thick slice, four pixels.
NSD_TOLERANCE_MM = 2.0


@dataclass(frozen=True)
class LesionCounts:
    """26-connected lesions of one case; a lesion is found when the other mask shares one voxel with it.

    `labelled_by_bin` and `found_by_bin` count the label's lesions by volume, in the order of LESION_BINS_ML.
    """

    labelled: int
    found: int
    predicted: int
    false: int
    labelled_by_bin: tuple[int, ...]
    found_by_bin: tuple[int, ...]

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN) with TP the found lesions of the label; 1 when neither mask has a lesion."""
        return _share(2 * self.found, self.found + self.labelled + self.false)


@dataclass(frozen=True)
class SliceScore:
    """One axial slice with blood in the label, as a slice-wise network is scored.

    Attributes:
        height_px: rows of the label's tallest 8-connected region, in pixels of a 512-pixel slice.
        hit: the prediction shares a pixel with the label (location accuracy: Li et al., JBHI 2021, section III-B, 2).
        hausdorff_px: between boundary pixels, likewise (Chang et al., JBHI 2023, equation 8); None without prediction.
    """

    height_px: float
    hit: bool
    dice: float
    iou: float
    hausdorff_px: float | None

    @property
    def group(self) -> str:
        """Name of the group its height is in (SLICE_HEIGHTS_PX)."""
        low, high = SLICE_HEIGHTS_PX
        return SLICE_GROUP_NAMES[int(self.height_px >= low) + int(self.height_px > high)]


@dataclass(frozen=True)
class CaseAgreement:
    """A prediction against its label, one row of the per-case table.

    Attributes:
        error_ml: predicted less labelled volume; `relative_error` is its share of the label, None without blood, and
            `rvd` that without its sign, the relative volume difference of INSTANCE 2022.
        dice, iou, precision, recall: 1 when both masks are empty, 0 when one is.
        hd95_mm, hausdorff_mm: None when either mask is empty; then `missed` or `false_alarm_ml` says what happened.
        nsd: share of boundary within the tolerance; 1 when both masks are empty, 0 when one is.
        missed: the label has blood and the prediction shares no voxel with it. None without blood.
        false_alarm_ml: predicted volume on a scan without blood. None with blood.
        average_precision: of the voxels' probabilities, None without blood or without probabilities.
    """

    case_id: str
    patient_id: str
    label_ml: float
    pred_ml: float
    error_ml: float
    relative_error: float | None
    rvd: float | None
    dice: float
    iou: float
    precision: float
    recall: float
    hd95_mm: float | None
    hausdorff_mm: float | None
    nsd: float
    missed: bool | None
    false_alarm_ml: float | None
    average_precision: float | None
    lesions: LesionCounts
    slices: tuple[SliceScore, ...]

    @property
    def positive(self) -> bool:
        """Whether the label holds blood."""
        return self.missed is not None


def compare_masks(
    case_id: str,
    pred: NativeMask,
    label: NativeMask,
    *,
    patient_id: str = "",
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    probability: NDArray[np.uint8] | None = None,
) -> CaseAgreement:
    """Score a predicted mask against its label on the native grid.

    Args:
        patient_id: what the bootstrap resamples; the case itself where it is empty.
        probability: (I, J, K) on the same grid, 0 to 255.

    Raises:
        GeometryError: the two masks are on different grids.
    """
    require_same_grid(case_id, "prediction", pred.grid, label.grid)
    grid = label.grid
    union = _union_box(pred.values, label.values)
    pred_box, label_box = pred.values[union] != 0, label.values[union] != 0
    start = np.array([side.start for side in union])
    first = int(start[grid.slice_axis])
    pred_ml, label_ml, both_ml = (
        grid.foreground_ml(each, first) for each in (pred_box, label_box, pred_box & label_box)
    )
    surface = _surface_scores(pred_box, label_box, grid, start, nsd_tolerance_mm)
    held = None if probability is None or not label_ml else score_histogram(probability, label.values)
    return CaseAgreement(
        case_id=case_id,
        patient_id=patient_id or case_id,
        label_ml=label_ml,
        pred_ml=pred_ml,
        error_ml=pred_ml - label_ml,
        relative_error=(pred_ml - label_ml) / label_ml if label_ml else None,
        rvd=abs(pred_ml - label_ml) / label_ml if label_ml else None,
        dice=_share(2 * both_ml, pred_ml + label_ml),
        iou=_share(both_ml, pred_ml + label_ml - both_ml),
        # An empty side against blood on the other scores 0, not the undefined 0/0.
        precision=_share(both_ml, pred_ml or label_ml),
        recall=_share(both_ml, label_ml or pred_ml),
        hd95_mm=surface.hd95_mm,
        hausdorff_mm=surface.hausdorff_mm,
        nsd=surface.nsd,
        missed=both_ml == 0 if label_ml else None,
        false_alarm_ml=None if label_ml else pred_ml,
        average_precision=None if held is None else average_precision(held),
        lesions=_count_lesions(pred_box, label_box, grid, first),
        slices=_score_slices(pred_box, label_box, grid),
    )


def _union_box(pred: NDArray[np.generic], label: NDArray[np.generic]) -> Box:
    """The smallest box that holds both; an empty one when both are empty."""
    boxes = [box for box in (lesion_box(pred), lesion_box(label)) if box]
    sides = [slice(min(s.start for s in side), max(s.stop for s in side)) for side in zip(*boxes, strict=True)]
    return (sides[0], sides[1], sides[2]) if boxes else (slice(0, 0), slice(0, 0), slice(0, 0))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


@dataclass(frozen=True)
class _Surface:
    hd95_mm: float | None
    hausdorff_mm: float | None
    nsd: float


def _surface_scores(pred: Bools, label: Bools, grid: Grid, start: NDArray[np.intp], tolerance_mm: float) -> _Surface:
    """HD95 (the larger of the two directed 95th percentiles), Hausdorff distance and NSD between boundary voxels.

    Distances are between voxel centres in patient space: a distance transform with one spacing per axis is wrong as
    soon as a gantry tilt shears the grid.
    """
    if not pred.any() or not label.any():
        return _Surface(None, None, float(pred.any() == label.any()))
    from scipy.spatial import cKDTree

    pred_mm, label_mm = (grid.to_mm(_boundary(each) + start) for each in (pred, label))
    to_label_mm, _ = cKDTree(label_mm).query(pred_mm)
    to_pred_mm, _ = cKDTree(pred_mm).query(label_mm)
    hd95_mm, hausdorff_mm = (max(float(np.percentile(d, q)) for d in (to_label_mm, to_pred_mm)) for q in (95, 100))
    within = np.count_nonzero(to_label_mm <= tolerance_mm) + np.count_nonzero(to_pred_mm <= tolerance_mm)
    return _Surface(hd95_mm, hausdorff_mm, within / (len(pred_mm) + len(label_mm)))


def _boundary(mask: Bools) -> NDArray[np.intp]:
    """(n, d) indices of the elements with a face on the outside."""
    from scipy.ndimage import binary_erosion

    return np.argwhere(mask & ~binary_erosion(mask))


def count_lesions(pred: NativeMask, label: NativeMask) -> LesionCounts:
    """Which 26-connected lesions two masks on the same native grid share."""
    union = _union_box(pred.values, label.values)
    first = union[label.grid.slice_axis].start
    return _count_lesions(pred.values[union] != 0, label.values[union] != 0, label.grid, first)


def _count_lesions(pred: Bools, label: Bools, grid: Grid, first_slice: int) -> LesionCounts:
    """Which 26-connected lesions the two masks share."""
    import cc3d

    label_ids, n_label = cc3d.connected_components(label, connectivity=26, return_N=True)
    pred_ids, n_pred = cc3d.connected_components(pred, connectivity=26, return_N=True)
    both = pred & label
    found = np.zeros(n_label + 1, bool)
    found[label_ids[both]] = True
    true = np.unique(pred_ids[both]).size
    extents = grid.slice_extents(first_slice, label.shape[grid.slice_axis])
    voxel_ml = np.expand_dims(extents, tuple({0, 1, 2} - {grid.slice_axis})) * grid.voxel_volume_mm3 / 1000
    weights = np.broadcast_to(voxel_ml, label.shape).ravel()
    volume_ml = np.bincount(label_ids.ravel(), weights, n_label + 1)[1:].round(9)
    bins = np.digitize(volume_ml, LESION_BINS_ML) - 1
    counts = [np.bincount(b, minlength=len(LESION_BINS_ML)).tolist() for b in (bins, bins[found[1:]])]
    return LesionCounts(
        labelled=n_label,
        found=int(found.sum()),
        predicted=n_pred,
        false=n_pred - true,
        labelled_by_bin=tuple(counts[0]),
        found_by_bin=tuple(counts[1]),
    )


def _score_slices(pred: Bools, label: Bools, grid: Grid) -> tuple[SliceScore, ...]:
    """Slices with blood in the label: where a slice-wise reader would look."""
    rows, columns = grid.plane_axes
    order = (grid.slice_axis, rows, columns)
    to_512 = 512 / grid.shape[rows]
    scores = []
    for found, true in zip(pred.transpose(order), label.transpose(order), strict=True):
        if not true.any():
            continue
        n_both, n_all = (int(np.count_nonzero(each)) for each in (found & true, found | true))
        scores.append(
            SliceScore(
                height_px=_tallest(true) * to_512,
                hit=n_both > 0,
                dice=2 * n_both / (n_both + n_all),
                iou=n_both / n_all,
                hausdorff_px=_plane_hausdorff(found, true) * to_512 if found.any() else None,
            )
        )
    return tuple(scores)


def _plane_hausdorff(one: Bools, other: Bools) -> float:
    """Largest distance from a boundary pixel of one plane to the nearest of the other, in pixels."""
    from scipy.spatial import cKDTree

    trees = [cKDTree(_boundary(plane)) for plane in (one, other)]
    return float(max(trees[a].query(trees[b].data)[0].max() for a, b in ((0, 1), (1, 0))))


def _tallest(plane: Bools) -> int:
    """Rows of the tallest 8-connected region."""
    # Not cc3d: its boxes of a 2D array that is not square are wrong (4.1.1, seen in the tests of this function).
    from scipy import ndimage

    regions, _ = ndimage.label(plane, np.ones((3, 3)))
    return max(box[0].stop - box[0].start for box in ndimage.find_objects(regions))


@dataclass(frozen=True)
class Aggregate:
    """One score over a group of cases, with 95 % bootstrap intervals over patients.

    Attributes:
        group: `positive` (scans with blood) or `negative` (scans without).
        n: what the number rests on: cases, or lesions for a share of lesions.
        missed: of a mean, positives of which no voxel was found or negatives with a false alarm; of a share, what
            was missed: n less the hits.
        mean: of the cases; for a share, the share.
        median: of the cases; None for a share.
    """

    name: str
    group: str
    n: int
    missed: int
    mean: Estimate
    median: Estimate | None = None


@dataclass(frozen=True)
class Summary:
    """Positives and negatives of an evaluation, never mixed.

    `n_failed` cases have no prediction to score; they are in no aggregate and the tables say so.
    """

    n_cases: int
    n_patients: int
    n_positive: int
    n_negative: int
    n_failed: int
    aggregates: tuple[Aggregate, ...]

    def __getitem__(self, name: str) -> Aggregate:
        return next(each for each in self.aggregates if each.name == name)


def summarise(
    rows: Sequence[CaseAgreement], *, n_failed: int = 0, replicates: int = REPLICATES, seed: int = 0
) -> Summary:
    """Aggregate per-case scores, positives and negatives apart.

    A missed bleed has no HD95 and is not in its mean; it is in `missed` on the same line, and as 0 in the mean Dice.

    Args:
        n_failed: cases that ended without a prediction.
    """
    positives = _Group("positive", [row for row in rows if row.positive], replicates, seed)
    negatives = _Group("negative", [row for row in rows if not row.positive], replicates, seed)
    aggregates = [
        positives.mean("dice", lambda row: row.dice),
        positives.mean("iou", lambda row: row.iou),
        positives.mean("precision", lambda row: row.precision),
        positives.mean("recall", lambda row: row.recall),
        positives.mean("nsd", lambda row: row.nsd),
        positives.mean("hd95_mm", lambda row: row.hd95_mm),
        positives.mean("hausdorff_mm", lambda row: row.hausdorff_mm),
        positives.mean("error_ml", lambda row: row.error_ml),
        positives.mean("abs_error_ml", lambda row: abs(row.error_ml)),
        positives.mean("relative_error", lambda row: row.relative_error),
        positives.mean("rvd", lambda row: row.rvd),
        positives.mean("average_precision", lambda row: row.average_precision),
        positives.share("location_accuracy", lambda row: (sum(each.hit for each in row.slices), len(row.slices))),
        *(positives.slice_mean(score, group) for score in SLICE_SCORES for group in ("", *SLICE_GROUP_NAMES)),
        positives.share("sensitivity", lambda row: (int(not row.missed), 1)),
        negatives.share("specificity", lambda row: (int(not row.false_alarm_ml), 1)),
        negatives.mean("false_alarm_ml", lambda row: row.false_alarm_ml),
        negatives.mean("false_lesions_per_clean_scan", lambda row: row.lesions.false),
        positives.share("lesion_recall", lambda row: (row.lesions.found, row.lesions.labelled)),
        *(
            positives.share(f"lesion_recall_{name}", partial(_found_in_bin, b))
            for b, name in enumerate(LESION_BIN_NAMES)
        ),
        positives.share(
            "lesion_precision", lambda row: (row.lesions.predicted - row.lesions.false, row.lesions.predicted)
        ),
        positives.mean("lesion_f1", lambda row: row.lesions.f1),
        positives.mean("false_lesions_per_scan", lambda row: row.lesions.false),
    ]
    n_patients = len({row.patient_id for row in rows})
    return Summary(len(rows), n_patients, len(positives.rows), len(negatives.rows), n_failed, tuple(aggregates))


def _found_in_bin(b: int, row: CaseAgreement) -> tuple[int, int]:
    return row.lesions.found_by_bin[b], row.lesions.labelled_by_bin[b]


class _Group:
    """Rows that are aggregated together, and how their patients are drawn."""

    def __init__(self, name: str, rows: Sequence[CaseAgreement], replicates: int, seed: int) -> None:
        self.name = name
        self.rows = rows
        self.resampler = Resampler([row.patient_id for row in rows], replicates, seed)

    def mean(self, name: str, score: Callable[[CaseAgreement], float | None]) -> Aggregate:
        """Mean and median of a score over the rows that have it."""
        values = np.array([score(row) for row in self.rows], dtype=np.float64)  # None becomes NaN
        held = ~np.isnan(values)
        mean = self.resampler.estimate(ratio(np.where(held, values, 0), held.astype(np.float64)))
        median = self.resampler.estimate(lambda w: weighted_median(values[held], w[:, held]))
        missed = sum(bool(row.missed or row.false_alarm_ml) for row in self.rows)
        return Aggregate(name, self.name, int(held.sum()), missed, mean, median)

    def share(self, name: str, score: Callable[[CaseAgreement], tuple[int, int]]) -> Aggregate:
        """Sum of parts over sum of wholes; the patient is drawn, not the lesion."""
        parts, wholes = np.array([score(row) for row in self.rows], dtype=np.float64).reshape(-1, 2).T
        estimate = self.resampler.estimate(ratio(parts, wholes))
        return Aggregate(name, self.name, int(wholes.sum()), int((wholes - parts).sum()), estimate)

    def slice_mean(self, score: str, group: str) -> Aggregate:
        """Mean of a score over the label's slices, all or of one group of heights; the patient is drawn.

        Missed are slices without a common pixel.
        """
        chosen = [[each for each in row.slices if group in ("", each.group)] for row in self.rows]
        held = [[value for each in slices if (value := getattr(each, score)) is not None] for slices in chosen]
        parts, wholes = np.array([(sum(values), len(values)) for values in held], dtype=np.float64).reshape(-1, 2).T
        missed = sum(not each.hit for slices in chosen for each in slices)
        name = f"slice_{score}_{group}" if group else f"slice_{score}"
        return Aggregate(name, self.name, int(wholes.sum()), missed, self.resampler.estimate(ratio(parts, wholes)))
