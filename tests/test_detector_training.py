"""The detector trained for real, tiny, on made-up heads: resumed to the bit, evaluated, run by MONAI, searched over."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from training_cases import write_cases

from ich_pipeline import bundles, cli, commands, tuning
from ich_pipeline.box_training import WeightAverage
from ich_pipeline.bundles import Bundle, resource
from ich_pipeline.commands import Settings
from ich_pipeline.detection import ANY, read_boxes
from ich_pipeline.detector import detect, load_detector
from ich_pipeline.errors import ConfigError, IchError, ManifestError, own_errors
from ich_pipeline.files import sha256_of
from ich_pipeline.networks.faster_rcnn import FasterRCNN
from ich_pipeline.reading import read_scan

SYSTEM = str(resource("bundles") / "yolov5_transdeeplab")
TINY = ("preset=tiny", "n_classes=0", "device=cpu", "tracking=false", "average_ramp=2")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with boxes of its labels, which training is to need no more: the copy has none."""
    manifest = write_cases(tmp_path_factory.mktemp("cases"), "train train train val test")
    cli.data_boxes(manifest)
    rows = list(csv.DictReader(manifest.open(newline="")))
    with manifest.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(row | {"label": ""} for row in rows)
    return manifest


def words(cases: Path, out: Path, *more: str) -> list[str]:
    given = [f"bundle={SYSTEM}", "stage=detector", f"data={cases}", f"out={out}", *TINY, *more]
    return list({word.partition("=")[0]: word for word in given}.values())


def train(cases: Path, out: Path, *more: str) -> Path:
    assert commands.train(Settings.of(words(cases, out, *more))) == 0
    return out


@pytest.fixture(scope="module")
def run(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(cases, tmp_path_factory.mktemp("run") / "run")


def state_of(out: Path) -> dict[str, Any]:
    return torch.load(out / "training_state.pt", weights_only=True)


# --- the stage ------------------------------------------------------------------------------------------------------


def test_a_stage_is_no_system_of_its_own() -> None:
    assert not {"detector", "yolov5_transdeeplab_detector"} & set(bundles.all_bundles())
    stage = Settings.of([f"bundle={SYSTEM}", "stage=detector"]).bundle()
    assert (stage.path.name, stage.finds_boxes) == ("detector", True)
    assert not bundles.find_bundle("cascade3d").finds_boxes


def test_a_stage_is_found_by_the_name_of_its_system() -> None:
    assert Settings.of(["bundle=yolov5_transdeeplab", "stage=detector"]).bundle().path.parent.name == Path(SYSTEM).name


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        (SYSTEM, "detecter", "no stage 'detecter'; did you mean 'detector'"),
        ("cascade3d", "detector", "cascade3d has no stage 'detector'; known: none"),
        ("cascade4d", "detector", "no bundle 'cascade4d'; did you mean 'cascade3d'"),
    ],
)
def test_a_stage_that_is_not_there_is_refused(name: str, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.of([f"bundle={name}", f"stage={stage}"]).bundle()


@pytest.mark.parametrize("variant", [None, "fasterrcnn"])
def test_training_and_inference_share_what_both_have(variant: str | None) -> None:
    stage = Settings.of([f"bundle={SYSTEM}", "stage=detector"]).bundle()
    configs = bundles.resolve(stage, ("inference", "train"), {"variant": variant} if variant else {}, None)
    train_config, inference = configs["train"], configs["inference"]
    only_losses = {"box_weight", "objectness_weight", "subtype_weight"}
    # `network` and `run` differ by what they are for.
    shared = (set(train_config) & set(inference)) - {"network", "run"}
    assert {"size", "image_size", "windows_hu", "nms_iou", "network_def"} <= shared
    for key in shared - {"network_def"}:
        assert train_config[key] == inference[key], key
    left = {key: value for key, value in train_config["network_def"].items() if key not in only_losses}
    assert left == inference["network_def"]


def test_what_may_vary_is_there_and_holds_the_default() -> None:
    stage = Settings.of([f"bundle={SYSTEM}", "stage=detector"]).bundle()
    config = stage.config("train")
    for key, each in tuning.read_space(stage.config("tuning")).items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        assert each.low <= value <= each.high, key


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_detector(run: Path, cases: Path) -> None:
    bundle = Bundle(run / "bundle")
    assert bundle.weights is not None
    assert bundle.metadata["weights_sha256"] == sha256_of(bundle.weights)
    assert bundle.metadata["name"] == "yolov5_transdeeplab_detector"
    assert state_of(run)["epoch"] == 2
    report = json.loads((run / "run.json").read_text())
    assert (report["exit_status"], report["bundle"]["name"]) == (0, "yolov5_transdeeplab_detector")
    # The best weights are averages, and their anchors those of the training boxes.
    kept, state = torch.load(bundle.weights, weights_only=True), state_of(run)
    assert set(kept) == set(state["average"]) == set(state["network"])
    assert torch.equal(kept["anchors_px"], state["network"]["anchors_px"])
    boxes = [box for box in read_boxes(cases.with_name("boxes.csv")) if box.case_id in ("case-0", "case-2")]
    longest = max(max(box.i1 - box.i0, box.j1 - box.j0) for box in boxes)
    assert 2 <= kept["anchors_px"].min() < kept["anchors_px"].max() < 2 * longest * 64 / 50


def test_a_stopped_run_goes_on_as_if_undisturbed(
    run: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_in_epoch_2(average: WeightAverage, engine: Any, update: Any = WeightAverage.update) -> None:
        if engine.state.iteration == 6:
            raise KeyboardInterrupt
        update(average, engine)

    with monkeypatch.context() as patched:
        patched.setattr(WeightAverage, "update", stop_in_epoch_2)
        with pytest.raises(KeyboardInterrupt):
            train(cases, tmp_path / "run")
    assert state_of(tmp_path / "run")["epoch"] == 1
    train(cases, tmp_path / "run", "resume=true")
    one, other = state_of(tmp_path / "run"), state_of(run)
    for part in ("network", "average"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in other[part]), part
    assert one["best_metric"] == other["best_metric"]
    assert sha256_of(tmp_path / "run/bundle/models/model.pt") == sha256_of(run / "bundle/models/model.pt")


def test_the_average_is_that_of_its_formula() -> None:
    network = torch.nn.BatchNorm1d(1)
    handler = WeightAverage(network, decay=0.9, ramp=1.0)

    class Engine:
        class state:  # noqa: N801
            iteration = 2

    network.weight.data.fill_(3.0)
    network.num_batches_tracked.fill_(7)
    handler.update(Engine())  # type: ignore[arg-type]
    kept = 0.9 * (1 - torch.exp(torch.tensor(-2.0)).item())
    assert handler.average.weight.item() == pytest.approx(kept * 1 + (1 - kept) * 3)
    assert handler.average.num_batches_tracked.item() == 7
    assert not handler.average.weight.requires_grad


def test_faster_rcnn_takes_its_place(cases: Path, tmp_path: Path) -> None:
    more = ("variant=fasterrcnn", "network_def.backbone=mobilenet", "epochs=1", "iterations=1")
    given = [word for word in words(cases, tmp_path / "run", *more) if not word.startswith("n_classes")]
    assert commands.train(Settings.of(given)) == 0
    network = load_detector(tmp_path / "run/bundle", "cpu")
    assert isinstance(network, FasterRCNN)
    assert Bundle(tmp_path / "run/bundle").name == "yolov5_transdeeplab_detector_fasterrcnn"


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (None, ManifestError, "no such table of boxes.*data boxes"),
        ("case_id,slice,subtype,i0,j0,i1,j1\ncase-99,1,any,1,1,5,5\n", ManifestError, "no box of the 3 training cases"),
        (
            "case_id,slice,subtype,i0,j0,i1,j1\ncase-0,99,any,1,1,5,5\n",
            ManifestError,
            "case-0: box in slice 99, expected",
        ),
    ],
)
def test_boxes_that_cannot_be_used_are_refused(
    cases: Path, tmp_path: Path, table: str | None, error: type[IchError], message: str
) -> None:
    path = tmp_path / "table.csv"
    if table:
        path.write_text(table)
    # MONAI wraps what is raised while it builds a config; the command line unwraps it.
    with pytest.raises(error, match=message), own_errors():
        train(cases, tmp_path / "run", f"boxes={path}")


# --- what it is for -------------------------------------------------------------------------------------------------


def test_evaluation_scores_the_boxes(
    run: Path, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"bundle={run / 'bundle'}", f"data={cases}", f"out={tmp_path}", "device=cpu", "tracking=false"]
    assert commands.evaluate(Settings.of([*given, "validation_score=0.001"])) == 0
    rows = list(csv.DictReader((tmp_path / "box_scores.csv").open(newline="")))
    label = [box for box in read_boxes(cases.with_name("boxes.csv")) if box.case_id == "case-4"]
    found = read_boxes(tmp_path / "boxes.csv")
    assert {(row["boxes"], row["class"]) for row in rows} == {(b, c) for b in ("all", "visible") for c in (ANY, "mean")}
    assert (rows[0]["n_label"], rows[0]["n_pred"]) == (str(len(label)), str(len(found)))
    assert found
    assert {box.case_id for box in found} == {"case-4"}
    assert "Visible: both sides of the label's box at least 5 mm" in capsys.readouterr().out
    report = json.loads((tmp_path / "run.json").read_text())
    assert (report["exit_status"], {"start", "read", "detect"} <= set(report["stages"])) == (0, True)


def test_monai_runs_the_inference_and_gives_the_same_boxes(run: Path, cases: Path, tmp_path: Path) -> None:
    scan = cases.parent / "image-4.nii.gz"
    bundle = Bundle(run / "bundle")
    changes = {"scans": [str(scan)], "output_dir": str(tmp_path), "score_threshold": 0.001, "device": "cpu"}
    parser = ConfigParser({**bundle.config("inference"), **changes, "bundle_root": str(bundle.path)})
    [table] = parser.get_parsed_content("run")
    network = load_detector(bundle.path, "cpu", {"score_threshold": 0.001})
    by_slice = detect(network, read_scan(scan))
    assert read_boxes(table) == [box for boxes in by_slice for box in boxes]
    assert len(by_slice) == 16
    assert any(by_slice)


def test_a_detector_makes_no_mask(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds boxes and makes no mask"):
        commands.segment([tmp_path], tmp_path, tmp_path / "volumes.csv", Settings.of([f"bundle={run / 'bundle'}"]))
    with pytest.raises(ConfigError, match="one at a time"):
        commands.evaluate(Settings.of([f"bundle={run / 'bundle'},cascade3d"]))


def test_a_network_that_finds_no_boxes_is_no_detector() -> None:
    with pytest.raises(ConfigError, match="expected a detector of boxes"):
        load_detector("unet3d", "cpu")


# --- search ---------------------------------------------------------------------------------------------------------


def test_a_search_trains_and_nests_its_runs(cases: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    more = ("tracking=true", f"tracking_uri={uri}", "epochs=1", "iterations=1", "learning_rate=0.001")
    for trials in (1, 2):  # the second call goes on
        assert commands.tune(Settings.of(words(cases, tmp_path / "out", *more)), trials) == 0
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["tune yolov5_transdeeplab_detector"]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert sorted(run.info.run_name for run in nested) == ["trial_0000", "trial_0001"]
    assert all("train/loss" in run.data.metrics for run in nested)
    assert list(client.search_registered_models()) == []
    rows = list(csv.DictReader((tmp_path / "out/tuning.csv").open(newline="")))
    assert [row["trial"] for row in rows] == ["0", "1"]
    assert "learning_rate" not in rows[0]  # what is given does not vary
    used = Bundle(tmp_path / "out/trial_0001/bundle").config("train")
    assert used["variation"]["scale"] == pytest.approx(float(rows[1]["variation.scale"]))


def test_a_bundle_that_says_nothing_of_what_may_vary_is_not_searched() -> None:
    with pytest.raises(ConfigError, match=r"no configs/tuning\.yaml"):
        commands.tune(Settings.of(["bundle=unet3d"]), 1)
