"""Grids: the affine and shape of an image, checked once, compared in one place.

Affines map a voxel index (i, j, k) to RAS+ millimetres, as in nibabel. Gantry tilt is shear in the affine and stays
there: nothing here goes through a rotation-only representation.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
    """Shape and affine of a 3D image, and the places of its slices where they are uneven.

    Attributes:
        slice_positions: None where slices lie evenly, as nearly always. Else (K,) along `slice_axis`: slice k lies
            where the affine puts index `slice_positions[k]`; the first is 0 and the last K - 1, so the affine's step
            is the mean one. Each slice then stands for half the way to each neighbour.

    Raises:
        GeometryError: the affine is not 4x4, not finite or singular, the shape is not three positive numbers, or the
            positions do not rise from 0 to K - 1.
    """

    shape: tuple[int, int, int]
    affine: Affine
    slice_positions: NDArray[np.float64] | None = None

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
        if self.slice_positions is not None:
            positions = np.asarray(self.slice_positions, dtype=np.float64)
            n = shape[self.slice_axis]
            rising = positions.shape == (n,) and n > 1 and bool((np.diff(positions) > 0).all())
            if not rising or not np.allclose(positions[[0, -1]], (0, n - 1), rtol=0, atol=1e-6):
                raise GeometryError(
                    f"slice positions {positions.round(3).tolist()}: expected {n} that rise from 0 to {n - 1}"
                )
            object.__setattr__(self, "slice_positions", positions)

    @cached_property
    def voxel_volume_mm3(self) -> float:
        """|det| of the affine: exact under shear, where the product of spacings reads 1/cos(tilt) too high.

        Where slices are uneven it is the mean one: volumes are `foreground_ml`.
        """
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

    def slice_extents(self, first: int, n: int) -> NDArray[np.float64]:
        """What slices first to first + n - 1 stand for, in steps of the affine; those outside as the outermost one."""
        if self.slice_positions is None:
            return np.ones(n)
        steps = np.diff(self.slice_positions)
        extents = np.concatenate([steps[:1], (steps[:-1] + steps[1:]) / 2, steps[-1:]])
        return np.asarray(extents[np.clip(np.arange(first, first + n), 0, len(extents) - 1)])

    def foreground_ml(
        self, foreground: NDArray[np.generic], first_slice: int = 0, slice_axis: int | None = None
    ) -> float:
        """Millilitres of the non-zero voxels of this grid, or of a box of it.

        Args:
            foreground: three axes.
            first_slice: of this grid, that the box begins with.
            slice_axis: that of `foreground` if its axes are in another order than the grid's.
        """
        if self.slice_positions is None:
            return int(np.count_nonzero(foreground)) * self.voxel_volume_mm3 / 1000
        across = self.slice_axis if slice_axis is None else slice_axis
        counts = np.count_nonzero(foreground, axis=tuple({0, 1, 2} - {across}))
        return float(counts @ self.slice_extents(first_slice, len(counts))) * self.voxel_volume_mm3 / 1000

    def to_mm(self, index: NDArray[Any]) -> NDArray[np.float64]:
        """(..., 3) array indices, voxel centres being whole numbers, to RAS+ mm."""
        index = np.array(index, dtype=np.float64)
        if self.slice_positions is not None:
            at = index[..., self.slice_axis]
            index[..., self.slice_axis] = _extended(at, np.arange(len(self.slice_positions)), self.slice_positions)
        return np.asarray(index @ self.affine[:3, :3].T + self.affine[:3, 3])

    def to_index(self, position_mm: NDArray[Any]) -> NDArray[np.float64]:
        """(..., 3) RAS+ mm to array indices: the inverse of `to_mm`."""
        index = (np.asarray(position_mm) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T
        if self.slice_positions is not None:
            at = index[..., self.slice_axis]
            index[..., self.slice_axis] = _extended(at, self.slice_positions, np.arange(len(self.slice_positions)))
        return np.asarray(index)

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


def _extended(at: NDArray[Any], known: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Linear interpolation that goes on straight beyond both ends, where the known and the values are the same."""
    inside = np.clip(at, known[0], known[-1])
    return np.asarray(np.interp(inside, known, values) + (at - inside))


def grid_difference(found: Grid, expected: Grid) -> str | None:
    """Say how two grids differ, or None when they are one within SAME_GRID_TOLERANCE."""
    if found.shape != expected.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    shift_mm = float(np.linalg.norm(found.corners_mm() - expected.corners_mm(), axis=1).max())
    # A one-voxel axis has no second corner to compare, so the voxel's own edges are compared as well.
    shift_mm = max(shift_mm, float(np.abs(found.affine[:3, :3] - expected.affine[:3, :3]).max()))
    if found.slice_positions is not None or expected.slice_positions is not None:
        even = np.arange(expected.shape[expected.slice_axis])
        one, other = (even if g.slice_positions is None else g.slice_positions for g in (found, expected))
        moved = np.abs(one - other).max() if len(one) == len(other) else np.inf
        shift_mm = max(shift_mm, float(moved) * expected.edge_mm[expected.slice_axis])
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
