"""Slices with boxes: turned from the native grid, drawn, put together, varied; every box stays on its bleed."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scan_files import SHAPE, SPACING, centred
from training_cases import write_cases

from ich_pipeline import cli
from ich_pipeline.box_data import BoxSlices, Variation, WholeSlices, collate, load_box_cases, mosaic, rescaled
from ich_pipeline.box_evaluation import is_visible, visible_boxes
from ich_pipeline.detection import Box, ScoredBox, boxes_of_mask, read_boxes, write_boxes
from ich_pipeline.detector import AIR_HU, SliceView, fitted
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.geometry import Grid
from ich_pipeline.reading import read_mask
from ich_pipeline.training import Draw

SIZE = 64
BRIGHT_HU = 50.0  # between the made-up heads' brain (30) and bleed (65), below the skull


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = write_cases(tmp_path_factory.mktemp("cases"), "train train train val test")
    cli.data_boxes(manifest)
    return manifest


# --- tables ---------------------------------------------------------------------------------------------------------


def test_the_table_of_a_manifest_is_that_of_its_labels(manifest: Path) -> None:
    found = read_boxes(manifest.with_name("boxes.csv"))
    label = [
        box for n in range(5) for box in boxes_of_mask(f"case-{n}", read_mask(manifest.parent / f"label-{n}.nii.gz")[0])
    ]
    assert [vars(box) for box in found] == [vars(box) | {"score": 1.0} for box in label]
    assert {box.case_id for box in found} == {"case-0", "case-2", "case-3", "case-4"}  # case-1 is clean


def test_scored_boxes_are_read_back(tmp_path: Path) -> None:
    boxes = [ScoredBox("a", 1, "SDH", 0.25, 2, 3.5, 4, 0.125)]
    assert read_boxes(write_boxes(tmp_path / "boxes.csv", boxes)) == boxes
    assert read_boxes(write_boxes(tmp_path / "none.csv", [])) == []


def test_cases_get_their_boxes_and_test_cases_stay_out(manifest: Path) -> None:
    cases = load_box_cases(manifest)
    assert {name: [c.record.case_id for c in held] for name, held in cases.items()} == {
        "train": ["case-0", "case-1", "case-2"],
        "val": ["case-3"],
    }
    assert [bool(case.boxes) for case in cases["train"]] == [True, False, True]


def test_no_manifest_is_refused() -> None:
    with pytest.raises(ConfigError, match="training needs data="):
        load_box_cases(None)


def test_a_manifest_without_labels_has_no_boxes_to_make(manifest: Path, tmp_path: Path) -> None:
    scan = manifest.parent / "image-0.nii.gz"
    (tmp_path / "cases.csv").write_text("case_id,image\na,image-0.nii.gz\n")
    (tmp_path / "image-0.nii.gz").write_bytes(scan.read_bytes())
    with pytest.raises(ManifestError, match="no case has a label"):
        cli.data_boxes(tmp_path / "cases.csv")


# --- the view of a slice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "ARS", "PIR", "SPL", "IAL"])
def test_a_box_stays_on_its_pixels_in_any_order_of_storage(axes: str) -> None:
    affine = centred(SPACING, SHAPE)
    values = np.random.default_rng(0).integers(1000, size=SHAPE).astype(np.int16)
    stored = nib.Nifti1Image(values, affine)
    turned = stored.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    )
    grid = Grid(turned.shape, turned.affine)
    view = SliceView.of(grid)
    slices = view.slices(np.asarray(turned.dataobj))
    # Rows to the back, columns to the left, whatever the file's order; slices in the file's own direction.
    expected = np.moveaxis(values, 2, 0).swapaxes(1, 2)[:, ::-1, ::-1]
    assert np.array_equal(slices if "S" in axes else slices[::-1], expected)
    boxes = np.array([[3, 5, 20, 9], [0, 0, view.shape[0], view.shape[1]]])
    native = view.to_native(boxes)
    assert np.array_equal(view.from_native(native), boxes)
    k = 4
    i0, j0, i1, j1 = native[0].astype(int)
    held = np.moveaxis(np.asarray(turned.dataobj), grid.slice_axis, 0)[k, i0:i1, j0:j1]
    assert np.array_equal(np.sort(held, axis=None), np.sort(slices[k, 3:20, 5:9], axis=None))


def test_slices_are_fitted_with_air() -> None:
    images, scale = fitted(torch.full((2, 40, 20), 30, dtype=torch.int16), SIZE)
    assert (tuple(images.shape), scale) == ((2, SIZE, SIZE), 1.6)
    assert (images[:, :, :32] == 30).all()
    assert (images[:, :, 32:] == AIR_HU).all()
    same, scale = fitted(torch.arange(SIZE * SIZE).view(1, SIZE, SIZE), SIZE)
    assert scale == 1
    assert torch.equal(same.long(), torch.arange(SIZE * SIZE).view(1, SIZE, SIZE))


# --- drawing --------------------------------------------------------------------------------------------------------


def bleed_of(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of pixels that only a bleed can be."""
    return torch.nonzero((image > BRIGHT_HU) & (image < 80), as_tuple=True)


def test_whole_slices_have_their_boxes(manifest: Path) -> None:
    cases = load_box_cases(manifest)["val"]
    dataset = WholeSlices(cases, SIZE)
    assert len(dataset) == SHAPE[2]
    assert [dataset[k]["place"] for k in (0, 15)] == [("case-3", "patient-3", 0), ("case-3", "patient-3", 15)]
    with_boxes = [k for k in range(len(dataset)) if len(dataset[k]["boxes"])]
    assert with_boxes == sorted({box.slice for box in cases[0].boxes})
    for k in with_boxes:
        [[kind, r0, c0, r1, c1]] = dataset[k]["boxes"].tolist()
        inside = dataset[k]["image"][0, round(r0) : round(r1), round(c0) : round(c1)]
        outside = dataset[k]["image"][0].clone()
        outside[max(0, round(r0) - 2) : round(r1) + 2, max(0, round(c0) - 2) : round(c1) + 2] = 0
        assert kind == 5
        assert ((inside > BRIGHT_HU) & (inside < 80)).float().mean() > 0.5
        # Elsewhere only the skull's edge has such values.
        assert ((outside > BRIGHT_HU) & (outside < 80)).float().mean() < 0.03


def test_a_draw_is_a_function_of_its_seed(manifest: Path) -> None:
    dataset = BoxSlices(load_box_cases(manifest)["train"], SIZE)
    one, same, other = (dataset[Draw(0, seed)] for seed in (3, 3, 4))
    assert torch.equal(one["image"], same["image"])
    assert torch.equal(one["boxes"], same["boxes"])
    assert not torch.equal(one["image"], other["image"])


def test_slices_with_hemorrhage_are_drawn_as_often_as_asked(manifest: Path) -> None:
    still = dict.fromkeys(("mosaic", "scale", "translate", "flip_columns", "gain", "shift_hu"), 0.0)
    cases = load_box_cases(manifest)["train"]
    for share in (0.0, 1.0):
        dataset = BoxSlices(cases, SIZE, share, still)
        held = [len(dataset[Draw(0, seed)]["boxes"]) > 0 for seed in range(60)]
        natural = len({box.slice for box in cases[0].boxes}) / SHAPE[2]
        assert np.mean(held) == pytest.approx(share or natural, abs=0 if share else 0.2)
        assert not any(len(dataset[Draw(1, seed)]["boxes"]) for seed in range(5))  # a clean case stays clean


def test_unvaried_draws_are_the_slices_themselves(manifest: Path) -> None:
    still = dict.fromkeys(("mosaic", "scale", "translate", "flip_columns", "gain", "shift_hu"), 0.0)
    cases = load_box_cases(manifest)["train"][:1]
    drawn = BoxSlices(cases, SIZE, 1.0, still)[Draw(0, 5)]
    whole = WholeSlices(cases, SIZE)
    assert any(
        torch.equal(drawn["image"], item["image"]) and torch.equal(drawn["boxes"], item["boxes"]) for item in whole
    )


def test_flips_take_boxes_along(manifest: Path) -> None:
    cases = load_box_cases(manifest)["train"][:1]
    still = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "gain": 0.0, "shift_hu": 0.0}
    one = BoxSlices(cases, SIZE, 1.0, {**still, "flip_columns": 0.0, "flip_rows": 0.0})[Draw(0, 5)]
    other = BoxSlices(cases, SIZE, 1.0, {**still, "flip_columns": 1.0, "flip_rows": 1.0})[Draw(0, 5)]
    assert torch.equal(other["image"], one["image"].flip(1, 2))
    assert other["boxes"][0, 1:].tolist() == pytest.approx([SIZE - x for x in one["boxes"][0, [3, 4, 1, 2]].tolist()])


def square(size: int, r0: int, c0: int, r1: int, c1: int) -> tuple[torch.Tensor, np.ndarray]:
    image = torch.full((size, size), 30.0)
    image[r0:r1, c0:c1] = 65
    return image, np.array([[1.0, r0, c0, r1, c1]])


def boxes_hold_all_bright_pixels(image: torch.Tensor, rows: np.ndarray, slack: float) -> bool:
    inside = torch.zeros(image.shape, dtype=torch.bool)
    for _, r0, c0, r1, c1 in rows:
        top, left = (max(0, int(np.floor(x - slack))) for x in (r0, c0))
        inside[top : int(np.ceil(r1 + slack)), left : int(np.ceil(c1 + slack))] = True
    return bool(inside[bleed_of(image)].all())


@pytest.mark.parametrize("seed", range(8))
def test_a_mosaic_keeps_boxes_on_their_bleeds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slices = [square(SIZE, 4 * n + 8, 20, 4 * n + 24, 44 - 4 * n) for n in range(4)]
    image, rows = mosaic(slices, rng)
    assert image.shape == (2 * SIZE, 2 * SIZE)
    assert len(rows) == 4
    assert boxes_hold_all_bright_pixels(image, rows, 0)
    # What lies wholly in the picture is all there.
    whole = (rows[:, 1:] >= 0).all(axis=1) & (rows[:, 1:] <= 2 * SIZE).all(axis=1)
    areas = [float((image[int(r[1]) : int(r[3]), int(r[2]) : int(r[4])] == 65).float().mean()) for r in rows[whole]]
    assert areas == [1.0] * int(whole.sum())
    assert whole.any()


@pytest.mark.parametrize("seed", range(8))
def test_scaling_and_moving_keep_boxes_on_their_bleeds(seed: int) -> None:
    image, rows = square(SIZE, 20, 12, 44, 30)
    varied, moved = rescaled(image, rows, SIZE, Variation(), np.random.default_rng(seed))
    assert varied.shape == (SIZE, SIZE)
    assert boxes_hold_all_bright_pixels(varied, moved, 1)
    r, c = bleed_of(varied)
    seen = [r.min(), c.min(), r.max() + 1, c.max() + 1]
    assert moved[0, 1:].tolist() == pytest.approx([float(x) for x in seen], abs=1.0)


def test_a_box_of_which_little_is_left_is_no_target() -> None:
    image, rows = square(SIZE, 0, 0, 20, 20)
    # A window of 32 from (16, 16): a fifth of each side is left, 4 % of the area.
    variation = Variation(scale=0.0, translate=0.0)
    _, kept = rescaled(image, rows, SIZE // 2, variation, np.random.default_rng(0))
    assert len(kept) == 0
    _, kept = rescaled(image, np.array([[1.0, 0, 0, 30, 30]]), SIZE // 2, variation, np.random.default_rng(0))
    assert kept.tolist() == [[1, 0, 0, 14, 14]]


def test_a_batch_names_the_image_of_each_box() -> None:
    items = [
        {"image": torch.zeros(1, 4, 4), "boxes": torch.tensor([[2.0, 0, 0, 1, 1], [5.0, 1, 1, 3, 3]])},
        {"image": torch.ones(1, 4, 4), "boxes": torch.zeros(0, 5)},
        {"image": torch.ones(1, 4, 4), "boxes": torch.tensor([[1.0, 0, 0, 2, 2]])},
    ]
    batch = collate(items)
    assert batch["image"].shape == (3, 1, 4, 4)
    assert batch["targets"].tolist() == [[0, 2, 0, 0, 1, 1], [0, 5, 1, 1, 3, 3], [2, 1, 0, 0, 2, 2]]


# --- visible boxes --------------------------------------------------------------------------------------------------


def at(i0: float, j0: float, i1: float, j1: float, k: int = 0) -> Box:
    return Box("a", k, "any", i0, j0, i1, j1)


def found(i0: float, j0: float, i1: float, j1: float, k: int = 0) -> ScoredBox:
    return ScoredBox("a", k, "any", i0, j0, i1, j1, 0.5)


def test_visible_is_a_matter_of_millimetres_along_both_sides() -> None:
    assert is_visible(at(0, 0, 10, 20), (0.5, 0.25), 5.0)
    assert not is_visible(at(0, 0, 20, 10), (0.5, 0.25), 5.0)
    assert not is_visible(at(0, 0, 9.9, 20), (0.5, 0.25), 5.0)


def test_what_is_not_visible_is_neither_missed_nor_false() -> None:
    large, small = at(0, 0, 20, 20), at(50, 50, 57, 60)
    pred = [
        found(1, 1, 20, 20),  # takes the large one
        found(48, 50, 58, 60),  # takes the small one, though it is large itself
        found(80, 80, 84, 84),  # too small to count
        found(80, 20, 100, 40),  # false
        found(50, 50, 62, 60, k=1),  # in another slice: false
    ]
    kept, label = visible_boxes(pred, [large, small], {"a": (0.5, 0.5)}, 4.0)
    assert label == [large]
    assert kept == [pred[0], pred[3], pred[4]]
