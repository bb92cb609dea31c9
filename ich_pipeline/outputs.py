"""What an earlier run left in an output folder: what of it still holds, and what may not be replaced."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ich_pipeline.errors import ConfigError
from ich_pipeline.files import SEG_SUFFIX, SR_SUFFIX
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import GROWTH_COLUMNS, LESIONS_NAME, CaseRow, read_rows
from ich_pipeline.run_report import plain
from ich_pipeline.settings import Settings


def done_before(
    table: Path, cases: Sequence[CaseRecord], config: Mapping[str, Any], sha256: str | None
) -> list[CaseRow]:
    """Rows of an earlier run of the same command that need not be done again.

    A case is done again when it failed, when a file of its mask is gone, and when its scan is newer than its mask.

    Raises:
        ConfigError: the table is of a run with other settings, other weights or other scans.
    """
    run_file = table.parent / "run.json"
    if not table.is_file():
        return []
    before = json.loads(run_file.read_text()) if run_file.is_file() else {}
    now = (_decisive(plain(config)), sha256)
    then = (_decisive(before.get("config") or {}), (before.get("bundle") or {}).get("sha256"))
    if now != then:
        raise ConfigError(
            f"{table} is of a run with other settings or weights. Give another --out, or overwrite=true to replace it."
        )
    sources = {case.case_id: case.image for case in cases}
    rows = [row for row in read_rows(table) if row.status == "ok"]
    other = [row.case_id for row in rows if row.image != sources.get(row.case_id)]
    if other:
        raise ConfigError(
            f"{table} also holds {other[0]}, which is not among these scans ({len(other)} in all). Give another --out, "
            "or overwrite=true to replace it."
        )
    return [row for row in rows if _is_whole(row, dicom=bool(config["run"]["dicom"]))]


def _is_whole(row: CaseRow, *, dicom: bool) -> bool:
    """Whether the files of a case that is ok are there, and no older than its scan; a NIfTI scan has no DICOM files."""
    from ich_pipeline.dicom_out import are_complete
    from ich_pipeline.nifti import is_nifti

    if not (row.image and row.mask and row.report and _is_newer(row.mask, row.image)):
        return False
    no_dicom = not dicom or is_nifti(row.image) or "no_dicom_results" in row.flags
    return no_dicom or are_complete(row.mask, row.report.n_lesions)


def _decisive(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a recorded config decides the files of a run."""
    run = config.get("run") or {}
    return config.get("inference"), *(run.get(name) for name in ("pictures", "dicom", "keep_identifiers"))


def _is_newer(mask: Path, scan: Path) -> bool:
    return mask.is_file() and (not scan.exists() or mask.stat().st_mtime >= scan.stat().st_mtime)


def check_outside(scans: Sequence[Path], masks: Path) -> None:
    """Refuse to write masks where scans are looked for.

    Raises:
        ConfigError: the folder of masks lies in a folder of scans.
    """
    inside = [scan for scan in scans if scan.is_dir() and masks.resolve().is_relative_to(scan.resolve())]
    if inside:
        raise ConfigError(
            f"{masks} lies in {inside[0]}, where scans are looked for: its masks would be taken for scans. "
            "Give an --out elsewhere."
        )


def check_measuring(table: Path, settings: Settings) -> None:
    """Refuse what does not go with masks that exist.

    Raises:
        ConfigError: a bundle or its keys were named, or `table` holds what a bundle segmented.
    """
    if settings.overrides or settings.run["bundle"]:
        raise ConfigError("--masks measures masks that exist: it takes no bundle and none of its keys")
    if table.is_file() and not settings.run["overwrite"] and any(row.bundle for row in read_rows(table)):
        raise ConfigError(
            f"{table} holds what a bundle segmented. Give another --out, or overwrite=true to replace it."
        )


def check_replaced(table: Path, cases: Sequence[CaseRecord], settings: Settings) -> None:
    """Refuse to replace a table that the call does not name and that holds other cases.

    Raises:
        ConfigError: there is one.
    """
    known = {case.case_id for case in cases}
    other = [row.case_id for row in read_rows(table) if row.case_id not in known] if table.is_file() else []
    if other and not settings.run["overwrite"]:
        raise ConfigError(
            f"{table} also holds {other[0]}, which is not compared here ({len(other)} in all). Give an --out in "
            "another folder, or overwrite=true to replace it."
        )


def check_growth_table(out: Path) -> None:
    """Refuse to write growth.csv over another file, or where one goes that is written beside it.

    Raises:
        ConfigError: `out` has such a name, or is a file with other columns.
    """
    if out.name in ("volumes.csv", LESIONS_NAME, "run.json"):
        raise ConfigError(f"{out}: a file of this name goes beside the table of growth. Give another --out.")
    if out.is_file() and out.read_bytes().splitlines()[:1] != [",".join(GROWTH_COLUMNS).encode()]:
        raise ConfigError(f"{out} is no table of growth, and would be replaced. Give another --out.")


def check_targets(cases: Sequence[CaseRecord], masks: Path) -> None:
    """Refuse to write masks over scans.

    Raises:
        ConfigError: the mask of one case has the path of a scan.
    """
    scans = {case.image.resolve() for case in cases}
    taken = [case for case in cases if (masks / f"{case.case_id}.nii.gz").resolve() in scans]
    if taken:
        raise ConfigError(f"{taken[0].case_id}: its mask would replace the scan itself in {masks}. Give another --out.")


def clear(cases: Sequence[CaseRecord], folders: Sequence[Path], table: Path) -> None:
    """Remove what an earlier run left of these cases, so that a case that fails now has no mask of other settings."""
    for file in (table, table.with_name(LESIONS_NAME)):
        file.unlink(missing_ok=True)
    for case in cases:
        for folder in folders:
            for suffix in (".nii.gz", SEG_SUFFIX, SR_SUFFIX):
                (folder / f"{case.case_id}{suffix}").unlink(missing_ok=True)
        (table.parent / "pictures" / f"{case.case_id}.png").unlink(missing_ok=True)
