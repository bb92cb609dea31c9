"""Search for a bundle's training settings by a genetic algorithm (Optuna's NSGA-II), as Rajapakse et al. chose theirs.

A bundle says in `configs/tuning.yaml` which keys may vary, and between what. A trial is a training; the study lies in a
SQLite file, so the same command goes on where it was stopped, in the middle of a trial too.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.trial import FrozenTrial, TrialState

from ich_pipeline.bundles import Config
from ich_pipeline.errors import ConfigError, IchError
from ich_pipeline.files import write_csv_rows
from ich_pipeline.report import write_text
from ich_pipeline.training import STATE_FILE

STUDY_FILE, BEST_FILE, TABLE_FILE = "tuning.db", "best.yaml", "tuning.csv"
FIELDS = {"low", "high", "log"}

# Trains in a folder, with these settings; the flag says whether a training was begun there.
Train = Callable[[Path, Mapping[str, float], bool], None]


@dataclass(frozen=True)
class Range:
    """What one key may be; where `log`, factors count and not steps. Whole numbers stay whole."""

    low: float
    high: float
    log: bool = False

    def distribution(self) -> Any:
        """For Optuna."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return optuna.distributions.IntDistribution(self.low, self.high, log=self.log)
        return optuna.distributions.FloatDistribution(float(self.low), float(self.high), log=self.log)


def read_space(config: Config) -> dict[str, Range]:
    """Ranges by key.

    Raises:
        ConfigError: a range that is none; names the key.
    """
    space = {}
    for key, given in config.items():
        if (
            not isinstance(given, dict)
            or not {"low", "high"} <= set(given) <= FIELDS
            or not given["low"] < given["high"]
        ):
            raise ConfigError(f"tuning.yaml {key}: {given}, expected low, high and perhaps log, with low below high")
        space[key] = Range(**given)
    return space


def search(
    folder: Path, space: Mapping[str, Range], defaults: Mapping[str, float], trials: int, train: Train, *, seed: int = 0
) -> tuple[float, dict[str, float]]:
    """Run trials until `trials` have ended, those of earlier calls included.

    The first trial has the defaults. A training that diverges is a trial that failed, and the search goes on.

    Args:
        folder: gets tuning.db, tuning.csv, best.yaml and trial_0000, trial_0001, ... with the trainings.
        space: what varies.
        defaults: the bundle's own values of these keys.
        trials: how many.
        train: one training.
        seed: of the search.

    Returns:
        Best metric and its settings.

    Raises:
        ConfigError: the study that is there varies other keys, or no trial succeeded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: each.distribution() for key, each in space.items()}
    population = max(2, min(50, trials // 4))
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY_FILE).resolve()}",
        study_name="tuning",
        direction="maximize",
        load_if_exists=True,
    )
    known = {key for trial in study.trials for key in trial.params}
    if known and known != set(space):
        raise ConfigError(f"{folder}: a search over {', '.join(sorted(known))} lies there. Give another out=.")
    if not study.trials:
        study.enqueue_trial(dict(defaults))
    for trial in _trials(study, distributions, trials, population, seed):
        home = folder / f"trial_{trial.number:04d}"
        begun = (home / "bundle").is_dir()
        try:
            if not _has_ended(home):
                train(home, trial.params, begun)
            study.tell(trial.number, float(_state(home)["best_metric"]))
        except IchError as error:
            if type(error) is not IchError:  # wrong settings or cases are those of every trial
                raise
            print(f"trial {trial.number}: {error}")
            study.tell(trial.number, state=TrialState.FAIL)
        _write(folder, study)
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise ConfigError(f"{folder}: none of {trials} trials succeeded. Narrow the ranges in tuning.yaml.")
    return float(study.best_value), dict(study.best_params)


def _trials(
    study: optuna.Study, distributions: Mapping[str, Any], trials: int, population: int, seed: int
) -> Iterator[FrozenTrial]:
    """Trials to run: those that were stopped, then new ones."""
    yield from study.get_trials(states=(TrialState.RUNNING,))
    while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))) < trials:
        # A sampler of its own for each trial: what a resumed search draws follows from the trial's number too.
        number = len(study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL)))
        study.sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed * 100_003 + number)
        asked = study.ask(dict(distributions))
        yield study.get_trials(deepcopy=False)[asked.number]


def _state(home: Path) -> Mapping[str, Any]:
    return torch.load(home / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)


def _has_ended(home: Path) -> bool:
    report = home / "run.json"
    return report.is_file() and json.loads(report.read_text())["exit_status"] == 0


def _write(folder: Path, study: optuna.Study) -> None:
    """tuning.csv, and best.yaml once there is a best."""
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))
    rows = [
        {"trial": t.number, "status": "ok" if t.state == TrialState.COMPLETE else "failed", "metric": t.value}
        | t.params
        for t in ended
    ]
    write_csv_rows(folder / TABLE_FILE, rows, ("trial", "status", "metric", *ended[0].params))
    if any(t.state == TrialState.COMPLETE for t in ended):
        head = f"# Best of {len(ended)} trials: trial {study.best_trial.number}, {study.best_value:.4f}.\n"
        write_text(folder / BEST_FILE, head + yaml.safe_dump(dict(study.best_params), sort_keys=False))
