"""Runs, metrics and trained bundles in MLflow: the only module that imports it, and only while tracking is on.

What is sent is cleaned first, because a tracking server may be another machine: absolute paths and identifier columns
are left out and patient ids in names are replaced by numbers. `docs/tracking.md` says what a run holds.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import ich_pipeline
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import sha256_of
from ich_pipeline.privacy import Privacy
from ich_pipeline.run_report import git_revision, plain, without_password

logger = logging.getLogger(__name__)

BUNDLE_PARTS = ("LICENSE", "configs", "docs", "models")
_PARAM_LENGTH = 500  # characters; MLflow takes 6000, a page takes fewer
_KEY_LENGTH = 250  # MLflow's own limit
_PARAMS_A_REQUEST, _METRICS_A_REQUEST = 100, 1000  # MLflow's own limits
_LATER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")  # error codes worth another try
_NEVER_SENT = (".nii", ".dcm", ".mha", ".mhd", ".nrrd", ".npy", ".npz", ".csv", ".tsv")
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_RUN_URI = re.compile(r"runs:/(?P<run_id>[0-9a-f]{32})/(?P<path>.+)")


class Tracker:
    """Tracking off: every method does nothing; `MlflowTracker` does what the method says.

    Attributes:
        run_id: None while tracking is off.
    """

    run_id: str | None = None

    def log_params(self, config: Mapping[str, object]) -> None:
        """Record a nested config: each value under its dotted key, and the whole as `config.yaml`.

        A value that differs from the one a resumed run began with becomes the tag `changed.<key>`, since a parameter
        of MLflow never changes; each resume adds its own `config-2.yaml`, `config-3.yaml` and so on.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one point of each metric. A server that is away gets them with a later call, in order."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send one file, such as a picture.

        Raises:
            ValueError: not a file, or one that holds a scan, a table (use `log_table`) or paths (`run.json`).
        """

    def log_table(self, table: Path, folder: str = "tables") -> None:
        """Send a CSV table without what could name a patient.

        Kept are `case_id` (a patient id in it becomes a number), the columns of fixed words such as `status`, and
        every column that holds only numbers and whose name is not that of an identifier.

        Raises:
            ValueError: the table has no column `case_id`.
        """

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run."""

    def register_bundle(
        self,
        bundle_dir: Path,
        name: str,
        *,
        metric_name: str,
        metric: float,
        higher_is_better: bool = True,
        alias: str = "champion",
        tags: Mapping[str, object] | None = None,
    ) -> str | None:
        """Send the bundle folder and make it the next version of a registered model.

        The alias moves to the new version when no version has it yet, or when both were measured with the same metric
        and the new value is not worse. Whether both were measured on the same cases is the caller's to know.
        What a run registers again with the same content and metric stays one version.

        Args:
            bundle_dir: a bundle; its LICENSE, configs, docs and models are sent.
            name: of the registered model, usually the bundle's.
            metric_name: the validation metric that ranks versions.
            metric: its value; NaN never gets the alias.
            higher_is_better: False for distances and errors.
            alias: the name by which the best version is fetched.
            tags: further tags of the version.

        Returns:
            The version, or None while tracking is off.

        Raises:
            ConfigError: the folder is not a bundle with weights.
        """
        return None


class MlflowTracker(Tracker):
    """One MLflow run, made by `open_tracker`."""

    def __init__(self, client: Any, run_id: str, privacy: Privacy) -> None:
        self.run_id = run_id
        self._client = client
        self._privacy = privacy
        self._unsent: list[Any] = []
        self._lock = threading.Lock()

    def log_params(self, config: Mapping[str, object]) -> None:
        """As `Tracker.log_params` says."""
        from mlflow.entities import Param

        clean = self._privacy.config(plain(config))
        wanted = {_key(name): _short(value) for name, value in _flatten(clean)}
        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(fresh), _PARAMS_A_REQUEST):
            self._client.log_batch(self.run_id, params=fresh[start : start + _PARAMS_A_REQUEST])
        self.set_tags({f"changed.{key}": value for key, value in wanted.items() if known.get(key, value) != value})
        self._client.log_text(self.run_id, yaml.safe_dump(clean, sort_keys=False), self._next_config_name())

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """As `Tracker.log_metrics` says."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with self._lock:
            self._unsent += [Metric(_key(name), float(value), now_ms, step) for name, value in metrics.items()]
        self._send()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """As `Tracker.log_artifact` says."""
        if not path.is_file():
            raise ValueError(f"{path} is not a file; artifacts are logged one by one")
        if path.name == "run.json" or any(suffix.lower() in _NEVER_SENT for suffix in path.suffixes):
            raise ValueError(
                f"{path.name} may hold a scan, paths or identifiers and is not sent to the tracking server. "
                "Log a table with log_table and a scan as a picture."
            )
        with self._renamed(path) as file:
            self._client.log_artifact(self.run_id, str(file), folder or None)

    def log_table(self, table: Path, folder: str = "tables") -> None:
        """As `Tracker.log_table` says."""
        with tempfile.TemporaryDirectory() as temporary:
            clean = Path(temporary, self._privacy.name(table.name))
            dropped = self._privacy.table(table, clean)
            logger.info("%s goes to tracking without the columns %s", table.name, ", ".join(dropped) or "(none)")
            self._client.log_artifact(self.run_id, str(clean), folder)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """As `Tracker.set_tags` says."""
        for key, value in self._privacy.config(plain(tags)).items():
            self._client.set_tag(self.run_id, _key(key), _short(value))

    def register_bundle(
        self,
        bundle_dir: Path,
        name: str,
        *,
        metric_name: str,
        metric: float,
        higher_is_better: bool = True,
        alias: str = "champion",
        tags: Mapping[str, object] | None = None,
    ) -> str | None:
        """As `Tracker.register_bundle` says."""
        files = _bundle_files(bundle_dir)
        if not any(file.parent.name == "models" for file in files):
            raise ConfigError(f"{name}: no weights in {bundle_dir / 'models'}; train the bundle before registering it")
        sha256 = bundle_sha256(bundle_dir)
        # A folder per content: a version keeps its bytes when the same run registers another.
        place = f"bundles/{name}-{sha256[:12]}"
        for file in files:
            folder = file.relative_to(bundle_dir).parent.as_posix()
            self._client.log_artifact(self.run_id, str(file), place if folder == "." else f"{place}/{folder}")
        run = self._client.get_run(self.run_id)
        champion = _champion(self._client, name, alias)
        version_tags = self._privacy.config(plain(tags or {})) | {
            "bundle_sha256": sha256,
            "metric_name": metric_name,
            "metric": repr(float(metric)),
            "manifest_sha256": run.data.tags.get("manifest_sha256", ""),
        }
        version = self._version_like(name, version_tags) or self._client.create_model_version(
            name, f"{run.info.artifact_uri}/{place}", run_id=self.run_id, tags=version_tags
        )
        if reason := _why_not_champion(champion, metric_name, float(metric), higher_is_better):
            logger.warning("%s version %s does not become %s: %s", name, version.version, alias, reason)
        else:
            self._client.set_registered_model_alias(name, alias, str(version.version))
        return str(version.version)

    def _version_like(self, name: str, tags: Mapping[str, object]) -> Any:
        """The version that this run made of the same content and metric before it was stopped, or None."""
        versions = self._client.search_model_versions(f"run_id = '{self.run_id}'")
        same = ("bundle_sha256", "metric_name", "metric")
        return next((v for v in versions if v.name == name and all(v.tags.get(t) == tags[t] for t in same)), None)

    def close(self, reason: BaseException | None) -> None:
        """End the run: FINISHED, KILLED by Ctrl-C, or FAILED with the reason as the tag `failure`.

        A server that is away must not hide why the run ended nor undo its results: the error log says what is missing.
        """
        import mlflow

        status = _status(reason)
        steps: list[Callable[[], None]] = [self._send, partial(mlflow.end_run, status)]
        if status == "FAILED" and reason is not None:
            steps.insert(1, partial(self._client.set_tag, self.run_id, "failure", self._privacy.reason(reason)))
        for step in steps:
            try:
                step()
            except Exception as error:
                logger.error("run %s is not recorded whole as %s: %s", self.run_id, status, error)
        if self._unsent:
            logger.error("run %s: %d metric points were never sent", self.run_id, len(self._unsent))

    def _send(self) -> None:
        from mlflow.exceptions import MlflowException

        with self._lock:
            try:
                while batch := self._unsent[:_METRICS_A_REQUEST]:
                    self._client.log_batch(self.run_id, metrics=batch)
                    del self._unsent[: len(batch)]
            except MlflowException as error:
                if error.error_code not in _LATER:
                    raise
                logger.warning("%d metric points wait for the tracking server: %s", len(self._unsent), error)

    def _next_config_name(self) -> str:
        names = {item.path for item in self._client.list_artifacts(self.run_id)}
        numbers = range(2, len(names) + 3)
        return next(name for name in ("config.yaml", *(f"config-{n}.yaml" for n in numbers)) if name not in names)

    @contextmanager
    def _renamed(self, path: Path) -> Iterator[Path]:
        name = self._privacy.name(path.name)
        if name == path.name:
            yield path
            return
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(shutil.copyfile(path, Path(temporary, name)))


_current: Tracker = Tracker()


def current() -> Tracker:
    """The tracker that `open_tracker` opened in this process; one that does nothing when there is none."""
    return _current


@contextmanager
def open_tracker(
    enabled: bool,
    *,
    tracking_uri: str | None = None,
    experiment: str = "ich-pipeline",
    run_name: str | None = None,
    resume_run_id: str | None = None,
    folder: Path,
    patient_ids: Iterable[str] = (),
) -> Iterator[Tracker]:
    """Open a run, make it the current one, and end it with the status the block deserves.

    With several processes only rank 0 passes `enabled=True`.

    Args:
        enabled: False gives a tracker that does nothing, and MLflow is not imported.
        tracking_uri: a server or database; default `MLFLOW_TRACKING_URI`, then `mlflow.db` in `folder`.
        experiment: made when it does not exist; beside a local database its files lie in `mlartifacts`.
        run_name: shown in the list of runs; not used for a resumed run, which keeps its name.
        resume_run_id: continue this run, whatever status it was left in.
        folder: the working folder.
        patient_ids: replaced by `anon-<number>` wherever a name that is sent holds one.

    Raises:
        ConfigError: the server or database cannot be used, or the run to resume does not exist.
    """
    if not enabled:
        with _made_current(Tracker()) as tracker:
            yield tracker
        return
    uri = resolve_uri(tracking_uri, folder)
    with _mlflow_uses(uri):
        run = _start_run(uri, folder, experiment, run_name, resume_run_id)
        mlflow_tracker = MlflowTracker(_client(uri), run.info.run_id, Privacy(patient_ids))
        reason: BaseException | None = None
        try:
            with _made_current(mlflow_tracker) as tracker:
                yield tracker
        except BaseException as error:
            reason = error
            raise
        finally:
            mlflow_tracker.close(reason)


def provenance_tags(*, manifest: Path | None = None, seeds: Mapping[str, int] | None = None) -> dict[str, str]:
    """Tags that say what a run came from; a tag whose source does not exist is absent.

    Returns:
        `package_version`, `git_revision`, `manifest_sha256` and `seed.<name>` of each seed.
    """
    tags = {"package_version": ich_pipeline.__version__}
    if revision := git_revision():
        tags["git_revision"] = revision
    if manifest is not None:
        tags["manifest_sha256"] = sha256_of(manifest)
    return tags | {f"seed.{name}": str(seed) for name, seed in (seeds or {}).items()}


def resolve_uri(tracking_uri: str | None, folder: Path) -> str:
    """The given URI, else `MLFLOW_TRACKING_URI`, else the database `mlflow.db` in `folder`."""
    database = folder.resolve() / "mlflow.db"
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database.as_posix()}"


def fetch_bundle(uri: str, *, tracking_uri: str | None = None, folder: Path | None = None, cache: Path) -> Path:
    """Download a registered bundle once; files are copied and none is loaded.

    Args:
        uri: `models:/cascade3d@champion`, `models:/cascade3d/3` or `runs:/<run id>/bundles/<folder>`.
        tracking_uri: as for `open_tracker`.
        folder: the working folder, by default the current one.
        cache: holds a folder `<name>-<hash>` for each content that was ever fetched.

    Returns:
        The bundle's folder in `cache`, equal byte for byte to what was registered.

    Raises:
        ConfigError: no such model, version, alias or run (the message says which exist), a server that does not answer,
            a folder that is no bundle, or content that differs from the hash it was registered with.
    """
    server = resolve_uri(tracking_uri, folder or Path.cwd())
    if (database := _sqlite_path(server)) and not database.is_file():
        raise ConfigError(f"{uri}: there is no tracking database {database}; give tracking_uri=")
    from mlflow.exceptions import MlflowException

    try:
        with _quick_to_fail():
            name, source, expected = _locate(_client(server), uri)
    except MlflowException as error:
        raise ConfigError(without_password(f"{uri}: {server} does not have it or does not answer: {error}")) from error
    known = cache / f"{name}-{expected[:12]}" if expected else None
    if known is not None and known.is_dir() and bundle_sha256(known) == expected:
        return known
    return _download(uri, server, source, expected, cache, name)


def bundle_sha256(bundle_dir: Path) -> str:
    """SHA-256 over relative name and content hash of every file that belongs to a bundle (`BUNDLE_PARTS`).

    Raises:
        ConfigError: the folder is not a bundle.
    """
    lines = [f"{file.relative_to(bundle_dir).as_posix()}\0{sha256_of(file)}\n" for file in _bundle_files(bundle_dir)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class TrackMetrics:
    """Handler for a MONAI or ignite engine that sends one point an epoch to the current tracker.

    In a bundle's YAML:

        - _target_: ich_pipeline.tracking.TrackMetrics
          prefix: train
          loss_key: loss
          optimizer: "@optimizer"

    and for the validator only `prefix: val`: MONAI's evaluator runs under the trainer's epoch number. Without a tracker
    (tracking off, `python -m monai.bundle run`, ranks other than 0) nothing is sent.
    """

    def __init__(
        self,
        prefix: str,
        metrics: Sequence[str] | None = None,
        loss_key: str | None = None,
        optimizer: Any = None,
        epoch_source: Any = None,
    ) -> None:
        """Choose what is sent, as `<prefix>/<name>`.

        Args:
            prefix: such as train, val.
            metrics: names in `engine.state.metrics`; None sends all.
            loss_key: key of the loss in the engine's output; its mean over the epoch's iterations is sent as `loss`.
            optimizer: sends the learning rate each parameter group began the epoch with, as `lr`, `lr.1`, ...
            epoch_source: engine whose epoch is the step; default the engine this is attached to.
        """
        self.prefix = prefix
        self.metrics = metrics
        self.loss_key = loss_key
        self.optimizer = optimizer
        self.epoch_source = epoch_source
        self._learning_rates: list[float] = []
        self._loss_sum: Any = 0.0
        self._iterations = 0

    def attach(self, engine: Any) -> None:
        """Follow an ignite engine. Attach after its metrics, as MONAI does with handlers."""
        from ignite.engine import Events

        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        if self.loss_key is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_started(self, engine: Any) -> None:
        # Read now: a scheduler may step at the epoch's end before this handler's turn.
        self._learning_rates = [float(group["lr"]) for group in self.optimizer.param_groups] if self.optimizer else []
        self._loss_sum, self._iterations = 0.0, 0

    def _iteration_completed(self, engine: Any) -> None:
        output = engine.state.output
        output = output[0] if isinstance(output, list) else output  # MONAI repeats the loss in each decollated item
        if not isinstance(output, Mapping) or self.loss_key not in output:
            found = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise ConfigError(f"TrackMetrics {self.prefix}: no {self.loss_key!r} in the engine's output, only {found}")
        loss = output[self.loss_key]
        # Summed where it lies: a float here would make the GPU wait in every iteration.
        self._loss_sum = self._loss_sum + (loss.detach() if hasattr(loss, "detach") else loss)
        self._iterations += 1

    def _epoch_completed(self, engine: Any) -> None:
        # Before handlers run, ignite's epoch time holds only the iterations, so validation is not counted as training.
        values: dict[str, float] = {"seconds": float(engine.state.times["EPOCH_COMPLETED"])}
        values |= {f"lr.{i}" if i else "lr": rate for i, rate in enumerate(self._learning_rates)}
        if self._iterations:
            values["loss"] = float(self._loss_sum) / self._iterations
        for name in engine.state.metrics if self.metrics is None else self.metrics:
            if name not in engine.state.metrics:
                raise ConfigError(
                    f"TrackMetrics {self.prefix}: no metric {name!r}, only {', '.join(sorted(engine.state.metrics))}"
                )
            values |= _scalars(name, engine.state.metrics[name])
        step = (self.epoch_source or engine).state.epoch
        current().log_metrics({f"{self.prefix}/{name}": value for name, value in values.items()}, step)


@contextmanager
def _made_current(tracker: Tracker) -> Iterator[Tracker]:
    global _current
    previous, _current = _current, tracker
    try:
        yield tracker
    finally:
        _current = previous


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables that the user has not set, and take them back afterwards."""
    mine = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


def _quick_to_fail() -> contextlib.AbstractContextManager[None]:
    """One short retry instead of MLflow's four minutes: a wrong address is to be told at once."""
    return _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="20")


@contextmanager
def _mlflow_uses(uri: str) -> Iterator[None]:
    """Point MLflow's process-wide state at `uri`; `start_run` and its system metrics need that."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    with _environment(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true"):  # stdout is for results
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


def _client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _start_run(uri: str, folder: Path, experiment: str, run_name: str | None, resume_run_id: str | None) -> Any:
    import mlflow
    from mlflow.exceptions import MlflowException

    if database := _sqlite_path(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available() and not _has_nvml():
        logger.warning("the GPU's load and memory are not recorded: install nvidia-ml-py")
    # MLflow would name the script by its path.
    tags = {"mlflow.source.name": "ich-pipeline"}
    try:
        with _quick_to_fail():
            if resume_run_id is not None:
                run = mlflow.start_run(run_id=resume_run_id, tags=tags, log_system_metrics=True)
                if "failure" in run.data.tags:
                    _client(uri).delete_tag(resume_run_id, "failure")
                return run
            experiment_id = _experiment_id(_client(uri), experiment, uri, folder)
            return mlflow.start_run(experiment_id=experiment_id, run_name=run_name, tags=tags, log_system_metrics=True)
    except MlflowException as error:
        what = f"run {resume_run_id} cannot be resumed at" if resume_run_id else "no run can be started at"
        raise ConfigError(
            without_password(f"tracking: {what} {uri}: {error} Check tracking_uri=, or turn tracking off.")
        ) from error


def _has_nvml() -> bool:
    from importlib.util import find_spec

    return find_spec("pynvml") is not None


def _experiment_id(client: Any, name: str, uri: str, folder: Path) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri, folder))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process may have made it in between
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise ConfigError(f"tracking: experiment {name!r} is deleted at {without_password(uri)}; use another name")
    return experiment.experiment_id


def _artifact_location(uri: str, folder: Path) -> str | None:
    """Beside a local database; a server knows its own place (None). MLflow's default would be `./mlruns`."""
    if uri.startswith(("http:", "https:", "databricks")):
        return None
    database = _sqlite_path(uri)
    return ((database.parent if database else folder.resolve()) / "mlartifacts").as_uri()


def _status(reason: BaseException | None) -> str:
    if isinstance(reason, KeyboardInterrupt):
        return "KILLED"
    finished = reason is None or (isinstance(reason, SystemExit) and not reason.code)
    return "FINISHED" if finished else "FAILED"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and texts; a list is one value, written as JSON."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    """Name that MLflow accepts: other characters become their code, as `#` becomes `_23_`; the end of a long one."""
    return re.sub(r"[^\w\-. /]", lambda found: f"_{ord(found[0]):x}_", name, flags=re.ASCII)[-_KEY_LENGTH:]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _PARAM_LENGTH else f"{text[:_PARAM_LENGTH]}... (of {len(text)}; config.yaml has all)"


def _scalars(name: str, value: Any) -> dict[str, float]:
    """A number under its name, and each number of an array or list under `<name>.<index>`."""
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return {name: float(value)}
    return {key: number for i, item in enumerate(value) for key, number in _scalars(f"{name}.{i}", item).items()}


def _bundle_files(bundle_dir: Path) -> list[Path]:
    if not (bundle_dir / "configs" / "metadata.json").is_file():
        raise ConfigError(f"{bundle_dir} is not a bundle: configs/metadata.json is missing")
    parts = [bundle_dir / part for part in BUNDLE_PARTS]
    found = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*")) if file.is_file()]
    return sorted(found, key=lambda file: file.relative_to(bundle_dir).as_posix())


def _champion(client: Any, name: str, alias: str) -> Any:
    """The version that has the alias, or None; the registered model exists afterwards."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if alias not in client.get_registered_model(name).aliases:
        return None
    return client.get_model_version_by_alias(name, alias)


def _why_not_champion(champion: Any, metric_name: str, metric: float, higher_is_better: bool) -> str | None:
    if math.isnan(metric):
        return f"its {metric_name} is NaN"
    if champion is None:
        return None
    held = champion.tags
    if held.get("metric_name") != metric_name or "metric" not in held:
        return f"version {champion.version} was measured by {held.get('metric_name')!r}, this one by {metric_name!r}"
    best = float(held["metric"])
    worse = metric < best if higher_is_better else metric > best
    return f"its {metric_name} {metric:g} is worse than {best:g} of version {champion.version}" if worse else None


def _locate(client: Any, uri: str) -> tuple[str, str, str]:
    """Name, download address and registered hash (or an empty string) of what `uri` means."""
    from mlflow.exceptions import MlflowException

    if found := _RUN_URI.fullmatch(uri):
        run = client.get_run(found["run_id"])
        return Path(found["path"]).name, f"{run.info.artifact_uri}/{found['path']}", ""
    found = _MODEL_URI.fullmatch(uri)
    if found is None:
        raise ConfigError(f"{uri!r} is none of models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/FOLDER")
    name = found["name"]
    try:
        if found["alias"]:
            version = client.get_model_version_by_alias(name, found["alias"])
        else:
            version = client.get_model_version(name, found["version"])
    except MlflowException as error:
        if error.error_code in _LATER:
            raise
        raise ConfigError(f"{uri} does not exist. {_what_exists(client, name)}") from error
    source = client.get_model_version_download_uri(name, version.version)
    return name, source, version.tags.get("bundle_sha256", "")


def _what_exists(client: Any, name: str) -> str:
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        return f"Registered models: {', '.join(sorted(models)) or 'none'}."
    versions = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
    aliases = [f"@{alias} = {version}" for alias, version in sorted(models[name].aliases.items())]
    return f"Versions of {name}: {', '.join(map(str, versions)) or 'none'}; aliases: {', '.join(aliases) or 'none'}."


def _download(uri: str, server: str, source: str, expected: str, cache: Path, name: str) -> Path:
    import mlflow
    from mlflow.exceptions import MlflowException

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
        try:
            with _mlflow_uses(server):  # before MLflow 3 the argument tracking_uri did not reach a server's artifacts
                got = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=temporary)
            actual = bundle_sha256(Path(got))
        except (MlflowException, OSError, ConfigError) as error:
            raise ConfigError(f"{uri}: no bundle could be fetched from {source}: {error}") from error
        if expected and actual != expected:
            raise ConfigError(f"{uri}: fetched content has hash {actual}, it was registered with {expected}")
        target = cache / f"{name.removesuffix(f'-{actual[:12]}')}-{actual[:12]}"
        if target.is_dir() and bundle_sha256(target) != actual:
            logger.warning("%s was changed after it was fetched; it is fetched again", target)
            shutil.rmtree(target)
        if not target.is_dir():
            os.replace(got, target)
    return target
