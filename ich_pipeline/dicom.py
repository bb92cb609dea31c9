"""One DICOM CT series as an array and an affine.

Order and spacing come from ImagePositionPatient along the slice normal, the affine's third column is the step between
positions itself: so gantry tilt stays in as shear and the volume of a voxel is right. File names, InstanceNumber,
SliceLocation, SliceThickness and GantryDetectorTilt (whose sign depends on the vendor) are never used.
DICOM PS3.3 C.7.6.2 (image plane), C.8.2.1 (CT image), C.7.5.1.1.2 (pixel padding).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from ich_pipeline.errors import GeometryError, ReadError
from ich_pipeline.geometry import Affine, Grid
from ich_pipeline.hounsfield import PADDING_BELOW_HU

DICOM_SUFFIXES = (".dcm", ".ima")
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
MEDIA_INDEX_CLASS = "1.2.840.10008.1.3.10"
ENHANCED_CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}
NO_SLICE_TYPES = {"LOCALIZER", "SCREEN SAVE"}  # ImageType values of CT images that are no part of a stack
REQUIRED = {  # element: how many numbers it holds
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "Rows": 1,
    "Columns": 1,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
    "BitsAllocated": 1,
    "BitsStored": 1,
    "HighBit": 1,
    "PixelRepresentation": 1,
}
OPTIONAL = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "SOPInstanceUID",
    "ImageType",
    "NumberOfFrames",
    "SamplesPerPixel",
    "RescaleType",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "AcquisitionNumber",
    "SeriesNumber",
    "SliceThickness",
    "ConvolutionKernel",
)
SAME_POSITION_MM = 0.01
# Steps are one step when none differs from another by more than the larger of these; scanners jitter by 0.01 mm.
STEP_TOLERANCE_MM, STEP_TOLERANCE = 0.05, 0.01
DIRECTION_TOLERANCE = 1e-3
SPACING_TOLERANCE = 1e-3
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# A padding value that is a tissue value in HU cannot be told from tissue.
TISSUE_ABOVE_HU = -300
INT16 = np.iinfo(np.int16)
HEADER_KIB = "16 KB"  # elements above this, the pixels, are read when asked for


@dataclass(frozen=True, eq=False)
class Slices:
    """Slices of one series in the order of their positions.

    Attributes:
        datasets: one a slice; pixels are read when asked for.
        normal: unit vector, row direction x column direction, LPS.
        positions_lps_mm: (K, 3) ImagePositionPatient.
        flags: `duplicate_slices`, `secondary_image`.
    """

    case_id: str
    datasets: Sequence[Any]
    normal: NDArray[np.float64]
    positions_lps_mm: NDArray[np.float64]
    flags: tuple[str, ...]

    @property
    def distances_mm(self) -> NDArray[np.float64]:
        """(K,) positions along the normal, rising."""
        return self.positions_lps_mm @ self.normal


@dataclass(frozen=True, eq=False)
class Series:
    """A series that was read: (I, J, K) = (column, row, slice) HU, int16 where that is exact, else float32."""

    image_hu: NDArray[np.generic]
    grid: Grid
    series_uid: str
    flags: tuple[str, ...]


def is_dicom(path: Path) -> bool:
    """Whether a file carries the DICM mark of DICOM Part 10; files without it are not read."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_series(folder: Path, case_id: str) -> Series:
    """Read the one CT series in a folder and its subfolders.

    Localizers, screen saves and everything that is not a CT image are left out; a series of derived (SECONDARY) images
    is used only where there is no primary one, and flagged.

    Raises:
        ReadError: no CT series or several, multi-frame or undecodable images, no rescale, slices of different matrix,
            orientation or spacing, or positions that leave no single affine (the steps are named).
        GeometryError: a grid that no head CT has.
    """
    slices = find_slices(folder, case_id)
    grid = single_grid(slices)
    image_hu, padded = _stack_hu(slices)
    flags = slices.flags + (("padding",) if padded else ())
    return Series(image_hu, grid, str(slices.datasets[0].SeriesInstanceUID), flags)


def series_grid(folder: Path, case_id: str) -> Grid:
    """Grid of the series that `read_series` would read, without its pixels (duplicates apart)."""
    return single_grid(find_slices(folder, case_id))


def find_slices(folder: Path, case_id: str) -> Slices:
    """Headers of the one CT series in a folder, checked and in the order of their positions."""
    datasets, flags = _pick_series(case_id, folder)
    _check_headers(case_id, datasets)
    datasets, same_uid = _drop_copies(datasets)
    row, column = _directions(case_id, datasets)
    normal = np.cross(row, column)
    order = np.argsort([np.dot(d.ImagePositionPatient, normal) for d in datasets], kind="stable")
    datasets, same_pixels = _drop_same_position(case_id, [datasets[i] for i in order], normal)
    if same_uid or same_pixels:
        flags += ("duplicate_slices",)
    if len(datasets) < 2:
        raise ReadError(f"{case_id}: one slice only, expected a series of two or more. Give the whole series.")
    positions = np.array([d.ImagePositionPatient for d in datasets], dtype=np.float64)
    return Slices(case_id, datasets, normal, positions, flags)


def single_grid(slices: Slices) -> Grid:
    """The affine that all slices share.

    Columns in LPS: row direction x column spacing, column direction x row spacing, and the mean step from position to
    position, which under tilt is not along the normal.

    Raises:
        ReadError: the slices have no single affine; the message names the steps.
        GeometryError: a grid that no head CT has.
    """
    _check_steps(slices)
    first = slices.datasets[0]
    orientation = np.array(first.ImageOrientationPatient, dtype=np.float64)
    row_spacing_mm, column_spacing_mm = (float(n) for n in first.PixelSpacing)
    affine_lps: Affine = np.eye(4)
    affine_lps[:3, 0] = orientation[:3] * column_spacing_mm
    affine_lps[:3, 1] = orientation[3:] * row_spacing_mm
    affine_lps[:3, 2] = np.diff(slices.positions_lps_mm, axis=0).mean(axis=0)
    affine_lps[:3, 3] = slices.positions_lps_mm[0]
    try:
        grid = Grid((int(first.Columns), int(first.Rows), len(slices.datasets)), LPS_TO_RAS @ affine_lps)
    except GeometryError as error:
        raise GeometryError(f"{slices.case_id}: {error}. Export the series again.") from error
    grid.check_plausible(slices.case_id)
    return grid


def describe_steps(distances_mm: NDArray[np.float64]) -> str:
    """Steps in order, runs of equal ones counted, like '13 x 4.002, 1 x 1.081, 13 x 6.999 mm'."""
    runs: list[list[float]] = []
    for step in np.diff(distances_mm):
        if runs and abs(step - runs[-1][0]) <= _step_tolerance_mm(step):
            runs[-1].append(float(step))
        else:
            runs.append([float(step)])
    return ", ".join(f"{len(run)} x {np.mean(run):.3f}" for run in runs) + " mm"


def _pick_series(case_id: str, folder: Path) -> tuple[list[Any], tuple[str, ...]]:
    series: dict[tuple[str, str], list[Any]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not is_dicom(path):
            if path.suffix.lower() in DICOM_SUFFIXES and not path.name.startswith("."):
                raise ReadError(
                    f"{case_id}: {path.name} has no DICM mark at byte 128, expected DICOM Part 10. Copy it again, or "
                    "save the series with preamble."
                )
            continue
        dataset = _read_dataset(case_id, path)
        reason = _why_left_out(case_id, dataset)
        if reason:
            left_out[reason] += 1
        else:
            key = (str(dataset.get("StudyInstanceUID", "")), str(dataset.get("SeriesInstanceUID", "")))
            series[key].append(dataset)
    if not series:
        held = ", ".join(f"{n} x {reason}" for reason, n in left_out.items()) or "no DICOM file"
        raise ReadError(f"{case_id}: {folder.name} holds {held}, expected one series of CT images. Check the folder.")
    primary = {key: group for key, group in series.items() if not _is_secondary(group)}
    candidates = primary or series
    if len(candidates) > 1:
        listed = "; ".join(_describe_series(group) for group in candidates.values())
        raise ReadError(
            f"{case_id}: {folder.name} holds {len(candidates)} CT series, expected one: {listed}. Put the one to use, "
            "a soft-tissue kernel, in a folder of its own."
        )
    return next(iter(candidates.values())), () if primary else ("secondary_image",)


def _read_dataset(case_id: str, path: Path) -> Any:
    try:
        dataset = pydicom.dcmread(path, defer_size=HEADER_KIB)
        for name in (*REQUIRED, *OPTIONAL):
            dataset.get(name)  # values are parsed when asked for, so damage shows here and nowhere later
        return dataset
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise ReadError(f"{case_id}: {path.name} cannot be read as DICOM ({error}). Copy it again.") from error


def _why_left_out(case_id: str, dataset: Any) -> str | None:
    sop_class = str(dataset.get("SOPClassUID", ""))
    announced = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if announced == MEDIA_INDEX_CLASS:
        return "DICOMDIR"
    if not sop_class or announced == CT_CLASS != sop_class:
        raise ReadError(  # leaving out a slice that was cut off would shorten the head unseen
            f"{case_id}: {Path(dataset.filename).name} announces class {announced or 'none'} and holds "
            f"{sop_class or 'none'}, expected one class. The file is damaged or cut off: copy it again."
        )
    if sop_class in ENHANCED_CT_CLASSES or (sop_class == CT_CLASS and int(dataset.get("NumberOfFrames") or 1) > 1):
        raise ReadError(
            f"{case_id}: {ENHANCED_CT_CLASSES.get(sop_class, 'multi-frame CT image')}, expected single-frame CT "
            "images. Export as classic CT, or convert to NIfTI."
        )
    if sop_class != CT_CLASS:
        return pydicom.uid.UID(sop_class).name
    found = NO_SLICE_TYPES & {str(value).upper() for value in dataset.get("ImageType") or ()}
    return found.pop().lower() if found else None


def _is_secondary(datasets: Sequence[Any]) -> bool:
    return any("SECONDARY" in {str(value).upper() for value in d.get("ImageType") or ()} for d in datasets)


def _describe_series(datasets: Sequence[Any]) -> str:
    first = datasets[0]
    kernel = first.get("ConvolutionKernel") or "unknown"
    return (
        f"number {first.get('SeriesNumber', '?')}, {len(datasets)} files, kernel {kernel}, thickness "
        f"{first.get('SliceThickness', '?')} mm, UID {first.get('SeriesInstanceUID', '?')}"
    )


def _check_headers(case_id: str, datasets: Sequence[Any]) -> None:
    for name, n_numbers in REQUIRED.items():
        missing = sum(not _holds_numbers(d, name, n_numbers) for d in datasets)
        if missing:
            raise ReadError(
                f"{case_id}: {missing} of {len(datasets)} slices have no {name}, expected {n_numbers} finite numbers. "
                "Export the series again."
            )
    _require_one(case_id, "matrix", [(d.Rows, d.Columns) for d in datasets], 0)
    _require_one(case_id, "PixelSpacing", [tuple(d.PixelSpacing) for d in datasets], SPACING_TOLERANCE)
    orientations = [tuple(d.ImageOrientationPatient) for d in datasets]
    _require_one(case_id, "ImageOrientationPatient", orientations, DIRECTION_TOLERANCE)
    for dataset in datasets:
        bits = int(dataset.BitsStored), int(dataset.HighBit) + 1, int(dataset.BitsAllocated)
        if not 1 <= bits[0] <= bits[1] <= bits[2] <= 32 or dataset.PixelRepresentation not in (0, 1):
            raise ReadError(
                f"{case_id}: BitsStored, HighBit + 1, BitsAllocated are {bits} and PixelRepresentation "
                f"{dataset.PixelRepresentation}, expected rising numbers up to 32, and 0 or 1. Export the series again."
            )
        kind = str(dataset.get("RescaleType") or "HU")
        if kind != "HU":
            raise ReadError(f"{case_id}: RescaleType {kind}, expected HU. Export the CT in Hounsfield units.")
        if dataset.get("SamplesPerPixel", 1) != 1:
            raise ReadError(
                f"{case_id}: {dataset.SamplesPerPixel} samples a pixel (colour), expected 1. Export the CT."
            )


def _holds_numbers(dataset: Any, name: str, n_numbers: int) -> bool:
    try:
        numbers = np.atleast_1d(np.asarray(dataset.get(name), dtype=np.float64))
    except Exception:  # None, text, or what pydicom makes of damaged bytes
        return False
    return numbers.shape == (n_numbers,) and bool(np.isfinite(numbers).all())


def _require_one(case_id: str, name: str, values: Sequence[Any], tolerance: float) -> None:
    numbers = np.array([[float(n) for n in value] for value in values])
    if (np.ptp(numbers, axis=0) > tolerance).any():
        counts = Counter(tuple(round(n, 4) for n in row) for row in numbers.tolist())
        listed = ", ".join(f"{n} x {value}" for value, n in counts.most_common(4))
        raise ReadError(f"{case_id}: slices differ in {name}: {listed}; expected one. Split the series into stacks.")


def _directions(case_id: str, datasets: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    row, column = np.reshape(np.array(datasets[0].ImageOrientationPatient, dtype=np.float64), (2, 3))
    products = np.array([row @ row - 1, column @ column - 1, row @ column])
    if (np.abs(products) > DIRECTION_TOLERANCE).any():
        raise ReadError(
            f"{case_id}: ImageOrientationPatient {row.tolist()}, {column.tolist()}, expected two unit vectors at right "
            "angles. Export the series again."
        )
    return row, column


def _drop_copies(datasets: Sequence[Any]) -> tuple[list[Any], bool]:
    """One dataset for each SOPInstanceUID; images without one are all kept."""
    kept = {str(d.get("SOPInstanceUID") or id(d)): d for d in reversed(datasets)}
    return list(kept.values())[::-1], len(kept) < len(datasets)


def _drop_same_position(case_id: str, datasets: Sequence[Any], normal: NDArray[np.float64]) -> tuple[list[Any], bool]:
    """Of slices at one position keep one if their pixels agree; otherwise they are phases or reconstructions."""
    kept = [datasets[0]]
    for before, after in pairwise(datasets):
        position_mm = np.dot(after.ImagePositionPatient, normal)
        if position_mm - np.dot(before.ImagePositionPatient, normal) > SAME_POSITION_MM:
            kept.append(after)
        elif not np.array_equal(_slice_hu(case_id, before)[0], _slice_hu(case_id, after)[0]):
            acquisitions = sorted({str(d.get("AcquisitionNumber", "none")) for d in datasets})
            raise ReadError(
                f"{case_id}: two different slices at {position_mm:.2f} mm along the normal, expected one (acquisition "
                f"numbers: {', '.join(acquisitions)}). Split phases or reconstructions into folders."
            )
    return kept, len(kept) < len(datasets)


def _step_tolerance_mm(step_mm: float) -> float:
    return max(STEP_TOLERANCE_MM, STEP_TOLERANCE * step_mm)


def _check_steps(slices: Slices) -> None:
    steps_mm = np.diff(slices.distances_mm)
    tolerance_mm = _step_tolerance_mm(float(np.median(steps_mm)))
    if np.ptp(steps_mm) > tolerance_mm:
        multiples = steps_mm / np.median(steps_mm)
        n_gaps = int((multiples.round() >= 2).sum())
        gap = np.abs(multiples - multiples.round()).max() < 0.05 and n_gaps
        hint = f"{n_gaps} gap(s) look like missing slices: export them too" if gap else "split it into uniform stacks"
        raise ReadError(
            f"{slices.case_id}: slices lie unevenly, {describe_steps(slices.distances_mm)}, expected equal steps "
            f"(within {tolerance_mm:.3g} mm): the series has no single affine. As it is, no volume would be right; "
            f"{hint}, or give an even reconstruction."
        )
    sideways_mm = np.ptp(np.diff(slices.positions_lps_mm, axis=0), axis=0).max()
    if sideways_mm > tolerance_mm:
        raise ReadError(
            f"{slices.case_id}: slices shift sideways unevenly, by {sideways_mm:.3f} mm from step to step, expected "
            f"one shift (within {tolerance_mm:.3g} mm): the series has no single affine. Split it into stacks with "
            "one table position."
        )


def _stack_hu(slices: Slices) -> tuple[NDArray[np.generic], bool]:
    """HU as (I, J, K) in Fortran order, and whether padding was set to PADDING_BELOW_HU."""
    first = slices.datasets[0]
    stack = np.empty((len(slices.datasets), int(first.Rows), int(first.Columns)), _exact_dtype(slices.datasets))
    padded = False
    for k, dataset in enumerate(slices.datasets):
        hu, has_padding = _slice_hu(slices.case_id, dataset)
        stack[k] = np.maximum(hu, INT16.min)  # padding far below int16 stays padding
        padded |= has_padding
    return stack.transpose(2, 1, 0), padded


def _exact_dtype(datasets: Sequence[Any]) -> type[np.generic]:
    """int16 when no rescaled value of any slice can have a fraction or rise above it; below it is padding."""
    for d in datasets:
        highest = 2 ** (int(d.BitsStored) - int(d.PixelRepresentation)) - 1
        slope, intercept = float(d.RescaleSlope), float(d.RescaleIntercept)
        if slope != 1 or not intercept.is_integer() or highest + intercept > INT16.max:
            return np.float32
    return np.int16


def _slice_hu(case_id: str, dataset: Any) -> tuple[NDArray[np.float32], bool]:
    """(rows, columns) HU of one slice and whether it has padding that was not at PADDING_BELOW_HU already."""
    stored = _stored(case_id, dataset)
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if dataset.get("PixelPaddingValue") is None:
        return hu, False
    # The tag may be written as unsigned where pixels are signed (63536 for -2000): compare in the pixels' type.
    limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)]
    low, high = sorted(int(np.array(int(n)).astype(stored.dtype)) for n in limits)
    padding = (stored >= low) & (stored <= high)
    if not padding.any():
        return hu, False
    highest_hu = max(low * slope, high * slope) + intercept
    if highest_hu > TISSUE_ABOVE_HU:
        raise ReadError(
            f"{case_id}: PixelPaddingValue is {highest_hu:g} HU, a tissue value, and {int(padding.sum())} pixels have "
            f"it; expected below {TISSUE_ABOVE_HU}. Correct or remove the tag (0028,0120)."
        )
    changed = bool((hu[padding] != PADDING_BELOW_HU).any())
    hu[padding] = PADDING_BELOW_HU
    return hu, changed


def _stored(case_id: str, dataset: Any) -> NDArray[np.integer]:
    """(rows, columns) stored values, with bits above HighBit (old overlays) dropped and the sign extended."""
    try:
        stored = dataset.pixel_array
    except Exception as error:  # pydicom raises many kinds: no decoder, cut off, wrong length
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        raise ReadError(
            f"{case_id}: pixels of {Path(dataset.filename).name} cannot be decoded (transfer syntax "
            f"{getattr(syntax, 'name', syntax)}): {error}. Export uncompressed, or copy the file again."
        ) from error
    allocated, used = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if used < allocated:
        above = allocated - 1 - int(dataset.HighBit)
        stored = (stored << above) >> (allocated - used)
    return stored
