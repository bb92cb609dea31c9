"""A folder of phantoms: the same bytes from the same seed, nothing overwritten, a manifest that reads back."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ich_pipeline.errors import ConfigError
from ich_pipeline.labels import Subtype
from ich_pipeline.manifest import read_manifest
from ich_pipeline.phantom import PhantomSettings, write_dataset
from ich_pipeline.phantom.dataset import SPLITS, _split_and_fold, is_clean
from ich_pipeline.reading import read_mask, read_scan

TINY = PhantomSettings(matrix=96, slice_mm=(8.0,), tilt_fraction=0.5)
SEED = 3


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """Four cases, the last without hemorrhage."""
    return write_dataset(tmp_path_factory.mktemp("four") / "set", 4, SEED, settings=TINY, jobs=1)


def contents(folder: Path, case_id: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(f"{case_id}*"))}


def test_cases_do_not_depend_on_number_or_processes(four, tmp_path):
    ready: list[str] = []
    two = write_dataset(tmp_path / "two", 2, SEED, settings=TINY, jobs=2, on_case=ready.append)
    assert sorted(ready) == ["phantom_0000", "phantom_0001"]
    for case_id in ready:
        assert len(contents(two.parent, case_id)) == 5
        assert contents(two.parent, case_id) == contents(four.parent, case_id)
    assert two.read_text().splitlines() == four.read_text().splitlines()[:3]


def test_what_is_there_is_kept_and_more_is_added(four):
    image = four.parent / "images" / "phantom_0000.nii.gz"
    before, table = image.stat().st_mtime_ns, four.read_bytes()
    ready: list[str] = []
    write_dataset(four.parent, 4, SEED, settings=TINY, on_case=ready.append)
    assert len(ready) == 4
    assert image.stat().st_mtime_ns == before
    assert four.read_bytes() == table


def test_a_case_cut_off_in_writing_is_made_again(four):
    label = four.parent / "labels" / "phantom_0001.nii.gz"
    whole = label.read_bytes()
    label.write_bytes(b"")
    (four.parent / "truth" / "phantom_0001.json").unlink()  # it is written last, so it is not there either
    write_dataset(four.parent, 4, SEED, settings=TINY, jobs=1)
    assert label.read_bytes() == whole


def test_manifest_reads_back_with_grids_and_tables_agree_with_labels(four):
    records = read_manifest(four, require_label=True, check_grids=True)
    boxes = list(csv.DictReader((four.parent / "boxes.csv").open()))
    for record in records:
        scan, (label, _) = read_scan(record.image), read_mask(record.label)
        assert nib.load(record.image).get_data_dtype() == np.int16
        held = [s.name for s in Subtype if (label.values == s).any()]
        assert record.extra["subtype"] == ("+".join(held) or "none")
        assert {b["subtype"] for b in boxes if b["case_id"] == record.case_id} == set(held)
        assert scan.grid.tilt_deg == pytest.approx(abs(float(record.extra["tilt_deg"])), abs=0.01)
        assert (scan.forms.sform_code, scan.forms.qform_code) == (1, int(scan.grid.tilt_deg < 1e-3))
        brain = read_mask(four.parent / record.extra["brain"])[0].values
        edema = read_mask(record.edema)[0].values
        assert brain[label.values > 0].all()
        assert not (edema & (label.values > 0)).any()
        truth = json.loads((four.parent / "truth" / f"{record.case_id}.json").read_text())
        assert float(record.extra["volume_ml"]) == pytest.approx(sum(truth["volume_ml"].values()), abs=1e-4)
    assert [r.extra["subtype"] == "none" for r in records] == [False, False, False, True]


@pytest.mark.parametrize("change", [{"seed": SEED + 1}, {"settings": replace(TINY, matrix=128)}])
def test_another_set_is_not_written_into(four, change):
    with pytest.raises(ConfigError, match="another"):
        write_dataset(four.parent, 4, **({"seed": SEED, "settings": TINY} | change))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_dataset(tmp_path, 1)


@pytest.mark.parametrize("wrong", [{"cases": 0}, {"cases": 1, "jobs": 0}, {"cases": 1, "seed": -1}])
def test_numbers_that_cannot_be_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="at least"):
        write_dataset(tmp_path / "set", **wrong)


def test_a_real_scan_is_one_patient_in_one_split(four, tmp_path):
    background = read_manifest(four)[3].image
    manifest = write_dataset(
        tmp_path / "bled", 2, 0, settings=replace(TINY, clean_fraction=0.0), background=background, jobs=1
    )
    records = read_manifest(manifest, require_label=True, check_grids=True)
    assert {(r.patient_id, r.split) for r in records} == {("background_phantom_0003", "test")}
    for record in records:
        assert nib.load(record.image).header.get_sform().tolist() == nib.load(background).header.get_sform().tolist()
        assert set(record.extra["subtype"].split("+")) <= {"EDH", "IPH", "SDH"}


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 1.0])
def test_clean_share_is_exact_and_even(fraction):
    clean = [is_clean(i, fraction) for i in range(100)]
    assert sum(clean) == round(100 * fraction)
    assert fraction != 0.25 or all(sum(clean[i : i + 4]) == 1 for i in range(96))


def test_every_split_has_bleeding_and_clean_cases():
    assert [SPLITS.count(s) for s in ("train", "val", "test")] == [6, 1, 3]
    held = {(_split_and_fold(i, 0.25)[0], is_clean(i, 0.25)) for i in range(12)}
    assert held == {(split, clean) for split in ("train", "val", "test") for clean in (True, False)}
    assert {_split_and_fold(i, 0.25)[1] for i in range(24)} == set(range(5))
