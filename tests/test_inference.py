"""A bundle made ready: what it refuses, that its masks are right on the native grid, and how much memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from heads import OracleCascade, bleeding_head, oracle_bundle, save_nifti, save_weights, write_heads
from scan_files import MATRICES, centred, head_series, save_series

from ich_pipeline.bundles import Bundle, resolve
from ich_pipeline.errors import ConfigError
from ich_pipeline.geometry import Grid
from ich_pipeline.inference import Segmenter, items
from ich_pipeline.networks.cascade_unet import CascadeUNet
from ich_pipeline.records import CaseRecord


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return oracle_bundle(tmp_path_factory.mktemp("bundle") / "oracle")


def segmenter(folder: Path, **overrides) -> Segmenter:
    bundle = Bundle(folder)
    return Segmenter(bundle, resolve(bundle, ["inference"], overrides, None)["inference"])


@pytest.fixture(scope="module")
def oracle(folder) -> Segmenter:
    return segmenter(folder)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float(np.logical_and(a, b).sum()) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("mode", ["fast", "full"])
@pytest.mark.parametrize("name", MATRICES)
def test_mask_lies_where_the_bleed_is_on_any_grid(folder, oracle, name, mode, tmp_path):
    image_hu, label, grid = bleeding_head(matrix=MATRICES[name])
    case = CaseRecord("head", save_nifti(tmp_path / "head.nii.gz", image_hu, grid))
    chosen = oracle if mode == "fast" else segmenter(folder, mode="full")
    prediction = chosen.segment(chosen.read(case))
    assert prediction.mask.grid.shape == grid.shape
    assert prediction.mask.grid.affine == pytest.approx(grid.affine, abs=1e-4)  # NIfTI holds float32
    assert prediction.mask.values.dtype == np.uint8
    # 45 voxels of 4 x 4.5 x 11 mm, most of them on the surface; a shift by one voxel would leave 0.6 to 0.8
    assert dice(prediction.mask.values, label) > 0.9
    assert np.array_equal(prediction.mask.values > 0, prediction.probability >= 0.5)
    assert prediction.probability.dtype == np.float32
    assert prediction.probability.max() <= 1 + 1e-6


def test_volume_of_a_bleed_on_a_fine_grid(oracle, tmp_path):
    # 20 mm sphere: 33.5 mL; the oracle keeps off bone only, so what is lost is lost on the way there and back
    shape = (100, 116, 40)
    image_hu, label, grid = bleeding_head((-10, 15, 3), 20.0, np.diag([1.8, 1.8, 5.0]), shape)
    case = CaseRecord("head", save_nifti(tmp_path / "head.nii.gz", image_hu, grid))
    fine = segmenter(oracle.bundle.path, spacing_mm=[5.0, 0.9, 0.9])
    mask = fine.segment(fine.read(case)).mask.values
    assert mask.sum() == pytest.approx(label.sum(), rel=0.05)
    assert label.sum() * grid.voxel_volume_mm3 == pytest.approx(33510, rel=0.02)


def test_tilted_dicom_series(oracle, tmp_path):
    series = save_series(head_series(tilt_deg=12), tmp_path / "series")
    loaded = oracle.read(CaseRecord("series", series))
    mask = oracle.segment(loaded).mask
    assert mask.grid.tilt_deg == pytest.approx(12, abs=0.01)
    # the sphere of 15 mm that every head of scan_files holds: 14.1 mL
    assert mask.values.sum() * mask.grid.voxel_volume_mm3 / 1000 == pytest.approx(14.1, rel=0.15)
    assert loaded.scan.case_id == "series"
    assert loaded.scan.source == series


def test_head_without_bleed_gives_an_empty_mask(oracle, tmp_path):
    image_hu, _, grid = bleeding_head(lesion_radius_mm=0)
    case = CaseRecord("clean", save_nifti(tmp_path / "clean.nii.gz", image_hu, grid))
    prediction = oracle.segment(oracle.read(case))
    assert not prediction.mask.values.any()
    assert prediction.mask.values.shape == grid.shape


def test_a_scan_can_be_segmented_twice(oracle, tmp_path):
    (scan,) = write_heads(tmp_path, 1)
    loaded = oracle.read(CaseRecord("head", scan))
    first, second = oracle.segment(loaded), oracle.segment(loaded)
    assert np.array_equal(first.mask.values, second.mask.values)
    assert first.mask.values.any()


def test_threshold_of_the_config_makes_the_mask(folder, tmp_path):
    (scan,) = write_heads(tmp_path, 1)
    masks = {}
    for threshold in (0.1, 0.5, 0.9):
        chosen = segmenter(folder, threshold=threshold)
        masks[threshold] = chosen.segment(chosen.read(CaseRecord("head", scan))).mask.values.sum()
    assert masks[0.1] > masks[0.5] > masks[0.9] > 0


def test_nothing_is_saved_by_the_config(folder, tmp_path):
    (scan,) = write_heads(tmp_path / "scans", 1)
    chosen = segmenter(folder, output_dir=str(tmp_path / "saved"))
    chosen.segment(chosen.read(CaseRecord("head", scan)))
    assert not (tmp_path / "saved").exists()


def test_stages_are_timed_by_name(oracle, tmp_path):
    from contextlib import contextmanager

    names = []

    @contextmanager
    def stage(name):
        names.append(name)
        yield

    (scan,) = write_heads(tmp_path, 1)
    oracle.segment(oracle.read(CaseRecord("head", scan), stage), stage)
    assert names == ["read", "preprocess", "network", "restore"]


def test_engine_in_use(oracle, tmp_path):
    (scan,) = write_heads(tmp_path, 1)
    oracle.segment(oracle.read(CaseRecord("head", scan)))
    assert oracle.engine == {"device": str(oracle.device), "engine": "torch", "precision": "f32"}


class TestRefusals:
    def test_bundle_without_weights(self, folder, tmp_path):
        bundle = oracle_bundle(tmp_path / "b")
        (bundle / "models" / "model.pt").unlink()
        with pytest.raises(ConfigError, match="has no weights"):
            segmenter(bundle)

    def test_weights_of_another_bundle(self, folder, tmp_path):
        # The table would name weights that made none of its masks.
        other = oracle_bundle(tmp_path / "other")
        with pytest.raises(ConfigError, match="bundle=FOLDER"):
            segmenter(folder, weights=str(other / "models" / "model.pt"))

    def test_changed_weights(self, tmp_path):
        bundle = oracle_bundle(tmp_path / "b")
        torch.save(OracleCascade(coarse_scale=1).double().state_dict(), bundle / "models" / "model.pt")
        with pytest.raises(ConfigError, match="changed or cut off"):
            segmenter(bundle)

    @pytest.mark.parametrize(
        ("overrides", "match"),
        [({"engine": "tensorrt"}, "torch, openvino"), ({"mode": "quick"}, "fast, full"), ({"device": "gpu"}, "cuda:N")],
        ids=str,
    )
    def test_wrong_values_in_our_own_words(self, folder, overrides, match):
        with pytest.raises(ConfigError, match=match):
            segmenter(folder, **overrides)

    def test_scores_that_are_never_cut(self, tmp_path):
        # Their whole part is 0: an empty mask for every scan.
        bundle = oracle_bundle(tmp_path / "b")
        file = bundle / "configs" / "inference.yaml"
        config = yaml.safe_load(file.read_text())
        steps = config["postprocessing"]["transforms"]
        config["postprocessing"]["transforms"] = [step for step in steps if step["_target_"] != "AsDiscreted"]
        file.write_text(yaml.safe_dump(config))
        with pytest.raises(ConfigError, match="no AsDiscreted"):
            segmenter(bundle)


def test_items_for_a_monai_dataset(tmp_path):
    scans = write_heads(tmp_path / "scans", 2)
    wanted = [{"case_id": scan.name.removesuffix(".nii.gz"), "image": str(scan)} for scan in scans]
    assert items(str(tmp_path / "scans")) == wanted
    assert items([str(scans[1])]) == wanted[1:]


@pytest.mark.slow
@pytest.mark.parametrize("coarse_threshold", [0.5, 1.1], ids=["random regions", "nothing found"])
def test_thin_slice_scan_fits_in_six_gib(tmp_path, coarse_threshold):
    shape = (512, 512, 400)
    grid = Grid(shape, centred(np.diag([0.45, 0.45, 0.45]), shape))
    save_nifti(tmp_path / "scan.nii", noisy_head(grid), grid)
    filters = [4] * 7
    bundle = oracle_bundle(tmp_path / "bundle")
    config = yaml.safe_load((bundle / "configs" / "inference.yaml").read_text())
    config["network_def"] = {
        "_target_": "ich_pipeline.networks.cascade_unet.CascadeUNet",
        "filters": filters,
        "coarse_scale": 2,
        "resize": False,
    }
    config |= {"spacing_mm": [3.0, 0.488, 0.488], "coarse_threshold": coarse_threshold, "threshold": 0.99}
    (bundle / "configs" / "inference.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    save_weights(bundle, CascadeUNet(filters, coarse_scale=2, resize=False))
    command = [sys.executable, "-m", "ich_pipeline", "segment", "scan.nii", "--out", "out", f"bundle={bundle}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    by_stage = {name: stage["process_peak_rss_mib"] for name, stage in report["stages"].items()}
    print(by_stage)
    assert report["process_peak_rss_mib"] < 6 * 1024, by_stage


def noisy_head(grid: Grid) -> np.ndarray:
    """int16 HU of a head with noise, drawn slice by slice."""
    rng = np.random.default_rng(0)
    image_hu = np.empty(grid.shape, np.int16)
    x, y, _ = grid.affine[:3, :3] @ np.indices((*grid.shape[:2], 1)).reshape(3, -1) + grid.affine[:3, 3:]
    for k in range(grid.shape[2]):
        z = grid.affine[2, 3] + k * grid.affine[2, 2]
        radius = np.sqrt((x / 72) ** 2 + (y / 90) ** 2 + (z / 80) ** 2)
        hu = np.select([radius < 0.93, radius < 1], [32.0, 900.0], -1000.0)
        hu[(x + 25) ** 2 + (y - 15) ** 2 + (z - 10) ** 2 < 17**2] = 66
        image_hu[:, :, k] = (hu + rng.normal(0, 8, hu.shape)).reshape(grid.shape[:2])
    return image_hu
