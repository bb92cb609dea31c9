"""The weights that ship: small, checked, used where no bundle is named, and known for what they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import TINY, write_cases

from ich_pipeline import bundles, cli
from ich_pipeline.bundles import Bundle
from ich_pipeline.inference import Segmenter
from ich_pipeline.phantom import PhantomSettings, write_dataset
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import read_rows
from ich_pipeline.settings import DEFAULT_BUNDLE, Settings
from ich_pipeline.training import UNCALIBRATED, prepare_run

LARGEST_BYTES = 25_000_000


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean scan and one with a large clot."""
    folder = tmp_path_factory.mktemp("phantoms")
    settings = PhantomSettings(
        clean_fraction=0.5,
        subtype_weights={"IPH": 1.0},
        kinds_probability=(1.0,),
        volume_ml=(30.0, 60.0),
        matrix=256,
        slice_mm=(5.0,),
        cut_fraction=0.0,
    )
    return write_dataset(folder, 2, seed=4, settings=settings, jobs=1).parent


def test_weights_are_small_and_say_where_they_come_from() -> None:
    bundle = bundles.find_bundle(DEFAULT_BUNDLE)
    assert bundle.weights
    assert bundle.weights.stat().st_size <= LARGEST_BYTES
    state = torch.load(bundle.weights, map_location="cpu", weights_only=True)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    metadata = bundle.metadata
    assert metadata["trained_on_phantoms"] is True
    assert metadata["trained_slice_mm"] == [0.6, 8.0]
    assert metadata["operating_points"].keys() == {"volume", "few_false_alarms"}
    config = bundle.config("inference")
    assert config["threshold"] == metadata["operating_points"]["few_false_alarms"]["threshold"]
    assert config["min_lesion_peak"] == metadata["operating_points"]["few_false_alarms"]["min_lesion_peak"]
    assert config["min_lesion_ml"] == metadata["operating_points"]["few_false_alarms"]["min_lesion_ml"]
    assert config["temperature"] == metadata["calibration"]["temperature"]


def test_a_scan_is_measured_without_naming_a_bundle(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["volume", str(phantoms / "images"), "--out", str(tmp_path / "volumes.csv"), "pictures=false"])
    assert end.value.code == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "synthetic" in line]
    assert len(said) == 1
    assert "research use only" in said[0]
    rows = {row.case_id: row for row in read_rows(tmp_path / "volumes.csv")}
    assert {row.bundle for row in rows.values()} == {DEFAULT_BUNDLE}
    assert all("phantom_weights" in row.flags for row in rows.values())
    truth = {p.stem: json.loads(p.read_text()) for p in (phantoms / "truth").glob("*.json")}
    for case_id, row in rows.items():
        assert row.report
        held_ml = sum(truth[case_id]["label_volume_ml"].values())
        assert row.report.volume_ml == pytest.approx(held_ml, rel=0.5, abs=2.0)
    assert json.loads((tmp_path / "run.json").read_text())["bundle"]["sha256"] == rows["phantom_0000"].weights_sha256


def test_training_it_anew_takes_the_preset_of_the_machine_and_none_of_its_weights() -> None:
    bundle = bundles.find_bundle(DEFAULT_BUNDLE)
    settings = Settings.of([f"bundle={DEFAULT_BUNDLE}"])
    trained = settings.config(bundle, "train", "inference")["inference"]["filters"]
    used = settings.config(bundle, "inference")["inference"]["filters"]
    presets = bundle.overlays("presets")
    assert trained in [bundles.read_yaml(presets[name])["filters"] for name in ("cpu", "gpu")]
    assert used == bundle.config("inference")["filters"]


def test_a_network_trained_anew_is_cut_at_one_half_until_it_is_calibrated(tmp_path: Path) -> None:
    manifest = write_cases(tmp_path / "cases")
    settings = Settings.of([f"bundle={DEFAULT_BUNDLE}", f"data={manifest}", *TINY, "tracking=false"])
    prepare_run(bundles.find_bundle(DEFAULT_BUNDLE), settings, tmp_path / "run", resume=False)
    bundle = Bundle(tmp_path / "run" / "bundle")
    inference, train = bundle.config("inference"), bundle.config("train")
    assert {key: inference[key] for key in UNCALIBRATED} == UNCALIBRATED
    assert UNCALIBRATED == {"temperature": 1.0, "threshold": 0.5, "min_lesion_peak": 0.0, "min_lesion_ml": 0.0}
    assert train["threshold"] == 0.5
    assert not {"calibration", "operating_points", "trained"} & bundle.metadata.keys()
    assert bundle.weights is None


@pytest.mark.realdata
@pytest.mark.slow
def test_a_clean_living_head_is_not_full_of_blood(real_data: Path) -> None:
    """The GE head, which no weights have seen; the card says what is called hemorrhage there."""
    bundle = bundles.find_bundle(DEFAULT_BUNDLE)
    segmenter = Segmenter(bundle, bundle.config("inference"))
    prediction = segmenter.segment(segmenter.read(CaseRecord("ge", real_data / "ge_head_dicom")))
    assert np.isfinite(prediction.probability).all()
    assert prediction.mask.grid.foreground_ml(prediction.mask.values) < 1
