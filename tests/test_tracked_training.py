"""Training against a real MLflow server: killed, interrupted, resumed, registered, fetched and run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import nibabel as nib
import numpy as np
import pytest
import stopped_training
import torch
from mlflow_server import running_server
from training_cases import TINY, write_cases

from ich_pipeline import commands, settings, tracking
from ich_pipeline.bundles import Bundle, find_bundle
from ich_pipeline.commands import Settings
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import sha256_of

EPOCHS = 6
# What the bundle validates by, as tracking calls it.
[KEY_METRIC] = find_bundle("cascade3d").config("train")["validate"]["key_metric"]
DICE = f"val/{KEY_METRIC}"


@dataclass(frozen=True)
class Place:
    """A server, cases, and a folder for what tests make."""

    server: str
    cases: Path
    folder: Path

    @property
    def client(self) -> Any:
        return mlflow.MlflowClient(tracking_uri=self.server)

    def words(self, name: str, *more: str) -> list[str]:
        """Words of a training; a later word replaces an earlier one with the same key."""
        given = [
            *("bundle=cascade3d", f"data={self.cases}", f"out={self.folder / name}", f"epochs={EPOCHS}", *TINY),
            *(
                "validate_every=2",
                "iterations=8",
                "seed=7",
                f"tracking_uri={self.server}",
                "experiment=training",
                *more,
            ),
        ]
        return list({word.partition("=")[0]: word for word in given}.values())

    def train(self, name: str, *more: str) -> str:
        """Train in this process; returns the run id."""
        assert commands.train(Settings.of(self.words(name, *more))) == 0
        return self.run_id(name)

    def run_id(self, name: str) -> str:
        return (self.folder / name / "mlflow_run_id").read_text()

    def stop_after_an_epoch(self, name: str, number: signal.Signals, *more: str) -> tuple[int, str]:
        """Train in a process of its own that a signal stops after one more epoch; returns exit status and stderr."""
        stopped = stopped_training.launcher(number, epoch=self.epoch(name) + 2)
        process = subprocess.run(
            [sys.executable, *stopped, "-m", "ich_pipeline", "train", *self.words(name, *more)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            timeout=500,
        )
        return process.returncode, process.stderr

    def epoch(self, name: str) -> int:
        """The last epoch that was saved, 0 for none."""
        state_file = self.folder / name / "training_state.pt"
        return torch.load(state_file, weights_only=True)["epoch"] if state_file.is_file() else 0

    def history(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        """Points of each metric that training sends, without times of day; an epoch that was repeated once."""
        names = [n for n in self.client.get_run(run_id).data.metrics if n.startswith(("train/", "val/"))]
        points = {n: [(m.step, m.value) for m in self.client.get_metric_history(run_id, n)] for n in names}
        return {n: sorted(set(p)) for n, p in points.items() if not n.endswith("/seconds")}

    def versions_of(self, run_id: str) -> list[Any]:
        return list(self.client.search_model_versions(f"run_id = '{run_id}'"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One thread, a fast sampler of system metrics, and a server."""
    folder, threads = tmp_path_factory.mktemp("tracked"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, running_server(tmp_path_factory.mktemp("server")) as address:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
        patch.setattr(settings, "CACHE", folder / "cache")
        yield Place(address, write_cases(folder / "cases"), folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> str:
    return place.train("undisturbed")


def test_a_run_holds_what_it_came_from_and_what_it_did(place: Place, undisturbed: str) -> None:
    run = place.client.get_run(undisturbed)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "train cascade3d")
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.params["filters"] == "[4, 4, 4, 4]"
    tags = run.data.tags
    assert (tags["seed.seed"], tags["manifest_sha256"]) == ("7", sha256_of(place.cases))
    assert len(tags.get("git_revision", "0" * 40).removesuffix("-dirty")) == 40
    history = place.history(undisturbed)
    assert set(history) == {"train/loss", "train/lr", DICE}
    assert [step for step, _ in history["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in history[DICE]] == [2, 4, 6]
    # The cosine of three epochs, and the restart: 0.01 (1 + cos(pi n / 3)) / 2.
    assert [rate for _, rate in history["train/lr"]] == pytest.approx([0.01, 0.0075, 0.0025] * 2)
    assert any(name.startswith("system/cpu") for name in run.data.metrics)


def test_the_trained_bundle_is_a_version_without_state_and_paths(
    place: Place, undisturbed: str, tmp_path: Path
) -> None:
    [version] = place.versions_of(undisturbed)
    assert version.name == "cascade3d"
    assert version.tags["metric_name"] == KEY_METRIC
    best = max(value for _, value in place.history(undisturbed)[DICE])
    assert float(version.tags["metric"]) == pytest.approx(best)
    got = tracking.fetch_bundle(
        f"models:/cascade3d/{version.version}", tracking_uri=place.server, cache=tmp_path / "cache"
    )
    assert not list(got.rglob("training_state*"))
    for file in (got / "configs").iterdir():
        assert str(place.folder) not in file.read_text(), file.name
    ours = Bundle(place.folder / "undisturbed" / "bundle")
    assert sha256_of(got / "models") == sha256_of(ours.path / "models")


def test_the_champion_segments_as_the_bundle_does(place: Place, undisturbed: str, tmp_path: Path) -> None:
    scan = place.cases.parent / "image-6.nii.gz"
    masks = {}
    ours = f"bundle={place.folder / 'undisturbed' / 'bundle'}"
    for name, bundle in (("ours", ours), ("champion", "bundle=models:/cascade3d@champion")):
        out = tmp_path / name
        # A threshold that a network of six epochs reaches, so that masks with something in them are compared.
        words = [bundle, f"tracking_uri={place.server}", "threshold=0.2", "pictures=false"]
        assert commands.segment([scan], out, out / "volumes.csv", Settings.of(words)) == 0
        masks[name] = np.asarray(nib.load(out / "image-6.nii.gz").dataobj)
    np.testing.assert_array_equal(masks["champion"], masks["ours"])
    assert masks["ours"].any()


def test_a_run_that_was_killed_and_interrupted_ends_as_if_undisturbed(place: Place, undisturbed: str) -> None:
    status, _ = place.stop_after_an_epoch("stopped", signal.SIGKILL)
    run_id = place.run_id("stopped")
    assert (status, place.client.get_run(run_id).info.status) == (-signal.SIGKILL, "RUNNING")

    status, errors = place.stop_after_an_epoch("stopped", signal.SIGINT, "resume=true")
    assert (status, place.client.get_run(run_id).info.status) == (130, "KILLED")
    assert "resume=true" in errors.splitlines()[-1]
    assert place.versions_of(run_id) == []
    assert json.loads((place.folder / "stopped" / "run.json").read_text())["exit_status"] == 130

    assert place.train("stopped", "resume=true") == run_id
    assert place.client.get_run(run_id).info.status == "FINISHED"
    assert place.history(run_id) == place.history(undisturbed)
    weights = [place.folder / name / "bundle/models/model.pt" for name in ("undisturbed", "stopped")]
    assert sha256_of(weights[0]) == sha256_of(weights[1])
    [ours], [theirs] = place.versions_of(run_id), place.versions_of(undisturbed)
    assert ours.tags["bundle_sha256"] == theirs.tags["bundle_sha256"]
    assert not [tag for tag in place.client.get_run(run_id).data.tags if tag.startswith("changed.")]


def test_a_run_that_has_ended_is_left_alone(place: Place, undisturbed: str) -> None:
    before = place.client.get_run(undisturbed)
    with pytest.raises(ConfigError, match="the run ended after 6 epochs"):
        place.train("undisturbed", "resume=true")
    after = place.client.get_run(undisturbed)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert len(place.versions_of(undisturbed)) == 1


@pytest.mark.parametrize("too_late", [False, True], ids=["before", "after"])
def test_a_run_stopped_while_it_registers_is_registered_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, too_late: bool
) -> None:
    """Training had ended, but the command had not: nothing is trained again, and the version appears once."""
    name, register = f"unregistered-{too_late}", tracking.MlflowTracker.register_bundle

    def stopped(*args: Any, **kwargs: Any) -> None:
        if too_late:
            register(*args, **kwargs)
        raise ConnectionError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(tracking.MlflowTracker, "register_bundle", stopped)
        with pytest.raises(ConnectionError):
            place.train(name, "epochs=1")
    run_id = place.run_id(name)
    assert place.client.get_run(run_id).info.status == "FAILED"
    state_file = place.folder / name / "training_state.pt"
    before = state_file.stat().st_mtime_ns
    assert place.train(name, "epochs=1", "resume=true") == run_id
    assert state_file.stat().st_mtime_ns == before
    assert place.client.get_run(run_id).info.status == "FINISHED"
    assert len(place.versions_of(run_id)) == 1
    assert [step for step, _ in place.history(run_id)["train/loss"]] == [1]
