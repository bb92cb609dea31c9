import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapes import ellipsoid, empty, make_grid, reorient
from test_abc2 import ORDERS

from ich_pipeline.agreement import volume_agreement
from ich_pipeline.geometry import Grid
from ich_pipeline.pictures import bland_altman_plot, montage, volume_scatter, write_png
from ich_pipeline.records import NativeMask
from ich_pipeline.volumetry import measure

RED, GREEN, YELLOW, BLUE = (255, 92, 72), (64, 214, 160), (255, 214, 64), (96, 190, 255)
TILE_PX = 128
CAPTION_PX = 64


def head(grid: Grid) -> np.ndarray:
    """A skull around brain in air, with a bright dot far to the right and in front."""
    image_hu = np.full(grid.shape, -1000, np.int16)
    image_hu[ellipsoid(grid, (60, 80, 70)).values] = 900
    image_hu[ellipsoid(grid, (54, 74, 64)).values] = 30
    image_hu[ellipsoid(grid, (6, 6, 30), centre_mm=(35, 35, 0)).values] = 80
    return image_hu


# Every fourth voxel, on which the head is found, is the same from both ends; the bleed has a middle slice.
GRID = make_grid((69, 89, 29), (2, 2, 5), tilt_deg=12)
HEAD_HU = head(GRID)
BLEED = ellipsoid(GRID, (18, 10, 14), centre_mm=(-20, 10, 0))


def draw(image_hu: np.ndarray, mask: NativeMask, **options: object) -> Image.Image:
    return montage(image_hu, mask, case_id="case7", tile_px=TILE_PX, **options)


def pixels(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(n, 2) rows and columns below the caption."""
    return np.argwhere((np.asarray(picture.convert("RGB"))[CAPTION_PX:] == colour).all(axis=-1))


def test_every_order_of_storage_gives_the_same_picture() -> None:
    expected = np.asarray(draw(HEAD_HU, BLEED, report=measure("case7", BLEED)).convert("L"), dtype=float)
    for order in ORDERS[::3]:
        mask = reorient(BLEED, order)
        image_hu = reorient(NativeMask(HEAD_HU, GRID), order).values
        found = np.asarray(draw(image_hu, mask, report=measure("case7", mask)).convert("L"), dtype=float)
        # Slice numbers count in the order of storage.
        assert np.mean(np.abs(found - expected) > 40) < 0.01


def test_flags_have_a_line_of_their_own() -> None:
    plain = np.asarray(draw(HEAD_HU, BLEED).convert("L"))
    flagged = np.asarray(draw(HEAD_HU, BLEED, flags=["gantry_tilt", "padding"]).convert("L"))
    line_px = len(flagged) - len(plain)
    assert 15 < line_px < 30
    np.testing.assert_array_equal(flagged[CAPTION_PX + line_px :], plain[CAPTION_PX:])
    assert flagged[CAPTION_PX - 10 : CAPTION_PX + line_px - 10].max() > 100
    assert not plain[CAPTION_PX - 10 : CAPTION_PX].any()


def test_right_is_left_and_front_is_up() -> None:
    picture = draw(HEAD_HU, empty(GRID), tiles=(1, 1))
    tile = np.asarray(picture.convert("L"))[CAPTION_PX:]
    inside = tile[30:98, 40:88]  # within the skull
    down, across = np.argwhere(inside > 200).mean(axis=0)
    assert down < inside.shape[0] / 2, "anterior is up"
    assert across < inside.shape[1] / 2, "the patient's right is on the left"


def test_outlines_and_diameters_have_their_colours() -> None:
    label = ellipsoid(GRID, (16, 12, 14), centre_mm=(-18, 10, 0))
    picture = draw(HEAD_HU, BLEED, label=label, report=measure("case7", BLEED))
    assert picture.mode == "P"
    for colour in (RED, GREEN, YELLOW, BLUE):
        assert len(pixels(picture, colour)) > 5, colour
    # Without a label or a bleed there is nothing of their colour, in the caption neither.
    clean = np.asarray(draw(HEAD_HU, empty(GRID)).convert("RGB"))[CAPTION_PX:]
    assert not any((clean == colour).all(axis=-1).any() for colour in (RED, GREEN, YELLOW, BLUE))


def test_lines_have_their_length_in_the_picture() -> None:
    picture = draw(HEAD_HU, BLEED, tiles=(1, 1))
    report = measure("case7", BLEED)
    # The head, 160 mm long with the margin of its box, fills the tile.
    a_px = np.ptp(pixels(picture, YELLOW)[:, 1])
    b_px = np.ptp(pixels(picture, BLUE)[:, 0])
    assert a_px / b_px == pytest.approx(report.a_mm / report.b_mm, rel=0.15)
    assert a_px / TILE_PX == pytest.approx(report.a_mm / 176, rel=0.1)


def test_pixels_keep_their_proportions() -> None:
    for spacing_mm in ((1.0, 4.0, 5.0), (4.0, 1.0, 5.0)):
        grid = make_grid((round(160 / spacing_mm[0]), round(160 / spacing_mm[1]), 5), spacing_mm)
        image_hu = np.where(ellipsoid(grid, (60, 60, 500)).values, 900, -1000).astype(np.int16)
        tile = np.asarray(draw(image_hu, empty(grid), tiles=(1, 1)).convert("L"))[CAPTION_PX + 20 : -20] > 250
        rows, columns = (np.flatnonzero(tile[:, 10:-10].any(axis=axis)) for axis in (1, 0))
        assert np.ptp(columns) == pytest.approx(np.ptp(rows), rel=0.25)


@pytest.mark.parametrize("slice_mm", [1.0, 5.0])
def test_the_index_slice_is_always_shown(slice_mm: float) -> None:
    grid = make_grid((60, 60, round(150 / slice_mm)), (3, 3, slice_mm))
    image_hu = np.full(grid.shape, 30, np.int16)
    mask = ellipsoid(grid, (20, 15, 50), centre_mm=(0, 0, 7))
    for tiles in ((4, 3), (1, 1), (3, 1)):
        assert len(pixels(draw(image_hu, mask, tiles=tiles), YELLOW)) > 5


@pytest.mark.parametrize("values", ["one voxel", "full", "one slice image"])
def test_extremes_can_be_drawn(values: str) -> None:
    grid = make_grid((64, 64, 1 if values == "one slice image" else 9), (2, 2, 5))
    mask = empty(grid)
    mask.values[30, 30, 0] = True
    if values == "full":
        mask.values[...] = True
    picture = draw(np.full(grid.shape, -1000, np.int16), mask, report=measure("case7", mask))
    assert picture.size == (4 * TILE_PX, CAPTION_PX + 3 * TILE_PX)
    assert values == "full" or len(pixels(picture, RED)) >= 1, "a single voxel has an outline"


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="case7: image, mask and label have shapes"):
        draw(HEAD_HU[1:], BLEED)


def test_png_is_written_whole(tmp_path: Path) -> None:
    write_png(tmp_path / "pictures" / "case7.png", draw(HEAD_HU, BLEED))
    with Image.open(tmp_path / "pictures" / "case7.png") as picture:
        picture.load()
        assert picture.mode == "P"
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["case7.png"]


@pytest.mark.parametrize("plot", [bland_altman_plot, volume_scatter])
def test_plots_of_a_cohort(tmp_path: Path, plot: object) -> None:
    rng = np.random.default_rng(0)
    reference = [*rng.lognormal(2.5, 1, 60), 4.0, 5.0]
    estimate = [*(value * factor for value, factor in zip(reference, rng.normal(1, 0.1, 60), strict=False)), 0.0, None]
    agreement = volume_agreement(reference, estimate, [str(n) for n in range(62)], replicates=200)
    figure = plot(reference, estimate, agreement, reference_name="voxels", estimate_name="ABC/2")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "61 scans of 61 patients, 1 without a number"
    assert len(axes.collections[0].get_offsets()) == 62
    assert np.isfinite(axes.collections[0].get_offsets()).all(axis=1).sum() == 61
    write_png(tmp_path / "plot.png", figure)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1050, 750)


def test_a_plot_of_one_pair_has_no_limits() -> None:
    agreement = volume_agreement([3.0], [4.0], ["p"])
    figure = bland_altman_plot([3.0], [4.0], agreement, reference_name="x", estimate_name="y")
    assert [text.get_text() for text in figure.axes[0].texts] == ["bias +1.0 mL"]


@pytest.mark.slow
def test_a_picture_takes_60_ms(tmp_path: Path) -> None:
    grid = make_grid((512, 512, 28), (0.49, 0.49, 5))
    rng = np.random.default_rng(0)
    image_hu = (head(grid) + rng.normal(0, 4, grid.shape)).astype(np.int16)
    mask = ellipsoid(grid, (25, 15, 20))
    report = measure("case7", mask)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        write_png(tmp_path / "case7.png", montage(image_hu, mask, case_id="case7", report=report))
        seconds.append(time.process_time() - start)
    assert np.median(seconds) <= 0.06
