"""Slices of one series checked, in the order of their positions, and the affine that they share.

Order and spacing come from ImagePositionPatient along the slice normal, the affine's third column is the step between
positions itself: so gantry tilt stays in as shear and the volume of a voxel is right. File names, SliceLocation,
SliceThickness and GantryDetectorTilt (whose sign depends on the vendor) are never used, InstanceNumber only to tell a
missing slice. DICOM PS3.3 C.7.6.2 (image plane), C.8.2.1 (CT image).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.dicom.choice import choose_series, has_contrast, is_sharp, kernel_of
from ich_pipeline.dicom.headers import REQUIRED, Image, read_images
from ich_pipeline.dicom.pixels import Pixels
from ich_pipeline.errors import GeometryError, ReadError
from ich_pipeline.geometry import Affine, Grid
from ich_pipeline.nifti import MAX_VOXELS
from ich_pipeline.records import SeriesInfo

SAME_POSITION_MM = 0.01
# Steps are one step when none differs from another by more than the larger of these; scanners jitter by 0.01 mm.
STEP_TOLERANCE_MM, STEP_TOLERANCE = 0.05, 0.01
DIRECTION_TOLERANCE = 1e-3
SPACING_TOLERANCE = 1e-3
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# A step is a gap when it is longer than its neighbours by this factor: a slice between them is missing.
GAP_FACTOR = 1.5


@dataclass(frozen=True, eq=False)
class Slices:
    """Slices of one series in the order of their positions.

    Attributes:
        images: one a slice; pixels are read when asked for.
        normal: unit vector, row direction x column direction, LPS.
        positions_lps_mm: (K, 3) ImagePositionPatient.
        info: the series that they are of.
        flags: `duplicate_slices`, `secondary_image`, `contrast_agent`, `sharp_kernel`, `lossy_compression`,
            `split_by_acquisition`.
    """

    case_id: str
    images: Sequence[Image]
    normal: NDArray[np.float64]
    positions_lps_mm: NDArray[np.float64]
    info: SeriesInfo
    flags: tuple[str, ...]

    @property
    def distances_mm(self) -> NDArray[np.float64]:
        """(K,) positions along the normal, rising."""
        return self.positions_lps_mm @ self.normal

    @property
    def are_even(self) -> bool:
        """Whether steps along the normal are one step."""
        steps_mm = np.diff(self.distances_mm)
        return bool(np.ptp(steps_mm) <= _step_tolerance_mm(float(np.median(steps_mm))))


def find_slices(folder: Path, case_id: str, series: str | None = None) -> Slices:
    """Headers of the CT series to read in a folder, checked and in the order of their positions.

    Raises:
        ReadError: as `read_series`, but for what only the pixels show.
    """
    found, left_out = read_images(folder, case_id)
    chosen = choose_series(case_id, folder.name, found, left_out, series)
    _check_headers(case_id, [image.header for image in chosen.images])
    images, same_uid = _drop_copies(chosen.images)
    row, column = _directions(case_id, images)
    normal = np.cross(row, column)
    images.sort(key=lambda image: _position_mm(image, normal))
    images, same_pixels, split = _one_a_position(case_id, images, normal)
    if len(images) < 2:
        raise ReadError(f"{case_id}: one slice only, expected a series of two or more. Give the whole series.")
    positions = np.array([image.header.ImagePositionPatient for image in images], dtype=np.float64)
    first = images[0].header
    kernel, number = kernel_of(first), first.get("SeriesNumber")
    info = SeriesInfo(
        str(first.get("SeriesInstanceUID", "")), "" if number is None else str(number), kernel, len(images)
    )
    told = {
        "duplicate_slices": same_uid or same_pixels,
        "secondary_image": chosen.has_type("SECONDARY"),
        "contrast_agent": any(map(has_contrast, images)),
        "sharp_kernel": is_sharp(kernel),
        "lossy_compression": any(image.header.get("LossyImageCompression") == "01" for image in images),
        "split_by_acquisition": split,
    }
    slices = Slices(case_id, images, normal, positions, info, tuple(flag for flag, holds in told.items() if holds))
    _refuse_missing(slices)
    return slices


def single_grid(slices: Slices) -> Grid:
    """The affine that all slices share, and their places where they lie unevenly.

    Columns in LPS: row direction x column spacing, column direction x row spacing, and the mean step from position to
    position, which under tilt is not along the normal.

    Raises:
        ReadError: slices that do not lie on one line, or uneven ones that are not axial; the message names the steps.
        GeometryError: a grid that no head CT has.
    """
    _require_one_line(slices)
    first = slices.images[0].header
    orientation = np.array(first.ImageOrientationPatient, dtype=np.float64)
    row_spacing_mm, column_spacing_mm = (float(n) for n in first.PixelSpacing)
    affine_lps: Affine = np.eye(4)
    affine_lps[:3, 0] = orientation[:3] * column_spacing_mm
    affine_lps[:3, 1] = orientation[3:] * row_spacing_mm
    affine_lps[:3, 2] = np.diff(slices.positions_lps_mm, axis=0).mean(axis=0)
    affine_lps[:3, 3] = slices.positions_lps_mm[0]
    try:
        grid = Grid((int(first.Columns), int(first.Rows), len(slices.images)), LPS_TO_RAS @ affine_lps)
    except GeometryError as error:
        raise GeometryError(f"{slices.case_id}: {error}. Export the series again.") from error
    grid.check_plausible(slices.case_id)
    return grid if slices.are_even else _uneven(slices, grid)


def _uneven(slices: Slices, grid: Grid) -> Grid:
    """The grid with the places of its slices, in mean steps."""
    if grid.slice_axis != 2:
        raise ReadError(
            f"{slices.case_id}: slices lie unevenly, {describe_steps(slices.distances_mm)}, and are not axial, "
            "expected equal steps. Give the axial series."
        )
    distances_mm = slices.distances_mm - slices.distances_mm[0]
    return Grid(grid.shape, grid.affine, distances_mm / distances_mm[-1] * (len(distances_mm) - 1))


def describe_steps(distances_mm: NDArray[np.float64]) -> str:
    """Steps in order, runs of equal ones counted, like '13 x 4.002, 1 x 1.081, 13 x 6.999 mm'."""
    runs: list[list[float]] = []
    for step in np.diff(distances_mm):
        if runs and abs(step - runs[-1][0]) <= _step_tolerance_mm(step):
            runs[-1].append(float(step))
        else:
            runs.append([float(step)])
    return ", ".join(f"{len(run)} x {np.mean(run):.3f}" for run in runs) + " mm"


def _check_headers(case_id: str, datasets: Sequence[Any]) -> None:
    for name, n_numbers in REQUIRED.items():
        missing = sum(not _holds_numbers(d, name, n_numbers) for d in datasets)
        if missing:
            raise ReadError(
                f"{case_id}: {missing} of {len(datasets)} slices have no {name}, expected {n_numbers} finite numbers. "
                "Export the series again."
            )
    voxels = len(datasets) * int(datasets[0].Rows) * int(datasets[0].Columns)
    if voxels > MAX_VOXELS:
        raise ReadError(f"{case_id}: {voxels} voxels, expected at most {MAX_VOXELS}. Check the series.")
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
    # A slice whose bits lie elsewhere than its neighbours' would be read as other values, and nothing would show it.
    _require_one(case_id, "BitsStored and HighBit", [(d.BitsStored, d.HighBit) for d in datasets], 0)


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


def _directions(case_id: str, images: Sequence[Image]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    row, column = np.reshape(np.array(images[0].header.ImageOrientationPatient, dtype=np.float64), (2, 3))
    products = np.array([row @ row - 1, column @ column - 1, row @ column])
    if (np.abs(products) > DIRECTION_TOLERANCE).any():
        raise ReadError(
            f"{case_id}: ImageOrientationPatient {row.tolist()}, {column.tolist()}, expected two unit vectors at right "
            "angles. Export the series again."
        )
    return row, column


def _drop_copies(images: Sequence[Image]) -> tuple[list[Image], bool]:
    """One image for each SOPInstanceUID and frame; images without a UID are all kept."""
    kept = {(str(image.header.get("SOPInstanceUID") or id(image)), image.frame): image for image in reversed(images)}
    return list(kept.values())[::-1], len(kept) < len(images)


def _position_mm(image: Image, normal: NDArray[np.float64]) -> float:
    return float(np.dot(image.header.ImagePositionPatient, normal))


def _by_position(images: Sequence[Image], normal: NDArray[np.float64]) -> list[list[Image]]:
    """Images that are sorted by position, those at one position together."""
    places = [[images[0]]]
    for before, after in pairwise(images):
        if _position_mm(after, normal) - _position_mm(before, normal) > SAME_POSITION_MM:
            places.append([])
        places[-1].append(after)
    return places


def _one_a_position(case_id: str, images: list[Image], normal: NDArray[np.float64]) -> tuple[list[Image], bool, bool]:
    """One image a position; whether images were dropped, and whether one of several acquisitions was taken.

    Images at one position with the same pixels are copies. Others are phases: where every AcquisitionNumber has one at
    every position, the only acquisition without contrast agent is taken.
    """
    places = _by_position(images, normal)
    if len(places) == len(images):
        return images, False, False
    pixels = Pixels(case_id)
    unlike = next((place for place in places if not _are_copies(place, pixels)), None)
    if unlike is None:
        return [place[0] for place in places], True, False
    acquisitions: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        acquisitions[str(image.header.get("AcquisitionNumber", "none"))].append(image)
    whole = all(len(group) == len(places) == len(_by_position(group, normal)) for group in acquisitions.values())
    plain = [group for group in acquisitions.values() if not any(map(has_contrast, group))]
    if whole and len(acquisitions) > 1 and len(plain) == 1:
        return plain[0], False, True
    listed = ", ".join(f"{number} ({len(group)} slices)" for number, group in sorted(acquisitions.items())[:6])
    raise ReadError(
        f"{case_id}: {len(unlike)} different slices at {_position_mm(unlike[0], normal):.2f} mm along the normal, "
        f"expected one; acquisition numbers: {listed}. Split phases or reconstructions into folders."
    )


def _are_copies(place: Sequence[Image], pixels: Pixels) -> bool:
    if len(place) == 1:
        return True
    first = pixels.hu(place[0])[0]
    return all(np.array_equal(first, pixels.hu(image)[0]) for image in place[1:])


def _refuse_missing(slices: Slices) -> None:
    """Refuse a stack with a gap: a step longer than its neighbours, or than most with a jump of InstanceNumber there.

    A zone of longer steps is no gap, nor is the step into it: its neighbour is as long.
    """
    steps_mm = np.diff(slices.distances_mm)
    if len(steps_mm) < 2:
        return
    around = np.pad(steps_mm, 1, constant_values=0)
    neighbour_mm = np.maximum(around[:-2], around[2:])
    alone = steps_mm > GAP_FACTOR * neighbour_mm
    regular_mm = float(np.median(steps_mm))
    jumps = _instance_jumps(slices.images)
    jumped = (steps_mm > GAP_FACTOR * regular_mm) & (jumps > 1.5 * np.median(jumps))
    gaps = np.flatnonzero(alone | jumped)
    if len(gaps):
        listed = "; ".join(
            f"{steps_mm[k]:.3f} mm from {slices.distances_mm[k]:.2f} to {slices.distances_mm[k + 1]:.2f} mm along the "
            f"normal ({_instance(slices.images[k])} and {_instance(slices.images[k + 1])})"
            for k in gaps[:4]
        )
        raise ReadError(
            f"{slices.case_id}: slices are missing at {len(gaps)} gap(s): {listed}, where steps are "
            f"{regular_mm:.3f} mm, expected no gap ({describe_steps(slices.distances_mm)}). Export the whole series."
        )


def _instance_jumps(images: Sequence[Image]) -> NDArray[np.float64]:
    """By how much InstanceNumber changes from slice to slice; all 1 where it is not one number throughout."""
    try:
        return np.abs(np.diff([float(image.header.get("InstanceNumber")) for image in images]))
    except (TypeError, ValueError):  # absent in a slice, or several numbers
        return np.ones(len(images) - 1)


def _instance(image: Image) -> str:
    number = image.header.get("InstanceNumber")
    return "an image without number" if number is None else f"image {number}"


def _step_tolerance_mm(step_mm: float) -> float:
    return max(STEP_TOLERANCE_MM, STEP_TOLERANCE * step_mm)


def _require_one_line(slices: Slices) -> None:
    """Refuse slices whose positions are not on one line, which under tilt is not the normal."""
    distances_mm = slices.distances_mm - slices.distances_mm[0]
    first, last = slices.positions_lps_mm[[0, -1]]
    aside_mm = slices.positions_lps_mm - (first + np.outer(distances_mm / distances_mm[-1], last - first))
    tolerance_mm = _step_tolerance_mm(float(np.median(np.diff(distances_mm))))
    if np.abs(aside_mm).max() > tolerance_mm:
        raise ReadError(
            f"{slices.case_id}: slices lie up to {np.abs(aside_mm).max():.3f} mm beside the line from first to last, "
            f"expected one line (within {tolerance_mm:.3g} mm): the series has no single affine. Split it into stacks "
            "with one table position."
        )
