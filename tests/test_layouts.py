"""Downloads become cases: small made-up trees of the layouts that docs/data.md describes."""

import json

import pytest
from scan_files import head_series, save_series

from ich_pipeline import cli
from ich_pipeline.detection import Box, boxes_of_mask, read_boxes
from ich_pipeline.dicom import read_series
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.geometry import Grid
from ich_pipeline.layouts import LAYOUTS, boxes_of_bhx, index_folder
from ich_pipeline.manifest import read_manifest, write_manifest
from ich_pipeline.reading import read_scan
from ich_pipeline.records import CaseRecord, NativeMask


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


class TestPlainLayouts:
    @pytest.mark.parametrize("labels", ["labels", "masks"])
    def test_folders(self, tmp_path, labels):
        touch(tmp_path, "images/b.nii.gz", "images/a.nii", "images/._a.nii", "images/x.txt", f"{labels}/b.nii.gz")
        first, second = index_folder(tmp_path, "folders")
        assert first == CaseRecord("a", tmp_path / "images" / "a.nii", None, "a")
        assert second == CaseRecord("b", tmp_path / "images" / "b.nii.gz", tmp_path / labels / "b.nii.gz", "b")
        write_manifest(tmp_path / "m.csv", [first, second])
        assert read_manifest(tmp_path / "m.csv") == [first, second]

    def test_nnunet(self, tmp_path):
        touch(tmp_path, "imagesTr/h_1_0000.nii.gz", "labelsTr/h_1.nii.gz", "imagesTs/h_2_0000.nii.gz")
        train, test = index_folder(tmp_path, "nnunet")
        assert train == CaseRecord(
            "h_1", tmp_path / "imagesTr/h_1_0000.nii.gz", tmp_path / "labelsTr/h_1.nii.gz", "h_1", "train"
        )
        assert test == CaseRecord("h_2", tmp_path / "imagesTs/h_2_0000.nii.gz", None, "h_2", "test")

    @pytest.mark.parametrize(
        ("dataset", "names", "message"),
        [
            ("folders", ["a.nii"], "expected a folder images"),
            ("folders", ["images/a.nii", "labels/a.nii", "masks/a.nii"], "one of labels or masks"),
            ("folders", ["images/a.nii", "labels/b.nii"], "1 labels have no image, such as b"),
            ("folders", ["images/a.nii", "images/a.nii.gz"], r"both a\.nii and a\.nii\.gz"),
            ("folders", ["images/a.txt"], "no scan found"),
            ("nnunet", ["images/a.nii"], "no scan found"),
            ("nnunet", ["imagesTr/a_0001.nii"], "expected CASE_0000"),
            ("nnunet", ["imagesTr/a.nii"], "expected CASE_0000"),
            ("nnunet", ["imagesTr/a_0000.nii"], "1 training images have no label, such as a"),
        ],
    )
    def test_folder_of_another_shape(self, tmp_path, dataset, names, message):
        touch(tmp_path, *names)
        with pytest.raises(ManifestError, match=message):
            index_folder(tmp_path, dataset)

    def test_unknown_layout(self, tmp_path):
        with pytest.raises(ConfigError, match="no dataset layout 'nnUnet'; did you mean 'nnunet'"):
            index_folder(tmp_path, "nnUnet")
        with pytest.raises(ConfigError, match=" or ".join(map(repr, LAYOUTS))):
            index_folder(tmp_path, "zzz")


class TestPublicDataSets:
    def test_instance22(self, tmp_path):
        touch(tmp_path, *(f"train_2/{part}/00{n}.nii.gz" for part in ("data", "label") for n in (1, 2)))
        touch(tmp_path, "evaluation/001.nii.gz")
        first, second, held_out = index_folder(tmp_path, "instance22")
        data, label = tmp_path / "train_2/data/001.nii.gz", tmp_path / "train_2/label/001.nii.gz"
        assert first == CaseRecord("001", data, label, "001", "train")
        assert second.case_id == "002"
        image = tmp_path / "evaluation/001.nii.gz"
        assert held_out == CaseRecord("evaluation_001", image, None, "evaluation_001", "test")
        (tmp_path / "train_2").rename(tmp_path / "train")  # as the description of the data calls it
        assert [r.case_id for r in index_folder(tmp_path, "instance22")] == ["001", "002", "evaluation_001"]

    def bhsd(self, root):
        names = ("ID_aa_ID_1", "ID_aa_ID_2", "ID_bb_ID_3")
        touch(root, *(f"label_192/{part}/{name}.nii.gz" for part in ("images", "ground truths") for name in names))
        return names

    def test_bhsd(self, tmp_path):
        names = self.bhsd(tmp_path)
        records = index_folder(tmp_path, "bhsd")
        assert [(r.case_id, r.patient_id, r.split) for r in records] == list(
            zip(names, ("ID_aa", "ID_aa", "ID_bb"), ("", "", ""), strict=True)
        )
        assert records[2].label == tmp_path / "label_192/ground truths/ID_bb_ID_3.nii.gz"
        assert index_folder(tmp_path / "label_192", "bhsd") == records

    def test_bhsd_with_its_split(self, tmp_path):
        self.bhsd(tmp_path)
        listed = {
            "training": [{"image": f"./imagesTr/ID_aa_ID_{n}.nii.gz", "label": "x"} for n in (1, 2)],
            "test": ["./imagesTs/ID_bb_ID_3.nii.gz"],
        }
        (tmp_path / "dataset.json").write_text(json.dumps(listed))
        assert [r.split for r in index_folder(tmp_path, "bhsd")] == ["train", "train", "test"]
        listed["test"] = []
        (tmp_path / "dataset.json").write_text(json.dumps(listed))
        with pytest.raises(ManifestError, match=r"1 images are not listed, such as ID_bb_ID_3\.nii\.gz"):
            index_folder(tmp_path, "bhsd")

    TABLE = "PatientNumber,SliceNumber,Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural,No_Hemorrhage\n"

    def test_ct_ich(self, tmp_path):
        touch(tmp_path, *(f"{part}/{n}.nii" for part in ("ct_scans", "masks") for n in ("049", "050")))
        table = tmp_path / "hemorrhage_diagnosis_raw_ct.csv"
        table.write_text(
            self.TABLE + "49,1,0,0,0,0,0,1\n49,2,0,1,0,0,0,0\n49,3,0,1,0,1,0,0\n50,1,0,0,0,0,0,1\n,,,,,,,\n"
        )
        first, second = index_folder(tmp_path, "ct-ich")
        assert (first.case_id, first.patient_id, first.extra) == ("049", "049", {"subtype": "EDH+IPH"})
        assert first.label == tmp_path / "masks" / "049.nii"
        assert second.extra == {"subtype": "none"}
        table.write_text(self.TABLE + "49,1,0,0,0,0,0,1\n")
        with pytest.raises(ManifestError, match="no row for scan 050"):
            index_folder(tmp_path, "ct-ich")
        table.write_text("PatientNumber,SliceNumber\n")
        with pytest.raises(ManifestError, match="no column Epidural, Intraparenchymal"):
            index_folder(tmp_path, "ct-ich")

    def test_ct_ich_before_it_was_in_hounsfield_units(self, tmp_path):
        touch(tmp_path, "Patients_CT/049/brain/1.jpg")
        with pytest.raises(
            ManifestError, match=r"JPEG pictures .* expected ct_scans in Hounsfield units\. Get version 1\.3\.1"
        ):
            index_folder(tmp_path, "ct-ich")

    def test_hemseg(self, tmp_path):
        touch(
            tmp_path, *(f"{split}/{part}/{split}1.nii.gz" for split in ("train", "val") for part in ("image", "label"))
        )
        train, val = index_folder(tmp_path, "hemseg")
        label = tmp_path / "train/label/train1.nii.gz"
        assert train == CaseRecord("train1", tmp_path / "train/image/train1.nii.gz", label, "train1", "train")
        assert (val.case_id, val.split) == ("val1", "val")

    @pytest.mark.parametrize(
        ("dataset", "names", "message"),
        [
            ("instance22", ["a.nii"], "expected train_2/data and train_2/label"),
            ("instance22", ["train_2/data/001.nii.gz", "train_2/label/x.txt"], "1 images have no label, such as 001"),
            ("bhsd", ["images/a.nii.gz"], "expected label_192/images and label_192/ground truths"),
            ("bhsd", ["images/a.nii.gz", "ground truths/b.nii.gz"], "1 labels have no image, such as b"),
            ("ct-ich", ["ct_scans/049.nii"], "1 images have no label, such as 049"),
            ("ct-ich", ["ct_scans/049.nii", "masks/049.nii"], "hemorrhage_diagnosis_raw_ct.csv: no such table"),
            ("ct-ich", ["a.txt"], "no scan found"),
            ("hemseg", ["train/label/a.nii.gz"], "1 labels have no image, such as a"),  # as its zip comes
            ("hemseg", ["val/image/a.nii.gz"], "1 images have no label, such as a"),
            ("cq500", ["CT Plain/CT000000.dcm"], "DICOM files outside a folder of one patient"),
            ("cq500", ["a.txt"], "no scan found"),
        ],
    )
    def test_incomplete_downloads(self, tmp_path, dataset, names, message):
        touch(tmp_path, *names)
        with pytest.raises(ManifestError, match=message):
            index_folder(tmp_path, dataset)


class TestCQ500:
    @pytest.fixture
    def root(self, tmp_path):
        """Two series of one patient and one of another; files lie against the order of positions."""
        self.series = head_series()
        for n, dataset in enumerate(reversed(self.series)):
            dataset.filename = f"CT{n:06}.dcm"
        folder = tmp_path / "CQ500CT0 CQ500CT0" / "Unknown Study"
        save_series(self.series, folder / "CT 5mm Plain")
        save_series(head_series(), folder / "CT THIN")
        save_series(head_series(), tmp_path / "CQ500CT12 CQ500CT12" / "Unknown Study" / "CT 5mm Plain")
        return tmp_path

    def row(self, k, name, x, y, width, height, series=None):
        place = {"x": x, "y": y, "width": width, "height": height}
        uid = self.series[k].SOPInstanceUID if series is None else "1.2.3"
        return f'0,{uid},{series or self.series[0].SeriesInstanceUID},study,"{place}",{name},bbox\n'

    HEADER = ",SOPInstanceUID,SeriesInstanceUID,StudyInstanceUID,data,labelName,labelType\n"

    def test_every_series_is_a_case(self, root):
        records = index_folder(root, "cq500")
        assert [(r.case_id, r.patient_id) for r in records] == [
            ("CQ500CT0_CT-5mm-Plain", "CQ500CT0"),
            ("CQ500CT0_CT-THIN", "CQ500CT0"),
            ("CQ500CT12_CT-5mm-Plain", "CQ500CT12"),
        ]
        assert records[0].image == root / "CQ500CT0 CQ500CT0" / "Unknown Study" / "CT 5mm Plain"
        write_manifest(root / "m.csv", records)
        kept = read_manifest(root / "m.csv")
        assert [r.image for r in kept] == [r.image for r in records]
        assert read_scan(kept[0].image, kept[0].case_id, kept[0].series).series.slices == len(self.series)

    def test_boxes_lie_where_the_series_is_read(self, root):
        """A box drawn around the made-up bleed in pixels of one DICOM file encloses it in what `read_series` gives."""
        records = index_folder(root, "cq500")
        series = read_series(records[0].image, "a")
        bleed = series.image_hu == 65
        grid = Grid(bleed.shape, series.grid.affine)
        wanted = boxes_of_mask(records[0].case_id, NativeMask(bleed.astype("uint8"), grid))
        table = root / "1_Initial_Manual_Labeling.csv"
        lines = [self.HEADER]
        for box in wanted:
            # Columns of a DICOM picture are x, its rows y; datasets are drawn in the order of positions.
            stored = self.series[box.slice].pixel_array - 1024
            rows, columns = (stored == 65).any(axis=1).nonzero()[0], (stored == 65).any(axis=0).nonzero()[0]
            place = (float(columns[0]), float(rows[0]), float(len(columns)), float(len(rows)))
            lines.append(self.row(box.slice, "Intraparenchymal", *place))
        lines.append(self.row(0, "Epidural", 1, 1, 2, 2, series="9.9"))  # of a series that was not downloaded
        table.write_text("".join(lines))
        found = boxes_of_bhx(table, records)
        assert len(found) > 1
        assert found == [Box(b.case_id, b.slice, "IPH", b.i0, b.j0, b.i1, b.j1) for b in wanted]

    def test_by_the_command(self, root, capsys):
        table = root / "boxes of BHX.csv"
        table.write_text(self.HEADER + self.row(3, "Chronic", 10.5, 4, 6, 7))
        with pytest.raises(SystemExit) as end:
            cli.main(["data", "index", str(root), "--dataset", "cq500", "--boxes", str(table)])
        assert end.value.code == 0
        assert capsys.readouterr().out.split() == [str(root / "manifest.csv"), str(root / "boxes.csv")]
        [box] = read_boxes(root / "boxes.csv")
        corners = (box.i0, box.j0, box.i1, box.j1)
        assert (box.case_id, box.slice, box.subtype, corners) == (
            "CQ500CT0_CT-5mm-Plain",
            3,
            "SDH",
            (10.5, 4, 16.5, 11),
        )

    def test_boxes_of_another_data_set(self, root, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main(["data", "index", str(root), "--dataset", "bhsd", "--boxes", "a.csv"])
        assert end.value.code == 2
        assert "BHX's boxes belong to cq500" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text.replace("Epidural", "Bruise"), "row 2: 'Bruise'"),
            (lambda text: text.replace("'width'", "'w'"), "x, y, width and height"),
            (lambda text: text.replace("{'x'", "{"), "x, y, width and height"),
            (lambda text: text.replace("labelName", "label"), "no column labelName"),
            (lambda text: text.replace(",1.2.", ",2.2."), "none of its 1 boxes lies in a slice of the 3 series"),
        ],
    )
    def test_tables_that_are_not_bhx(self, root, change, message):
        table = root / "t.csv"
        table.write_text(change(self.HEADER + self.row(3, "Epidural", 1, 2, 3, 4)))
        with pytest.raises(ManifestError, match=message):
            boxes_of_bhx(table, index_folder(root, "cq500"))


def test_a_held_out_set_leaves_folds_to_validate_on(tmp_path, capsys):
    names = [f"{n:03}" for n in range(1, 8)]
    touch(
        tmp_path, *(f"train_2/{part}/{n}.nii.gz" for part in ("data", "label") for n in names), "evaluation/001.nii.gz"
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "index", str(tmp_path), "--dataset", "instance22"])
    assert end.value.code == 0
    records = read_manifest(tmp_path / "manifest.csv")
    assert {r.fold for r in records if r.split == "train"} == set(range(5))
    assert [r.fold for r in records if r.split == "test"] == [None]
