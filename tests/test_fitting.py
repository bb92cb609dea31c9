"""Every network can learn: each fits two phantoms in a bounded number of steps, scored on the whole heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from ich_pipeline import bundles
from ich_pipeline.bundles import Bundle
from ich_pipeline.coarse_mask import CoarseGridd
from ich_pipeline.engines import keep_heap
from ich_pipeline.manifest import read_manifest, write_manifest
from ich_pipeline.phantom import write_dataset
from ich_pipeline.phantom.settings import PhantomSettings
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import RunReport
from ich_pipeline.settings import Settings
from ich_pipeline.training import prepare_run, train_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WANTED_DICE = 0.9
EASY = PhantomSettings(
    clean_fraction=0,
    subtype_weights={"IPH": 1.0},
    kinds_probability=(1.0,),
    volume_ml=(20.0, 60.0),
    matrix=128,
    slice_mm=(5.0,),
    tilt_fraction=0,
    cut_fraction=0,
    circle_fraction=0,
)
# Networks of the preset `cpu`. `epochs` x `iterations` bounds the steps; the rate falls to 0 over them.
ALL = {"workers": 0, "amp": "off", "device": "cpu", "weight_decay": 0.0, "epochs": 5, "validate_every": 5}
ALL |= {"iterations": 60, "batch_size": 2, "spacing_mm": [5.0, 2.5, 2.5]}
IN_3D = ALL | {"patch_size": [16, 64, 64], "roi_size": [16, 64, 64], "learning_rate": 0.003}
IN_2D = ALL | {"patch_size": [1, 96, 96], "roi_size": [96, 96], "slices_per_case": 3, "learning_rate": 0.003}
NETWORKS = {
    "nnunet3d": ALL | {"patch_size": [16, 48, 48], "roi_size": [16, 48, 48], "momentum": 0.99, "iterations": 80},
    "segresnet2d": IN_2D,
    "segresnet3d": IN_3D,
    "swinunetr": IN_3D | {"patch_size": [32, 64, 64], "roi_size": [32, 64, 64], "learning_rate": 0.001},
    "unet3d": IN_3D,
    "unetplusplus2d": IN_2D | {"iterations": 120},
    # Its scores have a quarter of the resolution: smaller pixels.
    "fpn2d": IN_2D
    | {"spacing_mm": [5.0, 1.25, 1.25], "patch_size": [1, 128, 128], "roi_size": [128, 128], "iterations": 120},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantoms with one bleed inside the brain each, of 20 mL or more, in 128 x 128 pixels."""
    return write_dataset(tmp_path_factory.mktemp("phantoms"), 2, seed=5, settings=EASY, jobs=1)


@pytest.fixture(scope="module")
def twice(pair: Path) -> Path:
    """A manifest that trains and validates on the pair."""
    same = [
        CaseRecord(f"{split}_{r.case_id}", r.image, r.label, f"{split}_{r.case_id}", split)
        for r in read_manifest(pair)
        for split in ("train", "val")
    ]
    write_manifest(pair.with_name("twice.csv"), same)
    return pair.with_name("twice.csv")


def without_changes(bundle: Bundle) -> list[object]:
    """Its augmentation with the crop alone left to chance."""
    steps = bundle.config("train")["augmentation"]["transforms"]
    kept = ("RandCropByLabelClassesd", "RandCropByPosNegLabeld")
    return [step for step in steps if not step["_target_"].startswith("Rand") or step["_target_"] in kept]


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
    assert result.best_metric >= WANTED_DICE


def dice(found: torch.Tensor, label: torch.Tensor) -> float:
    return float(2 * (found * label).sum() / (found.sum() + label.sum()))


def test_the_dense_network_of_the_coarse_stage_fits_two_phantoms(pair: Path) -> None:
    """By its own loss and optimiser, on its own grid: what resizing to it costs is not the network's."""
    torch.manual_seed(0)
    keep_heap()
    bundle, size = bundles.find_bundle("densenet_nnunet"), [12, 64, 64]
    small: dict[str, Any] = {"spacing_mm": [5.0, 2.5, 2.5], "device": "cpu", "amp": "off", "coarse_size": size}
    parser = ConfigParser(bundles.resolve(bundle, ("train",), small, "cpu")["train"])
    for key, value in bundle.config("coarse").items():
        parser[key] = value
    ready = Compose([parser.get_parsed_content("preprocessing"), CoarseGridd(["image", "label"], size)])
    cases = [ready({"image": str(r.image), "label": str(r.label)}) for r in read_manifest(pair)]
    image, label = (torch.cat([case[key][0][:, None] for case in cases]) for key in ("image", "label"))
    assert label.sum() > 200
    network, loss, optimizer = (parser.get_parsed_content(key) for key in ("network", "loss", "optimizer"))
    for step in range(1, 401):
        network.train()
        optimizer.zero_grad()
        loss(network(image), label).backward()
        optimizer.step()
        if step % 10 == 0:
            network.eval()
            with torch.inference_mode():
                reached = dice((network(image) > 0).float(), label)
            if reached >= WANTED_DICE:
                return
    pytest.fail(f"Dice {reached:.3f} after {step} steps, expected {WANTED_DICE}")
