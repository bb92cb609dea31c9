"""Damaged files: a short run of fuzz_inputs.py, and that it sees what is wrong."""

from dataclasses import replace
from pathlib import Path

import fuzz_inputs
import pytest

from ich_pipeline.reading import read_scan
from ich_pipeline.records import Scan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom says what is wrong with each file


@pytest.mark.parametrize(("kind", "cases"), [("nifti", 2000), ("dicom", 150)])
def test_damaged_files_are_read_right_or_refused(kind: str, cases: int) -> None:
    summary = fuzz_inputs.run(kind, seed=0, cases=cases)
    assert not summary.failures, summary.text()
    assert summary.outcomes[f"{kind}: read"] > cases / 20
    assert summary.outcomes[f"{kind}: ReadError"] > cases / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("nifti", 100_000),
        ("dicom", 4000),
    ],
)
def test_very_many_damaged_files(kind: str, cases: int) -> None:
    summary = fuzz_inputs.run(kind, seed=1, cases=cases)
    assert not summary.failures, summary.text()


def other_values(path: Path, case_id: str) -> Scan:
    scan = read_scan(path, case_id)
    return replace(scan, image_hu=scan.image_hu + 1)


def unnamed(path: Path, case_id: str) -> Scan:
    return read_scan(path, "another name")


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
@pytest.mark.parametrize(
    ("reader", "problem"),
    [(other_values, "wrong: AssertionError"), (None, "TypeError"), (unnamed, "does not name its case")],
)
def test_a_wrong_reader_is_seen(kind: str, reader: object, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_inputs, "read_scan", reader)
    summary = fuzz_inputs.run(kind, seed=0, cases=40)
    assert problem in summary.text()
    assert f"--kind {kind} --seed 0 --first " in summary.failures[0]


def test_a_case_can_be_made_again() -> None:
    whole = fuzz_inputs.run("nifti", seed=3, cases=20).outcomes
    parts = [fuzz_inputs.run("nifti", seed=3, first=first, cases=10).outcomes for first in (0, 10)]
    assert whole == parts[0] + parts[1]
    assert fuzz_inputs.run("nifti", seed=3, seconds=0).outcomes.total() == 0
