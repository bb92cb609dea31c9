"""Each network of nnU-Net and its dense coarse stage can fit two phantoms, by the loss and optimiser of its bundle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from ich_pipeline import bundles
from ich_pipeline.coarse_mask import CoarseGridd
from ich_pipeline.engines import keep_heap
from ich_pipeline.manifest import read_manifest
from ich_pipeline.phantom import write_dataset
from ich_pipeline.phantom.settings import PhantomSettings

pytestmark = pytest.mark.slow

STEPS = 400
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
