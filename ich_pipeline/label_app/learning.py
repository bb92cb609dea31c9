"""Training on corrected labels: who learns and who validates, a run from the served weights, what is served then."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ich_pipeline import tracking
from ich_pipeline.errors import ManifestError
from ich_pipeline.files import write_json
from ich_pipeline.label_app.versions import Outcome, Versions
from ich_pipeline.manifest import read_manifest, write_manifest
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import RunReport
from ich_pipeline.settings import Settings
from ich_pipeline.training import UNCALIBRATED, prepare_run, train_bundle

CASES_FILE = "label_cases.csv"  # in the studies folder: who learns and who validates
PATIENTS_FILE = "patients.csv"  # optional, there: image,patient_id
# The second patient validates, and every fifth after it.
VALIDATE_EVERY, FIRST_TO_VALIDATE = 5, 1
# Weights that exist are refined: the bundle's own rate, made to begin from nothing, would take them far away first.
RATE_SHARE = 0.1


def assign_cases(studies: Path, labelled: Mapping[str, tuple[Path, Path]]) -> Path:
    """Write the manifest of the corrected cases; a patient who was given a part keeps it for good.

    A case that has validated must never be learnt from later, or the next comparison is with a network that knows it.

    Args:
        studies: the studies folder; may hold `patients.csv` with the columns image and patient_id.
        labelled: scan and label by image id, in the order in which they were labelled.

    Returns:
        The manifest.

    Raises:
        ManifestError: fewer than two patients, or patients.csv cannot be used.
    """
    path = studies / CASES_FILE
    patients = _patients(studies / PATIENTS_FILE)
    # Read loosely: a scan that was removed since must not keep the others from being used.
    before = {row["patient_id"]: row["split"] for row in _rows(path)}
    split_of = dict(before)
    records = []
    for name, (image, label) in labelled.items():
        patient = patients.get(name, name)
        split_of.setdefault(patient, "val" if len(split_of) % VALIDATE_EVERY == FIRST_TO_VALIDATE else "train")
        records.append(CaseRecord(name, image, label, patient_id=patient, split=split_of[patient]))
    found = {record.split for record in records}
    if found != {"train", "val"}:
        raise ManifestError(
            f"{len(records)} scans with a final label, for {' and '.join(sorted(found)) or 'nothing'}: expected at "
            "least one to learn from and one to validate on, of two patients. Label more scans."
        )
    write_manifest(path, records)
    return path


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _patients(path: Path) -> dict[str, str]:
    rows = _rows(path)
    if rows and not {"image", "patient_id"} <= set(rows[0]):
        raise ManifestError(f"{path.name}: columns {', '.join(rows[0])}, expected image and patient_id.")
    return {row["image"]: row["patient_id"] for row in rows}


def fine_tune(versions: Versions, manifest: Path, epochs: int, *, run: Mapping[str, object] | None = None) -> Outcome:
    """Train the served version on, into a new version, and serve that if its validation Dice is not lower.

    Args:
        versions: of the bundle.
        manifest: `assign_cases`' own.
        epochs: how many.
        run: settings of the run besides its defaults: tracking, tracking_uri, experiment.

    Raises:
        ConfigError: the bundle has nothing to train.
        ManifestError: the cases cannot be used.
    """
    served = versions.served
    source = versions.bundle(served)
    out = versions.next_folder()
    out.mkdir(parents=True)
    defaults = Settings.of([])
    # Of version 0: a version has been trained at a share of it already.
    rate = versions.source.config("train")["learning_rate"] * RATE_SHARE
    inference = source.config("inference")
    # Weights that go on are cut where they were cut.
    point = {key: inference[key] for key in UNCALIBRATED if key in inference}
    own = {"data": str(manifest), "epochs": epochs, "validate_every": 1, "patience": 0, "learning_rate": rate}
    settings = Settings({**defaults.run, **(run or {}), "preset": None}, own | point)
    prepare_run(source, settings, out, resume=False)
    bundle = type(source)(out / "bundle")
    metadata = bundle.metadata
    base = str(metadata["version"]).partition("+")[0]
    write_json(bundle.path / "configs" / "metadata.json", metadata | {"version": f"{base}+label.{out.name}"})
    cases = read_manifest(manifest)
    config = bundle.config("train")
    report = RunReport({"run": settings.run, "train": config}, seeds={"seed": config["seed"]})
    report.add_input(manifest)
    tracker = tracking.open_tracker(
        settings.run["tracking"] is not False,
        tracking_uri=settings.run["tracking_uri"],
        experiment=settings.run["experiment"],
        run_name=f"label {versions.name} {out.name}",
        folder=Path.cwd(),
        patient_ids=[case.patient_id for case in cases],
    )
    status = 1
    report.write(out / "run.json")
    try:
        with tracker as tracked:
            tracked.set_tags(tracking.provenance_tags(manifest=manifest, seeds={"seed": config["seed"]}))
            tracked.log_params(config)
            handler = train_bundle(bundle, report, resume=False, start_from=source.weights)
            assert handler.start_metric is not None
            outcome = Outcome(
                version=int(out.name),
                started_from=served,
                dice_before=handler.start_metric,
                dice_after=handler.best_metric,
                n_train=_count(cases, "train"),
                n_val=_count(cases, "val"),
                weights_sha256=bundle.metadata["weights_sha256"],
                mlflow_run_id=tracked.run_id,
            )
            tracked.log_metrics(
                {"dice_before": outcome.dice_before, "dice_after": outcome.dice_after}, step=handler.best_epoch
            )
            tracked.set_tags({"label_version": out.name, "started_from": served, "served": outcome.served})
            versions.record(outcome)
        status = 0
    finally:
        report.bundle = {"name": bundle.name, "sha256": bundle.metadata["weights_sha256"]}
        report.write(out / "run.json", exit_status=status)
    return outcome


def _count(cases: Sequence[CaseRecord], split: str) -> int:
    return sum(case.split == split for case in cases)
