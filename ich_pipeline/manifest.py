"""Tables of cases: read and checked, written, split by patient.

A manifest is a CSV file with at least `case_id` and `image`; `patient_id`, `label`, `split`, `fold` and `edema` (a mask
of perihematomal edema) have a meaning, any other column is kept as it is. Paths are relative to the manifest, or to a
folder in ICH_DATA_ROOT, and lead nowhere else.
"""

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ich_pipeline.errors import ConfigError, IchError, ManifestError
from ich_pipeline.files import write_csv_rows
from ich_pipeline.records import CaseRecord

COLUMNS = ("case_id", "patient_id", "image", "label", "split", "fold")
EDEMA = "edema"  # few data sets have it: the column is there where a case has one
REQUIRED = ("case_id", "image")
SPLITS = ("train", "val", "test", "")
DATA_ROOT = "ICH_DATA_ROOT"
PHANTOM_FILE = "phantom.json"  # beside the manifest of a set of phantoms


def read_manifest(path: Path | str, *, require_label: bool = False, check_grids: bool = False) -> list[CaseRecord]:
    """Read a manifest; every error names the file and the row (its line in the file).

    Args:
        path: CSV file, UTF-8.
        require_label: refuse a case without a label.
        check_grids: compare the grids of image and label, from their headers alone.

    Returns:
        Records with absolute paths, in the order of the file. Where `patient_id` is empty it is the case id.

    Raises:
        ManifestError: a missing column or file, a path that leads elsewhere, a case id that is empty, repeated or no
            file name, one patient in two splits, an unknown split, a fold that is no number, or a label on another grid
            than its image.
    """
    path = Path(path)
    records: list[CaseRecord] = []
    first_row: dict[str, int] = {}
    split_of: dict[str, tuple[str, int]] = {}
    for row_number, row in _rows(path, require_label):
        where = f"{path.name} row {row_number}"
        record = _record(where, path.parent, row, require_label)
        if record.case_id in first_row:
            raise ManifestError(
                f"{where}: case_id {record.case_id!r} stands in row {first_row[record.case_id]} already, expected it "
                "once. Rename or remove one."
            )
        split, earlier = split_of.setdefault(record.patient_id, (record.split, row_number))
        if split != record.split:
            raise ManifestError(
                f"{where}: patient {record.patient_id!r} is in split {record.split!r} here and {split!r} in row "
                f"{earlier}, expected one split for all scans of a patient. Split by patient."
            )
        if check_grids and record.label:
            _check_grid(where, record)
        first_row[record.case_id] = row_number
        records.append(record)
    if not records:
        raise ManifestError(f"{path.name}: no cases, expected at least one row below the header.")
    return records


def write_manifest(path: Path | str, records: Sequence[CaseRecord]) -> None:
    """Write a manifest that `read_manifest` reads back to the same records.

    Paths are written relative to the manifest's folder, or to ICH_DATA_ROOT where they lie under that only.

    Raises:
        ManifestError: a file lies in neither.
    """
    path = Path(path)
    extra = list(dict.fromkeys(name for record in records for name in record.extra))
    rows: list[dict[str, Any]] = [
        {
            **record.extra,
            "case_id": record.case_id,
            "patient_id": record.patient_id or record.case_id,
            "image": _portable(record.image, path.parent),
            "label": _portable(record.label, path.parent) if record.label else "",
            "split": record.split,
            "fold": record.fold,
            **({EDEMA: _portable(record.edema, path.parent)} if record.edema else {}),
        }
        for record in records
    ]
    edema = [EDEMA] if any(record.edema for record in records) else []
    write_csv_rows(path, rows, [*COLUMNS, *edema, *extra])


def split_by_patient(records: Sequence[CaseRecord], fractions: Mapping[str, float], seed: int) -> list[CaseRecord]:
    """Give every patient a split, at random but the same for the same seed, whatever the order of the records.

    Args:
        records: their present splits are ignored.
        fractions: share of patients by split, such as {"train": 0.7, "val": 0.1, "test": 0.2}; they sum to 1.
        seed: another seed, another draw.

    Raises:
        ConfigError: an unknown split, a share that is negative or shares that do not sum to 1.
    """
    unknown = set(fractions) - set(SPLITS)
    if unknown or min(fractions.values(), default=-1) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ConfigError(f"fractions {dict(fractions)}, expected shares of {SPLITS[:3]} that sum to 1.")
    patients = _shuffled_patients(records, seed)
    split_of: dict[str, str] = {}
    share = 0.0
    for split, fraction in fractions.items():
        begin, share = round(share * len(patients)), share + fraction
        split_of |= dict.fromkeys(patients[begin : round(share * len(patients))], split)
    return [replace(record, split=split_of[_patient(record)]) for record in records]


def assign_folds(records: Sequence[CaseRecord], k: int, seed: int) -> list[CaseRecord]:
    """Number the patients outside the split `test` with folds 0 to k-1, of sizes that differ by one at most.

    Raises:
        ConfigError: fewer than two folds, or fewer patients than folds.
    """
    patients = _shuffled_patients([record for record in records if record.split != "test"], seed)
    if not 2 <= k <= len(patients):
        raise ConfigError(f"{k} folds for {len(patients)} patients, expected 2 to {len(patients)} folds.")
    fold_of = {patient: index % k for index, patient in enumerate(patients)}
    return [replace(record, fold=fold_of.get(_patient(record))) for record in records]


def _rows(path: Path, require_label: bool) -> list[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest. Check the path.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream)
        try:
            table = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"{path.name}: not a CSV file in UTF-8 ({error}). Save it as CSV UTF-8.") from error
    header = table[0][1] if table else []
    missing = [name for name in (*REQUIRED, *(("label",) if require_label else ())) if name not in header]
    if missing or len(set(header)) < len(header):
        wrong = f"no column {', '.join(missing)}" if missing else "a column name that stands twice"
        raise ManifestError(f"{path.name} row 1: {wrong} in {header}; expected at least {', '.join(REQUIRED)}.")
    for number, cells in table[1:]:
        if len(cells) != len(header):
            raise ManifestError(f"{path.name} row {number}: {len(cells)} cells, expected {len(header)}. Check commas.")
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in table[1:] if any(cells)]


def _record(where: str, folder: Path, row: dict[str, str], require_label: bool) -> CaseRecord:
    case_id = row["case_id"]
    if not case_id or case_id.startswith(".") or set(case_id) & set("/\\\0"):
        raise ManifestError(f"{where}: case_id {case_id!r}, expected a plain file name: masks are named after it.")
    if not row["image"] or (require_label and not row["label"]):
        raise ManifestError(f"{where}: no {'label' if row['image'] else 'image'} for {case_id}. Fill the cell.")
    split = row.get("split", "")
    if split not in SPLITS:
        raise ManifestError(f"{where}: split {split!r}, expected train, val, test or nothing.")
    fold = row.get("fold", "")
    if fold and not fold.isdecimal():
        raise ManifestError(f"{where}: fold {fold!r}, expected a whole number from 0 or nothing.")
    return CaseRecord(
        case_id=case_id,
        patient_id=row.get("patient_id") or case_id,
        image=_existing(where, folder, row["image"]),
        label=_existing(where, folder, row["label"]) if row.get("label") else None,
        split=split,
        fold=int(fold) if fold else None,
        edema=_existing(where, folder, row[EDEMA]) if row.get(EDEMA) else None,
        extra={name: value for name, value in row.items() if name not in (*COLUMNS, EDEMA)},
    )


def _roots(folder: Path) -> list[Path]:
    named = os.environ.get(DATA_ROOT, "").split(os.pathsep)
    return [folder.resolve(), *(Path(root).resolve() for root in named if root)]


def _existing(where: str, folder: Path, written: str) -> Path:
    roots = _roots(folder)
    found = next((path.resolve() for root in roots if (path := root / written).exists()), None)
    looked = " and ".join(map(str, roots))
    if found is None:
        hint = "" if len(roots) > 1 else f" or set {DATA_ROOT}"
        raise ManifestError(f"{where}: {written} does not exist (looked in {looked}). Correct the path{hint}.")
    _require_inside(where, written, found, roots)
    return found


def _require_inside(where: str, written: str, path: Path, roots: Sequence[Path]) -> None:
    """A manifest may come from anybody: what it names lies in its own folder, or in one that the user named."""
    if not any(path.is_relative_to(root) for root in roots):
        raise ManifestError(
            f"{where}: {written} lies outside {' and '.join(map(str, roots))}, expected a file inside. Put the "
            f"manifest above the data, or set {DATA_ROOT} to the folder that holds it (several: '{os.pathsep}')."
        )


def _portable(path: Path, folder: Path) -> str:
    path, roots = path.resolve(), _roots(folder)
    _require_inside("manifest", str(path), path, roots)
    return next(path.relative_to(root) for root in roots if path.is_relative_to(root)).as_posix()


def _check_grid(where: str, record: CaseRecord) -> None:
    from ich_pipeline.geometry import require_same_grid  # light commands read manifests without these
    from ich_pipeline.nifti import read_header
    from ich_pipeline.reading import read_grid

    assert record.label is not None
    try:
        case_id = record.case_id
        image_grid = read_grid(record.image, case_id, record.series)
        require_same_grid(case_id, "label", read_header(record.label, case_id).grid, image_grid)
    except IchError as error:
        raise ManifestError(f"{where}: {error}") from error


def _patient(record: CaseRecord) -> str:
    return record.patient_id or record.case_id


def _shuffled_patients(records: Sequence[CaseRecord], seed: int) -> list[str]:
    """Patients in an order drawn by hash: the same on every machine and in every version of a random generator."""
    return sorted({_patient(r) for r in records}, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
