from dataclasses import astuple

import numpy as np
import pytest
from shapes import ellipsoid, empty, make_grid, reorient
from sklearn.metrics import average_precision_score
from test_abc2 import ORDERS

from ich_pipeline.errors import GeometryError
from ich_pipeline.overlap import LESION_BIN_NAMES, LESION_BINS_ML, CaseAgreement, compare_masks, summarise
from ich_pipeline.precision_recall import average_precision, precision_recall, score_histogram
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


def test_hausdorff_is_the_largest_distance() -> None:
    label, pred = empty(GRID), empty(GRID)
    label.values[10:14, 10, 10] = True
    pred.values[12:18, 10, 10] = True
    pred.values[12, 10, 15] = True
    found = compare_masks("case", pred, label)
    # The lone voxel is five slices of 5 mm above the label.
    assert found.hausdorff_mm == pytest.approx(25)
    assert found.hd95_mm < 25
    for one, other in ((BLEED, CLEAN), (CLEAN, BLEED), (CLEAN, CLEAN)):
        assert compare_masks("case", one, other).hausdorff_mm is None


def test_rvd_has_no_sign() -> None:
    half = NativeMask(BLEED.values.copy(), GRID)
    half.values[:30] = False
    assert compare_masks("case", half, BLEED).rvd == -compare_masks("case", half, BLEED).relative_error > 0
    assert compare_masks("case", BLEED, half).rvd == compare_masks("case", BLEED, half).relative_error > 0
    assert compare_masks("case", CLEAN, BLEED).rvd == 1
    assert compare_masks("case", BLEED, CLEAN).rvd is None


class TestSlices:
    """Slice-wise scores, in a slice of 512 pixels so that heights are pixels as they are."""

    WIDE = make_grid((40, 512, 6), (2, 0.5, 5))

    def label(self, *heights: int) -> NativeMask:
        """A bar of each height along anterior-posterior, one a slice."""
        mask = empty(self.WIDE)
        for k, height in enumerate(heights):
            mask.values[10:13, 100 : 100 + height, k] = True
        return mask

    def test_groups_by_the_height_of_the_tallest_region(self) -> None:
        label = self.label(63, 64, 128, 129)
        label.values[30:32, 300:310, 3] = True  # a second, lower region
        slices = compare_masks("case", label, label).slices
        assert [each.height_px for each in slices] == [63, 64, 128, 129]
        assert [each.group for each in slices] == ["small", "medium", "medium", "large"]
        assert {(each.hit, each.dice, each.iou, each.hausdorff_px) for each in slices} == {(True, 1.0, 1.0, 0.0)}

    def test_two_short_regions_are_not_one_tall(self) -> None:
        label = self.label(40)
        label.values[10:13, 200:240, 0] = True
        assert compare_masks("case", label, label).slices[0].group == "small"

    def test_height_is_in_pixels_of_a_512_slice(self) -> None:
        coarse = make_grid((40, 256, 6), (2, 1, 5))
        mask = empty(coarse)
        mask.values[10, 100:140, 2] = True  # 40 of 256 rows are 80 of 512
        assert compare_masks("case", mask, mask).slices[0].group == "medium"

    def test_location_accuracy_counts_labelled_slices(self) -> None:
        label, pred = self.label(10, 10, 10, 10), self.label(10, 5)
        pred.values[10:13, 400:410, 2] = True  # beside the label: found nothing
        pred.values[10:13, 100:110, 5] = True  # a slice without blood is no slice of the label
        slices = compare_masks("case", pred, label).slices
        assert [each.hit for each in slices] == [True, True, False, False]
        assert [each.dice for each in slices] == [1, pytest.approx(2 / 3), 0, 0]
        assert [each.iou for each in slices] == [1, 0.5, 0, 0]
        # Five of ten rows are missing; in the third slice the bar of ten rows lies 300 away; the fourth has nothing.
        assert [each.hausdorff_px for each in slices] == [0, 5, 300, None]
        summary = summarise([compare_masks("case", pred, label)])
        location, small = summary["location_accuracy"], summary["slice_dice_small"]
        assert (location.mean.value, location.n, location.missed) == (0.5, 4, 2)
        assert (small.mean.value, small.n, small.missed) == (pytest.approx((1 + 2 / 3) / 4), 4, 2)
        assert summary["slice_iou"].mean.value == pytest.approx(1.5 / 4)
        distance = summary["slice_hausdorff_px"]
        assert (distance.mean.value, distance.n, distance.missed) == (pytest.approx(305 / 3), 3, 2)
        assert summary["slice_dice_large"].mean.value is None

    @pytest.mark.parametrize("order", ORDERS[::9])
    def test_order_of_storage_changes_nothing(self, order: tuple[int, ...]) -> None:
        label, pred = self.label(63, 64, 129), self.label(50, 50)
        turned = compare_masks("case", reorient(pred, order), reorient(label, order))
        straight = compare_masks("case", pred, label)
        # Turned about the axis across slices, the slices come in the other order.
        assert sorted(map(astuple, turned.slices)) == sorted(map(astuple, straight.slices))


class TestPrecisionRecall:
    def case(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        label = rng.random((8, 9, 10)) < 0.2
        probability = np.clip(rng.normal(90 + 60 * label, 50), 0, 255).astype(np.uint8)
        return probability, label

    @pytest.mark.parametrize("seed", range(3))
    def test_average_precision_is_scikit_learns(self, seed: int) -> None:
        probability, label = self.case(seed)
        expected = average_precision_score(label.ravel(), probability.ravel())
        assert average_precision(score_histogram(probability, label)) == pytest.approx(expected, rel=1e-12)
        grid = make_grid(label.shape)
        mask, pred = NativeMask(label.astype(np.uint8), grid), NativeMask((probability > 127).astype(np.uint8), grid)
        assert compare_masks("case", pred, mask, probability=probability).average_precision == pytest.approx(expected)
        assert compare_masks("case", pred, mask).average_precision is None
        assert compare_masks("case", pred, empty(grid), probability=probability).average_precision is None

    def test_worked_out_by_hand(self) -> None:
        probability = np.array([250, 200, 200, 100, 0], np.uint8)
        label = np.array([1, 1, 0, 1, 0])
        # Thresholds 250: 1/1 at recall 1/3; 200: 2/3 at 2/3; 100: 3/4 at 1; 0 adds no recall.
        assert average_precision(score_histogram(probability, label)) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
        curve = precision_recall([score_histogram(probability, label)], [0.1], ["p"])
        assert (curve.precision[0], curve.recall[0]) == (1, 0)
        assert (curve.precision[-1], curve.recall[-1]) == (pytest.approx(3 / 5), 1)
        assert (curve.average_precision.low, curve.n) == (None, 1)

    def test_a_millilitre_counts_the_same_in_every_scan(self) -> None:
        (p0, l0), (p1, l1) = self.case(0), self.case(1)
        curve = precision_recall([score_histogram(p0, l0), score_histogram(p1, l1)], [0.001, 0.003], ["a", "b"])
        weights = np.repeat([0.001, 0.003], p0.size)
        expected = average_precision_score(
            np.concatenate([l0, l1]).ravel(), np.concatenate([p0, p1]).ravel(), sample_weight=weights
        )
        assert curve.average_precision.value == pytest.approx(expected)
        assert curve.average_precision.low < expected < curve.average_precision.high

    def test_a_clean_scan_with_a_false_alarm_costs_precision(self) -> None:
        probability, label = self.case(2)
        clean = score_histogram(probability, np.zeros_like(label))
        alone = precision_recall([score_histogram(probability, label)], [1], ["a"]).average_precision.value
        both = precision_recall([score_histogram(probability, label), clean], [1, 1], ["a", "b"])
        assert both.average_precision.value < alone
        assert np.isnan(average_precision(clean))
        assert precision_recall([clean], [1], ["a"]).average_precision.value is None
