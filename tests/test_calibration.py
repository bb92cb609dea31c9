"""Temperature and operating point: chosen as said, written where they are used, and used as written."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from shapes import ellipsoid, make_grid
from training_cases import TINY, write_cases

from ich_pipeline import bundles, calibration, commands
from ich_pipeline.bundles import Bundle
from ich_pipeline.calibration import LOGITS, THRESHOLDS, CaseScores, choose, fit_temperature, score_case
from ich_pipeline.commands import Settings
from ich_pipeline.errors import ConfigError
from ich_pipeline.geometry import Grid
from ich_pipeline.report import read_rows
from ich_pipeline.transforms import Calibrated, RemoveSmalld, RemoveUnsured, calibrated

GRID = make_grid((40, 44, 12), (1.0, 1.0, 5.0), tilt_deg=12)
UNEVEN = Grid(GRID.shape, GRID.affine, np.r_[np.arange(11) * 0.8, 11.0])


def soft_ball(grid: Grid, centre: Any, radius: float) -> np.ndarray:
    return np.asarray(ellipsoid(grid, centre, (radius, radius, radius)), dtype=np.float32)


def scores(label_ml: float, *lesions: float, at: float = 0.5) -> CaseScores:
    """A case whose lesions are there up to a threshold."""
    found = tuple(np.array(lesions if t <= at else ()) for t in THRESHOLDS)
    histogram = np.ones((2, len(LOGITS) - 1))
    return CaseScores(label_ml, found, tuple(np.full(each.shape, at) for each in found), histogram)


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_temperature_of_a_known_miscalibration_is_found(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, 200_000)
    blood = rng.random(logits.size) < 1 / (1 + np.exp(-logits))
    said = logits * true  # too sure of itself by this factor
    at = np.clip(np.digitize(said, LOGITS) - 1, 0, len(LOGITS) - 2)
    histogram = np.stack([np.bincount(at, blood == is_blood, len(LOGITS) - 1) for is_blood in (0, 1)])
    assert fit_temperature(histogram) == pytest.approx(true, rel=0.03)


def test_without_doubt_there_is_nothing_to_fit() -> None:
    with pytest.raises(ConfigError, match="not sure of"):
        fit_temperature(np.zeros((2, len(LOGITS) - 1)))


@pytest.mark.parametrize("grid", [GRID, UNEVEN], ids=["even", "uneven"])
def test_lesions_and_histogram_are_those_of_a_plain_count(grid: Grid) -> None:
    rng = np.random.default_rng(1)
    probability = ndimage.gaussian_filter(rng.random(grid.shape), 1.5).astype(np.float32)
    probability = np.clip((probability - probability.min()) / np.ptp(probability) * 1.2 - 0.2, 0, 1)
    label = ndimage.gaussian_filter(rng.random(grid.shape), 2) > 0.51
    found = score_case(probability, label.astype(np.uint8), grid)
    assert found.label_ml == pytest.approx(grid.foreground_ml(label))
    for threshold, volumes in zip(THRESHOLDS, found.lesions_ml, strict=True):
        lesions, count = ndimage.label(probability >= threshold, np.ones((3, 3, 3)))
        wanted = [grid.foreground_ml(lesions == n) for n in range(1, count + 1)]
        np.testing.assert_allclose(sorted(volumes), sorted(wanted), rtol=1e-9)
    for threshold, volumes, peaks in zip(THRESHOLDS, found.lesions_ml, found.peaks, strict=True):
        lesions, count = ndimage.label(probability >= threshold, np.ones((3, 3, 3)))
        wanted = {
            (grid.foreground_ml(lesions == n), float(probability[lesions == n].max())) for n in range(1, count + 1)
        }
        np.testing.assert_allclose(sorted(zip(volumes, peaks, strict=True)), sorted(wanted), rtol=1e-6)
    between = (probability > 0) & (probability < 1)
    assert found.histogram[1].sum() == pytest.approx(grid.foreground_ml(between & label))
    assert found.histogram[0].sum() == pytest.approx(grid.foreground_ml(between & ~label))


def test_points_are_the_best_of_their_kind() -> None:
    bleeding = [scores(10.0, 10.2, 0.04, at=0.9) for _ in range(4)]
    noisy = [scores(0.0, 0.04, at=0.6), *(scores(0.0, at=0.0) for _ in range(3))]
    found = choose([*bleeding, *noisy])
    # With the crumbs 0.24 mL too much, without them 0.2.
    assert found.volume.min_lesion_ml > 0.04
    assert found.volume.volume_mae_ml == pytest.approx(0.1)
    assert (found.few_false_alarms.false_alarms, found.few_false_alarms.clean) == (0, 4)
    assert (found.few_false_alarms.missed, found.few_false_alarms.bleeding) == (0, 4)
    assert found.cases == 8


def test_a_peak_parts_bleeds_from_false_alarms_of_the_same_size() -> None:
    """At a threshold that leaves only true ones, their outline is too small; a low one with a peak has both right."""
    true = CaseScores(
        10.0,
        tuple(np.array([10.0 if t < 0.5 else 2.0]) for t in THRESHOLDS),
        tuple(np.array([0.99]) for _ in THRESHOLDS),
        np.ones((2, len(LOGITS) - 1)),
    )
    found = choose([true, true, scores(0.0, 9.0, at=0.7), scores(0.0, at=0.0)])
    point = found.few_false_alarms
    assert (point.false_alarms, point.missed, point.volume_mae_ml) == (0, 0, 0)
    assert point.min_lesion_peak > calibrated(0.7, found.temperature) > calibrated(0.5, found.temperature)
    assert point.threshold < calibrated(0.5, found.temperature)


def test_false_alarms_that_no_point_avoids_are_as_few_as_can_be() -> None:
    cases = [scores(5.0, 5.0, at=1.0), scores(0.0, 9.0, at=1.0), scores(0.0, at=0.0)]
    assert choose(cases).few_false_alarms.false_alarms == 1


@pytest.mark.parametrize("cases", [[scores(5.0, 5.0)], [scores(0.0)]], ids=["no clean scan", "no bleed"])
def test_scans_of_one_kind_are_not_enough(cases: list[CaseScores]) -> None:
    with pytest.raises(ConfigError, match="with and without hemorrhage"):
        choose(cases)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_transform_divides_the_logit(temperature: float) -> None:
    p = torch.tensor([[0.0, 0.1, 0.5, 0.9, 1.0]])
    found = Calibrated(keys="pred", temperature=temperature)({"pred": p.clone()})["pred"]
    inner = torch.sigmoid(torch.logit(p[:, 1:4]) / temperature)
    torch.testing.assert_close(found[:, 1:4], inner)
    assert found[0, 0] == 0
    assert found[0, 4] == 1
    np.testing.assert_allclose(found[0, 1:4], calibrated(p[0, 1:4].numpy(), temperature), rtol=1e-6)


@pytest.mark.parametrize("grid", [GRID, UNEVEN], ids=["even", "uneven"])
def test_small_lesions_go_and_large_ones_stay_to_the_voxel(grid: Grid) -> None:
    rng = np.random.default_rng(2)
    mask = ndimage.gaussian_filter(rng.random(grid.shape), 1.2) > 0.53
    lesions, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = [grid.foreground_ml(lesions == n) for n in range(1, count + 1)]
    limit = float(np.median(sizes))
    image = MetaTensor(torch.from_numpy(mask.astype(np.float32))[None], affine=torch.as_tensor(grid.affine))
    if grid.slice_positions is not None:
        image.meta["slice_positions"] = str(grid.slice_positions.tolist())
    found = np.asarray(RemoveSmalld(keys="pred", min_ml=limit)({"pred": image.clone()})["pred"][0]) > 0
    wanted = np.isin(lesions, [n for n, ml in enumerate(sizes, 1) if ml >= limit])
    assert 0 < wanted.sum() < mask.sum()
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.asarray(RemoveSmalld(keys="pred")({"pred": image})["pred"][0]) > 0, mask)


def test_lesions_go_whose_probability_is_high_nowhere() -> None:
    rng = np.random.default_rng(3)
    p = ndimage.gaussian_filter(rng.random(GRID.shape), 1.2).astype(np.float32)
    p = (p - p.min()) / np.ptp(p)
    mask = p >= 0.55
    data = {"pred": MetaTensor(torch.from_numpy(mask[None].astype(np.float32))), "probability": MetaTensor(p[None])}
    lesions, count = ndimage.label(mask, np.ones((3, 3, 3)))
    wanted = np.isin(lesions, [n for n in range(1, count + 1) if p[lesions == n].max() >= 0.7])
    assert 0 < wanted.sum() < mask.sum()
    found = RemoveUnsured(keys="pred", min_peak=0.7)({**data, "pred": data["pred"].clone()})["pred"]
    np.testing.assert_array_equal(np.asarray(found[0]) > 0, wanted)
    np.testing.assert_array_equal(np.asarray(RemoveUnsured(keys="pred")(data)["pred"][0]) > 0, mask)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Calibrated("pred", 0),
        lambda: Calibrated("pred", -1),
        lambda: RemoveSmalld("pred", -0.1),
        lambda: RemoveUnsured("pred", min_peak=1.1),
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        wrong()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest whose validation cases are a clean and four bleeding heads."""
    return write_cases(tmp_path_factory.mktemp("cases"), "train val train val val val test")


@pytest.fixture(scope="module")
def trained(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("run")
    words = ["bundle=cascade3d", f"data={cases}", f"out={out}", *TINY, "epochs=12", "tracking=false"]
    assert commands.train(Settings.of(words)) == 0
    return Bundle(out / "bundle")


def test_what_was_chosen_is_what_is_used(trained: Bundle, cases: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(trained.path, copy)
    out = tmp_path / "calibration"
    words = [f"bundle={copy}", f"data={cases}", "split=val", f"out={out}"]
    assert commands.calibrate(Settings.of(words)) == 0
    bundle = Bundle(copy)
    point = bundle.metadata["operating_points"]["few_false_alarms"]
    config = bundle.config("inference")
    assert config["threshold"] == point["threshold"] == bundle.config("train")["threshold"]
    assert config["min_lesion_ml"] == point["min_lesion_ml"]
    assert config["min_lesion_peak"] == point["min_lesion_peak"]
    assert config["temperature"] == bundle.metadata["calibration"]["temperature"] != 1.0
    assert bundle.metadata["weights_sha256"] == trained.metadata["weights_sha256"]
    assert (out / "reliability.png").stat().st_size > 5000
    assert f"{point['false_alarms']} of {point['clean']}" in (out / "calibration.md").read_text()

    # The same scans, segmented with it, have the error that was promised.
    table = tmp_path / "volumes.csv"
    records = calibration_cases(cases)
    settings = Settings.of([f"bundle={copy}", "pictures=false", "html=false"])
    assert commands.segment([r.image for r in records], tmp_path / "masks", table, settings) == 0
    truth = {r.case_id: label_ml(r) for r in records}
    rows = read_rows(table)
    errors = [abs(row.report.volume_ml - truth[row.case_id.replace("image", "case")]) for row in rows if row.report]
    assert np.mean(errors) == pytest.approx(point["volume_mae_ml"], abs=0.02)


def calibration_cases(manifest: Path) -> list[Any]:
    from ich_pipeline.evaluation import labelled_cases

    return labelled_cases(manifest, "val")


def label_ml(record: Any) -> float:
    from ich_pipeline.reading import read_mask

    mask, _ = read_mask(record.label)
    return mask.grid.foreground_ml(mask.values)


def test_a_row_says_that_lesions_were_taken_out(trained: Bundle, cases: Path, tmp_path: Path) -> None:
    scan = calibration_cases(cases)[-1].image
    found = {}
    for min_ml in (0, 0.001, 10_000):
        table = tmp_path / str(min_ml) / "volumes.csv"
        words = [f"bundle={trained.path}", "threshold=0.05", f"min_lesion_ml={min_ml}", "pictures=false", "html=false"]
        assert commands.segment([scan], table.parent / "masks", table, Settings.of(words)) == 0
        [found[min_ml]] = read_rows(table)
    flagged = {min_ml: "small_lesions_removed" in row.flags for min_ml, row in found.items()}
    assert flagged == {0: False, 0.001: False, 10_000: True}
    assert found[0].report.volume_ml > 0 == found[10_000].report.volume_ml
    table = tmp_path / "unsure" / "volumes.csv"
    words = [f"bundle={trained.path}", "threshold=0.05", "min_lesion_peak=1.0", "pictures=false", "html=false"]
    assert commands.segment([scan], table.parent / "masks", table, Settings.of(words)) == 0
    [unsure] = read_rows(table)
    assert "unsure_lesions_removed" in unsure.flags
    assert unsure.report.volume_ml == 0


def test_an_installed_bundle_is_not_written_to(cases: Path) -> None:
    with pytest.raises(ConfigError, match="installed bundle"):
        commands.calibrate(Settings.of(["bundle=cascade3d", f"data={cases}", "split=val", "preset=null"]))


def test_a_bundle_without_a_place_for_it_is_refused() -> None:
    bundle = bundles.find_bundle("unet3d")
    with pytest.raises(ConfigError, match="no key temperature, min_lesion_peak, min_lesion_ml"):
        calibration.require_keys(bundle, bundle.config("inference"))
