"""Synthetic heads: the physics that they claim, and truth that is true."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage

from ich_pipeline.errors import ConfigError, ReadError
from ich_pipeline.geometry import Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import PhantomCase, PhantomSettings, make_case
from ich_pipeline.phantom import bleeds as bl
from ich_pipeline.phantom.anatomy import CSF, GREY, WHITE, Person, build_brain, build_head
from ich_pipeline.phantom.background import find_head
from ich_pipeline.phantom.fields import Texture, cubic_matrix, share
from ich_pipeline.phantom.scanner import Lattice, _noise, _projected_errors, draw_protocol, scan_hu, shares
from ich_pipeline.records import NiftiForms, Scan

SMALL = PhantomSettings(matrix=128, slice_mm=(6.0,), cut_fraction=0.0)
CLEAN = replace(SMALL, clean_fraction=1.0)


def only(*names: str, volume_ml: tuple[float, float] = (15.0, 40.0)) -> PhantomSettings:
    """Every case bleeds, with exactly these subtypes."""
    kinds = tuple(float(n == len(names)) for n in range(1, len(names) + 1))
    return replace(
        SMALL,
        clean_fraction=0.0,
        subtype_weights=dict.fromkeys(names, 1.0),
        kinds_probability=kinds,
        volume_ml=volume_ml,
    )


@lru_cache
def bleeding(name: str) -> PhantomCase:
    return make_case(name, 11, only(name))


@lru_cache
def head():
    """A head with its brain, and the points they are made on."""
    rng = np.random.default_rng(3)
    person = Person.draw(rng, (60, 60))
    hu, inside = build_head(person, rng, Texture(rng))
    return hu, inside, build_brain(inside, person, rng, bl.no_room(inside))


def plan(subtype: Subtype, volume_ml: float = 30.0) -> bl.Plan:
    return bl.Plan(subtype, volume_ml, 1, 65.0, "acute")


@pytest.mark.parametrize("name", list(Subtype.__members__))
def test_asked_subtype_is_there_and_inside_the_skull(name):
    case = bleeding(name)
    assert set(np.unique(case.label)) == {0, Subtype[name]}
    assert case.brain[case.label > 0].all()
    # The head of an adult holds 1.0 to 1.8 L; what a scan misses at the base is little.
    assert 900 < case.brain.sum() * case.scan.grid.voxel_volume_mm3 / 1000 < 1900


@pytest.mark.parametrize("name", list(Subtype.__members__))
def test_label_volume_is_that_of_the_shares(name):
    case = bleeding(name)
    label_ml = (case.label > 0).sum() * case.scan.grid.voxel_volume_mm3 / 1000
    assert case.truth["label_volume_ml"][name] == pytest.approx(label_ml, abs=1e-4)
    # Thin layers lose what fills less than half of a voxel: sulci at 6 mm the most.
    tolerance = {"SAH": 0.6, "SDH": 0.35}.get(name, 0.2)
    assert label_ml == pytest.approx(case.truth["volume_ml"][name], rel=tolerance)


@pytest.mark.parametrize("name", ["EDH", "IPH", "IVH"])
def test_blood_is_brighter_than_brain(name):
    case = bleeding(name)
    blood_hu = np.median(case.scan.image_hu[case.label > 0])
    brain_hu = np.median(case.scan.image_hu[case.brain & (case.label == 0) & ~case.edema])
    assert 24 < brain_hu < 42
    assert 42 < blood_hu < 95


def test_edema_surrounds_a_clot_and_is_darker():
    case = make_case("large", 12, only("IPH", volume_ml=(50.0, 60.0)))
    assert not (case.edema & (case.label > 0)).any()
    assert case.truth["edema_ml"] > 2
    tissue = case.brain & ~case.edema & (case.label == 0)
    assert np.median(case.scan.image_hu[case.edema]) < np.median(case.scan.image_hu[tissue]) - 2


def test_several_subtypes_at_once():
    case = make_case("several", 5, only("IPH", "IVH", "SDH"))
    assert set(np.unique(case.label)) == {0, Subtype.IPH, Subtype.IVH, Subtype.SDH}


@pytest.mark.parametrize("name", ["EDH", "IPH", "SDH"])
def test_smallest_bleeds_are_seen_at_the_thickest_slices(name):
    settings = replace(only(name, volume_ml=(0.3, 0.6)), slice_mm=(8.0,))
    assert bleeding(name).label.any()
    assert make_case("small", 2, settings).truth["label_volume_ml"][name] > 0.02


def test_same_seed_same_voxels_other_seed_others():
    first, second, other = (make_case("a", seed, SMALL) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.scan.image_hu, second.scan.image_hu)
    np.testing.assert_array_equal(first.label, second.label)
    assert first.truth == second.truth
    assert first.truth["age"] != other.truth["age"]


def test_clean_scan_has_no_truth_to_find():
    case = make_case("clean", 1, CLEAN)
    assert not case.label.any()
    assert not case.edema.any()
    assert case.boxes == []
    assert case.truth["volume_ml"] == {}


def test_boxes_enclose_each_subtype_exactly():
    case = bleeding("SDH")
    for box in case.boxes:
        inside = case.label[box.i0 : box.i1, box.j0 : box.j1, box.slice] == Subtype[box.subtype]
        assert inside.sum() == (case.label[:, :, box.slice] == Subtype[box.subtype]).sum()
        # Shrunk by one pixel on any side a box would lose some.
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert {box.slice for box in case.boxes} == set(np.flatnonzero(case.label.any(axis=(0, 1))))


def test_tilt_is_shear_that_only_the_sform_holds():
    case = make_case("tilted", 4, replace(CLEAN, tilt_fraction=1.0, tilt_deg=(18.0, 18.0)))
    grid, forms = case.scan.grid, case.scan.forms
    assert abs(case.truth["tilt_deg"]) == pytest.approx(18)
    assert grid.tilt_deg == pytest.approx(18, abs=1e-3)
    assert grid.slice_spacing_mm == pytest.approx(6.0, rel=1e-6)
    assert (forms.sform_code, forms.qform_code, forms.qform) == (1, 0, None)
    # The table moves along the patient, not along the slice normal.
    np.testing.assert_allclose(grid.affine[:2, 2], 0, atol=1e-9)
    upright = make_case("upright", 4, replace(CLEAN, tilt_fraction=0.0)).scan
    assert (upright.forms.qform_code, upright.grid.tilt_deg) == (1, 0)


def test_tissue_has_its_hu_after_the_scanner():
    hu, inside, brain = head()
    hu = hu.copy()
    hu.reshape(-1)[inside.index] = np.where(inside.share < 1, hu.reshape(-1)[inside.index], brain.hu)
    grey = np.where((brain.csf < 0.02) & ~inside.infratentorial, 1 - brain.white, 0)
    pure = {"white": brain.white, "ventricle": brain.ventricle, "grey": grey}
    rng = np.random.default_rng(0)
    protocol = draw_protocol(rng, replace(CLEAN, matrix=256, tilt_fraction=0.0, circle_fraction=0.0, slice_mm=(3.0,)))
    lattice = Lattice(protocol, rng)
    image_hu = scan_hu(lattice, hu, rng)
    sampled = shares(lattice, {name: inside.volume(values) for name, values in pure.items()})
    for name, expected in {"white": WHITE, "grey": GREY, "ventricle": CSF}.items():
        found = np.median(image_hu[sampled[name] > 0.97])
        assert found == pytest.approx(expected, abs=4), name
    assert image_hu[sampled["white"] > 0.97].std() == pytest.approx(protocol.noise_hu, rel=0.4)
    deep = lattice.to_pixels(lattice.sample(np.where(hu > 1000, hu, 0)), 0.0)
    assert 900 < np.median(image_hu[deep > 1000]) < 1900
    assert np.median(image_hu[:3, :3]) == pytest.approx(-1000, abs=30)


def test_settled_blood_has_a_level_that_gravity_sets():
    _, inside, brain = head()
    free = np.ones_like(inside.x)
    for down in ((0.0, -1.0, 0.0), (0.0, -0.94, -0.342)):
        bleed = bl.intraventricular(
            inside, brain, plan(Subtype.IVH, 5.0), np.random.default_rng(0), np.array(down), free, cast=False
        )
        height = -(inside.x * down[0] + inside.y * down[1] + inside.z * down[2])
        ventricle = (brain.ventricle > 0.9) & (inside.x > 4)
        wet, dry = ventricle & (bleed.blood > 0.8), ventricle & (bleed.blood < 0.05)
        assert wet.sum() > 100
        assert dry.sum() > 100
        assert height[wet].max() < height[dry].min() + 2.0


def test_subdural_is_a_wide_crescent_and_epidural_a_thick_lens():
    _, inside, _ = head()
    half = share(inside.x - 1.2) * ~inside.infratentorial
    made = {}
    for subtype in (Subtype.SDH, Subtype.EDH):
        bleed, thickness_mm = bl.extra_axial(inside, plan(subtype, 40.0), np.random.default_rng(1), half)
        assert bleed.blood.sum() * inside.voxel_ml == pytest.approx(40, rel=0.1)
        under_bone = (np.abs(inside.depth_mm) < 0.5) & (bleed.blood > 0.3)
        made[subtype] = float(thickness_mm[bleed.blood > 0.5].max()), int(under_bone.sum())
    assert made[Subtype.EDH][0] > 1.3 * made[Subtype.SDH][0]
    assert made[Subtype.SDH][1] > 1.5 * made[Subtype.EDH][1]
    # Both are held by the midline.
    assert not (bleed.blood[inside.x < 0] > 0).any()


def test_clot_under_a_hemisphere_moves_the_midline_away():
    case = make_case("shift", 3, only("SDH", volume_ml=(110.0, 120.0)))
    assert case.truth["midline_shift_mm"] != 0
    blood_mm = np.argwhere(case.label > 0) @ case.scan.grid.affine[:3, :3].T + case.scan.grid.affine[:3, 3]
    brain_mm = np.argwhere(case.brain) @ case.scan.grid.affine[:3, :3].T + case.scan.grid.affine[:3, 3]
    side = np.sign(blood_mm[:, 0].mean() - brain_mm[:, 0].mean())
    assert np.sign(case.truth["midline_shift_mm"]) == -side


def test_noise_has_unit_variance_and_the_spectrum_of_backprojection():
    rng = np.random.default_rng(0)
    protocol = draw_protocol(rng, replace(CLEAN, matrix=256))
    noise = _noise(protocol, rng)
    assert noise.std() == pytest.approx(1, rel=0.02)
    power = (np.abs(np.fft.fft2(noise, axes=(0, 1))) ** 2).mean(axis=2)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(256, protocol.pixel_mm)] * 2))
    low, middle, high = (
        power[(frequency > a) & (frequency < b)].mean() for a, b in ((0, 0.02), (0.15, 0.3), (0.9 * frequency.max(), 9))
    )
    assert low < 0.4 * middle  # the ramp takes low frequencies out
    assert high < 0.1 * middle  # the kernel takes high ones out


def test_dense_bones_leave_a_dark_band_between_them_and_noise():
    rng = np.random.default_rng(0)
    protocol = draw_protocol(rng, replace(CLEAN, tilt_fraction=0.0))
    lattice = Lattice(protocol, rng)
    u = (lattice.u - protocol.u_mm.mean())[:, None]
    v = (lattice.v - protocol.v_mm.mean())[None, :]
    water = np.where(np.hypot(u / 70, v / 85) < 1, 30.0, -1000.0)
    bones = np.where((np.hypot(np.abs(u) - 40, v) < 14) & (water > 0), 1500.0, water)
    slices = np.repeat(np.stack([water, bones], axis=2), (1, 1), axis=2).astype(np.float32)
    hardening, noise = _projected_errors(lattice, slices)
    middle, front = hardening[46:50, 46:50, 1].mean(), hardening[46:50, 66:70, 1].mean()
    assert np.abs(hardening[..., 0]).max() < 1  # water alone is corrected
    assert -30 < middle - front < -4
    assert noise[48, 48, 1] > 1.15 * noise[48, 48, 0]


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0])
def test_cubic_kernels_keep_a_constant_and_a_ramp(sharpness):
    at = np.linspace(3, 12, 37)
    matrix = cubic_matrix(at, 16, sharpness)
    np.testing.assert_allclose(matrix @ np.ones(16, np.float32), 1, atol=1e-5)
    np.testing.assert_allclose(matrix @ np.arange(16, dtype=np.float32), at, atol=1e-4)
    assert (cubic_matrix([-5.0, 40.0], 16, sharpness) @ np.ones(16, np.float32) == 0).all()


def test_circle_and_cut_field():
    case = make_case("cut", 6, replace(CLEAN, cut_fraction=1.0, circle_fraction=1.0))
    assert case.truth["field_cut"]
    corners = case.scan.image_hu[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() == corners.min() <= -1024


@pytest.mark.parametrize(
    "wrong",
    [
        {"clean_fraction": 1.2},
        {"volume_ml": (5.0, 1.0)},
        {"slice_mm": ()},
        {"slice_mm": (0.0,)},
        {"pixel_mm": (0.0, 0.5)},
        {"tilt_deg": (0.0, 60.0)},
        {"matrix": 16},
        {"subtype_weights": {"ICH": 1.0}},
        {"subtype_weights": {"IPH": 0.0}},
        {"subtype_weights": {}},
        {"kinds_probability": (0.5, 0.4)},
        {"kinds_probability": ()},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PhantomSettings(**wrong)


@lru_cache
def real_like() -> Scan:
    """A clean tilted scan to bleed into, as if it were a patient's."""
    return make_case("patient", 21, replace(CLEAN, tilt_fraction=1.0)).scan


@pytest.mark.parametrize("name", ["EDH", "IPH", "SDH"])
def test_bleeding_into_a_scan_keeps_its_grid_and_what_does_not_bleed(name):
    scan = real_like()
    case = make_case("bled", 5, only(name), background=scan)
    assert case.scan.grid is scan.grid
    assert case.scan.forms is scan.forms
    assert case.scan.image_hu.dtype == scan.image_hu.dtype
    assert set(np.unique(case.label)) == {0, Subtype[name]}
    assert case.brain[case.label > 0].all()
    changed = case.scan.image_hu != scan.image_hu
    assert changed.any()
    assert not changed[~ndimage.binary_dilation(case.brain, np.ones((5, 5, 3)))].any()
    # Shares below one half reach beyond the masks, furthest at the thin end of a crescent.
    near = ndimage.binary_dilation((case.label > 0) | case.edema, np.ones((9, 9, 3)))
    assert (changed & ~near).sum() < 0.15 * changed.sum()
    assert case.truth["volume_ml"][name] == pytest.approx(case.truth["label_volume_ml"][name], rel=0.25)


def test_brain_estimate_of_a_known_head():
    scan = real_like()
    known = make_case("patient", 21, replace(CLEAN, tilt_fraction=1.0)).brain
    found = find_head(scan).brain
    overlap = 2 * (known & found).sum() / (known.sum() + found.sum())
    assert overlap > 0.8  # without vertebrae below the atlas the estimate takes in some of the neck
    upper = slice(known.shape[2] // 2, None)  # no base, no neck: what a subdural must follow
    assert (known & found)[:, :, upper].sum() > 0.85 * known[:, :, upper].sum()
    assert (found & ~known)[:, :, upper].sum() < 0.02 * known[:, :, upper].sum()


def test_a_scan_without_a_skull_is_refused():
    image_hu = np.full((64, 64, 20), -1000, np.int16)
    image_hu[20:40, 20:40, 5:15] = 30
    grid = Grid(image_hu.shape, np.diag([3.0, 3.0, 6.0, 1.0]))
    scan = Scan("cube", image_hu, grid, NiftiForms(grid.affine, 1), "cube.nii")
    with pytest.raises(ReadError, match="inside the skull"):
        make_case("bled", 0, only("IPH"), background=scan)


def test_kinds_that_need_csf_spaces_are_refused_in_a_real_scan():
    with pytest.raises(ConfigError, match="EDH, IPH, SDH"):
        make_case("bled", 0, only("IVH", "SAH"), background=real_like())


@pytest.mark.realdata
def test_bleeding_into_the_visible_human(real_data):
    from ich_pipeline.reading import read_scan

    scan = read_scan(real_data / "vhm_head" / "vhm_head_crop.nii.gz")
    case = make_case("vhm", 3, replace(only("IPH"), volume_ml=(20.0, 60.0)), background=scan)
    assert case.scan.image_hu.shape == scan.image_hu.shape
    assert 1100 < case.brain.sum() / 1000 < 1500  # 1 mm voxels; a brain with its CSF
    bled = case.label == Subtype.IPH
    change_hu = np.median(case.scan.image_hu[bled].astype(int) - scan.image_hu[bled])
    assert change_hu == pytest.approx(case.truth["bleeds"][0]["blood_hu"] - 32, abs=6)
    near = ndimage.binary_dilation(bled | case.edema, iterations=12)
    np.testing.assert_array_equal(case.scan.image_hu[~near], scan.image_hu[~near])
