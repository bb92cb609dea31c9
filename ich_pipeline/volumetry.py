"""What a mask measures: millilitres, the bedside rules beside them, and each lesion on its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import pi
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.abc2 import Abc2, Box, SliceStack, lesion_box, measure_stack, slice_stack
from ich_pipeline.geometry import Grid, require_same_grid
from ich_pipeline.labels import Subtype
from ich_pipeline.records import NativeMask

SubtypeMl = dict[Subtype, float]

# The volume that decides about surgery and enrolment in most trials.
THRESHOLD_ML = 30.0
# Blood that a ruler cannot measure: it follows sulci, the skull or the ventricles and is nowhere near an ellipsoid.
NO_ELLIPSOID = (Subtype.IVH, Subtype.SAH, Subtype.SDH)
HALF_VOXEL, PROBABILITY, ENSEMBLE = "half_voxel", "probability", "ensemble"


@dataclass(frozen=True)
class LesionReport:
    """One 26-connected lesion; the fields are the columns of lesions.csv.

    `lesion` counts from 1 by falling volume; equal volumes by position, uppermost first, then anterior, then right.
    The centroid is in RAS+ mm. `subtype_ml` and `abc2_applies` are None for a mask without subtypes; the rules mean
    something (`abc2_applies`) where most of the lesion is epidural or intraparenchymal. `score` is None unless a
    network that finds instances made the mask (`with_lesion_scores`).
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
    abc2_applies: bool | None = None
    score: float | None = None
    subtype_ml: SubtypeMl | None = None


@dataclass(frozen=True)
class VolumeReport:
    """Measures of one mask; the fields are the columns of volumes.csv (docs/measurement.md defines each).

    The three rules without `lesions_sum` take the whole mask as one object; those with it add up the lesions.
    An empty mask reads 0 everywhere. `subtype_ml` and `abc2_applies` are None for a mask without subtypes, the three
    edema fields without an edema mask. The rules mean something (`abc2_applies`) when they do for every lesion.

    Attributes:
        volume_low_ml, volume_high_ml: what the same outline may hold, by `band`: `half_voxel` moves the boundary of the
            mask by half a voxel, `probability` moves the network's threshold half way to 1 and to 0, `ensemble` is what
            the members of an ensemble say.
        from_30_ml: volume less 30 mL; `band_holds_30`: 30 mL lies in the band, so the side it is on is not certain.
        edema_ratio: edema to bleed, where there is a bleed; the parenchymal bleed where subtypes are known.
        edema_extension_mm: how far edema reaches beyond the bleed if both were spheres (Parry-Jones et al., Stroke
            2015;46:1536).
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
    volume_low_ml: float
    volume_high_ml: float
    band: str
    from_30_ml: float
    band_holds_30: bool
    abc2_applies: bool | None = None
    edema_ml: float | None = None
    edema_ratio: float | None = None
    edema_extension_mm: float | None = None
    subtype_ml: SubtypeMl | None = None
    lesions: tuple[LesionReport, ...] = ()


def measure(case_id: str, mask: NativeMask, *, subtypes: bool = False, edema: NativeMask | None = None) -> VolumeReport:
    """Measure a mask on its own grid.

    Voxel volume is |det(affine)|; spacing and tilt come from the affine as well, never from header fields.

    Args:
        case_id: named in errors.
        mask: bool or uint8 (I, J, K); every non-zero voxel is hemorrhage.
        subtypes: the values are those of `Subtype`, and millilitres are wanted for each.
        edema: perihematomal edema on the same grid, non-zero; where it overlaps the bleed it is bleed.

    Raises:
        TypeError: a mask is neither bool nor uint8.
        ValueError: `subtypes` is set and the mask holds a value that no subtype has.
        GeometryError: the edema is on another grid.
    """
    if mask.values.dtype not in (np.bool_, np.uint8):
        raise TypeError(f"{case_id}: mask of {mask.values.dtype}, expected bool or uint8. Threshold it first.")
    box = lesion_box(mask.values)
    if box is None:
        report = _report(mask.grid, 0.0, Abc2(), (), (0.0, 0.0), touches_border=False)
        report = replace(report, subtype_ml=_no_blood(), abc2_applies=True) if subtypes else report
    else:
        stack = slice_stack(mask, box)
        kinds = subtype_values(case_id, mask.values[box].transpose(stack.axes)) if subtypes else None
        whole = measure_stack(stack)
        lesions = _measure_lesions(stack, whole, kinds)
        volume_ml = stack.ml(stack.values)
        band = _half_voxel_band(stack, volume_ml)
        report = _report(mask.grid, volume_ml, whole, lesions, band, touches_border=stack.touches_border)
        if kinds is not None:
            applies = all(lesion.abc2_applies for lesion in lesions)
            report = replace(report, subtype_ml=_subtype_ml(kinds, stack), abc2_applies=applies)
    return report if edema is None else _with_edema(case_id, report, mask, edema)


def with_probability_band(
    report: VolumeReport, probability: NDArray[np.floating], threshold: float, grid: Grid
) -> VolumeReport:
    """The report of a predicted mask with a band that says how sure the network was, not how coarse the voxels are.

    Args:
        probability: (I, J, K) in [0, 1].
        threshold: that made the mask; the band's ends are the volumes at thresholds half way from it to 1 and to 0.
            Steps after the threshold can put the mask's own volume outside these; then it is the band's end.
        grid: of mask and probability.
    """
    low_ml, high_ml = (grid.foreground_ml(probability > cut) for cut in ((threshold + 1) / 2, threshold / 2))
    ends_ml = min(low_ml, report.volume_ml), max(high_ml, report.volume_ml)
    return replace(report, **_band_fields(*ends_ml, PROBABILITY))


def with_ensemble_band(report: VolumeReport, member_ml: Sequence[float]) -> VolumeReport:
    """The report of an ensemble's mask with a band from the least to the most that a member says, its own included."""
    ends_ml = min(*member_ml, report.volume_ml), max(*member_ml, report.volume_ml)
    return replace(report, **_band_fields(*ends_ml, ENSEMBLE))


def with_lesion_scores(report: VolumeReport, mask: NativeMask, probability: NDArray[np.floating]) -> VolumeReport:
    """The report with a score for each lesion: the highest probability in it.

    Where the probability is the score of an instance times that of its mask, this is the score of the surest of the
    instances that made the lesion, times what its mask reaches.

    Args:
        mask: that the report is of.
        probability: (I, J, K) in [0, 1].
    """
    numbers = label_lesions(mask)
    held = numbers > 0
    scores = np.zeros(len(report.lesions) + 1)
    np.maximum.at(scores, numbers[held], probability[held])
    scored = tuple(replace(each, score=float(scores[each.lesion])) for each in report.lesions)
    return replace(report, lesions=scored)


def _report(
    grid: Grid,
    volume_ml: float,
    whole: Abc2,
    lesions: tuple[LesionReport, ...],
    band_ml: tuple[float, float],
    *,
    touches_border: bool,
) -> VolumeReport:
    return VolumeReport(
        volume_ml=volume_ml,
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
        from_30_ml=volume_ml - THRESHOLD_ML,
        lesions=lesions,
        **_band_fields(*band_ml, HALF_VOXEL),
    )


def _band_fields(low_ml: float, high_ml: float, band: str) -> dict[str, Any]:
    holds = low_ml <= THRESHOLD_ML < high_ml
    return {"volume_low_ml": low_ml, "volume_high_ml": high_ml, "band": band, "band_holds_30": holds}


def _half_voxel_band(stack: SliceStack, volume_ml: float) -> tuple[float, float]:
    """Millilitres of a mask whose boundary lies half a voxel further in, or out, along the axis that it faces most.

    A voxel with a face on the boundary may be half empty if it is inside and half full if it is outside; what lies
    beyond the image counts as outside.
    """
    padded = np.pad(stack.values, 1)
    beside, surrounded = padded.copy(), padded.copy()
    for axis in range(3):
        for near, far in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
            here: list[slice] = [slice(None)] * 3
            there = here.copy()
            here[axis], there[axis] = near, far
            beside[tuple(here)] |= padded[tuple(there)]
            surrounded[tuple(here)] &= padded[tuple(there)]
    return (volume_ml + stack.ml(surrounded, margin=1)) / 2, (volume_ml + stack.ml(beside, margin=1)) / 2


def _with_edema(case_id: str, report: VolumeReport, mask: NativeMask, edema: NativeMask) -> VolumeReport:
    require_same_grid(case_id, "edema", edema.grid, mask.grid)
    if edema.values.dtype not in (np.bool_, np.uint8):
        raise TypeError(f"{case_id}: edema of {edema.values.dtype}, expected bool or uint8. Threshold it first.")
    box = lesion_box(edema.values)
    first = box[mask.grid.slice_axis].start if box else 0
    edema_ml = mask.grid.foreground_ml((edema.values[box] != 0) & (mask.values[box] == 0), first) if box else 0.0
    # Edema surrounds parenchymal blood; blood elsewhere has none, and would make the ratio too small.
    bleed_ml = report.volume_ml if report.subtype_ml is None else report.subtype_ml[Subtype.IPH]
    reach_mm = _sphere_radius_mm(edema_ml + bleed_ml) - _sphere_radius_mm(bleed_ml)
    return replace(
        report,
        edema_ml=edema_ml,
        edema_ratio=edema_ml / bleed_ml if bleed_ml else None,
        edema_extension_mm=reach_mm if bleed_ml else None,
    )


def _sphere_radius_mm(volume_ml: float) -> float:
    return float((1000 * volume_ml * 3 / (4 * pi)) ** (1 / 3))


def label_lesions(mask: NativeMask) -> NDArray[np.uint32]:
    """(I, J, K) number of the lesion that each voxel belongs to, as in `LesionReport.lesion`; 0 outside."""
    numbers = np.zeros(mask.grid.shape, np.uint32)
    box = lesion_box(mask.values)
    if box is not None:
        stack = slice_stack(mask, box)
        inside = np.zeros(stack.values.shape, np.uint32)
        for rank, lesion in enumerate(_rank_lesions(stack), start=1):
            inside[lesion.box][lesion.part.values] = rank
        numbers[box] = inside.transpose(np.argsort(stack.axes))
    return numbers


class _Lesion(NamedTuple):
    box: Box
    part: SliceStack
    volume_ml: float
    centroid_mm: NDArray[np.float64]


def _rank_lesions(stack: SliceStack) -> list[_Lesion]:
    """The 26-connected parts of a stack, largest first."""
    import cc3d  # here, so that tables can be read and written without it

    labels = cc3d.connected_components(stack.values, connectivity=26)
    found = cc3d.statistics(labels)
    centroids_mm = stack.to_mm(found["centroids"])
    lesions = []
    for n, box in enumerate(found["bounding_boxes"][1:], start=1):
        part = stack.part(box, labels[box] == n)
        lesions.append(_Lesion(box, part, part.ml(part.values), centroids_mm[n]))
    # Position breaks ties of volume in patient coordinates, rounded so that arithmetic noise cannot.
    return sorted(lesions, key=lambda lesion: (-round(lesion.volume_ml, 9), *_down_back_left(lesion.centroid_mm)))


def _measure_lesions(stack: SliceStack, whole: Abc2, kinds: NDArray[np.uint8] | None) -> tuple[LesionReport, ...]:
    """Measures of every lesion of a stack, largest first."""
    lesions = []
    ranked = _rank_lesions(stack)
    for rank, (box, part, volume_ml, centroid_mm) in enumerate(ranked, start=1):
        abc2 = whole if len(ranked) == 1 else measure_stack(part)
        subtype_ml = None if kinds is None else _subtype_ml(np.where(part.values, kinds[box], 0), part)
        x_mm, y_mm, z_mm = centroid_mm.tolist()
        lesions.append(
            LesionReport(
                lesion=rank,
                volume_ml=volume_ml,
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
                abc2_applies=None if subtype_ml is None else _main_subtype(subtype_ml) not in NO_ELLIPSOID,
                subtype_ml=subtype_ml,
            )
        )
    return tuple(lesions)


def _down_back_left(position_mm: NDArray[np.float64]) -> tuple[float, ...]:
    """Sorting key: uppermost, then most anterior, then rightmost first."""
    return tuple((-position_mm[::-1]).round(3).tolist())


def subtype_values(case_id: str, values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The values of a multi-class label, refused when one of them is no subtype."""
    highest = int(values.max())
    if highest > max(Subtype):
        names = ", ".join(f"{kind.value} {kind.name}" for kind in Subtype)
        raise ValueError(f"{case_id}: label value {highest}, expected 0 or one of {names}. Remap the label first.")
    return values.astype(np.uint8, copy=False)


def _subtype_ml(values: NDArray[np.uint8], stack: SliceStack) -> SubtypeMl:
    return {kind: stack.ml(values == kind) for kind in Subtype}


def _main_subtype(subtype_ml: SubtypeMl) -> Subtype:
    return max(subtype_ml, key=lambda kind: subtype_ml[kind])


def _no_blood() -> SubtypeMl:
    return dict.fromkeys(Subtype, 0.0)
