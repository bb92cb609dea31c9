import gzip
import itertools
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist, squareform
from shapes import ellipsoid, empty, make_grid, reorient

from ich_pipeline.abc2 import TIE_MM, Abc2, caliper_lines_mm, lesion_box, measure_abc2
from ich_pipeline.geometry import Grid
from ich_pipeline.records import NativeMask

ORDERS = [
    np.column_stack([order, signs])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def random_blob(seed: int) -> NativeMask:
    """A ragged body, often in several parts, on a grid with random tilt, turn and spacing."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(6, 28, 3))
    noise = gaussian_filter(rng.standard_normal(shape), rng.uniform(0, 2.5))
    values = noise > np.quantile(noise, rng.uniform(0.5, 0.99))
    spacing_mm = tuple(rng.uniform(0.3, 3, 3))
    return NativeMask(
        values, make_grid(shape, spacing_mm, tilt_deg=rng.uniform(-25, 25), turn_deg=rng.uniform(-30, 30))
    )


def brute_force(mask: NativeMask) -> tuple[float, float, float, float]:
    """A, B, C and Kothari's C by another road: all pixel corners in 3D, Qhull, all pairs, slices tied one by one."""
    voxels = np.argwhere(mask.values)
    inverse = np.linalg.inv(mask.grid.affine[:3, :3])
    towards_head = np.abs(inverse[:, 2]) / np.sqrt((inverse**2).sum(axis=1))
    across = int(towards_head.argmax())
    slices, areas = np.unique(voxels[:, across], return_counts=True)
    offsets = np.array([(a, b, c) for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (-0.5, 0.5)])
    offsets = offsets[offsets[:, across] > 0] * (np.arange(3) != across)
    best = (0.0, 0.0)
    for k in slices[areas == areas.max()]:
        corners = (voxels[voxels[:, across] == k][:, None] + offsets).reshape(-1, 3) @ mask.grid.affine[:3, :3].T
        corners = np.unique(corners.round(9), axis=0)
        _, _, basis = np.linalg.svd(corners - corners.mean(axis=0), full_matrices=False)
        flat = (corners - corners.mean(axis=0)) @ basis[:2].T
        hull = flat[ConvexHull(flat).vertices]
        distances = squareform(pdist(hull))
        longest = distances.max()
        widths = []
        for one, other in np.argwhere(np.triu(distances >= longest - TIE_MM)):
            angle = np.arctan2(*(hull[other] - hull[one])[::-1])
            widths.append(np.ptp(flat @ (-np.sin(angle), np.cos(angle))))
        if longest > best[0] + TIE_MM or (longest > best[0] - TIE_MM and max(widths) > best[1]):
            best = (longest, max(widths))
    step = 1 / np.linalg.norm(inverse[across])
    weights = [1.0 if area / areas.max() >= 0.75 else 0.5 if area / areas.max() >= 0.25 else 0.0 for area in areas]
    return *best, step * len(slices), step * sum(weights)


def numbers(found: Abc2) -> tuple[float, float, float, float]:
    return found.a_mm, found.b_mm, found.c_mm, found.c_kothari_mm


# Pixel corners jut out of the body by up to half a diagonal, so that 0.5 % takes pixels of 0.05 mm. The heights at
# which slices hold 100, 75 and 25 % of the area are whole numbers of 22 slices, within 0.3 %.
@pytest.mark.parametrize(
    ("axes", "tilt_deg", "turn_deg", "pixel_mm"),
    [
        ("RAS", 0, 0, (0.05, 0.05)),
        ("LPS", 18, 0, (0.05, 0.05)),
        ("PIR", 0, 25, (0.04, 0.06)),
        ("SAL", -22, 10, (0.06, 0.04)),
    ],
)
def test_rules_on_an_ellipsoid(axes: str, tilt_deg: float, turn_deg: float, pixel_mm: tuple[float, float]) -> None:
    shape = (round(40.8 / pixel_mm[0]), round(30.6 / pixel_mm[1]), 46)
    grid = make_grid(shape, (*pixel_mm, 12 / 22), axes=axes, tilt_deg=tilt_deg, turn_deg=turn_deg)
    found = measure_abc2(ellipsoid(grid, (20, 15, 12)))
    true_ml = 4 / 3 * np.pi * 20 * 15 * 12 / 1000
    assert found.abc2_ml / true_ml == pytest.approx(3 / np.pi, rel=5e-3)
    assert found.tada_ml / true_ml == pytest.approx(1, rel=5e-3)
    # Slices with 75 % and 25 % of the area end at 1/2 and sqrt(3)/2 of the half height.
    assert found.abc2_kothari_ml / true_ml == pytest.approx(3 / np.pi * (0.5 + (np.sqrt(3) / 2 - 0.5) / 2), rel=5e-3)
    assert found.abc2_kothari_ml / true_ml == pytest.approx(0.652, rel=5e-3)


@pytest.mark.parametrize("turn_deg", [0, 17, 45, 80])
def test_diameters_ignore_how_the_body_is_turned(turn_deg: float) -> None:
    grid = make_grid((120, 240, 3), (0.4, 0.2, 5), tilt_deg=20)
    found = measure_abc2(ellipsoid(grid, (20, 12, 30), turn_deg=turn_deg))
    # A corner juts out by at most half a pixel's diagonal, 0.22 mm, at each end.
    assert 40 - 0.1 <= found.a_mm <= 40 + 0.45
    assert 24 - 0.1 <= found.b_mm <= 24 + 0.6


def test_one_voxel_by_hand() -> None:
    grid = make_grid((5, 5, 5), (3, 4, 6))
    mask = empty(grid)
    mask.values[2, 2, 2] = True
    # The diagonal of a 3 x 4 pixel is 5; across it the pixel is 2 x area / diagonal = 4.8 wide.
    assert numbers(measure_abc2(mask)) == pytest.approx((5, 4.8, 6, 6))


def test_empty_mask_measures_nothing() -> None:
    mask = empty(make_grid((4, 5, 6)))
    assert measure_abc2(mask) == Abc2()
    assert measure_abc2(mask).tada_ml == 0
    assert caliper_lines_mm(mask) is None
    assert lesion_box(mask.values) is None


def test_one_slice_and_full_image_by_hand() -> None:
    grid = make_grid((30, 40, 1), (1, 1, 5))
    assert numbers(measure_abc2(NativeMask(np.ones(grid.shape, bool), grid))) == pytest.approx((50, 48, 5, 5))
    grid = make_grid((30, 40, 6), (1, 1, 5))
    assert numbers(measure_abc2(NativeMask(np.ones(grid.shape, np.uint8), grid))) == pytest.approx((50, 48, 30, 30))


def test_slices_between_two_parts_do_not_count() -> None:
    mask = empty(make_grid((10, 10, 10), (1, 1, 5)))
    mask.values[2:5, 2:5, (1, 2, 7)] = True
    assert measure_abc2(mask).c_mm == 15


def test_kothari_weights_at_their_edges() -> None:
    mask = empty(make_grid((10, 10, 8)))
    for k, area in enumerate((8, 6, 5, 2, 1)):
        mask.values[:area, 0, k + 1] = True
    # 8 and 6 of 8 count 1, 5 and 2 count 0.5, 1 counts 0.
    assert measure_abc2(mask).c_kothari_mm == 3
    assert measure_abc2(mask).c_mm == 5


def test_of_equal_areas_the_slice_with_the_longest_a_counts_then_the_widest_b() -> None:
    mask = empty(make_grid((20, 20, 9)))
    mask.values[:4, :3, 1] = True  # 12 pixels, diagonal 5
    mask.values[:12, 0, 4] = True  # 12 pixels, diagonal 12.04
    found = measure_abc2(mask)
    assert (found.index_slice, found.a_mm) == (4, pytest.approx(np.hypot(12, 1)))
    mask.values[...] = False
    mask.values[:4, :3, 1] = True
    mask.values[[0, 3], 0, 5] = mask.values[[0, 3], 2, 5] = mask.values[[1, 2], 1, 5] = True
    mask.values[1:3, :3:2, 5] = mask.values[[0, 3], 1, 5] = True  # the same pixels again: a tie in A and B
    found = measure_abc2(mask)
    assert found.index_slice == 5, "equal in A and B and equally far from the centroid: the upper one"
    mask.values[:4, :3, 2] = True
    assert measure_abc2(mask).index_slice == 2, "now nearest to the centroid"


def test_of_equal_diameters_the_one_with_the_widest_b_counts() -> None:
    mask = empty(make_grid((20, 30, 1)))
    for pixel in ((0, 0), (14, 19), (6, 23), (10, 5)):
        mask.values[(*pixel, 0)] = True
    found = measure_abc2(mask)
    # From corner (0, 0) both (15, 20) and (7, 24) are 25 away. Across the first, corner (6, 24) lies 9.6 to one side
    # and (11, 5) 5.8 to the other; across the second it is 0.96 and 9.16.
    assert found.a_mm == pytest.approx(25)
    assert found.b_mm == pytest.approx(9.6 + 5.8)


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_order_of_storage_changes_nothing(seed: int) -> None:
    mask = random_blob(seed)
    expected, lines = numbers(measure_abc2(mask)), caliper_lines_mm(mask)
    for order in ORDERS:
        other = reorient(mask, order)
        assert numbers(measure_abc2(other)) == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(caliper_lines_mm(other), lines, atol=2e-4)
        np.testing.assert_allclose(
            caliper_lines_mm(NativeMask(np.asfortranarray(other.values), other.grid)), lines, atol=2e-4
        )


def test_order_of_storage_does_not_decide_ties() -> None:
    # A box ties in every slice and in both diagonals of each.
    mask = empty(make_grid((9, 11, 8), (0.7, 0.7, 2), tilt_deg=12))
    mask.values[2:7, 2:7, 1:7] = True
    expected, lines = numbers(measure_abc2(mask)), caliper_lines_mm(mask)
    for order in ORDERS:
        other = reorient(mask, order)
        assert numbers(measure_abc2(other)) == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(caliper_lines_mm(other), lines, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_second_implementation_agrees_on_random_bodies(seed: int) -> None:
    mask = random_blob(seed)
    assert numbers(measure_abc2(mask)) == pytest.approx(brute_force(mask), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_lines_are_as_long_as_the_numbers_and_stand_square(seed: int) -> None:
    mask = random_blob(seed)
    found, lines = measure_abc2(mask), caliper_lines_mm(mask)
    a, b = (np.subtract(*line) for line in lines)
    assert np.linalg.norm(a) == pytest.approx(found.a_mm, abs=5e-4)
    assert np.linalg.norm(b) == pytest.approx(found.b_mm, abs=5e-4)
    assert abs(a @ b) <= 1e-3 * (found.a_mm + found.b_mm)
    index = np.linalg.solve(mask.grid.affine[:3, :3], lines[0][0] - mask.grid.affine[:3, 3])
    assert index[mask.grid.slice_axis] == pytest.approx(found.index_slice, abs=1e-3)


@given(box=st.tuples(*[st.tuples(st.integers(0, 6), st.integers(0, 6))] * 3), order=st.sampled_from("CF"))
def test_box_holds_exactly_the_lesion(box: tuple[tuple[int, int], ...], order: str) -> None:
    values = np.zeros((7, 7, 7), np.uint8, order=order)
    low, high = np.sort(box, axis=1).T
    values[tuple(low)] = values[tuple(high)] = 3
    assert lesion_box(values) == tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
    assert lesion_box(values[::-1].astype(bool)) is not None


def real_masks(folder: Path, every: int) -> list[NativeMask]:
    """Every n-th of the annotated masks, read by nibabel."""

    archive = folder / "hemorrhage_masks" / "masks.zip"
    if not archive.exists():
        pytest.skip(f"no annotated masks at {archive}")
    found = []
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".nii.gz"))
        for name in names[::every]:
            image = nib.Nifti1Image.from_bytes(gzip.decompress(files.read(name)))
            values = np.asarray(image.dataobj)
            found.append(NativeMask((values != 0).astype(np.uint8), Grid(values.shape, image.affine)))
    return found


@pytest.mark.realdata
@pytest.mark.parametrize("every", [35, pytest.param(1, marks=pytest.mark.slow)])
def test_a_second_implementation_agrees_on_real_masks(real_data: Path, every: int) -> None:
    for mask in real_masks(real_data, every):
        if mask.values.any():
            assert numbers(measure_abc2(mask)) == pytest.approx(brute_force(mask), abs=1e-4)
