"""One DICOM CT series of a folder or ZIP file as an array and an affine.

In the order in which data flows: `archive` (ZIP to folder), `headers` (files to one header a slice, multi-frame or
not), `choice` (which series), `stack` (checks, order, steps, affine), `pixels` (stored values to HU), `decoding`
(compressed pixels, in a process of their own). docs/input.md says what is read and what is refused.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.dicom.archive import as_folder
from ich_pipeline.dicom.pixels import stack_hu
from ich_pipeline.dicom.stack import find_slices, single_grid
from ich_pipeline.geometry import Grid
from ich_pipeline.memory import check_memory
from ich_pipeline.records import SeriesInfo


@dataclass(frozen=True, eq=False)
class Series:
    """A series that was read: (I, J, K) = (column, row, slice) HU, int16 where that is exact, else float32."""

    image_hu: NDArray[np.generic]
    grid: Grid
    info: SeriesInfo
    flags: tuple[str, ...]


def read_series(path: Path, case_id: str, series: str | None = None) -> Series:
    """Read one CT series of a folder (with subfolders) or ZIP file; `choice.choose_series` says which.

    Args:
        path: the folder or ZIP file.
        case_id: named in errors.
        series: SeriesInstanceUID or SeriesNumber of the series to read; None chooses by the rules.

    Raises:
        ReadError: no CT series or several that the rules do not tell apart, several patients or studies, headers that
            leave something out or contradict each other, missing slices, pixels that cannot be decoded, or positions
            that are not on one line.
        GeometryError: a grid that no head CT has.
    """
    with as_folder(path, case_id) as folder:
        slices = find_slices(folder, case_id, series)
        grid = single_grid(slices)
        check_memory(case_id, grid.shape)
        image_hu, padded = stack_hu(case_id, slices.images)
    told = {"uneven_slices": grid.slice_positions is not None, "padding": padded}
    return Series(image_hu, grid, slices.info, slices.flags + tuple(flag for flag, holds in told.items() if holds))


def series_grid(path: Path, case_id: str, series: str | None = None) -> Grid:
    """Grid of the series that `read_series` would read, without its pixels (duplicates apart)."""
    with as_folder(path, case_id) as folder:
        return single_grid(find_slices(folder, case_id, series))
