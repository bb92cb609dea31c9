"""What a mask measures: millilitres, the bedside rules beside them, and each lesion on its own."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.abc2 import Abc2, SliceStack, lesion_box, measure_stack, slice_stack
from ich_pipeline.geometry import Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.records import NativeMask

SubtypeMl = dict[Subtype, float]


@dataclass(frozen=True)
class LesionReport:
    """One 26-connected lesion; the fields are the columns of lesions.csv.

    `lesion` counts from 1 by falling volume; equal volumes by position, uppermost first, then anterior, then right.
    The centroid is in RAS+ mm. `subtype_ml` is None for a mask without subtypes.
    """

    lesion: int
    volume_ml: float
    centroid_r_mm: float
    centroid_a_mm: float
    centroid_s_mm: float
    abc2_ml: float
    abc2_kothari_ml: float
    tada_ml: float
    a_mm: float
    b_mm: float
    c_mm: float
    slices: int
    touches_border: bool
    subtype_ml: SubtypeMl | None = None


@dataclass(frozen=True)
class VolumeReport:
    """Measures of one mask; the fields are the columns of volumes.csv (docs/measurement.md defines each).

    The three rules without `lesions_sum` take the whole mask as one object; those with it add up the lesions.
    An empty mask reads 0 everywhere. `subtype_ml` is None for a mask without subtypes.
    """

    volume_ml: float
    abc2_ml: float
    abc2_kothari_ml: float
    tada_ml: float
    a_mm: float
    b_mm: float
    c_mm: float
    n_lesions: int
    largest_lesion_ml: float
    slice_spacing_mm: float
    voxel_volume_mm3: float
    touches_border: bool
    gantry_tilt_deg: float
    abc2_lesions_sum_ml: float
    abc2_kothari_lesions_sum_ml: float
    tada_lesions_sum_ml: float
    subtype_ml: SubtypeMl | None = None
    lesions: tuple[LesionReport, ...] = ()


def measure(case_id: str, mask: NativeMask, *, subtypes: bool = False) -> VolumeReport:
    """Measure a mask on its own grid.

    Voxel volume is |det(affine)|; spacing and tilt come from the affine as well, never from header fields.

    Args:
        case_id: named in errors.
        mask: bool or uint8 (I, J, K); every non-zero voxel is hemorrhage.
        subtypes: the values are those of `Subtype`, and millilitres are wanted for each.

    Raises:
        TypeError: the mask is neither bool nor uint8.
        ValueError: `subtypes` is set and the mask holds a value that no subtype has.
    """
    if mask.values.dtype not in (np.bool_, np.uint8):
        raise TypeError(f"{case_id}: mask of {mask.values.dtype}, expected bool or uint8. Threshold it first.")
    box = lesion_box(mask.values)
    if box is None:
        return _report(mask.grid, 0, Abc2(), (), touches_border=False, subtype_ml=_no_blood() if subtypes else None)
    stack = slice_stack(mask, box)
    kinds = _subtype_values(case_id, mask.values[box].transpose(stack.axes)) if subtypes else None
    whole = measure_stack(stack)
    return _report(
        mask.grid,
        int(np.count_nonzero(stack.values)),
        whole,
        _measure_lesions(stack, whole, kinds),
        touches_border=stack.touches_border,
        subtype_ml=None if kinds is None else _subtype_ml(kinds, mask.grid),
    )


def _report(
    grid: Grid,
    voxels: int,
    whole: Abc2,
    lesions: tuple[LesionReport, ...],
    *,
    touches_border: bool,
    subtype_ml: SubtypeMl | None,
) -> VolumeReport:
    return VolumeReport(
        volume_ml=voxels * grid.voxel_volume_mm3 / 1000,
        abc2_ml=whole.abc2_ml,
        abc2_kothari_ml=whole.abc2_kothari_ml,
        tada_ml=whole.tada_ml,
        a_mm=whole.a_mm,
        b_mm=whole.b_mm,
        c_mm=whole.c_mm,
        n_lesions=len(lesions),
        largest_lesion_ml=lesions[0].volume_ml if lesions else 0.0,
        slice_spacing_mm=grid.slice_spacing_mm,
        voxel_volume_mm3=grid.voxel_volume_mm3,
        touches_border=touches_border,
        gantry_tilt_deg=grid.tilt_deg,
        abc2_lesions_sum_ml=sum((lesion.abc2_ml for lesion in lesions), 0.0),
        abc2_kothari_lesions_sum_ml=sum((lesion.abc2_kothari_ml for lesion in lesions), 0.0),
        tada_lesions_sum_ml=sum((lesion.tada_ml for lesion in lesions), 0.0),
        subtype_ml=subtype_ml,
        lesions=lesions,
    )


def _measure_lesions(stack: SliceStack, whole: Abc2, kinds: NDArray[np.uint8] | None) -> tuple[LesionReport, ...]:
    """The 26-connected parts of a stack, largest first."""
    import cc3d  # here, so that tables can be read and written without it

    labels = cc3d.connected_components(stack.values, connectivity=26)
    found = cc3d.statistics(labels)
    voxels = found["voxel_counts"]
    centroids_mm = stack.to_mm(found["centroids"])
    # Position breaks ties of volume in patient coordinates, rounded so that arithmetic noise cannot.
    order = sorted(range(1, len(voxels)), key=lambda n: (-int(voxels[n]), *_down_back_left(centroids_mm[n])))
    lesions = []
    for rank, n in enumerate(order, start=1):
        box = found["bounding_boxes"][n]
        values = labels[box] == n
        part = stack.part(box, values)
        abc2 = whole if len(order) == 1 else measure_stack(part)
        x_mm, y_mm, z_mm = centroids_mm[n].tolist()
        lesions.append(
            LesionReport(
                lesion=rank,
                volume_ml=int(voxels[n]) * stack.grid.voxel_volume_mm3 / 1000,
                centroid_r_mm=x_mm,
                centroid_a_mm=y_mm,
                centroid_s_mm=z_mm,
                abc2_ml=abc2.abc2_ml,
                abc2_kothari_ml=abc2.abc2_kothari_ml,
                tada_ml=abc2.tada_ml,
                a_mm=abc2.a_mm,
                b_mm=abc2.b_mm,
                c_mm=abc2.c_mm,
                slices=abc2.n_slices,
                touches_border=part.touches_border,
                subtype_ml=None if kinds is None else _subtype_ml(kinds[box][values], stack.grid),
            )
        )
    return tuple(lesions)


def _down_back_left(position_mm: NDArray[np.float64]) -> tuple[float, ...]:
    """Sorting key: uppermost, then most anterior, then rightmost first."""
    return tuple((-position_mm[::-1]).round(3).tolist())


def _subtype_values(case_id: str, values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The values of a multi-class label, refused when one of them is no subtype."""
    highest = int(values.max())
    if highest > max(Subtype):
        names = ", ".join(f"{kind.value} {kind.name}" for kind in Subtype)
        raise ValueError(f"{case_id}: label value {highest}, expected 0 or one of {names}. Remap the label first.")
    return values.astype(np.uint8, copy=False)


def _subtype_ml(values: NDArray[np.uint8], grid: Grid) -> SubtypeMl:
    counts = np.bincount(values.ravel(), minlength=len(Subtype) + 1)
    return {kind: int(counts[kind]) * grid.voxel_volume_mm3 / 1000 for kind in Subtype}


def _no_blood() -> SubtypeMl:
    return dict.fromkeys(Subtype, 0.0)
