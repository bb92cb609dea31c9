import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ich_pipeline.cli import main
from ich_pipeline.cohort import ALL, Cohort, lesion_group, read_cohort, subtype_group, volume_group, write_cohort
from ich_pipeline.errors import ManifestError
from ich_pipeline.labels import Subtype


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """30 scans of 15 patients; b reads 10 % more than a, and one case has failed."""
    path = tmp_path / "volumes.csv"
    lines = [
        "case_id,patient_id,a_ml,b_ml,n_lesions,volume_edh_ml,volume_iph_ml,volume_ivh_ml,volume_sah_ml,volume_sdh_ml"
    ]
    for n in range(30):
        a = 3.0 * n + 1
        lines.append(f"c{n},p{n // 2},{a},{1.1 * a:.4f},{1 + n % 7},0,{a / 2},{a / 2 if n % 2 else 0},0,0")
    lines.append("bad,p0,,,,,,,,")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("ml", "name"),
    [
        (None, ""),
        (0, "below 30 mL"),
        (29.99, "below 30 mL"),
        (30, "30 to 60 mL"),
        (60, "30 to 60 mL"),
        (61, "above 60 mL"),
    ],
)
def test_volume_groups(ml: float | None, name: str) -> None:
    assert volume_group(ml) == name


def test_lesion_and_subtype_groups() -> None:
    names = [lesion_group(n) for n in (0, 1, 2, 5, 6, 300)]
    assert names == ["no lesion", "1 lesion", "2 to 5 lesions", "2 to 5 lesions", *["more than 5 lesions"] * 2]
    assert subtype_group({Subtype.IVH: 1.0, Subtype.IPH: 2.0, Subtype.SDH: 0.0}) == "IPH+IVH"
    assert subtype_group(None) == subtype_group({Subtype.SDH: 0.0}) == ""


def test_groups_part_the_cases(table: Path) -> None:
    cohort = read_cohort(table, "a_ml", ["b_ml"])
    agreements = {name: found["b_ml"] for name, found in cohort.agreements().items()}
    assert list(agreements) == [
        *(ALL, "below 30 mL", "30 to 60 mL", "above 60 mL"),
        *("1 lesion", "2 to 5 lesions", "more than 5 lesions", "IPH", "IPH+IVH"),
    ]
    assert (agreements[ALL].n, agreements[ALL].n_patients, agreements[ALL].missing) == (30, 15, 1)
    assert sum(agreements[name].n for name in ("below 30 mL", "30 to 60 mL", "above 60 mL")) == 30
    below = agreements["below 30 mL"]
    assert below.n == 10
    assert below.statistics["bias_ml"].value == pytest.approx(0.1 * np.mean([3 * n + 1 for n in range(10)]), abs=1e-4)
    # 28 reads 30.8: one of the ten crosses.
    assert below.statistics["share_only_estimate_above"].value == pytest.approx(0.1)
    assert below.statistics["share_only_reference_above"].value == 0
    assert below.statistics["share_only_estimate_above"].high > 0.1


def test_tables_and_plots(table: Path, tmp_path: Path) -> None:
    text, by_group = write_cohort(read_cohort(table, "a_ml", ["b_ml", "volume_iph_ml"]), tmp_path / "out")
    assert "| | b_ml | volume_iph_ml |" in text
    assert list(by_group) == ["b_ml", "volume_iph_ml"]
    assert "| | below 30 mL | 30 to 60 mL |" in by_group["b_ml"]
    assert "pairs (patients) | 30 (15) | 30 (15)" in text
    with (tmp_path / "out" / "agreement.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    bias = next(r for r in rows if (r["group"], r["estimate"], r["statistic"]) == (ALL, "b_ml", "bias_ml"))
    assert float(bias["value"]) == pytest.approx(4.45, abs=1e-3)
    assert float(bias["low"]) < 4.45 < float(bias["high"])
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {f"{each}_{plot}.png" for each in ("b_ml", "volume_iph_ml") for plot in ("bland_altman", "scatter")}


def test_without_patients_each_row_is_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y\n1,2\n3,4\n5,7\n")
    cohort = read_cohort(path, "x", ["y"])
    assert cohort.agreements()[ALL]["y"].n_patients == 3
    assert list(cohort.groups) == ["volume"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n", r"no column 'z'; it has x, y"),
        ("x,z\n1,2\n3,many\n", r"row 3: z is 'many', expected a number or nothing"),
        (None, r"no such table"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "t.csv"
    if text:
        path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_cohort(path, "x", ["z"])


def test_no_groups_no_group_tables(tmp_path: Path) -> None:
    cohort = Cohort("label", [1.0, 2.0, 3.0], {"mask": [1.0, 2.5, 3.0]}, ["a", "b", "c"])
    _, by_group = write_cohort(cohort, tmp_path, plots={"mask": ""})
    assert by_group == {}
    assert (tmp_path / "bland_altman.png").is_file()


def test_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["agreement", str(table), "--reference", "a_ml", "--estimate", "b_ml", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(call)
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "out" / "agreement.md").read_text().strip()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["inputs"][0]["path"] == str(table)
    with pytest.raises(SystemExit) as ended:
        main([*call[:5], "c_ml", *call[6:]])
    assert ended.value.code == 2
    assert "no column 'c_ml'" in capsys.readouterr().err
