"""What a reader of the number should know of the scan. Flags never change it; docs/measurement.md lists the rules.

Rules are plain on purpose: they say "look at the picture", not what is wrong. They look at every second millimetre in
plane and at every slice.
"""

from collections.abc import Sequence
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d

from ich_pipeline.geometry import Affine, Grid

SAMPLE_MM = 2.0
BONE_HU = 300
# Enamel and the densest bone stay below; 12-bit scanners write 3071 for all that is denser.
METAL_HU, METAL_ML = 3000, 0.1
# Blood, even clotted and dense, stays below 100 HU; opacified vessels reach 600 in an angiogram. Calcium is as bright,
# but pineal gland, choroid plexus and basal ganglia are shorter; dura lies within BONE_MARGIN_MM of bone.
VESSEL_HU, VESSEL_MM, BONE_MARGIN_MM = (130, 600), 40.0, 8.0
# The inside of the skull moves evenly from slice to slice; this far off the middle of its neighbours it jumped (a step
# of twice as much). Nearer the vertex than LARGE_SLICE of the largest area it is cut too flat, and where its area jumps
# as well the skull is open or out of the field.
JUMP_MM, LARGE_SLICE, OTHER_AREA = 2.0, 0.7, 0.03
# Its ends are where this share of its area lies on one side: a single pixel moves none of them.
ENDS = (0.1, 0.9)
SLICE_TOLERANCE = 0.1
RESAMPLING_FACTOR = 3.0


def scan_flags(image_hu: NDArray[Any], grid: Grid) -> tuple[str, ...]:
    """Suspicions from the image alone: `metal_suspected`, `contrast_suspected`, `motion_suspected`.

    Motion is not looked for in uneven slices: where their distance changes, so does the outline.

    Args:
        image_hu: (I, J, K) Hounsfield units.
        grid: its grid.
    """
    steps = [max(1, round(SAMPLE_MM / edge)) for edge in grid.edge_mm]
    steps[grid.slice_axis] = 1
    order = (grid.slice_axis, *grid.plane_axes)
    sample_hu = np.ascontiguousarray(image_hu[tuple(slice(None, None, s) for s in steps)].transpose(order))
    edge_mm = [grid.edge_mm[axis] * steps[axis] for axis in order]
    voxel_ml = grid.voxel_volume_mm3 * float(np.prod(steps)) / 1000
    skull, inside = _skull(sample_hu)
    slices_up = bool(grid.affine[2, grid.slice_axis] > 0)
    found = {
        "metal_suspected": np.count_nonzero(sample_hu >= METAL_HU) * voxel_ml >= METAL_ML,
        "contrast_suspected": _longest_vessel_mm(sample_hu, skull, inside, edge_mm) >= VESSEL_MM,
        "motion_suspected": grid.slice_positions is None and _largest_jump_mm(inside, edge_mm, slices_up) >= JUMP_MM,
    }
    return tuple(flag for flag, is_so in found.items() if is_so)


def fit_flags(grid: Grid, model_affine: Affine, trained_slice_mm: Sequence[float] | None) -> tuple[str, ...]:
    """What a bundle's model grid and training do not fit: `strong_resampling`, `untrained_slice_spacing`.

    Args:
        grid: of the scan.
        model_affine: of the image that the network saw.
        trained_slice_mm: least and largest slice spacing of the training scans; None where the bundle does not say.
    """
    # Model steps in native voxels: one entry a column, whatever the order of axes.
    steps = np.abs(np.linalg.inv(grid.affine[:3, :3]) @ np.asarray(model_affine)[:3, :3]).max(axis=0)
    flags: tuple[str, ...] = ()
    if max(steps.max(), 1 / steps.min()) > RESAMPLING_FACTOR:
        flags += ("strong_resampling",)
    if trained_slice_mm is not None:
        low, high = trained_slice_mm[0] * (1 - SLICE_TOLERANCE), trained_slice_mm[1] * (1 + SLICE_TOLERANCE)
        if not low <= grid.slice_spacing_mm <= high:
            flags += ("untrained_slice_spacing",)
    return flags


def _skull(sample_hu: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The largest piece of bone, and what has it on all four sides in its slice."""
    bone = sample_hu >= BONE_HU
    skull = cc3d.largest_k(bone, k=1, connectivity=26) > 0 if bone.any() else bone
    inside = ~skull
    for axis in (1, 2):
        before = np.maximum.accumulate(skull, axis=axis)
        after = np.flip(np.maximum.accumulate(np.flip(skull, axis), axis=axis), axis)
        inside &= before & after
    return skull, inside


def _longest_vessel_mm(
    sample_hu: NDArray[Any], skull: NDArray[np.bool_], inside: NDArray[np.bool_], edge_mm: Sequence[float]
) -> float:
    """Diagonal of the box around the longest thing of vessel brightness inside the skull and away from it."""
    near = skull
    for axis in (1, 2):
        near = maximum_filter1d(near, 2 * round(BONE_MARGIN_MM / edge_mm[axis]) + 1, axis=axis)
    bright = inside & ~near & (sample_hu >= VESSEL_HU[0]) & (sample_hu < VESSEL_HU[1])
    boxes = cc3d.statistics(cc3d.connected_components(bright, connectivity=26))["bounding_boxes"][1:]
    extents = [[(s.stop - s.start) * e for s, e in zip(box, edge_mm, strict=True)] for box in boxes]
    return max((float(np.linalg.norm(extent)) for extent in extents), default=0.0)


def _largest_jump_mm(inside: NDArray[np.bool_], edge_mm: Sequence[float], slices_up: bool) -> float:
    """How far the skull's inside lies off its neighbours, from its largest slice upwards.

    Both ends of it have to lie off to the same side, and the nearer counts: where the forehead or the face comes into a
    tilted slice, one end moves alone.
    """
    inside = inside if slices_up else inside[::-1]
    area = np.count_nonzero(inside, axis=(1, 2)).astype(float)
    last = int(np.flatnonzero(area >= LARGE_SLICE * area.max())[-1])
    first = int(area.argmax())
    area, upper = area[first : last + 1], inside[first : last + 1]
    if len(upper) < 3 or not area.any():
        return 0.0
    moved_mm = []
    for axis in (1, 2):
        # A slice without inside changes too far in area to count.
        shares = upper.sum(axis=3 - axis).cumsum(axis=1) / np.maximum(area, 1)[:, None]
        pixels = np.arange(shares.shape[1])
        ends_mm = np.array([np.interp(ENDS, share, pixels) for share in shares]) * edge_mm[axis]
        off_mm = _off_neighbours(ends_mm)
        same_side = off_mm[:, 0] * off_mm[:, 1] > 0
        moved_mm.append(np.where(same_side, np.abs(off_mm).min(axis=1), 0))
    other = np.abs(_off_neighbours(area)) > OTHER_AREA * area[1:-1]
    return float(np.where(other, 0, np.hypot(*moved_mm)).max())


def _off_neighbours(values: NDArray[Any]) -> NDArray[Any]:
    """How far each but the first and last lies off the middle of its neighbours."""
    return np.asarray(values[1:-1] - (values[:-2] + values[2:]) / 2)
