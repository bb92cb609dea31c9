"""One scan or mask in, by its path; Hounsfield units on its own grid out."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ich_pipeline.dicom import read_series, series_grid
from ich_pipeline.dicom.archive import is_zip
from ich_pipeline.errors import ReadError
from ich_pipeline.geometry import Grid
from ich_pipeline.hounsfield import check_head, clean_hu
from ich_pipeline.memory import check_memory
from ich_pipeline.nifti import NiftiHeader, is_nifti, nifti_stem, read_header, read_voxels
from ich_pipeline.records import NativeMask, NiftiForms, Scan

GANTRY_TILT_DEG = 0.5
# Below this angle shear is rounding of the direction cosines, and a qform says the same as the sform.
NO_SHEAR_DEG = 0.02


def read_scan(path: Path | str, case_id: str | None = None, series: str | None = None) -> Scan:
    """Read one head CT: a NIfTI file, or a folder (with subfolders) or ZIP file with a DICOM CT series.

    Args:
        path: .nii, .nii.gz, .hdr or .img, a folder, or .zip.
        case_id: by default the file name without its suffix, or the folder's name.
        series: SeriesInstanceUID or SeriesNumber, where a folder holds several; by default `choose_series` decides.

    Returns:
        The scan in HU, int16 where that is exact, else float32. Values below -1024 (padding) are raised to -1024, as
        resampling needs; the flag `padding` says so. Other flags: `gantry_tilt` (above 0.5 degrees),
        `nan_outside_head`, `qform_differs`, `pixdim_differs`, `units_scaled`, `duplicate_slices`, `secondary_image`,
        `contrast_agent`, `sharp_kernel`, `lossy_compression`, `split_by_acquisition`, `uneven_slices`.

    Raises:
        ReadError: nothing there, not a head CT in HU, or a file or series that cannot be read whole.
        GeometryError: a grid that is broken or implausible.
    """
    path = Path(path)
    case_id = case_id or default_case_id(path)
    if is_dicom_input(path):
        found = read_series(path, case_id, series)
        image_hu, grid, info, flags = found.image_hu, found.grid, found.info, found.flags
        forms = _scanner_forms(grid)
    else:
        require_nifti(path, case_id)
        header = read_header(path, case_id)
        check_memory(case_id, header.grid.shape)
        image_hu, grid, forms, info, flags = _rescaled(header), header.grid, header.forms, None, header.flags
    image_hu, value_flags = clean_hu(case_id, image_hu)
    check_head(case_id, image_hu, grid)
    if grid.tilt_deg > GANTRY_TILT_DEG:
        flags += ("gantry_tilt",)
    unique_flags = tuple(dict.fromkeys(flags + value_flags))
    return Scan(case_id, image_hu, grid, forms, path.resolve(), info, unique_flags)


def is_dicom_input(path: Path) -> bool:
    """Whether a path is read as DICOM: a folder or a ZIP file that is there."""
    return path.is_dir() or (is_zip(path) and path.is_file())


def read_grid(path: Path | str, case_id: str | None = None, series: str | None = None) -> Grid:
    """Grid of a scan, from headers alone; arguments and errors as `read_scan`."""
    path = Path(path)
    case_id = case_id or default_case_id(path)
    return series_grid(path, case_id, series) if is_dicom_input(path) else read_header(path, case_id).grid


def read_mask(path: Path | str, case_id: str | None = None) -> tuple[NativeMask, NiftiForms]:
    """Read a mask or label file (NIfTI) on its own grid.

    Returns:
        uint8 (I, J, K), the values of a multi-class label kept, and the header forms.

    Raises:
        ReadError: as for a scan, or values that are not whole numbers from 0 to 255.
        GeometryError: a grid that is broken or implausible.
    """
    path = Path(path)
    case_id = case_id or default_case_id(path)
    require_nifti(path, case_id)
    header = read_header(path, case_id)
    values = _rescaled(header) if (header.slope, header.inter) != (1, 0) else read_voxels(header)
    return NativeMask(_whole_numbers(case_id, values), header.grid), header.forms


def default_case_id(path: Path) -> str:
    """File name without its suffix (.nii.gz is one), or the folder's name."""
    if path.is_dir():
        return path.resolve().name
    return path.stem if is_zip(path) else nifti_stem(path)


def _scanner_forms(grid: Grid) -> NiftiForms:
    """Forms for a scan that was no NIfTI file: scanner coordinates; no qform where it would drop shear."""
    if grid.tilt_deg > NO_SHEAR_DEG:
        return NiftiForms(sform=grid.affine, sform_code=1)
    return NiftiForms(sform=grid.affine, sform_code=1, qform=grid.affine, qform_code=1)


def require_nifti(path: Path, case_id: str) -> None:
    """Refuse what is no NIfTI file.

    Raises:
        ReadError: nothing there, or another kind of file.
    """
    if not path.is_file():
        raise ReadError(f"{case_id}: {path} does not exist. Check the path.")
    if not is_nifti(path):
        raise ReadError(
            f"{case_id}: {path.name} is neither NIfTI (.nii, .nii.gz, .hdr, .img) nor a folder or ZIP file. For DICOM "
            "give the folder of the series."
        )


def _rescaled(header: NiftiHeader) -> NDArray[np.generic]:
    """Stored int16 as it is where the header sets no scaling, all else as float32 with slope and intercept."""
    stored = read_voxels(header)
    if (header.slope, header.inter) == (1, 0):
        return stored if stored.dtype == np.int16 else stored.astype(np.float32)
    return stored.astype(np.float32) * np.float32(header.slope) + np.float32(header.inter)


def _whole_numbers(case_id: str, values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    lowest, highest = values.min(), values.max()
    if lowest >= 0 and highest <= 255:  # NaN is neither
        labels = values.astype(np.uint8)
        if np.issubdtype(values.dtype, np.integer) or np.array_equal(labels, values):
            return labels
    raise ReadError(
        f"{case_id}: mask values from {lowest:g} to {highest:g}, expected whole numbers from 0 to 255. Threshold "
        "scores before saving them as a mask."
    )
