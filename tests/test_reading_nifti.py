"""NIfTI in: the right affine, the right numbers, and a refusal by name for what leaves either open."""

import gzip
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scan_files import GANTRY_TILT, MATRICES, SHAPE, SPACING, centred, grid_points, head_hu, nifti_image, rotation, save
from shapes import make_grid

from ich_pipeline.errors import GeometryError, IchError, ReadError
from ich_pipeline.geometry import Grid
from ich_pipeline.nifti import MAX_VOXELS
from ich_pipeline.reading import read_mask, read_scan


def assert_is_head(scan, tolerance_hu=0.0):
    """Every voxel shows what the head has at the place where the affine puts it (edges may round either way)."""
    wrong = np.abs(scan.image_hu - head_hu(grid_points(scan.grid))) > tolerance_hu
    assert wrong.mean() < 1e-3


@pytest.mark.parametrize("name", MATRICES)
def test_scan_shows_the_head_where_its_affine_says(tmp_path, name):
    scan = read_scan(save(nifti_image(MATRICES[name]), tmp_path / "a b=c.nii.gz"))
    assert scan.case_id == "a b=c"
    assert scan.image_hu.dtype == np.int16
    assert scan.grid.voxel_volume_mm3 == pytest.approx(abs(np.linalg.det(MATRICES[name])), rel=1e-6)
    assert ("gantry_tilt" in scan.flags) == (name == "sheared")
    assert_is_head(scan)


def test_qform_counts_where_the_sform_has_no_code(tmp_path):
    matrix = rotation(17, 9) @ np.diag([-4.0, 4.5, 11.0])
    image = nifti_image(matrix)
    image.set_qform(image.affine, 1)
    image.set_sform(np.diag([9.0, 9, 9, 1]), 0)
    scan = read_scan(save(image, tmp_path / "q.nii"))
    assert np.linalg.det(scan.grid.affine[:3, :3]) < 0
    assert scan.forms.sform_code == 0
    assert_is_head(scan)


def test_qfac_of_zero_counts_as_one(tmp_path):
    image = nifti_image()
    image.set_qform(image.affine, 1)
    path = save(image, tmp_path / "q.nii", sform_code=0, pixdim=(0, 0))
    assert_is_head(read_scan(path))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_versions_and_byte_orders(tmp_path, kind, byte_order):
    image = nifti_image(kind=kind)
    header = image.header.as_byteswapped(byte_order)
    image = kind(image.dataobj, image.affine, header)
    single = kind is not nib.Nifti1Pair
    path = tmp_path / ("x.nii.gz" if single else "x.img")
    nib.save(image, path)
    scan = read_scan(path)
    assert scan.case_id == "x"
    assert scan.image_hu.dtype.isnative
    assert_is_head(scan)
    if not single:
        assert_is_head(read_scan(tmp_path / "x.hdr"))
        path.unlink()
        with pytest.raises(ReadError, match=r"no x\.img beside it"):
            read_scan(tmp_path / "x.hdr")


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_other_types_become_float32(tmp_path, dtype):
    scan = read_scan(save(nifti_image(dtype=dtype), tmp_path / "x.nii"))
    assert scan.image_hu.dtype == np.float32
    assert_is_head(scan)


@pytest.mark.parametrize(("slope", "inter"), [(1.0, -1024.0), (0.5, -1200.0)])
def test_slope_and_intercept_are_applied(tmp_path, slope, inter):
    image = nifti_image()
    stored = ((np.asarray(image.dataobj) - inter) / slope).astype(np.uint16)
    stored_image = nib.Nifti1Image(stored, image.affine, nib.Nifti1Header())
    stored_image.header.set_xyzt_units("mm")
    scan = read_scan(save(stored_image, tmp_path / "x.nii", scl_slope=slope, scl_inter=inter))
    assert scan.image_hu.dtype == np.float32
    assert_is_head(scan)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_no_slope_means_no_scaling(tmp_path, slope):
    path = save(nifti_image(), tmp_path / "x.nii", scl_slope=slope, scl_inter=7)
    scan = read_scan(path)
    assert scan.image_hu.dtype == np.int16
    assert_is_head(scan)


def test_trailing_time_axis_of_one_is_dropped(tmp_path):
    image = nifti_image()
    four = nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine, image.header)
    scan = read_scan(save(four, tmp_path / "x.nii"))
    assert scan.image_hu.shape == SHAPE
    assert_is_head(scan)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3)])
def test_other_units_are_scaled_to_mm(tmp_path, unit, scale):
    image = nifti_image()
    affine = np.diag([scale, scale, scale, 1]) @ image.affine
    image.set_sform(affine, 1)
    image.header.set_xyzt_units(unit)
    scan = read_scan(save(image, tmp_path / "x.nii"))
    assert "units_scaled" in scan.flags
    assert_is_head(scan)
    np.testing.assert_allclose(scan.forms.sform, affine, rtol=1e-6)  # the mask is written in the unit of the scan


def test_unknown_unit_is_mm(tmp_path):
    scan = read_scan(save(nifti_image(), tmp_path / "x.nii", xyzt_units=0))
    assert scan.flags == ()
    assert_is_head(scan)


def test_wrong_unit_is_caught_by_the_size_of_the_head(tmp_path):
    image = nifti_image()
    image.set_sform(np.diag([1e-3, 1e-3, 1e-3, 1]) @ image.affine, 1)
    with pytest.raises(GeometryError, match="voxel volume"):
        read_scan(save(image, tmp_path / "x.nii"))


class TestForms:
    """sform, qform and pixdim that agree, and that do not."""

    def test_rotation_only_difference_is_flagged_and_the_sform_decides(self, tmp_path):
        image = nifti_image()
        image.set_qform(centred(rotation(12) @ SPACING, SHAPE), 1)
        scan = read_scan(save(image, tmp_path / "x.nii"))
        assert scan.flags == ("qform_differs",)
        assert_is_head(scan)

    def test_qform_without_the_shear_of_the_sform_is_accepted(self, tmp_path):
        image = nifti_image(GANTRY_TILT)
        image.set_qform(image.affine, 1)  # strips the shear, keeps the lengths
        scan = read_scan(save(image, tmp_path / "x.nii"))
        assert scan.flags == ("qform_differs", "gantry_tilt")
        assert scan.grid.voxel_volume_mm3 == pytest.approx(abs(np.linalg.det(GANTRY_TILT)), rel=1e-6)
        assert_is_head(scan)

    def test_pixdim_of_normal_distances_is_accepted(self, tmp_path):
        # Other lengths, but one volume: a writer that puts the slice spacing into pixdim.
        image = nifti_image(GANTRY_TILT)
        image.set_qform(image.affine, 1)
        normal_mm = 11 * np.cos(0.3)
        scan = read_scan(save(image, tmp_path / "x.nii", pixdim=(3, normal_mm)))
        assert_is_head(scan)

    def test_tilted_plain_file_of_dcm2niix_is_refused(self, tmp_path):
        image = nifti_image(GANTRY_TILT)
        image.set_qform(image.affine, 1)
        path = save(image, tmp_path / "x.nii", descrip=b"Time=101500.000")
        with pytest.raises(ReadError, match=r"dcm2niix.*Give the DICOM folder"):
            read_scan(path)

    def test_untilted_file_of_dcm2niix_is_read(self, tmp_path):
        image = nifti_image()
        image.set_qform(image.affine, 1)
        assert_is_head(read_scan(save(image, tmp_path / "x.nii", descrip=b"Time=101500.000")))

    @pytest.mark.parametrize(("stretch", "ok"), [(1.005, True), (1.02, False)])
    def test_volumes_may_differ_by_one_percent(self, tmp_path, stretch, ok):
        image = nifti_image()
        image.set_qform(centred(SPACING @ np.diag([1, 1, stretch]), SHAPE), 1)
        path = save(image, tmp_path / "x.nii")
        if ok:
            assert_is_head(read_scan(path))
        else:
            with pytest.raises(ReadError, match=r"198 mm3 by sform, 201\.96 by qform"):
                read_scan(path)

    def test_sform_decides_against_pixdim(self, tmp_path):
        scan = read_scan(save(nifti_image(), tmp_path / "x.nii", pixdim=(3, 1.0)))
        assert scan.flags == ("pixdim_differs",)
        assert_is_head(scan)

    @pytest.mark.parametrize("qform_code", [0, 1])
    def test_zero_pixdim_with_a_sform_is_read(self, tmp_path, qform_code):
        scan = read_scan(save(nifti_image(), tmp_path / "x.nii", pixdim=(3, 0.0), qform_code=qform_code))
        assert scan.flags == ("pixdim_differs",)
        assert_is_head(scan)

    def test_zero_pixdim_without_a_sform_is_refused(self, tmp_path):
        path = save(nifti_image(), tmp_path / "x.nii", pixdim=(3, 0.0), sform_code=0, qform_code=1)
        with pytest.raises(ReadError, match=r"voxel size .* in pixdim and no sform"):
            read_scan(path)

    def test_no_form_code_is_refused(self, tmp_path):
        with pytest.raises(ReadError, match="which side is left"):
            read_scan(save(nifti_image(), tmp_path / "x.nii", sform_code=0, qform_code=0))

    @pytest.mark.parametrize("sform_code", [0, 1])
    def test_broken_quaternion_is_refused(self, tmp_path, sform_code):
        path = save(nifti_image(), tmp_path / "x.nii", sform_code=sform_code, qform_code=1, quatern_b=3.0)
        with pytest.raises(ReadError, match="qform cannot be used"):
            read_scan(path)

    def test_qform_that_is_not_finite_is_refused_beside_an_sform(self, tmp_path):
        with pytest.raises(GeometryError, match=r"x: affine is not a finite"):
            read_scan(save(nifti_image(), tmp_path / "x.nii", qform_code=1, qoffset_y=np.inf))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_affine_that_is_not_finite_is_refused(self, tmp_path, value):
        with pytest.raises(GeometryError, match=r"x: affine is not a finite"):
            read_scan(save(nifti_image(), tmp_path / "x.nii", srow_x=(0, value)))

    def test_singular_affine_is_refused(self, tmp_path):
        with pytest.raises(GeometryError, match="singular"):
            read_scan(save(nifti_image(), tmp_path / "x.nii", srow_x=(0, 0.0)))


@pytest.mark.parametrize(
    "dim",
    [
        (2, 44, 50),
        (4, 44, 50, 16, 2),
        (3, 44, 50, 1),
        (3, 44, 0, 16),
        (3, 44, -50, 16),
        (9, 44, 50, 16),
        (5, 44, 50, 16, 1, 3),
    ],
)
def test_what_is_not_one_3d_image_is_refused(tmp_path, dim):
    path = save(nifti_image(), tmp_path / "x.nii", dim=[*dim, *[1] * (8 - len(dim))])
    with pytest.raises(ReadError, match="expected one 3D image"):
        read_scan(path)


@pytest.mark.parametrize("datatype", [32, 128, 1792, 2304, 1, 77])  # complex64, RGB, complex128, RGBA, bits, unknown
def test_colour_complex_and_unknown_types_are_refused(tmp_path, datatype):
    with pytest.raises(ReadError, match=f"datatype {datatype} "):
        read_scan(save(nifti_image(), tmp_path / "x.nii", datatype=datatype))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"xyzt_units": 5}, "unit code 5"),
        ({"scl_slope": 1.0, "scl_inter": np.nan}, "scl_inter"),
        ({"vox_offset": 100.0}, "expected 348 or later"),
        ({"vox_offset": 352.5}, "expected 348 or later"),
        ({"vox_offset": np.inf}, "expected 348 or later"),
        ({"vox_offset": np.nan}, "expected 348 or later"),
        ({"vox_offset": 1e18}, "holds only 70752 bytes"),
        ({"scl_slope": np.inf}, "scl_slope"),
        ({"magic": b""}, "ANALYZE"),
        ({"sizeof_hdr": 12}, "not a NIfTI file"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, f"at most {MAX_VOXELS}"),
    ],
)
def test_header_that_cannot_be_trusted_is_refused(tmp_path, fields, message):
    with pytest.raises(ReadError, match=message):
        read_scan(save(nifti_image(), tmp_path / "x.nii", **fields))


class TestDamage:
    """A file is read whole or not at all."""

    @pytest.fixture
    def plain(self, tmp_path):
        return save(nifti_image(), tmp_path / "x.nii").read_bytes()

    @pytest.fixture
    def zipped(self, plain):
        return gzip.compress(plain, 1)

    def read(self, tmp_path, content, name="x.nii.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        return read_scan(path)

    def test_members_of_gzip_are_joined_and_zeros_after_them_ignored(self, tmp_path, plain):
        parts = gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]) + bytes(100)
        assert_is_head(self.read(tmp_path, parts))

    def test_gzip_is_told_by_its_bytes(self, tmp_path, zipped, plain):
        assert_is_head(self.read(tmp_path, zipped, "x.nii"))
        assert_is_head(self.read(tmp_path, plain, "x.nii.gz"))

    @pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
    def test_cut_off(self, tmp_path, zipped, plain, keep):
        for content in (zipped, plain):
            with pytest.raises(ReadError):
                self.read(tmp_path, content[: int(keep * len(content))])

    def test_cut_off_checksum(self, tmp_path, zipped):
        with pytest.raises(ReadError, match="ends without its checksum"):
            self.read(tmp_path, zipped[:-4])

    def test_wrong_checksum(self, tmp_path, zipped):
        with pytest.raises(ReadError, match="damaged gzip"):
            self.read(tmp_path, zipped[:-8] + b"abcd" + zipped[-4:])

    def test_flipped_bytes_in_the_stream(self, tmp_path, zipped):
        middle = len(zipped) // 2
        with pytest.raises(ReadError):
            self.read(tmp_path, zipped[:middle] + bytes(64) + zipped[middle + 64 :])

    def test_broken_start_of_the_stream(self, tmp_path, zipped):
        with pytest.raises(ReadError, match=r"x\.nii\.gz is a damaged gzip file"):
            self.read(tmp_path, zipped[:10] + b"\xff" * 200 + zipped[210:])

    def test_garbage_after_the_stream(self, tmp_path, zipped):
        with pytest.raises(ReadError, match="damaged gzip"):
            self.read(tmp_path, zipped + b"not a gzip member at all")

    def test_more_voxels_than_the_header_says(self, tmp_path, plain):
        with pytest.raises(ReadError, match="holds more than"):
            self.read(tmp_path, plain + bytes(10))
        with pytest.raises(ReadError, match="goes on after"):
            self.read(tmp_path, gzip.compress(plain + bytes(10**7)))

    def test_bomb_takes_no_memory(self, tmp_path, plain):
        # 1 GB of zeros in 1 MB, and a header that says 70 kB.
        path = tmp_path / "x.nii.gz"
        zeros = bytes(1 << 24)
        with gzip.open(path, "wb", 1) as stream:
            stream.write(plain)
            for _ in range(64):
                stream.write(zeros)
        read = (
            "import resource, sys; from ich_pipeline.reading import read_scan\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: read_scan(sys.argv[1])\n"
            "except Exception as error: print(type(error).__name__, end=' ')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        done = subprocess.run([sys.executable, "-c", read, path], capture_output=True, text=True, check=True)
        error, more = done.stdout.split()
        assert error == "ReadError"
        assert int(more) / (1024 if sys.platform == "linux" else 1024**2) < 50  # MiB

    def test_few_bytes_cannot_hold_many_voxels(self, tmp_path):
        path = save(nifti_image(), tmp_path / "x.nii", dim=(3, 20000), srow_z=(2, 0.025), pixdim=(3, 0.025))
        with pytest.raises(ReadError, match="too few for the"):
            self.read(tmp_path, gzip.compress(path.read_bytes()[:2000]))

    def test_any_damage_to_the_header_is_a_refusal_or_no_matter(self, tmp_path, plain):
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(300):
            content = bytearray(plain)
            for position in rng.integers(0, 348, 3):
                content[position] = rng.integers(256)
            try:
                self.read(tmp_path, bytes(content), "x.nii")
            except IchError:
                refused += 1
        assert 50 < refused < 300

    def test_random_bytes(self, tmp_path):
        with pytest.raises(ReadError, match="not a NIfTI file"):
            self.read(tmp_path, np.random.default_rng(0).bytes(4000))


class TestHounsfield:
    """Values that are not those of a head CT in HU are refused with the range found and the range expected."""

    def read(self, tmp_path, change, shape=SHAPE, dtype=np.float32):
        image = nifti_image(shape=shape)
        values = change(np.asarray(image.dataobj).astype(np.float32)).astype(dtype)
        affine = image.affine
        new = nib.Nifti1Image(values, affine)
        return read_scan(save(new, tmp_path / "x.nii"))

    @pytest.mark.parametrize(
        ("name", "change", "dtype"),
        [
            ("window 0 to 80 as bytes", lambda hu: np.clip(hu, 0, 80) * 255 / 80, np.uint8),
            ("normalised", lambda hu: (hu + 1000) / 2000, np.float32),
            ("offset by 1024", lambda hu: hu + 1024, np.uint16),
            ("offset by -1000", lambda hu: hu - 1000, np.int16),
            ("clipped to a window", lambda hu: np.clip(hu, -150, 250), np.int16),
            ("skull-stripped to zero", lambda hu: np.where((hu > 0) & (hu < 100), hu, 0), np.int16),
            ("halved", lambda hu: hu / 4 + 150, np.float32),
            ("magnetic resonance", lambda hu: np.abs(hu) * 3, np.int16),
            ("air at -600", lambda hu: np.where(hu < -500, -600, hu), np.int16),
            ("no tissue", lambda hu: np.where((hu > 0) & (hu < 100), -1000, hu), np.int16),
            ("infinite", lambda hu: np.where(hu > 900, np.inf, hu), np.float32),
        ],
    )
    def test_not_in_hu(self, tmp_path, name, change, dtype):
        with pytest.raises(ReadError, match=r"x: values run from .* to .*expected HU of a head CT"):
            self.read(tmp_path, change, dtype=dtype)

    def test_cropped_to_the_head(self, tmp_path):
        # Inside the skull but for a corner of air: no air mode to ask for.
        scan = self.read(tmp_path, lambda hu: hu, shape=(21, 27, 8))
        assert 0 < (scan.image_hu == -1000).mean() < 0.01
        assert_is_head(scan)

    @pytest.mark.parametrize(("share", "ok"), [(0.005, True), (0.05, False)])
    def test_a_little_half_filled_air_is_no_air_mode(self, tmp_path, share, ok):
        def sinuses_only(hu):
            hu = np.where(hu < -500, 30, hu)
            hu.ravel()[np.random.default_rng(0).permutation(hu.size)[: int(share * hu.size)]] = -600
            return hu

        if ok:
            assert self.read(tmp_path, sinuses_only).flags == ()
        else:
            with pytest.raises(ReadError, match="air is most common at"):
                self.read(tmp_path, sinuses_only)

    def test_padding_counts_as_air(self, tmp_path):
        def no_air_but_padding(hu):
            hu = np.where(hu < -500, -3024, hu)
            hu[20:22] = np.where(hu[20:22] < -500, -600, hu[20:22])  # the edge of the field of view
            return hu

        scan = self.read(tmp_path, no_air_but_padding, dtype=np.int16)
        assert (scan.image_hu == -600).mean() > 0.01
        assert scan.flags == ("padding",)

    @pytest.mark.parametrize("padding", [-1500, -3024])
    def test_padding_is_raised_to_the_lowest_hu_and_flagged(self, tmp_path, padding):
        def pad(hu):
            hu[:5] = padding
            return hu

        scan = self.read(tmp_path, pad, dtype=np.int16)
        assert scan.flags == ("padding",)
        assert scan.image_hu.dtype == np.int16
        assert (scan.image_hu[:5] == -1024).all()
        assert scan.image_hu[5:].min() == -1000

    def test_lowest_hu_is_no_padding(self, tmp_path):
        scan = self.read(tmp_path, lambda hu: np.where(hu < -500, -1024, hu), dtype=np.int16)
        assert scan.flags == ()

    def test_nan_away_from_the_head_is_air_and_flagged(self, tmp_path):
        def spoil(hu):
            hu[:2, :2] = np.nan
            return hu

        scan = self.read(tmp_path, spoil)
        assert scan.flags == ("nan_outside_head",)
        assert (scan.image_hu[:2, :2] == -1000).all()
        assert_is_head(scan)

    @pytest.mark.parametrize("where", [np.s_[22, 25, 8], np.s_[:, :25], np.s_[:, :, 7], np.s_[:]])
    def test_nan_at_the_head_is_refused(self, tmp_path, where):
        def spoil(hu):
            hu[where] = np.nan
            return hu

        with pytest.raises(ReadError, match="voxels are NaN"):
            self.read(tmp_path, spoil)


class TestNoHead:
    """In HU and still no head: refused with what was found and expected."""

    GRID = make_grid((100, 100, 40), (4.0, 4.0, 5.0))

    def read(self, tmp_path, image_hu, grid=GRID):
        image = nib.Nifti1Image(image_hu.astype(np.int16), grid.affine)
        image.header.set_xyzt_units("mm")
        return read_scan(save(image, tmp_path / "x.nii"))

    def cylinder(self, semi_axes_mm):
        x, y, _ = np.moveaxis(grid_points(self.GRID), -1, 0)
        return (x / semi_axes_mm[0]) ** 2 + (y / semi_axes_mm[1]) ** 2

    def test_air(self, tmp_path):
        noise = np.random.default_rng(0).normal(-1000, 20, self.GRID.shape)
        with pytest.raises(ReadError, match=r"values run from -1.* expected HU of a head CT"):
            self.read(tmp_path, noise)

    def test_water_cylinder(self, tmp_path):
        water = np.where(self.cylinder((100, 100)) < 1, 2, -1000)
        with pytest.raises(ReadError, match="values run from -1000 to 2; expected HU of a head CT"):
            self.read(tmp_path, water)
        water[50, 50] = 900  # a rod
        with pytest.raises(ReadError, match=r"x: bone .* is 0\.1% of what is not air, expected at least 2%"):
            self.read(tmp_path, water)

    @pytest.mark.parametrize(("semi_axes_mm", "ok"), [((75, 100), True), ((160, 110), False)], ids=["head", "trunk"])
    def test_size(self, tmp_path, semi_axes_mm, ok):
        radius = self.cylinder(semi_axes_mm)
        image_hu = np.select([radius < 0.85, radius < 1], [45, 400], -1000)
        if ok:
            self.read(tmp_path, image_hu)
        else:
            with pytest.raises(ReadError, match=r"the median slice shows 55\d cm2 .* expected at most 500"):
                self.read(tmp_path, image_hu)

    def test_shoulders_in_less_than_half_of_the_slices(self, tmp_path):
        head, trunk = self.cylinder((75, 100)), self.cylinder((180, 110))
        image_hu = np.select([head < 0.85, head < 1], [45, 400], -1000)
        image_hu[..., :15] = np.select([trunk < 0.85, trunk < 1], [45, 400], -1000)[..., :15]
        self.read(tmp_path, image_hu)


class TestMask:
    """Masks: whole numbers only, on the grid of the file."""

    def write(self, tmp_path, values):
        return save(nib.Nifti1Image(values, centred(GANTRY_TILT, SHAPE)), tmp_path / "m.nii.gz")

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
    def test_labels_stay(self, tmp_path, dtype):
        values = np.random.default_rng(0).integers(0, 6, SHAPE).astype(dtype)
        mask, forms = read_mask(
            save(nib.Nifti1Image(values, centred(GANTRY_TILT, SHAPE), dtype=dtype), tmp_path / "m.nii.gz")
        )
        assert mask.values.dtype == np.uint8
        np.testing.assert_array_equal(mask.values, values)
        np.testing.assert_allclose(mask.grid.affine[:3, :3], GANTRY_TILT, rtol=1e-6)
        assert (forms.sform_code, forms.qform_code) == (2, 0)

    def test_scaled_label_is_read_by_its_value(self, tmp_path):
        path = save(nib.Nifti1Image(np.full(SHAPE, 10, np.uint8), centred(SPACING, SHAPE)), tmp_path / "m.nii")
        path = save(nib.load(path), tmp_path / "n.nii", scl_slope=0.5, scl_inter=-2.0)
        assert np.unique(read_mask(path)[0].values).tolist() == [3]

    @pytest.mark.parametrize("value", [0.5, -1.0, 256.0, np.nan])
    def test_what_is_no_label_is_refused(self, tmp_path, value):
        values = np.zeros(SHAPE, np.float32)
        values[3, 3, 3] = value
        with pytest.raises(ReadError, match="expected whole numbers from 0 to 255"):
            read_mask(self.write(tmp_path, values))


def test_missing_path_and_wrong_suffix(tmp_path):
    with pytest.raises(ReadError, match="does not exist"):
        read_scan(tmp_path / "no.nii.gz")
    (tmp_path / "x.png").write_bytes(b"png")
    for read in (read_scan, read_mask):
        with pytest.raises(ReadError, match="neither NIfTI"):
            read(tmp_path / "x.png")


def test_case_id_may_be_given_and_is_named_in_errors(tmp_path):
    path = save(nifti_image(), tmp_path / "x.nii")
    assert read_scan(path, "case 7").case_id == "case 7"
    patched = save(nifti_image(), tmp_path / "y.nii", sform_code=0)
    with pytest.raises(IchError, match=r"^case 7: "):
        read_scan(patched, "case 7")


@pytest.mark.realdata
def test_real_scan(real_data):
    scan = read_scan(real_data / "vhm_head" / "vhm_head_crop.nii.gz")
    assert scan.image_hu.shape == (250, 270, 150)
    assert scan.image_hu.dtype == np.int16
    assert (scan.image_hu.min(), scan.image_hu.max()) == (-1024, 1869)
    assert scan.grid.voxel_volume_mm3 == pytest.approx(1.0)
    assert scan.flags == ()
    assert scan.case_id == "vhm_head_crop"


def test_grid_of_scan_is_that_of_the_file(tmp_path):
    path = save(nifti_image(GANTRY_TILT), tmp_path / "x.nii")
    scan = read_scan(path)
    assert isinstance(scan.grid, Grid)
    np.testing.assert_array_equal(scan.grid.affine, nib.load(path).affine)
