import time
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from shapes import ellipsoid, empty, make_grid, reorient
from test_abc2 import ORDERS, random_blob, real_masks

from ich_pipeline.abc2 import measure_abc2
from ich_pipeline.errors import GeometryError
from ich_pipeline.labels import Subtype
from ich_pipeline.records import NativeMask
from ich_pipeline.volumetry import VolumeReport, label_lesions, measure, with_probability_band


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("slice_mm", [1.0, 5.0])
@pytest.mark.parametrize("tilt_deg", [0.0, 20.0])
def test_volume_of_an_ellipsoid(axes: str, slice_mm: float, tilt_deg: float) -> None:
    grid = make_grid((90, 70, round(30 / slice_mm)), (0.5, 0.5, slice_mm), axes=axes, tilt_deg=tilt_deg)
    mask = ellipsoid(grid, (20, 15, 12))
    report = measure("case", mask)
    assert report.volume_ml == pytest.approx(mask.values.sum() * 0.25 * slice_mm / 1000, rel=1e-12)
    # 4/3 pi abc; 5 mm slices alone cost up to 2.5 %
    assert report.volume_ml == pytest.approx(15.08, rel=0.03)
    assert report.slice_spacing_mm == pytest.approx(slice_mm)
    assert report.voxel_volume_mm3 == pytest.approx(0.25 * slice_mm)
    assert report.gantry_tilt_deg == pytest.approx(tilt_deg, abs=1e-6)
    assert report.n_lesions == 1
    assert report.largest_lesion_ml == report.volume_ml
    assert report.abc2_lesions_sum_ml == report.abc2_ml


def test_empty_mask_reads_zero() -> None:
    report = measure("clean", empty(make_grid((20, 20, 5), (0.5, 0.5, 5))), subtypes=True)
    measured = (report.volume_ml, report.abc2_ml, report.abc2_kothari_ml, report.tada_ml, report.largest_lesion_ml)
    assert measured == (0, 0, 0, 0, 0)
    assert (report.n_lesions, report.lesions, report.touches_border) == (0, (), False)
    assert report.slice_spacing_mm == pytest.approx(5)
    assert report.subtype_ml == dict.fromkeys(Subtype, 0.0)


def test_one_voxel_one_slice_full_image() -> None:
    grid = make_grid((10, 10, 10), (0.5, 0.5, 4))
    mask = empty(grid)
    mask.values[4, 5, 6] = True
    report = measure("voxel", mask)
    assert report.volume_ml == pytest.approx(0.001)
    assert report.c_mm == pytest.approx(4)
    assert not report.touches_border
    mask.values[2:8, 2:8, 6] = True
    assert measure("slice", mask).lesions[0].slices == 1
    mask.values[...] = True
    full = measure("full", mask)
    assert full.volume_ml == pytest.approx(1.0)
    assert full.touches_border
    assert full.lesions[0].touches_border


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_every_face_of_the_image_is_a_border(axis: int, end: int) -> None:
    mask = empty(make_grid((8, 8, 8)))
    inner = [3, 3, 3]
    mask.values[tuple(inner)] = True
    assert not measure("inside", mask).touches_border
    inner[axis] = (0, 7)[end]
    mask.values[tuple(inner)] = True
    report = measure("border", mask)
    assert report.touches_border
    assert sorted(lesion.touches_border for lesion in report.lesions) == [False, True]


def test_300_lesions_sum_up() -> None:
    grid = make_grid((64, 64, 32), (0.5, 0.5, 5))
    mask = empty(grid)
    places = [(i, j, k) for k in range(1, 31, 3) for i in range(2, 60, 10) for j in range(2, 60, 12)]
    rng = np.random.default_rng(0)
    for i, j, k in places:
        mask.values[i : i + rng.integers(1, 8), j : j + rng.integers(1, 8), k] = True
    report = measure("many", mask)
    assert report.n_lesions == len(places) == 300
    assert sum(lesion.volume_ml for lesion in report.lesions) == pytest.approx(report.volume_ml)
    assert sum(lesion.abc2_ml for lesion in report.lesions) == pytest.approx(report.abc2_lesions_sum_ml)
    assert sum(lesion.tada_ml for lesion in report.lesions) == pytest.approx(report.tada_lesions_sum_ml)
    volumes = [lesion.volume_ml for lesion in report.lesions]
    assert volumes == sorted(volumes, reverse=True)
    assert [lesion.lesion for lesion in report.lesions] == list(range(1, 301))
    assert report.abc2_ml > 5 * report.abc2_lesions_sum_ml, "one object that spans the head"


def test_corners_connect_lesions() -> None:
    mask = empty(make_grid((10, 10, 10)))
    mask.values[2, 2, 2] = mask.values[3, 3, 3] = True
    assert measure("touching", mask).n_lesions == 1
    mask.values[5, 5, 4] = True
    assert measure("apart", mask).n_lesions == 2


def test_each_lesion_measures_as_it_would_alone() -> None:
    mask = random_blob(5)
    report = measure("blob", mask)
    assert report.n_lesions > 3
    import cc3d

    labels = cc3d.connected_components(mask.values, connectivity=26)
    alone = sorted(measure_abc2(NativeMask(labels == n, mask.grid)).tada_ml for n in range(1, labels.max() + 1))
    assert sorted(lesion.tada_ml for lesion in report.lesions) == pytest.approx(alone)


def test_lesion_position_is_in_patient_space() -> None:
    grid = make_grid((61, 61, 31), (1, 1, 2), axes="PIL", tilt_deg=15)
    mask = ellipsoid(grid, (8, 6, 9), centre_mm=(0, 0, 0))
    lesion = measure("centred", mask).lesions[0]
    assert (lesion.centroid_r_mm, lesion.centroid_a_mm, lesion.centroid_s_mm) == pytest.approx((0, 0, 0), abs=1e-9)


def test_equal_lesions_are_numbered_from_above() -> None:
    grid = make_grid((21, 21, 21))
    mask = empty(grid)
    mask.values[5, 5, 5] = mask.values[5, 5, 15] = mask.values[5, 15, 15] = mask.values[15, 15, 15] = True
    for order in ORDERS:
        report = measure("four", reorient(mask, order))
        positions = [(each.centroid_r_mm, each.centroid_a_mm, each.centroid_s_mm) for each in report.lesions]
        np.testing.assert_allclose(positions, [(5, 5, 5), (-5, 5, 5), (-5, -5, 5), (-5, -5, -5)], atol=1e-9)


@pytest.mark.parametrize("seed", [2, 7])
def test_order_of_storage_changes_no_number(seed: int) -> None:
    mask = random_blob(seed)
    expected = measure("case", mask)
    for order in ORDERS[::5]:
        _assert_same(measure("case", reorient(mask, order)), expected)
        fortran = reorient(mask, order)
        _assert_same(measure("case", NativeMask(np.asfortranarray(fortran.values), fortran.grid)), expected)


def _assert_same(found: VolumeReport, expected: VolumeReport) -> None:
    for one, other in [(found, expected), *zip(found.lesions, expected.lesions, strict=True)]:
        for name, value in vars(other).items():
            if isinstance(value, int | float):
                assert getattr(one, name) == pytest.approx(value, abs=1e-9), name


def test_subtypes_by_case_and_lesion() -> None:
    grid = make_grid((20, 20, 20))
    values = np.zeros(grid.shape, np.uint8)
    values[2:5, 2, 2] = Subtype.IPH
    values[5:7, 2, 2] = Subtype.IVH  # touches the first: one lesion, two subtypes
    values[10, 10, 10] = Subtype.SDH
    report = measure("mixed", NativeMask(values, grid), subtypes=True)
    assert report.n_lesions == 2
    assert report.volume_ml == pytest.approx(0.006)
    assert report.subtype_ml == pytest.approx(
        {Subtype.EDH: 0, Subtype.IPH: 0.003, Subtype.IVH: 0.002, Subtype.SAH: 0, Subtype.SDH: 0.001}
    )
    by_lesion = [lesion.subtype_ml for lesion in report.lesions]
    assert by_lesion[0] == pytest.approx(report.subtype_ml | {Subtype.SDH: 0})
    assert by_lesion[1] == pytest.approx(dict.fromkeys(Subtype, 0.0) | {Subtype.SDH: 0.001})
    assert measure("binary", NativeMask(values, grid)).subtype_ml is None


def test_values_without_a_subtype_are_refused() -> None:
    grid = make_grid((5, 5, 5))
    values = np.full(grid.shape, 6, np.uint8)
    with pytest.raises(ValueError, match=r"case7: label value 6, expected .* 5 SDH"):
        measure("case7", NativeMask(values, grid), subtypes=True)
    assert measure("case7", NativeMask(values, grid)).volume_ml == pytest.approx(0.125)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_only_masks_are_measured(dtype: type) -> None:
    grid = make_grid((5, 5, 5))
    with pytest.raises(TypeError, match=r"case7: mask of .*expected bool or uint8"):
        measure("case7", NativeMask(np.ones(grid.shape, dtype), grid))


def test_the_mask_is_only_read() -> None:
    mask = random_blob(1)
    before = mask.values.copy()
    mask.values.flags.writeable = False
    measure("case", mask)
    np.testing.assert_array_equal(mask.values, before)


def test_reports_hold_the_types_they_declare() -> None:
    blob = random_blob(4)
    for report in (measure("case", blob), measure("clean", empty(blob.grid))):
        for each in (report, *report.lesions):
            for name, kind in get_type_hints(type(each)).items():
                assert kind not in (float, int, bool) or type(getattr(each, name)) is kind, name


@pytest.mark.realdata
@pytest.mark.slow
def test_measuring_a_real_mask_takes_5_ms(real_data: Path) -> None:
    seconds = []
    for mask in real_masks(real_data, 4):
        start = time.process_time()
        measure("case", mask)
        seconds.append(time.process_time() - start)
    assert np.median(seconds) <= 5e-3


class TestBand:
    """How far a single number may be off."""

    @pytest.mark.parametrize("radius_mm", [6.0, 15.0])
    def test_half_a_voxel_of_boundary(self, radius_mm: float) -> None:
        report = measure("ball", ellipsoid(make_grid((90, 90, 90), (0.5, 0.5, 0.5)), (radius_mm,) * 3))
        for moved_mm, found_ml in ((-0.25, report.volume_low_ml), (0.25, report.volume_high_ml)):
            # Along the axis that the boundary faces most: on a ball 0.83 of a shift along its normal.
            shift_ml = 4 / 3 * np.pi * ((radius_mm + 0.83 * moved_mm) ** 3 - radius_mm**3) / 1000
            assert found_ml - report.volume_ml == pytest.approx(shift_ml, rel=0.04)
        assert report.band == "half_voxel"

    def test_one_voxel_and_full_image(self) -> None:
        mask = empty(make_grid((5, 5, 5), (1, 1, 2)))
        mask.values[2, 2, 2] = True
        one = measure("voxel", mask)
        # The voxel half empty; its six neighbours half full.
        assert (one.volume_low_ml, one.volume_high_ml) == pytest.approx((0.001, 0.008))
        mask.values[...] = True
        full = measure("full", mask)
        # 3 x 3 x 3 voxels have no face on the boundary; 6 x 25 would lie beyond the image.
        assert (full.volume_low_ml, full.volume_high_ml) == pytest.approx((0.25 - 0.098, 0.25 + 0.15))

    def test_empty_mask_has_no_band(self) -> None:
        report = measure("clean", empty(make_grid((8, 8, 8))))
        assert (report.volume_low_ml, report.volume_high_ml, report.band_holds_30) == (0, 0, False)

    def test_probability_counts_at_the_thresholds_half_way(self) -> None:
        probability = np.zeros((10, 10, 10), np.float32)
        probability[:5, 0, 0] = 0.9
        probability[5:8, 0, 0] = 0.6
        probability[8:, 0, 0] = 0.3
        mask = NativeMask((probability > 0.5).astype(np.uint8), make_grid((10, 10, 10)))
        report = with_probability_band(measure("case", mask), probability, 0.5, mask.grid)
        assert (report.volume_low_ml, report.volume_ml, report.volume_high_ml) == pytest.approx((0.005, 0.008, 0.01))
        assert report.band == "probability"
        # At a threshold of 0.2 the ends are 0.6 and 0.1; a mask that was cleaned afterwards is its own end.
        cleaned = NativeMask(np.zeros_like(mask.values), mask.grid)
        cleaned.values[0, 0, 0] = 1
        report = with_probability_band(measure("case", cleaned), probability, 0.2, mask.grid)
        assert (report.volume_low_ml, report.volume_high_ml) == pytest.approx((0.001, 0.01))

    @pytest.mark.parametrize(("high", "holds"), [(0.9, False), (0.3, True)])
    def test_30_ml_in_the_band(self, high: float, holds: bool) -> None:
        probability = np.zeros((40, 40, 40), np.float32)
        probability[:29, :, :25] = 0.9
        probability[29:35, :, :25] = high if holds else 0.0
        mask = NativeMask((probability > 0.5).astype(np.uint8), make_grid((40, 40, 40)))
        report = with_probability_band(measure("case", mask), probability, 0.5, mask.grid)
        assert report.from_30_ml == pytest.approx(-1)
        assert report.band_holds_30 == holds

    @pytest.mark.parametrize("order", ORDERS[::7])
    def test_order_of_storage_changes_nothing(self, order: tuple[int, ...]) -> None:
        mask = random_blob(3)
        report, turned = measure("case", mask), measure("case", reorient(mask, order))
        assert (turned.volume_low_ml, turned.volume_high_ml) == pytest.approx(
            (report.volume_low_ml, report.volume_high_ml), rel=1e-12
        )


class TestSubtypesAndEdema:
    GRID = make_grid((40, 40, 10), (0.5, 0.5, 5))

    def label(self, *values: int) -> NativeMask:
        mask = NativeMask(np.zeros(self.GRID.shape, np.uint8), self.GRID)
        for n, value in enumerate(values):
            mask.values[4 * n : 4 * n + 3, 4:8, 4] = value
        return mask

    @pytest.mark.parametrize(
        ("kinds", "applies"),
        [
            ((), True),
            ((Subtype.IPH,), True),
            ((Subtype.EDH, Subtype.IPH), True),
            ((Subtype.IVH,), False),
            ((Subtype.SAH,), False),
            ((Subtype.IPH, Subtype.SDH), False),
        ],
    )
    def test_where_the_rules_mean_something(self, kinds: tuple[Subtype, ...], applies: bool) -> None:
        mask = self.label(*kinds)
        report = measure("case", mask, subtypes=True)
        assert report.abc2_applies is applies
        assert report.abc2_ml == measure("case", mask).abc2_ml, "the number stays"
        assert measure("case", mask).abc2_applies is None

    def test_most_of_a_lesion_decides(self) -> None:
        mask = self.label(Subtype.IPH)
        mask.values[0, 4:8, 4] = Subtype.IVH
        assert measure("case", mask, subtypes=True).lesions[0].abc2_applies
        mask.values[1, 4:8, 4] = Subtype.IVH
        assert not measure("case", mask, subtypes=True).lesions[0].abc2_applies

    def test_edema_extension_is_the_difference_of_two_radii(self) -> None:
        grid = make_grid((90, 90, 90), (1, 1, 1))
        bleed, both = ellipsoid(grid, (20, 20, 20)), ellipsoid(grid, (27, 27, 27))
        report = measure("case", bleed, edema=both)
        assert report.edema_extension_mm == pytest.approx(7, abs=0.03)
        assert report.edema_ratio == pytest.approx((27**3 - 20**3) / 20**3, rel=0.01)
        assert report.edema_ml == pytest.approx((both.values.sum() - bleed.values.sum()) / 1000)

    def test_edema_belongs_to_parenchymal_blood(self) -> None:
        mask = self.label(Subtype.IPH, Subtype.IVH)
        edema = NativeMask(np.zeros(self.GRID.shape, bool), self.GRID)
        edema.values[:3, 8:10, 4] = True
        assert measure("case", mask, subtypes=True, edema=edema).edema_ratio == pytest.approx(6 / 12)
        assert measure("case", mask, edema=edema).edema_ratio == pytest.approx(6 / 24)
        none = measure("case", self.label(Subtype.IVH), subtypes=True, edema=edema)
        assert (none.edema_ratio, none.edema_extension_mm) == (None, None)
        assert none.edema_ml == pytest.approx(6 * 1.25 / 1000)
        empty_edema = measure("case", mask, edema=NativeMask(np.zeros(self.GRID.shape, bool), self.GRID))
        assert (empty_edema.edema_ml, empty_edema.edema_ratio, empty_edema.edema_extension_mm) == (0, 0, 0)

    def test_edema_that_cannot_be_used_is_refused(self) -> None:
        mask = self.label(Subtype.IPH)
        with pytest.raises(GeometryError, match="case: edema is on another grid"):
            measure("case", mask, edema=empty(make_grid((40, 40, 10), (0.5, 0.5, 4))))
        with pytest.raises(TypeError, match="edema of float32"):
            measure("case", mask, edema=NativeMask(np.zeros(self.GRID.shape, np.float32), self.GRID))


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_the_lesions_of_the_report(seed):
    """In any order of storage, each number marks the voxels that the lesion of this number was measured on."""
    mask = reorient(random_blob(seed), ORDERS[seed * 4])
    labels = label_lesions(mask)
    lesions = measure("blob", mask).lesions
    np.testing.assert_array_equal(labels > 0, mask.values)
    assert labels.max() == len(lesions)
    for lesion in lesions:
        voxels = np.argwhere(labels == lesion.lesion)
        assert lesion.volume_ml == pytest.approx(len(voxels) * mask.grid.voxel_volume_mm3 / 1000)
        centroid_mm = mask.grid.affine[:3, :3] @ voxels.mean(axis=0) + mask.grid.affine[:3, 3]
        assert (lesion.centroid_r_mm, lesion.centroid_a_mm, lesion.centroid_s_mm) == pytest.approx(
            centroid_mm, abs=1e-3
        )


def test_an_empty_mask_has_no_labels():
    mask = empty(make_grid((4, 5, 6), (1.0, 1.0, 5.0)))
    assert label_lesions(mask).shape == (4, 5, 6)
    assert not label_lesions(mask).any()
