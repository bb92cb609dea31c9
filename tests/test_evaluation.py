"""Every labelled case is scored or counted as failed; what cannot be compared is refused."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from heads import bleeding_head, save_nifti, write_heads
from scan_files import SHAPE

from ich_pipeline.errors import ConfigError, GeometryError, ManifestError
from ich_pipeline.evaluation import (
    ABC2,
    MODEL,
    TADA,
    compare,
    draw_with_labels,
    labelled_cases,
    labelled_items,
    write_evaluation,
)
from ich_pipeline.geometry import Grid
from ich_pipeline.manifest import write_manifest
from ich_pipeline.reading import read_mask
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.report import CaseRow, write_tables
from ich_pipeline.volumetry import measure


@pytest.fixture
def cases(tmp_path) -> list[CaseRecord]:
    """Six labelled heads of three patients; head3 has no bleed. Four are for testing."""
    scans = write_heads(tmp_path / "scans", 6, tmp_path / "labels")
    return [
        CaseRecord(
            scan.name.removesuffix(".nii.gz"),
            scan,
            tmp_path / "labels" / scan.name,
            patient_id=f"p{n // 2}",
            split="train" if n < 2 else "test",
        )
        for n, scan in enumerate(scans)
    ]


@pytest.fixture
def manifest(cases, tmp_path) -> Path:
    write_manifest(tmp_path / "cases.csv", cases)
    return tmp_path / "cases.csv"


class TestLabelledCases:
    def test_cases_of_the_split(self, manifest):
        assert [case.case_id for case in labelled_cases(manifest, "test")] == ["head2", "head3", "head4", "head5"]
        items = labelled_items(manifest, "train")
        assert [Path(item["label"]).name for item in items] == ["head0.nii.gz", "head1.nii.gz"]
        assert all(Path(item["image"]).is_file() for item in items)

    @pytest.mark.parametrize("nothing", [None, ""])
    def test_no_manifest(self, nothing):
        with pytest.raises(ConfigError, match="data=MANIFEST"):
            labelled_cases(nothing, "test")

    def test_empty_split(self, manifest):
        with pytest.raises(ManifestError, match=r"no case in split 'val'; found test, train. Give split="):
            labelled_cases(manifest, "val")

    def test_case_without_a_label(self, cases, tmp_path):
        write_manifest(tmp_path / "cases.csv", [*cases[:3], replace(cases[3], label=None)])
        with pytest.raises(ManifestError, match="head3"):
            labelled_cases(tmp_path / "cases.csv", "test")

    def test_label_on_another_grid(self, manifest, tmp_path):
        _, label, grid = bleeding_head()
        moved = grid.affine.copy()
        moved[0, 3] += 2
        save_nifti(tmp_path / "labels" / "head4.nii.gz", label, Grid(SHAPE, moved))
        with pytest.raises((ManifestError, GeometryError), match="head4"):
            labelled_cases(manifest, "test")


def batch(
    cases: list[CaseRecord], table: Path, change=lambda case_id, mask: mask, failed: tuple[str, ...] = ()
) -> Path:
    """A finished batch whose masks are the labels, changed."""
    rows = []
    for case in cases:
        if case.case_id in failed:
            rows.append(CaseRow(case.case_id, "failed", error="no", image=case.image))
            continue
        label, _ = read_mask(case.label)
        values = change(case.case_id, label.values.copy())
        file = save_nifti(make(table.parent / "masks") / f"{case.case_id}.nii.gz", values, label.grid)
        report = measure(case.case_id, NativeMask(values, label.grid))
        rows.append(CaseRow(case.case_id, "ok", image=case.image, mask=file, report=report))
    write_tables(table, rows)
    return table


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class TestCompare:
    def test_perfect_masks(self, cases, tmp_path):
        evaluation = compare(cases, batch(cases, tmp_path / "out" / "volumes.csv"))
        assert [row.case_id for row in evaluation.rows] == [case.case_id for case in cases]
        assert all(row.dice == 1 for row in evaluation.rows)
        assert set(evaluation.volumes) == {MODEL, TADA, ABC2}
        assert evaluation.volumes[MODEL].n == 5  # the head without a bleed has no volume to agree on
        metrics = evaluation.metrics()
        assert metrics["volume/model_mae_ml"] == 0
        assert metrics["volume/abc2_mae_ml"] > 0  # ABC/2 of the label is not its volume
        assert all(math.isfinite(value) for value in metrics.values())

    def test_known_errors(self, cases, tmp_path):
        def change(case_id, mask):
            if case_id == "head2":
                mask[:] = 0  # missed
            if case_id == "head3":
                mask[20, 25, 8] = 1  # false alarm: one voxel of 198 mm3
            if case_id == "head4":
                mask[np.nonzero(mask)[0].min()] = 0
            return mask

        evaluation = compare(cases, batch(cases, tmp_path / "out" / "volumes.csv", change))
        rows = {row.case_id: row for row in evaluation.rows}
        assert rows["head2"].dice == 0
        assert rows["head2"].pred_ml == 0
        assert not rows["head3"].positive
        assert rows["head3"].pred_ml == pytest.approx(0.198)
        assert 0.5 < rows["head4"].dice < 1
        errors = [abs(row.pred_ml - row.label_ml) for row in evaluation.rows if row.positive]
        assert evaluation.metrics()["volume/model_mae_ml"] == pytest.approx(np.mean(errors))
        assert evaluation.worst_and_best(1)[0] in ("head2", "head3")
        assert set(evaluation.worst_and_best(4)) == set(rows)

    def test_failed_cases_are_counted(self, cases, tmp_path):
        evaluation = compare(cases, batch(cases, tmp_path / "out" / "volumes.csv", failed=("head0", "head5")))
        assert len(evaluation.rows) == 4
        assert evaluation.summary.n_failed == 2
        assert "2" in write_evaluation(evaluation, tmp_path / "out")

    def test_all_failed(self, cases, tmp_path):
        failed = tuple(case.case_id for case in cases)
        evaluation = compare(cases, batch(cases, tmp_path / "out" / "volumes.csv", failed=failed))
        assert evaluation.rows == []
        assert evaluation.summary.n_failed == 6
        assert evaluation.volumes == {}
        assert all(math.isfinite(value) for value in evaluation.metrics().values())
        write_evaluation(evaluation, tmp_path / "out")

    def test_only_clean_heads(self, cases, tmp_path):
        evaluation = compare(cases[3:4], batch(cases[3:4], tmp_path / "out" / "volumes.csv"))
        assert evaluation.volumes == {}
        assert write_evaluation(evaluation, tmp_path / "out")
        assert not (tmp_path / "out" / "scatter.png").exists()

    def test_case_without_a_row(self, cases, tmp_path):
        table = batch(cases[:4], tmp_path / "out" / "volumes.csv")
        with pytest.raises(ManifestError, match=r"no row for head4 \(2 cases in all\)"):
            compare(cases, table)

    def test_mask_on_another_grid(self, cases, tmp_path):
        table = batch(cases, tmp_path / "out" / "volumes.csv")
        _, label, grid = bleeding_head()
        moved = grid.affine.copy()
        moved[2, 3] += 5
        save_nifti(tmp_path / "out" / "masks" / "head1.nii.gz", label, Grid(SHAPE, moved))
        with pytest.raises(GeometryError, match="head1"):
            compare(cases, table)


class TestNotes:
    """What a reader of the scores must know stands below them."""

    @pytest.fixture
    def table(self, cases, tmp_path) -> Path:
        return batch(cases, tmp_path / "out" / "volumes.csv")

    def probabilities(self, cases, folder: Path) -> Path:
        for case in cases:
            label, _ = read_mask(case.label)
            save_nifti(make(folder) / f"{case.case_id}.nii.gz", label.values * np.uint8(200), label.grid)
        return folder

    def test_nothing_to_say(self, cases, table, tmp_path):
        evaluation = compare(cases, table, probabilities=self.probabilities(cases, tmp_path / "out" / "probabilities"))
        assert evaluation.notes == ()
        assert evaluation.curve.average_precision.value == 1

    def test_a_curve_needs_every_case(self, cases, table, tmp_path):
        write_evaluation(
            compare(cases, table, probabilities=self.probabilities(cases, tmp_path / "out" / "probabilities")),
            tmp_path / "out",
        )
        assert (tmp_path / "out" / "precision_recall.png").is_file()
        (tmp_path / "out" / "probabilities" / "head2.nii.gz").unlink()
        evaluation = compare(cases, table, probabilities=tmp_path / "out" / "probabilities")
        assert evaluation.curve is None
        assert "1 of 6 cases have no probabilities in probabilities/" in write_evaluation(evaluation, tmp_path / "out")
        assert not (tmp_path / "out" / "precision_recall.png").exists()

    def test_probabilities_of_another_grid(self, cases, table, tmp_path):
        folder = self.probabilities(cases, tmp_path / "out" / "probabilities")
        label, _ = read_mask(cases[1].label)
        moved = label.grid.affine.copy()
        moved[1, 3] += 3
        save_nifti(folder / "head1.nii.gz", label.values, Grid(label.grid.shape, moved))
        with pytest.raises(GeometryError, match=r"head1: probabilities/head1.nii.gz is on another grid"):
            compare(cases, table, probabilities=folder)

    def test_labels_with_several_values(self, cases, table):
        label, _ = read_mask(cases[0].label)
        values = label.values * np.uint8(2)
        values[tuple(np.argwhere(values)[0])] = 3
        save_nifti(cases[0].label, values, label.grid)
        assert compare(cases, table).notes[0].startswith("The labels of 1 cases hold several values")
        evaluation = compare(cases, table, subtypes=True)
        assert evaluation.notes == ()
        assert evaluation.scored[0].subtypes == "IPH+IVH"

    def test_subtypes_of_the_manifest(self, cases, table):
        named = [replace(case, extra={"subtype": "SAH"}) for case in cases]
        assert {each.subtypes for each in compare(named, table).scored} == {"SAH"}


def test_files_of_an_evaluation(cases, tmp_path):
    table = batch(cases, tmp_path / "out" / "volumes.csv")
    text = write_evaluation(compare(cases, table), tmp_path / "out")
    written = (tmp_path / "out" / "evaluation.md").read_text()
    assert written.startswith(text)
    assert "by group" not in text
    assert written.count("by group") == 1  # of the model; the rules by group are in agreement.csv
    for name in ("evaluation.csv", "bland_altman.png", "scatter.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    draw_with_labels(cases[:1], table, tmp_path / "out" / "pictures")
    assert (tmp_path / "out" / "pictures" / "head0.png").stat().st_size > 1000
