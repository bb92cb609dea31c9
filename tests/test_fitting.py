"""Networks can learn: each fits two phantoms in a bounded number of steps, scored on the whole heads.

Not here: the networks of symmetry_gan_unet, yolov5_transdeeplab and pesa_rcnn, whose own tests let them learn smaller
things.
"""

from collections.abc import Callable
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
from ich_pipeline.transforms import PadToSized

pytestmark = pytest.mark.slow

WANTED_DICE = 0.9
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


# --- by the loss and optimiser of the bundle, step by step ---

STEPS = 400
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two phantoms with one bleed inside the brain each, of 20 mL or more, in 128 x 128 pixels."""
    manifest = write_dataset(tmp_path_factory.mktemp("phantoms"), 2, seed=5, settings=EASY, jobs=1)
    return [{"image": str(r.image), "label": str(r.label)} for r in read_manifest(manifest, require_label=True)]


def parser_of(name: str, overlay: str | None = None, **overrides: Any) -> ConfigParser:
    """`train.yaml` of a bundle at the size of two CPU cores, with a further config over it."""
    bundle = bundles.find_bundle(name)
    small = {"spacing_mm": [5.0, 2.5, 2.5], "device": "cpu", "amp": "off", **overrides}
    parser = ConfigParser(bundles.resolve(bundle, ("train",), small, "cpu")["train"])
    for key, value in (bundle.config(overlay) if overlay else {}).items():
        parser[key] = value
    return parser


def dice(found: torch.Tensor, label: torch.Tensor) -> float:
    return float(2 * (found * label).sum() / (found.sum() + label.sum()))


def fit(
    parser: ConfigParser, batch: Callable[[], tuple[torch.Tensor, torch.Tensor]], score: Callable[[], float]
) -> int:
    """Train until the score is reached; the number of steps that it took."""
    keep_heap()
    network, loss, optimizer = (parser.get_parsed_content(key) for key in ("network", "loss", "optimizer"))
    for step in range(1, STEPS + 1):
        network.train()
        image, label = batch()
        optimizer.zero_grad()
        loss(network(image), label).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        if step % 10 == 0:
            network.eval()
            with torch.inference_mode():
                reached = score()
            if reached >= WANTED_DICE:
                return step
    pytest.fail(f"Dice {reached:.3f} after {STEPS} steps, expected {WANTED_DICE}")


def test_the_dense_network_fits_two_cases(pair: list[dict[str, str]]) -> None:
    """On its own grid: what resizing to it costs is not the network's."""
    torch.manual_seed(0)
    size = [12, 64, 64]
    parser = parser_of("densenet_nnunet", "coarse", coarse_size=size)
    ready = Compose([parser.get_parsed_content("preprocessing"), CoarseGridd(["image", "label"], size)])
    cases = [ready(case) for case in pair]
    image, label = (torch.cat([case[key][0][:, None] for case in cases]) for key in ("image", "label"))
    assert label.sum() > 200
    network = parser.get_parsed_content("network")
    steps = fit(parser, lambda: (image, label), lambda: dice((network(image) > 0).float(), label))
    print(f"dense network: {steps} steps")


def test_the_planned_network_fits_two_cases(pair: list[dict[str, str]]) -> None:
    torch.manual_seed(0)
    # The momentum is the bundle's own, nnU-Net's: the preset for two cores has less.
    parser = parser_of("nnunet3d", patch_size=[16, 48, 48], momentum=0.99)
    # Patches as the bundle cuts them, without the random changes after that.
    crop = Compose(parser.get_parsed_content("augmentation").transforms[:4]).set_random_state(seed=0)
    ready = parser.get_parsed_content("preprocessing")
    cases = [ready(case) for case in pair]
    network, inferer = parser.get_parsed_content("network"), parser.get_parsed_content("validate#inferer")

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        patches = [crop(dict(case))[0] for case in cases]
        return torch.stack([p["image"] for p in patches]), torch.stack([p["label"] for p in patches])

    def score() -> float:
        found = [inferer(case["image"][None], network).argmax(dim=1, keepdim=True)[0].float() for case in cases]
        return min(dice(f, case["label"]) for f, case in zip(found, cases, strict=True))

    assert min(float(case["label"].sum()) for case in cases) > 200
    steps = fit(parser, batch, score)
    print(f"planned network: {steps} steps")


# Every slice of two heads in a step, or the 32 slices around each bleed: windows and strides want multiples of 32.
WHOLE = {"unetplusplus2d": ((1, 32, 32), 2.5), "swinunetr": ((32, 32, 32), 3.5)}  # and pixels in mm


def _around_the_bleed(image: torch.Tensor, label: torch.Tensor, slices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many slices of a (1, S, R, C) head, the bleed in the middle where the head has as many on both sides."""
    middle = int(torch.nonzero(label[0])[:, 0].float().mean())
    first = max(0, min(middle - slices // 2, label.shape[1] - slices))
    return image[:, first : first + slices], label[:, first : first + slices]


@pytest.mark.parametrize("name", WHOLE)
def test_network_fits_two_heads_at_once(name: str, pair: list[dict[str, str]]) -> None:
    if bundles.find_bundle(name).missing_packages:
        pytest.skip(f"{name} needs {', '.join(bundles.find_bundle(name).missing_packages)}, not installed")
    torch.manual_seed(0)
    multiples, pixel_mm = WHOLE[name]
    parser = parser_of(name, learning_rate=0.002, weight_decay=0.0, spacing_mm=[5.0, pixel_mm, pixel_mm])
    ready = parser.get_parsed_content("preprocessing")
    cases = [ready(case) for case in pair]
    shape = [max(case["image"].shape[axis + 1] for case in cases) for axis in range(3)]
    size = [-(-n // m) * m for n, m in zip(shape, multiples, strict=True)]
    pad = PadToSized(["image", "label"], size)
    image, label = (torch.stack([pad(case)[key] for case in cases]) for key in ("image", "label"))
    if multiples[0] == 32:
        image, label = zip(*(_around_the_bleed(*each, 32) for each in zip(image, label, strict=True)), strict=True)
        image, label = torch.stack(image), torch.stack(label)
    if multiples[0] == 1:  # slices are the batch, and those without blood are many
        image, label = (each.transpose(1, 2).flatten(0, 1) for each in (image, label))
        kept = label.flatten(1).any(dim=1)
        kept[::4] = True
        image, label = image[kept], label[kept]
    network = parser.get_parsed_content("network")
    steps = fit(parser, lambda: (image, label), lambda: dice(network(image).argmax(dim=1, keepdim=True).float(), label))
    print(f"{name}: {steps} steps")
