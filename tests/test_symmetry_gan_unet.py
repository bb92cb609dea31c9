"""What symmetry_gan_unet has and other bundles do not: its networks, balanced slices, adversarial training."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from test_training import same, state_of
from torch import nn
from torch.nn import functional as F
from training_cases import write_cases

from ich_pipeline import bundles, commands
from ich_pipeline.adversarial import (
    DiscriminatorInferer,
    GanLoss,
    PretrainedAdversarialTrainer,
    WeightedDiceLoss,
)
from ich_pipeline.errors import ConfigError, IchError, ManifestError
from ich_pipeline.networks import pretrained_unetplusplus
from ich_pipeline.networks.block_unet import ARCHITECTURES, BlockUNet
from ich_pipeline.networks.pretrained_unetplusplus import PretrainedUNetPlusPlus, with_encoder_weights
from ich_pipeline.settings import Settings
from ich_pipeline.slice_balance import BalancedCases, BalancedSampler, RandSlicesOfClassd, slices_bleed

BUNDLE = bundles.find_bundle("symmetry_gan_unet")
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


# --- networks --------------------------------------------------------------------------------------------------------


def reach(network: nn.Module, size: int = 256) -> int:
    """Rows that the middle pixel's logits depend on."""
    network.eval()
    image = torch.randn(1, 1, size, size, requires_grad=True)
    network(image)[0, 1, size // 2, size // 2].backward()
    assert image.grad is not None
    rows = torch.nonzero(image.grad[0, 0].abs().sum(dim=1)).flatten()
    return int(rows[-1] - rows[0]) + 1


def test_dilation_widens_what_a_pixel_sees_and_depth_widens_it_more() -> None:
    unet6, dilated, unet10 = (
        reach(BlockUNet(name, width=2, negative_slope=0.2)) for name in ("unet6", "unet6_dilated", "unet10")
    )
    # By hand, of the first: 2 convolutions at 1, 2 at 2, 2 at 4, 2 at 2 and 2 at 1 pixels, each one to either side,
    # and what poolings and up-convolutions add.
    assert 2 * (2 + 4 + 8 + 4 + 2) <= unet6 <= 2 * (2 + 4 + 8 + 4 + 2) + 4
    assert dilated > 2 * unet6
    assert unet10 > 4 * unet6


@pytest.mark.parametrize(("name", "blocks"), [("unet6", 6), ("unet6_dilated", 6), ("unet10", 10)])
def test_blocks_are_counted_with_the_output(name: str, blocks: int) -> None:
    network = BlockUNet(name, in_channels=2, width=2)
    assert len(network.down) + len(network.up) + 1 == blocks
    rates = {m.dilation[0] for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert rates == {1, *ARCHITECTURES[name]}
    halved = 2 ** (len(network.down) - 1)
    assert network(torch.zeros(2, 2, 2 * halved, 3 * halved)).shape == (2, 2, 2 * halved, 3 * halved)
    with pytest.raises(ConfigError, match="architecture='unet7': expected one of unet10, unet6, unet6_dilated"):
        BlockUNet("unet7")


def test_original_unet_has_its_published_size() -> None:
    assert sum(p.numel() for p in BlockUNet("unet10").parameters()) == pytest.approx(31.0e6, rel=0.01)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_activation_is_relu_or_leaky(slope: float) -> None:
    kinds = {type(m) for m in BlockUNet("unet6", width=2, negative_slope=slope).modules()}
    assert (nn.LeakyReLU in kinds, nn.ReLU in kinds) == (slope > 0, slope == 0)


def plus_plus(in_channels: int = 2) -> PretrainedUNetPlusPlus:
    pytest.importorskip("segmentation_models_pytorch")
    return PretrainedUNetPlusPlus("mobilenet_v2", in_channels, [8] * 5)


def test_an_encoder_from_a_file_is_used_and_stays_as_it_is(tmp_path: Path) -> None:
    network = plus_plus()
    encoder = pretrained_unetplusplus._library().encoders.get_encoder("mobilenet_v2", weights=None)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    with_encoder_weights(network, str(tmp_path / "encoder.pt"), CPU)
    # Two channels take red and green, so scaled that a grey image gives what it gave.
    first, three = next(network.net.encoder.parameters()), next(encoder.parameters())
    torch.testing.assert_close(first, three[:, :2] * 1.5)
    frozen = {name: value.clone() for name, value in network.net.encoder.state_dict().items()}
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    before = network.net.segmentation_head[0].weight.clone()
    network(torch.randn(2, 2, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(network.net.segmentation_head[0].weight, before)
    assert same(dict(network.net.encoder.state_dict()), frozen)  # running means too


def test_without_weights_the_encoder_learns() -> None:
    network = with_encoder_weights(plus_plus(), None, CPU)
    assert all(p.requires_grad for p in network.parameters())
    assert network.train().net.encoder.training


def test_other_networks_take_no_encoder_weights() -> None:
    network = BlockUNet("unet6", width=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert same(dict(with_encoder_weights(network, "imagenet", CPU).state_dict()), before)


def test_weights_that_cannot_be_had_are_said_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = plus_plus()
    with pytest.raises(ConfigError, match=r"none.pt: no such file. Name a file.*encoder_weights=null"):
        with_encoder_weights(network, str(tmp_path / "none.pt"), CPU)
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="not weights of mobilenet_v2"):
        with_encoder_weights(network, str(tmp_path / "other.pt"), CPU)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
    with pytest.raises(ConfigError, match=r"mobilenet_v2 cannot be fetched \(Name or service not known\)"):
        with_encoder_weights(network, "imagenet", CPU)
    with pytest.raises(ConfigError, match="encoder_name=vgg17"):
        PretrainedUNetPlusPlus("vgg17", 1, [8] * 5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["unet6_inception", "unet6_vgg"])
def test_published_encoders_build(variant: str) -> None:
    config = bundles.resolve(BUNDLE, ["inference"], {"variant": variant}, "cpu")["inference"]
    pytest.importorskip("segmentation_models_pytorch")
    network = PretrainedUNetPlusPlus(config["encoder_name"], 1, config["decoder_channels"]).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 64, 96)).shape == (1, 2, 64, 96)


# --- balanced slices -------------------------------------------------------------------------------------------------


class Cases(BalancedCases):
    """Cases that are in memory: each says which of its slices bleed."""

    def __init__(self, *bleeding: str) -> None:
        self._cache = [
            {"label": torch.tensor([s == "b" for s in slices]).float()[None, :, None, None].expand(1, -1, 4, 4)}
            for slices in bleeding
        ]

    def __len__(self) -> int:
        return len(self._cache)


def test_classes_take_turns_and_every_case_comes() -> None:
    cases = Cases("nnbb", "nnnn", "nbnn", "bb")
    assert [cases.cases_of(bleeding) for bleeding in (False, True)] == [[0, 1, 2], [0, 2, 3]]
    draws = list(BalancedSampler(cases, draws=12, seed=3))
    assert [draw.case % 2 for draw in draws] == [1, 0] * 6
    assert sorted({draw.case // 2 for draw in draws if draw.case % 2}) == [0, 2, 3]
    assert sorted({draw.case // 2 for draw in draws if not draw.case % 2}) == [0, 1, 2]
    assert draws == list(BalancedSampler(cases, draws=12, seed=3))
    later = BalancedSampler(cases, draws=12, seed=3)
    later.set_epoch(2)
    assert draws != list(later)


@pytest.mark.parametrize(("cases", "missing"), [(("nn", "n"), "with"), (("bb", "b"), "without")])
def test_a_set_without_one_of_the_classes_is_refused(cases: tuple[str, ...], missing: str) -> None:
    with pytest.raises(ManifestError, match=f"2 training cases without a single slice {missing} hemorrhage"):
        BalancedSampler(Cases(*cases), draws=2)


@pytest.mark.parametrize("bleeding", [False, True])
def test_slices_are_of_the_class_that_is_wanted(bleeding: bool) -> None:
    (label,) = (case["label"] for case in Cases("nbnb")._cache)
    step = RandSlicesOfClassd(["image", "label"], "label", num_samples=8)
    step.set_random_state(0)
    step.bleeding = bleeding
    image = torch.arange(4.0)[None, :, None, None].expand(2, -1, 4, 4)
    slices = step({"image": image, "label": label})
    assert [each["image"].shape for each in slices] == [(2, 4, 4)] * 8
    assert {bool(each["label"].any()) for each in slices} == {bleeding}
    assert {int(each["image"][0, 0, 0]) for each in slices} == ({1, 3} if bleeding else {0, 2})


# --- adversarial training --------------------------------------------------------------------------------------------


def test_weighted_dice_is_the_printed_formula() -> None:
    logits = torch.randn(3, 2, 6, 6)
    label = (torch.rand(3, 1, 6, 6) > 0.5).float()
    p = torch.softmax(logits, dim=1)[:, 1:]
    dice = (2 * (p * label).sum() + 1) / ((p**2).sum() + (label**2).sum() + 1)
    for weight in (1.0, 0.7):
        torch.testing.assert_close(WeightedDiceLoss(weight)(logits, label), 1 - weight * dice)


def test_gan_loss_is_cross_entropy() -> None:
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    loss = GanLoss(weight=0.3)
    torch.testing.assert_close(loss.generator(fake), 0.3 * F.softplus(-fake).mean())
    torch.testing.assert_close(loss.discriminator(real, fake), (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2)


def test_discriminator_sees_the_image_with_a_mask_or_a_probability() -> None:
    seen: list[torch.Tensor] = []

    def network(both: torch.Tensor) -> list[torch.Tensor]:
        seen.append(both)
        return [both, both[:, :1]]

    image, logits = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    mask = torch.ones(2, 1, 4, 4)
    for given in (mask, logits):
        DiscriminatorInferer("off")(given, network, condition=image)  # type: ignore[arg-type]
    torch.testing.assert_close(seen[0], torch.cat([image, mask], dim=1))
    torch.testing.assert_close(seen[1], torch.cat([image, torch.softmax(logits, 1)[:, 1:]], dim=1))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases"))


def train(cases: Path, out: Path, *more: str) -> Path:
    """Two epochs with Dice alone, two with the discriminator."""
    words = [f"bundle={BUNDLE.path}", f"data={cases}", f"out={out}", "preset=tiny", "device=cpu", "tracking=false"]
    words += ["epochs=4", "pretrain_epochs=2", "validate_every=2", "batch_size=2", "dropout=0.5", *more]
    assert commands.train(Settings.of(list({word.partition("=")[0]: word for word in words}.values()))) == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cases, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_stopped_run_goes_on_to_the_bit(undisturbed: Path, cases: Path, tmp_path: Path, epochs: int) -> None:
    """Stopped before and after the discriminator comes in."""
    whole = state_of(undisturbed)
    assert {"network", "optimizer", "discriminator", "discriminator_optimizer"} <= set(whole)
    out = tmp_path / "run"

    def stopped(trainer: Any, engine: Any) -> None:
        if engine.state.epoch > epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainedAdversarialTrainer, "_epoch_started", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(cases, out)
    assert state_of(out)["epoch"] == epochs
    train(cases, out, "resume=true")
    assert same(state_of(out), whole)


def test_discriminator_learns_only_when_its_turn_comes(undisturbed: Path, cases: Path, tmp_path: Path) -> None:
    before = state_of(train(cases, tmp_path / "dice", "adversarial=false"))
    after = state_of(undisturbed)
    assert not before["discriminator_optimizer"]["state"]
    assert after["discriminator_optimizer"]["state"][0]["step"] == 4  # two epochs of two steps
    assert not same(before["network"], after["network"])


def test_all_losses_are_tracked(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    count = PretrainedAdversarialTrainer._count_losses

    def spy(trainer: Any, engine: Any) -> None:
        count(trainer, engine)
        seen.append(dict(engine.state.metrics))

    monkeypatch.setattr(PretrainedAdversarialTrainer, "_count_losses", spy)
    train(cases, tmp_path / "run", "epochs=2", "pretrain_epochs=1")
    assert [set(each) for each in seen[:2]] == [{"dice_loss"}] * 2
    assert [set(each) for each in seen[2:]] == [{"dice_loss", "gan_loss", "discriminator_loss"}] * 2
    assert seen[3]["discriminator_loss"] == pytest.approx(np.log(2), abs=0.3)  # it knows nothing yet
    assert 0 < seen[3]["gan_loss"] < 0.2  # weighted by gan_weight


def test_a_discriminator_that_diverges_stops_the_run(cases: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GanLoss, "discriminator", lambda loss, real, fake: (real + fake).mean() * float("nan"))
        with pytest.raises(IchError, match=r"discriminator_loss nan. The training has diverged"):
            train(cases, tmp_path / "run", "pretrain_epochs=0")


def test_adversarial_training_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ich_pipeline.adversarial.n_processes", lambda: 2)
    with pytest.raises(ConfigError, match="adversarial=true in 2 processes, expected one"):
        PretrainedAdversarialTrainer(pretrain_epochs=1, adversarial=True)


def test_every_row_of_the_papers_table_is_a_variant() -> None:
    rows = {"unet10", "unet10_gan", "unet6", "unet6_gan", "unet6_dilated", "unet6_flip", "unet6_flip_dilated"}
    assert set(BUNDLE.overlays("variants")) == rows | {"unet6_inception", "unet6_vgg"}
    for name in BUNDLE.overlays("variants"):
        configs = bundles.resolve(BUNDLE, ["train", "metadata"], {"variant": name}, None)
        channels = configs["metadata"]["network_data_format"]["inputs"]["image"]["num_channels"]
        assert channels == 1 + configs["train"]["mirror"]
        assert (configs["train"]["mirror"], configs["train"]["adversarial"]) == ("flip" in name, "gan" in name)


def test_slices_of_a_label_that_bleed(cases: Path) -> None:
    label = np.asarray(nib.load(cases.parent / "label-0.nii.gz").dataobj).transpose(2, 1, 0)
    assert slices_bleed(torch.as_tensor(label)[None]).tolist() == label.any(axis=(1, 2)).tolist()
