"""Files and folders in, scans in Hounsfield units on their own grid out."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from ich_pipeline.dicom import read_series, series_grid
from ich_pipeline.dicom.archive import is_zip
from ich_pipeline.dicom.headers import is_dicom
from ich_pipeline.errors import ReadError
from ich_pipeline.files import SEG_SUFFIX, SR_SUFFIX, files_under
from ich_pipeline.geometry import Grid
from ich_pipeline.hounsfield import check_head, clean_hu
from ich_pipeline.manifest import read_manifest
from ich_pipeline.memory import check_memory
from ich_pipeline.nifti import NiftiHeader, is_nifti, nifti_stem, read_header, read_voxels
from ich_pipeline.records import CaseRecord, NativeMask, NiftiForms, Scan

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
        _require_nifti(path, case_id)
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
    _require_nifti(path, case_id)
    header = read_header(path, case_id)
    values = _rescaled(header) if (header.slope, header.inter) != (1, 0) else read_voxels(header)
    return NativeMask(_whole_numbers(case_id, values), header.grid), header.forms


def default_case_id(path: Path) -> str:
    """File name without its suffix (.nii.gz is one), or the folder's name."""
    if path.is_dir():
        return path.resolve().name
    return path.stem if is_zip(path) else nifti_stem(path)


def find_scans(inputs: Sequence[Path | str]) -> list[CaseRecord]:
    """List the scans in files, folders (searched with their subfolders) and manifests; nothing but headers is read.

    A ZIP file is one case. A folder of DICOM files is one case; folders of one study are one case at their common
    parent, unless another study lies there too: then each folder is a case. Hidden names are passed over. A scan that
    comes in twice is listed once. Case ids that collide get the parent folder's name appended, then a number, in the
    order found.

    Args:
        inputs: NIfTI files, ZIP files, folders, or manifests (.csv). What exists is a path, whatever it contains.

    Raises:
        ReadError: a path that does not exist or is no scan, a folder without scans, or one with a link that leads out
            of it.
        ManifestError: a manifest that cannot be used.
    """
    found: dict[tuple[Path, str | None], CaseRecord] = {}
    for given in map(Path, inputs):
        for record in _records_of(given):
            found.setdefault((record.image.resolve(), record.series), record)
    return _with_unique_ids(list(found.values()))


def _records_of(path: Path) -> list[CaseRecord]:
    if path.is_file() and path.suffix.lower() == ".csv":
        return read_manifest(path)
    if path.is_dir():
        scans = _scans_under(path.resolve())
        if not scans:
            raise ReadError(f"{path}: no NIfTI file, no ZIP file and no DICOM series in this folder. Check the path.")
        return [CaseRecord(default_case_id(scan), scan) for scan in scans]
    if is_dicom_input(path):
        return [CaseRecord(default_case_id(path), path.resolve())]
    _require_nifti(path, nifti_stem(path))
    return [CaseRecord(nifti_stem(path), path.resolve())]


def _scans_under(root: Path) -> list[Path]:
    """NIfTI files, ZIP files, and folders of DICOM studies, sorted by path."""
    single: list[Path] = []
    folders_of: dict[str, list[Path]] = defaultdict(list)  # by StudyInstanceUID of the first file
    for folder, files in files_under(root, str(root)):
        single += [file for file in files if is_zip(file) or (is_nifti(file) and not _is_second_of_pair(file))]
        first = next((file for file in files if not _is_no_slice(file) and is_dicom(file)), None)
        if first:
            folders_of[_study_uid(first)].append(folder)
    return sorted({*single, *_common_parents(list(folders_of.values()))})


def _common_parents(folders_of_studies: list[list[Path]]) -> Iterator[Path]:
    """One folder for each study, or all its folders where another study would come with it."""
    for folders in folders_of_studies:
        parent = Path(os.path.commonpath(folders))
        others = (each for group in folders_of_studies if group is not folders for each in group)
        yield from folders if any(each.is_relative_to(parent) for each in others) else [parent]


def _is_no_slice(file: Path) -> bool:
    """Whether the name says that a file is no slice: a folder of masks holds their SEG and SR as well."""
    return is_zip(file) or is_nifti(file) or file.name == "DICOMDIR" or file.name.endswith((SEG_SUFFIX, SR_SUFFIX))


def _is_second_of_pair(file: Path) -> bool:
    return file.suffix.lower() == ".img" and (file.with_suffix(".hdr").is_file() or file.with_suffix(".HDR").is_file())


def _study_uid(file: Path) -> str:
    try:
        with pydicom.config.disable_value_validation():  # it would quote values in warnings
            dataset = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=["StudyInstanceUID"])
            return str(dataset.get("StudyInstanceUID") or file.parent)
    except Exception:  # a damaged first file: reading the case will name it
        return str(file.parent)


def _with_unique_ids(records: list[CaseRecord]) -> list[CaseRecord]:
    counts = Counter(record.case_id for record in records)
    taken: set[str] = {case_id for case_id, n in counts.items() if n == 1}
    unique = []
    for record in records:
        case_id = record.case_id
        if counts[case_id] > 1:
            stem = f"{case_id}_{record.image.resolve().parent.name}"
            numbered = (f"{stem}_{n}" for n in range(2, len(records) + 2))
            case_id = next(name for name in (stem, *numbered) if name not in taken)
            taken.add(case_id)
        unique.append(replace(record, case_id=case_id))
    return unique


def _scanner_forms(grid: Grid) -> NiftiForms:
    """Forms for a scan that was no NIfTI file: scanner coordinates; no qform where it would drop shear."""
    if grid.tilt_deg > NO_SHEAR_DEG:
        return NiftiForms(sform=grid.affine, sform_code=1)
    return NiftiForms(sform=grid.affine, sform_code=1, qform=grid.affine, qform_code=1)


def _require_nifti(path: Path, case_id: str) -> None:
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
