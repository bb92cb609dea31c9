import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from shapes import ellipsoid, empty, make_grid

from ich_pipeline.agreement import (
    LESION_BIN_NAMES,
    LESION_BINS_ML,
    STATISTICS,
    CaseAgreement,
    compare_masks,
    summarise,
    volume_agreement,
)
from ich_pipeline.errors import GeometryError
from ich_pipeline.records import NativeMask

GRID = make_grid((60, 60, 20), (0.5, 0.5, 5))
BLEED = ellipsoid(GRID, (10, 8, 20))
CLEAN = empty(GRID)


def moved(mask: NativeMask, voxels: int) -> NativeMask:
    return NativeMask(np.roll(mask.values, voxels, axis=0), mask.grid)


def test_scores_worked_out_by_hand() -> None:
    label, pred = empty(GRID), empty(GRID)
    label.values[10:14, 10, 10] = True
    pred.values[12:18, 10, 10] = True
    found = compare_masks("case", pred, label, patient_id="p")
    assert (found.dice, found.iou, found.precision, found.recall) == pytest.approx((0.4, 0.25, 2 / 6, 2 / 4))
    assert (found.label_ml, found.pred_ml, found.error_ml) == pytest.approx((0.005, 0.0075, 0.0025))
    assert found.relative_error == pytest.approx(0.5)
    # From the prediction: 0, 0, 0.5, 1, 1.5, 2 mm; from the label: 1, 0.5, 0, 0.
    assert found.hd95_mm == pytest.approx(np.percentile([0, 0, 0.5, 1, 1.5, 2], 95))
    assert found.nsd == 1, "all within 2 mm"
    assert compare_masks("case", pred, label, nsd_tolerance_mm=1).nsd == pytest.approx(8 / 10)
    assert found.missed is False
    assert found.false_alarm_ml is None


def test_two_empty_masks_agree() -> None:
    found = compare_masks("clean", CLEAN, CLEAN)
    assert (found.dice, found.iou, found.precision, found.recall, found.nsd) == (1, 1, 1, 1, 1)
    assert (found.hd95_mm, found.relative_error, found.missed) == (None, None, None)
    assert (found.error_ml, found.false_alarm_ml, found.lesions.f1) == (0, 0, 1)
    assert not found.positive


def test_a_missed_bleed_scores_nothing_and_says_so() -> None:
    found = compare_masks("missed", CLEAN, BLEED)
    assert (found.dice, found.iou, found.precision, found.recall, found.nsd, found.lesions.f1) == (0, 0, 0, 0, 0, 0)
    assert (found.missed, found.hd95_mm, found.false_alarm_ml) == (True, None, None)
    assert found.relative_error == -1
    assert (found.lesions.labelled, found.lesions.found) == (1, 0)


def test_a_prediction_elsewhere_misses_too() -> None:
    elsewhere = empty(GRID)
    elsewhere.values[1, 1, 1] = True
    found = compare_masks("elsewhere", elsewhere, BLEED)
    assert found.missed is True
    assert found.hd95_mm > 10, "there is a boundary, and it is far off"
    assert (found.lesions.found, found.lesions.false) == (0, 1)


def test_a_false_alarm_scores_nothing_and_has_a_volume() -> None:
    found = compare_masks("alarm", BLEED, CLEAN)
    assert (found.dice, found.iou, found.precision, found.recall, found.nsd) == (0, 0, 0, 0, 0)
    assert found.false_alarm_ml == pytest.approx(found.pred_ml)
    assert found.pred_ml == pytest.approx(4 / 3 * np.pi * 10 * 8 * 20 / 1000, rel=0.03)
    assert (found.missed, found.hd95_mm, found.relative_error) == (None, None, None)
    assert found.lesions.false == 1


def test_masks_on_different_grids_are_refused() -> None:
    other = empty(make_grid(GRID.shape, (0.5, 0.5, 4)))
    with pytest.raises(GeometryError, match="case: prediction is on another grid"):
        compare_masks("case", other, BLEED)


@pytest.mark.parametrize("shift", [1, 3, 9])
def test_surface_scores_agree_with_monai_on_a_straight_grid(shift: int) -> None:
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    pred = moved(ellipsoid(GRID, (9, 9, 14)), shift)
    found = compare_masks("case", pred, BLEED)
    p, y = (torch.from_numpy(mask.values[None, None]) for mask in (pred, BLEED))
    hd95 = compute_hausdorff_distance(p, y, include_background=True, percentile=95, spacing=[0.5, 0.5, 5.0])
    nsd = compute_surface_dice(p, y, class_thresholds=[2.0], include_background=True, spacing=[0.5, 0.5, 5.0])
    assert found.hd95_mm == pytest.approx(float(hd95), rel=1e-5)
    assert found.nsd == pytest.approx(float(nsd), rel=1e-5)


def test_monai_forgets_a_missed_bleed_and_we_do_not() -> None:
    import torch
    from monai.metrics import HausdorffDistanceMetric

    metric = HausdorffDistanceMetric(include_background=True, percentile=95, reduction="mean")
    label = torch.from_numpy(BLEED.values[None, None])
    metric(y_pred=label, y=label)
    metric(y_pred=torch.zeros_like(label), y=label)
    assert float(metric.aggregate()) == 0, "a perfect score with one of two bleeds missed"
    rows = [compare_masks("found", BLEED, BLEED), compare_masks("missed", CLEAN, BLEED)]
    hd95 = summarise(rows)["hd95_mm"]
    assert (hd95.mean.value, hd95.n, hd95.missed) == (0, 1, 1)


@pytest.mark.parametrize("tilt_deg", [0, 25])
def test_surface_distance_follows_the_tilt(tilt_deg: float) -> None:
    grid = make_grid((40, 40, 20), (1, 1, 5), tilt_deg=tilt_deg)
    label, pred = empty(grid), empty(grid)
    label.values[20, 20, 5] = pred.values[20, 20, 7] = True
    # Two steps of the table; along the slice normal they are 10 mm.
    assert compare_masks("case", pred, label).hd95_mm == pytest.approx(10 / np.cos(np.radians(tilt_deg)))


def test_lesions_are_found_by_one_common_voxel() -> None:
    label, pred = empty(GRID), empty(GRID)
    label.values[2:4, 2:4, 2] = True  # 0.005 mL, found by a corner
    label.values[20:40, 20:30, 5:12] = True  # 1.75 mL, found twice
    label.values[50, 50, 15] = True  # missed
    pred.values[3:6, 3:6, 2] = True
    pred.values[20:22, 20:22, 6] = pred.values[30:32, 25:27, 8] = True
    pred.values[55, 5, 5] = True  # false
    lesions = compare_masks("case", pred, label).lesions
    assert (lesions.labelled, lesions.found, lesions.predicted, lesions.false) == (3, 2, 4, 1)
    assert lesions.labelled_by_bin == (2, 1, 0, 0)
    assert lesions.found_by_bin == (1, 1, 0, 0)
    assert lesions.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_a_lesion_on_a_bin_edge_counts_above_it() -> None:
    grid = make_grid((20, 20, 20), (1, 1, 1))
    label = empty(grid)
    label.values[:10, :10, :10] = True  # exactly 1 mL
    assert compare_masks("case", label, label).lesions.labelled_by_bin == (0, 1, 0, 0)
    assert len(LESION_BINS_ML) == len(LESION_BIN_NAMES)


def test_all_empty_lists_still_say_how_many() -> None:
    summary = summarise([], n_failed=2)
    assert (summary.n_cases, summary.n_failed) == (0, 2)
    assert (summary["dice"].n, summary["dice"].mean.value, summary["dice"].median.value) == (0, None, None)


@pytest.fixture(scope="module")
def cohort() -> list[CaseAgreement]:
    """20 bleeds of 8 patients, one missed, and 6 clean scans of 5 patients, two with a false alarm."""
    rows = [compare_masks(f"b{n}", moved(BLEED, n % 7), BLEED, patient_id=f"p{n % 8}") for n in range(19)]
    rows.append(compare_masks("b19", CLEAN, BLEED, patient_id="p3"))
    alarms = [BLEED if n < 2 else CLEAN for n in range(6)]
    rows += [compare_masks(f"c{n}", alarm, CLEAN, patient_id=f"q{n % 5}") for n, alarm in enumerate(alarms)]
    return rows


def test_positives_and_negatives_apart(cohort: list[CaseAgreement]) -> None:
    summary = summarise(cohort)
    assert (summary.n_cases, summary.n_patients, summary.n_positive, summary.n_negative) == (26, 13, 20, 6)
    dice = summary["dice"]
    assert (dice.n, dice.missed) == (20, 1)
    assert dice.mean.value == pytest.approx(np.mean([row.dice for row in cohort[:20]])), "clean scans lift nothing"
    assert dice.median.value == pytest.approx(np.median([row.dice for row in cohort[:20]]))
    assert (summary["hd95_mm"].n, summary["hd95_mm"].missed) == (19, 1)
    assert summary["sensitivity"].mean.value == pytest.approx(19 / 20)
    assert summary["specificity"].mean.value == pytest.approx(4 / 6)
    assert (summary["specificity"].n, summary["specificity"].missed) == (6, 2)
    assert summary["false_alarm_ml"].mean.value == pytest.approx(2 * cohort[20].pred_ml / 6)
    recall = summary["lesion_recall_5_to_30ml"]
    assert (recall.n, recall.missed, recall.mean.value) == (20, 1, pytest.approx(0.95))
    assert summary["lesion_recall_under_1ml"].mean.value is None
    assert summary["false_lesions_per_clean_scan"].mean.value == pytest.approx(2 / 6)


def test_every_aggregate_has_an_interval_that_holds_its_value(cohort: list[CaseAgreement]) -> None:
    for each in summarise(cohort).aggregates:
        for estimate in (each.mean, each.median):
            if estimate is not None and estimate.value is not None:
                assert estimate.low <= estimate.value <= estimate.high, each.name
    assert summarise(cohort)["dice"].mean.low < summarise(cohort)["dice"].mean.high


def test_the_seed_decides_the_interval(cohort: list[CaseAgreement]) -> None:
    assert summarise(cohort, seed=1) == summarise(cohort, seed=1)
    assert summarise(cohort, seed=1) != summarise(cohort, seed=2)


def test_the_bootstrap_draws_patients_not_scans() -> None:
    """Ten scans of each of four patients hold four scans' worth of surprise."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(0, 5, 4)
    error = np.repeat(of_patient, 10)
    reference = rng.uniform(10, 40, 40)
    patients = [f"p{n // 10}" for n in range(40)]
    by_patient = volume_agreement(reference, reference + error, patients).statistics["bias_ml"]
    by_scan = volume_agreement(reference, reference + error, [str(n) for n in range(40)]).statistics["bias_ml"]
    assert by_patient.high - by_patient.low > 2 * (by_scan.high - by_scan.low)


def test_one_patient_has_no_interval() -> None:
    found = volume_agreement([1, 2, 3], [1, 2, 4], ["p", "p", "p"]).statistics["bias_ml"]
    assert (found.value, found.low, found.high) == (pytest.approx(1 / 3), None, None)


def reference_statistics(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float]:
    """The same statistics from their definitions and scipy, for one sample."""
    difference, n = y - x, len(x)
    table = np.column_stack([x, y])
    grand = table.mean()
    rows = 2 * ((table.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    columns = n * ((table.mean(axis=0) - grand) ** 2).sum()
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + grand
    error = (residual**2).sum() / (n - 1)
    held = x != 0
    return {
        "bias_ml": difference.mean(),
        "sd_ml": difference.std(ddof=1),
        "limit_low_ml": difference.mean() - 1.96 * difference.std(ddof=1),
        "limit_high_ml": difference.mean() + 1.96 * difference.std(ddof=1),
        "mae_ml": np.abs(difference).mean(),
        "rmse_ml": np.sqrt((difference**2).mean()),
        "median_relative_error": np.median(difference[held] / x[held]),
        "median_abs_relative_error": np.median(np.abs(difference[held] / x[held])),
        "icc_2_1": (rows - error) / (rows + error + 2 / n * (columns - error)),
        "ccc": 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
    }


@pytest.mark.parametrize("seed", range(4))
def test_statistics_and_their_resamples_follow_the_definitions(seed: int) -> None:
    """A resample given as counts must equal the statistic of the rows repeated that often, ties and all."""
    rng = np.random.default_rng(seed)
    x = rng.lognormal(2, 1, 31).round(seed % 3)
    y = (x * rng.normal(1.1, 0.2, 31)).round(seed % 3)
    counts = np.vstack([np.ones(31), rng.multinomial(31, np.full(31, 1 / 31), size=20)]).astype(float)
    for name, statistic in STATISTICS.items():
        expected = [
            reference_statistics(np.repeat(x, w.astype(int)), np.repeat(y, w.astype(int)))[name] for w in counts
        ]
        np.testing.assert_allclose(statistic(x, y, counts), expected, rtol=1e-9, atol=1e-12, err_msg=name)
    found = volume_agreement(x, y, [str(n) for n in range(31)]).statistics
    for name, value in reference_statistics(x, y).items():
        assert found[name].value == pytest.approx(value), name
        assert found[name].low <= found[name].value <= found[name].high


def test_interval_of_a_mean_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(5)
    error = rng.normal(1, 3, 300)
    reference = rng.uniform(5, 50, 300)
    bias = volume_agreement(reference, reference + error, [str(n) for n in range(300)]).statistics["bias_ml"]
    half = 1.96 * error.std(ddof=1) / np.sqrt(300)
    assert (bias.low, bias.high) == pytest.approx((error.mean() - half, error.mean() + half), abs=0.05)


def test_pairs_without_a_number_and_zero_references_are_counted() -> None:
    found = volume_agreement([10, 0, None, 40, 20], [12, 1, 3, None, float("nan")], list("abcde"))
    assert (found.n, found.n_patients, found.missing, found.zero_reference) == (2, 2, 3, 1)
    assert found.statistics["bias_ml"].value == pytest.approx(1.5)
    assert found.statistics["median_relative_error"].value == pytest.approx(0.2)


def test_threshold_crossings_in_both_directions() -> None:
    found = volume_agreement([29, 30, 31, 50, 30], [31, 30, 30, 20, 30.1], list("abcde"))
    assert (found.only_estimate_above, found.only_reference_above) == (2, 2)


@pytest.mark.parametrize(
    ("reference", "estimate"), [([], []), ([5.0], [6.0]), ([5.0, 5.0], [5.0, 5.0]), ([0.0, 0.0], [1.0, 2.0])]
)
def test_what_is_undefined_is_none_and_never_nan(reference: list[float], estimate: list[float]) -> None:
    found = volume_agreement(reference, estimate, [str(n) for n in range(len(reference))])
    numbers = [v for each in found.statistics.values() for v in (each.value, each.low, each.high) if v is not None]
    assert np.isfinite(numbers).all()
    assert found.statistics["pearson"].value is None


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 reference volumes, 1 estimates and 2 patients"):
        volume_agreement([1, 2], [1], ["a", "b"])
