"""Stored values to Hounsfield units, slice by slice. DICOM PS3.3 C.7.5.1.1.2 (pixel padding), C.11.1 (rescale)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.dicom.decoding import decode
from ich_pipeline.dicom.headers import Image
from ich_pipeline.errors import ReadError
from ich_pipeline.hounsfield import PADDING_BELOW_HU

# A padding value that is a tissue value in HU cannot be told from tissue.
TISSUE_ABOVE_HU = -300
INT16 = np.iinfo(np.int16)


def stack_hu(case_id: str, images: Sequence[Image]) -> tuple[NDArray[np.generic], bool]:
    """HU as (I, J, K) in Fortran order, and whether padding was set to PADDING_BELOW_HU."""
    first = images[0].header
    stack = np.empty((len(images), int(first.Rows), int(first.Columns)), _exact_dtype(images))
    pixels = Pixels(case_id)
    padded = False
    for k, image in enumerate(images):
        hu, has_padding = pixels.hu(image)
        stack[k] = np.maximum(hu, INT16.min)  # padding far below int16 stays padding
        padded |= has_padding
    return stack.transpose(2, 1, 0), padded


def _exact_dtype(images: Sequence[Image]) -> type[np.generic]:
    """int16 when no rescaled value of any slice can have a fraction or rise above it; below it is padding."""
    for header in (image.header for image in images):
        highest = 2 ** (int(header.BitsStored) - int(header.PixelRepresentation)) - 1
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
        if slope != 1 or not intercept.is_integer() or highest + intercept > INT16.max:
            return np.float32
    return np.int16


class Pixels:
    """Slices of one case in HU. The last file is kept decoded: a multi-frame file is decoded whole."""

    def __init__(self, case_id: str) -> None:
        self._case_id = case_id
        self._last: tuple[Any, NDArray[np.integer]] | None = None

    def hu(self, image: Image) -> tuple[NDArray[np.float32], bool]:
        """(rows, columns) HU of one slice and whether it has padding that was not at PADDING_BELOW_HU already."""
        stored, header = self._stored(image), image.header
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
        hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
        if header.get("PixelPaddingValue") is None:
            return hu, False
        # The tag may be written as unsigned where pixels are signed (63536 for -2000): compare in the pixels' type.
        limits = [header.PixelPaddingValue, header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)]
        low, high = sorted(int(np.array(int(n)).astype(stored.dtype)) for n in limits)
        padding = (stored >= low) & (stored <= high)
        if not padding.any():
            return hu, False
        highest_hu = max(low * slope, high * slope) + intercept
        if highest_hu > TISSUE_ABOVE_HU:
            raise ReadError(
                f"{self._case_id}: PixelPaddingValue is {highest_hu:g} HU, a tissue value, and {int(padding.sum())} "
                f"pixels have it; expected below {TISSUE_ABOVE_HU}. Correct or remove the tag (0028,0120)."
            )
        changed = bool((hu[padding] != PADDING_BELOW_HU).any())
        hu[padding] = PADDING_BELOW_HU
        return hu, changed

    def _stored(self, image: Image) -> NDArray[np.integer]:
        """(rows, columns) stored values, with bits above HighBit (old overlays) dropped and the sign extended."""
        if self._last is None or self._last[0] != image.path:
            self._last = None  # two decoded files are never held at once
            self._last = image.path, decode(self._case_id, image)
        stored = self._last[1][image.frame]
        allocated, used = 8 * stored.dtype.itemsize, int(image.header.BitsStored)
        if used < allocated:
            above = allocated - 1 - int(image.header.HighBit)
            stored = (stored << above) >> (allocated - used)
        return stored
