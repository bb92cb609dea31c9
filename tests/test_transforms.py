"""The way to the model grid and back keeps every position and every millilitre; what does not fit is refused."""

import hashlib
import json
from copy import deepcopy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import bleeding_head, save_nifti
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import AsDiscreted, Compose, Invertd, SaveImaged, ScaleIntensityRanged
from scan_files import GANTRY_TILT, MATRICES, SHAPE, grid_points, head_series, rotation, save_series
from shapes import ellipsoid, make_grid

from ich_pipeline.errors import GeometryError, ReadError
from ich_pipeline.geometry import Grid
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord, NiftiForms
from ich_pipeline.transforms import (
    ForegroundProbabilityd,
    ModelGrid,
    ModelGridd,
    NativeMaskWriter,
    PadToSized,
    ReadMaskd,
    ReadScand,
    apply_along_axes,
    averaging_matrix,
    head_box,
    interpolate_in_plane,
    interpolation_matrix,
    scan_of,
)

# Slices, rows, columns as an axial CT has them, and every way of storing and leaning them that was met in files.
GRIDS = {
    "RAS": make_grid((60, 66, 14), (2.1, 1.9, 5.0)),
    "LPS": make_grid((60, 66, 14), (2.1, 1.9, 5.0), axes="LPS"),
    "PIR": make_grid((60, 66, 14), (2.1, 1.9, 5.0), axes="PIR"),
    "SAL": make_grid((60, 66, 14), (2.1, 1.9, 5.0), axes="SAL"),
    "turned": make_grid((60, 66, 14), (2.1, 1.9, 5.0), turn_deg=17),
    "tilted": make_grid((60, 66, 14), (2.1, 1.9, 5.0), tilt_deg=18.5),
    "tilted the other way, LPS": make_grid((60, 66, 14), (2.1, 1.9, 5.0), tilt_deg=-16.5, axes="LPS"),
    "left-handed, tilted and turned": make_grid((60, 66, 14), (2.1, 1.9, 5.0), tilt_deg=10, turn_deg=9, axes="LAS"),
    "thin slices": make_grid((60, 66, 111), (2.1, 1.9, 0.6), tilt_deg=7),
    "thick slices": make_grid((60, 66, 9), (2.1, 1.9, 8.0)),
}
SPACINGS = {"finer": (3.0, 1.3, 1.3), "coarser": (5.0, 3.1, 2.6), "as published": (5.0, 1.0, 1.0)}


def image_on(grid: Grid, values: np.ndarray) -> MetaTensor:
    image = MetaTensor(torch.from_numpy(np.ascontiguousarray(values))[None])
    image.affine = torch.as_tensor(grid.affine)
    return image


def grid_of(image: MetaTensor) -> Grid:
    return Grid(tuple(image.shape[1:]), np.asarray(image.affine))


def centroid_mm(values: np.ndarray, grid: Grid) -> np.ndarray:
    weights = np.clip(values, 0, None)
    return (grid_points(grid) * weights[..., None]).sum((0, 1, 2)) / weights.sum()


@pytest.mark.parametrize("spacing_mm", SPACINGS.values(), ids=SPACINGS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
class TestModelGrid:
    def test_there_and_back(self, grid, spacing_mm):
        body = ellipsoid(grid, (24, 30, 18), (9, -6, 4)).values.astype(np.float32)
        image = image_on(grid, body)
        transform = ModelGrid(spacing_mm)
        model = transform(image)
        back = transform.inverse(model.clone())
        assert torch.equal(image.affine, torch.as_tensor(grid.affine))  # what came in is not changed
        assert back.shape == image.shape
        assert np.array_equal(back.affine, grid.affine)
        assert back.applied_operations == []
        truth_mm = centroid_mm(body, grid)
        # 1 % of the body's length, a seventh of a pixel
        assert np.linalg.norm(centroid_mm(model.numpy()[0], grid_of(model)) - truth_mm) < 0.3
        assert np.linalg.norm(centroid_mm(back.numpy()[0], grid) - truth_mm) < 0.3
        assert float((back >= 0.5).sum()) == pytest.approx(body.sum(), rel=0.025)

    def test_model_affine_maps_its_voxels_to_the_same_points(self, grid, spacing_mm):
        # Averaging and linear interpolation keep a linear function: the image whose value is a world coordinate has at
        # every model voxel the coordinate that the model affine gives that voxel. A triangle widened to a broken number
        # of pixels ripples about it by less than a tenth of a pixel.
        points = grid_points(grid)
        tolerance_mm = 2e-3 if spacing_mm[1] < 2 else 0.2
        for axis in range(3):
            model = ModelGrid(spacing_mm)(image_on(grid, points[..., axis].astype(np.float32)))
            expected = grid_points(grid_of(model))[..., axis]
            inside = inside_of(grid, grid_points(grid_of(model)), spacing_mm)
            assert inside.mean() > 0.4
            error_mm = (model.numpy()[0] - expected)[inside]
            assert np.abs(error_mm).max() < tolerance_mm
            assert abs(error_mm.mean()) < 0.01

    def test_model_axes_and_spacing(self, grid, spacing_mm):
        model = grid_of(ModelGrid(spacing_mm)(image_on(grid, np.zeros(grid.shape, np.float32))))
        assert nib.aff2axcodes(model.affine) == ("S", "P", "L")
        pixels = np.array(model.shape[1:])
        assert np.all(np.abs(model.edge_mm[1:] / np.array(spacing_mm[1:]) - 1) * pixels <= 0.5 * (1 + 1e-6))
        group = max(1, round(spacing_mm[0] / grid.slice_spacing_mm))
        assert model.slice_spacing_mm == pytest.approx(group * grid.slice_spacing_mm)
        assert model.tilt_deg == pytest.approx(grid.tilt_deg, abs=1e-3)  # shear stays shear

    def test_sparse_inverse_is_the_dense_one(self, grid, spacing_mm):
        transform = ModelGrid(spacing_mm)
        model = transform(image_on(grid, np.zeros(grid.shape, np.float32)))
        sparse = model.clone()
        rng = np.random.default_rng(0)
        low = [int(rng.integers(0, max(1, n - 4))) for n in model.shape[1:]]
        where = (slice(None), *[slice(a, a + 4) for a in low])
        sparse[where] = torch.from_numpy(rng.uniform(0.1, 1, tuple(sparse[where].shape)).astype(np.float32))
        # The inverse is linear, and a constant second channel holds every voxel: nothing is left out there.
        dense = MetaTensor(torch.cat([sparse, torch.ones_like(sparse)]), meta=sparse.meta)
        dense.applied_operations = deepcopy(sparse.applied_operations)
        assert (sparse != 0).float().mean() < 0.5
        assert torch.allclose(transform.inverse(sparse)[0], transform.inverse(dense)[0], atol=1e-6)


def inside_of(grid: Grid, points: np.ndarray, spacing_mm) -> np.ndarray:
    """Points whose widest triangle or slice group lies inside the grid: the border repeats its samples."""
    index = (points - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    reach = [max(spacing_mm) / edge for edge in grid.edge_mm]
    return np.all((index >= reach) & (index <= np.array(grid.shape) - 1 - reach), axis=-1)


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
@pytest.mark.parametrize("tilt_deg", [0, 15])
@pytest.mark.parametrize(("volume_ml", "tolerance"), [(30, 0.01), (10, 0.01), (3, 0.015), (1, 0.02)])
def test_volume_of_a_round_trip(volume_ml, tolerance, tilt_deg, axes):
    # A score carried back linearly and cut at one half on the native grid keeps the volume; labels carried back by
    # nearest neighbour would read 1 mL 11 % high.
    grid = make_grid((128, 128, 24), (0.488, 0.488, 5.0), tilt_deg=tilt_deg, axes=axes)
    radius_mm = (volume_ml * 1000 * 3 / 4 / np.pi) ** (1 / 3)
    native = model_count = back_count = 0.0
    for centre_mm in ((1.3, -2.1, 0.4), (-3.7, 0.9, 1.7), (0.2, 4.4, -2.2), (5.1, 3.3, 3.6)):
        body = ellipsoid(grid, (radius_mm,) * 3, centre_mm).values
        transform = ModelGrid((5.0, 1.0, 1.0))
        model = transform(image_on(grid, body))
        model_count += float((model >= 0.5).sum()) * grid_of(model).voxel_volume_mm3
        back_count += float((transform.inverse(model) >= 0.5).sum()) * grid.voxel_volume_mm3
        native += body.sum() * grid.voxel_volume_mm3
    assert back_count == pytest.approx(native, rel=tolerance)
    assert native == pytest.approx(4 * volume_ml * 1000, rel=0.05)  # 1 mL has two or three slices
    assert model_count == pytest.approx(native, rel=0.035)


def test_crop_is_kept_apart_and_zero_outside():
    grid = GRIDS["tilted the other way, LPS"]
    box = ((5, 50), (11, 60), (2, 12))
    transform = ModelGrid((5.0, 2.0, 2.0))
    back = transform.inverse(transform(image_on(grid, np.ones(grid.shape, np.float32)), box)).numpy()[0]
    inside = np.zeros(grid.shape, bool)
    inside[tuple(slice(a, b) for a, b in box)] = True
    assert back[inside] == pytest.approx(1, abs=1e-6)
    assert not back[~inside].any()


@pytest.mark.parametrize("axes", ["RAS", "RAI"])
@pytest.mark.parametrize("n_slices", [24, 25, 28, 31])
def test_last_group_comes_back_to_where_its_slices_are(n_slices, axes):
    # 0.6 mm slices averaged by eight: 25 of them leave a group of one. A score that grows evenly comes
    # back as it was between the centres of the first and the last group, and is constant beyond them.
    grid = make_grid((60, 60, n_slices), (2, 2, 0.6), axes=axes)
    height = grid_points(grid)[0, 0, :, 2]
    transform = ModelGrid((5.0, 2.0, 2.0))
    back = transform.inverse(transform(image_on(grid, np.broadcast_to(height.astype(np.float32), grid.shape)))).numpy()
    from_below = height - height.min()
    last_group = (n_slices - 1) % 8 + 1
    centres_mm = 0.6 * 3.5, from_below.max() - 0.6 * (last_group - 1) / 2
    assert back[0, 30, 30] - height.min() == pytest.approx(np.clip(from_below, *centres_mm), abs=1e-4)


def test_empty_score_comes_back_empty():
    grid = GRIDS["PIR"]
    transform = ModelGrid((5.0, 1.0, 1.0))
    back = transform.inverse(transform(image_on(grid, np.zeros(grid.shape, np.float32))))
    assert back.shape[1:] == grid.shape
    assert not back.any()


def test_labels_of_several_classes_become_one():
    grid = make_grid((60, 60, 10), (2, 2, 5))
    label = np.zeros(grid.shape, np.uint8)
    label[20:40, 20:40, 3:7] = 3
    assert ModelGrid((5.0, 2.0, 2.0))(image_on(grid, label), mask=True).unique().tolist() == [0, 1]


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize(("before", "after"), [(31, 44), (31, 12), (20, 20)])
def test_interpolation_in_plane_is_that_of_the_matrices(slice_axis, before, after):
    shape, size = [before] * 3, [after] * 3
    shape[slice_axis] = size[slice_axis] = 5
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32))
    step = before / after
    at = (step - 1) / 2 + step * np.arange(after)
    matrices = [None if axis == slice_axis else interpolation_matrix(before, at, step) for axis in range(3)]
    found = interpolate_in_plane(image, size, slice_axis)
    assert torch.allclose(found, apply_along_axes(image, matrices), atol=1e-5)


class TestMatrices:
    @pytest.mark.parametrize(("n_in", "n_out", "start", "step"), [(10, 7, 0.2, 1.4), (10, 25, -0.3, 0.4), (1, 3, 0, 1)])
    def test_rows_add_up_to_one(self, n_in, n_out, start, step):
        matrix = interpolation_matrix(n_in, start + step * np.arange(n_out), step)
        assert matrix.shape == (n_out, n_in)
        assert matrix.sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert matrix.min() >= 0

    def test_interpolation_between_two_samples(self):
        assert interpolation_matrix(3, np.array([0.25, 1.25]), 1.0) == pytest.approx(
            np.array([[0.75, 0.25, 0], [0, 0.75, 0.25]])
        )

    def test_last_group_averages_what_it_has(self):
        assert averaging_matrix(5, 2) @ np.array([0, 2, 4, 6, 8]) == pytest.approx([1, 5, 8])

    def test_axes_are_multiplied_one_by_one(self):
        rng = np.random.default_rng(0)
        image = torch.from_numpy(rng.normal(size=(2, 4, 5, 6)).astype(np.float32))
        a, c = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
        expected = np.einsum("ai,ck,nijk->najc", a, c, image.numpy())
        assert apply_along_axes(image, [a, None, c]).numpy() == pytest.approx(expected, abs=1e-5)


def head_on_table(slice_mm: float, axes: str, table_mm: float):
    """HU, grid, where the head is and where the table is."""
    grid = make_grid((128, 160, round(190 / slice_mm)), (2.0, 2.0, slice_mm), axes=axes)
    x, y, z = np.moveaxis(grid_points(grid), -1, 0)
    radius = np.sqrt((x / 72) ** 2 + ((y - 20) / 88) ** 2 + (z / 78) ** 2)
    image_hu = np.select([radius < 0.93, radius < 1.0], [35, 900], default=-1000).astype(np.int16)
    table = (np.abs(y + 130) < table_mm / 2) & (np.abs(x) < 110)
    image_hu[table] = 400
    return image_hu, grid, radius < 1, table


def inside_box(box, grid: Grid) -> np.ndarray:
    inside = np.zeros(grid.shape, bool)
    inside[tuple(slice(a, b) for a, b in box)] = True
    return inside


class TestHeadBox:
    @pytest.mark.parametrize("name", MATRICES)
    def test_holds_the_skull(self, name):
        image_hu, _, grid = bleeding_head(matrix=MATRICES[name])
        box = head_box(image_hu, grid)
        bone = np.argwhere(image_hu > 200)
        for axis, (start, stop) in enumerate(box):
            assert start <= bone[:, axis].min()
            assert stop > bone[:, axis].max()

    @pytest.mark.parametrize("slice_mm", [0.6, 5.0, 10.0])
    @pytest.mark.parametrize("axes", ["RAS", "PIR"])
    def test_holds_the_vertex_and_leaves_out_the_table(self, slice_mm, axes):
        image_hu, grid, head, table = head_on_table(slice_mm, axes, table_mm=3)
        box = inside_box(head_box(image_hu, grid), grid)
        assert box[head].all()
        assert not box[table].any()
        assert box.mean() < 0.75

    def test_table_larger_than_the_skull_does_not_take_its_place(self):
        # All of the head would be outside the box: an empty mask and not a word.
        image_hu, grid, head, _ = head_on_table(5.0, "RAS", table_mm=25)
        assert inside_box(head_box(image_hu, grid), grid)[head].all()

    def test_image_without_skull_is_kept_whole(self):
        grid = make_grid((100, 110, 20), (2, 2, 5))
        image_hu = np.full(grid.shape, -1000, np.int16)
        assert head_box(image_hu, grid) == ((0, 100), (0, 110), (0, 20))
        image_hu[40:50, 40:50, 5:8] = 800  # a fragment of 20 mm
        assert head_box(image_hu, grid) == ((0, 100), (0, 110), (0, 20))


class TestModelGridd:
    def test_scan_and_label_share_the_box(self):
        image_hu, label, grid = bleeding_head()
        data = {"image": image_on(grid, image_hu), "label": image_on(grid, label)}
        out = ModelGridd(["image", "label"], (11.0, 3.0, 3.0))(data)
        assert out["image"].shape == out["label"].shape
        assert torch.equal(out["image"].affine, out["label"].affine)
        assert float(out["image"][out["label"] > 0].min()) > 30
        assert np.prod(out["image"].shape[1:]) < np.prod(
            ModelGridd("image", (11.0, 3.0, 3.0), crop_head=False)(data)["image"].shape[1:]
        )

    def test_range_of_hu_is_cut_on_the_native_grid(self):
        # Averaging first would call the edge of bone and brain blood.
        image_hu, label, grid = bleeding_head()
        data = {"image": image_on(grid, image_hu), "label": image_on(grid, label)}
        spacing_mm = (22.0, 8.0, 8.0)
        scan = ModelGridd("image", spacing_mm)(data)["image"]
        ranged = ModelGridd("image", spacing_mm, hu_range=[65, 65])(data)["image"]
        assert torch.equal(ranged.affine, scan.affine)  # the head is looked for in HU
        blood = ModelGrid(spacing_mm)(data["label"], box=head_box(image_hu, grid))
        assert torch.equal(ranged.as_tensor(), blood.as_tensor())
        assert 0 < blood.mean() < ((scan > 50) & (scan < 80)).float().mean()

    def test_label_on_another_grid_is_refused(self):
        image_hu, label, grid = bleeding_head()
        moved = grid.affine.copy()
        moved[2, 3] += 3
        data = {"image": image_on(grid, image_hu), "label": image_on(Grid(grid.shape, moved), label)}
        with pytest.raises(GeometryError, match=r"label is on another grid.*3 mm apart"):
            ModelGridd(["image", "label"], (11.0, 3.0, 3.0))(data)


def test_pad_to_size_pads_the_far_ends_with_air():
    image = image_on(make_grid((4, 5, 6)), np.arange(120, dtype=np.float32).reshape(4, 5, 6) - 50)
    padded = PadToSized("image", (8, 3, 9))({"image": image})["image"]
    assert padded.shape == (1, 8, 5, 9)
    assert torch.equal(padded[:, :4, :, :6], image)
    assert float(padded[:, 4:].max()) == float(padded[..., 6:].max()) == -50
    assert PadToSized("image", (4, 5, 6))({"image": image})["image"] is image


def test_foreground_probability():
    logits = torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    out = ForegroundProbabilityd("pred")({"pred": logits})["pred"]
    assert out.shape == (1, 2)
    assert out[0].tolist() == pytest.approx([0.5, 1 / (1 + np.exp(4))])


# --- the way through MONAI ---------------------------------------------------------------------------------------


def forms_equal(a: NiftiForms, b: NiftiForms) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in a.__dataclass_fields__)


def preprocessing(**options) -> Compose:
    return Compose(
        [
            ReadScand("image"),
            ModelGridd("image", (11.0, 2.0, 2.0), **options),
            ScaleIntensityRanged("image", a_min=-5, a_max=85, b_min=0, b_max=1, clip=True),
        ]
    )


@pytest.fixture(params=MATRICES)
def scan_file(request, tmp_path) -> Path:
    image_hu, label, grid = bleeding_head(matrix=MATRICES[request.param])
    save_nifti(tmp_path / "label.nii.gz", label, grid)
    return save_nifti(tmp_path / "scan.nii.gz", image_hu, grid)


def test_reading_keeps_scan_and_forms(scan_file):
    data = ReadScand("image")({"image": scan_file})
    direct, scan = read_scan(scan_file), scan_of(data["image"], CaseRecord("scan", scan_file))
    assert data["image"].affine.dtype == torch.float64
    assert np.array_equal(scan.image_hu, direct.image_hu)
    assert np.array_equal(scan.grid.affine, direct.grid.affine)
    assert forms_equal(scan.forms, direct.forms)
    assert scan.flags == direct.flags


def test_dicom_series_keeps_uid_and_flags(tmp_path):
    folder = save_series(head_series(tilt_deg=12), tmp_path / "series")
    scan = scan_of(ReadScand("image")({"image": folder})["image"], CaseRecord("series", folder))
    assert scan.series == read_scan(folder).series is not None
    assert "gantry_tilt" in scan.flags


def test_reader_refusals_are_our_own(tmp_path):
    with pytest.raises(ReadError, match="does not exist"):
        ReadScand("image")({"image": tmp_path / "no.nii.gz"})
    image_hu, _, grid = bleeding_head()
    scores = save_nifti(tmp_path / "scores.nii.gz", (image_hu > 50) * np.float32(0.4), grid)
    with pytest.raises(ReadError, match="whole numbers"):
        ReadMaskd("label")({"label": scores})


def prediction(data) -> dict:
    """A score that is 1 where the model image is blood, carrying the image's metadata as an inferer's output does."""
    blood = (data["image"] > 0.66) & (data["image"] < 0.9)
    return {**data, "pred": blood.float()}


def restoring(transform: Compose, **save) -> Compose:
    steps = [
        Invertd("pred", transform=transform, orig_keys="image", nearest_interp=False, to_tensor=True),
        AsDiscreted("pred", threshold=0.5),
    ]
    writer = SaveImaged(
        "pred",
        output_postfix="",
        separate_folder=False,
        output_dtype=np.uint8,
        writer=NativeMaskWriter,
        print_log=False,
        **save,
    )
    return Compose([*steps, writer]) if save else Compose(steps)


def assert_header_of(mask_file: Path, scan_file: Path):
    mask, scan = nib.load(mask_file), nib.load(scan_file)
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == scan.shape
    for key in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        assert np.array_equal(mask.header[key], scan.header[key]), key
    for key in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        assert mask.header[key].tobytes() == scan.header[key].tobytes(), key


def test_monai_route_restores_and_saves_on_the_native_grid(scan_file, tmp_path):
    transform = preprocessing()
    loader = DataLoader(Dataset([{"image": scan_file}], transform), batch_size=1)
    (batch,) = loader
    (item,) = decollate_batch(batch)
    out = restoring(transform, output_dir=tmp_path / "out")(prediction(item))
    assert_header_of(tmp_path / "out" / "scan.nii.gz", scan_file)
    mask, _ = read_mask(tmp_path / "out" / "scan.nii.gz")
    assert np.array_equal(mask.values, np.asarray(out["pred"][0]))
    label, _ = read_mask(scan_file.parent / "label.nii.gz")
    overlap = 2 * (mask.values * label.values).sum() / (mask.values.sum() + label.values.sum())
    assert overlap > 0.8  # 45 voxels of 4 mm: one shell of them is most of the body

    direct = restoring(transform)(prediction(transform({"image": scan_file})))
    assert torch.equal(direct["pred"], out["pred"])  # collating and taking apart again changes nothing


def test_writing_twice_gives_the_same_bytes(scan_file, tmp_path):
    transform = preprocessing(crop_head=False)
    for name in ("a", "b"):
        restoring(transform, output_dir=tmp_path / name)(prediction(transform({"image": scan_file})))
    hashes = {hashlib.sha256((tmp_path / n / "scan.nii.gz").read_bytes()).hexdigest() for n in "ab"}
    assert len(hashes) == 1


class TestNativeMaskWriter:
    def written(self, tmp_path, change, values=None):
        image_hu, label, grid = bleeding_head(matrix=GANTRY_TILT)
        scan = save_nifti(tmp_path / "scan.nii.gz", image_hu, grid)
        meta = dict(ReadScand("image")({"image": scan})["image"].meta)
        change(meta)
        writer = NativeMaskWriter()
        writer.set_data_array(label[None] if values is None else values)
        writer.set_metadata(meta)
        writer.write(tmp_path / "mask.nii.gz")
        return tmp_path / "mask.nii.gz"

    def test_writes_with_the_scan_header(self, tmp_path):
        assert_header_of(self.written(tmp_path, lambda meta: None), tmp_path / "scan.nii.gz")

    def test_refuses_another_affine(self, tmp_path):
        def orthonormalised(meta):
            meta["affine"] = torch.from_numpy(np.diag([4, 4.5, 11, 1.0])) @ torch.eye(4, dtype=torch.float64)

        with pytest.raises(GeometryError, match=r"scan.nii.gz: mask is on another grid"):
            self.written(tmp_path, orthonormalised)
        assert not (tmp_path / "mask.nii.gz").exists()

    def test_refuses_another_shape(self, tmp_path):
        with pytest.raises(GeometryError, match="shape"):
            self.written(tmp_path, lambda meta: None, np.zeros((1, 10, 11, 12), np.uint8))

    def test_refuses_metadata_of_another_reader(self, tmp_path):
        with pytest.raises(GeometryError, match="ReadScand"):
            self.written(tmp_path, lambda meta: meta.pop("forms"))

    @pytest.mark.parametrize(
        "values",
        [np.full((1, *SHAPE), 0.7, np.float32), np.full((1, *SHAPE), -1, np.int16), np.zeros((2, *SHAPE), np.uint8)],
        ids=["probabilities", "negative", "two channels"],
    )
    def test_refuses_what_is_no_mask(self, tmp_path, values):
        # uint8 of a probability is 0: without this a lesion would vanish without a word
        with pytest.raises((GeometryError, ValueError), match="mask"):
            self.written(tmp_path, lambda meta: None, values)

    def test_mask_left_on_the_model_grid_is_refused_through_monai(self, scan_file, tmp_path):
        data = prediction(preprocessing()({"image": scan_file}))
        data["pred"] = MetaTensor(data["pred"], meta=data["image"].meta)
        saver = SaveImaged(
            "pred", output_dir=tmp_path, output_postfix="", separate_folder=False, writer=NativeMaskWriter
        )
        with pytest.raises(RuntimeError, match="another grid"):
            saver(data)


def test_forms_survive_json(tmp_path):
    # the metadata carries them as text: every bit of every float must come back
    image_hu, _, grid = bleeding_head(matrix=rotation(17, 9) @ np.diag([4 / 3, 1.3, 7.7 / 3]) * 3)
    scan = save_nifti(tmp_path / "scan.nii", image_hu, grid)
    image = ReadScand("image")({"image": scan})["image"]
    assert isinstance(image.meta["forms"], str)
    json.loads(image.meta["forms"])
    assert forms_equal(scan_of(image, CaseRecord("scan", scan)).forms, read_scan(scan).forms)
