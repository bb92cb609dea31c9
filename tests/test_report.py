import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shapes import ellipsoid, empty, make_grid

from ich_pipeline.agreement import volume_agreement
from ich_pipeline.errors import ManifestError
from ich_pipeline.labels import Subtype
from ich_pipeline.overlap import compare_masks, summarise
from ich_pipeline.records import NativeMask
from ich_pipeline.report import (
    VOLUME_COLUMNS,
    CaseRow,
    agreement_markdown,
    read_rows,
    summary_markdown,
    write_agreement,
    write_tables,
    write_text,
)
from ich_pipeline.volumetry import measure

GRID = make_grid((60, 60, 12), (0.5, 0.5, 5), tilt_deg=10)
BLEED = ellipsoid(GRID, (10, 8, 14), centre_mm=(3, -2, 0))
CLEAN = empty(GRID)

DESIGN_COLUMNS = [
    *("case_id", "status", "error", "flags", "image", "mask"),
    *("volume_ml", "abc2_ml", "abc2_kothari_ml", "tada_ml", "a_mm", "b_mm", "c_mm"),
    *("n_lesions", "largest_lesion_ml", "slice_spacing_mm", "voxel_volume_mm3", "touches_border", "gantry_tilt_deg"),
    *("seconds", "bundle", "weights_sha256"),
]
LESION_COLUMNS = [
    *("case_id", "lesion", "volume_ml", "centroid_r_mm", "centroid_a_mm", "centroid_s_mm"),
    *("abc2_ml", "abc2_kothari_ml", "tada_ml", "a_mm", "b_mm", "c_mm", "slices", "touches_border", "abc2_applies"),
    "score",
]


def rows_in(folder: Path) -> list[CaseRow]:
    two = NativeMask(BLEED.values.copy(), GRID)
    two.values[1, 1, 1] = True
    return [
        CaseRow(
            "a b,c",
            "ok",
            flags=("tilt", "padding"),
            image=folder.parent / "scans" / "a.nii.gz",
            mask=folder / "masks" / "a.nii.gz",
            report=measure("a", two),
            seconds=1.5,
            bundle="cascade3d",
            weights_sha256="ab12",
            extra={"split": "test"},
        ),
        CaseRow("bad", "failed", 'bad: header says "2 slices",\nfound 1', image=folder / "bad.nii"),
        CaseRow("clean", "ok", report=measure("clean", CLEAN)),
        CaseRow("later", "skipped"),
    ]


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_columns_of_the_design_come_first(tmp_path: Path) -> None:
    write_tables(tmp_path / "volumes.csv", rows_in(tmp_path))
    header = (tmp_path / "volumes.csv").read_text().splitlines()[0].split(",")
    assert header[: len(DESIGN_COLUMNS)] == DESIGN_COLUMNS
    assert header == [*VOLUME_COLUMNS, "split"]
    assert VOLUME_COLUMNS[len(DESIGN_COLUMNS) :] == [
        *("abc2_lesions_sum_ml", "abc2_kothari_lesions_sum_ml", "tada_lesions_sum_ml"),
        *("volume_low_ml", "volume_high_ml", "band", "from_30_ml", "band_holds_30"),
        *("abc2_applies", "edema_ml", "edema_ratio", "edema_extension_mm"),
    ]


def test_cells_say_what_was_measured(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    write_tables(tmp_path / "volumes.csv", rows)
    a, bad, clean, later = cells(tmp_path / "volumes.csv")
    assert a["case_id"] == "a b,c"
    assert a["flags"] == "tilt;padding"
    assert (a["image"], a["mask"]) == ("../scans/a.nii.gz", "masks/a.nii.gz")
    assert float(a["volume_ml"]) == pytest.approx(rows[0].report.volume_ml, abs=5e-7)
    assert len(a["volume_ml"].split(".")[1]) >= 5
    assert (a["n_lesions"], a["touches_border"], a["seconds"], a["split"]) == ("2", "0", "1.500000", "test")
    numbers = [name for name in VOLUME_COLUMNS if name.endswith(("_ml", "_mm", "_mm3", "_deg")) or "lesion" in name]
    assert len(numbers) > 12
    assert {bad[name] for name in numbers} == {later[name] for name in numbers} == {""}
    assert bad["error"] == 'bad: header says "2 slices",\nfound 1'
    assert (clean["volume_ml"], clean["n_lesions"], later["status"]) == ("0.000000", "0", "skipped")


def test_lesions_have_a_row_each(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    write_tables(tmp_path / "volumes.csv", rows)
    big, small = cells(tmp_path / "lesions.csv")
    assert (big["case_id"], big["lesion"], small["lesion"]) == ("a b,c", "1", "2")
    # Six decimals: half of the last one is more than the relative error of a small lesion.
    assert float(small["volume_ml"]) == pytest.approx(GRID.voxel_volume_mm3 / 1000, abs=5e-7)
    assert float(big["centroid_r_mm"]) == pytest.approx(rows[0].report.lesions[0].centroid_r_mm, abs=5e-7)
    assert list(big) == LESION_COLUMNS


def test_subtypes_have_columns_when_a_mask_has_them(tmp_path: Path) -> None:
    values = np.where(BLEED.values, Subtype.IVH, 0).astype(np.uint8)
    report = measure("a", NativeMask(values, GRID), subtypes=True)
    write_tables(tmp_path / "volumes.csv", [CaseRow("a", "ok", report=report), CaseRow("b", "failed", "b: no file")])
    a, b = cells(tmp_path / "volumes.csv")
    assert float(a["volume_ivh_ml"]) == pytest.approx(report.volume_ml, abs=1e-6)
    assert (a["volume_sdh_ml"], b["volume_ivh_ml"]) == ("0.000000", "")
    assert cells(tmp_path / "lesions.csv")[0]["volume_ivh_ml"] == a["volume_ivh_ml"]
    assert read_rows(tmp_path / "volumes.csv")[0].report.subtype_ml.keys() == set(Subtype)


def test_a_table_read_and_written_again_is_the_same_file(tmp_path: Path) -> None:
    table = tmp_path / "volumes.csv"
    write_tables(table, rows_in(tmp_path))
    before = [path.read_bytes() for path in (table, tmp_path / "lesions.csv")]
    rows = read_rows(table)
    assert [row.status for row in rows] == ["ok", "failed", "ok", "skipped"]
    assert rows[0].image == tmp_path.parent / "scans" / "a.nii.gz"
    assert rows[0].flags == ("tilt", "padding")
    assert rows[0].report.touches_border is False
    assert len(rows[0].report.lesions) == 2
    write_tables(table, rows)
    assert [path.read_bytes() for path in (table, tmp_path / "lesions.csv")] == before


def test_a_table_of_nothing_is_a_header(tmp_path: Path) -> None:
    write_tables(tmp_path / "volumes.csv", [])
    assert cells(tmp_path / "volumes.csv") == []
    assert read_rows(tmp_path / "volumes.csv") == []


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"status": "done"}, "status 'done', expected one of ok, failed, skipped"),
        ({"status": "ok"}, "only a case that is ok has a report"),
        ({"status": "failed", "error": "x", "report": measure("x", CLEAN)}, "only a case that is ok has a report"),
        ({"status": "failed", "error": " "}, "failed without a reason"),
        ({"status": "skipped", "flags": ("a;b",)}, "';' separates flags"),
        ({"status": "skipped", "extra": {"volume_ml": "3"}}, "extra columns .* have a fixed meaning"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(parts: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"case7: .*{words}"):
        CaseRow("case7", **parts)


def test_a_number_that_is_none_is_never_written(tmp_path: Path) -> None:
    report = dataclasses.replace(measure("a", BLEED), tada_ml=float("nan"))
    with pytest.raises(ValueError, match="a: tada_ml is nan"):
        write_tables(tmp_path / "volumes.csv", [CaseRow("a", "ok", report=report)])
    assert not (tmp_path / "volumes.csv").exists()


def test_a_case_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cases \['a'\] occur twice"):
        write_tables(tmp_path / "volumes.csv", [CaseRow("a", "skipped"), CaseRow("a", "skipped")])


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    table = tmp_path / "volumes.csv"
    write_tables(table, [CaseRow("a", "skipped")])
    with pytest.raises(ValueError, match="seconds is inf"):
        write_tables(table, [CaseRow("b", "skipped", seconds=float("inf"))])
    assert [row["case_id"] for row in cells(table)] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lesions.csv", "volumes.csv"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("volume_ml", "volume", r"columns \['volume_ml'\] are missing"),
        (",ok,", ",fine,", "status 'fine'"),
        ("1.500000", "soon", "could not convert"),
        (",test\n", "\n", "row 2 has another number of cells"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    table = tmp_path / "volumes.csv"
    write_tables(table, rows_in(tmp_path))
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(ManifestError, match=words):
        read_rows(table)


def test_lesions_that_do_not_fit_the_table_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "volumes.csv"
    write_tables(table, rows_in(tmp_path))
    lesions = tmp_path / "lesions.csv"
    lesions.write_text(lesions.read_text().replace(",2,0.00", ",two,0.00"))
    with pytest.raises(ManifestError, match=r"lesions.csv: case a b,c: invalid literal"):
        read_rows(table)
    lesions.unlink()
    with pytest.raises(ManifestError, match=r"case a b,c: 2 lesions, 0 rows in lesions.csv"):
        read_rows(table)


def test_evaluation_tables(tmp_path: Path) -> None:
    rows = [
        compare_masks("found", BLEED, BLEED, patient_id="p"),
        compare_masks("missed", CLEAN, BLEED, patient_id="q"),
        compare_masks("clean", CLEAN, CLEAN, patient_id="r"),
    ]
    write_agreement(tmp_path / "cases.csv", rows)
    found, missed, clean = cells(tmp_path / "cases.csv")
    assert (found["missed"], missed["missed"], clean["missed"]) == ("0", "1", "")
    assert (missed["hd95_mm"], missed["dice"], clean["false_alarm_ml"]) == ("", "0.000000", "0.000000")
    assert (found["lesions_labelled_1_to_5ml"], found["lesions_found_1_to_5ml"]) == ("1", "1")
    assert float(found["label_ml"]) == pytest.approx(rows[0].label_ml, abs=5e-7)

    write_text(tmp_path / "evaluation.md", summary_markdown(summarise(rows, n_failed=4)))
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "3 cases of 3 patients: 2 with blood, 1 without; 4 failed and are in no score." in text
    assert "| dice | positive | 2 | 1 | 0.500 [0.000, 1.000] | 0.500 [0.000, 1.000] |" in text
    assert "| hd95_mm | positive | 1 | 1 | 0.000 [0.000, 0.000] |" in text
    assert "| specificity | negative | 1 | 0 | 1.000 | - |" in text, "one patient: no interval"


def test_agreement_table_puts_estimates_side_by_side() -> None:
    patients = ["a", "b", "c"]
    found = {
        "ABC/2": volume_agreement([10, 20, 40], [9, 18, 36], patients),
        "Tada": volume_agreement([10, 20, None], [11, 22, 44], patients),
    }
    text = agreement_markdown(found)
    assert text.splitlines()[0] == "| | ABC/2 | Tada |"
    assert "| pairs (patients) | 3 (3) | 2 (2) |" in text
    assert "| without a number | 0 | 1 |" in text
    assert "| median_relative_error | -0.100 [-0.100, -0.100] | 0.100 [0.100, 0.100] |" in text
    json.dumps({name: dataclasses.asdict(each) for name, each in found.items()})


def test_tables_import_nothing_heavy() -> None:
    heavy = "torch", "monai", "scipy", "pandas", "matplotlib", "PIL", "cc3d", "nibabel"
    code = f"import sys, ich_pipeline.report, ich_pipeline.pictures; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
