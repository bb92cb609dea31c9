"""Tables of cases: what is read, what is refused with its row, and splits that never part a patient."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scan_files import GANTRY_TILT, SHAPE, head_series, nifti_image, save, save_series

from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.manifest import (
    assign_folds,
    read_manifest,
    split_by_patient,
    write_manifest,
)
from ich_pipeline.reading import read_scan
from ich_pipeline.records import CaseRecord
from ich_pipeline.restoring import write_mask


@pytest.fixture
def manifest(tmp_path):
    """Write a manifest beside three empty images and labels, which exist."""
    for name in ("a", "b", "c"):
        for kind in ("img", "lab"):
            (tmp_path / f"{name}_{kind}.nii.gz").touch()

    def write(text, encoding="utf-8"):
        path = tmp_path / "cases.csv"
        path.write_text(text, encoding=encoding)
        return path

    return write


def test_columns_are_read(manifest, tmp_path):
    path = manifest(
        "case_id,patient_id,image,label,split,fold,subtype,Größe\n"
        'A,p1, a_img.nii.gz ,a_lab.nii.gz,train,3,"IPH, IVH",7\n'
        "\n"
        "B,,b_img.nii.gz,,,,,\n",
        encoding="utf-8-sig",
    )
    first, second = read_manifest(path)
    assert first == CaseRecord(
        "A",
        tmp_path / "a_img.nii.gz",
        tmp_path / "a_lab.nii.gz",
        "p1",
        "train",
        3,
        {"subtype": "IPH, IVH", "Größe": "7"},
    )
    assert (second.patient_id, second.label, second.split, second.fold) == ("B", None, "", None)


def test_two_columns_are_enough(manifest):
    assert [record.case_id for record in read_manifest(manifest("image,case_id\na_img.nii.gz,A\n"))] == ["A"]


GOOD = "A,p1,a_img.nii.gz,a_lab.nii.gz,train,0\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD + "A,p2,b_img.nii.gz,,train,0\n", r"row 3: case_id 'A' stands in row 2 already"),
        (GOOD + "B,p1,b_img.nii.gz,,test,0\n", r"row 3: patient 'p1' is in split 'test' here and 'train' in row 2"),
        (GOOD + "B,p1,b_img.nii.gz,,,0\n", r"row 3: patient 'p1' is in split '' here"),
        (GOOD + "B,p2,no.nii.gz,,train,0\n", r"row 3: no\.nii\.gz does not exist \(looked in .*ICH_DATA_ROOT"),
        (GOOD + "B,p2,b_img.nii.gz,no.nii.gz,train,0\n", r"row 3: no\.nii\.gz does not exist"),
        (GOOD + "B,p2,b_img.nii.gz,,valid,0\n", r"row 3: split 'valid', expected train, val, test"),
        (GOOD + "B,p2,b_img.nii.gz,,train,one\n", r"row 3: fold 'one', expected a whole number"),
        (GOOD + "B,p2,b_img.nii.gz,,train,-1\n", r"row 3: fold '-1'"),
        (GOOD + "\n\nB,p2,b_img.nii.gz,,train,1.5\n", r"row 5: fold '1.5'"),
        (GOOD + ",p2,b_img.nii.gz,,train,0\n", r"row 3: case_id ''"),
        (GOOD + "../B,p2,b_img.nii.gz,,train,0\n", r"row 3: case_id '../B', expected a plain file name"),
        (GOOD + ".B,p2,b_img.nii.gz,,train,0\n", r"row 3: case_id '.B'"),
        (GOOD + "B,p2,,,train,0\n", r"row 3: no image for B"),
        (GOOD + "B,p2,b_img.nii.gz\n", r"row 3: 3 cells, expected 6"),
        (GOOD + "B,p2,b_img.nii.gz,,train,0,x\n", r"row 3: 7 cells, expected 6"),
        ("", r"no cases"),
        (",,,,,\n", r"no cases"),
    ],
)
def test_wrong_rows_are_named(manifest, rows, message):
    path = manifest("case_id,patient_id,image,label,split,fold\n" + rows)
    with pytest.raises(ManifestError, match=rf"cases\.csv:? ?{message}"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,patient_id\nA,p\n", "row 1: no column image"),
        ("", "row 1: no column case_id, image"),
        ("case_id,image,image\nA,a_img.nii.gz,b_img.nii.gz\n", "a column name that stands twice"),
    ],
)
def test_wrong_headers_are_named(manifest, text, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(manifest(text))


def test_what_is_no_csv_file(manifest, tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "no.csv")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(manifest("case_id,image\nÄ,a_img.nii.gz\n", encoding="latin-1"))


def test_labels_may_be_required(manifest):
    path = manifest("case_id,image,label\nA,a_img.nii.gz,a_lab.nii.gz\nB,b_img.nii.gz,\n")
    assert len(read_manifest(path)) == 2
    with pytest.raises(ManifestError, match="row 3: no label for B"):
        read_manifest(path, require_label=True)
    with pytest.raises(ManifestError, match="no column label"):
        read_manifest(manifest("case_id,image\nA,a_img.nii.gz\n"), require_label=True)


def test_paths_lie_beside_the_manifest_or_under_a_data_root(manifest, tmp_path, monkeypatch):
    roots = [tmp_path.parent / "data", tmp_path.parent / "more"]
    for root in roots:
        root.mkdir(exist_ok=True)
        (root / f"{root.name}.nii.gz").touch()
    (roots[0] / "a_img.nii.gz").touch()
    path = manifest(f"case_id,image\nA,{tmp_path / 'a_img.nii.gz'}\nB,more.nii.gz\nC,a_img.nii.gz\nD,data.nii.gz\n")
    with pytest.raises(ManifestError, match=r"row 3: more\.nii\.gz does not exist"):
        read_manifest(path)
    monkeypatch.setenv("ICH_DATA_ROOT", os.pathsep.join(map(str, roots)))
    images = [record.image for record in read_manifest(path)]
    beside = tmp_path / "a_img.nii.gz"  # the manifest's own folder comes first
    assert images == [beside, roots[1] / "more.nii.gz", beside, roots[0] / "data.nii.gz"]


@pytest.mark.parametrize(
    "written", ["../secret.nii.gz", "{outside}/secret.nii.gz", "link.nii.gz", "folder/secret.nii.gz"]
)
def test_paths_that_lead_elsewhere_are_refused(manifest, tmp_path, tmp_path_factory, monkeypatch, written):
    outside = tmp_path_factory.mktemp("outside")
    for secret in (outside / "secret.nii.gz", tmp_path.parent / "secret.nii.gz"):
        secret.touch()
    (tmp_path / "link.nii.gz").symlink_to(outside / "secret.nii.gz")
    (tmp_path / "folder").symlink_to(outside)
    path = manifest(f"case_id,image\nA,{written.format(outside=outside)}\n")
    with pytest.raises(ManifestError, match=r"row 2: .* lies outside .*, expected a file inside"):
        read_manifest(path)
    monkeypatch.setenv("ICH_DATA_ROOT", f"{outside}{os.pathsep}{tmp_path.parent}")
    assert read_manifest(path)[0].image.name == "secret.nii.gz"


class TestGrids:
    """A label on another grid than its image, from headers alone."""

    def write(self, tmp_path, matrix):
        save(nifti_image(GANTRY_TILT), tmp_path / "image.nii.gz")
        label = nifti_image(matrix)
        save(label, tmp_path / "label.nii.gz")
        (tmp_path / "m.csv").write_text("case_id,image,label\nA,image.nii.gz,label.nii.gz\nB,image.nii.gz,\n")
        return tmp_path / "m.csv"

    def test_same_grid(self, tmp_path):
        assert len(read_manifest(self.write(tmp_path, GANTRY_TILT), check_grids=True)) == 2

    def test_other_grid(self, tmp_path):
        path = self.write(tmp_path, GANTRY_TILT @ np.diag([1, 1, 1.01]))
        assert len(read_manifest(path)) == 2  # not asked for
        with pytest.raises(ManifestError, match=r"m\.csv row 2: A: label is on another grid than its scan: voxels lie"):
            read_manifest(path, check_grids=True)

    def test_broken_label(self, tmp_path):
        path = self.write(tmp_path, GANTRY_TILT)
        (tmp_path / "label.nii.gz").write_bytes(b"nothing")
        with pytest.raises(ManifestError, match=r"row 2: A: label\.nii\.gz is not a NIfTI file"):
            read_manifest(path, check_grids=True)

    @pytest.mark.parametrize("shift_mm", [0, 1])
    def test_dicom_image(self, tmp_path, shift_mm):
        scan = read_scan(save_series(head_series(15), tmp_path / "series"))
        image = nifti_image(scan.grid.affine[:3, :3], scan.grid.shape)
        affine = scan.grid.affine.copy()
        affine[0, 3] += shift_mm
        image.set_sform(affine, 1)
        save(image, tmp_path / "label.nii.gz")
        (tmp_path / "m.csv").write_text("case_id,image,label\nA,series,label.nii.gz\n")
        if shift_mm:
            with pytest.raises(ManifestError, match="another grid"):
                read_manifest(tmp_path / "m.csv", check_grids=True)
        else:
            assert read_manifest(tmp_path / "m.csv", check_grids=True)[0].image == tmp_path / "series"


def records(n_patients=20, scans_each=2):
    return [
        CaseRecord(f"c{p}_{s}", Path(f"/x/{p}_{s}.nii"), None, f"p{p}")
        for p in range(n_patients)
        for s in range(scans_each)
    ]


def test_written_manifest_reads_back(manifest, tmp_path, monkeypatch):
    manifest("")
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "r.nii").touch()
    monkeypatch.setenv("ICH_DATA_ROOT", str(root))
    written = [
        CaseRecord("A", tmp_path / "a_img.nii.gz", tmp_path / "a_lab.nii.gz", "p1", "train", 0, {"subtype": "IPH"}),
        CaseRecord("B", root / "deep" / "r.nii", None, "p2", "", None, {"subtype": "", "site": 'x, "y"'}),
    ]
    path = tmp_path / "out.csv"
    write_manifest(path, written)
    text = path.read_text()
    assert text.splitlines()[0] == "case_id,patient_id,image,label,split,fold,subtype,site"
    assert "A,p1,a_img.nii.gz,a_lab.nii.gz,train,0,IPH," in text
    assert "B,p2,root/deep/r.nii,,,," in text
    first, second = read_manifest(path)
    assert first == CaseRecord(**{**vars(written[0]), "extra": {"subtype": "IPH", "site": ""}})
    assert second == written[1]
    with pytest.raises(ManifestError, match=r"lies outside .*tables and .*root, expected a file inside"):
        write_manifest(tmp_path / "tables" / "out.csv", written)
    write_manifest(tmp_path / "tables" / "out.csv", written[1:])
    assert ",p2,deep/r.nii,,,," in (tmp_path / "tables" / "out.csv").read_text()


def test_edema_is_a_file(manifest, tmp_path):
    path = manifest("case_id,image,edema\nA,a_img.nii.gz,a_lab.nii.gz\nB,b_img.nii.gz,\n")
    first, second = read_manifest(path)
    assert (first.edema, second.edema, first.extra) == (tmp_path / "a_lab.nii.gz", None, {})
    write_manifest(tmp_path / "again.csv", [first, second])
    assert read_manifest(tmp_path / "again.csv") == [first, second]
    with pytest.raises(ManifestError, match=r"row 2: nowhere\.nii\.gz does not exist"):
        read_manifest(manifest("case_id,image,edema\nA,a_img.nii.gz,nowhere.nii.gz\n"))


FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


class TestSplits:
    """Patients are drawn, not scans."""

    @pytest.mark.parametrize("seed", range(5))
    def test_no_patient_is_parted_and_shares_are_kept(self, seed):
        split = split_by_patient(records(), FRACTIONS, seed)
        by_patient = {}
        for record in split:
            by_patient.setdefault(record.patient_id, set()).add(record.split)
        assert all(len(splits) == 1 for splits in by_patient.values())
        counts = {name: sum(splits == {name} for splits in by_patient.values()) for name in FRACTIONS}
        assert counts == {"train": 14, "val": 2, "test": 4}
        assert [record.case_id for record in split] == [record.case_id for record in records()]

    def test_every_patient_gets_a_split_when_shares_do_not_divide(self):
        for n_patients in range(1, 12):
            split = split_by_patient(records(n_patients), {"train": 1 / 3, "val": 1 / 3, "test": 1 / 3}, 0)
            assert all(record.split for record in split)

    def test_draw_depends_on_the_seed_and_on_nothing_else(self):
        def drawn(of, seed):
            return {record.case_id: record.split for record in split_by_patient(of, FRACTIONS, seed)}

        assert drawn(records(), 1) == drawn(records()[::-1], 1)
        assert drawn(records(), 1) != drawn(records(), 2)
        # Pinned: a split that moves between versions would leak test patients into training.
        split = split_by_patient(records(5, 1), {"train": 0.6, "test": 0.4}, 0)
        assert [record.split for record in split] == ["train", "test", "train", "test", "train"]

    def test_patient_without_id_is_its_case(self):
        split = split_by_patient([CaseRecord(str(n), Path("/x")) for n in range(10)], {"train": 0.5, "test": 0.5}, 0)
        assert sorted(record.split for record in split) == ["test"] * 5 + ["train"] * 5

    @pytest.mark.parametrize("fractions", [{"train": 0.5}, {"train": 1.5, "test": -0.5}, {"trian": 1.0}, {}])
    def test_wrong_shares(self, fractions):
        with pytest.raises(ConfigError, match="expected shares"):
            split_by_patient(records(), fractions, 0)

    def test_folds(self):
        split = split_by_patient(records(23), FRACTIONS, 0)
        folded = assign_folds(split, 5, 0)
        folds = {}
        for record in folded:
            assert (record.fold is None) == (record.split == "test")
            if record.fold is not None:
                folds.setdefault(record.fold, set()).add(record.patient_id)
        assert sorted(folds) == list(range(5))
        assert max(map(len, folds.values())) - min(map(len, folds.values())) <= 1
        assert len(set.union(*folds.values())) == sum(map(len, folds.values()))
        assert folded == assign_folds(split, 5, 0)
        assert folded != assign_folds(split, 5, 1)

    @pytest.mark.parametrize("k", [0, 1, 21])
    def test_wrong_number_of_folds(self, k):
        with pytest.raises(ConfigError, match="for 20 patients, expected 2 to 20"):
            assign_folds(records(), k, 0)


def test_manifests_are_read_without_heavy_libraries(tmp_path):
    heavy = ("torch", "monai", "scipy", "nibabel", "pydicom", "pandas")
    code = f"import sys, ich_pipeline.manifest; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mask_that_was_written_for_a_scan_is_on_its_grid(tmp_path):
    scan = read_scan(save(nifti_image(GANTRY_TILT), tmp_path / "image.nii.gz"))
    write_mask(tmp_path / "label.nii.gz", np.zeros(SHAPE, np.uint8), scan.grid, scan.forms)
    (tmp_path / "m.csv").write_text("case_id,image,label\nA,image.nii.gz,label.nii.gz\n")
    assert read_manifest(tmp_path / "m.csv", check_grids=True)[0].case_id == "A"
