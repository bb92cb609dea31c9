"""Varied phantoms: findings that are no blood, other scanners, and still a truth that is true."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import bleeds as bl
from ich_pipeline.phantom import make_case, variety
from ich_pipeline.phantom.anatomy import AIR, Person, build_brain, build_head
from ich_pipeline.phantom.fields import Texture
from ich_pipeline.phantom.scanner import PLAIN, Degradation, draw_protocol
from ich_pipeline.phantom.settings import VARIED, PhantomSettings

SMALL = replace(VARIED, matrix=96, slice_mm=(6.0,))


@lru_cache
def head():
    """A plain head, its points and its brain; nobody changes them."""
    rng = np.random.default_rng(3)
    person = Person.draw(rng, (60, 60))
    hu, inside = build_head(person, rng, Texture(rng))
    return person, hu, inside, build_brain(inside, person, rng, bl.no_room(inside))


def fresh():
    _, _, inside, brain = head()
    return inside, replace(brain, hu=brain.hu.copy())


def test_same_seed_same_voxels():
    first, second = (make_case("a", 7, SMALL) for _ in range(2))
    np.testing.assert_array_equal(first.scan.image_hu, second.scan.image_hu)
    np.testing.assert_array_equal(first.label, second.label)


def test_plain_and_varied_cases_of_a_seed_have_one_field_of_view():
    varied, plain = (make_case("a", 7, replace(SMALL, varied=flag)) for flag in (True, False))
    np.testing.assert_array_equal(varied.scan.grid.affine, plain.scan.grid.affine)
    assert (varied.scan.image_hu != plain.scan.image_hu).mean() > 0.2


def test_a_clean_varied_scan_has_findings_and_no_truth_to_find():
    case = make_case("clean", 4, replace(SMALL, clean_fraction=1.0))
    assert not case.label.any()
    assert case.truth["volume_ml"] == {}


@pytest.mark.parametrize("number", range(len(variety.FINDINGS)), ids=lambda n: variety.FINDINGS[n][1].__name__)
def test_each_finding_changes_a_part_of_the_brain(number):
    _, _, _, plain = head()
    paint = variety.FINDINGS[number][1]
    changed = []
    for seed in range(4):  # a lump that is drawn very small may fall between the points
        inside, brain = fresh()
        paint(inside, brain, np.random.default_rng(seed))
        assert np.isfinite(brain.hu).all()
        assert brain.hu.min() > AIR - 1
        assert brain.hu.max() < variety.METAL_HU[1] + 1
        changed.append(np.count_nonzero(np.abs(brain.hu - plain.hu) > 1))
    assert max(changed) > 0
    whole = number == [paint for _, paint in variety.FINDINGS].index(variety._contrast)
    assert (max(changed) > 0.5 * plain.hu.size) == whole


def test_faint_calcification_lies_on_both_sides():
    inside, brain = fresh()
    _, _, _, plain = head()
    variety._pair(inside, brain, np.random.default_rng(1))
    x = inside.x[np.abs(brain.hu - plain.hu) > 5]
    assert 0.2 < (x > 0).mean() < 0.8
    assert np.abs(np.median(x[x > 0]) + np.median(x[x < 0])) < 4


def test_tissue_varies_from_head_to_head():
    person = head()[0]
    drawn = [variety.varied_person(person, np.random.default_rng(seed)) for seed in range(60)]
    assert np.std([each.grey_hu for each in drawn]) > 1
    assert all(each.grey_hu > each.white_hu + 5 for each in drawn)
    assert min(each.venous_hu for each in drawn) < 50 < 75 < max(each.venous_hu for each in drawn)


def test_some_bleeds_are_small_and_all_stay_in_the_range_asked_for():
    rng = np.random.default_rng(0)
    settings = replace(VARIED, volume_ml=(0.05, 90.0))
    plans = [plan for _ in range(150) for plan in bl.plan_bleeds(rng, settings, list(Subtype))]
    changed = variety.varied_plans(plans, settings, rng)
    volumes = np.array([plan.volume_ml for plan in changed])
    assert volumes.min() >= 0.05
    assert volumes.max() <= 90
    assert 0.05 < (volumes < 0.5).mean() < 0.4
    assert all(variety.BLOOD_HU[0] <= plan.blood_hu <= variety.BLOOD_HU[1] for plan in changed)


@pytest.mark.parametrize("side", [-1, 1])
def test_blood_along_the_meninges_is_a_thin_layer_on_one_side(side):
    inside, _ = fresh()
    plan = bl.Plan(Subtype.SDH, 5.0, side, 65.0, "acute")
    for seed in range(6):
        bleed = variety.along_meninges(inside, plan, np.random.default_rng(seed), np.ones_like(inside.x))
        held = bleed.blood > 0.5
        assert held.any()
        assert (inside.x[held] * side > -1).all()
        assert 0.2 < bleed.blood.sum() * inside.voxel_ml < 40


def test_a_level_in_a_clot_is_dense_below():
    inside, _ = fresh()
    blood = (np.hypot(np.hypot(inside.x - 25, inside.y), inside.z - 5) < 15).astype(np.float32)
    made = [bl.Bleed(Subtype.IPH, blood, np.full_like(blood, 60))]
    rng = np.random.default_rng(0)
    for _ in range(60):
        variety.vary_bleeds(inside, made, [], rng, np.ones_like(blood))
        if np.ptp(made[0].blood_hu) > 0:
            break
    front, back = (made[0].blood_hu[(blood > 0) & (sign * inside.y > 5)].mean() for sign in (1, -1))
    assert back > front + 10  # the patient lies on the back


def test_an_opened_skull_lacks_bone_and_the_brain_is_left_alone():
    _, hu, inside, _ = head()
    for seed in range(8):
        opened = hu.copy()
        variety._opening(opened, inside, np.random.default_rng(seed))
        taken = (hu > 300) & (opened < 100)
        assert taken.any()
        # Plates of 3 mm may reach through the inner table, which the brain is painted over afterwards.
        assert (opened != hu).reshape(-1)[inside.index].sum() < 4 * 27


def test_a_swollen_scalp_is_outside_the_skull():
    _, hu, inside, _ = head()
    swollen = hu.copy()
    variety._scalp(swollen, inside, np.random.default_rng(0))
    changed = swollen != hu
    assert changed.any()
    assert not changed.reshape(-1)[inside.index].any()
    assert (hu[changed] < 80).all()


def test_a_plain_scanner_adds_nothing():
    image = np.random.default_rng(0).normal(30, 5, (40, 40, 4)).astype(np.float32)
    np.testing.assert_allclose(PLAIN.apply(image, 0.5, np.random.default_rng(0)), image, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"glare": 0.05}, {"edge_gain": 0.5}, {"blur_mm": 0.8}, {"moved_mm": 3.0}])
def test_what_a_scanner_adds_keeps_the_mean_of_a_flat_head(wrong):
    image = np.full((60, 60, 6), 30, np.float32)
    changed = Degradation(**wrong).apply(image, 0.5, np.random.default_rng(2))
    np.testing.assert_allclose(changed, image, atol=1e-3)
    image[20:40, 20:40] = 1000
    assert np.abs(Degradation(**wrong).apply(image, 0.5, np.random.default_rng(2)) - image).max() > 5


def test_calibration_and_slow_noise_are_as_large_as_said():
    image = np.full((80, 80, 6), 40, np.float32)
    shifted = Degradation(gain=1.01, offset_hu=2).apply(image, 0.5, np.random.default_rng(0))
    np.testing.assert_allclose(shifted, 40 + 10.4 + 2, atol=1e-3)
    noisy = Degradation(slow_noise_hu=2).apply(image, 0.5, np.random.default_rng(0))
    assert noisy.std() == pytest.approx(2, rel=0.01)


def test_varied_protocols_differ_in_everything_that_a_scanner_adds():
    rng = np.random.default_rng(0)
    plain = draw_protocol(rng, PhantomSettings())
    drawn = [variety.varied_protocol(plain, np.random.default_rng(seed)).degradation for seed in range(60)]
    for name in vars(PLAIN):
        assert len({getattr(each, name) for each in drawn}) > 2, name
