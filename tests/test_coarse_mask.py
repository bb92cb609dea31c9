"""The coarse stage and its masks: what the networks are, that no mask is by a network that knew the case, resuming."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional as F
from training_cases import write_cases

from ich_pipeline import coarse_training, commands, training
from ich_pipeline.bundles import Bundle
from ich_pipeline.coarse_mask import CoarseGridd, CoarseInferer, CoarseMaskInferer
from ich_pipeline.coarse_training import load_cases_with_masks, load_fold, records_with_folds
from ich_pipeline.commands import Settings
from ich_pipeline.engines import EngineInferer, load_network
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.files import sha256_of
from ich_pipeline.manifest import read_manifest, write_manifest
from ich_pipeline.networks.coarse_mask_unet import CoarseEnsemble, CoarseMaskUNet, coarse_probability, to_coarse_grid
from ich_pipeline.networks.dense_unet import DenseUNet
from ich_pipeline.networks.planned_unet import PlannedLoss, PlannedUNet
from ich_pipeline.reading import read_mask

FINE = {
    "filters": [4, 4, 4],
    "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "supervised": 1,
}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- networks --------------------------------------------------------------------------------------------------------


def test_dense_encoder_is_the_published_one() -> None:
    network = DenseUNet()
    assert [len(block) for block in network.blocks] == [6, 6, 6, 6, 6]
    for block, transition in zip(network.blocks, network.transitions, strict=True):
        for layer in block:
            kinds = [type(part) for part in layer]
            assert kinds == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
            assert [layer[2].kernel_size, layer[5].kernel_size] == [(1, 1), (3, 3)]
        assert [type(part) for part in transition] == [nn.BatchNorm2d, nn.Conv2d, nn.AvgPool2d]
        assert (transition[1].kernel_size, transition[2].kernel_size) == ((1, 1), 2)


def test_dense_layers_see_all_before_them_and_the_decoder_all_levels() -> None:
    network = DenseUNet(growth=4).eval()
    seen: list[tuple[int, int]] = []
    for block in network.blocks:
        for layer in block:
            layer[2].register_forward_hook(lambda _, given, out: seen.append((given[0].shape[1], given[0].shape[2])))
    logits = network(torch.randn(2, 1, 64, 96))
    assert logits.shape == (2, 1, 64, 96)
    # 2 x 4 channels first, 4 more a layer, half of them after each of five blocks; rows are halved with them.
    assert [n for n, _ in seen[:7]] == [8, 12, 16, 20, 24, 28, 16]
    assert sorted({rows for _, rows in seen}, reverse=True) == [64, 32, 16, 8, 4]
    # Untrained it holds one pixel in a hundred for hemorrhage.
    assert torch.sigmoid(network.head.bias).item() == pytest.approx(0.01)


def test_planned_loss_halves_from_level_to_level_and_adds_up_to_one() -> None:
    label = torch.zeros(1, 1, 4, 8, 8)
    label[..., 4:] = 1
    levels = [torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 2, 2, 4, 4), torch.zeros(1, 2, 2, 2, 2)]
    given: list[torch.Tensor] = []

    def loss(logits: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        given.append(reduced)
        return torch.tensor(10.0 ** len(given))

    # (10 + 100 / 2 + 1000 / 4) / (1 + 1/2 + 1/4)
    assert float(PlannedLoss(loss)(levels, label)) == pytest.approx(310 / 1.75)
    assert [tuple(g.shape) for g in given] == [tuple(level[:, :1].shape) for level in levels]
    assert [float(g.mean()) for g in given] == [0.5, 0.5, 0.5]


def test_supervised_levels_are_the_upper_ones_at_their_own_size() -> None:
    network = PlannedUNet(
        **{**FINE, "filters": [4] * 4, "kernels": [[3, 3, 3]] * 4, "strides": [[1] * 3] + [[2] * 3] * 3}
    )
    levels = network.train()(torch.randn(1, 1, 16, 16, 16))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 16, 16), (8, 8, 8)]
    assert network.eval()(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


# --- the way to the coarse grid and back -----------------------------------------------------------------------------


def test_coarse_grid_is_linear_from_nought_to_one() -> None:
    ramp = torch.linspace(-3.0, 5.0, 16).expand(1, 1, 4, 8, 16)
    coarse = to_coarse_grid(ramp, (4, 8, 8))
    assert (float(coarse.min()), float(coarse.max())) == (0.0, 1.0)
    torch.testing.assert_close(coarse[0, 0, 0, 0], torch.linspace(0, 1, 8))
    # Heads of one batch are scaled each for itself, and one without contrast is 0, not NaN.
    both = to_coarse_grid(torch.cat([ramp, 7 + 0 * ramp]), (4, 8, 8))
    torch.testing.assert_close(both[:1], coarse)
    assert torch.equal(both[1], torch.zeros(1, 4, 8, 8))


def test_training_and_inference_take_a_head_to_the_same_coarse_grid() -> None:
    image, label = torch.randn(1, 6, 20, 24), (torch.rand(1, 6, 20, 24) > 0.5).float()
    case = CoarseGridd(["image", "label"], (4, 16, 16))({"image": image, "label": label, "other": 1})
    assert torch.equal(case["image"], to_coarse_grid(image[None], (4, 16, 16))[0])
    assert set(case["label"].unique().tolist()) <= {0.0, 1.0}
    assert case["label"].shape == (1, 4, 16, 16)


def test_slices_are_taken_one_by_one_and_stacked() -> None:
    image = torch.rand(1, 1, 5, 40, 36)
    given: list[torch.Tensor] = []

    def stage(slices: torch.Tensor) -> torch.Tensor:
        given.append(slices)
        return slices

    found = coarse_probability(image, stage, (8, 32, 32))
    assert [tuple(g.shape) for g in given] == [(8, 1, 32, 32)]
    torch.testing.assert_close(given[0][:, 0], to_coarse_grid(image, (8, 32, 32))[0, 0])
    expected = F.interpolate(to_coarse_grid(image, (8, 32, 32)), size=(5, 40, 36), mode="trilinear")
    torch.testing.assert_close(found, expected)


def test_ensemble_averages_probabilities() -> None:
    ensemble = CoarseEnsemble(2, [1, 1], 2).eval()
    for network, logit in zip(ensemble.networks, (-1.0, 3.0), strict=True):
        nn.init.zeros_(network.head.weight)
        nn.init.constant_(network.head.bias, logit)
    mean = (1 / (1 + math.exp(1)) + 1 / (1 + math.exp(-3))) / 2
    torch.testing.assert_close(ensemble(torch.rand(3, 1, 8, 8)), torch.full((3, 1, 8, 8), mean))


class Oracle(CoarseMaskUNet):
    """Bright is hemorrhage to the coarse stage; to the fine stage what the coarse mask says."""

    def __init__(self) -> None:
        super().__init__(**FINE, coarse_folds=1, coarse_layers=[1, 1], coarse_growth=2, coarse_size=(6, 24, 24))
        self.coarse_stage = Recorder(lambda slices: (slices > 0.5).float())
        self.fine_stage = Recorder(lambda windows: torch.cat([0 * windows[:, 1:], 20 * windows[:, 1:] - 10], dim=1))


class Recorder(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.given = answer, []

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.given.append(given)
        return self.answer(given)


def test_inferer_runs_each_stage_on_its_own_grid() -> None:
    network = Oracle().eval()
    image = torch.zeros(1, 1, 6, 48, 48)
    image[..., 2:4, 12:24, 12:36] = 4.0
    inferer = EngineInferer(CoarseMaskInferer((4, 32, 32), overlap=0.25), amp="off")
    found = inferer(MetaTensor(image), network)
    assert isinstance(found, MetaTensor)
    assert found.shape == image.shape
    assert torch.equal(found.as_tensor() > 0.5, image > 0)
    assert torch.equal(inferer.regions, image > 0)
    assert {tuple(g.shape) for g in network.coarse_stage.given} == {(6, 1, 24, 24)}
    assert {tuple(g.shape[1:]) for g in network.fine_stage.given} == {(2, 4, 32, 32)}
    # A mask that comes with the image is taken as it is, and the coarse stage is not asked.
    network.coarse_stage.given.clear()
    given = torch.cat([image, (image > 0).roll(8, dims=3).float()], dim=1)
    assert torch.equal(inferer(given, network) > 0.5, given[:, 1:] > 0.5)
    assert network.coarse_stage.given == []


# --- folds -----------------------------------------------------------------------------------------------------------


def manifest_with(folder: Path, cases: Path, **columns: list[Any]) -> Path:
    """The manifest again with other columns, beside the first."""
    records = read_manifest(cases)
    changed = [
        replace(record, **{name: values[n] for name, values in columns.items()}) for n, record in enumerate(records)
    ]
    write_manifest(cases.with_name("changed.csv"), changed)
    return cases.with_name("changed.csv")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases"), "train train train val test")


def test_folds_are_drawn_by_patient_and_leave_test_cases_out(cases: Path, tmp_path: Path) -> None:
    patients = ["anna", "bert", "anna", "carl", "dora"]
    split = ["train", "train", "train", "val", "test"]
    manifest = manifest_with(tmp_path, cases, patient_id=patients, split=split)
    records = records_with_folds(manifest, 3, seed=0)
    assert [r.case_id for r in records] == ["case-0", "case-1", "case-2", "case-3"]
    assert sorted({r.fold for r in records}) == [0, 1, 2]
    assert records[0].fold == records[2].fold
    held_out = [item["image"] for n in range(3) for item in load_fold(manifest, n, 3, seed=0)["val"]]
    assert sorted(held_out) == sorted(str(r.image) for r in records)
    with pytest.raises(ConfigError, match="5 folds for 3 patients"):
        records_with_folds(manifest, 5, seed=0)


@pytest.mark.parametrize(
    ("folds", "patients", "reason"),
    [
        ([0, 1, None, 1, None], "abcde", "folds none, 0, 1, expected 0 to 1"),
        ([0, 1, 2, 1, None], "abcde", "folds 0, 1, 2, expected 0 to 1"),
        ([0, 1, 1, 0, None], "aabcd", r"patient 'a' is in fold 0 \(case-0\) and 1 \(case-1\)"),
    ],
)
def test_folds_that_are_not_whole_are_refused(
    cases: Path, tmp_path: Path, folds: list[Any], patients: str, reason: str
) -> None:
    manifest = manifest_with(tmp_path, cases, fold=folds, patient_id=list(patients), split=["train"] * 4 + ["test"])
    with pytest.raises(ManifestError, match=reason):
        records_with_folds(manifest, 2, seed=0)


def test_folds_of_the_manifest_are_kept(cases: Path, tmp_path: Path) -> None:
    manifest = manifest_with(tmp_path, cases, fold=[1, 0, 0, 1, None])
    assert [r.fold for r in records_with_folds(manifest, 2, seed=0)] == [1, 0, 0, 1]


def test_two_series_of_one_folder_are_two_cases(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "fold_0").mkdir()
    for name in ("thick", "thin"):
        (tmp_path / f"{name}.nii.gz").touch()
    rows = [
        f"{name},study,{name}.nii.gz,{split},{series}"
        for name, split, series in (("thick", "train", "2"), ("thin", "val", "3"))
    ]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(["case_id,image,label,split,series", *rows]) + "\n")
    items = [item for fold in range(2) for item in load_fold(manifest, fold, 2, seed=0)["val"]]
    assert {Path(item["label"]).name: item["series"] for item in items} == {"thick.nii.gz": "2", "thin.nii.gz": "3"}
    masks = "\n".join(["case_id,mask", "thick,masks/thick.nii.gz", "thin,masks/thin.nii.gz"])
    (tmp_path / "fold_0" / "cases.csv").write_text(masks + "\n")
    found = load_cases_with_masks(manifest, tmp_path)
    assert {case["series"]: Path(case["coarse"]).name for split in found.values() for case in split} == {
        "2": "thick.nii.gz",
        "3": "thin.nii.gz",
    }


# --- training in order -----------------------------------------------------------------------------------------------

# The coarse stage learns a little, so that its masks hold something; low, so that an unsure network shows too.
QUICK = ("coarse_epochs=6", "coarse_iterations=8", "coarse_learning_rate=0.01", "coarse_threshold=0.1", "seed=3")


def words(cases: Path, out: Path, *more: str) -> Settings:
    given = ["bundle=densenet_nnunet", f"data={cases}", f"out={out}", "preset=tiny", "device=cpu", "tracking=false"]
    return Settings.of([*given, *QUICK, *more])


def state_of(out: Path) -> dict[str, Any]:
    return torch.load(out / "training_state.pt", weights_only=True)


@pytest.fixture(scope="module")
def recorded(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, str]]]]:
    """A run, and the training cases of each network in the order of training."""
    out, seen = tmp_path_factory.mktemp("recorded") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        real = training.TrainingCases.__init__

        def recording(self: Any, data: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(list(data))
            real(self, data, *args, **kwargs)

        patch.setattr(training.TrainingCases, "__init__", recording)
        assert commands.train(words(cases, out)) == 0
    return out, seen


def fold_rows(out: Path) -> list[dict[str, str]]:
    return [
        row for file in sorted(out.glob("coarse/fold_*/cases.csv")) for row in csv.DictReader(file.open(newline=""))
    ]


def test_no_coarse_mask_is_by_a_network_that_was_trained_on_its_case(
    recorded: tuple[Path, list[list[dict[str, str]]]], cases: Path
) -> None:
    out, (*coarse, fine) = recorded
    records = {r.case_id: r for r in read_manifest(cases) if r.split != "test"}
    rows = {row["case_id"]: row for row in fold_rows(out)}
    assert rows.keys() == records.keys()
    parser = ConfigParser({**Bundle(out / "bundle").config("inference"), "threshold": 0.1})
    preprocessing = parser.get_parsed_content("preprocessing")
    steps = parser.get_parsed_content("postprocessing").transforms[:-1]
    held, others_differ = [], []
    for case_id, row in rows.items():
        fold, image = int(row["fold"]), str(records[case_id].image)
        # What this fold's network was trained on, as its loop was given it: not this case, and all others.
        trained_on = {item["image"] for item in coarse[fold]}
        assert trained_on == {str(r.image) for r in records.values() if rows[r.case_id]["fold"] != row["fold"]}
        assert image not in trained_on
        # And the file holds the mask of these very weights.
        written = read_mask(out / "coarse" / "masks" / f"{case_id}.nii.gz")[0].values > 0
        by_fold = []
        for n in range(2):
            weights = out / "coarse" / f"fold_{n}" / "models" / "model.pt"
            network = load_network(DenseUNet([2, 2], 4), weights, "cpu")
            data = preprocessing({"image": image})
            data["pred"] = EngineInferer(CoarseInferer((8, 32, 32)), amp="off")(data["image"][None], network)[0]
            for step in steps:
                data = step(data)
            by_fold.append(np.asarray(data["pred"][0]) > 0)
        held.append(bool(written.any()))
        np.testing.assert_array_equal(written, by_fold[fold])
        others_differ.append(bool((written != by_fold[1 - fold]).any()))
        assert row["weights_sha256"] == sha256_of(out / "coarse" / f"fold_{fold}" / "models" / "model.pt")
    assert sum(held) >= 2
    assert sum(others_differ) >= 2
    # The fine stage is given these files.
    assert {item["image"]: item["coarse"] for item in fine} == {
        str(r.image): str((out / "coarse" / "masks" / f"{r.case_id}.nii.gz").resolve())
        for r in records.values()
        if r.split == "train"
    }


def test_the_bundle_holds_the_networks_of_all_folds(recorded: tuple[Path, list[Any]]) -> None:
    out, _ = recorded
    whole = torch.load(out / "bundle" / "models" / "model.pt", weights_only=True)
    for fold in range(2):
        alone = torch.load(out / "coarse" / f"fold_{fold}" / "models" / "model.pt", weights_only=True)
        for name, value in alone.items():
            assert torch.equal(whole[f"coarse_stage.networks.{fold}.{name}"], value)
        metadata = json.loads((out / "coarse" / f"fold_{fold}" / "configs" / "metadata.json").read_text())
        assert metadata["weights_sha256"] == sha256_of(out / "coarse" / f"fold_{fold}" / "models" / "model.pt")


@pytest.mark.parametrize("where", ["in a fold", "between folds", "in the fine stage"])
def test_a_run_that_was_stopped_goes_on_as_if_undisturbed(
    recorded: tuple[Path, list[Any]], cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    undisturbed, out = recorded[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        if where == "in a fold":
            real_epoch = training.ResumableRun.epoch_completed

            def stop(self: Any, engine: Any) -> None:
                real_epoch(self, engine)
                if "fold_1" in str(self.weights) and engine.state.epoch == 2:
                    raise KeyboardInterrupt

            patch.setattr(training.ResumableRun, "epoch_completed", stop)
        elif where == "between folds":
            real = coarse_training._train_fold

            def second(bundle: Path, home: Path, fold: int, *args: Any, **kwargs: Any) -> Any:
                if fold:
                    raise KeyboardInterrupt
                return real(bundle, home, fold, *args, **kwargs)

            patch.setattr(coarse_training, "_train_fold", second)
        else:
            patch.setattr(coarse_training, "with_coarse_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commands.train(words(cases, out))
    first = out / "coarse" / "fold_0" / "models" / "model.pt"
    before = first.stat().st_mtime_ns
    assert commands.train(words(cases, out, "resume=true")) == 0
    assert first.stat().st_mtime_ns == before
    for file in ("bundle/models", *(f"coarse/fold_{n}/models" for n in range(2)), "coarse/masks"):
        assert sha256_of(out / file) == sha256_of(undisturbed / file), file
    ours, theirs = (state_of(folder)["network"] for folder in (out, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_is_begun_anew_takes_nothing_of_the_old_coarse_stage(
    recorded: tuple[Path, list[Any]], cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    (out / "coarse" / "fold_0").mkdir(parents=True)
    (out / "coarse" / "fold_0" / "cases.csv").write_text("case_id,fold,mask,weights_sha256\n")
    monkeypatch.setattr(coarse_training, "_train_fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.train(words(cases, out))
    assert not (out / "coarse" / "fold_0" / "cases.csv").exists()
