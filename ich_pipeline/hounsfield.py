"""Is this a head CT in Hounsfield units? Said from values and size alone, and padding taken out of the way."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.errors import ReadError
from ich_pipeline.geometry import Grid

AIR_HU = -1000
PADDING_BELOW_HU = -1024  # scanners write -1024 for air at the least; what lies below is no measurement
DARKEST_HU, BRIGHTEST_HU = -150, 200  # a head holds darker voxels (air, or at least fat with noise) and brighter (bone)
TISSUE_MODE_HU = (0, 80)  # brain, blood and cerebrospinal fluid
TISSUE_BAND_HU = (-150, 200)
MIN_TISSUE_SHARE = 0.01
AIR_MODE_BELOW_HU = -850
MIN_AIR_SHARE = 0.01  # a tight crop may hold too little air to ask where its mode is
TISSUE_BIN_HU, AIR_BIN_HU = 5, 25
SAMPLE_VOXELS = 200_000
NAN_MARGIN_TISSUE_HU = -300
# A skull is a tenth of a head and more; a water cylinder with a rod in it, or a table, is less than this.
BODY_HU, BONE_HU, LEAST_BONE_SHARE = -300, 200, 0.02
# A head of 65 cm around has 340 cm2 in its largest slice, a headrest up to 100; an adult's trunk has 600 and more.
LARGEST_SLICE_CM2 = 500.0


def clean_hu(case_id: str, image_hu: NDArray[np.generic]) -> tuple[NDArray[np.generic], tuple[str, ...]]:
    """Check that values are those of a head CT in HU and bring padding to -1024, for the network's sake.

    Args:
        case_id: named in errors.
        image_hu: (I, J, K) int16 or float32; not changed.

    Returns:
        The image, a copy only where something had to change, and flags: `padding` when values below -1024 were raised
        to -1024, `nan_outside_head` when NaN away from tissue became -1000.

    Raises:
        ReadError: values that are not HU (windowed, normalised, offset, another modality), infinite values, or NaN that
            touches the head.
    """
    flags: tuple[str, ...] = ()
    lowest, highest = image_hu.min(), image_hu.max()
    if np.isnan(lowest):
        image_hu = _fill_nan(case_id, image_hu)
        lowest, highest = image_hu.min(), image_hu.max()
        flags += ("nan_outside_head",)
    _check_range(case_id, image_hu, float(lowest), float(highest))
    if lowest < PADDING_BELOW_HU:
        image_hu = np.maximum(image_hu, image_hu.dtype.type(PADDING_BELOW_HU))
        flags += ("padding",)
    return image_hu, flags


def check_head(case_id: str, image_hu: NDArray[Any], grid: Grid) -> None:
    """Refuse what is in HU and certainly no head.

    Certain is only what no head can be: without bone, or with slices of a trunk's size. A knee, a wrist or a small
    child's chest passes; nothing short of finding a brain would tell them.

    Raises:
        ReadError: naming what was found and expected.
    """
    stride = _stride(image_hu)
    sample_hu = np.moveaxis(image_hu[::stride, ::stride, ::stride], grid.slice_axis, 0)
    body = sample_hu > BODY_HU
    bone_share = np.count_nonzero(sample_hu >= BONE_HU) / np.count_nonzero(body)
    if bone_share < LEAST_BONE_SHARE:
        raise ReadError(
            f"{case_id}: bone ({BONE_HU} HU and more) is {bone_share:.1%} of what is not air, expected at least "
            f"{LEAST_BONE_SHARE:.0%} in a head. Give a CT of the head, skull included."
        )
    pixel_cm2 = stride**2 * grid.voxel_volume_mm3 / grid.slice_spacing_mm / 100
    slice_cm2 = float(np.median(np.count_nonzero(body, axis=(1, 2)))) * pixel_cm2
    if slice_cm2 > LARGEST_SLICE_CM2:
        raise ReadError(
            f"{case_id}: the median slice shows {slice_cm2:.0f} cm2 of what is not air, expected at most "
            f"{LARGEST_SLICE_CM2:.0f} in a head. Give the series of the head, without the trunk."
        )


def _stride(image_hu: NDArray[np.generic]) -> int:
    """Step along every axis that leaves about SAMPLE_VOXELS."""
    return max(1, round((image_hu.size / SAMPLE_VOXELS) ** (1 / 3)))


def _check_range(case_id: str, image_hu: NDArray[np.generic], lowest: float, highest: float) -> None:
    """Modes come from about SAMPLE_VOXELS evenly strided voxels: a mode needs no more."""
    found = f"{case_id}: values run from {lowest:g} to {highest:g}"
    expected = f"expected HU of a head CT: at most {DARKEST_HU} to at least {BRIGHTEST_HU}"
    remedy = "Export the CT unwindowed, with rescale slope and intercept applied."
    if not (np.isfinite([lowest, highest]).all() and lowest <= DARKEST_HU and highest >= BRIGHTEST_HU):
        raise ReadError(f"{found}; {expected}. {remedy}")
    stride = _stride(image_hu)
    sample_hu = image_hu[::stride, ::stride, ::stride].ravel(order="K")
    share, tissue_mode = _mode(sample_hu, *TISSUE_BAND_HU, TISSUE_BIN_HU)
    if share < MIN_TISSUE_SHARE or not TISSUE_MODE_HU[0] <= tissue_mode <= TISSUE_MODE_HU[1]:
        raise ReadError(
            f"{found}, and {share:.1%} lie in {TISSUE_BAND_HU} with the most common at {tissue_mode:g}; {expected}, "
            f"with soft tissue most common at {TISSUE_MODE_HU[0]} to {TISSUE_MODE_HU[1]}. {remedy}"
        )
    # Padding counts as air, whatever its value.
    share, air_mode = _mode(np.maximum(sample_hu, PADDING_BELOW_HU), -1050, -500, AIR_BIN_HU)
    if share > MIN_AIR_SHARE and air_mode > AIR_MODE_BELOW_HU:
        raise ReadError(
            f"{found}, and air is most common at {air_mode:g}; {expected}, with air near {AIR_HU}. {remedy}"
        )


def _mode(sample: NDArray[Any], low: int, high: int, width: int) -> tuple[float, float]:
    """Share of the sample in [low, high), and the centre of the most common bin there."""
    inside = sample[(sample >= low) & (sample < high)]
    if inside.size == 0:
        return 0.0, float("nan")
    counts = np.bincount(((inside - low) // width).astype(np.intp))
    return inside.size / sample.size, low + (float(counts.argmax()) + 0.5) * width


def _fill_nan(case_id: str, image_hu: NDArray[Any]) -> NDArray[Any]:
    """Set NaN to air where none touches the head, the largest connected part above NAN_MARGIN_TISSUE_HU."""
    import cc3d  # only damaged files pay for it
    from scipy.ndimage import binary_dilation

    missing = np.isnan(image_hu)
    head = cc3d.largest_k(image_hu > NAN_MARGIN_TISSUE_HU, k=1, connectivity=6) > 0
    touching = int((binary_dilation(head, np.ones((3, 3, 3))) & missing).sum())
    if touching or not head.any():
        raise ReadError(
            f"{case_id}: {int(missing.sum())} voxels are NaN, {touching} of them at the head, expected numbers there. "
            "Export the scan again; a mask measured here would miss what they hid."
        )
    return np.where(missing, image_hu.dtype.type(AIR_HU), image_hu)
