"""Temperature and operating point of a trained bundle, chosen on labelled scans that it did not learn from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects, maximum
from scipy.optimize import minimize_scalar

from ich_pipeline.bundles import Bundle, Config, resolve, write_configs
from ich_pipeline.errors import ConfigError
from ich_pipeline.geometry import Grid
from ich_pipeline.pictures import reliability_plot, write_png
from ich_pipeline.report import write_text
from ich_pipeline.transforms import calibrated, lesions_of

Floats = NDArray[np.float64]

KEYS = ("temperature", "threshold", "min_lesion_peak", "min_lesion_ml")
PLOT_FILE = "reliability.png"
THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))  # of the probability as the network gives it
# 0: a lesion needs no peak above the threshold. Overconfident networks differ close to 1.
PEAKS = (0.0, *THRESHOLDS, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
SMALLEST_ML = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5)
FALSE_ALARM_SHARE = 1 / 20  # of the clean scans
LOGITS = np.linspace(-12, 12, 481)  # edges of the histogram that the temperature is fitted to
RELIABILITY_BINS = 20


@dataclass(frozen=True, eq=False)
class CaseScores:
    """One scan's probabilities, as far as the choice needs them.

    Attributes:
        label_ml: volume of the label.
        lesions_ml: volumes of the lesions at each of `THRESHOLDS`.
        peaks: their largest probability, in the same order.
        histogram: (2, n) mL of background and blood by logit (`LOGITS`), of the voxels between 0 and 1.
    """

    label_ml: float
    lesions_ml: tuple[Floats, ...]
    peaks: tuple[Floats, ...]
    histogram: Floats


@dataclass(frozen=True)
class OperatingPoint:
    """Threshold and least peak of a lesion (of the calibrated probability), smallest lesion, and what they gave.

    Attributes:
        volume_mae_ml: mean absolute error over all scans, clean ones included.
        false_alarms: clean scans in which anything was left, of `clean`.
        missed: bleeding scans in which nothing was left, of `bleeding`.
    """

    threshold: float
    min_lesion_peak: float
    min_lesion_ml: float
    volume_mae_ml: float
    false_alarms: int
    clean: int
    missed: int
    bleeding: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was found: two operating points, the temperature, and how sure the network was before and after.

    Attributes:
        volume: least volume error.
        few_false_alarms: least volume error with false alarms on at most `FALSE_ALARM_SHARE` of the clean scans; where
            no point has as few, the one with the fewest.
        reliability: by `before` and `after`: (bins, 3) mean probability, share of blood, mL.
        error: by the same: expected calibration error, over mL of the voxels that are not certain.
    """

    temperature: float
    volume: OperatingPoint
    few_false_alarms: OperatingPoint
    reliability: Mapping[str, Floats]
    error: Mapping[str, float]
    cases: int

    def as_metadata(self) -> Config:
        """As the bundle's metadata hold it."""
        points = {"volume": asdict(self.volume), "few_false_alarms": asdict(self.few_false_alarms)}
        errors = {name: round(value, 5) for name, value in self.error.items()}
        return {
            "operating_points": points,
            "calibration": {"temperature": self.temperature, "cases": self.cases, "expected_error": errors},
        }


def score_case(probability: NDArray[np.float32], label: NDArray[Any], grid: Grid) -> CaseScores:
    """Lesions at every threshold, and the histogram.

    Args:
        probability: (I, J, K) on the scan's grid, uncalibrated.
        label: on the same grid, above 0 is blood.
        grid: of the scan.
    """
    blood = label > 0
    found = find_objects((probability >= THRESHOLDS[0]).view(np.uint8))
    lesions: list[Floats] = []
    peaks: list[Floats] = []
    for threshold in THRESHOLDS:
        if not found:
            lesions.append(np.zeros(0))
            peaks.append(np.zeros(0))
            continue
        inner = probability[found[0]]
        numbers, volumes_ml = lesions_of(inner >= threshold, grid, found[0][grid.slice_axis].start)
        lesions.append(volumes_ml[1:])
        peaks.append(np.asarray(maximum(inner, numbers, range(1, len(volumes_ml))), dtype=np.float64))
    between = (probability > 0) & (probability < 1)
    p = probability[between].astype(np.float64)
    at = np.clip(np.digitize(np.log(p / (1 - p)), LOGITS) - 1, 0, len(LOGITS) - 2)
    ml = np.broadcast_to(_voxel_ml(grid), label.shape)[between]
    n = len(LOGITS) - 1
    parts = [np.bincount(at, ml * (blood[between] == is_blood), minlength=n) for is_blood in (0, 1)]
    histogram = np.stack(parts).astype(np.float64)
    return CaseScores(grid.foreground_ml(blood), tuple(lesions), tuple(peaks), histogram)


def _voxel_ml(grid: Grid) -> Floats:
    """Volume of a voxel by slice, in a shape that broadcasts over the grid."""
    shape = [1, 1, 1]
    shape[grid.slice_axis] = grid.shape[grid.slice_axis]
    return grid.slice_extents(0, grid.shape[grid.slice_axis]).reshape(shape) * grid.voxel_volume_mm3 / 1000


def fit_temperature(histogram: Floats) -> float:
    """The temperature with the least negative log-likelihood (Guo et al., ICML 2017, section 4.2)."""
    middles = (LOGITS[1:] + LOGITS[:-1]) / 2

    def loss(log_temperature: float) -> float:
        logits = middles / np.exp(log_temperature)
        return float(histogram[0] @ np.logaddexp(0, logits) + histogram[1] @ np.logaddexp(0, -logits))

    if not histogram.sum(axis=1).all():
        raise ConfigError(
            "no voxel between certain blood and certain background is both in the labels and beside them; expected "
            "bleeding scans that the network is not sure of. Give more cases."
        )
    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.1), np.log(10)), method="bounded").x))


def point_at(
    cases: Sequence[CaseScores], index: int, min_peak: float, min_ml: float, temperature: float
) -> OperatingPoint:
    """What a threshold, by its index, a least peak and a smallest lesion give."""
    kept = [(case.lesions_ml[index] >= min_ml) & (case.peaks[index] >= min_peak) for case in cases]
    pred_ml = np.array([case.lesions_ml[index][own].sum() for case, own in zip(cases, kept, strict=True)])
    label_ml = np.array([case.label_ml for case in cases])
    return OperatingPoint(
        threshold=round(float(calibrated(THRESHOLDS[index], temperature)), 4),
        min_lesion_peak=round(float(calibrated(min_peak, temperature)), 4),
        min_lesion_ml=min_ml,
        volume_mae_ml=round(float(np.abs(pred_ml - label_ml).mean()), 4),
        false_alarms=int(((label_ml == 0) & (pred_ml > 0)).sum()),
        clean=int((label_ml == 0).sum()),
        missed=int(((label_ml > 0) & (pred_ml == 0)).sum()),
        bleeding=int((label_ml > 0).sum()),
    )


def choose(cases: Sequence[CaseScores]) -> Calibration:
    """Fit the temperature and choose both operating points.

    Raises:
        ConfigError: no clean or no bleeding scan among the cases.
    """
    clean = sum(case.label_ml == 0 for case in cases)
    if not 0 < clean < len(cases):
        raise ConfigError(
            f"{clean} of {len(cases)} scans have an empty label; expected scans with and without hemorrhage, to choose "
            "between misses and false alarms. Add the others to the manifest."
        )
    histogram = np.sum([case.histogram for case in cases], axis=0)
    temperature = fit_temperature(histogram)
    points = [
        point_at(cases, n, peak, ml, temperature)
        for n, threshold in enumerate(THRESHOLDS)
        for peak in PEAKS
        if peak == 0 or peak > threshold
        for ml in SMALLEST_ML
    ]
    fewest = max(min(point.false_alarms for point in points), int(FALSE_ALARM_SHARE * clean))
    few = [point for point in points if point.false_alarms <= fewest]
    reliability = {"before": _reliability(histogram, 1.0), "after": _reliability(histogram, temperature)}
    return Calibration(
        temperature=round(temperature, 4),
        volume=min(points, key=lambda point: (point.volume_mae_ml, point.false_alarms)),
        few_false_alarms=min(few, key=lambda point: (point.volume_mae_ml, point.false_alarms)),
        reliability=reliability,
        error={
            name: float(np.abs(bins[:, 0] - bins[:, 1]) @ bins[:, 2] / bins[:, 2].sum())
            for name, bins in reliability.items()
        },
        cases=len(cases),
    )


def _reliability(histogram: Floats, temperature: float) -> Floats:
    """(bins, 3) mean probability, share of blood and mL; bins without a voxel are left out."""
    p = 1 / (1 + np.exp(-(LOGITS[1:] + LOGITS[:-1]) / 2 / temperature))
    at = np.minimum((p * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    ml = histogram.sum(axis=0)
    total, blood, mean = (np.bincount(at, w, minlength=RELIABILITY_BINS) for w in (ml, histogram[1], ml * p))
    held = total > 0
    return np.stack([mean[held] / total[held], blood[held] / total[held], total[held]], axis=1)


def score_cases(
    bundle: Bundle, config: Config, cases: Sequence[Any], on_case: Callable[[str], object] | None = None
) -> list[CaseScores]:
    """Segment labelled cases with probabilities as the network gives them, and score each.

    Args:
        config: the bundle's resolved `inference.yaml`.
        cases: `CaseRecord`s with labels.
        on_case: called with the id of each case that is done.

    Raises:
        ReadError, GeometryError: a scan or label that cannot be used: a choice on the others would be another one.
    """
    from ich_pipeline.inference import Segmenter
    from ich_pipeline.reading import read_mask

    segmenter = Segmenter(bundle, config | {"temperature": 1.0})
    scores = []
    for case in cases:
        prediction = segmenter.segment(segmenter.read(case))
        label, _ = read_mask(case.label, case.case_id)
        scores.append(score_case(prediction.probability, label.values, label.grid))
        if on_case:
            on_case(case.case_id)
    return scores


def require_keys(bundle: Bundle, config: Config) -> None:
    """Refuse a bundle that has no place for what would be chosen.

    Raises:
        ConfigError: a key is missing in its `inference.yaml`.
    """
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise ConfigError(
            f"{bundle.name} has no key {', '.join(missing)} in inference.yaml, expected {', '.join(KEYS)}: it cannot "
            "be calibrated. Put them there as cascade3d does."
        )


def apply(bundle: Bundle, calibration: Calibration) -> None:
    """Write temperature and the point with few false alarms into a bundle's configs, both points into its metadata."""
    point = calibration.few_false_alarms
    chosen = {
        "temperature": calibration.temperature,
        "threshold": point.threshold,
        "min_lesion_peak": point.min_lesion_peak,
        "min_lesion_ml": point.min_lesion_ml,
    }
    configs = resolve(bundle, bundle.config_names, chosen, None)
    write_configs(bundle.path, configs | {"metadata": configs["metadata"] | calibration.as_metadata()})


def write_calibration(calibration: Calibration, out: Path) -> str:
    """Write `calibration.md` and `PLOT_FILE`; the text."""
    lines = [
        f"{calibration.cases} scans. Temperature {calibration.temperature:g}; expected calibration error of the voxels "
        f"that are not certain {calibration.error['before']:.4f} before, {calibration.error['after']:.4f} after.",
        "",
        "| point | threshold | least peak | smallest lesion (mL) | volume MAE (mL) | false alarms on clean scans | "
        "bleeds missed |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, point in (
        ("volume", calibration.volume),
        ("few false alarms (in use)", calibration.few_false_alarms),
    ):
        lines.append(
            f"| {name} | {point.threshold:g} | {point.min_lesion_peak:g} | {point.min_lesion_ml:g} | "
            f"{point.volume_mae_ml:.2f} | {point.false_alarms} of {point.clean} | {point.missed} of {point.bleeding} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(out / "calibration.md", text)
    write_png(out / PLOT_FILE, reliability_plot(calibration.reliability, calibration.error))
    return text
