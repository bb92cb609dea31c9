import csv
from pathlib import Path

import numpy as np
import pytest
from heads import save_nifti
from shapes import make_grid

from ich_pipeline.commands import Settings, measure_masks
from ich_pipeline.errors import ConfigError
from ich_pipeline.geometry import Grid
from ich_pipeline.labels import Subtype
from ich_pipeline.masks import _processes, measure_file, measure_files
from ich_pipeline.records import CaseRecord

GRID = make_grid((24, 24, 8), (2.5, 2.5, 5))
ML = 2.5 * 2.5 * 5 / 1000


def labels(*boxes: tuple[int, slice]) -> np.ndarray:
    """Bars of values along the first axis, 4 x 4 voxels across."""
    values = np.zeros(GRID.shape, np.uint8)
    for value, side in boxes:
        values[side, 4:8, 3] = value
    return values


def save(path: Path, values: np.ndarray, grid: Grid = GRID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(path, values, grid)
    return path


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_mask_of_several_values_is_measured_whole_and_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", labels((2, slice(2, 6)), (5, slice(10, 14))))
    found = measure_file(CaseRecord("a", path))
    assert found.row.flags == ("several_values",)
    assert found.row.report.volume_ml == pytest.approx(32 * ML)
    assert found.row.report.subtype_ml is None
    assert found.row.seconds == pytest.approx(found.seconds["read"] + found.seconds["measure"])
    one_value = measure_file(CaseRecord("b", save(tmp_path / "b.nii.gz", labels((255, slice(2, 6))))))
    assert one_value.row.flags == ()
    parted = measure_file(CaseRecord("a", path), subtypes=True)
    assert parted.row.flags == ()
    assert parted.row.report.subtype_ml[Subtype.SDH] == pytest.approx(16 * ML)


def test_edema_is_a_value_or_a_file_but_not_both(tmp_path: Path) -> None:
    values = labels((1, slice(2, 6)), (6, slice(6, 9)))
    path = save(tmp_path / "both.nii.gz", values)
    by_value = measure_file(CaseRecord("a", path), edema_value=6).row
    assert by_value.report.volume_ml == pytest.approx(16 * ML)
    assert by_value.report.edema_ml == pytest.approx(12 * ML)
    assert by_value.report.edema_ratio == pytest.approx(12 / 16)
    assert by_value.flags == ()
    blood = save(tmp_path / "blood.nii.gz", (values == 1).astype(np.uint8))
    edema = save(tmp_path / "edema.nii.gz", (values == 6).astype(np.uint8))
    by_file = measure_file(CaseRecord("a", blood, edema=edema)).row
    assert by_file.report == by_value.report
    twice = measure_file(CaseRecord("a", path, edema=edema), edema_value=6).row
    assert (twice.status, twice.report) == ("failed", None)
    assert "which? Leave one out" in twice.error


def test_several_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    cases = [CaseRecord(f"m{n}", save(tmp_path / f"m{n}.nii.gz", labels((1, slice(2, 3 + n))))) for n in range(6)]
    cases.insert(2, CaseRecord("gone", tmp_path / "gone.nii.gz"))
    seen: list[str] = []
    alone = measure_files(cases, jobs=1)
    together = measure_files(cases, jobs=2, on_case=lambda measured: seen.append(measured.row.case_id))
    assert seen == [case.case_id for case in cases]
    assert [each.row.report for each in together] == [each.row.report for each in alone]
    assert [each.row.status for each in together] == ["ok", "ok", "failed", "ok", "ok", "ok", "ok"]
    assert "does not exist" in together[2].row.error


def test_processes_pay_for_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert [_processes("auto", n) for n in (1, 39, 80, 419)] == [1, 1, 2, 4]
    assert _processes(8, 3) == 3
    for wrong in (0, "many", 1.5):
        with pytest.raises(ConfigError, match="expected a number of processes from 1, or auto"):
            _processes(wrong, 10)


def test_a_manifest_gives_its_labels_subtypes_and_edema(tmp_path: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz", np.zeros(GRID.shape, np.uint8))
    save(tmp_path / "label.nii.gz", labels((2, slice(2, 10)), (3, slice(10, 14)), (4, slice(16, 20))))
    save(tmp_path / "edema.nii.gz", labels((1, slice(0, 4)), (1, slice(14, 15))))
    manifest = tmp_path / "cases.csv"
    manifest.write_text(f"case_id,image,label,edema\na,{scan.name},label.nii.gz,edema.nii.gz\n")
    table = tmp_path / "out" / "volumes.csv"
    assert measure_masks([manifest], table, Settings.of(["subtypes=true"])) == 0
    (row,) = rows(table)
    assert row["mask"] == "../label.nii.gz"
    assert float(row["volume_iph_ml"]) == pytest.approx(32 * ML, abs=1e-6)
    assert float(row["volume_ivh_ml"]) == pytest.approx(16 * ML, abs=1e-6)
    # Rows 2 and 3 of the edema are blood already; 0, 1 and 14 are not.
    assert float(row["edema_ml"]) == pytest.approx(12 * ML, abs=1e-6)
    assert float(row["edema_ratio"]) == pytest.approx(12 / 32, abs=1e-6)
    assert row["abc2_applies"] == "0"
    assert [lesion["abc2_applies"] for lesion in rows(table.with_name("lesions.csv"))] == ["1", "0"]
    assert float(row["abc2_ml"]) > 0, "the number stays"
