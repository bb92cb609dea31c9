"""The whole path with a network that changes nothing: file in, the same body on the same grid out.

`hu_threshold` is the bundle; the body is an ellipsoid of 65 HU, drawn in world coordinates. What comes out is read by
nibabel and compared with the ellipsoid at the world position of every voxel, so no code of ours says where a voxel is.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scan_files import rotation
from shapes import make_grid

from ich_pipeline.bundles import find_bundle, resolve
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter
from ich_pipeline.records import CaseRecord
from ich_pipeline.restoring import write_mask
from ich_pipeline.volumetry import measure

FIELD_MM = np.array([112.0, 128.0, 84.0])  # of a small head: the time goes with the voxels
HEAD_MM = np.array([3.3, -7.1, 12.9])  # its centre: nothing lies at the origin
SKULL_MM, BRAIN = np.array([50.0, 58.0, 60.0]), 0.9
ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(["RL", "AP", "SI"]) for letters in itertools.product(*order)
]
# Stored type, slope and intercept: HU as they are, offset, halved steps, and eight bits.
STORED = {
    "int16": (np.int16, 1.0, 0.0),
    "uint16 + 1024": (np.uint16, 1.0, -1024.0),
    "int16 in halves": (np.int16, 0.5, -200.0),
    "uint8 in eights": (np.uint8, 8.0, -1024.0),
    "int32": (np.int32, 1.0, 0.0),
    "float32": (np.float32, 1.0, 0.0),
    "float64 in thousands": (np.float64, 1000.0, -1000.0),
}
KINDS = {
    "NIfTI-1, gzip": (nib.Nifti1Image, "scan.nii.gz"),
    "NIfTI-1": (nib.Nifti1Image, "scan.nii"),
    "NIfTI-2": (nib.Nifti2Image, "scan.nii.gz"),
    "pair": (nib.Nifti1Pair, "scan.img"),
}


@dataclass(frozen=True)
class Case:
    """One scan: its grid, the body in it, and the way it is written."""

    orientation: str = "LPS"
    pixel_mm: tuple[float, float] = (0.8, 0.8)
    slice_mm: float = 5.0
    tilt_deg: float = 0.0
    oblique_deg: tuple[float, float] = (0.0, 0.0)  # about the axes to the right and up
    # Of the body, towards right, front and up; its centre from that of the head.
    semi_axes_mm: tuple[float, float, float] = (24.0, 20.0, 19.0)
    centre_mm: tuple[float, float, float] = (6.0, -9.0, 4.0)
    stored: str = "int16"
    kind: str = "NIfTI-1"
    byte_order: str = "<"
    forms: str = "both"  # sform, qform or both; a qform holds no shear

    def grid(self) -> Grid:
        spacing_mm = (*self.pixel_mm, self.slice_mm)
        shape = tuple(int(np.ceil(field / step)) for field, step in zip(FIELD_MM, spacing_mm, strict=True))
        grid = make_grid(shape, spacing_mm, axes=self.orientation, tilt_deg=self.tilt_deg)
        turned = np.eye(4)
        turned[:3, :3] = rotation(*self.oblique_deg)
        turned[:3, 3] = HEAD_MM
        return Grid(grid.shape, turned @ grid.affine)

    def inside(self, grid: Grid) -> NDArray[np.bool_]:
        """Voxels whose centre lies in the body."""
        return self._distance(grid, self.semi_axes_mm, self.centre_mm) <= 1

    def image_hu(self, grid: Grid) -> NDArray[np.float64]:
        radius = self._distance(grid, SKULL_MM, (0, 0, 0))
        image_hu = np.select([radius < BRAIN**2, radius < 1], [35.0, 900.0], -1000.0)
        image_hu[self.inside(grid)] = 65
        return image_hu

    def _distance(self, grid: Grid, semi_axes_mm: Any, centre_mm: Any) -> NDArray[np.float64]:
        """Squared distance from a centre in semi-axes, in the patient's own axes."""
        i, j, k = np.ogrid[tuple(slice(n) for n in grid.shape)]
        distance = np.zeros(grid.shape)
        start = grid.affine[:3, 3] - HEAD_MM - centre_mm
        for row, origin, semi_axis in zip(grid.affine[:3, :3], start, semi_axes_mm, strict=True):
            distance += ((row[0] * i + row[1] * j + (row[2] * k + origin)) / semi_axis) ** 2
        return distance

    def write(self, folder: Path) -> Path:
        grid = self.grid()
        dtype, slope, inter = STORED[self.stored]
        stored = (self.image_hu(grid) - inter) / slope
        values = (np.rint(stored) if np.issubdtype(dtype, np.integer) else stored).astype(dtype)
        kind, name = KINDS[self.kind]
        header = kind.header_class(endianness=self.byte_order)
        header.set_xyzt_units("mm")
        header.set_data_dtype(dtype)
        image = kind(values, grid.affine, header)
        image.set_qform(grid.affine, 1 if self.forms != "sform" else 0)
        image.set_sform(grid.affine, 1)
        if self.forms == "qform":
            image.set_sform(np.diag([9.0, 9, 9, 1]), 0)
        image.header.set_slope_inter(slope, inter)
        path = folder / name
        nib.save(image, path)
        return path


Spacing = tuple[float, float, float] | None
FIVE_MM = (5.0, 0.488, 0.488)  # the model grid of the bundles that have a network


@cache
def segmenter(spacing_mm: Spacing = None) -> Segmenter:
    bundle = find_bundle("hu_threshold")
    overrides = {"spacing_mm": list(spacing_mm)} if spacing_mm else {}
    return Segmenter(bundle, resolve(bundle, ["inference"], overrides, None)["inference"])


def through(case: Case, chosen: Segmenter) -> tuple[NDArray[np.bool_], NDArray[np.bool_], float]:
    """Send a case through the whole path: the mask that is written, the body on its grid, and the volume measured."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = case.write(folder)
        prediction = chosen.segment(chosen.read(CaseRecord("scan", path)))
        scan = prediction.scan
        write_mask(folder / "mask.nii.gz", prediction.mask.values, scan.grid, scan.forms)
        mask, original = nib.load(folder / "mask.nii.gz"), nib.load(path)
        assert mask.header.sizeof_hdr == original.header.sizeof_hdr
        np.testing.assert_array_equal(mask.affine, original.affine)
        found = np.asarray(mask.dataobj) > 0
    body = case.inside(Grid(found.shape, mask.affine))
    return found, body, measure("scan", prediction.mask).volume_ml


def check(case: Case, chosen: Segmenter) -> None:
    """The mask is the body, voxel by voxel in world space, and its volume that of the body."""
    found, body, volume_ml = through(case, chosen)
    body_ml = body.sum() * case.grid().voxel_volume_mm3 / 1000
    # The drawing itself is no closer to the body than its voxels are fine.
    analytic_ml = 4 / 3 * np.pi * np.prod(case.semi_axes_mm) / 1000
    assert body_ml == pytest.approx(analytic_ml, rel=0.05 if analytic_ml > 20 else 0.3)
    assert 2 * (found & body).sum() / (found.sum() + body.sum()) >= 0.98
    assert volume_ml == pytest.approx(body_ml, rel=0.01)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_order_of_storage(orientation: str) -> None:
    # Pixels that are not square and a lean: no two axes can be taken for each other.
    check(
        Case(orientation, pixel_mm=(1.0, 0.8), slice_mm=4.0, tilt_deg=14, oblique_deg=(6, -5), forms="sform"),
        segmenter(),
    )


@pytest.mark.parametrize("spacing_mm", [None, FIVE_MM], ids=["own model grid", "5 mm"])
@pytest.mark.parametrize("tilt_deg", [-25.0, -18.5, 0.0, 16.5, 25.0])
@pytest.mark.parametrize("slice_mm", [0.6, 1.25, 2.5, 3.0, 5.0, 7.0])
def test_tilt_both_ways_in_thin_and_thick_slices(tilt_deg: float, slice_mm: float, spacing_mm: Spacing) -> None:
    case = Case(tilt_deg=tilt_deg, slice_mm=slice_mm, pixel_mm=(1.0, 1.0), semi_axes_mm=(24.0, 30.0, 20.0))
    check(case, segmenter(spacing_mm))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", STORED)
def test_every_way_of_storing_values(stored: str, kind: str) -> None:
    for byte_order, forms in (("<", "qform"), (">", "both")):
        check(Case("PIR", (1.0, 1.0), 6.0, stored=stored, kind=kind, byte_order=byte_order, forms=forms), segmenter())


def test_finest_scan() -> None:
    check(Case(pixel_mm=(0.4, 0.4), slice_mm=0.6, tilt_deg=12), segmenter())


def ball(volume_ml: float, slice_mm: float) -> Case:
    radius_mm = (volume_ml * 1000 * 3 / 4 / np.pi) ** (1 / 3)
    return Case(pixel_mm=(0.7, 0.7), slice_mm=slice_mm, semi_axes_mm=(radius_mm,) * 3, centre_mm=(0.2, -9.3, 0.4))


@pytest.mark.parametrize("slice_mm", [0.6, 1.0, 2.5, 5.0])
@pytest.mark.parametrize("volume_ml", [1, 3, 10])
def test_small_bodies(volume_ml: float, slice_mm: float) -> None:
    check(ball(volume_ml, slice_mm), segmenter())


@pytest.mark.parametrize(("volume_ml", "loss"), [(1, 0.08), (3, 0.032), (10, 0.013), (30, 0.008)])
def test_what_five_millimetres_cost_in_thin_slices(volume_ml: float, loss: float) -> None:
    # A share of one half of a 5 mm slice lies deeper in a ball than the surface does. Not the path, but its model grid.
    case = ball(volume_ml, 0.625)
    found, body, _ = through(case, segmenter(FIVE_MM))
    assert 1 - found.sum() / body.sum() == pytest.approx(loss, rel=0.5)


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any scan that is valid, of at most three million voxels."""
    tilt_deg = draw(st.one_of(st.just(0.0), between(-27, 27)))
    slice_mm = draw(st.one_of(st.sampled_from([0.6, 0.625, 1.0, 1.25, 2.5, 3.0, 5.0, 7.0]), between(0.6, 7)))
    finest_mm = max(0.4, float(np.sqrt(np.prod(FIELD_MM) / slice_mm / 3e6)))
    return Case(
        orientation=draw(st.sampled_from(ORIENTATIONS)),
        pixel_mm=(draw(between(finest_mm, 1.0)), draw(between(finest_mm, 1.0))),
        slice_mm=slice_mm,
        tilt_deg=tilt_deg,
        oblique_deg=(draw(between(-12, 12)), draw(between(-20, 20))),
        semi_axes_mm=tuple(draw(between(19, 26)) for _ in range(3)),
        centre_mm=(draw(between(-12, 12)), draw(between(-14, 14)), draw(between(-8, 8))),
        stored=draw(st.sampled_from(list(STORED))),
        kind=draw(st.sampled_from(list(KINDS))),
        byte_order=draw(st.sampled_from("<>")),
        forms=draw(st.sampled_from(["sform", "both"] if tilt_deg else ["sform", "both", "qform"])),
    )


any_case = given(cases())
HOW = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=100, **HOW)
@any_case
def test_any_valid_scan(case: Case) -> None:
    check(case, segmenter())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 280 s on a machine that does nothing else
@settings(max_examples=2000, **HOW)
@any_case
def test_very_many_valid_scans(case: Case) -> None:
    check(case, segmenter())
