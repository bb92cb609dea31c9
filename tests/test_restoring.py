"""A mask is written on the scan's grid, to the bit, and read back the same."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scan_files import (
    GANTRY_TILT,
    MATRICES,
    SHAPE,
    SPACING,
    centred,
    head_series,
    nifti_image,
    rotation,
    save,
    save_series,
)

from ich_pipeline.errors import GeometryError
from ich_pipeline.geometry import Grid, grid_difference
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import NiftiForms
from ich_pipeline.restoring import write_mask


def some_mask(shape, seed=0):
    return (np.random.default_rng(seed).random(shape) > 0.9).astype(np.uint8)


def assert_same_header(mask_path, scan_path):
    """Shape, both forms with their codes, pixdim and unit, bit for bit, by a reader that is not ours."""
    mask, scan = nib.load(mask_path), nib.load(scan_path)
    assert mask.shape == scan.shape[:3]
    for name in ("srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d"):
        assert mask.header[name].tobytes() == scan.header[name].astype(mask.header[name].dtype).tobytes(), name
    assert mask.header.sizeof_hdr == scan.header.sizeof_hdr
    for name in ("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"):
        assert mask.header[name] == scan.header[name]
    np.testing.assert_array_equal(mask.header["pixdim"][:4], scan.header["pixdim"][:4])
    for form in ("get_sform", "get_qform"):
        (found, found_code), (want, want_code) = (getattr(image, form)(coded=True) for image in (mask, scan))
        assert found_code == want_code
        assert (found is None and want is None) or np.array_equal(found, want)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert mask.get_data_dtype() == np.uint8


def round_trip(image, tmp_path, **fields):
    scan_path = save(image, tmp_path / "scan.nii", **fields)
    scan = read_scan(scan_path)
    values = some_mask(scan.grid.shape)
    write_mask(tmp_path / "mask.nii.gz", values, scan.grid, scan.forms)
    assert_same_header(tmp_path / "mask.nii.gz", scan_path)
    mask, forms = read_mask(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.values, values)
    np.testing.assert_array_equal(mask.grid.affine, scan.grid.affine)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), values)
    assert (forms.sform_code, forms.qform_code) == (scan.forms.sform_code, scan.forms.qform_code)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("codes", [(1, 0), (1, 1), (2, 1), (4, 2), (0, 1), (0, 3)])
def test_header_comes_back(tmp_path, name, codes):
    image = nifti_image(MATRICES[name])
    sform_code, qform_code = codes
    image.set_qform(image.affine, qform_code)
    if not sform_code:
        image.set_sform(np.zeros((4, 4)) + 7, 0)  # nonsense that does not count, but comes back
    round_trip(image, tmp_path, sform_code=sform_code)


def test_header_of_other_units_and_odd_qfac_comes_back(tmp_path):
    image = nifti_image()
    image.set_sform(np.diag([1e-3, 1e-3, 1e-3, 1]) @ image.affine, 1)
    image.header.set_xyzt_units("meter", "sec")
    round_trip(image, tmp_path)


def test_time_axis_of_one_is_not_written(tmp_path):
    image = nifti_image()
    round_trip(nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine, image.header), tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    angles=st.tuples(*[st.floats(-180, 180)] * 2),
    shear=st.floats(-0.5, 0.5),
    qform_code=st.integers(0, 4),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
def test_any_affine_comes_back(tmp_path, order, signs, angles, shear, qform_code, kind):
    """Permuted, mirrored, rotated, sheared: float32 rounding of a quaternion is where bits get lost."""
    sheared = np.diag([4.0, 4.5, 9.0]) @ np.array([[1, 0, 0], [0, 1, shear], [0, 0, 1]])
    matrix = rotation(*angles) @ sheared[:, list(order)] * np.array(signs)
    shape = tuple(np.array([42, 46, 20])[list(order)].tolist())
    image = nifti_image(matrix, shape, kind=kind)
    image.set_qform(image.affine, qform_code)
    round_trip(image, tmp_path)


def test_qform_of_nifti_2_that_float32_cannot_hold_comes_back(tmp_path):
    # Turned by half a circle but for a degree: the quaternion's real part is what its other three leave of one.
    image = nifti_image(rotation(1.0, 1.0) @ np.diag([-4.0, -4.5, 9.0]), kind=nib.Nifti2Image)
    image.set_qform(image.affine, 1)
    image.set_sform(np.diag([9.0, 9, 9, 1]), 0)
    round_trip(image, tmp_path)


@pytest.mark.parametrize("tilt_deg", [0, 18.5, -25])
def test_mask_of_a_dicom_series_keeps_its_tilt(tmp_path, tilt_deg):
    scan = read_scan(save_series(head_series(tilt_deg), tmp_path / "series"))
    write_mask(tmp_path / "mask.nii.gz", some_mask(scan.grid.shape), scan.grid, scan.forms)
    image = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(image.affine, scan.grid.affine, rtol=1e-6, atol=1e-5)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 0 if tilt_deg else 1)
    mask, _ = read_mask(tmp_path / "mask.nii.gz")
    assert grid_difference(mask.grid, scan.grid) is None
    assert mask.grid.voxel_volume_mm3 == pytest.approx(198, rel=1e-6)


@pytest.mark.realdata
def test_real_scan_header_comes_back(real_data, tmp_path):
    path = real_data / "vhm_head" / "vhm_head_crop.nii.gz"
    scan = read_scan(path)
    write_mask(tmp_path / "m.nii.gz", scan.image_hu > 60, scan.grid, scan.forms)
    assert_same_header(tmp_path / "m.nii.gz", path)


class TestFile:
    """The file itself: whole, reproducible, and refused when it would lie."""

    grid = Grid(SHAPE, centred(GANTRY_TILT, SHAPE))
    forms = NiftiForms(grid.affine, 1)

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("rows", [slice(0), slice(3, 9), slice(43, 44), slice(None)])
    def test_voxels_in_any_memory_order(self, tmp_path, order, rows):
        values = np.zeros(SHAPE, np.uint8, order=order)
        values[rows] = np.random.default_rng(0).integers(0, 6, SHAPE)[rows]
        write_mask(tmp_path / "m.nii.gz", values, self.grid, self.forms)
        np.testing.assert_array_equal(read_mask(tmp_path / "m.nii.gz")[0].values, values)

    def test_same_mask_same_bytes(self, tmp_path):
        for name in ("a.nii.gz", "b.nii.gz"):
            write_mask(tmp_path / name, some_mask(SHAPE), self.grid, self.forms)
        assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
        assert len(gzip.decompress((tmp_path / "a.nii.gz").read_bytes())) == 352 + np.prod(SHAPE)

    def test_folder_is_made_and_nothing_else_left_in_it(self, tmp_path):
        write_mask(tmp_path / "new" / "m.nii.gz", some_mask(SHAPE).astype(bool), self.grid, self.forms)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.nii.gz"]

    def test_another_shape_is_refused(self, tmp_path):
        with pytest.raises(GeometryError, match=r"mask \(44, 50, 15\), scan \(44, 50, 16\)"):
            write_mask(tmp_path / "m.nii.gz", some_mask((44, 50, 15)), self.grid, self.forms)

    def test_forms_of_another_grid_are_refused(self, tmp_path):
        with pytest.raises(GeometryError, match="forms describe another grid"):
            write_mask(tmp_path / "m.nii.gz", some_mask(SHAPE), self.grid, NiftiForms(centred(SPACING, SHAPE), 1))
        assert not (tmp_path / "m.nii.gz").exists()

    def test_scores_and_other_names_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="mask of float32"):
            write_mask(tmp_path / "m.nii.gz", some_mask(SHAPE).astype(np.float32), self.grid, self.forms)
        with pytest.raises(ValueError, match=r"written as \.nii\.gz"):
            write_mask(tmp_path / "m.nii", some_mask(SHAPE), self.grid, self.forms)
