"""Baselines' networks can learn: each fits two phantoms in a bounded number of steps, scored on the whole head.

Not yet here: unetplusplus2d, which reached 0.68 in 300 steps, and swinunetr, which was not tried to the end.
"""

from pathlib import Path

import pytest

from ich_pipeline import bundles
from ich_pipeline.bundles import Bundle
from ich_pipeline.manifest import read_manifest, write_manifest
from ich_pipeline.phantom import write_dataset
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import RunReport
from ich_pipeline.settings import Settings
from ich_pipeline.training import prepare_run, train_bundle

# Networks of the preset `cpu`. `epochs` x `iterations` bounds the steps; the rate falls to 0 over them.
SMALL = {"workers": 0, "amp": "off", "device": "cpu", "weight_decay": 0.0, "epochs": 5, "validate_every": 5}
SMALL_3D = SMALL | {"spacing_mm": [5.0, 2.0, 2.0], "patch_size": [32, 64, 64], "roi_size": [32, 64, 64]}
SMALL_3D |= {"batch_size": 2, "iterations": 60, "learning_rate": 0.003}
SMALL_2D = SMALL | {"spacing_mm": [5.0, 2.0, 2.0], "patch_size": [1, 96, 96], "roi_size": [96, 96]}
SMALL_2D |= {"batch_size": 2, "slices_per_case": 3, "iterations": 60, "learning_rate": 0.003}
NETWORKS = {
    "unet3d": SMALL_3D,
    "segresnet3d": SMALL_3D,
    "segresnet2d": SMALL_2D,
    # Its scores have a quarter of the resolution: smaller pixels.
    "fpn2d": SMALL_2D
    | {"spacing_mm": [5.0, 1.0, 1.0], "patch_size": [1, 128, 128], "roi_size": [128, 128], "iterations": 130},
}


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest that trains and validates on the same two phantoms, of 53 and 27 mL."""
    folder = tmp_path_factory.mktemp("phantoms")
    manifest = write_dataset(folder, cases=3, seed=0)
    records = [r for r in read_manifest(manifest) if float(r.extra["volume_ml"]) > 20]
    assert len(records) == 2
    same = [
        CaseRecord(f"{split}_{r.case_id}", r.image, r.label, f"{split}_{r.case_id}", split)
        for r in records
        for split in ("train", "val")
    ]
    write_manifest(folder / "twice.csv", same)
    return folder / "twice.csv"


def without_changes(bundle: Bundle) -> list[object]:
    """Its augmentation with the crop alone left to chance."""
    steps = bundle.config("train")["augmentation"]["transforms"]
    kept = ("RandCropByLabelClassesd",)
    return [step for step in steps if not step["_target_"].startswith("Rand") or step["_target_"] in kept]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_fits_two_phantoms(name: str, twice: Path, tmp_path: Path) -> None:
    bundle = bundles.find_bundle(name)
    if bundle.missing_packages:
        pytest.skip(f"{name} needs {', '.join(bundle.missing_packages)}, not installed")
    settings = Settings.of([f"bundle={name}", "preset=cpu"])
    settings.overrides.update(NETWORKS[name] | {"data": str(twice)})
    settings.overrides["augmentation.transforms"] = without_changes(bundle)
    prepare_run(bundle, settings, tmp_path, resume=False)
    result = train_bundle(Bundle(tmp_path / "bundle"), RunReport({}), resume=False)
    assert result.best_metric >= 0.9
