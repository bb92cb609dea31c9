"""Grids: the affine and shape of an image, checked once, compared in one place.

Affines map a voxel index (i, j, k) to RAS+ millimetres, as in nibabel. Gantry tilt is shear in the affine and stays
there: nothing here goes through a rotation-only representation.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.errors import GeometryError

Affine = NDArray[np.float64]

# Plausible for a head CT: the smallest pixel on the market to a thick localizer; a tight crop of a small child's head
# to head and neck in a wide field. A whole body is longer.
VOXEL_VOLUME_MM3 = (1e-3, 1e3)
FIELD_MM = (50.0, 600.0)
# Two grids are one when no voxel corner moves by more than this share of the smallest voxel edge.
SAME_GRID_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Grid:
    """Shape and affine of a 3D image.

    Raises:
        GeometryError: the affine is not 4x4, not finite or singular, or the shape is not three positive numbers.
    """

    shape: tuple[int, int, int]
    affine: Affine

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1)):
            raise GeometryError(f"affine is not a finite 4x4 matrix with last row 0 0 0 1: {affine.tolist()}")
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"shape {shape}: expected three positive numbers (a 3D image)")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() == 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
            raise GeometryError(f"affine {affine[:3, :3].tolist()} is singular: voxels have no volume")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @cached_property
    def voxel_volume_mm3(self) -> float:
        """|det| of the affine: exact under shear, where the product of spacings reads 1/cos(tilt) too high."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @cached_property
    def edge_mm(self) -> tuple[float, float, float]:
        """Length of one step along each array axis; for the slice axis of a tilted scan not the slice spacing."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @cached_property
    def slice_axis(self) -> int:
        """Array axis across axial slices: the one whose slice plane has its normal nearest the patient's long axis."""
        normals = np.linalg.inv(self.affine[:3, :3])  # row a is normal to the plane that axis a steps across
        return int(np.argmax(np.abs(normals[:, 2]) / np.linalg.norm(normals, axis=1)))

    @cached_property
    def plane_axes(self) -> tuple[int, int]:
        """Array axes in the slice: the one nearest anterior-posterior (rows of a picture), then the other (columns)."""
        one, other = sorted({0, 1, 2} - {self.slice_axis})
        steps = np.abs(self.affine[:3, :3] / self.edge_mm)
        if steps[1, one] * steps[0, other] < steps[1, other] * steps[0, one]:
            return other, one
        return one, other

    @cached_property
    def slice_spacing_mm(self) -> float:
        """Distance between slice planes along their normal."""
        return float(1.0 / np.linalg.norm(np.linalg.inv(self.affine[:3, :3])[self.slice_axis]))

    @cached_property
    def tilt_deg(self) -> float:
        """Angle between the step from slice to slice and the slice normal: the gantry tilt that the affine holds."""
        cosine = self.slice_spacing_mm / self.edge_mm[self.slice_axis]
        return float(np.degrees(np.arccos(min(cosine, 1.0))))

    def corners_mm(self) -> NDArray[np.float64]:
        """(8, 3) positions of the centres of the eight corner voxels in RAS+ mm."""
        index = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), axis=-1).reshape(8, 3)
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]

    def check_plausible(self, case_id: str) -> None:
        """Refuse voxels or fields of view that no head CT has.

        Raises:
            GeometryError: voxel volume or field of view outside the stated range, as when units are metres.
        """
        if not VOXEL_VOLUME_MM3[0] <= self.voxel_volume_mm3 <= VOXEL_VOLUME_MM3[1]:
            raise GeometryError(
                f"{case_id}: voxel volume {self.voxel_volume_mm3:.3g} mm3, expected {VOXEL_VOLUME_MM3[0]:g} to "
                f"{VOXEL_VOLUME_MM3[1]:g}. Check the file's units and spacing."
            )
        field_mm = np.array(self.shape) * self.edge_mm
        in_plane_mm = np.delete(field_mm, self.slice_axis)
        if in_plane_mm.min() < FIELD_MM[0] or field_mm.max() > FIELD_MM[1]:
            raise GeometryError(
                f"{case_id}: field of view {field_mm.round(1).tolist()} mm, expected {FIELD_MM[0]:g} mm or more in "
                f"plane and at most {FIELD_MM[1]:g}. Check the file's units and spacing."
            )


def grid_difference(found: Grid, expected: Grid) -> str | None:
    """Say how two grids differ, or None when they are one within SAME_GRID_TOLERANCE."""
    if found.shape != expected.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    shift_mm = float(np.linalg.norm(found.corners_mm() - expected.corners_mm(), axis=1).max())
    # A one-voxel axis has no second corner to compare, so the voxel's own edges are compared as well.
    shift_mm = max(shift_mm, float(np.abs(found.affine[:3, :3] - expected.affine[:3, :3]).max()))
    tolerance_mm = SAME_GRID_TOLERANCE * min(expected.edge_mm)
    if shift_mm > tolerance_mm:
        return f"voxels lie up to {shift_mm:.4g} mm apart (tolerance {tolerance_mm:.4g} mm)"
    return None


def require_same_grid(case_id: str, what: str, found: Grid, expected: Grid) -> None:
    """Refuse a mask that is not on its scan's grid.

    Raises:
        GeometryError: naming the case, what was compared, found and expected.
    """
    difference = grid_difference(found, expected)
    if difference:
        raise GeometryError(f"{case_id}: {what} is on another grid than its scan: {difference}. Resample it first.")
