"""Several bundles as one: mean probability on the scan's grid, where they disagree, and what each of them says."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from heads import oracle_bundle, write_heads

from ich_pipeline import cli
from ich_pipeline.bundles import Bundle, resolve
from ich_pipeline.ensemble import Ensemble, joined_sha256
from ich_pipeline.errors import ConfigError
from ich_pipeline.finding import find_scans
from ich_pipeline.inference import Segmenter
from ich_pipeline.reading import read_mask
from ich_pipeline.volumetry import measure


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Path, Path, Path]:
    """One that sees blood, one with another model grid, and one whose window shows it none; all cut at 0.4."""
    folder = tmp_path_factory.mktemp("bundles")
    return (
        oracle_bundle(folder / "sees", threshold=0.4),
        oracle_bundle(folder / "coarse", threshold=0.4, spacing_mm=[11.0, 3.0, 3.0]),
        oracle_bundle(folder / "blind", threshold=0.4, window_hu=[-5.0, 300.0]),
    )


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    write_heads(folder, 2)
    return folder


def segmenter(path: Path) -> Segmenter:
    return Segmenter(Bundle(path), resolve(Bundle(path), ["inference"], {}, None)["inference"])


def segment(scans: Path, out: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as exited:
        cli.main(["segment", str(scans), "--out", str(out), "pictures=false", "html=false", *words])
    return int(exited.value.code or 0)


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as stream:
        return list(csv.DictReader(stream))


class TestMean:
    def test_probabilities_meet_on_the_native_grid(self, bundles, scans):
        members = [segmenter(path) for path in bundles]
        case = find_scans([scans])[0]
        alone = [member.segment(member.read(case)) for member in members]
        together = Ensemble(members)
        found = together.segment(together.read(case))
        each = np.stack([prediction.probability for prediction in alone])
        assert found.probability == pytest.approx(each.mean(axis=0), abs=1e-6)
        assert found.spread == pytest.approx(each.std(axis=0), abs=1e-3)
        assert np.array_equal(found.mask.values, each.mean(axis=0) >= 0.4)
        assert found.member_ml == pytest.approx([measure("c", prediction.mask).volume_ml for prediction in alone])
        assert found.member_ml[0] > found.member_ml[2] == 0
        # Two of three see the bleed: 2/3 in its middle, and a spread of sqrt(2)/3.
        assert found.probability.max() == pytest.approx(2 / 3, abs=1e-3)
        assert found.spread.max() == pytest.approx(np.sqrt(2) / 3, abs=0.05)

    def test_two_that_are_the_same_are_one(self, bundles, scans):
        one = segmenter(bundles[0])
        case = find_scans([scans])[0]
        expected, found = one.segment(one.read(case)), Ensemble([one, one])
        twice = found.segment(found.read(case))
        assert np.array_equal(twice.mask.values, expected.mask.values)
        assert twice.spread.max() < 1e-3

    def test_hashes(self, bundles):
        first, second = Bundle(bundles[0]), Bundle(bundles[1])
        assert joined_sha256([first]) == first.metadata["weights_sha256"]
        assert joined_sha256([first, second]) not in (None, joined_sha256([first]))


@pytest.fixture(scope="module")
def done(bundles, scans, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "both"
    assert segment(scans, out, f"bundle={bundles[0]},{bundles[2]}") == 0
    return out


class TestCommand:
    def test_row_and_band(self, done, bundles, scans, tmp_path):
        assert segment(scans, tmp_path / "alone", f"bundle={bundles[0]}") == 0
        for row, alone in zip(rows(done / "volumes.csv"), rows(tmp_path / "alone" / "volumes.csv"), strict=True):
            assert row["bundle"] == "cascade3d+cascade3d"
            assert row["band"] == "ensemble"
            assert (float(row["volume_low_ml"]), row["volume_high_ml"]) == (0.0, alone["volume_ml"])
            # Half of 1 is above 0.4, so the mask is the one of the bundle that sees.
            assert 0 < float(row["volume_ml"]) <= float(alone["volume_ml"])

    def test_uncertainty_is_on_the_grid_of_the_mask(self, done):
        mask, forms = read_mask(done / "head0.nii.gz")
        spread, forms_of_spread = read_mask(done / "uncertainty" / "head0.nii.gz")
        assert np.array_equal(spread.grid.affine, mask.grid.affine)
        assert forms_of_spread.sform_code == forms.sform_code
        assert spread.values.max() in (127, 128)
        assert (spread.values[mask.values > 0] > 90).all()

    def test_record_and_resuming(self, done, bundles, scans, capsys):
        report = json.loads((done / "run.json").read_text())
        assert [each["name"] for each in report["bundle"]["members"]] == ["cascade3d", "cascade3d"]
        assert len(report["config"]["inference"]) == 2
        before = (done / "head0.nii.gz").stat().st_mtime_ns
        assert segment(scans, done, f"bundle={bundles[0]},{bundles[2]}") == 0
        assert (done / "head0.nii.gz").stat().st_mtime_ns == before
        assert segment(scans, done, f"bundle={bundles[0]}") == 2
        assert "other settings or weights" in capsys.readouterr().err

    def test_a_key_that_one_of_them_lacks(self, bundles, scans, tmp_path, capsys):
        assert segment(scans, tmp_path, f"bundle={bundles[0]},hu_threshold", "coarse_threshold=0.2") == 2
        assert "hu_threshold has no key 'coarse_threshold'" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_with_a_bundle_of_another_form(self, bundles, scans, tmp_path):
        assert segment(scans, tmp_path, f"bundle={bundles[0]},hu_threshold") == 0
        assert {row["bundle"] for row in rows(tmp_path / "volumes.csv")} == {"cascade3d+hu_threshold"}

    def test_an_unknown_member(self, bundles, scans, tmp_path, capsys):
        assert segment(scans, tmp_path, f"bundle={bundles[0]},cascad3d") == 2
        assert "no bundle 'cascad3d'" in capsys.readouterr().err


def test_error_names_the_list() -> None:
    from ich_pipeline.settings import Settings

    with pytest.raises(ConfigError, match="each once"):
        Settings.of(["bundle=a,,b"]).each_bundle()
