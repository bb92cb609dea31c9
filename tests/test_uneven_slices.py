"""Slices that lie unevenly, as in a series that goes from 4 to 7 mm: each stands for half the way to its neighbours."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from heads import bleeding_head
from shapes import make_grid

from ich_pipeline.errors import GeometryError, ReadError
from ich_pipeline.geometry import Grid, grid_difference
from ich_pipeline.overlap import compare_masks
from ich_pipeline.phantom import PhantomSettings, make_case
from ich_pipeline.pictures import montage
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import NativeMask, NiftiForms, Scan
from ich_pipeline.restoring import write_mask
from ich_pipeline.transforms import ModelGridd, NativeMaskWriter, ReadMaskd, ReadScand
from ich_pipeline.volumetry import measure, with_probability_band

# As the real series of the rules: 13 steps of 4 mm, one of 1.08, 13 of 7.
STEPS_MM = np.array([4.0] * 13 + [1.08] + [7.0] * 13)
SLICES_MM = np.concatenate([[0], np.cumsum(STEPS_MM)])


def uneven_grid(tilt_deg: float = 0.0, axis: int = 2, pixel_mm: float = 1.0) -> Grid:
    """A grid whose slices lie at SLICES_MM along their normal, sheared by the tilt, stored with slices on `axis`."""
    mean_mm = STEPS_MM.mean()
    affine = np.diag([pixel_mm, pixel_mm, mean_mm, 1.0])
    affine[1, 2] = mean_mm * np.tan(np.radians(tilt_deg))
    affine[:3, 3] = (-100 * pixel_mm, -90, 20)
    n = round(200 / pixel_mm)
    order = [a for a in range(3) if a != 2]
    order.insert(axis, 2)
    shape = np.array([n, n, len(SLICES_MM)])[order]
    return Grid(tuple(int(s) for s in shape), affine[:, [*order, 3]], SLICES_MM / mean_mm)


def sphere(grid: Grid, centre_mm: tuple[float, float, float], radius_mm: float) -> NativeMask:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), axis=-1)
    inside = ((grid.to_mm(index) - centre_mm) ** 2).sum(axis=-1) <= radius_mm**2
    return NativeMask(inside.astype(np.uint8), grid)


def centre_at(grid: Grid, height_mm: float) -> tuple[float, float, float]:
    """A point in the middle of the field of view at this height above the lowest slice."""
    k = np.interp(height_mm, SLICES_MM, np.arange(len(SLICES_MM)))
    index = np.array(grid.shape) / 2
    index[grid.slice_axis] = k
    return tuple(grid.to_mm(index))


class TestGrid:
    @pytest.mark.parametrize("tilt_deg", [0, 18.5, -18.5])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_slices_lie_where_they_are_said_to(self, tilt_deg, axis):
        grid = uneven_grid(tilt_deg, axis)
        index = np.zeros((len(SLICES_MM), 3))
        index[:, axis] = np.arange(len(SLICES_MM))
        places = grid.to_mm(index)
        assert places[:, 2] - 20 == pytest.approx(SLICES_MM)
        assert places[:, 1] + 90 == pytest.approx(SLICES_MM * np.tan(np.radians(tilt_deg)))
        beyond = np.array([[3.3, 4.5, -2.2], [10, 11, 40], [5, 6, 13.5]])
        assert grid.to_index(grid.to_mm(beyond)) == pytest.approx(beyond)

    def test_extents_are_half_the_way_to_each_neighbour(self):
        extents_mm = uneven_grid().slice_extents(0, 28) * STEPS_MM.mean()
        assert extents_mm[[0, 5, 13, 14, 20, 27]] == pytest.approx([4, 4, 2.54, 4.04, 7, 7])
        # Outside the image lies more of the same.
        assert uneven_grid().slice_extents(-1, 30)[[0, -1]] * STEPS_MM.mean() == pytest.approx([4, 7])

    def test_even_positions_change_nothing(self):
        even = make_grid((20, 20, 10), (1, 1, 5))
        same = Grid(even.shape, even.affine, np.arange(10.0))
        assert grid_difference(same, even) is None
        mask = np.zeros(even.shape, np.uint8)
        mask[5:9, 5:12, 3:8] = 1
        assert measure("c", NativeMask(mask, same)) == measure("c", NativeMask(mask, even))

    def test_other_positions_are_another_grid(self):
        grid = uneven_grid()
        assert "mm apart" in grid_difference(Grid(grid.shape, grid.affine), grid)
        assert "mm apart" in grid_difference(grid, Grid(grid.shape, grid.affine))
        assert grid_difference(uneven_grid(), grid) is None

    @pytest.mark.parametrize(
        "positions", [[0, 1], [0, 2, 1, 3], [0, 1, 1, 3], [1, 2, 3, 4], [0, 1, 2, 4], [0, 1, float("nan"), 3]]
    )
    def test_positions_that_cannot_be(self, positions):
        with pytest.raises(GeometryError, match="expected 4 that rise from 0 to 3"):
            Grid((10, 10, 4), np.diag([1.0, 1, 5, 1]), np.array(positions, dtype=float))


class TestMeasuring:
    @pytest.mark.parametrize("tilt_deg", [0, 18.5, -18.5])
    @pytest.mark.parametrize("height_mm", [26, 53, 100])  # among the thin slices, at the step, among the thick
    def test_volume_of_a_sphere(self, tilt_deg, height_mm):
        grid = uneven_grid(tilt_deg)
        radius_mm = (30000 * 3 / (4 * np.pi)) ** (1 / 3)
        mask = sphere(grid, centre_at(grid, height_mm), radius_mm)
        by_hand = sum(mask.values[..., k].sum() * extent for k, extent in enumerate(grid.slice_extents(0, 28)))
        report = measure("case", mask)
        assert report.volume_ml == pytest.approx(by_hand * grid.voxel_volume_mm3 / 1000)
        assert report.volume_ml == pytest.approx(30, rel=0.015)
        assert report.lesions[0].volume_ml == report.volume_ml
        assert report.volume_low_ml < 30 < report.volume_high_ml
        # The ruler's C is the extent of the slices that hold the bleed.
        held = mask.values.any(axis=(0, 1))
        assert report.c_mm == pytest.approx(grid.slice_extents(0, 28)[held].sum() * STEPS_MM.mean())
        assert report.lesions[0].centroid_s_mm == pytest.approx(20 + height_mm, abs=2)

    def test_storage_changes_nothing(self):
        numbers = set()
        for axis in range(3):
            grid = uneven_grid(10, axis)
            report = measure("case", sphere(grid, (5, 20, 75), 22.0))
            numbers.add((round(report.volume_ml, 6), round(report.abc2_ml, 6), round(report.volume_low_ml, 6)))
        assert len(numbers) == 1

    def test_bands_edema_and_subtypes_use_each_slices_own_extent(self):
        grid = uneven_grid()
        bleed, wide = sphere(grid, (0, 0, 73), 15.0), sphere(grid, (0, 0, 73), 20.0)
        alone = measure("case", wide).volume_ml
        report = measure("case", bleed, edema=wide)
        assert report.edema_ml == pytest.approx(alone - report.volume_ml)
        kinds = NativeMask(wide.values * np.uint8(3) - bleed.values, grid)
        by_kind = measure("case", kinds, subtypes=True).subtype_ml
        assert sum(by_kind.values()) == pytest.approx(alone)
        assert by_kind[2] == pytest.approx(report.volume_ml)
        probability = np.where(bleed.values, 0.9, np.where(wide.values, 0.4, 0)).astype(np.float32)
        banded = with_probability_band(report, probability, 0.5, grid)
        assert (banded.volume_low_ml, banded.volume_high_ml) == pytest.approx((report.volume_ml, alone))

    def test_scores_weigh_slices_by_their_extent(self):
        grid = uneven_grid()
        label = NativeMask(np.zeros(grid.shape, np.uint8), grid)
        pred = NativeMask(label.values.copy(), grid)
        label.values[50:60, 50:60, [5, 20]] = 1
        pred.values[50:60, 50:60, 20] = 1
        scores = compare_masks("case", pred, label)
        assert (scores.label_ml, scores.pred_ml) == pytest.approx((1.1, 0.7))
        assert scores.dice == pytest.approx(1.4 / 1.8)
        assert scores.hausdorff_mm == pytest.approx(SLICES_MM[20] - SLICES_MM[5])
        assert scores.lesions.labelled_by_bin == (2, 0, 0, 0)


class TestFiles:
    def test_a_mask_comes_back_with_its_slices(self, tmp_path):
        grid = uneven_grid(18.5)
        mask = sphere(grid, centre_at(grid, 53), 19.3)
        write_mask(tmp_path / "mask.nii.gz", mask.values, grid, NiftiForms(grid.affine, 1))
        back, _ = read_mask(tmp_path / "mask.nii.gz")
        assert grid_difference(back.grid, grid) is None
        assert np.array_equal(back.values, mask.values)
        assert measure("c", back).volume_ml == pytest.approx(measure("c", mask).volume_ml, rel=1e-6)  # float32 affine
        # Others read the affine, with the mean step, and the voxels.
        other = nib.load(tmp_path / "mask.nii.gz")
        assert np.array_equal(np.asarray(other.dataobj), mask.values)
        assert other.affine == pytest.approx(grid.affine, abs=1e-4)
        (extension,) = other.header.extensions
        assert "ich_pipeline_slice_positions" in json.loads(extension.get_content())

    def test_an_even_mask_has_no_extension(self, tmp_path):
        grid = make_grid((60, 60, 10), (1, 1, 5))
        write_mask(tmp_path / "m.nii.gz", np.ones(grid.shape, np.uint8), grid, NiftiForms(grid.affine, 1))
        assert not nib.load(tmp_path / "m.nii.gz").header.extensions
        assert read_mask(tmp_path / "m.nii.gz")[0].grid.slice_positions is None

    @pytest.mark.parametrize("content", [b"hello", b'{"other": 1}', b"\xff" * 40])
    def test_extensions_of_others_mean_nothing(self, tmp_path, content):
        image = self.image()
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", content))
        nib.save(image, tmp_path / "m.nii.gz")
        assert read_mask(tmp_path / "m.nii.gz")[0].grid.slice_positions is None

    @pytest.mark.parametrize(
        ("positions", "message"),
        [
            ("[0, 1, x", "damaged list"),
            ("[0, 1, 2]", "damaged list"),
            ('[0, 1, 2], "affine": AFFINE', "expected 28 that rise"),
        ],
    )
    def test_damaged_positions_are_refused(self, tmp_path, positions, message):
        image = self.image()
        positions = positions.replace("AFFINE", json.dumps(image.affine[:3].tolist()))
        text = f'{{"ich_pipeline_slice_positions": {positions}}}'.encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text))
        nib.save(image, tmp_path / "m.nii.gz")
        with pytest.raises((ReadError, GeometryError), match=message):
            read_mask(tmp_path / "m.nii.gz")

    def written(self, folder: Path) -> tuple[Path, NativeMask]:
        grid = uneven_grid(18.5)
        mask = sphere(grid, centre_at(grid, 53), 19.3)
        write_mask(folder / "mask.nii.gz", mask.values, grid, NiftiForms(grid.affine, 1))
        return folder / "mask.nii.gz", mask

    @pytest.mark.parametrize("name", ["copy.nii", "copy.nii.gz", "copy.img"])
    def test_a_copy_by_another_program_that_keeps_the_grid_measures_the_same(self, tmp_path, name):
        file, mask = self.written(tmp_path)
        image = nib.load(file)
        kind = nib.Nifti1Pair if name.endswith("img") else nib.Nifti1Image
        nib.save(kind(np.asarray(image.dataobj), image.affine, image.header), tmp_path / name)
        back, _ = read_mask(tmp_path / name)
        assert measure("c", back).volume_ml == pytest.approx(measure("c", mask).volume_ml, rel=1e-6)

    def test_behind_a_long_extension_of_another_program(self, tmp_path):
        file, mask = self.written(tmp_path)
        image = nib.load(file)
        (ours,) = image.header.extensions
        long = nib.nifti1.Nifti1Extension("comment", np.random.default_rng(0).bytes(100_000))
        image.header.extensions[:] = [long, ours]
        nib.save(image, tmp_path / "long.nii.gz")
        back, _ = read_mask(tmp_path / "long.nii.gz")
        assert grid_difference(back.grid, mask.grid) is None

    def test_in_the_other_byte_order(self, tmp_path):
        file, mask = self.written(tmp_path)
        image = nib.load(file)
        header = nib.Nifti1Header(endianness=">")
        header.extensions.extend(image.header.extensions)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, header), tmp_path / "big.nii")
        assert (tmp_path / "big.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
        back, _ = read_mask(tmp_path / "big.nii")
        assert grid_difference(back.grid, mask.grid) is None

    @pytest.mark.parametrize("change", ["flip", "crop", "resample"])
    def test_an_image_that_was_changed_under_its_positions_is_refused(self, tmp_path, change):
        """nibabel carries the extension along, whatever it does to the image."""
        image = nib.load(self.written(tmp_path)[0])
        if change == "flip":
            other = image.as_reoriented(np.array([[0, 1], [1, 1], [2, -1]]))
        elif change == "crop":
            other = image.slicer[10:-10]
        else:
            affine = image.affine @ np.diag([2.0, 2.0, 1.0, 1.0])
            other = nib.Nifti1Image(np.asarray(image.dataobj)[::2, ::2], affine, image.header)
        assert len(other.header.extensions) == 1
        nib.save(other, tmp_path / "other.nii.gz")
        with pytest.raises(ReadError, match="slice positions of another grid than its own"):
            read_mask(tmp_path / "other.nii.gz")

    def image(self) -> nib.Nifti1Image:
        grid = uneven_grid()
        return nib.Nifti1Image(np.ones(grid.shape, np.uint8), grid.affine)


class TestModelGrid:
    """Slices are what the network sees, so an uneven stack goes to the model grid and back slice by slice."""

    @pytest.fixture
    def files(self, tmp_path) -> tuple[Path, Path, Grid]:
        image_hu, label, even = bleeding_head()
        n = even.shape[even.slice_axis]
        steps = np.where(np.arange(n - 1) < n // 2, 0.8, 1.2)
        positions = np.concatenate([[0], np.cumsum(steps)])
        grid = Grid(even.shape, even.affine, positions * (n - 1) / positions[-1])
        write_mask(tmp_path / "label.nii.gz", label, grid, NiftiForms(grid.affine, 1))
        header = nib.load(tmp_path / "label.nii.gz").header
        scan = nib.Nifti1Image(image_hu.astype(np.int16), grid.affine)
        scan.header.extensions.extend(header.extensions)
        nib.save(scan, tmp_path / "scan.nii.gz")
        return tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz", grid

    def test_there_and_back(self, files, tmp_path):
        scan, label, grid = files
        data = ReadMaskd("label")(ReadScand("image")({"image": scan, "label": label}))
        to_model = ModelGridd(["image", "label"], spacing_mm=(5.0, 2.0, 2.0))
        moved = to_model(data)
        moved["label"] = to_model.grid.inverse(moved["label"])
        back = np.asarray(moved["label"][0]) >= 0.5
        expected, _ = read_mask(label)
        scores = compare_masks("c", NativeMask(back.astype(np.uint8), grid), expected)
        assert scores.dice > 0.95
        writer = NativeMaskWriter()
        writer.set_data_array(back.astype(np.uint8))
        writer.set_metadata(moved["label"].meta | {"affine": moved["label"].affine})
        writer.write(tmp_path / "out.nii.gz")
        assert grid_difference(read_mask(tmp_path / "out.nii.gz")[0].grid, grid) is None

    def test_a_label_with_even_slices_is_on_another_grid(self, files, tmp_path):
        scan, label, grid = files
        mask, _ = read_mask(label)
        write_mask(tmp_path / "even.nii.gz", mask.values, Grid(grid.shape, grid.affine), NiftiForms(grid.affine, 1))
        data = ReadMaskd("label")(ReadScand("image")({"image": scan, "label": tmp_path / "even.nii.gz"}))
        with pytest.raises(GeometryError, match="label is on another grid"):
            ModelGridd(["image", "label"], spacing_mm=(5.0, 2.0, 2.0))(data)

    def test_a_picture_shows_the_rulers_where_they_lie(self, files):
        scan, label, _ = files
        read = read_scan(scan)
        assert read.flags == ("uneven_slices",)
        mask, _ = read_mask(label)
        picture = montage(read.image_hu, mask, case_id="c", report=measure("c", mask))
        assert np.asarray(picture).std() > 10


def test_phantoms_need_an_even_background(tmp_path):
    grid = uneven_grid()
    scan = Scan("ge", np.zeros(grid.shape, np.int16), grid, NiftiForms(grid.affine, 1), tmp_path)
    with pytest.raises(ReadError, match="the slices of ge lie unevenly, expected a background with equal steps"):
        make_case("p", 0, PhantomSettings(), background=scan)
