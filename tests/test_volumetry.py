import time
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from shapes import ellipsoid, empty, make_grid, reorient
from test_abc2 import ORDERS, random_blob, real_masks

from ich_pipeline.abc2 import measure_abc2
from ich_pipeline.labels import Subtype
from ich_pipeline.records import NativeMask
from ich_pipeline.volumetry import VolumeReport, measure


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
