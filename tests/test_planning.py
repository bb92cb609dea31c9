"""The plan is the one that nnunetv2's own planner makes of the same data set, and it is a config that trains."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from ich_pipeline import bundles, cli
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.layouts import index_folder
from ich_pipeline.manifest import write_manifest
from ich_pipeline.planning import Fingerprint, Plan, make_plan, take_fingerprint, target_spacing_mm, topology

# Slices, rows, columns; small enough to be written and read by the real fingerprint extractor.
Case = tuple[tuple[int, int, int], tuple[float, float, float]]
DATASETS: dict[str, list[Case]] = {
    "isotropic": [((88, 112, 96), (1.6, 1.6, 1.6)), ((80, 120, 100), (1.6, 1.5, 1.5)), ((75, 96, 96), (2.0, 1.8, 1.8))],
    "anisotropic": [
        ((24, 128, 128), (5.0, 1.5, 1.5)),
        ((28, 140, 128), (4.0, 1.4, 1.4)),
        ((22, 120, 120), (6, 1.7, 1.7)),
    ],
    "few_slices": [((7, 96, 96), (10.0, 2.0, 2.0)), ((8, 96, 100), (10.0, 2.0, 2.0)), ((9, 90, 96), (9.0, 2.0, 2.0))],
    "tiny": [((16, 26, 20), (9.0, 7.0, 7.5)), ((17, 24, 22), (9.0, 7.0, 7.5))],
    "coarse_in_plane": [((60, 48, 44), (2.0, 3.5, 4.0)), ((64, 50, 40), (2.0, 3.5, 4.0))],
}
# Sizes of real sets, which the planner takes as a fingerprint without a voxel: here patches must shrink.
FINGERPRINTS: dict[str, list[Case]] = {
    "head_5mm": [
        ((30, 512, 512), (5.0, 0.449, 0.449)),
        ((28, 512, 512), (5.0, 0.42, 0.42)),
        ((33, 512, 512), (4.5, 0.488, 0.488)),
    ],
    "head_1mm": [((180, 512, 512), (1.0, 0.45, 0.45)), ((160, 512, 512), (1.0, 0.488, 0.488))],
    "isotropic_large": [((300, 320, 310), (0.8, 0.8, 0.8))] * 30,
    "uneven_mix": [
        ((24, 512, 512), (7.0, 0.45, 0.45)),
        ((140, 512, 512), (1.25, 0.49, 0.49)),
        ((36, 512, 512), (5.0, 0.4, 0.4)),
        ((31, 512, 512), (5.0, 0.45, 0.45)),
    ],
    "near_cube": [((257, 255, 256), (1.0, 1.01, 1.02)), ((250, 260, 256), (1.0, 1.0, 1.0))],
}
PLANNER = """
import json, sys
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
if __name__ == "__main__":
    found = {}
    for name, number, extract in json.loads(sys.argv[1]):
        if extract:
            DatasetFingerprintExtractor(number, 1).run()
        found[name] = ExperimentPlanner(number).plan_experiment()
    with open(sys.argv[2], "w") as stream:
        json.dump(found, stream)
"""


def write_dataset(root: Path, cases: Sequence[Case], *, voxels: bool) -> None:
    """A raw nnU-Net data set of noise with a bright box in it; without voxels only what the planner opens."""
    random_state = np.random.default_rng(len(cases))
    for n, (shape, spacing_mm) in enumerate(cases):
        size, edges = shape[::-1], spacing_mm[::-1]
        affine = np.diag([-edges[0], -edges[1], edges[2], 1.0])
        image_hu = np.full((2, 2, 2), -1000, np.int16)
        if voxels:
            image_hu = random_state.normal(30, 6, size).astype(np.int16)
            image_hu[0] = -1000
            image_hu[-max(1, size[0] // 20) :] = 900  # as much bone as a head has
        label = np.zeros(image_hu.shape, np.uint8)
        label[tuple(slice(m // 3, m // 2 + 1) for m in label.shape)] = 1
        image_hu[label > 0] = random_state.normal(60 + 4 * n, 8, int(label.sum()))
        for folder, values in (("imagesTr", image_hu), ("labelsTr", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(values, affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, root / folder / f"case{n}{'_0000' if folder == 'imagesTr' else ''}.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "blood": 1}}
    (root / "dataset.json").write_text(json.dumps(content | {"numTraining": len(cases), "file_ending": ".nii.gz"}))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of raw nnU-Net data sets with voxels."""
    folder = tmp_path_factory.mktemp("raw")
    for number, (name, cases) in enumerate(DATASETS.items(), 1):
        write_dataset(folder / f"Dataset{number:03d}_{name}", cases, voxels=True)
    return folder


@pytest.fixture(scope="module")
def theirs(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What nnunetv2 plans, by data set."""
    if importlib.util.find_spec("nnunetv2") is None:
        pytest.skip("nnunetv2 is not installed (extra `bench`): nothing to compare the plan with")
    folder = tmp_path_factory.mktemp("nnunet")
    jobs = [(name, number, True) for number, name in enumerate(DATASETS, 1)]
    for number, (name, cases) in enumerate(FINGERPRINTS.items(), len(DATASETS) + 1):
        write_dataset(raw / f"Dataset{number:03d}_{name}", cases, voxels=False)
        target = folder / f"Dataset{number:03d}_{name}"
        target.mkdir()
        shapes, spacings = zip(*cases, strict=True)
        content = {"spacings": spacings, "shapes_after_crop": shapes, "median_relative_size_after_cropping": 1.0}
        content["foreground_intensity_properties_per_channel"] = {"0": {}}
        (target / "dataset_fingerprint.json").write_text(json.dumps(content))
        jobs.append((name, number, False))
    script, out = folder / "planner.py", folder / "plans.json"
    script.write_text(PLANNER)
    environment = os.environ | {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(folder)}
    environment |= {"nnUNet_results": str(folder), "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1"}
    done = subprocess.run(
        [sys.executable, script, json.dumps(jobs), out], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def fingerprint_of(cases: Sequence[Case]) -> Fingerprint:
    shapes, spacings = (np.array(column) for column in zip(*cases, strict=True))
    return Fingerprint(shapes, spacings.astype(float), (40.0, 80.0), 60.0, 8.0)


def assert_same(plan: Plan, theirs: dict[str, Any]) -> None:
    full = theirs["configurations"]["3d_fullres"]
    network = full["architecture"]["arch_kwargs"]
    back = theirs["transpose_backward"]

    def turned(size: Sequence[Any]) -> list[Any]:
        return [size[axis] for axis in back]

    assert list(plan.patch_size) == turned(full["patch_size"])
    np.testing.assert_allclose(plan.spacing_mm, turned(full["spacing"]), rtol=1e-6)
    assert [list(s) for s in plan.strides] == [turned(s) for s in network["strides"]]
    assert [list(k) for k in plan.kernels] == [turned(k) for k in network["kernel_sizes"]]
    assert list(plan.filters) == network["features_per_stage"]
    assert len(plan.strides) == network["n_stages"]
    assert plan.batch_size == full["batch_size"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_planned_as_nnunet_plans_it(raw: Path, theirs: dict[str, Any], name: str, tmp_path: Path) -> None:
    """From the files on: the same shapes and spacings are read, and the same network comes out."""
    root = next(raw.glob(f"*_{name}"))
    write_manifest(root / "cases.csv", index_folder(root, "nnunet"))
    fingerprint = take_fingerprint(root / "cases.csv")
    assert_same(make_plan(fingerprint), theirs[name])
    intensities = theirs[name]["foreground_intensity_properties_per_channel"]["0"]
    # They draw voxels at random, we count all: a tenth of a unit in a thousand draws.
    expected = [intensities[key] for key in ("percentile_00_5", "percentile_99_5", "mean", "std")]
    np.testing.assert_allclose([*fingerprint.window_hu, fingerprint.mean_hu, fingerprint.std_hu], expected, atol=1.0)
    assert expected[2] > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_large_data_set_is_planned_as_nnunet_plans_it(theirs: dict[str, Any], name: str) -> None:
    assert_same(make_plan(fingerprint_of(FINGERPRINTS[name])), theirs[name])


# --- the rules, by hand ----------------------------------------------------------------------------------------------


def test_thick_slices_take_a_low_percentile_and_other_axes_the_median() -> None:
    cases = [((24, 512, 512), (slice_mm, 0.4, 0.5)) for slice_mm in (2.0, 5.0, 5.0, 5.0, 6.0)]
    shapes, spacings = (np.array(column) for column in zip(*cases, strict=True))
    # The tenth percentile of five lies 0.4 of the way from the first to the second.
    np.testing.assert_allclose(target_spacing_mm(shapes, spacings), [3.2, 0.4, 0.5])
    # With as many slices as would make a cube it is no special axis.
    np.testing.assert_allclose(target_spacing_mm(shapes * (10, 1, 1), spacings), [5.0, 0.4, 0.5])
    # Never finer than the others.
    spacings[:2, 0] = 0.3
    np.testing.assert_allclose(target_spacing_mm(shapes, spacings), [0.50001, 0.4, 0.5])


def test_an_axis_is_halved_and_convolved_once_the_others_are_as_coarse() -> None:
    kernels, strides, patch = topology((5.0, 1.25, 1.25), (20, 160, 150))
    # 1.25 and 2.5 mm are finer than half of 5 mm; 5 mm slices are halved from 5 mm pixels on, down to 4 to 7 voxels.
    assert strides == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)]
    assert kernels == [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    assert patch == (20, 160, 160)


def test_less_memory_gives_a_smaller_patch_and_more_a_larger_batch() -> None:
    cases = FINGERPRINTS["isotropic_large"]
    plans = [make_plan(fingerprint_of(cases), gb) for gb in (4, 8, 24)]
    voxels = [int(np.prod(plan.patch_size)) for plan in plans]
    assert voxels[0] < voxels[1] < voxels[2]
    tiny = fingerprint_of([((64, 64, 64), (1.0, 1.0, 1.0))] * 1000)
    assert make_plan(tiny, 8).batch_size < make_plan(tiny, 16).batch_size


@pytest.mark.parametrize(
    ("shape", "memory_gb", "reason"),
    [
        ((5, 12, 12), 8.0, "can be halved 1 times"),
        ((64, 64, 64), 0.0, "more than 0"),
        ((64, 64, 64), 1e-4, "too little"),
    ],
)
def test_what_cannot_be_planned_is_said(shape: tuple[int, int, int], memory_gb: float, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_plan(fingerprint_of([(shape, (2.0, 2.0, 2.0))]), memory_gb)


# --- the fingerprint and the command ---------------------------------------------------------------------------------


def manifest_of(root: Path) -> Path:
    write_manifest(root / "cases.csv", index_folder(root, "nnunet"))
    return root / "cases.csv"


def test_fingerprint_is_in_the_order_slices_rows_columns_and_weighs_cases_alike(tmp_path: Path) -> None:
    write_dataset(tmp_path, [((16, 30, 26), (9.0, 7.0, 7.5)), ((20, 60, 52), (9.0, 3.5, 3.8))], voxels=True)
    fingerprint = take_fingerprint(manifest_of(tmp_path))
    assert fingerprint.shapes.tolist() == [[16, 30, 26], [20, 60, 52]]
    np.testing.assert_allclose(fingerprint.spacings_mm, [[9.0, 7.0, 7.5], [9.0, 3.5, 3.8]], rtol=1e-6)
    # 60 and 64 HU in the mean, and the second case has four times the voxels of the first.
    assert fingerprint.mean_hu == pytest.approx(61.5, abs=1.0)  # whole numbers cut off half a unit
    assert fingerprint.std_hu == pytest.approx(8.2, abs=0.5)


def test_cases_without_hemorrhage_or_without_a_spread_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, DATASETS["tiny"], voxels=True)
    manifest = manifest_of(tmp_path)
    for values, reason in ((1, "expected a spread"), (0, "no hemorrhage")):
        for file in (tmp_path / "labelsTr").iterdir():
            image = nib.load(file)
            label = np.zeros(image.shape, np.uint8)
            label[5, 5, 5] = values
            nib.save(nib.Nifti1Image(label, image.affine, image.header), file)
            scan = tmp_path / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz")
            image = nib.load(scan)
            image_hu = np.asarray(image.dataobj).copy()
            image_hu[5, 5, 5] = 60
            nib.save(nib.Nifti1Image(image_hu, image.affine, image.header), scan)
        with pytest.raises(ManifestError, match=reason):
            take_fingerprint(manifest)
    records = index_folder(tmp_path, "nnunet")
    write_manifest(manifest, [replace(record, split="test") for record in records])
    with pytest.raises(ManifestError, match="outside the split test"):
        take_fingerprint(manifest)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *map(str, words)])
    return int(end.value.code or 0)


def test_the_command_writes_a_config_that_the_bundle_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, DATASETS["tiny"], voxels=True)
    manifest, out = manifest_of(tmp_path), tmp_path / "plan.yaml"
    assert run(f"data={manifest}", f"out={out}") == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text().startswith("# nnU-Net's 3d_fullres for one data set")
    plan = yaml.safe_load(out.read_text())
    expected = make_plan(take_fingerprint(manifest))
    assert plan["patch_size"] == list(expected.patch_size)
    bundle = bundles.find_bundle("nnunet3d")
    configs = bundles.resolve(bundle, ("train", "inference"), {"variant": str(out)}, "cpu")
    for config in configs.values():
        assert {key: config[key] for key in plan.keys() & config.keys()} == {
            k: plan[k] for k in plan.keys() & config.keys()
        }
    assert plan.keys() <= configs["train"].keys()
    # Not written over, and no word too much.
    assert run(f"data={manifest}", f"out={out}") == 2
    assert run(f"data={manifest}", f"out={out}", "overwrite=true") == 0
    for words in ((f"out={tmp_path / 'p.yaml'}",), (f"data={manifest}", "epochs=3"), (f"data={manifest}", "out=p.csv")):
        assert run(*words) == 2
    assert not (tmp_path / "p.yaml").exists()
