"""Grids in any orientation, and bodies of known size on them."""

import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from numpy.typing import NDArray

from ich_pipeline.geometry import Grid
from ich_pipeline.records import NativeMask


def make_grid(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    axes: str = "RAS",
    tilt_deg: float = 0.0,
    turn_deg: float = 0.0,
) -> Grid:
    """A grid around the origin.

    Args:
        shape: voxels towards right, anterior and superior, before `axes` reorders them.
        spacing_mm: the same order; between slices along their normal.
        tilt_deg: gantry tilt. The slices lean back while the table still moves straight up: the affine has shear.
        turn_deg: rotation of the whole grid about the patient's long axis.
    """
    tilt, turn = np.radians([tilt_deg, turn_deg])
    right, anterior = np.array([1, 0, 0]), np.array([0, np.cos(tilt), np.sin(tilt)])
    table = np.array([0, 0, 1 / np.cos(tilt)])
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.column_stack([right, anterior, table]) * spacing_mm
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return reorient_grid(Grid(shape, affine), axcodes2ornt(axes))


def reorient_grid(grid: Grid, orientation: NDArray[np.float64]) -> Grid:
    """The same voxels in another order of storage; `orientation` as in nibabel, (3, 2)."""
    shape = tuple(grid.shape[int(np.flatnonzero(orientation[:, 0] == axis)[0])] for axis in range(3))
    return Grid(shape, grid.affine @ inv_ornt_aff(orientation, grid.shape))


def ellipsoid(
    grid: Grid,
    semi_axes_mm: tuple[float, float, float],
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    turn_deg: float = 0.0,
) -> NativeMask:
    """An ellipsoid with two axes in the slices, turned within them. Towards right, front, and across the slices."""
    left_right, front_back = sorted({0, 1, 2} - {grid.slice_axis}, key=lambda axis: -abs(grid.affine[0, axis]))
    frame, _ = np.linalg.qr(grid.affine[:3, [left_right, front_back, grid.slice_axis]])
    frame *= np.sign(np.diag(frame))  # right, anterior, superior, whatever the order of storage
    turn = np.radians(turn_deg)
    frame[:, :2] = frame[:, :2] @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    index_to_body = frame.T @ grid.affine[:3, :3]
    origin = frame.T @ (grid.affine[:3, 3] - frame @ centre_mm)
    distance = np.zeros(grid.shape)
    for steps, start, semi_axis_mm in zip(index_to_body, origin, semi_axes_mm, strict=True):
        i, j, k = np.ogrid[tuple(slice(n) for n in grid.shape)]
        distance += ((i * steps[0] + j * steps[1] + (k * steps[2] + start)) / semi_axis_mm) ** 2
    return NativeMask(distance <= 1, grid)


def empty(grid: Grid) -> NativeMask:
    return NativeMask(np.zeros(grid.shape, bool), grid)


def reorient(mask: NativeMask, orientation: NDArray[np.float64]) -> NativeMask:
    """The same mask in another order of storage."""
    from nibabel.orientations import apply_orientation

    values = apply_orientation(mask.values, orientation)
    return NativeMask(values, Grid(values.shape, mask.grid.affine @ inv_ornt_aff(orientation, mask.grid.shape)))
