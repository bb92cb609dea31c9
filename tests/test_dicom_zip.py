"""ZIP files of DICOM: one input, read without ever trusting what the archive says."""

import shutil
import stat
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_cases import INVALID, VALID
from scan_files import BRAIN_ML, brain_ml, head_series, save_series

from ich_pipeline.dicom import archive, series_grid
from ich_pipeline.errors import ReadError
from ich_pipeline.finding import find_scans
from ich_pipeline.reading import read_scan


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_series(head_series(12), tmp_path / "files")


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch) -> Path:
    """Where ZIP files are unpacked; empty again after every test."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


def packed(folder: Path, to: Path, names=lambda name: f"study/series/{name}", method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(to, "w", method) as target:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target.write(path, names(path.name))
    return to


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_like_its_folder(tmp_path, folder, method):
    path = packed(folder, tmp_path / "head 1.ZIP", method=method)
    scan, expected = read_scan(path), read_scan(folder)
    assert (scan.case_id, scan.source, scan.series) == ("head 1", path, expected.series)
    np.testing.assert_array_equal(scan.image_hu, expected.image_hu)
    np.testing.assert_array_equal(scan.grid.affine, expected.grid.affine)
    np.testing.assert_array_equal(series_grid(path, "x").affine, expected.grid.affine)


def test_a_zip_is_one_case_wherever_it_lies(tmp_path, folder):
    (tmp_path / "scans").mkdir()
    path = packed(folder, tmp_path / "scans" / "a.zip")
    for given in (path, tmp_path / "scans"):
        (record,) = find_scans([given])
        assert (record.case_id, record.image) == ("a", path)


@pytest.mark.parametrize("name", ["what_is_no_slice", "enhanced", "no_preamble", "JPEG 2000 .90 signed"])
def test_any_series_may_come_as_zip(tmp_path, name):
    VALID[name](tmp_path / "files")
    scan = read_scan(packed(tmp_path / "files", tmp_path / "x.zip"))
    assert brain_ml(scan) == pytest.approx(BRAIN_ML, rel=0.01)


def test_refusals_name_a_member_by_its_number(tmp_path):
    case, _ = INVALID["cut_off_pixels"]
    case(tmp_path / "files")
    path = packed(tmp_path / "files", tmp_path / "x.zip", names=lambda name: f"DOE^JANE/{name}")
    with pytest.raises(ReadError, match=r"x: pixels of member_6\.dcm cannot be decoded") as refused:
        read_scan(path)
    assert "DOE" not in str(refused.value)


@pytest.mark.parametrize(
    "names",
    [
        lambda name: f"../../{name}",
        lambda name: f"/tmp/ich_escape/{name}",
        lambda name: f"..\\..\\{name}",
        lambda name: f"C:\\{name}",
        lambda name: f"{'a/' * 400}{name}",
        lambda name: f"line\nbreak {name}",
    ],
)
def test_names_lead_nowhere(tmp_path, folder, names):
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    path = packed(folder, deep / "x.zip", names=names)
    before = set(tmp_path.rglob("*"))
    assert brain_ml(read_scan(path)) == pytest.approx(BRAIN_ML, rel=0.01)
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/ich_escape").exists()


def test_members_of_one_name_are_all_read(tmp_path, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns when it packs them
        path = packed(folder, tmp_path / "x.zip", names=lambda name: "slice")
    assert read_scan(path).image_hu.shape[2] == 14


def test_links_folders_hidden_and_other_files_are_passed_over(tmp_path, folder):
    path = packed(folder, tmp_path / "x.zip")
    inner = path.read_bytes()
    secret = tmp_path / "secret.dcm"
    shutil.copy(folder / "0.dcm", secret)
    with zipfile.ZipFile(path, "a") as target:
        link = zipfile.ZipInfo("study/link.dcm")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        target.writestr(link, str(secret))
        target.writestr("__MACOSX/study/._0.dcm", b"resource fork")
        target.writestr("study/.DS_Store", b"x")
        target.writestr("study/README", b"x")
        target.writestr("study/empty/", b"")
        target.writestr("study/inner.zip", inner)
    assert read_scan(path).flags == ("gantry_tilt",)


def test_nothing_but_a_zip_inside(tmp_path, folder):
    inner = packed(folder, tmp_path / "inner.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as target:
        target.write(inner, "inner.zip")
    with pytest.raises(ReadError, match="holds no DICOM file in 1 members, 1 of them ZIP files, which are not opened"):
        read_scan(tmp_path / "x.zip")


def test_encrypted(tmp_path, folder):
    path = packed(folder, tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match=r"x\.zip is encrypted, expected no password"):
        read_scan(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"PK" + bytes(1000),
        lambda content: content[:9000] + bytes([content[9000] ^ 0xFF]) + content[9001:],
        lambda content: content.replace(b"PK\x03\x04", b"PK\x00\x00"),
    ],
    ids=["cut off", "empty", "no ZIP", "one byte", "no members"],
)
def test_broken(tmp_path, folder, damage):
    path = packed(folder, tmp_path / "x.zip")
    path.write_bytes(damage(path.read_bytes()))
    assert [record.image for record in find_scans([path])] == [path]
    with pytest.raises(ReadError, match=r"x\.zip cannot be read as ZIP"):
        read_scan(path)


def test_too_many_members(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 13)
    with pytest.raises(ReadError, match="holds 14 members, expected at most 13"):
        read_scan(packed(folder, tmp_path / "x.zip"))


def test_too_much_by_its_own_account(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 14 * 5000)
    with pytest.raises(ReadError, match=r"holds \d+ bytes unpacked, expected at most 70000"):
        read_scan(packed(folder, tmp_path / "x.zip"))


def test_too_much_in_spite_of_its_own_account(folder, tmp_path, monkeypatch):
    """Sizes in the directory are a claim; what comes out is counted."""
    path = packed(folder, tmp_path / "x.zip")
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 14 * 5000)
    counted = archive._require_at_most

    def believing(what, unit, found, limit):
        if (unit, limit) != ("bytes unpacked", 14 * 5000):  # all but the first member's and the directory's
            counted(what, unit, found, limit)

    monkeypatch.setattr(archive, "_require_at_most", believing)
    with pytest.raises(ReadError, match="bytes unpacked, expected at most"):
        read_scan(path)


def test_bomb(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 2**24)
    path = packed(folder, tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as target:
        target.writestr("bomb.dcm", bytes(2**25))
    assert path.stat().st_size < 2**20
    with pytest.raises(ReadError, match="bytes unpacked"):
        read_scan(path)
