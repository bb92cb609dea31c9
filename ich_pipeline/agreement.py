"""How well two masks, or two columns of volumes, agree; and how sure a handful of patients lets us be.

Every score is stated for the empty cases as well (docs/measurement.md), so that no case drops out of a mean unseen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.abc2 import Box, lesion_box
from ich_pipeline.geometry import Grid, require_same_grid
from ich_pipeline.records import NativeMask
from ich_pipeline.volumetry import THRESHOLD_ML

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Lower edges, in mL, of the bins that lesion recall is reported in; a lesion of 5 mL counts in the bin from 5.
LESION_BINS_ML = (0.0, 1.0, 5.0, 30.0)
LESION_BIN_NAMES = ("under_1ml", "1_to_5ml", "5_to_30ml", "from_30ml")
# Beyond this a boundary is wrong: about half a thick slice, four pixels.
NSD_TOLERANCE_MM = 2.0
REPLICATES = 2000


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
class CaseAgreement:
    """A prediction against its label, one row of the per-case table.

    Attributes:
        error_ml: predicted less labelled volume; `relative_error` is its share of the label, None without blood.
        dice, iou, precision, recall: 1 when both masks are empty, 0 when one is.
        hd95_mm: None when either mask is empty; then `missed` or `false_alarm_ml` says what happened.
        nsd: share of boundary within the tolerance; 1 when both masks are empty, 0 when one is.
        missed: the label has blood and the prediction shares no voxel with it. None without blood.
        false_alarm_ml: predicted volume on a scan without blood. None with blood.
    """

    case_id: str
    patient_id: str
    label_ml: float
    pred_ml: float
    error_ml: float
    relative_error: float | None
    dice: float
    iou: float
    precision: float
    recall: float
    hd95_mm: float | None
    nsd: float
    missed: bool | None
    false_alarm_ml: float | None
    lesions: LesionCounts

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
) -> CaseAgreement:
    """Score a predicted mask against its label on the native grid.

    Args:
        patient_id: what the bootstrap resamples; the case itself where it is empty.

    Raises:
        GeometryError: the two masks are on different grids.
    """
    require_same_grid(case_id, "prediction", pred.grid, label.grid)
    grid = label.grid
    pred_box, label_box = _crop_both(pred.values, label.values)
    n_pred, n_label = int(np.count_nonzero(pred_box)), int(np.count_nonzero(label_box))
    n_both = int(np.count_nonzero(pred_box & label_box))
    to_ml = grid.voxel_volume_mm3 / 1000
    hd95_mm, nsd = _surface_scores(pred_box, label_box, grid, nsd_tolerance_mm)
    return CaseAgreement(
        case_id=case_id,
        patient_id=patient_id or case_id,
        label_ml=n_label * to_ml,
        pred_ml=n_pred * to_ml,
        error_ml=(n_pred - n_label) * to_ml,
        relative_error=(n_pred - n_label) / n_label if n_label else None,
        dice=_share(2 * n_both, n_pred + n_label),
        iou=_share(n_both, n_pred + n_label - n_both),
        # An empty side against blood on the other scores 0, not the undefined 0/0.
        precision=_share(n_both, n_pred if n_pred else n_label),
        recall=_share(n_both, n_label if n_label else n_pred),
        hd95_mm=hd95_mm,
        nsd=nsd,
        missed=n_both == 0 if n_label else None,
        false_alarm_ml=None if n_label else n_pred * to_ml,
        lesions=_count_lesions(pred_box, label_box, grid),
    )


def _crop_both(pred: NDArray[np.generic], label: NDArray[np.generic]) -> tuple[Bools, Bools]:
    """Both masks as bool in the smallest box that holds both; empty arrays when both are empty."""
    boxes = [box for box in (lesion_box(pred), lesion_box(label)) if box]
    sides = [slice(min(s.start for s in side), max(s.stop for s in side)) for side in zip(*boxes, strict=True)]
    union: Box = (sides[0], sides[1], sides[2]) if boxes else (slice(0), slice(0), slice(0))
    return pred[union] != 0, label[union] != 0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _surface_scores(pred: Bools, label: Bools, grid: Grid, tolerance_mm: float) -> tuple[float | None, float]:
    """HD95 (the larger of the two directed 95th percentiles) and NSD between boundary voxels.

    Distances are between voxel centres in patient space: a distance transform with one spacing per axis is wrong as
    soon as a gantry tilt shears the grid.
    """
    if not pred.any() or not label.any():
        return None, float(pred.any() == label.any())
    from scipy.spatial import cKDTree

    pred_mm, label_mm = _boundary_mm(pred, grid), _boundary_mm(label, grid)
    to_label_mm, _ = cKDTree(label_mm).query(pred_mm)
    to_pred_mm, _ = cKDTree(pred_mm).query(label_mm)
    hd95_mm = max(float(np.percentile(to_label_mm, 95)), float(np.percentile(to_pred_mm, 95)))
    within = np.count_nonzero(to_label_mm <= tolerance_mm) + np.count_nonzero(to_pred_mm <= tolerance_mm)
    return hd95_mm, within / (len(pred_mm) + len(label_mm))


def _boundary_mm(mask: Bools, grid: Grid) -> Floats:
    """(n, 3) centres of the voxels with a face on the outside, in mm from the box's first voxel."""
    from scipy.ndimage import binary_erosion

    return np.argwhere(mask & ~binary_erosion(mask)) @ grid.affine[:3, :3].T


def _count_lesions(pred: Bools, label: Bools, grid: Grid) -> LesionCounts:
    """Which 26-connected lesions the two masks share."""
    import cc3d

    label_ids, n_label = cc3d.connected_components(label, connectivity=26, return_N=True)
    pred_ids, n_pred = cc3d.connected_components(pred, connectivity=26, return_N=True)
    both = pred & label
    found = np.zeros(n_label + 1, bool)
    found[label_ids[both]] = True
    true = np.unique(pred_ids[both]).size
    volume_ml = np.bincount(label_ids.ravel(), minlength=n_label + 1)[1:] * (grid.voxel_volume_mm3 / 1000)
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


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over patients.

    `value` is None where it is undefined, the interval also where fewer than two patients remain to resample.
    """

    value: float | None
    low: float | None
    high: float | None


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
        positives.mean("error_ml", lambda row: row.error_ml),
        positives.mean("abs_error_ml", lambda row: abs(row.error_ml)),
        positives.mean("relative_error", lambda row: row.relative_error),
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
        self.resampler = _Resampler([row.patient_id for row in rows], replicates, seed)

    def mean(self, name: str, score: Callable[[CaseAgreement], float | None]) -> Aggregate:
        """Mean and median of a score over the rows that have it."""
        values = np.array([score(row) for row in self.rows], dtype=np.float64)  # None becomes NaN
        held = ~np.isnan(values)
        mean = self.resampler.estimate(_ratio(np.where(held, values, 0), held.astype(np.float64)))
        median = self.resampler.estimate(lambda w: _median(values[held], w[:, held]))
        missed = sum(bool(row.missed or row.false_alarm_ml) for row in self.rows)
        return Aggregate(name, self.name, int(held.sum()), missed, mean, median)

    def share(self, name: str, score: Callable[[CaseAgreement], tuple[int, int]]) -> Aggregate:
        """Sum of parts over sum of wholes; the patient is drawn, not the lesion."""
        parts, wholes = np.array([score(row) for row in self.rows], dtype=np.float64).reshape(-1, 2).T
        estimate = self.resampler.estimate(_ratio(parts, wholes))
        return Aggregate(name, self.name, int(wholes.sum()), int((wholes - parts).sum()), estimate)


@dataclass(frozen=True)
class VolumeAgreement:
    """Two ways to measure the same bleeds; `statistics` holds an Estimate for each name of STATISTICS.

    Attributes:
        n: pairs with both numbers; `missing`: pairs without, which count nowhere else.
        zero_reference: pairs whose reference is 0: they have no relative error, and count in all the rest.
        only_estimate_above, only_reference_above: pairs on two sides of `threshold_ml` (above means greater).
    """

    n: int
    n_patients: int
    missing: int
    zero_reference: int
    threshold_ml: float
    only_estimate_above: int
    only_reference_above: int
    statistics: Mapping[str, Estimate]


def volume_agreement(
    reference_ml: Sequence[float | None],
    estimate_ml: Sequence[float | None],
    patient_ids: Sequence[str],
    *,
    threshold_ml: float = THRESHOLD_ML,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> VolumeAgreement:
    """Agreement of two columns of volumes, with 95 % bootstrap intervals over patients.

    Bias and 95 % limits after Bland and Altman (Lancet 1986;1:307), ICC(2,1) after Shrout and Fleiss (Psychol Bull
    1979;86:420), concordance after Lin (Biometrics 1989;45:255).

    Args:
        patient_ids: one a pair; scans of one patient are drawn together.

    Raises:
        ValueError: the three columns differ in length.
    """
    if not len(reference_ml) == len(estimate_ml) == len(patient_ids):
        raise ValueError(
            f"{len(reference_ml)} reference volumes, {len(estimate_ml)} estimates and {len(patient_ids)} patients: "
            "expected one of each for every case."
        )
    pairs = np.array([reference_ml, estimate_ml], dtype=np.float64)  # None becomes NaN
    held = np.flatnonzero(np.isfinite(pairs).all(axis=0))
    x, y = pairs[:, held]
    patients = [patient_ids[i] for i in held.tolist()]
    resampler = _Resampler(patients, replicates, seed)
    estimates = {name: resampler.estimate(partial(statistic, x, y)) for name, statistic in STATISTICS.items()}
    return VolumeAgreement(
        n=len(x),
        n_patients=len(set(patients)),
        missing=len(patient_ids) - len(held),
        zero_reference=int((x == 0).sum()),
        threshold_ml=threshold_ml,
        only_estimate_above=int(((y > threshold_ml) & (x <= threshold_ml)).sum()),
        only_reference_above=int(((x > threshold_ml) & (y <= threshold_ml)).sum()),
        statistics=estimates,
    )


class _Resampler:
    """The bootstrap: how often each row is drawn when patients are drawn with replacement.

    A resample is a row of counts, so that a statistic that takes counts does all replicates in one call.
    """

    def __init__(self, patient_ids: Sequence[str], replicates: int, seed: int) -> None:
        patients, row_of = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
        self.n_rows = len(patient_ids)
        self.counts: Floats | None = None
        if len(patients) >= 2:
            rng = np.random.default_rng(seed)
            drawn = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=replicates)
            self.counts = drawn[:, row_of].astype(np.float64)

    def estimate(self, statistic: Callable[[Floats], Floats]) -> Estimate:
        """Value on the rows themselves and percentile interval; replicates where it is undefined are left out."""
        if self.n_rows == 0:
            return Estimate(None, None, None)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = _number(statistic(np.ones((1, self.n_rows)))[0])
            replicates = statistic(self.counts) if self.counts is not None else np.empty(0)
        replicates = replicates[np.isfinite(replicates)]
        if value is None or not replicates.size:
            return Estimate(value, None, None)
        low, high = np.quantile(replicates, [0.025, 0.975])
        return Estimate(value, float(low), float(high))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ratio(parts: Floats, wholes: Floats) -> Callable[[Floats], Floats]:
    return lambda counts: (counts @ parts) / (counts @ wholes)


# Statistics of paired values x, y (n,) for resamples given as counts w (replicates, n) -> (replicates,).


def _bias(x: Floats, y: Floats, w: Floats) -> Floats:
    return w @ (y - x) / w.sum(axis=1)


def _sd(x: Floats, y: Floats, w: Floats) -> Floats:
    """Of the differences, with n - 1."""
    difference = y - x
    return np.sqrt(_cross(difference, difference, w) / (w.sum(axis=1) - 1))


def _limit(side: int) -> Callable[[Floats, Floats, Floats], Floats]:
    return lambda x, y, w: _bias(x, y, w) + side * 1.96 * _sd(x, y, w)


def _mae(x: Floats, y: Floats, w: Floats) -> Floats:
    return w @ np.abs(y - x) / w.sum(axis=1)


def _rmse(x: Floats, y: Floats, w: Floats) -> Floats:
    return np.sqrt(w @ np.square(y - x) / w.sum(axis=1))


def _median_relative(x: Floats, y: Floats, w: Floats) -> Floats:
    held = x != 0
    return _median((y[held] - x[held]) / x[held], w[:, held])


def _median_abs_relative(x: Floats, y: Floats, w: Floats) -> Floats:
    held = x != 0
    return _median(np.abs(y[held] - x[held]) / x[held], w[:, held])


def _icc_2_1(x: Floats, y: Floats, w: Floats) -> Floats:
    """Two-way random effects, absolute agreement, single rater, from the mean squares of a table with two columns."""
    n = w.sum(axis=1)
    sxx, syy, sxy = _cross(x, x, w), _cross(y, y, w), _cross(x, y, w)
    rows = (sxx + syy + 2 * sxy) / 2 / (n - 1)
    error = (sxx + syy - 2 * sxy) / 2 / (n - 1)
    columns = n * np.square(_bias(x, y, w)) / 2
    return (rows - error) / (rows + error + 2 * (columns - error) / n)


def _ccc(x: Floats, y: Floats, w: Floats) -> Floats:
    """Lin's concordance with moments over n, as in the paper."""
    n = w.sum(axis=1)
    return 2 * _cross(x, y, w) / (_cross(x, x, w) + _cross(y, y, w) + n * np.square(_bias(x, y, w)))


def _pearson(x: Floats, y: Floats, w: Floats) -> Floats:
    return _cross(x, y, w) / np.sqrt(_cross(x, x, w) * _cross(y, y, w))


def _spearman(x: Floats, y: Floats, w: Floats) -> Floats:
    return _pearson(_ranks(x, w), _ranks(y, w), w)


STATISTICS: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "bias_ml": _bias,
    "sd_ml": _sd,
    "limit_low_ml": _limit(-1),
    "limit_high_ml": _limit(1),
    "mae_ml": _mae,
    "rmse_ml": _rmse,
    "median_relative_error": _median_relative,
    "median_abs_relative_error": _median_abs_relative,
    "icc_2_1": _icc_2_1,
    "ccc": _ccc,
    "pearson": _pearson,
    "spearman": _spearman,
}


def _cross(x: Floats, y: Floats, w: Floats) -> Floats:
    """Sum of products about the means. x and y are (n,) or one row a replicate."""
    n = w.sum(axis=1)
    x_mean, y_mean = (((w * v).sum(axis=1) / n)[:, None] for v in (x, y))
    return (w * (x - x_mean) * (y - y_mean)).sum(axis=1)


def _median(values: Floats, w: Floats) -> Floats:
    """Median of values repeated w times: the mean of the two middle ones."""
    order = np.argsort(values)
    if not order.size:
        return np.full(len(w), np.nan)
    upto = w[:, order].cumsum(axis=1)
    last = upto[:, -1] - 1
    low, high = ((upto > position[:, None]).argmax(axis=1) for position in (np.floor(last / 2), np.ceil(last / 2)))
    return np.where(last >= 0, (values[order][low] + values[order][high]) / 2, np.nan)


def _ranks(values: Floats, w: Floats) -> Floats:
    """(replicates, n) mid-ranks of values repeated w times."""
    order = np.argsort(values)
    _, first, level = np.unique(values[order], return_index=True, return_inverse=True)
    equal = np.add.reduceat(w[:, order], first, axis=1)
    ranks = np.empty_like(w)
    ranks[:, order] = (equal.cumsum(axis=1) - equal + (equal + 1) / 2)[:, level]
    return ranks
