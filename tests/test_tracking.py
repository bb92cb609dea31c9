"""Tracking against a real SQLite store and a real MLflow server."""

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow_server import running_server

from ich_pipeline import tracking
from ich_pipeline.errors import ConfigError
from ich_pipeline.privacy import Privacy
from ich_pipeline.tracking import TrackMetrics, current, fetch_bundle, open_tracker, provenance_tags

COLUMNS = [
    *("case_id", "patient_id", "image", "mask", "status", "error", "volume_ml", "dice", "series_uid", "mrn"),
    *("site", "touches_border"),
]


@pytest.fixture(autouse=True)
def _no_tracking_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert "MLFLOW_TRACKING_URI" not in os.environ, "a tracker left MLflow pointing at its server"
    assert mlflow.active_run() is None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder whose database is made by the first test that opens a run; its name has a space."""
    return tmp_path_factory.mktemp("a store")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server with a database and artifacts of its own."""
    with running_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder shaped like a trained bundle; the weights are no pickle, so loading them would fail."""
    folder = tmp_path / "cascade3d"
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text('{"version": "0.1.0"}')
    (folder / "configs" / "inference.yaml").write_text("device: cpu\n")
    (folder / "models" / "model.pt").write_bytes(bytes(range(256)) * 1000)
    (folder / "docs" / "README.md").write_text("# cascade3d\n")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    return folder


def client_of(store: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def artifact(client: Any, run_id: str, path: str) -> str:
    return Path(client.download_artifacts(run_id, path)).read_text()


def write_table(path: Path, *rows: dict[str, object]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_holds_config_metrics_tags_and_finishes(store, monkeypatch):
    monkeypatch.chdir(store)
    config = {"net": {"features": [8, 16], "depth": 3}, "text": "x" * 2000, "many": {f"k{i}": i for i in range(150)}}
    with open_tracker(True, experiment="whole", run_name="first", folder=store) as tracker:
        tracker.log_params(config)
        for epoch in (1, 2):
            tracker.log_metrics({"train/loss": 1 / epoch, "val/dice(mean)": epoch}, step=epoch)
        tracker.set_tags(provenance_tags(seeds={"train": 3}))
    client = client_of(store)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["net.features"] == "[8, 16]"
    assert run.data.params["many.k149"] == "149"
    assert run.data.params["text"].endswith("(of 2000; config.yaml has all)")
    assert yaml.safe_load(artifact(client, tracker.run_id, "config.yaml")) == config
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "train/loss")] == [(1, 1), (2, 0.5)]
    assert run.data.metrics["val/dice_28_mean_29_"] == 2
    assert run.data.tags["seed.train"] == "3"
    assert run.data.tags["mlflow.source.name"] == "ich-pipeline"
    # all of it in the database and the folder beside it
    assert sorted(item.name for item in store.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_an_error_fails_the_run_with_its_reason(store):
    with pytest.raises(ValueError, match="loss"), open_tracker(True, folder=store) as tracker:
        raise ValueError("loss is NaN in epoch 3")
    run = client_of(store).get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"].startswith("ValueError at test_tracking.py:")
    assert run.data.tags["failure"].endswith("loss is NaN in epoch 3")


@pytest.mark.parametrize(
    ("reason", "status"), [(KeyboardInterrupt(), "KILLED"), (SystemExit(0), "FINISHED"), (SystemExit(2), "FAILED")]
)
def test_how_a_run_ends_decides_its_status(store, reason, status):
    with pytest.raises(type(reason)), open_tracker(True, folder=store) as tracker:
        raise reason
    assert client_of(store).get_run(tracker.run_id).info.status == status


def test_the_current_tracker_is_the_open_one(store):
    assert type(current()) is tracking.Tracker
    with open_tracker(True, folder=store) as tracker:
        assert current() is tracker
    assert type(current()) is tracking.Tracker


def test_a_resumed_run_keeps_its_first_parameters_and_tells_what_changed(store):
    with contextlib.suppress(RuntimeError), open_tracker(True, folder=store) as tracker:
        tracker.log_params({"epochs": 10, "lr": 0.1})
        raise RuntimeError("power cut")
    assert client_of(store).get_run(tracker.run_id).data.tags["failure"].endswith("power cut")
    with open_tracker(True, folder=store, resume_run_id=tracker.run_id) as again:
        again.log_params({"epochs": 20, "lr": 0.1, "amp": True})
    client = client_of(store)
    run = client.get_run(tracker.run_id)
    assert again.run_id == tracker.run_id
    assert run.data.params == {"epochs": "10", "lr": "0.1", "amp": "true"}
    assert run.data.tags["changed.epochs"] == "20"
    assert "changed.lr" not in run.data.tags
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags
    assert yaml.safe_load(artifact(client, run.info.run_id, "config-2.yaml"))["epochs"] == 20
    assert yaml.safe_load(artifact(client, run.info.run_id, "config.yaml"))["epochs"] == 10


def test_a_run_that_was_killed_is_resumed_under_its_id(store):
    code = f"""
import sys, time
from pathlib import Path
from ich_pipeline.tracking import open_tracker
with open_tracker(True, folder=Path({str(store)!r}), run_name="killed") as tracker:
    for epoch in (1, 2):
        tracker.log_metrics({{"train/loss": 1.0 / epoch}}, step=epoch)
    print(tracker.run_id, flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        run_id = child.stdout.readline().strip()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    client = client_of(store)
    assert client.get_run(run_id).info.status == "RUNNING"
    with open_tracker(True, folder=store, resume_run_id=run_id) as tracker:
        assert client.get_run(run_id).info.status == "RUNNING"
        tracker.log_metrics({"train/loss": 0.25}, step=3)
    assert tracker.run_id == run_id
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [1, 2, 3]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).info.run_name == "killed"


def test_system_metrics_are_recorded(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    client = client_of(store)
    with open_tracker(True, folder=store) as tracker:
        deadline = time.monotonic() + 20
        while not client.get_run(tracker.run_id).data.metrics and time.monotonic() < deadline:
            time.sleep(0.1)
    metrics = client.get_run(tracker.run_id).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert "system/cpu_utilization_percentage" in metrics


def test_metrics_wait_for_a_server_that_is_away(store, monkeypatch, caplog):
    client = client_of(store)
    with open_tracker(True, folder=store) as tracker:
        with monkeypatch.context() as away:
            away.setattr(tracker._client, "log_batch", _raise(MlflowException("connection refused")))
            tracker.log_metrics({"loss": 3.0}, step=1)
            tracker.log_metrics({"loss": 2.0}, step=2)
        assert "2 metric points wait" in caplog.text
        tracker.log_metrics({"loss": 1.0}, step=3)
        assert [m.value for m in client.get_metric_history(tracker.run_id, "loss")] == [3, 2, 1]


def test_a_server_that_never_comes_back_does_not_undo_the_work(store, monkeypatch, caplog):
    with open_tracker(True, folder=store) as tracker:
        monkeypatch.setattr(tracker._client, "log_batch", _raise(MlflowException("connection refused")))
        tracker.log_metrics({"loss": 3.0, "lr": 0.1}, step=1)
    assert "2 metric points were never sent" in caplog.text


def test_a_metric_that_the_server_refuses_is_an_error(store, monkeypatch):
    refusal = MlflowException.invalid_parameter_value("no such run")
    with open_tracker(True, folder=store) as tracker:
        monkeypatch.setattr(tracker._client, "log_batch", _raise(refusal))
        with pytest.raises(MlflowException, match="no such run"):
            tracker.log_metrics({"loss": 3.0}, step=1)
    assert client_of(store).get_run(tracker.run_id).info.status == "FINISHED"  # ended although its points were refused


def _raise(error: Exception) -> Any:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


# --- where --------------------------------------------------------------------------------------------------------


def test_the_address_is_the_argument_then_the_environment_then_the_folder(tmp_path, monkeypatch):
    assert tracking.resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert tracking.resolve_uri(None, tmp_path) == "http://from-environment"
    assert tracking.resolve_uri("http://given", tmp_path) == "http://given"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


def test_a_server_that_does_not_answer_is_told_soon_and_without_password(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ConfigError, match="no run can be started") as caught:
        open_tracker(True, tracking_uri=address, folder=tmp_path).__enter__()
    assert time.monotonic() - start < 20
    assert "secret" not in str(caught.value)


def test_a_run_or_experiment_that_is_not_there_is_refused(store):
    with pytest.raises(ConfigError, match=f"run {'0' * 32} cannot be resumed"):
        open_tracker(True, folder=store, resume_run_id="0" * 32).__enter__()
    client = client_of(store)
    client.delete_experiment(client.create_experiment("thrown away"))
    with pytest.raises(ConfigError, match="experiment 'thrown away' is deleted"):
        open_tracker(True, folder=store, experiment="thrown away").__enter__()


def test_tracking_off_does_nothing_and_never_imports_mlflow(tmp_path):
    code = f"""
import sys
from pathlib import Path
from ich_pipeline.tracking import TrackMetrics, open_tracker
here = Path({str(tmp_path)!r})
with open_tracker(False, folder=here) as tracker:
    tracker.log_params({{"a": 1}})
    tracker.log_metrics({{"a": 1.0}}, 1)
    tracker.log_artifact(here / "no.png")
    tracker.log_table(here / "no.csv")
    tracker.set_tags({{"a": 1}})
    print(tracker.register_bundle(here, "x", metric_name="dice", metric=1.0), tracker.run_id)
TrackMetrics("train")
print(sorted(name for name in ("mlflow", "torch", "ignite", "monai") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None None\n[]\n"
    assert list(tmp_path.iterdir()) == []


# --- what may leave -------------------------------------------------------------------------------------------------


def test_a_table_leaves_without_identifiers(store, tmp_path):
    row = {"patient_id": "DOE^JOHN", "image": "/scans/DOE.nii.gz", "mask": "m.nii.gz", "status": "ok", "mrn": 991}
    table = write_table(
        tmp_path / "DOE^JOHN.csv",
        {**row, "case_id": "doe^john_scan2", "volume_ml": 12.5, "dice": 0.9, "site": "A", "touches_border": False},
        {"case_id": "other", "status": "failed", "error": "/scans/ROE.nii.gz is no CT", "series_uid": "1.2.3"},
    )
    with open_tracker(True, folder=store, patient_ids=["DOE^JOHN"]) as tracker:
        tracker.log_table(table)
    text = artifact(client_of(store), tracker.run_id, "tables/anon-0001.csv")
    assert text.splitlines() == [
        "case_id,status,volume_ml,dice,touches_border",
        "anon-0001_scan2,ok,12.5,0.9,False",
        "other,failed,,,",
    ]


def test_the_patient_ids_of_a_table_itself_are_replaced_too(tmp_path):
    table = write_table(tmp_path / "t.csv", {"case_id": "P17", "patient_id": "P17"}, {"case_id": "P170"})
    dropped = Privacy().table(table, tmp_path / "clean.csv")
    assert [row["case_id"] for row in csv.DictReader((tmp_path / "clean.csv").open())] == ["anon-0001", "P170"]
    assert {"patient_id", "image", "mask", "error", "series_uid", "mrn"} <= set(dropped)


def test_a_table_without_case_id_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("name,dice\nJohn,0.5\n")
    with pytest.raises(ValueError, match="no column case_id, only name, dice"):
        Privacy().table(tmp_path / "t.csv", tmp_path / "clean.csv")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A-1_best.png", "anon-0002_best.png"),
        ("A-12.png", "A-12.png"),
        ("xA-1.png", "xA-1.png"),
        ("best_a-1.png", "best_anon-0002.png"),
        ("7.A-1", "anon-0001.anon-0002"),
        ("17", "17"),
    ],
)
def test_patient_ids_are_replaced_as_whole_words(name, expected):
    assert Privacy(["A-1", "7", ""]).name(name) == expected


def test_paths_and_identifiers_leave_the_config():
    config = {
        "data": "/data/DOE/manifest.csv",
        "list": [{"image": "scans/P17/ct.nii.gz"}, {"image": "~/x.nii"}],
        "bundle_root": "C:\\Users\\doe",
        "expression": "$print('/home/doe')",
        "patient_id": "P17",
        "address": "http://server:5000/x",
        "lr": 0.1,
        "sum": "$@a / @b",
    }
    assert Privacy(["P17"]).config(config) == {
        "data": "(path withheld)",
        "list": [{"image": "scans/anon-0001/ct.nii.gz"}, {"image": "(path withheld)"}],
        "bundle_root": "(path withheld)",
        "expression": "(path withheld)",
        "address": "http://server:5000/x",
        "lr": 0.1,
        "sum": "$@a / @b",
    }


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("cannot read scans/DOE/ct.nii", False),
        ("cannot read '/a b/c'", False),
        ("C:\\scans\\DOE", False),
        ("CUDA out of memory, see https://pytorch.org/docs/x", True),
    ],
)
def test_an_error_that_names_a_path_is_withheld(message, kept):
    reason = Privacy().reason(RuntimeError(message))
    assert reason.startswith("RuntimeError: ")
    assert (message in reason) is kept
    assert ("withheld" in reason) is not kept


@pytest.mark.parametrize("name", ["scan.nii.gz", "slice.dcm", "volumes.csv", "run.json", "scores.npz"])
def test_scans_tables_and_paths_are_not_artifacts(store, tmp_path, name):
    (tmp_path / name).write_text("x")
    with open_tracker(True, folder=store) as tracker:
        with pytest.raises(ValueError, match="is not sent"):
            tracker.log_artifact(tmp_path / name)
        with pytest.raises(ValueError, match="not a file"):
            tracker.log_artifact(tmp_path)


def test_a_picture_is_sent_under_a_name_without_the_patient(store, tmp_path):
    (tmp_path / "P17_best.png").write_text("pixels")
    with open_tracker(True, folder=store, patient_ids=["P17"]) as tracker:
        tracker.log_artifact(tmp_path / "P17_best.png", "pictures")
    client = client_of(store)
    assert [item.path for item in client.list_artifacts(tracker.run_id, "pictures")] == ["pictures/anon-0001_best.png"]
    assert artifact(client, tracker.run_id, "pictures/anon-0001_best.png") == "pixels"


# --- bundles as registered models ------------------------------------------------------------------------------------


def register(tracker: tracking.Tracker, bundle: Path, metric: float, *, name: str = "ranked", **options: Any) -> str:
    version = tracker.register_bundle(bundle, name, metric_name="dice", metric=metric, **options)
    assert version is not None
    return version


def test_the_champion_is_the_version_that_is_not_worse(store, bundle, caplog):
    client = client_of(store)

    def champion() -> str:
        return str(client.get_model_version_by_alias("ranked", "champion").version)

    with open_tracker(True, folder=store) as tracker:
        assert register(tracker, bundle, float("nan")) == "1"
        assert "champion" not in client.get_registered_model("ranked").aliases
        first = register(tracker, bundle, 0.70)
        assert champion() == first
        register(tracker, bundle, 0.69)
        assert champion() == first
        assert "its dice 0.69 is worse than 0.7 of version 2" in caplog.text
        equal = register(tracker, bundle, 0.70)
        assert champion() == equal
        other = tracker.register_bundle(bundle, "ranked", metric_name="hd95_mm", metric=3.0)
        assert champion() == equal
        assert f"version {equal} was measured by 'dice', this one by 'hd95_mm'" in caplog.text
    version = client.get_model_version("ranked", other)
    assert version.tags["metric"] == "3.0"
    assert version.tags["bundle_sha256"] == tracking.bundle_sha256(bundle)


def test_of_a_distance_the_smaller_is_the_champion(store, bundle):
    client = client_of(store)
    with open_tracker(True, folder=store) as tracker:
        for metric, expected in ((5.0, "1"), (6.0, "1"), (4.0, "3")):
            register(tracker, bundle, metric, name="distances", higher_is_better=False)
            assert str(client.get_model_version_by_alias("distances", "champion").version) == expected


def test_a_version_keeps_its_bytes_when_the_run_registers_another(store, bundle, tmp_path):
    before = contents(bundle)
    with open_tracker(True, folder=store) as tracker:
        register(tracker, bundle, 0.7, name="twice")
        (bundle / "models" / "model.pt").write_bytes(b"better")
        register(tracker, bundle, 0.8, name="twice")
    got = [fetch_bundle(f"models:/twice/{n}", folder=store, cache=tmp_path / "cache") for n in (1, 2)]
    assert contents(got[0]) == before
    assert contents(got[1]) == contents(bundle)


def test_only_a_trained_bundle_is_registered(store, bundle, tmp_path):
    with open_tracker(True, folder=store) as tracker:
        with pytest.raises(ConfigError, match="not a bundle"):
            register(tracker, tmp_path, 0.5)
        (bundle / "models" / "model.pt").unlink()
        with pytest.raises(ConfigError, match="no weights"):
            register(tracker, bundle, 0.5)


def test_a_fetched_bundle_comes_from_the_cache_unless_it_was_changed(store, bundle, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with open_tracker(True, folder=store) as tracker:
        register(tracker, bundle, 0.7, name="cached")
    (bundle / "run.json").write_text("not part of a bundle")
    got = fetch_bundle("models:/cached@champion", folder=store, cache=cache)
    (bundle / "run.json").unlink()
    assert got.parent == cache
    assert contents(got) == contents(bundle)
    with monkeypatch.context() as offline:
        offline.setattr(tracking, "_download", _raise(AssertionError("downloaded again")))
        assert fetch_bundle("models:/cached/1", folder=store, cache=cache) == got
    (got / "models" / "model.pt").write_bytes(b"changed")
    assert fetch_bundle("models:/cached/1", folder=store, cache=cache) == got
    assert contents(got) == contents(bundle)
    run_uri = f"runs:/{tracker.run_id}/bundles/{got.name}"
    assert fetch_bundle(run_uri, folder=store, cache=cache) == got
    assert [item.name for item in cache.iterdir()] == [got.name]


def test_content_that_changed_on_the_server_is_refused(store, bundle, tmp_path):
    with open_tracker(True, folder=store) as tracker:
        register(tracker, bundle, 0.7, name="tampered")
    source = client_of(store).get_model_version_download_uri("tampered", "1")
    Path(mlflow.artifacts.download_artifacts(source), "models", "model.pt").write_bytes(b"other")
    with pytest.raises(ConfigError, match="was registered with"):
        fetch_bundle("models:/tampered/1", folder=store, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_does_not_exist_is_told_with_what_does(store, bundle, tmp_path):
    with open_tracker(True, folder=store) as tracker:
        register(tracker, bundle, 0.7, name="known")
    cases = {
        "models:/known/9": "Versions of known: 1; aliases: @champion = 1",
        "models:/known@best": "aliases: @champion = 1",
        "models:/unknown@champion": "Registered models: .*known",
        "models:/known": "is none of models:/NAME@ALIAS",
        f"runs:/{'0' * 32}/bundles/x": "does not have it",
        f"runs:/{tracker.run_id}/bundles/x": "no bundle could be fetched",
    }
    for uri, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            fetch_bundle(uri, folder=store, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="no tracking database"):
        fetch_bundle("models:/known/1", folder=tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_is_used_through_http_alone(server, bundle, tmp_path):
    table = write_table(tmp_path / "cases.csv", {"case_id": "a", "patient_id": "p", "dice": 0.5})
    (tmp_path / "worst.png").write_bytes(b"pixels")
    with open_tracker(True, tracking_uri=server, experiment="remote", folder=tmp_path) as tracker:
        tracker.log_params({"net": {"depth": 3}})
        tracker.log_metrics({"val/dice": 0.5}, step=1)
        tracker.log_table(table)
        tracker.log_artifact(tmp_path / "worst.png", "pictures")
        version = register(tracker, bundle, 0.5, name="cascade3d")
    client = mlflow.MlflowClient(tracking_uri=server)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert run.data.params == {"net.depth": "3"}
    assert run.data.metrics["val/dice"] == 0.5
    assert artifact(client, tracker.run_id, "tables/cases.csv").splitlines() == ["case_id,status,dice", "a,,0.5"]
    for uri in ("models:/cascade3d@champion", f"models:/cascade3d/{version}"):
        got = fetch_bundle(uri, tracking_uri=server, cache=tmp_path / "cache")
        assert contents(got) == contents(bundle)
    mlflow.set_tracking_uri(server)  # MLflow's own way to fetch it, without this package
    try:
        plain = mlflow.artifacts.download_artifacts("models:/cascade3d@champion", dst_path=str(tmp_path / "plain"))
    finally:
        mlflow.set_tracking_uri(None)
    assert contents(Path(plain)) == contents(bundle)
    assert not (tmp_path / "mlflow.db").exists()
    with pytest.raises(ConfigError, match="Versions of cascade3d: 1; aliases: @champion = 1"):
        fetch_bundle("models:/cascade3d@best", tracking_uri=server, cache=tmp_path / "cache")


# --- the handler in MONAI's engines ---------------------------------------------------------------------------------

TRAINING = """
device: cpu
network: {_target_: torch.nn.Conv3d, in_channels: 1, out_channels: 1, kernel_size: 1}
optimizer: {_target_: torch.optim.SGD, params: $@network.parameters(), lr: 0.5}
scheduler: {_target_: torch.optim.lr_scheduler.StepLR, optimizer: '@optimizer', step_size: 1, gamma: 0.1}
data: '$[{"image": torch.ones(1, 2, 2, 2), "label": torch.ones(1, 2, 2, 2)}] * 3'
loader: {_target_: monai.data.DataLoader, dataset: '@data', batch_size: 1}
validator:
  _target_: monai.engines.SupervisedEvaluator
  device: '@device'
  val_data_loader: '@loader'
  network: '@network'
  key_val_metric:
    dice:
      _target_: monai.handlers.MeanDice
      include_background: true
      output_transform: {_target_: monai.handlers.from_engine, keys: [pred, label]}
  val_handlers:
    - {_target_: ich_pipeline.tracking.TrackMetrics, prefix: val}
trainer:
  _target_: monai.engines.SupervisedTrainer
  device: '@device'
  max_epochs: 2
  train_data_loader: '@loader'
  network: '@network'
  optimizer: '@optimizer'
  loss_function: {_target_: torch.nn.MSELoss}
  train_handlers:
    - {_target_: monai.handlers.LrScheduleHandler, lr_scheduler: '@scheduler', print_lr: false}
    - {_target_: monai.handlers.ValidationHandler, validator: '@validator', interval: 1}
    - _target_: ich_pipeline.tracking.TrackMetrics
      prefix: train
      loss_key: loss
      optimizer: '@optimizer'
imports: [$import torch]
"""


@pytest.fixture
def trainer() -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser(yaml.safe_load(TRAINING))
    parser.get_parsed_content("imports")
    return parser.get_parsed_content("trainer")


def test_a_bundle_logs_each_epoch_under_the_trainers_number(store, trainer):
    losses: dict[int, list[float]] = {1: [], 2: []}
    from ignite.engine import Events

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine: Any) -> None:
        losses[engine.state.epoch].append(float(engine.state.output[0]["loss"]))

    with open_tracker(True, folder=store) as tracker:
        trainer.run()
    client = client_of(store)

    def history(name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, name)]

    assert history("train/loss") == [(n, pytest.approx(sum(losses[n]) / 3)) for n in (1, 2)]
    assert history("train/lr") == [(1, 0.5), (2, pytest.approx(0.05))]  # not what the scheduler left behind
    assert [step for step, seconds in history("train/seconds") if seconds > 0] == [1, 2]
    assert [step for step, _ in history("val/dice")] == [1, 2]
    assert [step for step, _ in history("val/seconds")] == [1, 2]


def test_the_same_bundle_runs_without_a_tracker(trainer):
    trainer.run()
    assert trainer.state.epoch == 2


def _engine(output: Any, metrics: dict[str, Any]) -> Any:
    from ignite.engine import Engine, Events

    engine = Engine(lambda engine, batch: output)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: engine.state.metrics.update(metrics))
    return engine


class _Notebook(tracking.Tracker):
    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.points.append((dict(metrics), step))


def test_chosen_metrics_vectors_and_another_engines_epoch(monkeypatch):
    import torch

    notebook = _Notebook()
    monkeypatch.setattr(tracking, "_current", notebook)
    outer = _engine(0, {})
    inner = _engine({"loss": 2.0}, {"dice": torch.tensor([0.25, 0.5]), "unwanted": 1.0})
    TrackMetrics("val", metrics=["dice"], loss_key="loss", epoch_source=outer).attach(inner)
    outer.state.epoch = 7
    inner.run([0, 0])
    ((values, step),) = notebook.points
    assert step == 7
    assert values.pop("val/seconds") >= 0
    assert values == {"val/dice.0": 0.25, "val/dice.1": 0.5, "val/loss": 2.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_key": "los"}, "no 'los' in the engine's output, only \\['loss'\\]"),
        ({"metrics": ["dise"]}, "no metric 'dise', only dice"),
    ],
)
def test_a_name_that_the_engine_does_not_have_is_an_error(options, words):
    engine = _engine({"loss": 2.0}, {"dice": 0.5})
    TrackMetrics("val", **options).attach(engine)
    with pytest.raises(ConfigError, match=words):
        engine.run([0])


# --- where a run came from -------------------------------------------------------------------------------------------


def test_provenance_is_absent_where_it_does_not_exist(tmp_path, monkeypatch):
    manifest = tmp_path / "m.csv"
    manifest.write_text("case_id\n")
    tags = provenance_tags(manifest=manifest, seeds={"split": 0})
    assert len(tags["manifest_sha256"]) == 64
    assert tags["seed.split"] == "0"
    monkeypatch.setattr(tracking, "git_revision", lambda: None)
    assert list(provenance_tags()) == ["package_version"]
