"""Every rule of docs/input.md for DICOM: read with the right volume, or refused by name without naming a patient."""

import numpy as np
import pydicom
import pytest
from dicom_cases import IDENTIFIERS, INVALID, VALID
from scan_files import BRAIN_ML, brain_ml, grid_points, head_hu

from ich_pipeline.dicom import headers, stack
from ich_pipeline.errors import IchError, ReadError
from ich_pipeline.reading import read_scan

# Flags of cases that are not the plain one; a case that is not here has none but `gantry_tilt`.
FLAGS = {
    "copies_of_files": {"duplicate_slices"},
    "same_pixels_under_another_uid": {"duplicate_slices"},
    "enhanced_in_two_files_with_a_copy": {"duplicate_slices"},
    "phases_with_and_without_contrast": {"split_by_acquisition"},
    "padding_range": {"padding"},
    "two_zones": {"uneven_slices"},
    "two_zones_under_tilt_and_an_overlap": {"uneven_slices"},
}


@pytest.mark.parametrize("name", VALID)
def test_valid_series_have_the_right_volume_in_the_right_place(tmp_path, name):
    VALID[name](tmp_path / "case")
    scan = read_scan(tmp_path / "case")
    assert brain_ml(scan) == pytest.approx(BRAIN_ML, rel=0.01)
    inside = scan.image_hu > -1024
    assert (np.abs(scan.image_hu - head_hu(grid_points(scan.grid))) > 1)[inside].mean() < 1e-3
    assert set(scan.flags) - {"gantry_tilt"} == FLAGS.get(name, set())
    assert scan.series.slices == scan.image_hu.shape[2]
    assert (scan.series.number, scan.series.kernel) == ("2", "STD")


@pytest.mark.parametrize("name", INVALID)
def test_invalid_series_are_refused_without_naming_a_patient(tmp_path, name):
    case, message = INVALID[name]
    case(tmp_path / "case")
    for path in (path for path in (tmp_path / "case").rglob("*") if path.is_file()):
        _add_identifiers(path, keep_patient=name == "two_patients")
    with pytest.raises(ReadError, match=message) as refused:
        read_scan(tmp_path / "case")
    assert str(refused.value).startswith("case: ")
    for value in IDENTIFIERS.values():
        assert not any(part in str(refused.value) for part in value.split("^"))


def _add_identifiers(path, *, keep_patient):
    try:
        dataset = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError:
        return  # wrong on purpose
    if "PixelData" not in dataset:
        return  # cut off on purpose: writing it again would mend it
    for element, value in IDENTIFIERS.items():
        if not (keep_patient and element == "PatientID"):
            setattr(dataset, element, value)
    dataset.save_as(path)


def test_a_series_full_of_identifiers_leaves_none_in_the_scan(tmp_path):
    VALID["tilted"](tmp_path / "case")
    for path in (tmp_path / "case").iterdir():
        _add_identifiers(path, keep_patient=False)
    scan = read_scan(tmp_path / "case")
    said = repr((scan.case_id, scan.flags, scan.series))
    assert not any(part in said for value in IDENTIFIERS.values() for part in value.split("^"))
    assert scan.series.columns().keys() == {"series_uid", "series_number", "series_kernel", "series_slices"}


def test_more_voxels_than_any_head_is_refused_before_pixels_are_read(tmp_path, monkeypatch):
    VALID["tilted"](tmp_path / "case")
    monkeypatch.setattr(stack, "MAX_VOXELS", 14 * 50 * 44 - 1)
    with pytest.raises(ReadError, match="case: 30800 voxels, expected at most 30799"):
        read_scan(tmp_path / "case")


@pytest.mark.parametrize(("limit", "ok"), [(4000, False), (6000, True)])
def test_a_deflated_file_is_measured_before_it_is_unpacked(tmp_path, monkeypatch, limit, ok):
    VALID["deflated"](tmp_path / "case")
    monkeypatch.setattr(headers, "MAX_INFLATED_BYTES", limit)
    if ok:
        read_scan(tmp_path / "case")
    else:
        with pytest.raises(ReadError, match=r"0\.dcm unpacks to more than"):
            read_scan(tmp_path / "case")


@pytest.mark.filterwarnings("ignore")  # pydicom names every odd value
@pytest.mark.parametrize("name", ["enhanced", "legacy_converted", "no_preamble", "bone_kernel_beside"])
def test_damage_to_a_header_is_refused_or_no_matter(tmp_path, name):
    VALID[name](tmp_path / "case")
    path = min((tmp_path / "case").iterdir())
    good = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        content = bytearray(good)
        for position in rng.integers(0, good.index(b"\xe0\x7f\x10\x00"), 3):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            assert brain_ml(read_scan(tmp_path / "case")) == pytest.approx(BRAIN_ML, rel=0.01)
        except IchError:
            refused += 1
    assert 10 < refused < 60
