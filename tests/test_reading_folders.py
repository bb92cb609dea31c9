"""What is a scan in a pile of files, and what each case is called."""

import shutil

import nibabel as nib
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian
from scan_files import head_series, nifti_image, save, save_series

from ich_pipeline.errors import ManifestError, ReadError
from ich_pipeline.finding import find_scans
from ich_pipeline.reading import read_scan


@pytest.fixture
def nifti(tmp_path):
    """Write the head to a path below the test's folder."""

    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return save(nifti_image(), path)

    return write


def found(*inputs):
    return [(record.case_id, record.image) for record in find_scans(inputs)]


def test_one_file_whatever_its_name_contains(nifti):
    path = nifti("bundle=x y,z.csv/a=b c.nii.gz")
    assert found(path) == [("a=b c", path)]
    assert found(path.parent) == [("a=b c", path)]


def test_folders_are_searched_and_only_scans_are_listed(tmp_path, nifti):
    first, second = nifti("site/b.nii.gz"), nifti("site/deep/er/a.nii")
    series = save_series(head_series(), tmp_path / "site" / "dicom" / "series 1")
    shutil.copy(series / "0.dcm", series / "DICOMDIR")
    nib.save(nib.Nifti1Pair(nifti_image().dataobj, nifti_image().affine), tmp_path / "site" / "pair.img")
    nifti("site/.hidden/x.nii.gz")
    nifti("site/._b.nii.gz")
    (tmp_path / "site" / "notes.txt").write_text("x")
    assert {path for _, path in found(tmp_path)} == {first, second, series, tmp_path / "site" / "pair.hdr"}
    assert all(read_scan(path).case_id == case_id for case_id, path in found(tmp_path))


def test_order_is_that_of_paths(tmp_path, nifti):
    paths = [nifti(name) for name in ("z/1.nii", "a/2.nii", "m.nii")]
    assert [path for _, path in found(tmp_path)] == sorted(paths)
    assert [path for _, path in found(*paths)] == paths


def test_a_series_in_several_folders_is_one_case(tmp_path):
    datasets = head_series()
    save_series(datasets[:7], tmp_path / "head" / "a")
    save_series(datasets[7:], tmp_path / "head" / "b")
    other = save_series(head_series(), tmp_path / "other")
    assert found(tmp_path) == [("head", tmp_path / "head"), ("other", other)]
    assert read_scan(tmp_path / "head").image_hu.shape[2] == 14


@pytest.mark.parametrize("damage", [lambda content: content[:150], lambda content: content[:500] + b"\xff" * 500])
def test_a_damaged_series_is_still_a_case(tmp_path, damage):
    datasets = head_series()
    datasets[0].file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = save_series(datasets, tmp_path / "x")
    (folder / "0.dcm").write_bytes(damage((folder / "0.dcm").read_bytes()))
    assert found(tmp_path) == [("x", folder)]
    with pytest.raises(ReadError):
        read_scan(folder)


def test_the_same_scan_twice_is_one_case(tmp_path, nifti):
    path = nifti("a.nii.gz")
    assert found(path, tmp_path, path) == [("a", path)]


def test_case_ids_are_made_unique(nifti, tmp_path):
    paths = [nifti(name) for name in ("s1/ct.nii.gz", "s2/ct.nii.gz", "t/s2/ct.nii", "u/ct_s1.nii")]
    assert found(*paths) == [
        ("ct_s1_2", paths[0]),  # ct_s1 is the name of the fourth file
        ("ct_s2", paths[1]),
        ("ct_s2_2", paths[2]),
        ("ct_s1", paths[3]),
    ]


def test_manifest_gives_its_records(tmp_path, nifti):
    nifti("ct.nii.gz")
    manifest = tmp_path / "cases.csv"
    manifest.write_text("case_id,image,split\nalpha,ct.nii.gz,test\n")
    (record,) = find_scans([manifest])
    assert (record.case_id, record.split, record.image) == ("alpha", "test", tmp_path / "ct.nii.gz")
    manifest.write_text("case_id,image\nalpha,no.nii.gz\n")
    with pytest.raises(ManifestError, match="row 2"):
        find_scans([manifest])


def test_nothing_there(tmp_path):
    with pytest.raises(ReadError, match=r"nowhere does not exist"):
        find_scans([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "short").write_bytes(b"")
    with pytest.raises(ReadError, match=r"no NIfTI file, no ZIP file and no DICOM series"):
        find_scans([tmp_path / "empty"])
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ReadError, match="neither NIfTI"):
        find_scans([tmp_path / "x.txt"])


def test_one_dicom_file_is_not_a_scan(tmp_path):
    folder = save_series(head_series(), tmp_path / "x")
    with pytest.raises(ReadError, match="give the folder of the series"):
        read_scan(folder / "0.dcm")


class TestStudies:
    """Folders of one study are one case, so that one series is chosen among all of them."""

    def series(self, study_of=None):
        datasets = head_series()
        for dataset in datasets if study_of else ():
            dataset.StudyInstanceUID = study_of[0].StudyInstanceUID
        return datasets

    def test_series_in_folders_of_their_own(self, tmp_path):
        soft = self.series()
        bone, localizer = self.series(soft), self.series(soft)[:2]
        for dataset in bone:
            dataset.ConvolutionKernel = "H60s"
        for dataset in localizer:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        save_series(localizer, tmp_path / "tree" / "p1" / "SE1")
        save_series(bone, tmp_path / "tree" / "p1" / "SE2")
        save_series(soft, tmp_path / "tree" / "p1" / "SE3")
        save_series(head_series(), tmp_path / "tree" / "p2" / "SE1")
        assert found(tmp_path / "tree") == [("p1", tmp_path / "tree" / "p1"), ("SE1", tmp_path / "tree" / "p2" / "SE1")]
        assert read_scan(tmp_path / "tree" / "p1").series.uid == soft[0].SeriesInstanceUID

    def test_folders_of_two_studies_side_by_side_are_cases_of_their_own(self, tmp_path):
        first = self.series()
        save_series(first, tmp_path / "x" / "a")
        save_series(self.series(first), tmp_path / "x" / "b")
        save_series(self.series(), tmp_path / "x" / "c")
        assert [case_id for case_id, _ in found(tmp_path / "x")] == ["a", "b", "c"]


class TestLinks:
    """What lies outside the folder that was given is not read."""

    @pytest.fixture
    def outside(self, tmp_path, nifti):
        nifti("outside/secret.nii.gz")
        return save_series(head_series(), tmp_path / "outside" / "series")

    @pytest.mark.parametrize("target", ["secret.nii.gz", "series", "series/0.dcm", "nowhere"])
    def test_a_link_out_of_the_folder_is_refused(self, tmp_path, outside, target):
        inside = save_series(head_series(), tmp_path / "inside")
        (inside / "link").symlink_to(tmp_path / "outside" / target)
        with pytest.raises(ReadError, match="link is a link that leads out of inside"):
            find_scans([inside])
        with pytest.raises(ReadError, match="inside: link is a link that leads out of inside"):
            read_scan(inside)

    def test_links_inside_the_folder_change_nothing(self, tmp_path):
        inside = save_series(head_series(), tmp_path / "inside" / "series").parent
        (inside / "folder").symlink_to("series")
        (inside / "loop").symlink_to("loop")
        assert found(inside) == [("series", inside / "series")]
        assert read_scan(inside).flags == ()

    def test_a_folder_that_is_given_may_be_a_link(self, tmp_path, outside):
        (tmp_path / "link").symlink_to(outside)
        assert found(tmp_path / "link") == [("series", outside)]
        assert read_scan(tmp_path / "link").case_id == "series"
