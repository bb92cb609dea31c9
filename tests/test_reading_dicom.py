"""DICOM in: order, steps and tilt from positions alone, and a refusal by name for a series without one affine."""

import copy
import shutil

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from scan_files import LPS_RAS, ct_slices, grid_points, head_hu, head_series, save_series, slice_positions

from ich_pipeline.dicom import series_grid
from ich_pipeline.dicom.stack import describe_steps
from ich_pipeline.errors import GeometryError, IchError, ReadError
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import NativeMask
from ich_pipeline.restoring import write_mask
from ich_pipeline.volumetry import measure


def assert_is_head(scan):
    """Every voxel shows what the head has at the place where the affine puts it (edges may round either way)."""
    assert (np.abs(scan.image_hu - head_hu(grid_points(scan.grid))) > 0.5).mean() < 1e-3


@pytest.fixture
def series():
    return head_series()


@pytest.mark.parametrize("tilt_deg", [0, 18.5, -18.5, 0.3])
def test_every_voxel_lies_where_its_slice_says(tmp_path, tilt_deg):
    scan = read_scan(save_series(head_series(tilt_deg), tmp_path / "head 1"))
    assert scan.case_id == "head 1"
    assert scan.image_hu.shape == (44, 50, 14)
    assert scan.image_hu.dtype == np.int16
    assert scan.grid.tilt_deg == pytest.approx(abs(tilt_deg), abs=1e-4)
    assert scan.grid.voxel_volume_mm3 == pytest.approx(4.0 * 4.5 * 11.0, rel=1e-6)
    assert scan.grid.slice_spacing_mm == pytest.approx(11.0, rel=1e-6)
    assert ("gantry_tilt" in scan.flags) == (abs(tilt_deg) > 0.5)
    assert (scan.forms.sform_code, scan.forms.qform_code) == (1, 0 if tilt_deg else 1)
    assert (scan.forms.qform is None) == bool(tilt_deg)
    assert scan.source == tmp_path / "head 1"
    assert_is_head(scan)


def test_file_names_and_instance_numbers_do_not_matter(tmp_path, series):
    expected = read_scan(save_series(series, tmp_path / "a"))
    for name, dataset in zip(np.random.default_rng(0).permutation(len(series)), series, strict=True):
        dataset.filename = f"{name}.dcm"
        dataset.InstanceNumber = int(name)
        dataset.SliceLocation = float(name)
    scan = read_scan(save_series(series, tmp_path / "b"))
    np.testing.assert_array_equal(scan.image_hu, expected.image_hu)
    np.testing.assert_array_equal(scan.grid.affine, expected.grid.affine)


@pytest.mark.parametrize("flip", [(-1, 1), (1, -1), (-1, -1)])
def test_feet_first_and_mirrored_orientations(tmp_path, flip):
    centres, orientation = slice_positions(12, [11.0] * 13)
    scan = read_scan(save_series(ct_slices(centres, orientation * np.array(flip)[:, None]), tmp_path / "x"))
    assert_is_head(scan)


def test_coronal_series(tmp_path):
    orientation = np.array([[1.0, 0, 0], [0, 0, -1.0]])
    centres = np.zeros((16, 3))
    centres[:, 1] = np.arange(16) * 11.0 - 82
    scan = read_scan(save_series(ct_slices(centres, orientation), tmp_path / "x"))
    assert_is_head(scan)


def test_unlike_pixel_spacings_and_nested_folders(tmp_path):
    datasets = ct_slices(*slice_positions(10, [11.0] * 13), matrix=(90, 44), spacing_mm=(2.5, 4.0))
    save_series(datasets[:6], tmp_path / "x" / "a")
    save_series(datasets[6:], tmp_path / "x" / "b" / "c")
    (tmp_path / "x" / "README.txt").write_text("not DICOM")
    assert_is_head(read_scan(tmp_path / "x"))


def test_jitter_of_positions_is_no_unevenness(tmp_path):
    steps = 11 + np.random.default_rng(0).uniform(-0.01, 0.01, 13)
    assert_is_head(read_scan(save_series(head_series(15, steps), tmp_path / "x")))


class TestSteps:
    """Even steps make an affine, uneven ones a grid that knows its slices; what is missing is named."""

    @pytest.mark.parametrize("tilt_deg", [0, 15])
    def test_two_zones(self, tmp_path, tilt_deg):
        steps = [4.002] * 9 + [1.081] + [6.999] * 13
        scan = read_scan(save_series(head_series(tilt_deg, steps), tmp_path / "x"))
        assert "uneven_slices" in scan.flags
        heights_mm = scan.grid.slice_positions * scan.grid.slice_spacing_mm
        assert np.diff(heights_mm) == pytest.approx(steps)
        assert scan.grid.tilt_deg == pytest.approx(tilt_deg, abs=0.01)

    def test_missing_slice(self, tmp_path, series):
        with pytest.raises(
            ReadError, match=r"missing at 1 gap\(s\): 22\.000 mm.*5 x 11\.000, 1 x 22\.000, 6 x 11\.000 mm"
        ):
            read_scan(save_series(series[:6] + series[7:], tmp_path / "x"))

    @pytest.mark.parametrize(("deviation_mm", "ok"), [(0.1, True), (0.12, False)])
    def test_tolerance_of_one_percent(self, tmp_path, deviation_mm, ok):
        folder = save_series(head_series(0, [11.0] * 12 + [11 + deviation_mm]), tmp_path / "x")
        if ok:
            assert read_scan(folder).grid.slice_positions is None
        else:
            assert read_scan(folder).flags == ("uneven_slices",)

    def test_table_that_moves_sideways(self, tmp_path, series):
        for dataset in series[7:]:
            dataset.ImagePositionPatient[0] += 3
        with pytest.raises(ReadError, match=r"slices lie up to 1\.385 mm beside the line from first to last"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_description_counts_runs(self):
        assert describe_steps(np.array([0, 5, 10, 15.01, 17, 19])) == "3 x 5.003, 2 x 1.995 mm"


class TestDuplicates:
    """Copies are dropped and flagged; two different slices at one place are never stacked."""

    def test_same_file_twice(self, tmp_path, series):
        save_series(series, tmp_path / "x")
        for name in ("3.dcm", "4.dcm"):
            shutil.copy(tmp_path / "x" / name, tmp_path / "x" / f"copy of {name}")
        scan = read_scan(tmp_path / "x")
        assert scan.flags == ("duplicate_slices",)
        assert_is_head(scan)

    def twin(self, dataset):
        twin = copy.deepcopy(dataset)
        twin.SOPInstanceUID = twin.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        twin.filename = "twin.dcm"
        return twin

    def test_same_pixels_under_another_uid(self, tmp_path, series):
        scan = read_scan(save_series([*series, self.twin(series[5])], tmp_path / "x"))
        assert scan.flags == ("duplicate_slices",)
        assert_is_head(scan)

    def test_other_pixels_at_one_position(self, tmp_path, series):
        twin = self.twin(series[5])
        twin.AcquisitionNumber = 2
        twin.PixelData = (twin.pixel_array + 40).tobytes()
        with pytest.raises(
            ReadError, match=r"2 different slices at .*acquisition numbers: 1 \(14 slices\), 2 \(1 slices\)"
        ):
            read_scan(save_series([*series, twin], tmp_path / "x"))


class TestSeries:
    """Which of the files in a folder are the scan."""

    def changed(self, datasets, **values):
        others = copy.deepcopy(datasets)
        for number, dataset in enumerate(others):
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.filename = f"other {number}.dcm"
            for name, value in values.items():
                setattr(dataset, name, value)
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        return others

    def test_localizers_and_other_classes_are_left_out(self, tmp_path, series):
        localizer = self.changed(series[:2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        capture = self.changed(series[2:3], SOPClassUID="1.2.840.10008.5.1.4.1.1.7", SeriesInstanceUID=generate_uid())
        capture[0].filename, capture[0].NumberOfFrames = "capture.dcm", 3
        scan = read_scan(save_series([*series, *localizer, *capture], tmp_path / "x"))
        assert scan.series.uid == series[0].SeriesInstanceUID
        assert_is_head(scan)

    def test_two_studies_are_never_one_series(self, tmp_path, series):
        other = self.changed(series, StudyInstanceUID=generate_uid())
        with pytest.raises(ReadError, match="2 studies"):
            read_scan(save_series([*series, *other], tmp_path / "x"))

    def test_thickness_does_not_split_a_series(self, tmp_path, series):
        for dataset in series[7:]:
            dataset.SliceThickness = 7
        assert_is_head(read_scan(save_series(series, tmp_path / "x")))

    def test_primary_images_come_before_derived_ones(self, tmp_path, series):
        derived = self.changed(series, SeriesInstanceUID=generate_uid(), ImageType=["DERIVED", "SECONDARY", "AXIAL"])
        scan = read_scan(save_series([*derived, *series], tmp_path / "x"))
        assert (scan.series.uid, scan.flags) == (series[0].SeriesInstanceUID, ())

    def test_derived_images_alone_are_read_and_flagged(self, tmp_path, series):
        derived = self.changed(series, ImageType=["DERIVED", "SECONDARY", "AXIAL"])
        assert read_scan(save_series(derived, tmp_path / "x")).flags == ("secondary_image",)

    def test_index_of_a_medium_is_left_out(self, tmp_path, series):
        index = self.changed(series[:1])[0]
        index.filename, index.file_meta.MediaStorageSOPClassUID = "DICOMDIR", "1.2.840.10008.1.3.10"
        del index.SOPClassUID
        assert_is_head(read_scan(save_series([*series, index], tmp_path / "x")))

    @pytest.mark.parametrize("keep", [0, 100, 150, 400, 500])
    def test_a_slice_cut_off_in_its_header_is_not_left_out(self, tmp_path, series, keep):
        path = save_series(series, tmp_path / "x") / "13.dcm"  # the last: without it steps would be even
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ReadError):
            read_scan(tmp_path / "x")

    def test_no_ct_image(self, tmp_path, series):
        folder = save_series(self.changed(series, SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), tmp_path / "x")
        with pytest.raises(ReadError, match="holds 14 x MR Image Storage, expected a series of CT"):
            read_scan(folder)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ReadError, match="holds no DICOM file"):
            read_scan(tmp_path / "empty")


class TestHeaders:
    """What a slice must say, and all slices alike."""

    @pytest.mark.parametrize(
        "name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "BitsStored"]
    )
    @pytest.mark.parametrize("empty", [True, False])
    def test_missing_element(self, tmp_path, series, name, empty):
        if empty:
            setattr(series[3], name, None)
        else:
            delattr(series[3], name)
        with pytest.raises(ReadError, match=f"1 of 14 slices have no {name}"):
            read_scan(save_series(series, tmp_path / "x"))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PixelSpacing", [4.5, 4.1]),
            ("ImageOrientationPatient", [1, 0, 0, 0, 0.9998, 0.02]),
            ("Rows", 49),
        ],
    )
    def test_mixed_slices(self, tmp_path, series, name, value):
        setattr(series[3], name, value)
        what = "matrix" if name == "Rows" else name
        with pytest.raises(ReadError, match=rf"slices differ in {what}: 13 x .*, 1 x .*expected one"):
            read_scan(save_series(series, tmp_path / "x"))

    @pytest.mark.parametrize("orientation", [[1, 0, 0, 0.1, 0.99, 0], [2, 0, 0, 0, 2, 0], [0, 0, 0, 0, 0, 0]])
    def test_broken_orientation(self, tmp_path, series, orientation):
        for dataset in series:
            dataset.ImageOrientationPatient = orientation
        with pytest.raises(ReadError, match="two unit vectors at right angles"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_zero_spacing(self, tmp_path, series):
        for dataset in series:
            dataset.PixelSpacing = [0, 4.0]
        with pytest.raises(GeometryError, match=r"x: affine .* is singular"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_centimetres(self, tmp_path, series):
        for dataset in series:
            dataset.PixelSpacing = [0.045, 0.04]
        with pytest.raises(GeometryError, match=r"x: field of view"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_one_slice(self, tmp_path, series):
        with pytest.raises(ReadError, match="one slice only"):
            read_scan(save_series(series[:1], tmp_path / "x"))

    @pytest.mark.parametrize(("kind", "ok"), [("OD", False), ("US", False), ("HU", True), ("", True)])
    def test_rescale_type(self, tmp_path, series, kind, ok):
        series[2].RescaleType = kind
        folder = save_series(series, tmp_path / "x")
        if ok:
            assert_is_head(read_scan(folder))
        else:
            with pytest.raises(ReadError, match=f"RescaleType {kind}"):
                read_scan(folder)

    @pytest.mark.parametrize(("name", "value"), [("ImagePositionPatient", [0, 0]), ("PixelSpacing", [4.5])])
    def test_too_few_numbers(self, tmp_path, series, name, value):
        setattr(series[3], name, value)
        with pytest.raises(ReadError, match=f"1 of 14 slices have no {name}"):
            read_scan(save_series(series, tmp_path / "x"))

    @pytest.mark.filterwarnings("ignore")  # pydicom names every odd value
    def test_any_damage_to_a_file_is_a_refusal_or_no_matter(self, tmp_path, series):
        folder = save_series(series[:4], tmp_path / "x")
        path = folder / "2.dcm"
        good = path.read_bytes()
        header_end = good.index(b"\xe0\x7f\x10\x00")
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(150):
            content = bytearray(good)
            for position in rng.integers(132, header_end, 3):
                content[position] = rng.integers(256)
            path.write_bytes(content)
            try:
                read_scan(folder)
            except IchError:
                refused += 1
        assert 20 < refused < 150

    @pytest.mark.parametrize(
        ("name", "value"), [("BitsStored", 17), ("BitsStored", 0), ("HighBit", 16), ("PixelRepresentation", 2)]
    )
    def test_impossible_bits(self, tmp_path, series, name, value):
        setattr(series[2], name, value)
        with pytest.raises(ReadError, match="BitsStored, HighBit"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_colour(self, tmp_path, series):
        series[2].SamplesPerPixel = 3
        with pytest.raises(ReadError, match="3 samples a pixel"):
            read_scan(save_series(series, tmp_path / "x"))


class TestPixels:
    """Stored values to HU."""

    def test_rescale_may_vary_by_slice(self, tmp_path, series):
        for number, dataset in enumerate(series):
            slope = 0.5 + 0.1 * number
            hu = dataset.pixel_array - 1024.0
            dataset.PixelData = np.round((hu + 1100) / slope).astype(np.int16).tobytes()
            dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.3f}", -1100
        scan = read_scan(save_series(series, tmp_path / "x"))
        assert scan.image_hu.dtype == np.float32
        assert (np.abs(scan.image_hu - head_hu(grid_points(scan.grid))) > 1).mean() < 1e-3

    @pytest.mark.parametrize(("intercept", "dtype"), [(-1024, np.int16), (-1024.5, np.float32)])
    def test_int16_where_exact(self, tmp_path, series, intercept, dtype):
        for dataset in series:
            dataset.RescaleIntercept = intercept
        assert read_scan(save_series(series, tmp_path / "x")).image_hu.dtype == dtype

    def test_unsigned_sixteen_bits_do_not_wrap(self, tmp_path, series):
        for dataset in series:
            pixels = dataset.pixel_array.astype(np.uint16)
            pixels[0, 0] = 60000
            dataset.PixelRepresentation, dataset.PixelData = 0, pixels.tobytes()
        scan = read_scan(save_series(series, tmp_path / "x"))
        assert (scan.image_hu[0, 0] == 60000 - 1024).all()

    @pytest.mark.parametrize("signed", [0, 1])
    def test_bits_above_the_high_bit_are_dropped(self, tmp_path, series, signed):
        for dataset in series:
            hu = dataset.pixel_array.astype(np.int32) - 1024
            stored = (hu if signed else hu + 1024) & 0x0FFF  # twelve bits, the sign in the twelfth
            dataset.PixelData = (stored | 0xA000).astype(np.uint16).tobytes()  # an old overlay above them
            dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, signed
            dataset.RescaleIntercept = 0 if signed else -1024
        assert_is_head(read_scan(save_series(series, tmp_path / "x")))

    @pytest.mark.parametrize(
        ("padding", "intercept", "flagged"), [(-2000, 0, True), (0, -1024, False), (9, -1024, True)]
    )
    def test_padding_is_told_by_its_stored_value(self, tmp_path, series, padding, intercept, flagged):
        for dataset in series:
            pixels = (dataset.pixel_array.astype(np.int32) - 1024 - intercept).astype(np.int16)
            pixels[:4] = padding
            dataset.PixelData, dataset.RescaleIntercept = pixels.tobytes(), intercept
            dataset.add_new(0x00280120, "SS", padding)
        scan = read_scan(save_series(series, tmp_path / "x"))
        assert (scan.image_hu[:, :4] == -1024).all()
        assert scan.image_hu[:, 4:].min() == -1000
        assert (scan.flags == ("padding",)) == flagged

    def test_padding_range_and_wrong_sign(self, tmp_path, series):
        for dataset in series:
            pixels = dataset.pixel_array - 1024
            pixels[:4], pixels[4] = -2000, -1990
            dataset.PixelData, dataset.RescaleIntercept = pixels.astype(np.int16).tobytes(), 0
            dataset.add_new(0x00280120, "US", 63536)  # -2000 read as unsigned
            dataset.add_new(0x00280121, "US", 63546)
        scan = read_scan(save_series(series, tmp_path / "x"))
        assert (scan.image_hu[:, :5] == -1024).all()

    def test_padding_below_int16_does_not_wrap(self, tmp_path, series):
        for dataset in series:
            pixels = dataset.pixel_array.copy()
            pixels[:4] = -32768  # -33792 after the intercept
            dataset.PixelData = pixels.tobytes()
        scan = read_scan(save_series(series, tmp_path / "x"))
        assert scan.image_hu.dtype == np.int16
        assert (scan.image_hu[:, :4] == -1024).all()

    def test_padding_without_its_tag(self, tmp_path, series):
        for dataset in series:
            pixels = dataset.pixel_array - 1024
            pixels[:4] = -3024
            dataset.PixelData, dataset.RescaleIntercept = pixels.astype(np.int16).tobytes(), 0
        scan = read_scan(save_series(series, tmp_path / "x"))
        assert scan.flags == ("padding",)
        assert scan.image_hu.min() == -1024

    def test_padding_that_is_tissue_is_refused(self, tmp_path, series):
        for dataset in series:
            dataset.add_new(0x00280120, "SS", 1024 + 30)
        with pytest.raises(ReadError, match="PixelPaddingValue is 30 HU, a tissue value"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_inverted_display_changes_nothing(self, tmp_path, series):
        for dataset in series:
            dataset.PhotometricInterpretation = "MONOCHROME1"
        assert_is_head(read_scan(save_series(series, tmp_path / "x")))

    def test_not_in_hu(self, tmp_path, series):
        for dataset in series:
            dataset.RescaleIntercept = 0
        with pytest.raises(ReadError, match="x: values run from 24"):
            read_scan(save_series(series, tmp_path / "x"))

    def test_cut_off_pixels(self, tmp_path, series):
        folder = save_series(series, tmp_path / "x")
        path = folder / "3.dcm"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ReadError, match=r"3\.dcm cannot be"):
            read_scan(folder)


def test_grid_without_pixels_is_the_grid_with_them(tmp_path):
    folder = save_series(head_series(18), tmp_path / "x")
    np.testing.assert_array_equal(series_grid(folder, "x").affine, read_scan(folder).grid.affine)


@pytest.fixture
def ge_lower_half(real_data, tmp_path):
    """The evenly spaced lower half (4 mm) of the real tilted series, in a folder that may be written."""
    folder = tmp_path / "lower"
    folder.mkdir()
    for number in range(1, 14):
        shutil.copyfile(real_data / "ge_head_dicom" / f"{number:02}.dcm", folder / f"{number:02}.dcm")
    return folder


@pytest.mark.realdata
class TestRealSeries:
    """A GE head at 18.5 degrees: 13 steps of 4 mm, one of 1.08, 13 of 7."""

    def test_tilt_and_values(self, ge_lower_half):
        scan = read_scan(ge_lower_half)
        assert scan.image_hu.shape == (512, 512, 13)
        assert scan.flags == ("padding", "gantry_tilt")
        assert scan.grid.tilt_deg == pytest.approx(18.5, abs=0.01)
        assert scan.grid.voxel_volume_mm3 == pytest.approx(0.4882812**2 * 4.002, rel=1e-3)
        for number, k in ((1, 0), (13, 12)):  # positions rise with the file names here
            stored = pydicom.dcmread(ge_lower_half / f"{number:02}.dcm").pixel_array
            np.testing.assert_array_equal(scan.image_hu[:, :, k].T, np.where(stored == -1500, -1024, stored))

    def test_places_of_the_slices(self, real_data):
        scan = read_scan(real_data / "ge_head_dicom")
        assert set(scan.flags) == {"padding", "gantry_tilt", "uneven_slices"}
        heights_mm = scan.grid.slice_positions * scan.grid.slice_spacing_mm
        assert describe_steps(heights_mm) == "13 x 4.002, 1 x 1.081, 13 x 6.999 mm"
        for k, number in ((0, 1), (13, 14), (27, 28)):  # positions rise with the file names here
            header = pydicom.dcmread(real_data / "ge_head_dicom" / f"{number:02}.dcm", stop_before_pixels=True)
            expected_mm = np.array(header.ImagePositionPatient, float) * LPS_RAS
            assert scan.grid.to_mm(np.array([0, 0, k])) == pytest.approx(expected_mm, abs=0.01)

    @pytest.mark.parametrize("slice_number", [6, 13, 14, 21], ids=["4 mm", "step", "overlap", "7 mm"])
    def test_sphere_of_30_ml(self, real_data, tmp_path, slice_number):
        """Drawn slice by slice with each slice's own position; truth is the sum of area x extent along the normal."""
        radius_mm = (30_000 * 3 / (4 * np.pi)) ** (1 / 3)
        datasets = [pydicom.dcmread(path) for path in sorted((real_data / "ge_head_dicom").glob("*.dcm"))]
        middle = datasets[slice_number]
        row, column = np.reshape(np.array(middle.ImageOrientationPatient, float), (2, 3))
        spacing = float(middle.PixelSpacing[0])
        centre_lps = np.array(middle.ImagePositionPatient, float) + 256 * spacing * (row + column)
        normal = np.cross(row, column)
        r, c = np.mgrid[:512, :512][..., None]
        area_mm2 = []
        for n, dataset in enumerate(datasets):
            corner = np.array(dataset.ImagePositionPatient, float)
            points = corner + c * spacing * row + r * spacing * column
            inside = np.linalg.norm(points - centre_lps, axis=-1) < radius_mm
            pixels = dataset.pixel_array.copy()
            pixels[inside] = 1234
            pixels[~inside & (pixels == 1234)] = 1233
            dataset.PixelData = pixels.tobytes()
            dataset.save_as(tmp_path / f"{n}.dcm")
            area_mm2.append(inside.sum() * spacing**2)
        positions_mm = np.array([np.dot(d.ImagePositionPatient, normal) for d in datasets])
        truth_ml = (np.array(area_mm2) * np.gradient(positions_mm)).sum() / 1000

        scan = read_scan(tmp_path, "ge")
        sphere = (scan.image_hu == 1234).astype(np.uint8)
        report = measure("ge", NativeMask(sphere, scan.grid))
        assert report.volume_ml == pytest.approx(truth_ml, rel=1e-3)
        assert report.volume_ml == pytest.approx(30.0, rel=0.01)
        # What one affine and multiplied spacings would have said.
        naive_ml = sphere.sum() * np.prod(scan.grid.edge_mm) / 1000
        assert abs(naive_ml / truth_ml - 1) > 0.05
        # The file that is written measures the same.
        write_mask(tmp_path / "mask.nii.gz", sphere, scan.grid, scan.forms)
        again, _ = read_mask(tmp_path / "mask.nii.gz")
        assert measure("ge", again).volume_ml == pytest.approx(report.volume_ml, rel=1e-5)
