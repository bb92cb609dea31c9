"""The bleed of one patient in the head of another: volume, place and noise stay what they are."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from shapes import make_grid

from ich_pipeline.errors import ReadError
from ich_pipeline.geometry import Grid
from ich_pipeline.phantom import PhantomSettings, make_case
from ich_pipeline.phantom.transplant import transplant
from ich_pipeline.records import NativeMask, Scan


@lru_cache
def patient() -> Scan:
    settings = PhantomSettings(matrix=128, slice_mm=(4.0,), clean_fraction=1.0, cut_fraction=0.0, tilt_fraction=1.0)
    return make_case("patient", 21, settings).scan


def a_mask(centre_mm: tuple[float, float, float], radius_mm: float, grid: Grid | None = None) -> NativeMask:
    """A ball in a field of view around the origin, whose top slice is at 70 mm."""
    grid = grid or make_grid((120, 120, 30), (2.0, 2.0, 5.0))
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), axis=-1)
    middle = grid.corners_mm().mean(axis=0)
    away = np.linalg.norm(grid.to_mm(index) - middle - centre_mm, axis=-1)
    return NativeMask((away < radius_mm).astype(np.uint8), grid)


@pytest.mark.parametrize("tilt_deg", [0, 15])
def test_volume_is_kept_where_the_mask_fits(tilt_deg):
    mask = a_mask((25, 0, 15), 14, make_grid((120, 120, 30), (2.0, 2.0, 5.0), tilt_deg=tilt_deg))
    case, placed = transplant("one", mask, patient(), seed=1)
    ml = mask.grid.foreground_ml(mask.values)
    assert placed.cut_share < 0.02
    assert case.scan.grid.foreground_ml(case.label) == pytest.approx(ml, rel=0.12)
    assert case.brain[case.label > 0].all()


def test_blood_is_painted_and_the_rest_is_the_patient_s():
    scan = patient()
    case, _ = transplant("one", a_mask((25, 0, 15), 14), scan, seed=1)
    blood = case.label > 0
    assert 45 < np.median(case.scan.image_hu[blood]) < 85
    assert np.median(case.scan.image_hu[blood]) > np.median(scan.image_hu[blood]) + 12
    changed = case.scan.image_hu != scan.image_hu
    assert blood.any()
    assert changed.mean() < 0.05
    assert case.scan.grid is scan.grid


def test_a_mask_that_lies_beside_the_head_is_moved_into_it():
    case, placed = transplant("far", a_mask((78, 0, 15), 10), patient(), seed=1)
    assert placed.shift_mm > 5
    assert placed.cut_share < 0.35
    assert case.brain[case.label > 0].all()


def test_a_mask_that_fits_no_head_is_refused():
    with pytest.raises(ReadError, match="outside the skull"):
        transplant("huge", a_mask((0, 0, -10), 105), patient(), seed=1)


def test_an_empty_mask_is_refused():
    mask = a_mask((0, 0, 0), 10)
    with pytest.raises(ReadError, match="empty"):
        transplant("none", replace(mask, values=np.zeros_like(mask.values)), patient(), seed=1)


def test_same_seed_same_voxels_other_seed_other_blood():
    mask = a_mask((-30, 10, 20), 12)
    one, again, other = (transplant("one", mask, patient(), seed)[0].scan.image_hu for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
