"""`pesa_rcnn`: center-surround differences, groups and alignment against brute force; its training and results."""

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from training_cases import write_cases

from ich_pipeline import commands, csd_training, training
from ich_pipeline.bundles import Bundle, read_yaml
from ich_pipeline.commands import Settings
from ich_pipeline.csd_training import DilateSlicesd, train_csd
from ich_pipeline.engines import EngineInferer
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.files import sha256_of
from ich_pipeline.inference import Segmenter
from ich_pipeline.instances import InstanceInferer, RegionBatch
from ich_pipeline.networks.csd_unet import CenterSurround, CSDUNet, dilated
from ich_pipeline.networks.pesa_rcnn import (
    MaskBranch,
    MultiScaleMasks,
    PesaRCNN,
    ScaleAdaptiveAlign,
    TwoStage,
    expanded,
    pasted,
    region_targets,
)
from ich_pipeline.roi_groups import equal_count_heights, region_heights

SMALL: dict[str, Any] = {
    "block": "basic",
    "layers": [1, 1, 1, 1],
    "widths": [8, 8, 16, 16],
    "channels": 8,
    "anchor_sizes": [4, 8, 16, 32, 64],
    "proposals": [60, 20],
    "box_features": 16,
    "group_heights": [20, 10],
    "detections": 5,
    "score_threshold": 0.0,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def at(image: NDArray[np.float64], row: float, column: float) -> NDArray[np.float64]:
    """(C, R, C) image between its samples, which lie at whole numbers; beyond the last ones these are taken."""
    row, column = (min(max(x, 0.0), n - 1.0) for x, n in ((row, image.shape[1]), (column, image.shape[2])))
    r, c = min(int(row), image.shape[1] - 2), min(int(column), image.shape[2] - 2)
    dr, dc = row - r, column - c
    return (
        image[:, r, c] * (1 - dr) * (1 - dc)
        + image[:, r + 1, c] * dr * (1 - dc)
        + image[:, r, c + 1] * (1 - dr) * dc
        + image[:, r + 1, c + 1] * dr * dc
    )


def on_grid_of(image: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """An image resized so that the outer edges stay: pixel by pixel."""
    out = np.zeros((image.shape[0], *size))
    for r in range(size[0]):
        for c in range(size[1]):
            out[:, r, c] = at(
                image, (r + 0.5) * image.shape[1] / size[0] - 0.5, (c + 0.5) * image.shape[2] / size[1] - 0.5
            )
    return out


# --- CSD U-Net -------------------------------------------------------------------------------------------------------


def test_center_surround_is_equation_6_term_by_term() -> None:
    channels, sizes = [2, 3, 4, 5], [(16, 24), (8, 12), (4, 6), (2, 3)]
    skips = CenterSurround(channels).double()
    maps = [torch.randn(1, n, *size, dtype=torch.float64) for n, size in zip(channels, sizes, strict=True)]
    found = skips(maps)

    def projected(layer: nn.Module, image: NDArray[np.float64]) -> NDArray[np.float64]:
        weight, bias = (p.detach().numpy() for p in layer.parameters())
        return np.einsum("oc,crk->ork", weight[:, :, 0, 0], image) + bias[:, None, None]

    level = [each[0].numpy() for each in maps]
    csd = []
    for k in range(3):
        total = np.zeros_like(level[k])
        for y in range(k + 1, 4):
            total += np.abs(level[k] - on_grid_of(projected(skips.surround[f"{k}_{y}"], level[y]), sizes[k]))
        csd.append(total)
    for x in range(3):
        expected = csd[x].copy()
        for k in range(x + 1, 3):
            expected += on_grid_of(projected(skips.center[f"{x}_{k}"], csd[k]), sizes[x])
        np.testing.assert_allclose(found[x][0].detach().numpy(), expected, atol=1e-12)


def test_a_map_without_contrast_has_no_center_surround_difference() -> None:
    skips = CenterSurround([2, 2])
    nn.init.dirac_(skips.surround["0_1"].weight)
    nn.init.zeros_(skips.surround["0_1"].bias)
    fine = torch.full((1, 2, 8, 8), 3.0)
    assert torch.equal(skips([fine, fine[..., ::2, ::2]])[0], torch.zeros_like(fine))
    fine[0, 0, 2, 2] = 5.0
    assert skips([fine, torch.full((1, 2, 4, 4), 3.0)])[0].nonzero().tolist() == [[0, 0, 2, 2]]


def test_an_untrained_csd_unet_holds_hemorrhage_for_rare() -> None:
    torch.manual_seed(0)
    network = CSDUNet([8, 16, 32, 64]).eval()
    with torch.inference_mode():
        held = torch.sigmoid(network(torch.randn(4, 1, 64, 64))).mean()
    # About a pixel in twenty; a head that starts at zero says one in two.
    assert 0.01 < held < 0.2


def test_csd_unet_takes_any_size_and_all_of_it_learns() -> None:
    network = CSDUNet([4, 8, 8, 8], dropout=0.1).train()
    logits = network(torch.randn(2, 1, 37, 50))
    assert logits.shape == (2, 1, 37, 50)
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    # Published: three downsamplings, skips S_0 to S_2.
    assert CSDUNet().multiple == 8
    assert len(CSDUNet().up) == 3


def test_weak_target_is_the_hemorrhage_dilated_slice_by_slice() -> None:
    mask = np.random.default_rng(0).random((1, 4, 30, 31)) > 0.99
    found = DilateSlicesd("label", times=3)({"label": torch.as_tensor(mask).float(), "image": 1})
    expected = np.stack([ndimage.binary_dilation(each, np.ones((3, 3)), 3) for each in mask[0]])
    np.testing.assert_array_equal(found["label"][0].numpy() > 0, expected)
    assert torch.equal(dilated(torch.as_tensor(mask), 0) > 0, torch.as_tensor(mask))


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_are_boxes_around_prediction_or_label() -> None:
    label, regions = torch.zeros(2, 1, 20, 24), torch.zeros(2, 1, 20, 24, dtype=torch.bool)
    label[0, 0, 4:7, 3:8] = 1
    label[0, 0, 7, 8] = 1  # by its corner, and one more that only the prediction joins to them
    label[0, 0, 4, 11] = 1
    regions[0, 0, 3:6, 7:13] = True
    regions[0, 0, 15:18, 20:24] = True  # no blood
    first, second = region_targets(label, regions)
    assert first["boxes"].tolist() == [[3, 3, 13, 8], [20, 15, 24, 18]]
    assert first["labels"].tolist() == [1, 0]
    assert torch.equal(first["masks"][0], label[0, 0] > 0)
    assert not first["masks"][1].any()
    assert (second["boxes"].shape, second["labels"].shape, second["masks"].shape) == ((0, 4), (0,), (0, 20, 24))
    # Without the CSD U-Net: the label's own regions.
    plain = region_targets(label)[0]
    assert plain["boxes"].tolist() == [[3, 4, 9, 8], [11, 4, 12, 5]]
    assert plain["labels"].tolist() == [1, 1]


def test_every_region_has_its_own_box_however_many_there_are() -> None:
    """In slices that are not square, where another library merged and misplaced boxes."""
    random_state = np.random.default_rng(0)
    label = torch.from_numpy((random_state.random((4, 1, 32, 75)) > 0.95).astype(np.float32))
    for plane, each in zip(label[:, 0].numpy(), region_targets(label), strict=True):
        assert len(each["boxes"]) > 80
        assert int(each["masks"].sum()) == int(plane.sum())
        for (x0, y0, x1, y1), mask in zip(each["boxes"].tolist(), each["masks"].numpy(), strict=True):
            rows, columns = np.nonzero(mask)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_batch_brings_what_the_frozen_csd_unet_sees() -> None:
    network = PesaRCNN(csd_filters=[4, 4], **SMALL).train()
    image, label = torch.randn(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    batch = RegionBatch(network, threshold=0.5)({"image": image, "label": label}, torch.device("cpu"))
    assert batch[0] is image
    assert batch[3] == {}
    given, regions = batch[2]
    assert given is label
    assert not network.csd.training
    assert regions.dtype == torch.bool
    assert not regions.requires_grad
    assert torch.equal(regions, network.csd(image) >= 0)
    plain = RegionBatch(PesaRCNN(use_csd=False, **SMALL))({"image": image, "label": label}, torch.device("cpu"))
    assert plain[2][1] is None


# --- groups and alignment --------------------------------------------------------------------------------------------


def pyramid(size: int, channels: int = 2) -> dict[str, torch.Tensor]:
    return {str(n): torch.randn(2, channels, size // 2 ** (n + 2), size // 2 ** (n + 2)) for n in range(4)}


def aligned(features: dict[str, torch.Tensor], image: int, box: list[float], grid: int) -> NDArray[np.float64]:
    """RoI align by its definition: 2 x 2 samples a cell, averaged, on the level that the box's size chooses."""
    x0, y0, x1, y1 = box
    level = int(np.clip(np.floor(4 + np.log2(np.sqrt((x1 - x0) * (y1 - y0)) / 224) + 1e-6), 2, 5)) - 2
    scale = 1 / 2 ** (level + 2)
    values = features[str(level)][image].double().numpy()
    high, wide = max((y1 - y0) * scale, 1) / grid, max((x1 - x0) * scale, 1) / grid
    out = np.zeros((values.shape[0], grid, grid))
    for r in range(grid):
        for c in range(grid):
            for a in (0.25, 0.75):
                for b in (0.25, 0.75):
                    out[:, r, c] += at(values, y0 * scale + (r + a) * high, x0 * scale + (c + b) * wide) / 4
    return out


def test_rois_are_grouped_by_height_and_aligned_as_defined() -> None:
    features, sizes = pyramid(512), [(512, 512)] * 2
    boxes = [
        torch.tensor([[10.0, 20, 400, 320], [30, 40, 90, 168], [100, 200, 480, 263.9]]),
        torch.tensor([[5.0, 5, 20, 132.9], [300, 100, 340, 164], [200, 220, 203, 224]]),
    ]
    heights = [300, 128, 63.9, 127.9, 64, 4]
    groups = ScaleAdaptiveAlign([7, 14, 14], [128, 64])(features, boxes, sizes)
    assert [index.tolist() for _, index in groups] == [
        [0, 1, 2, 3, 4, 5],
        [n for n, height in enumerate(heights) if height < 128],
        [n for n, height in enumerate(heights) if height < 64],
    ]
    assert [tuple(maps.shape) for maps, _ in groups] == [(6, 2, 7, 7), (4, 2, 14, 14), (2, 2, 14, 14)]
    flat = [(image, box.tolist()) for image, held in enumerate(boxes) for box in held]
    for (maps, index), grid in zip(groups, (7, 14, 14), strict=True):
        for found, n in zip(maps, index.tolist(), strict=True):
            np.testing.assert_allclose(found.numpy(), aligned(features, *flat[n], grid), atol=2e-4)


@pytest.mark.parametrize(("sizes", "heights"), [([7, 14], []), ([7, 14, 14], [64, 128]), ([7, 14, 14], [64, 64])])
def test_groups_that_do_not_nest_are_refused(sizes: list[int], heights: list[float]) -> None:
    with pytest.raises(ConfigError, match="in falling order"):
        ScaleAdaptiveAlign(sizes, heights)


def test_masks_of_all_groups_are_added_pixel_by_pixel() -> None:
    masks = MultiScaleMasks(4, [4, 3, 2], "dense", 28)
    maps = [torch.randn(3, 4, 7, 7), torch.randn(2, 4, 14, 14), torch.randn(1, 4, 14, 14)]
    index = [torch.tensor(each) for each in ([0, 1, 2], [1, 2], [2])]
    total = masks(list(zip(maps, index, strict=True)))
    alone = [branch(each) for branch, each in zip(masks.branches, maps, strict=True)]
    large = F.interpolate(alone[0], size=(28, 28), mode="bilinear")[:, 0]
    torch.testing.assert_close(total[0], large[0])
    torch.testing.assert_close(total[1], large[1] + alone[1][0, 0])
    torch.testing.assert_close(total[2], large[2] + alone[1][1, 0] + alone[2][0, 0])
    # A group without RoIs adds nothing, and its network has a gradient all the same.
    nobody = (torch.zeros(0, 4, 14, 14), torch.zeros(0, dtype=torch.long))
    some = masks([(maps[0], index[0]), (maps[1], index[1]), nobody])
    torch.testing.assert_close(some[2], large[2] + alone[1][1, 0])
    some.sum().backward()
    assert all(p.grad is not None for p in masks.parameters())


def test_connections_of_a_mask_network() -> None:
    assert [layer.in_channels for layer in MaskBranch(4, 3, "dense").layers] == [4, 8, 12]
    assert MaskBranch(4, 3, "dense").up.in_channels == 16
    x = torch.randn(2, 4, 7, 7)
    for connections in ("none", "residual"):
        branch = MaskBranch(4, 2, connections)
        expected = x
        for layer in branch.layers:
            expected = F.relu(layer(expected)) + (expected if connections == "residual" else 0)
        torch.testing.assert_close(branch(x), branch.head(F.relu(branch.up(expected))))
        assert branch(x).shape == (2, 1, 14, 14)
    with pytest.raises(ConfigError, match="expected one of none, residual, dense"):
        MaskBranch(4, 2, "sparse")


def test_a_mask_that_is_cut_out_of_its_box_comes_back_to_its_pixels() -> None:
    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[0, 10:24, 12:19] = True
    masks[0, 12, 14] = False
    masks[1, 5, 7] = True  # one pixel
    masks[2, 30:40, 33:40] = True  # at the corner of the slice
    boxes = torch.tensor([[12.0, 10, 19, 24], [7, 5, 8, 6], [33, 30, 40, 40]])
    heads = TwoStage(**SMALL).heads
    found = pasted(heads._cut(masks, boxes) * torch.tensor([1.0, 0.9, 0.8])[:, None, None], boxes, (40, 40))
    assert torch.equal(found >= 0.5, masks.any(dim=0))
    # Bilinear samples inside the box mix in a little of what is around it.
    assert float(found[5, 7]) == pytest.approx(0.9, abs=0.05)
    # Where two instances lie over each other the surer one counts; none at all leaves zeros.
    twice = pasted(torch.stack([torch.full((28, 28), 0.3), torch.full((28, 28), 0.6)]), boxes[[0, 0]], (40, 40))
    assert float(twice.max()) == pytest.approx(0.6)
    assert not pasted(torch.zeros(0, 28, 28), torch.zeros(0, 4), (40, 40)).any()


def test_expanded_boxes_grow_about_their_centre_and_stay_in_the_slice() -> None:
    boxes = torch.tensor([[10.0, 10, 20, 14], [0, 0, 8, 8]])
    assert expanded(boxes, 1.5, (40, 30)).tolist() == [[7.5, 9, 22.5, 15], [0, 0, 10, 10]]
    assert torch.equal(expanded(boxes, 1.0, (40, 30)), boxes)
    with pytest.raises(ConfigError, match="expected 1 or more"):
        TwoStage(**SMALL, roi_expansion=0.9)


def test_rois_are_sampled_one_to_two() -> None:
    heads = TwoStage(**SMALL).heads
    near = torch.tensor([[10.0, 10, 30, 30]]).repeat(200, 1) + torch.rand(200, 4)
    far = torch.tensor([[40.0, 40, 60, 60]]).repeat(200, 1) + torch.rand(200, 4)
    targets = region_targets(F.pad(torch.ones(1, 1, 20, 20), (10, 34, 10, 34)))
    _, _, classes, _ = heads.select_training_samples([torch.cat([near, far])], targets)
    assert torch.bincount(classes[0]).tolist() == [67, 33]
    # The target itself is one of the positives.
    _, _, classes, _ = heads.select_training_samples([torch.cat([near[:14], far])], targets)
    assert torch.bincount(classes[0]).tolist() == [30, 15]


def test_a_slice_with_few_positive_rois_gives_24() -> None:
    heads = TwoStage(**SMALL).heads
    far = torch.tensor([[40.0, 40, 60, 60]]).repeat(200, 1) + torch.rand(200, 4)
    for blood, drawn in ((1.0, [23, 1]), (0.0, [24])):
        targets = region_targets(F.pad(torch.full((1, 1, 20, 20), blood), (10, 34, 10, 34)))
        _, _, classes, _ = heads.select_training_samples([far], targets)
        assert torch.bincount(classes[0]).tolist() == drawn


def test_box_loss_is_equations_2_and_3() -> None:
    network = TwoStage(**SMALL).train()
    heads = network.heads
    label = F.pad(torch.ones(1, 1, 20, 20), (10, 34, 10, 34))
    _, features = network._features(label)
    proposals, targets = [torch.tensor([[8.0, 9, 33, 30]])], region_targets(label)
    nn.init.zeros_(heads.box_predictor.bbox_pred.weight)
    nn.init.zeros_(heads.box_predictor.bbox_pred.bias)
    _, box, _ = heads.losses(features, proposals, [(64, 64)], targets)
    # Two RoIs, the proposal and the target itself; weights 10, 10, 5, 5 of the coder; t is 0.
    v = np.array([10 * (20 - 20.5) / 25, 10 * (20 - 19.5) / 21, 5 * np.log(20 / 25), 5 * np.log(20 / 21)])
    assert box.item() == pytest.approx(np.where(np.abs(v) < 1, 0.5 * v**2, np.abs(v) - 0.5).sum() / 2, rel=1e-4)


# --- inference -------------------------------------------------------------------------------------------------------


def test_slices_go_one_by_one_and_edema_only_where_it_is_asked_for() -> None:
    network = PesaRCNN(csd_filters=[4, 4], **SMALL).eval()
    head = MetaTensor(torch.randn(1, 1, 5, 33, 45))
    one, three = (EngineInferer(InstanceInferer(n), amp="off") for n in (1, 3))
    found = one(head, network)
    assert isinstance(found, MetaTensor)
    assert found.shape == head.shape
    assert 0 < float(found.max()) <= 1
    torch.testing.assert_close(three(head, network).as_tensor(), found.as_tensor())
    torch.testing.assert_close(found[0, 0, 3].as_tensor(), network(head[:, :, 3].as_tensor())[0, 1].detach())
    assert one.surroundings is None
    asked = EngineInferer(InstanceInferer(2, edema_estimate=True), amp="off")
    asked(head, network)
    expected = torch.sigmoid(network.csd(head[0].movedim(0, 1).as_tensor()))[:, 0]
    torch.testing.assert_close(asked.surroundings[0, 0], expected.detach())
    with pytest.raises(ConfigError, match="no CSD U-Net"):
        asked(head, PesaRCNN(use_csd=False, **SMALL).eval())


def test_openvino_is_refused() -> None:
    network = PesaRCNN(use_csd=False, **SMALL).eval()
    with pytest.raises(ConfigError, match="PesaRCNN runs in PyTorch only"):
        EngineInferer(InstanceInferer(), engine="openvino")(torch.zeros(1, 1, 2, 32, 32), network)


# --- group heights ---------------------------------------------------------------------------------------------------


def test_heights_part_the_bleeds_into_equal_groups() -> None:
    heights = np.random.default_rng(0).permutation(np.arange(1.0, 13.0))
    found = equal_count_heights(heights, 3)
    assert found == [9.0, 5.0]
    assert [int((heights < h).sum()) for h in found] == [8, 4]
    assert equal_count_heights(heights, 1) == []
    with pytest.raises(ManifestError, match="expected 2 different ones"):
        equal_count_heights(np.full(9, 4.0), 3)


# --- training in order, and what comes of it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases"), "train train train val test")


def words(cases: Path, out: Path, *more: str) -> Settings:
    given = ["bundle=pesa_rcnn", f"data={cases}", f"out={out}", "preset=tiny", "device=cpu", "tracking=false"]
    return Settings.of([*given, "csd_epochs=3", "epochs=2", "seed=3", *more])


@pytest.fixture(scope="module")
def trained(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert commands.train(words(cases, out)) == 0
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / "model.pt", weights_only=True)


def test_the_csd_unet_is_trained_first_and_frozen(trained: Path) -> None:
    alone, whole = weights_of(trained / "coarse"), weights_of(trained / "bundle")
    assert all(torch.equal(whole[f"csd.{name}"], value) for name, value in alone.items())
    assert {name.split(".")[0] for name in whole} == {"csd", "detector"}
    last = torch.load(trained / "training_state.pt", weights_only=True)
    assert all(torch.equal(last["network"][f"csd.{name}"], value) for name, value in alone.items())
    assert (trained / "coarse" / "training_state.pt").stat().st_mtime_ns < (
        trained / "training_state.pt"
    ).stat().st_mtime_ns
    assert torch.load(trained / "coarse" / "training_state.pt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("where", ["in the CSD U-Net", "between", "in the two-stage network"])
def test_a_run_that_was_stopped_goes_on_as_if_undisturbed(
    trained: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if where == "between":
            patch.setattr(csd_training, "with_csd", interrupted)
        else:
            real_epoch = training.ResumableRun.epoch_completed

            def stop(self: Any, engine: Any) -> None:
                real_epoch(self, engine)
                if ("coarse" in str(self.weights)) == (where == "in the CSD U-Net"):
                    raise KeyboardInterrupt

            patch.setattr(training.ResumableRun, "epoch_completed", stop)
        with pytest.raises(KeyboardInterrupt):
            commands.train(words(cases, out))
    assert (out / "coarse" / "done.json").is_file() == (where != "in the CSD U-Net")
    assert commands.train(words(cases, out, "resume=true")) == 0
    for folder in ("bundle", "coarse"):
        assert sha256_of(out / folder / "models" / "model.pt") == sha256_of(trained / folder / "models" / "model.pt")
    ours, theirs = (torch.load(f / "training_state.pt", weights_only=True)["network"] for f in (out, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_without_resume_nothing_of_an_old_csd_unet_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "done.json").write_text(json.dumps({}))
    monkeypatch.setattr(csd_training, "train_stage", interrupted)
    given = {"bundle_root": "", "manifest": "", "fold": None, "seed": 0, "device": "cpu", "folder": str(tmp_path)}
    assert train_csd(**given, resume=False, wanted=False) is None
    with pytest.raises(KeyboardInterrupt):
        train_csd(**given, resume=False, wanted=True)
    assert not (tmp_path / "done.json").exists()


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_lesions_have_scores_and_edema_is_an_estimate(trained: Path, cases: Path, tmp_path: Path) -> None:
    scans = [cases.with_name(f"image-{n}.nii.gz") for n in (0, 3)]
    given = [f"bundle={trained / 'bundle'}", "threshold=0.05", "pictures=false", "html=false"]
    settings = Settings.of([*given, "edema_estimate=true"])
    assert commands.segment(scans, tmp_path, tmp_path / "volumes.csv", settings) == 0
    bundle = Bundle(trained / "bundle")
    segmenter = Segmenter(bundle, bundle.config("inference") | {"threshold": 0.05, "edema_estimate": True})
    lesions, rows = table(tmp_path / "lesions.csv"), table(tmp_path / "volumes.csv")
    assert {lesion["case_id"] for lesion in lesions} == {"image-0", "image-3"}
    for scan, row in zip(scans, rows, strict=True):
        case_id = scan.name.partition(".")[0]
        prediction = segmenter.segment(segmenter.read(commands.CaseRecord(case_id, scan)))
        mask = np.asarray(nib.load(tmp_path / scan.name).dataobj) > 0
        # Our own count of each lesion's highest probability; the order in the table is by volume.
        numbered, n = ndimage.label(mask, np.ones((3, 3, 3)))
        highest = ndimage.maximum(prediction.probability, numbered, range(1, n + 1))
        scores = [float(lesion["score"]) for lesion in lesions if lesion["case_id"] == case_id]
        assert sorted(scores) == pytest.approx(sorted(highest), abs=1e-6)
        edema = np.asarray(nib.load(tmp_path / "edema_estimate" / scan.name).dataobj) > 0
        assert not (edema & mask).any()
        voxel_ml = abs(np.linalg.det(nib.load(scan).affine[:3, :3])) / 1000
        assert float(row["edema_estimate_ml"]) == pytest.approx(edema.sum() * voxel_ml, abs=1e-5)
    several = Settings.of([f"bundle={trained / 'bundle'},{trained / 'bundle'}/", *given[1:], "edema_estimate=true"])
    with pytest.raises(ConfigError, match="an ensemble estimates no edema"):
        commands.segment(scans, tmp_path / "two", tmp_path / "two" / "volumes.csv", several)
    # Not asked for, there is none.
    assert commands.segment(scans[:1], tmp_path / "no", tmp_path / "no" / "volumes.csv", Settings.of(given)) == 0
    assert not (tmp_path / "no" / "edema_estimate").exists()
    assert "edema_estimate_ml" not in table(tmp_path / "no" / "volumes.csv")[0]


def test_plan_writes_group_heights_for_training(cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "heights.yaml"
    given = ["bundle=pesa_rcnn", f"data={cases}", "preset=tiny", "spacing_mm=[10,2,2]"]
    assert commands.plan(Settings.of([*given, f"out={out}"]), 8.0) == 0
    heights = region_heights(cases, [10, 2, 2])
    assert read_yaml(out) == {"group_heights": equal_count_heights(heights, 3)}
    # Bleeds of 14 to 24 mm radius on pixels of 2 mm.
    assert 14 <= heights.max() <= 24
    with pytest.raises(ConfigError, match="plan takes"):
        commands.plan(Settings.of([*given, "epochs=3", f"out={tmp_path / 'other.yaml'}"]), 8.0)
