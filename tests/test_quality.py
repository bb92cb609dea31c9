"""Each flag is set by what it names and not by a plain head."""

import numpy as np
import pytest
from heads import bleeding_head, oracle_bundle, save_nifti
from numpy.typing import NDArray
from scan_files import SPACING, grid_points

from ich_pipeline.bundles import Bundle
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter
from ich_pipeline.phantom.cases import make_case
from ich_pipeline.pipeline import Pipeline
from ich_pipeline.quality import fit_flags, scan_flags
from ich_pipeline.reading import read_scan
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import RunReport


@pytest.fixture(scope="module")
def head() -> tuple[NDArray[np.int16], Grid]:
    scan = make_case("phantom", 4).scan
    scan.image_hu.flags.writeable = False
    return scan.image_hu, scan.grid


def upper_centre(grid: Grid) -> NDArray[np.float64]:
    """Middle of the field, RAS+ mm: inside the brain, above the skull base."""
    return grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3]


def with_tube(image_hu: NDArray[np.int16], grid: Grid, hu: int, length_mm: float) -> NDArray[np.int16]:
    """A rod of 4 mm across through the brain, from front to back."""
    x, y, z = np.moveaxis(grid_points(grid) - upper_centre(grid), -1, 0)
    changed = image_hu.copy()
    changed[(np.abs(y) < length_mm / 2) & (np.abs(x) < 2) & (np.abs(z) < 4)] = hu
    return changed


def moved(image_hu: NDArray[np.int16], grid: Grid, by_mm: float) -> NDArray[np.int16]:
    """From the fifth slice above the middle on the head lies further back."""
    rows = grid.plane_axes[0]
    above = [slice(None)] * 3
    middle = grid.shape[grid.slice_axis] // 2
    upwards = grid.affine[2, grid.slice_axis] > 0
    above[grid.slice_axis] = slice(middle + 4, None) if upwards else slice(None, middle - 4)
    changed = image_hu.copy()
    changed[tuple(above)] = np.roll(changed[tuple(above)], round(by_mm / grid.edge_mm[rows]), axis=rows)
    return changed


# The last two lean by 24 and 15 degrees: forehead and face come into their slices one after the other.
@pytest.mark.parametrize("seed", [0, 2, 7, 15793235383387715774, 17001588116213493145])
def test_plain_heads_have_none(seed: int) -> None:
    scan = make_case("phantom", seed).scan
    assert scan_flags(scan.image_hu, scan.grid) == ()


@pytest.mark.realdata
def test_real_head_has_none(real_data) -> None:
    scan = read_scan(real_data / "vhm_head" / "vhm_head_crop.nii.gz")
    assert scan_flags(scan.image_hu, scan.grid) == ()


@pytest.mark.parametrize(
    ("hu", "length_mm", "expected"),
    [
        (250, 60, ("contrast_suspected",)),
        (450, 60, ("contrast_suspected",)),
        (250, 20, ()),  # a calcification
        (90, 60, ()),  # dense blood
        (3071, 40, ("metal_suspected",)),
        (2500, 40, ()),  # enamel
        (3071, 2, ()),  # less than METAL_ML: a few voxels
    ],
)
def test_bright_things(head, hu: int, length_mm: float, expected: tuple[str, ...]) -> None:
    image_hu, grid = head
    assert scan_flags(with_tube(image_hu, grid, hu, length_mm), grid) == expected


@pytest.mark.parametrize(("by_mm", "expected"), [(6, ("motion_suspected",)), (-6, ("motion_suspected",)), (2, ())])
def test_a_step_of_the_head(head, by_mm: float, expected: tuple[str, ...]) -> None:
    image_hu, grid = head
    assert scan_flags(moved(image_hu, grid, by_mm), grid) == expected
    # The same scan stored the other way round.
    affine = grid.affine @ np.array([[0, 0, -1, grid.shape[0] - 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    turned = np.flip(moved(image_hu, grid, by_mm), 0).transpose(1, 2, 0)
    assert scan_flags(turned, Grid(turned.shape, affine)) == expected


def test_uneven_slices_are_not_asked_for_motion(head) -> None:
    image_hu, grid = head
    positions = np.linspace(0, 1, grid.shape[grid.slice_axis]) ** 1.1 * (grid.shape[grid.slice_axis] - 1)
    assert scan_flags(moved(image_hu, grid, 6), Grid(grid.shape, grid.affine, positions)) == ()


def test_an_image_without_bone_has_no_flag() -> None:
    grid = Grid((60, 60, 10), np.diag([2.0, 2, 5, 1]))
    assert scan_flags(np.full(grid.shape, 30, np.int16), grid) == ()


@pytest.mark.parametrize(
    ("model_mm", "strong"),
    [((5, 0.5, 0.5), False), ((5, 0.14, 0.5), True), ((16, 0.5, 0.5), True), ((15, 1.4, 0.5), False)],
)
def test_strong_resampling(model_mm: tuple[float, float, float], strong: bool) -> None:
    grid = Grid((100, 100, 20), np.diag([0.5, 0.5, 5, 1]))
    model = np.diag([*model_mm, 1])[[2, 1, 0, 3]]  # slices first, as the networks have them
    assert fit_flags(grid, model, None) == (("strong_resampling",) if strong else ())


@pytest.mark.parametrize(
    ("trained", "fits"),
    [([2.5, 5.0], True), ([4.6, 4.6], True), ([1.0, 3.0], False), ([6.0, 8.0], False), (None, True)],
)
def test_slice_spacing_of_the_training(trained, fits: bool) -> None:
    grid = Grid((100, 100, 20), np.diag([0.5, 0.5, 5, 1]))
    assert fit_flags(grid, grid.affine, trained) == (() if fits else ("untrained_slice_spacing",))


def test_flags_reach_row_and_picture_and_change_no_number(tmp_path) -> None:
    bundle = oracle_bundle(tmp_path / "bundle")
    shape = (44, 50, 16)
    rows, pictures = {}, {}
    for name, centre_mm in (("inside", (-25, 20, 8)), ("below", (-25, 10, -88))):
        image_hu, _, grid = bleeding_head(centre_mm, 15.0, SPACING, shape)
        (tmp_path / name).mkdir()
        case = CaseRecord("head", save_nifti(tmp_path / f"{name}.nii.gz", image_hu, grid))
        segmenter = Segmenter(Bundle(bundle), Bundle(bundle).config("inference"))
        segmenter.trained_slice_mm = [1.0, 5.0] if name == "inside" else None
        pipeline = Pipeline(segmenter, tmp_path / name, tmp_path / name, RunReport({}))
        rows[name] = pipeline.run(case)
        pictures[name] = (tmp_path / name / "head.png").read_bytes()
        if name == "inside":
            segmenter.trained_slice_mm = None
            again = pipeline.run(case)
            assert (again.report, again.flags) == (rows[name].report, ())
            assert (tmp_path / name / "head.png").read_bytes() != pictures[name]
    assert rows["inside"].flags == ("untrained_slice_spacing",)
    assert rows["below"].flags == ("touches_border",)
