"""Which scans files, folders and manifests hold."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pydicom

from ich_pipeline.dicom.archive import is_zip
from ich_pipeline.dicom.headers import is_dicom
from ich_pipeline.errors import ReadError
from ich_pipeline.files import SEG_SUFFIX, SR_SUFFIX, files_under
from ich_pipeline.manifest import read_manifest
from ich_pipeline.nifti import is_nifti, nifti_stem
from ich_pipeline.reading import default_case_id, is_dicom_input, require_nifti
from ich_pipeline.records import CaseRecord


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
    require_nifti(path, nifti_stem(path))
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
