"""Scores of boxes: worked out by hand, and against average precision in exact fractions."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from shapes import ellipsoid, empty, make_grid

from ich_pipeline.bootstrap import Estimate, Resampler
from ich_pipeline.detection import (
    ANY,
    BOX_COLUMNS,
    MAX_DETECTIONS,
    Box,
    DetectionScores,
    ScoredBox,
    average_precision,
    boxes_of_mask,
    read_boxes,
)
from ich_pipeline.errors import ManifestError
from ich_pipeline.files import write_csv_rows
from ich_pipeline.labels import Subtype
from ich_pipeline.records import NativeMask

THRESHOLDS = [Fraction(50 + 5 * n, 100) for n in range(10)]


def box(case_id: str = "a", k: int = 0, at: int = 0, subtype: str = "IPH", size: tuple[int, int] = (20, 20)) -> Box:
    """A box whose corner is at (at, at)."""
    return Box(case_id, k, subtype, at, at, at + size[0], at + size[1])


def scored(found: Box, score: float) -> ScoredBox:
    return ScoredBox(**asdict(found), score=score)


def score(pred: Sequence[Box], label: Sequence[Box], n_slices: int = 5, cases: str = "a") -> DetectionScores:
    return average_precision(pred, label, dict.fromkeys(cases, n_slices), replicates=5)


# A second implementation: fractions, sets and loops.


def iou(a: Box, b: Box) -> Fraction:
    sides = [min(a.i1, b.i1) - max(a.i0, b.i0), min(a.j1, b.j1) - max(a.j0, b.j0)]
    both = int(max(sides[0], 0)) * int(max(sides[1], 0))
    areas = [int((x.i1 - x.i0) * (x.j1 - x.j0)) for x in (a, b)]
    return Fraction(both, sum(areas) - both)


def reference_hits(pred: Sequence[ScoredBox], label: Sequence[Box], threshold: Fraction) -> list[tuple[float, bool]]:
    """Score of every prediction, and whether it takes a label box that no surer one took: the one it overlaps most."""
    free, hits = list(label), []
    for each in sorted(pred, key=lambda p: (-p.score, p.i0, p.j0, p.i1, p.j1)):
        reached = [t for t in free if (t.case_id, t.slice) == (each.case_id, each.slice) and iou(each, t) >= threshold]
        if reached:
            free.remove(max(reached, key=lambda t: iou(each, t)))
        hits.append((each.score, bool(reached)))
    return hits


def reference_ap(pred: Sequence[ScoredBox], label: Sequence[Box], threshold: Fraction) -> float:
    """Mean over 101 recalls of the best precision at that recall or more, at any score that a cut can be made at."""
    hits = reference_hits(pred, label, threshold)
    kept = [[hit for value, hit in hits if value >= cut] for cut in {value for value, _ in hits}]
    curve = [(Fraction(sum(hit), len(label)), Fraction(sum(hit), len(hit))) for hit in kept]
    best = [max((p for r, p in curve if r >= Fraction(k, 100)), default=Fraction(0)) for k in range(101)]
    return float(sum(best) / 101)


def reference(pred: Sequence[ScoredBox], label: Sequence[Box]) -> tuple[float, float]:
    """AP@0.5 and AP@0.5:0.95 of one class."""
    aps = [reference_ap(pred, label, threshold) for threshold in THRESHOLDS]
    return aps[0], float(np.mean(aps))


def random_boxes(rng: np.random.Generator, cases: str = "abcd") -> tuple[list[ScoredBox], list[Box]]:
    """Small boxes, so that IoU falls on thresholds often; few scores, so that many are equal."""
    label: list[Box] = []
    pred: list[ScoredBox] = []
    for case_id in cases:
        for k in range(4):
            for _ in range(rng.integers(0, 3)):
                i, j, h, w = rng.integers([0, 0, 2, 2], [20, 20, 12, 12]).tolist()
                subtype = str(rng.choice(["IPH", "SDH", "SAH"]))
                label.append(Box(case_id, k, subtype, i, j, i + h, j + w))
            near = [b for b in label if (b.case_id, b.slice) == (case_id, k)] * 2
            for b in [*near, box(case_id, k, 3, "SDH", (5, 7))]:
                di, dj, dh, dw = rng.integers(-1, 2, 4).tolist()
                i, j = b.i0 + di, b.j0 + dj
                moved = Box(case_id, k, b.subtype, i, j, max(b.i1 + dh, i + 1), max(b.j1 + dw, j + 1))
                if rng.random() < 0.8:
                    pred.append(scored(moved, int(rng.integers(1, 6)) / 5))
    return pred, label


def of_class(boxes: Sequence[Box], name: str) -> list:
    return [each for each in boxes if name in (each.subtype, ANY)]


class TestByHand:
    def test_perfect(self) -> None:
        label = [box("a", 0), box("a", 3), box("b", 1, subtype="SDH")]
        found = average_precision(label, label, {"a": 30, "b": 24, "clean": 20}, {"a": "p", "b": "p"})
        assert (found.map50.value, found.map.value) == pytest.approx((1, 1))
        assert [each.name for each in found.classes] == ["IPH", "SDH", "any"]
        assert [(c.n_label, c.n_pred, c.missed) for c in found.classes] == [(2, 2, 0), (1, 1, 0), (3, 3, 0)]
        assert [c.ap.value for c in found.classes] == pytest.approx([1, 1, 1])
        assert (found.n_images, found.n_cases, found.n_patients) == (74, 3, 2)
        assert found.without_labels == ()

    def test_one_of_two_missed(self) -> None:
        found = score([box("a", 0)], [box("a", 0), box("a", 1)])
        assert found["IPH"].ap50.value == pytest.approx(51 / 101), "recalls 0, 0.01, ..., 0.50"
        assert found["IPH"].missed == 1

    @pytest.mark.parametrize(("false_score", "ap"), [(0.1, 1.0), (0.9, 0.5), (0.5, 0.5)])
    def test_a_false_box_costs_when_it_is_as_sure(self, false_score: float, ap: float) -> None:
        found = score([scored(box(at=0), 0.5), scored(box(at=100), false_score)], [box(at=0)])
        assert found.map50.value == pytest.approx(ap)
        assert found.map.value == pytest.approx(ap)
        assert found["IPH"].missed == 0

    def test_a_second_box_on_the_same_bleed_is_false(self) -> None:
        pred = [scored(box(at=0), 0.9), scored(box(at=0), 0.8), scored(box(at=100), 0.7)]
        found = score(pred, [box(at=0), box(at=100)])
        assert found.map50.value == pytest.approx((51 + 50 * 2 / 3) / 101)

    @pytest.mark.parametrize("height", range(9, 21))
    def test_an_iou_on_a_threshold_reaches_it(self, height: int) -> None:
        # 20 x height of 20 x 20: IoU height / 20, exactly 0.50, 0.55, ... from 10 on.
        found = score([box(size=(20, height))], [box(size=(20, 20))])
        assert found.map50.value == pytest.approx(float(height >= 10))
        assert found.map.value == pytest.approx(min(max(height - 9, 0), 10) / 10)

    @pytest.mark.parametrize("hits", range(11))
    def test_a_recall_on_a_threshold_reaches_it(self, hits: int) -> None:
        label = [box(k=k) for k in range(10)]
        found = score(label[:hits], label, n_slices=10)
        assert found.map50.value == pytest.approx((10 * hits + 1) / 101 if hits else 0)

    def test_a_false_box_on_a_slice_or_scan_without_blood_counts(self) -> None:
        for elsewhere in (box("a", 4), box("clean", 0)):
            found = score([box("a", 0), elsewhere], [box("a", 0)], cases=["a", "clean"])
            assert found.map50.value == pytest.approx(0.5)
            assert found.n_images == 10

    def test_no_predictions(self) -> None:
        found = score([], [box(), box(at=50, subtype="SDH")])
        assert (found.map50.value, found.map.value) == (0, 0)
        assert (found[ANY].missed, found[ANY].n_pred) == (2, 0)

    def test_no_label_boxes(self) -> None:
        found = score([box()], [])
        nothing = Estimate(None, None, None)
        assert (found.map50, found.map, found["IPH"].ap50, found[ANY].ap) == (nothing,) * 4
        assert found.without_labels == ("IPH", ANY)
        assert (found[ANY].n_pred, found[ANY].n_label) == (1, 0)

    def test_no_boxes_at_all(self) -> None:
        found = score([], [])
        assert [each.name for each in found.classes] == [ANY]
        assert found.map50.value is None
        assert found.n_images == 5

    def test_a_class_without_label_boxes_is_in_no_mean_and_named(self) -> None:
        found = score([box(), box(at=100, subtype="SAH")], [box()])
        assert found["SAH"].ap50.value is None
        assert found["SAH"].n_pred == 1
        assert found.without_labels == ("SAH",)
        assert found.map50.value == pytest.approx(1)
        assert found[ANY].ap50.value == pytest.approx(0.5), "where the false box does count"

    def test_the_wrong_subtype_is_a_miss_of_the_subtype_only(self) -> None:
        found = score([box(subtype="SDH")], [box(subtype="EDH")])
        assert (found["EDH"].ap50.value, found["EDH"].missed) == (0, 1)
        assert (found[ANY].ap50.value, found[ANY].missed) == (pytest.approx(1), 0)

    @pytest.mark.parametrize("swap", [False, True])
    def test_boxes_without_subtype_are_scored_as_any_alone(self, swap: bool) -> None:
        sides = [box(subtype=ANY)], [box(subtype="EDH"), box(k=1, subtype="SDH")]
        found = score(*(reversed(sides) if swap else sides))
        assert [each.name for each in found.classes] == [ANY]
        assert found.map50 == found[ANY].ap50
        assert found.map50.value == pytest.approx(0.5 if swap else 51 / 101)

    def test_beyond_a_hundred_in_a_slice_the_least_sure_are_dropped_and_counted(self) -> None:
        false = [scored(box(at=100 + n), 0.9) for n in range(MAX_DETECTIONS)]
        found = score([*false, scored(box(at=0), 0.1), scored(box("a", 1), 0.1)], [box(at=0), box("a", 1)])
        assert (found["IPH"].dropped, found["IPH"].n_pred, found["IPH"].missed) == (1, 102, 1)
        assert found.map50.value == pytest.approx(51 / 101 / 101), "precision 1 of 101 up to recall 0.5"


class TestAgainstASecondImplementation:
    @pytest.mark.parametrize("seed", range(12))
    def test_same_numbers(self, seed: int) -> None:
        pred, label = random_boxes(np.random.default_rng(seed))
        found = score(pred, label, cases="abcd")
        expected = {
            each.name: reference(of_class(pred, each.name), of_class(label, each.name)) for each in found.classes
        }
        for each in found.classes:
            assert (each.ap50.value, each.ap.value) == pytest.approx(expected[each.name], abs=1e-6)
            hits = reference_hits(of_class(pred, each.name), of_class(label, each.name), THRESHOLDS[0])
            assert each.missed == each.n_label - sum(hit for _, hit in hits)
        means = np.mean([expected[each.name] for each in found.classes[:-1]], axis=0)
        assert (found.map50.value, found.map.value) == pytest.approx(tuple(means), abs=1e-6)
        assert 0.05 < means[1] < 0.95, "neither all right nor all wrong"

    def test_the_interval_is_that_of_the_scores_of_redrawn_patients(self) -> None:
        pred, label = random_boxes(np.random.default_rng(7))
        patients = {"a": "p", "b": "p", "c": "q", "d": "r"}
        found = average_precision(pred, label, dict.fromkeys("abcd", 4), patients, replicates=15, seed=3)
        counts = Resampler(list(patients.values()), 15, 3).counts
        assert counts is not None
        replicates = []
        for row in counts.astype(int):
            copies = [(case_id, n) for case_id, times in zip("abcd", row, strict=True) for n in range(times)]
            drawn = [
                [replace(b, case_id=f"{case_id}{n}") for case_id, n in copies for b in side if b.case_id == case_id]
                for side in (pred, label)
            ]
            replicates.append(reference(drawn[0], drawn[1]))
        low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
        for measured, at in ((found[ANY].ap50, 0), (found[ANY].ap, 1)):
            assert (measured.low, measured.high) == pytest.approx((low[at], high[at]), abs=1e-6)

    def test_neither_rows_nor_cases_have_an_order(self) -> None:
        rng = np.random.default_rng(5)
        pred, label = random_boxes(rng)
        first = score(pred, label, cases="abcd")
        mixed = [[side[n] for n in rng.permutation(len(side))] for side in (pred, label)]
        assert score(mixed[0], mixed[1], cases="cdba") == first

    def test_nor_have_equal_scores_in_a_slice(self) -> None:
        # The first reaches both label boxes, the second only the upper one: who chooses first matters.
        label = [Box("a", 0, "SDH", i, 0, i + 20, 20) for i in (0, 4)]
        pred = [Box("a", 0, "SDH", i, 0, i + 20, 20) for i in (1, -4)]
        assert score(pred, label) == score(pred[::-1], label[::-1])


class TestMonaiAlone:
    """What MONAI does, and `average_precision` takes care not to pass on; a test fails when MONAI no longer does it."""

    @staticmethod
    def monai(pred: Sequence[Box], label: Sequence[Box], classes: Sequence[str] = ("IPH",)) -> dict[str, float]:
        from monai.apps.detection.metrics.coco import COCOMetric
        from monai.apps.detection.metrics.matching import matching_batch
        from monai.data.box_utils import box_iou

        metric = COCOMetric(classes, (0.5,), (0.5, 0.95, 0.05), (100,), verbose=False)
        sides = [[b for b in side if b.slice == k] for k in range(10) for side in (pred, label)]
        corners = [np.array([(b.i0, b.j0, b.i1, b.j1) for b in side], float).reshape(-1, 4) for side in sides]
        kinds = [np.array([classes.index(b.subtype) for b in side], int) for side in sides]
        scores = [np.array([getattr(b, "score", 1.0) for b in side]) for side in sides[::2]]
        boxes = (corners[::2], kinds[::2], scores, corners[1::2], kinds[1::2])
        return metric(matching_batch(box_iou, metric.iou_thresholds, *boxes))[0]

    def test_a_class_without_label_boxes_enters_the_mean_as_minus_one(self) -> None:
        found = self.monai([box()], [box()], ("EDH", "IPH"))
        assert found["AP_IoU_0.50_MaxDet_100"] == pytest.approx(0), "the mean of 1 and -1"
        assert found["EDH_AP_IoU_0.50_MaxDet_100"] == -1
        assert score([box(), box(subtype="EDH")], [box()]).map50.value == pytest.approx(1)

    def test_an_iou_of_065_misses_its_threshold(self) -> None:
        found = self.monai([box(size=(20, 13))], [box()])
        assert found["mAP_IoU_0.50_0.95_0.05_MaxDet_100"] == pytest.approx(0.3), "0.50, 0.55, 0.60, and not 0.65"

    def test_a_recall_of_09_misses_its_threshold(self) -> None:
        label = [box(k=k) for k in range(10)]
        assert self.monai(label[:9], label)["AP_IoU_0.50_MaxDet_100"] == pytest.approx(90 / 101)

    def test_equal_scores_count_in_the_order_of_images(self) -> None:
        label = [box(k=0), box(k=9)]
        early, late = ([box(k=0), box(k=9), box(k=n, at=100)] for n in (1, 9))
        by_monai = [self.monai(pred, label)["AP_IoU_0.50_MaxDet_100"] for pred in (early, late)]
        assert by_monai == pytest.approx([(51 + 50 * 2 / 3) / 101, 1])
        ours = [score(pred, label, n_slices=10).map50.value for pred in (early, late)]
        assert ours == pytest.approx([2 / 3, 2 / 3])


class TestBootstrap:
    def test_one_patient_has_no_interval(self) -> None:
        found = average_precision([box()], [box(), box("b")], {"a": 2, "b": 2}, {"a": "p", "b": "p"})
        assert found.map50 == Estimate(pytest.approx(51 / 101), None, None)

    def test_same_seed_same_interval_around_the_value(self) -> None:
        pred, label = random_boxes(np.random.default_rng(1), "abcdefgh")
        found = [average_precision(pred, label, dict.fromkeys("abcdefgh", 4)) for _ in range(2)]
        assert found[0] == found[1]
        for each in (found[0].map50, found[0].map, found[0]["SDH"].ap50):
            assert each.low < each.value < each.high

    def test_a_replicate_without_a_subtype_takes_the_mean_of_the_others(self) -> None:
        # Either patient drawn twice leaves one subtype only: EDH perfect, or SDH missed.
        label = [box("a", subtype="EDH"), box("b", subtype="SDH")]
        found = average_precision(label[:1], label, {"a": 1, "b": 1})
        assert found.map50 == Estimate(pytest.approx(0.5), 0, pytest.approx(1))
        assert found["EDH"].ap50 == Estimate(*[pytest.approx(1)] * 3)


@pytest.mark.parametrize(
    ("pred", "label", "words"),
    [
        ([box("other")], [], "other: predicted box in slice 0, expected a case that is scored"),
        ([], [box("a", 5)], "a: labelled box in slice 5, expected slices 0 to 4"),
    ],
)
def test_a_box_of_another_scan_is_refused(pred: list[Box], label: list[Box], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        score(pred, label)


class TestTable:
    def test_reads_back_what_was_written(self, tmp_path: Path) -> None:
        boxes = [ScoredBox("a", 3, "SDH", 1.25, 2, 30.5, 40, score=0.75), ScoredBox("b", 0, ANY, 0, 0, 1, 1, score=0)]
        write_csv_rows(tmp_path / "boxes.csv", map(asdict, boxes), (*BOX_COLUMNS, "score"))
        assert read_boxes(tmp_path / "boxes.csv") == boxes

    def test_without_scores_every_score_is_one_and_whole_corners_slice_an_array(self, tmp_path: Path) -> None:
        write_csv_rows(tmp_path / "boxes.csv", [asdict(box())], BOX_COLUMNS)
        [found] = read_boxes(tmp_path / "boxes.csv")
        assert found.score == 1
        assert np.zeros((50, 50))[found.i0 : found.i1, found.j0 : found.j1].shape == (20, 20)

    def test_a_table_without_rows_has_no_boxes(self, tmp_path: Path) -> None:
        write_csv_rows(tmp_path / "boxes.csv", [], BOX_COLUMNS)
        assert read_boxes(tmp_path / "boxes.csv") == []

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ("a,1,SDH,0,0,5", "number of cells"),
            ("a,1,SDH,0,0,5,5,1,1", "number of cells"),
            ("a,1,SDH,0,0,5,x,1", "'x'"),
            ("a,1.5,SDH,0,0,5,5,1", "'1.5'"),
            ("a,-1,SDH,0,0,5,5,1", "slice -1"),
            (",1,SDH,0,0,5,5,1", "case ''"),
            ("a,1,ABC,0,0,5,5,1", "'ABC'; expected .*EDH.*any"),
            ("a,1,SDH,5,0,5,5,1", "i0 < i1"),
            ("a,1,SDH,0,6,5,5,1", "j0 < j1"),
            ("a,1,SDH,0,0,inf,5,1", "expected numbers"),
            ("a,1,SDH,nan,0,5,5,1", "expected numbers"),
            ("a,1,SDH,0,0,5,5,nan", "score nan"),
            ("a,1,SDH,0,0,5,5,", "could not convert"),
        ],
    )
    def test_a_row_that_is_no_box_is_named(self, tmp_path: Path, row: str, words: str) -> None:
        table = tmp_path / "found.csv"
        table.write_text(f"{','.join(BOX_COLUMNS)},score\na,0,IPH,0,0,5,5,1\n{row}\n")
        with pytest.raises(ManifestError, match=rf"found\.csv row 3: .*{words}"):
            read_boxes(table)

    @pytest.mark.parametrize("header", ["", "case_id,slice,subtype,i0,j0,i1", f"{','.join(BOX_COLUMNS)},score,score"])
    def test_a_header_that_lacks_or_repeats_a_column_is_refused(self, tmp_path: Path, header: str) -> None:
        (tmp_path / "found.csv").write_text(f"{header}\n")
        with pytest.raises(ManifestError, match=r"found\.csv row 1: columns .*expected case_id, .*each once"):
            read_boxes(tmp_path / "found.csv")

    def test_a_file_that_is_no_text_or_not_there_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "found.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ManifestError, match=r"found\.csv: not a CSV file in UTF-8"):
            read_boxes(tmp_path / "found.csv")
        with pytest.raises(ManifestError, match="no such table"):
            read_boxes(tmp_path / "absent.csv")


class TestBoxesOfMask:
    def mask(self) -> NativeMask:
        mask = NativeMask(np.zeros((12, 10, 4), np.uint8), make_grid((12, 10, 4), (1, 1, 5)))
        mask.values[1:4, 2:7, 1] = Subtype.IPH
        mask.values[4, 7, 1] = Subtype.IPH  # touches by a corner
        mask.values[6:9, 2:3, 1] = Subtype.IPH
        mask.values[4:6, 2:3, 1] = Subtype.SDH  # between the two, and touches both
        mask.values[11, 9, 3] = Subtype.EDH
        return mask

    def test_a_box_for_each_region_of_each_subtype(self) -> None:
        assert boxes_of_mask("a", self.mask(), subtypes=True) == [
            Box("a", 1, "IPH", 1, 2, 5, 8),
            Box("a", 1, "IPH", 6, 2, 9, 3),
            Box("a", 1, "SDH", 4, 2, 6, 3),
            Box("a", 3, "EDH", 11, 9, 12, 10),
        ]

    def test_a_box_for_each_subtype_as_in_the_phantoms_table(self) -> None:
        found = boxes_of_mask("a", self.mask(), subtypes=True, regions=False)
        assert found[:2] == [Box("a", 1, "IPH", 1, 2, 9, 8), Box("a", 1, "SDH", 4, 2, 6, 3)]

    @pytest.mark.parametrize("regions", [True, False])
    def test_without_subtypes_all_blood_is_one(self, regions: bool) -> None:
        boxes = [Box("a", 1, ANY, 1, 2, 9, 8), Box("a", 3, ANY, 11, 9, 12, 10)]
        assert boxes_of_mask("a", self.mask(), regions=regions) == boxes
        binary = NativeMask(self.mask().values > 0, self.mask().grid)
        assert boxes_of_mask("a", binary, regions=regions) == boxes

    @pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "ASL"])
    def test_slices_are_axial_in_any_order_of_storage(self, axes: str) -> None:
        mask = ellipsoid(make_grid((40, 36, 9), (1, 1, 5), axes=axes, tilt_deg=12), (12, 9, 14), (3, 0, 0))
        boxes = boxes_of_mask("a", mask)
        across = np.moveaxis(mask.values, mask.grid.slice_axis, 0)
        assert [b.slice for b in boxes] == np.flatnonzero(across.any(axis=(1, 2))).tolist()
        assert 1 < len(boxes) < 9
        for b in boxes:
            inside = across[b.slice, b.i0 : b.i1, b.j0 : b.j1]
            assert inside.sum() == across[b.slice].sum()
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))

    def test_an_empty_mask_has_no_boxes(self) -> None:
        clean = empty(make_grid((12, 10, 4)))
        assert boxes_of_mask("a", clean) == boxes_of_mask("a", clean, subtypes=True) == []

    def test_a_value_that_is_no_subtype_is_refused(self) -> None:
        mask = self.mask()
        mask.values[0, 0, 0] = 6
        with pytest.raises(ValueError, match="a: label value 6"):
            boxes_of_mask("a", mask, subtypes=True)
