"""The search over training settings: genetic, resumable, and nested runs."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml

from ich_pipeline.errors import ConfigError, IchError, ManifestError
from ich_pipeline.tuning import Range, read_space, search

optuna = pytest.importorskip("optuna", reason="the extra `tune` is not installed")

SPACE = {"rate": Range(1e-4, 1e-1, log=True), "variation.scale": Range(0.0, 1.0), "epochs": Range(1, 4)}
DEFAULTS = {"rate": 1e-2, "variation.scale": 0.9, "epochs": 2}


def metric_of(chosen: Mapping[str, float]) -> float:
    return 1 - abs(chosen["variation.scale"] - 0.3)


class Trainings:
    """A training that writes what a real one leaves, and may be stopped or fail."""

    def __init__(self, stop_in: int = -1, fail_in: int = -1) -> None:
        self.stop_in, self.fail_in = stop_in, fail_in
        self.calls: list[tuple[str, dict[str, float], bool]] = []

    def __call__(self, home: Path, chosen: Mapping[str, float], begun: bool) -> None:
        self.calls.append((home.name, dict(chosen), begun))
        (home / "bundle").mkdir(parents=True, exist_ok=True)
        if len(self.calls) - 1 == self.stop_in:
            raise KeyboardInterrupt
        if len(self.calls) - 1 == self.fail_in:
            raise IchError("the training has diverged")
        torch.save({"best_metric": metric_of(chosen)}, home / "training_state.pt")
        (home / "run.json").write_text(json.dumps({"exit_status": 0}))


def test_the_search_starts_from_the_defaults_and_finds_better(tmp_path: Path) -> None:
    trainings = Trainings()
    best, chosen = search(tmp_path, SPACE, DEFAULTS, 10, trainings)
    assert len(trainings.calls) == 10
    assert trainings.calls[0] == ("trial_0000", DEFAULTS, False)
    assert all(1e-4 <= c["rate"] <= 1e-1 and c["epochs"] in (1, 2, 3, 4) for _, c, _ in trainings.calls)
    assert best == pytest.approx(max(metric_of(c) for _, c, _ in trainings.calls))
    assert best > metric_of(DEFAULTS)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text()) == pytest.approx(chosen)
    rows = list(csv.DictReader((tmp_path / "tuning.csv").open(newline="")))
    assert [row["trial"] for row in rows] == [str(n) for n in range(10)]


def test_a_stopped_search_goes_on_in_the_middle_of_a_trial(tmp_path: Path) -> None:
    whole = Trainings()
    expected = search(tmp_path / "whole", SPACE, DEFAULTS, 5, whole)
    stopped = Trainings(stop_in=3)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", SPACE, DEFAULTS, 5, stopped)
    going_on = Trainings()
    assert search(tmp_path / "cut", SPACE, DEFAULTS, 5, going_on) == expected
    assert going_on.calls[0] == ("trial_0003", stopped.calls[3][1], True)
    made = [call[:2] for call in (*stopped.calls[:3], *going_on.calls)]
    assert made == [call[:2] for call in whole.calls]
    again = Trainings()
    assert search(tmp_path / "cut", SPACE, DEFAULTS, 5, again) == expected
    assert again.calls == []


def test_a_training_that_diverges_is_a_failed_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(tmp_path, SPACE, DEFAULTS, 4, Trainings(fail_in=1))
    assert "trial 1: the training has diverged" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "tuning.csv").open(newline="")))
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]


def test_wrong_settings_are_no_failed_trial(tmp_path: Path) -> None:
    def refuse(home: Path, chosen: Mapping[str, float], begun: bool) -> None:
        raise ManifestError("no such table")

    with pytest.raises(ManifestError, match="no such table"):
        search(tmp_path, SPACE, DEFAULTS, 2, refuse)


def test_no_trial_that_succeeds_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of 1 trials succeeded"):
        search(tmp_path, SPACE, DEFAULTS, 1, Trainings(fail_in=0))


def test_another_search_is_not_mixed_in(tmp_path: Path) -> None:
    search(tmp_path, SPACE, DEFAULTS, 1, Trainings())
    with pytest.raises(ConfigError, match=r"a search over .* lies there"):
        search(tmp_path, {"rate": SPACE["rate"]}, {"rate": 0.01}, 2, Trainings())


@pytest.mark.parametrize("given", [3, {"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1, "step": 2}])
def test_a_range_that_is_none_is_named(given: object) -> None:
    with pytest.raises(ConfigError, match=r"tuning\.yaml rate: .*expected low, high"):
        read_space({"rate": given})
