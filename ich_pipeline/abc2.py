"""ABC/2 and its kin: what a ruler on the scan would have said.

A, B and C follow Kothari et al., Stroke 1996;27:1304. They are measured on the corners of pixels in millimetres of the
slice plane, so that shear, oblique or mirrored axes and anisotropic pixels change nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import pi

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.geometry import Grid
from ich_pipeline.records import NativeMask

# Lengths closer than this are equal. A float32 header makes equal lengths differ by about 1e-5 mm over a head.
TIE_MM = 1e-4

Box = tuple[slice, slice, slice]
PointMm = tuple[float, float, float]
SegmentMm = tuple[PointMm, PointMm]


@dataclass(frozen=True)
class Abc2:
    """Ruler measures of one object; all 0 and without index slice for an empty one.

    Attributes:
        a_mm: longest diameter, on pixel corners, in the index slice (the one with the largest area).
        b_mm: caliper width across it in the same slice.
        c_mm: slice spacing x number of slices that hold the object; of uneven slices the sum of their extents.
        c_kothari_mm: the same with each slice weighted by its area.
        n_slices: slices that hold the object.
        index_slice: array index of the index slice along the grid's slice axis.
    """

    a_mm: float = 0.0
    b_mm: float = 0.0
    c_mm: float = 0.0
    c_kothari_mm: float = 0.0
    n_slices: int = 0
    index_slice: int | None = None

    @property
    def abc2_ml(self) -> float:
        """A B C / 2 with unweighted C; 3/pi of an ellipsoid."""
        return self.a_mm * self.b_mm * self.c_mm / 2000

    @property
    def abc2_kothari_ml(self) -> float:
        """A B C / 2 with slices weighted as in Kothari et al. 1996; 0.652 of an ellipsoid."""
        return self.a_mm * self.b_mm * self.c_kothari_mm / 2000

    @property
    def tada_ml(self) -> float:
        """pi/6 A B C with unweighted C; exact on an ellipsoid whose first two axes lie in the slice."""
        return pi / 6 * self.a_mm * self.b_mm * self.c_mm / 1000


@dataclass(frozen=True, eq=False)
class SliceStack:
    """An object cropped to its box, axial slices first.

    Attributes:
        values: bool (slices, P, Q).
        axes: array axes of the grid that the three axes of `values` run along; the first is the slice axis.
        start: index of the box's first voxel along those axes.
        grid: the whole grid.
    """

    values: NDArray[np.bool_]
    axes: tuple[int, int, int]
    start: tuple[int, int, int]
    grid: Grid

    def part(self, box: Box, values: NDArray[np.bool_]) -> "SliceStack":
        """The object `values` that fills `box` of this stack."""
        k, p, q = (first + side.start for first, side in zip(self.start, box, strict=True))
        return SliceStack(values, self.axes, (k, p, q), self.grid)

    @cached_property
    def to_plane_mm(self) -> NDArray[np.float64]:
        """(2, 2), rows for P and Q: steps in the slice to mm in an orthonormal basis of the slice plane."""
        steps_mm = self.grid.affine[:3, self.axes[1:]]
        return np.asarray(np.linalg.cholesky(steps_mm.T @ steps_mm), dtype=np.float64)

    def to_mm(self, index: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 3) positions in `values`, voxel centres being whole numbers, to RAS+ mm."""
        return self.grid.to_mm((index + self.start)[..., np.argsort(self.axes)])

    def ml(self, values: NDArray[np.generic], margin: int = 0) -> float:
        """Millilitres of the non-zero voxels of `values`, which fills the box, or it and a margin around it."""
        return self.grid.foreground_ml(values, self.start[0] - margin, slice_axis=0)

    @property
    def touches_border(self) -> bool:
        """Whether the box reaches the first or last plane of the grid along any axis."""
        ends = zip(self.axes, self.start, self.values.shape, strict=True)
        return any(first == 0 or first + n == self.grid.shape[axis] for axis, first, n in ends)


def lesion_box(values: NDArray[np.generic]) -> Box | None:
    """Smallest index ranges that hold every non-zero voxel, or None.

    Args:
        values: bool or uint8 (I, J, K), in any memory order; read once and never copied.
    """
    order = np.argsort([-abs(stride) for stride in values.strides])
    in_memory_order = values.view(np.uint8).transpose(order)
    shadow = in_memory_order.max(axis=0)  # the fastest pass in either order: whole planes, vectorised
    if not shadow.any():
        return None
    second, third = _range(shadow.max(axis=1)), _range(shadow.max(axis=0))
    sides = (_range(in_memory_order[:, second, third].max(axis=(1, 2))), second, third)
    i, j, k = (sides[position] for position in np.argsort(order))
    return i, j, k


def _range(line: NDArray[np.uint8]) -> slice:
    filled = np.flatnonzero(line)
    return slice(int(filled[0]), int(filled[-1]) + 1)


def slice_stack(mask: NativeMask, box: Box) -> SliceStack:
    """Crop a mask to `box` and put its axial slices first.

    The two axes in the slice keep their order in memory, which makes the copy of the crop cheap.
    """
    across = mask.grid.slice_axis
    p, q = sorted({0, 1, 2} - {across}, key=lambda axis: -abs(mask.values.strides[axis]))
    crop = mask.values[box].transpose(across, p, q)
    start = (box[across].start, box[p].start, box[q].start)
    return SliceStack(np.ascontiguousarray(crop != 0), (across, p, q), start, mask.grid)


def measure_abc2(mask: NativeMask) -> Abc2:
    """A, B, C and the three rules for a mask taken as one object."""
    box = lesion_box(mask.values)
    return measure_stack(slice_stack(mask, box)) if box else Abc2()


def measure_stack(stack: SliceStack) -> Abc2:
    """A, B, C and the three rules for an object cropped to its box.

    Of several slices with the same largest area the one with the longest A counts, then the widest B, then the
    nearest to the object's centroid, then the uppermost. None of this depends on the order of storage.
    """
    areas = np.array([np.count_nonzero(plane) for plane in stack.values])
    largest = areas.max()
    candidates = [(int(k), _calipers(stack, int(k))) for k in np.flatnonzero(areas == largest)]
    k, calipers = candidates[0] if len(candidates) == 1 else _break_tie(stack, areas, candidates)
    # Whole numbers: 75 % and 25 % of the largest area are compared exactly.
    weights = np.where(4 * areas >= 3 * largest, 1.0, np.where(4 * areas >= largest, 0.5, 0.0))
    spacing_mm = stack.grid.slice_spacing_mm
    extents = stack.grid.slice_extents(stack.start[0], len(areas))
    n_slices = int(np.count_nonzero(areas))
    return Abc2(
        a_mm=calipers.a_mm,
        b_mm=calipers.b_mm,
        c_mm=spacing_mm * float(extents[areas > 0].sum()),
        c_kothari_mm=spacing_mm * float(extents @ weights),
        n_slices=n_slices,
        index_slice=k + stack.start[0],
    )


def caliper_lines_mm(mask: NativeMask) -> tuple[SegmentMm, SegmentMm] | None:
    """Where A and B lie in the index slice of a mask taken as one object, for drawing; None for an empty mask.

    Of diameters equal in A and in B the line is the first in patient coordinates. B is drawn where its two ends
    are nearest to the outline.

    Returns:
        Ends of A and ends of a segment of length B across it, in RAS+ mm.
    """
    box = lesion_box(mask.values)
    if box is None:
        return None
    stack = slice_stack(mask, box)
    k = (measure_stack(stack).index_slice or 0) - stack.start[0]
    calipers = _calipers(stack, k)
    return min(
        (_segment_mm(stack, k, a_line), _segment_mm(stack, k, b_line)) for a_line, b_line in calipers.lines_in_plane()
    )


@dataclass(frozen=True, eq=False)
class _Calipers:
    """A and B of a slice, with the diameters that share them (rows of `a_ends`, indices into `hull_mm`)."""

    hull_mm: NDArray[np.float64]
    a_ends: NDArray[np.intp]
    a_mm: float
    b_mm: float

    def lines_in_plane(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Ends of A and of B, (2, 2) each in mm of the slice plane, for each of the equal diameters."""
        for pair in self.a_ends:
            one, other = self.hull_mm[pair]
            along = (other - one) / np.linalg.norm(other - one)
            across = np.array([-along[1], along[0]])
            offset_mm = (self.hull_mm - one) @ across
            low, high = offset_mm.argmin(), offset_mm.argmax()
            crossing = one + along * ((self.hull_mm[[low, high]].mean(axis=0) - one) @ along)
            yield np.stack([one, other]), crossing + np.outer(offset_mm[[low, high]], across)


def _calipers(stack: SliceStack, k: int) -> _Calipers:
    """A and B of slice `k`. Of longest diameters within TIE_MM of each other the one with the widest B counts."""
    hull_mm = _corner_hull(stack.values[k]) @ stack.to_plane_mm
    steps_mm = hull_mm[:, None] - hull_mm
    length_mm = np.sqrt(np.einsum("ijx,ijx->ij", steps_mm, steps_mm))
    a_mm = length_mm.max()
    a_ends = np.argwhere(length_mm >= a_mm - TIE_MM)
    a_ends = a_ends[a_ends[:, 0] < a_ends[:, 1]]
    along = hull_mm[a_ends[:, 1]] - hull_mm[a_ends[:, 0]]
    across = along[:, ::-1] * (-1, 1) / length_mm[tuple(a_ends.T)][:, None]
    offset_mm = hull_mm @ across.T
    width_mm = offset_mm.max(axis=0) - offset_mm.min(axis=0)
    b_mm = width_mm.max()
    return _Calipers(hull_mm, a_ends[width_mm >= b_mm - TIE_MM], float(a_mm), float(b_mm))


def _break_tie(
    stack: SliceStack, areas: NDArray[np.intp], candidates: list[tuple[int, _Calipers]]
) -> tuple[int, _Calipers]:
    longest_mm = max(found.a_mm for _, found in candidates)
    candidates = [(k, found) for k, found in candidates if found.a_mm >= longest_mm - TIE_MM]
    widest_mm = max(found.b_mm for _, found in candidates)
    candidates = [(k, found) for k, found in candidates if found.b_mm >= widest_mm - TIE_MM]
    centroid = float(areas @ np.arange(len(areas)) / areas.sum())
    # This row of the inverse is the slice normal towards rising index; its sign says whether that is up.
    upward = np.sign(np.linalg.inv(stack.grid.affine[:3, :3])[stack.axes[0], 2])
    return min(candidates, key=lambda each: (round(abs(each[0] - centroid), 9), -upward * each[0]))


def _segment_mm(stack: SliceStack, k: int, ends_in_plane: NDArray[np.float64]) -> SegmentMm:
    """Ends of a line in slice `k` in RAS+ mm, rounded and sorted so that the order of storage cannot show."""
    corners = np.linalg.solve(stack.to_plane_mm.T, ends_in_plane.T).T
    index = np.column_stack([np.full(2, float(k)), corners - 0.5])
    low, high = sorted(tuple(point) for point in stack.to_mm(index).round(4).tolist())
    return low, high


def _corner_hull(plane: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Convex hull of the pixel corners of a slice, in whole numbers: pixel (p, q) spans p..p+1, q..q+1.

    Only the two ends of each line of pixels can be on it. Convexity survives any affine map, so the hull is exact
    before millimetres come in.
    """
    lines = np.flatnonzero(plane.any(axis=1))
    filled = plane[lines]
    first = filled.argmax(axis=1)
    end = plane.shape[1] - filled[:, ::-1].argmax(axis=1)
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    for line, low, high in zip(lines.tolist(), first.tolist(), end.tolist(), strict=True):
        left[line] = min(left.get(line, low), low)
        left[line + 1] = low
        right[line] = max(right.get(line, high), high)
        right[line + 1] = high
    chain = _lower_chain(list(left.items()))
    chain += [(line, -column) for line, column in _lower_chain([(line, -column) for line, column in right.items()])]
    return np.array(chain, dtype=np.float64)


def _lower_chain(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Lower convex hull of points sorted by their first coordinate (Andrew's monotone chain)."""
    chain: list[tuple[int, int]] = []
    for x, y in points:
        while len(chain) >= 2:
            (x0, y0), (x1, y1) = chain[-2:]
            if (x1 - x0) * (y - y0) > (x - x0) * (y1 - y0):
                break
            chain.pop()
        chain.append((x, y))
    return chain
