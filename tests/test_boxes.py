"""Boxes of a second stage: their sources, their way to the model grid, and what lies outside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heads import bleeding_head, save_nifti, save_weights
from monai.data import MetaTensor
from scan_files import MATRICES, SHAPE
from shapes import make_grid
from torch import Tensor

from ich_pipeline.boxes import (
    FileBoxes,
    FindBoxesd,
    KeepInBoxesd,
    box_source,
    boxes_on_model_grid,
    boxes_on_native_grid,
    boxes_sha256,
    check_cases,
    merge_slices,
    plane_shape,
    rectangle,
)
from ich_pipeline.bundles import Bundle
from ich_pipeline.detection import ANY, Box, boxes_of_mask, read_boxes
from ich_pipeline.errors import ConfigError, GeometryError, ManifestError
from ich_pipeline.geometry import Grid
from ich_pipeline.networks.slice_detector import SliceDetector
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.transforms import ModelGrid, ReadScand


def box(k: int, i0: float, j0: float, i1: float, j1: float, case_id: str = "a") -> Box:
    return Box(case_id, k, ANY, i0, j0, i1, j1)


def table(path: Path, *rows: str, header: str = "case_id,slice,subtype,i0,j0,i1,j1") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# ---------------------------------------------------------------- tables


def test_a_3d_box_is_a_box_in_each_of_its_slices(tmp_path: Path) -> None:
    header = "case_id,slice,slice_stop,subtype,i0,j0,i1,j1"
    file = table(tmp_path / "b.csv", "a,3,6,any,1,2,4,5", "a,8,,SDH,0,0,2,2", header=header)
    found = [(each.slice, each.subtype, each.i0, each.j1) for each in read_boxes(file)]
    assert found == [(3, "any", 1, 5), (4, "any", 1, 5), (5, "any", 1, 5), (8, "SDH", 0, 2)]


@pytest.mark.parametrize("stop", ["3", "2", "x"])
def test_a_3d_box_without_slices_is_refused(tmp_path: Path, stop: str) -> None:
    file = table(tmp_path / "b.csv", f"a,3,{stop},any,1,2,4,5", header="case_id,slice,slice_stop,subtype,i0,j0,i1,j1")
    with pytest.raises(ManifestError, match=r"b\.csv row 2"):
        read_boxes(file)


def test_a_case_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "b.csv", "a,3,any,1,2,4,5", "heda1,3,any,1,2,4,5")
    config = {"boxes": str(file), "detector": "x"}
    cases = [CaseRecord("a", tmp_path), CaseRecord("head1", tmp_path)]
    with pytest.raises(ManifestError, match=r"b\.csv: boxes of case 'heda1' .*expected cases among a, head1"):
        check_cases(config, cases)
    check_cases(config, [*cases, CaseRecord("heda1", tmp_path)])
    check_cases({"boxes": "label", "detector": "x"}, [])
    check_cases({"boxes": str(file)}, [])  # a key of some other bundle


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="boxes=labels: expected network, label, whole or a table"):
        box_source("labels", "")
    with pytest.raises(ManifestError, match="no such table"):
        box_source(str(tmp_path / "none.csv"), "")
    with pytest.raises(ConfigError, match=r"no trained detector at .*detector=runs"):
        box_source("network", tmp_path)


# ---------------------------------------------------------------- sources


def read(tmp_path: Path, matrix: str = "plain", **bleed: Any) -> tuple[dict[str, Any], NativeMask]:
    shape = (50, 16, 44) if matrix == "permuted" else SHAPE
    image_hu, label, grid = bleeding_head(matrix=MATRICES[matrix], shape=shape, **bleed)
    path = save_nifti(tmp_path / "head.nii.gz", image_hu, grid)
    item = {"case_id": "a", "image": str(path), "label": str(save_nifti(tmp_path / "label.nii.gz", label, grid))}
    return ReadScand("image")(item), NativeMask(label, grid)


def found(data: dict[str, Any], **source: Any) -> list[list[float]]:
    return json.loads(FindBoxesd("image", **source)(data)["image"].meta["boxes"])


@pytest.mark.parametrize("matrix", ["plain", "permuted"])
def test_boxes_of_the_label_are_tight_and_one_a_slice(tmp_path: Path, matrix: str) -> None:
    data, label = read(tmp_path, matrix)
    planes = np.moveaxis(label.values, label.grid.slice_axis, 0)
    wanted = []
    for k in np.flatnonzero(planes.any(axis=(1, 2))):
        i, j = np.nonzero(planes[k])
        wanted.append([k, i.min(), j.min(), i.max() + 1, j.max() + 1])
    assert found(data, boxes="label") == wanted
    assert len(wanted) > 2


def test_boxes_of_the_label_need_one_on_the_same_grid(tmp_path: Path) -> None:
    data, label = read(tmp_path)
    with pytest.raises(ManifestError, match=r"a: no label, which boxes=label takes"):
        found({key: value for key, value in data.items() if key != "label"}, boxes="label")
    other = Grid(label.grid.shape, label.grid.affine @ np.diag([1, 1, 1.1, 1]))
    save_nifti(Path(data["label"]), label.values, other)
    with pytest.raises(GeometryError, match="a: label is on another grid"):
        found(data, boxes="label")


def test_whole_slices(tmp_path: Path) -> None:
    data, label = read(tmp_path, "permuted")
    assert label.grid.slice_axis == 1
    assert found(data, boxes="whole") == [[k, 0, 0, 50, 44] for k in range(16)]


def test_boxes_of_a_table_stay_as_they_are_and_inside_the_scan(tmp_path: Path) -> None:
    data, _ = read(tmp_path)
    file = table(tmp_path / "b.csv", "a,3,any,1,2,4,5", "a,3,any,10,20,44,50", "other,0,any,0,0,1,1")
    assert found(data, boxes=str(file)) == [[3, 1, 2, 4, 5], [3, 10, 20, 44, 50]]
    assert found({**data, "case_id": "clean"}, boxes=str(file)) == []
    for row, what in (
        ("a,16,any,1,2,4,5", "slice 16"),
        ("a,3,any,1,2,45,5", "i 1 to 45"),
        ("a,3,any,1,-1,4,5", "j -1"),
    ):
        with pytest.raises(ManifestError, match=rf"a: b\.csv has a box .*{what}.*expected i within 0 to 44"):
            found(data, boxes=str(table(tmp_path / "b.csv", row)))


def test_boxes_that_come_with_a_case_go_before_the_source(tmp_path: Path) -> None:
    data, _ = read(tmp_path)
    given = [box(2, 1, 1, 3, 3), box(2, 9, 9, 12, 12)]
    assert found({**data, "boxes": given}, boxes="whole") == [[2, 1, 1, 3, 3], [2, 9, 9, 12, 12]]
    with pytest.raises(ManifestError, match=r"a: the item `boxes` has a box .*slice 16"):
        found({**data, "boxes": [box(16, 1, 1, 3, 3)]}, boxes="whole")


class DenseDetector(SliceDetector):
    """Calls the box around every pixel from `low_hu` to `high_hu` blood; a network in a bundle, but for its answer."""

    def __init__(self, low_hu: float = 60.0, high_hu: float = 70.0, image_size: int = 50) -> None:
        super().__init__(image_size)
        self.limits_hu = torch.nn.Parameter(torch.tensor([low_hu, high_hu]))

    def forward(self, images_hu: Tensor, targets: Tensor | None = None) -> list[Tensor]:
        low_hu, high_hu = self.limits_hu
        boxes = [rectangle((image[0] > low_hu) & (image[0] < high_hu)) for image in images_hu]
        corners = [[] if b is None else [[b[0].start, b[1].start, b[0].stop, b[1].stop, 0.9, 5]] for b in boxes]
        return [torch.tensor(rows, dtype=torch.float32).reshape(-1, 6) for rows in corners]


def detector_bundle(folder: Path) -> Path:
    """A trained detector as `train` would leave it, with a network that needs no training."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"name": "dense", "finds": "boxes"}))
    load = (
        "{_target_: ich_pipeline.engines.load_network, network: '@network_def', weights: '@weights', device: '@device'}"
    )
    config = [
        "bundle_root: .",
        "weights: \"$@bundle_root + '/models/model.pt'\"",
        "device: auto",
        "network_def: {_target_: test_boxes.DenseDetector}",
        f"network: {load}",
        "finder: {_target_: ich_pipeline.detector.Finder, network: '@network', amp: 'off'}",
    ]
    (folder / "configs" / "inference.yaml").write_text("\n".join(config) + "\n")
    save_weights(folder, DenseDetector())
    return folder


@pytest.mark.parametrize("matrix", ["plain", "sheared", "permuted"])
def test_a_detector_finds_what_the_label_says(tmp_path: Path, matrix: str) -> None:
    data, _ = read(tmp_path, matrix)
    folder = detector_bundle(tmp_path / "detector")
    assert found(data, boxes="network", detector=folder) == found(data, boxes="label")


def test_what_boxes_come_from_is_recorded(tmp_path: Path) -> None:
    folder, file = detector_bundle(tmp_path / "detector"), table(tmp_path / "b.csv", "a,3,any,1,2,4,5")
    bundle = Bundle(tmp_path)
    sha256 = json.loads((folder / "configs" / "metadata.json").read_text())["weights_sha256"]
    config = {"boxes": "network", "detector": "$@bundle_root + '/detector'"}
    assert boxes_sha256(bundle, config) == {"boxes_sha256": sha256}
    before = boxes_sha256(bundle, config | {"boxes": str(file)})
    table(file, "a,3,any,1,2,4,6")
    assert boxes_sha256(bundle, config | {"boxes": str(file)}) != before
    assert boxes_sha256(bundle, config | {"boxes": "label"}) == boxes_sha256(bundle, {"boxes": "what"}) == {}
    with pytest.raises(ConfigError, match="no trained detector at"):
        boxes_sha256(bundle, config | {"detector": "none"})


# ---------------------------------------------------------------- geometry


def test_boxes_of_a_slice_become_one() -> None:
    merged = merge_slices([box(4, 5, 5, 6, 6), box(2, 1, 8, 3, 9), box(2, 2, 1.5, 7, 3)])
    assert merged == [box(2, 1, 1.5, 7, 9), box(4, 5, 5, 6, 6)]


def uneven(grid: Grid) -> Grid:
    n = grid.shape[grid.slice_axis]
    return Grid(grid.shape, grid.affine, np.r_[0, np.arange(1, n - 1) + 0.3, n - 1])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("tilt_deg", [0.0, 18.5])
@pytest.mark.parametrize("across", [1.25, 5.0])
@pytest.mark.parametrize("crop", [False, True])
def test_boxes_reach_the_model_grid_exactly(axes: str, tilt_deg: float, across: float, crop: bool) -> None:
    """Corners by way of millimetres, and slices by where `ModelGrid` takes a mask that fills its box."""
    grid = uneven(make_grid((48, 60, 17), (0.8, 0.5, across), axes=axes, tilt_deg=tilt_deg))
    n_i, n_j = plane_shape(grid)
    voxels = tuple((0, n) if axis == grid.slice_axis else (1, n) for axis, n in enumerate(grid.shape)) if crop else None
    for each in (box(3, 4, 7, 9, 15), box(4, 10, 2, n_i, 9), box(16, 1, 1.5, 5, n_j), box(12, 8, 9, 9, 10)):
        mask = torch.as_tensor(boxes_on_native_grid([each], grid)[None], dtype=torch.float32)
        out = ModelGrid((5.0, 0.8, 1.0))(MetaTensor(mask, affine=torch.as_tensor(grid.affine), meta={}), voxels)
        got = boxes_on_model_grid([each], grid, np.asarray(out.affine), out.shape[1:])
        (k,) = np.flatnonzero(got.any(axis=(1, 2)))
        assert np.flatnonzero(np.asarray(out[0]).any(axis=(1, 2))).tolist() == [k]
        corners = np.array(
            [
                np.insert([i, j], grid.slice_axis, each.slice + 0.5)
                for i in (each.i0, each.i1)
                for j in (each.j0, each.j1)
            ]
        )
        corners_mm = (corners - 0.5) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        model = np.linalg.inv(np.asarray(out.affine))
        edges = (corners_mm @ model[:3, :3].T + model[:3, 3] + 0.5)[:, 1:].round(6)
        low, high = np.floor(edges.min(axis=0)), np.minimum(np.ceil(edges.max(axis=0)), got.shape[1:])
        assert rectangle(got[k]) == tuple(slice(int(max(0, a)), int(b)) for a, b in zip(low, high, strict=True))


def test_edges_go_by_scale_and_shift_alone() -> None:
    """Pixels of 1 mm to pixels of 2 mm: edges at whole model pixels stay, others go outwards; slices by floor."""
    grid = make_grid((40, 40, 12), (1.0, 1.0, 1.0), axes="LPS")
    image = MetaTensor(torch.zeros(1, *grid.shape), affine=torch.as_tensor(grid.affine), meta={})
    out = ModelGrid((5.0, 2.0, 2.0))(image)  # SPL: rows to the back as j, columns to the left as i
    assert out.shape[1:] == (3, 20, 20)
    got = boxes_on_model_grid(
        [box(4, 4, 6, 8, 10), box(5, 5, 7, 7, 9), box(11, 0.5, 39.5, 1, 40)], grid, out.affine, (3, 20, 20)
    )
    for k, rows, columns in ((0, (3, 5), (2, 4)), (1, (3, 5), (2, 4)), (2, (19, 20), (0, 1))):
        assert rectangle(got[k]) == (slice(*rows), slice(*columns))


def test_boxes_of_thin_slices_become_one_in_the_thick() -> None:
    grid = make_grid((40, 40, 10), axes="LPS")
    out = ModelGrid((5.0, 1.0, 1.0))(
        MetaTensor(torch.zeros(1, *grid.shape), affine=torch.as_tensor(grid.affine), meta={})
    )
    got = boxes_on_model_grid([box(0, 3, 4, 5, 6), box(4, 20, 1, 22, 2)], grid, out.affine, out.shape[1:])
    assert rectangle(got[0]) == (slice(1, 6), slice(3, 22))
    assert got[0].sum() == 5 * 19
    assert not got[1].any()


def test_fractions_of_pixels_count_on_the_native_grid() -> None:
    grid = make_grid((6, 7, 3))
    inside = boxes_on_native_grid([box(1, 1.2, 2, 2.1, 4), box(2, -3, 5, 1, 99)], grid)
    assert np.argwhere(inside[:, :, 1]).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert np.argwhere(inside[:, :, 2]).tolist() == [[0, 5], [0, 6]]
    assert not inside[:, :, 0].any()


def test_a_score_outside_the_boxes_is_zeroed(tmp_path: Path) -> None:
    data, label = read(tmp_path, "permuted")
    data = FindBoxesd("image", boxes="label")(data)
    score = MetaTensor(torch.full((1, *label.grid.shape), 0.7), meta=data["image"].meta)
    kept = np.asarray(KeepInBoxesd("pred")({"pred": score})["pred"][0])
    inside = boxes_on_native_grid(boxes_of_mask("a", label, regions=False), label.grid)
    np.testing.assert_allclose(kept, np.where(inside, 0.7, 0), rtol=1e-6)
    assert 0 < inside.sum() < inside.size


def test_file_boxes_are_kept_by_case(tmp_path: Path) -> None:
    file = table(tmp_path / "b.csv", "a,3,any,1,2,4,5", "b,1,any,1,2,4,5", "a,4,any,1,2,4,5")
    assert {key: len(held) for key, held in FileBoxes(file).by_case.items()} == {"a": 2, "b": 1}
