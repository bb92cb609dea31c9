"""What each command does, after its words were parsed and before its exit status is set."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ich_pipeline import bundles
from ich_pipeline.bundles import Bundle, Config
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import atomic_path, remove_leftovers
from ich_pipeline.growth import Criterion, Growth, failed_growth, measure_growth, parse_criterion
from ich_pipeline.outputs import (
    check_growth_table,
    check_measuring,
    check_outside,
    check_replaced,
    check_targets,
    clear,
    done_before,
)
from ich_pipeline.pairing import Pair, cases_of, find_pairs
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import (
    HTML_NAME,
    CaseRow,
    read_rows,
    write_growth,
    write_tables,
    write_text,
)
from ich_pipeline.run_report import RunReport
from ich_pipeline.settings import DEFAULT_BUNDLE, TRAIN_CONFIGS, Settings


def list_bundles(as_json: bool) -> str:
    """Every bundle: name, version, weights or none, description."""
    found = [bundle.describe() for bundle in bundles.all_bundles().values()]
    if as_json:
        return json.dumps(found, indent=2)
    lines = [f"{b['name']:<22} {b['version']:<8} {_weights_in_words(b):<17} {b['description']}" for b in found]
    return "\n".join(line + _missing_in_words(b) for line, b in zip(lines, found, strict=True))


def _missing_in_words(described: Config) -> str:
    missing = described["missing_packages"]
    return f" [not installed: {', '.join(missing)}]" if missing else ""


def _weights_in_words(described: Config) -> str:
    if not described["needs_weights"]:
        return "needs none"
    return f"weights {described['weights'][:8]}" if described["weights"] else "no weights"


def segment(scans: Sequence[Path], masks: Path, table: Path, settings: Settings) -> int:
    """Segment scans, measure the masks, write table and run report.

    Args:
        scans: files, folders, manifests.
        masks: folder of the masks.
        table: `volumes.csv`; `lesions.csv`, `run.json`, `report.html` and the pictures go beside it.
        settings: names the bundle.

    Returns:
        0 when every case is ok, else 1.

    Raises:
        ConfigError: wrong settings, `table` belongs to a run with other settings, or the masks would lie among the
            scans.
        ReadError: no scans there.
    """
    members = _members(settings)
    check_outside(scans, masks)

    from ich_pipeline.finding import find_scans

    cases = find_scans(scans)
    status = segment_cases(cases, members, masks, table, settings)
    _write_html(table, settings)
    return status


def _write_html(table: Path, settings: Settings, *, say: bool = True) -> None:
    """`report.html` beside a table and everything else that a command wrote there; `say` puts its path on stdout."""
    if not settings.run["html"]:
        table.with_name(HTML_NAME).unlink(missing_ok=True)  # one of an earlier table would mislead
        return
    from ich_pipeline.html_report import write_html

    page = write_html(table)
    if say:
        print(page)


Members = Sequence[tuple[Bundle, Config]]  # bundles and their resolved inference.yaml; several are an ensemble


def _members(settings: Settings) -> Members:
    """The bundle, or the bundles, that were named; the one that ships weights where none was.

    Raises:
        ConfigError: one does not exist, or a key is unknown to one of them.
    """
    if settings.run["bundle"] is None:
        print(f"bundle={DEFAULT_BUNDLE}: its weights learnt from synthetic scans; research use only", file=sys.stderr)
        settings = replace(settings, run={**settings.run, "bundle": DEFAULT_BUNDLE})
    found = [(each, each.bundle()) for each in settings.each_bundle()]
    for _, bundle in found:
        if bundle.finds_boxes:
            raise ConfigError(
                f"{bundle.name} finds boxes and makes no mask. Name a bundle that segments, or evaluate it."
            )
    return [(bundle, each.config(bundle, "inference")["inference"]) for each, bundle in found]


def segment_cases(
    cases: Sequence[CaseRecord],
    members: Members,
    masks: Path,
    table: Path,
    settings: Settings,
    *,
    regions: Path | None = None,
    probabilities: Path | None = None,
    report: RunReport | None = None,
    known: Sequence[CaseRecord] = (),
) -> int:
    """`segment` for cases that were found already.

    `Pipeline` says what the further folders hold; `report` is one that the caller goes on with. A table of boxes may
    name `known` cases too.
    """
    from ich_pipeline.batch import run_batch
    from ich_pipeline.boxes import check_cases
    from ich_pipeline.ensemble import Ensemble, joined_sha256
    from ich_pipeline.inference import Segmenter
    from ich_pipeline.pipeline import Pipeline

    for _, config in members:
        check_cases(config, [*cases, *known])
    edema = table.parent / "edema_estimate" if any(config.get("edema_estimate") for _, config in members) else None
    if edema and len(members) > 1:
        raise ConfigError("edema_estimate=true: an ensemble estimates no edema. Name one bundle.")
    resolved = _resolved(members, settings)
    check_targets(cases, masks)
    sha256 = joined_sha256([bundle for bundle, _ in members])
    done = [] if settings.run["overwrite"] else done_before(table, cases, resolved, sha256)
    report = report or RunReport(resolved)
    with report.stage("start"):
        segmenters = [Segmenter(*member) for member in members]
        segmenter = segmenters[0] if len(segmenters) == 1 else Ensemble(segmenters)
    uncertainty = table.parent / "uncertainty" if len(segmenters) > 1 else None
    if settings.run["overwrite"]:
        clear(cases, [folder for folder in (masks, regions, probabilities, uncertainty, edema) if folder], table)
    report.bundle = {"name": segmenter.name, "version": segmenter.version, "sha256": segmenter.weights_sha256}
    pictures = table.parent / "pictures" if settings.run["pictures"] else None
    for folder in filter(None, (table.parent, masks, pictures, regions, probabilities, uncertainty, edema)):
        remove_leftovers(folder)
    kept = {name: settings.run[name] for name in ("dicom", "keep_identifiers")}
    folders = (masks, pictures, report, regions, probabilities)
    pipeline = Pipeline(segmenter, *folders, uncertainty=uncertainty, edema=edema, **kept)
    report.write(table.parent / "run.json")
    try:
        with tqdm(total=len(cases), initial=len(done), desc="scans", unit="scan", file=sys.stderr) as bar:
            rows = run_batch(cases, pipeline, table, done=done, on_row=lambda row: _shown(bar, row))
    finally:
        report.bundle |= segmenter.engine
        report.write(table.parent / "run.json")
    status = int(any(row.status == "failed" for row in rows))
    report.write(table.parent / "run.json", exit_status=status)
    return status


def _resolved(members: Members, settings: Settings) -> Config:
    """What run.json records; an ensemble's configs stand one below the other."""
    from ich_pipeline.boxes import boxes_sha256

    configs = [config | boxes_sha256(bundle, config) for bundle, config in members]
    return {"run": settings.run, "inference": configs[0] if len(configs) == 1 else configs}


def measure_masks(masks: Sequence[Path], table: Path, settings: Settings) -> int:
    """Measure masks that exist: a row a mask, a row a lesion.

    Args:
        masks: files, folders, manifests (their labels where they have any, else their images).
        table: `volumes.csv`; `lesions.csv`, `run.json` and `report.html` go beside it.

    Returns:
        0 when every mask is ok, else 1.

    Raises:
        ConfigError: a bundle or its keys were named, or `table` holds what a bundle segmented.
        ReadError: no masks there.
    """
    from ich_pipeline.finding import find_scans

    check_measuring(table, settings)
    report = RunReport({"run": settings.run})
    rows = measure_cases(find_scans(masks), report, settings)
    write_tables(table, rows)
    status = int(any(row.status == "failed" for row in rows))
    report.write(table.parent / "run.json", exit_status=status)
    _write_html(table, settings)
    return status


def measure_cases(cases: Sequence[CaseRecord], report: RunReport, settings: Settings) -> list[CaseRow]:
    """Rows of masks that exist, each booked in the report."""
    from ich_pipeline.masks import Measured, measure_files

    for case in cases:
        report.add_input(case.label or case.image)
    with tqdm(total=len(cases), desc="masks", unit="mask", file=sys.stderr) as bar:

        def booked(measured: Measured) -> None:
            for name, seconds in measured.seconds.items():
                report.book(name, seconds, measured.row.case_id)
            report.add_case(measured.row.case_id, measured.row.status, error=measured.row.error or None)
            _shown(bar, measured.row)

        run = settings.run
        found = measure_files(
            cases, subtypes=run["subtypes"], edema_value=run["edema"], jobs=run["jobs"], on_case=booked
        )
    return [each.row for each in found]


def compare(scans: Sequence[Path], out: Path, settings: Settings, *, masks: bool) -> int:
    """Growth between two scans of one patient, or of many: segment both or measure their masks, then a row a pair.

    Args:
        scans: BASELINE and FOLLOWUP, or one manifest with time points.
        out: `growth.csv`; `volumes.csv`, `lesions.csv`, `run.json`, `report.html` and, without `masks`, `masks/` go
            beside it.
        settings: names the criterion, and the bundle without `masks`.
        masks: the scans are masks.

    Returns:
        0 when every pair could be compared, else 1.

    Raises:
        ConfigError: wrong settings, or a file that holds something else would be replaced.
        ManifestError: nothing to compare, or time points that cannot be used.
        ReadError: no scans there.
    """
    criterion = parse_criterion(str(settings.run["criterion"]))
    if criterion.new_ivh and not (masks and settings.run["subtypes"]):
        raise ConfigError(f"criterion={criterion}: new IVH shows in masks with subtypes only: --masks subtypes=true")
    check_growth_table(out)
    table = out.with_name("volumes.csv")
    if masks:
        check_measuring(table, settings)
        pairs = find_pairs(scans, masks=True)
        cases = cases_of(pairs)
        check_replaced(table, cases, settings)
        report = RunReport({"run": settings.run})
        write_tables(table, measure_cases(cases, report, settings))
    else:
        members = _members(settings)
        check_outside(scans, out.parent / "masks")
        pairs = find_pairs(scans, masks=False)
        report = RunReport(_resolved(members, settings))
        segment_cases(cases_of(pairs), members, out.parent / "masks", table, settings, report=report)
    for manifest in (path for path in scans if path.suffix.lower() == ".csv"):
        report.add_input(manifest)
    rows = {row.case_id: row for row in read_rows(table)}
    found = [_growth(pair, rows, criterion) for pair in pairs]
    write_growth(out, found)
    for growth in found:
        print(growth.line())
        # No case id has a slash, so a pair is never taken for a case.
        report.add_case(f"pair/{growth.pair_id}", growth.status, error=growth.error or None)
    status = int(any(growth.status == "failed" for growth in found))
    report.write(out.parent / "run.json", exit_status=status)
    _write_html(table, settings, say=False)  # stdout has a line a pair
    return status


def _growth(pair: Pair, rows: Mapping[str, CaseRow], criterion: Criterion) -> Growth:
    if pair.error:
        return failed_growth(pair, pair.error)
    before, after = (rows[case.case_id] for case in pair.cases)
    if before.report is None or after.report is None:
        return failed_growth(pair, "; ".join(row.error for row in (before, after) if row.error))
    return measure_growth(pair, before.report, after.report, criterion)


def agree(table: Path, reference: str, estimates: Sequence[str], out: Path) -> int:
    """Agreement of columns of a table, over all rows and by group: Markdown on stdout and in OUT, CSV, plots.

    Raises:
        ManifestError: no such table or column, or a cell that is no number.
    """
    from ich_pipeline.cohort import read_cohort, write_cohort

    report = RunReport({"table": str(table), "reference": reference, "estimates": list(estimates)})
    report.add_input(table)
    overall, by_group = write_cohort(read_cohort(table, reference, estimates), out)
    text = overall + "".join(by_group.values())
    write_text(out / "agreement.md", text)
    report.write(out / "run.json", exit_status=0)
    print(text)
    return 0


def _shown(bar: Any, row: CaseRow) -> None:
    bar.update()
    if row.status == "failed":
        bar.write(f"{row.case_id}: {row.error}", file=sys.stderr)


def train(settings: Settings) -> int:
    """Write the run's own bundle with every setting in it, train it, track it, register it.

    The trained bundle is `OUT/bundle`; `python -m monai.bundle run` on its `train.yaml` is the same training.

    Returns:
        0; a training that fails raises.

    Raises:
        ConfigError: wrong settings, a bundle with nothing to train, weights to start from that do not fit, or `out`
            holds a run and neither resume nor overwrite was asked for.
    """
    source, resume = settings.bundle(), bool(settings.overrides.get("resume"))
    config = settings.config(source, *TRAIN_CONFIGS)["train"] if source.needs_weights else {}
    if not bundles.learns(source, config):
        raise ConfigError(
            f"{source.name} has nothing to train: it needs no weights. Use it as it is (ich-pipeline segment ... "
            f"bundle={source.name})."
        )

    from ich_pipeline.training import prepare_run, process_group, rank, wait_for_all

    out = Path(settings.run["out"] or Path("runs") / source.name)
    with process_group(settings.overrides.get("device", "auto")):
        if rank() == 0:
            if source.finds_boxes and not resume:
                from ich_pipeline.box_data import load_box_cases

                load_box_cases(config["data"], config["boxes"], config["fold"])  # refuses before a folder is made
            prepare_run(source, settings, out, resume=resume)
        wait_for_all()
        return _train_prepared(bundles.find_bundle(str(out / "bundle")), settings, out, resume=resume)


def _train_prepared(bundle: Bundle, settings: Settings, out: Path, *, resume: bool) -> int:
    from ich_pipeline import tracking
    from ich_pipeline.manifest import read_manifest
    from ich_pipeline.training import RUN_ID_FILE, rank, train_bundle, weights_to_start_from

    start_from = weights_to_start_from(bundle, settings, out, resume=resume)
    config = bundle.config("train")
    report = RunReport({"run": settings.run, "train": config}, seeds={"seed": config["seed"]})
    manifest = Path(config["data"])
    report.add_input(manifest)
    run_id_file, status = out / RUN_ID_FILE, 1
    tracker = tracking.open_tracker(
        settings.run["tracking"] is not False and rank() == 0,
        tracking_uri=settings.run["tracking_uri"],
        experiment=settings.run["experiment"],
        run_name=settings.run["run_name"] or f"train {bundle.name}",
        resume_run_id=run_id_file.read_text().strip() if resume and run_id_file.is_file() else None,
        folder=Path.cwd(),
        patient_ids=[case.patient_id for case in read_manifest(manifest)],
    )
    if rank() == 0:
        report.write(out / "run.json")
    try:
        with tracker as run:
            if run.run_id:
                with atomic_path(run_id_file) as temporary:
                    temporary.write_text(run.run_id)
            run.set_tags(tracking.provenance_tags(manifest=manifest, seeds={"seed": config["seed"]}))
            if settings.run["parent_run"]:
                run.set_tags({"mlflow.parentRunId": settings.run["parent_run"]})
            run.log_params(config)
            result = train_bundle(bundle, report, resume=resume, start_from=start_from)
            if rank() == 0:
                metric = "mAP@0.5" if bundle.finds_boxes else "Dice"
                found = f"{result.keep} validation {metric} {result.best_metric:.3f} in epoch {result.best_epoch}"
                print(f"{found}: {bundle.path}")
                if not settings.run["parent_run"]:
                    _register(run, bundle, result)
        status = 0
    except KeyboardInterrupt:
        status = 130
        raise
    finally:
        if rank() == 0:
            report.bundle = {"name": bundle.name, "sha256": bundle.metadata["weights_sha256"]}
            report.write(out / "run.json", exit_status=status)
    return status


def _register(run: Any, bundle: Bundle, result: Any) -> None:
    from ich_pipeline.training import without_paths

    with without_paths(bundle) as clean:
        version = run.register_bundle(clean, bundle.name, metric_name=result.metric_name, metric=result.best_metric)
    if version:
        print(f"registered as models:/{bundle.name}/{version}")


def tune(settings: Settings, trials: int) -> int:
    """Search for training settings by genetic search; each trial is a training, tracked below the search's run.

    Returns:
        0.

    Raises:
        ConfigError: wrong settings, the bundle does not say what may vary, Optuna is not installed, or `out` holds a
            search over other keys.
    """
    source, overrides = settings.bundle(), dict(settings.overrides)
    if "tuning" not in source.config_names:
        raise ConfigError(f"{source.name} has no configs/tuning.yaml that says what may vary.")
    config = settings.config(source, *TRAIN_CONFIGS)["train"]
    try:
        from ich_pipeline import tuning
    except ModuleNotFoundError as error:
        raise ConfigError('tune needs the extra: pip install "ich-pipeline[tune]"') from error

    from ich_pipeline import tracking

    out = Path(settings.run["out"] or Path("tuning") / source.name)
    # What was given is the same for all trials.
    space = {key: each for key, each in tuning.read_space(source.config("tuning")).items() if key not in overrides}
    defaults: dict[str, Any] = {key: reduce(getitem, key.split("."), config) for key in space}
    run_id_file = out / "mlflow_run_id"

    @contextmanager
    def tracked() -> Iterator[Any]:
        with tracking.open_tracker(
            settings.run["tracking"] is not False,
            tracking_uri=settings.run["tracking_uri"],
            experiment=settings.run["experiment"],
            run_name=settings.run["run_name"] or f"tune {source.name}",
            resume_run_id=run_id_file.read_text().strip() if run_id_file.is_file() else None,
            folder=Path.cwd(),
        ) as run:
            yield run

    with tracked() as run:
        if run.run_id:
            out.mkdir(parents=True, exist_ok=True)
            run_id_file.write_text(run.run_id)
        run.log_params({"trials": trials, "space": {key: vars(each) for key, each in space.items()}})
        parent = run.run_id

    def train_once(home: Path, chosen: Mapping[str, float], begun: bool) -> None:
        own = {**settings.run, "out": str(home), "run_name": home.name, "parent_run": parent}
        train(Settings(own, {**overrides, **({"resume": True} if begun else chosen)}))

    best, chosen = tuning.search(out, space, defaults, trials, train_once)
    with tracked() as run:
        run.log_metrics({"best": best}, step=trials)
        run.set_tags({f"best.{key}": value for key, value in chosen.items()})
    print(f"best of {trials} trials {best:.3f}; to train with it: variant={out / tuning.BEST_FILE}")
    return 0


def plan(settings: Settings, memory_gb: float) -> int:
    """Plan a bundle for the cases of a manifest: a YAML file for `variant=`.

    Of a bundle with `group_heights` these heights are planned; of any other, or without one, nnU-Net's network, for
    `nnunet3d` and its relatives.

    Returns:
        0.

    Raises:
        ConfigError: wrong settings, or `out` is there and overwrite was not asked for.
        ManifestError: the manifest cannot be used.
    """
    bundle = settings.bundle() if settings.run["bundle"] else None
    config = settings.config(bundle, "train")["train"] if bundle and bundle.needs_weights else {}
    used = {"spacing_mm", "align_sizes"} if "group_heights" in config else set()
    given = {key: value for key, value in settings.overrides.items() if key not in used}
    manifest, out = given.pop("data", None), Path(settings.run["out"] or "plan.yaml")
    if given or manifest is None:
        raise ConfigError("plan takes data=MANIFEST, a CSV with case_id, image and label, and out=FILE.yaml")
    if out.suffix != ".yaml":
        raise ConfigError(f"out={out}: expected a name that ends in .yaml")
    if out.exists() and not settings.run["overwrite"]:
        raise ConfigError(f"{out} exists. Give another out=, or replace it with overwrite=true.")

    with tqdm(desc="cases", unit="case", file=sys.stderr) as bar:
        if "group_heights" in config:
            from ich_pipeline.roi_groups import equal_count_heights, region_heights, write_groups

            heights = region_heights(str(manifest), config["spacing_mm"], on_case=lambda case_id: bar.update())
            groups = equal_count_heights(heights, len(config["align_sizes"]))
            write_groups(out, heights, groups, config["spacing_mm"])
        else:
            from ich_pipeline.planning import make_plan, take_fingerprint, write_plan

            fingerprint = take_fingerprint(str(manifest), on_case=lambda case_id: bar.update())
            write_plan(out, make_plan(fingerprint, memory_gb), fingerprint, memory_gb)
    print(out)
    return 0


def evaluate(settings: Settings) -> int:
    """Segment the labelled cases of a manifest's split, compare with their labels, write tables and plots.

    Several bundles (`bundle=a,b`) go to a folder each in OUT, with a comparison beside them.

    Returns:
        0 when every case is ok, else 1.

    Raises:
        ConfigError: wrong settings.
        ManifestError: the manifest cannot be used, or has no labelled case in the split.
    """
    each = settings.each_bundle()
    found = [one.bundle() for one in each]
    for one, bundle in zip(each, found, strict=True):  # a wrong key of the last is said before the first is run
        one.config(bundle, "inference", "evaluate")
    if any(bundle.finds_boxes for bundle in found):
        if len(found) > 1:
            raise ConfigError(f"bundle={settings.run['bundle']}: detectors of boxes are evaluated one at a time.")
        return _evaluate_boxes(settings, found[0])
    several = len(each) > 1
    names = _unique([bundle.name for bundle in found])
    out = Path(settings.run["out"] or ("evaluation" if several else Path("evaluation") / names[0]))

    from ich_pipeline.paper_tables import write_paper_tables

    methods, status = [], 0
    for one, bundle, name in zip(each, found, names, strict=True):
        ended, method, text = _evaluate_bundle(one, bundle, name, out / name if several else out)
        methods.append(method)
        status = max(status, ended)
    if several:
        from ich_pipeline.comparison import write_comparison

        text = write_comparison(methods, out)
        write_text(out / "comparison.md", text)
    print(text)
    write_paper_tables(methods, out)
    print(out / "paper_tables.md")
    if not several and settings.run["html"]:
        print(out / HTML_NAME)
    return status


def calibrate(settings: Settings) -> int:
    """Choose temperature, threshold and smallest lesion on a split's labelled cases; write them into the bundle.

    Returns:
        0.

    Raises:
        ConfigError: wrong settings, an installed bundle, one that cannot be calibrated, or cases that do not suffice.
        ManifestError: the manifest cannot be used, or has no labelled case in the split.
        ReadError, GeometryError: a case cannot be read.
    """
    bundle = settings.bundle()
    configs = settings.config(bundle, "inference", "evaluate")

    from ich_pipeline import calibration
    from ich_pipeline.evaluation import labelled_cases

    calibration.require_keys(bundle, configs["inference"])
    if bundle.path.is_relative_to(bundles.resource("bundles").resolve()):
        raise ConfigError(
            f"{bundle.path} is an installed bundle, expected one of yours. Copy the folder, name the copy."
        )
    cases = labelled_cases(configs["evaluate"]["data"], settings.run["split"])
    out = Path(settings.run["out"] or Path("calibration") / bundle.name)
    report = RunReport({"run": settings.run} | configs)
    report.bundle = {"name": bundle.name, "sha256": bundle.metadata["weights_sha256"]}
    report.add_input(Path(configs["evaluate"]["data"]))
    with tqdm(total=len(cases), desc="scans", unit="scan", file=sys.stderr) as bar:
        scores = calibration.score_cases(bundle, configs["inference"], cases, on_case=lambda case_id: bar.update())
    found = calibration.choose(scores)
    calibration.apply(bundle, found)
    print(calibration.write_calibration(found, out))
    report.write(out / "run.json", exit_status=0)
    return 0


def _evaluate_boxes(settings: Settings, bundle: Bundle) -> int:
    """Evaluate a detector of boxes; the exit status."""
    configs = settings.config(bundle, "inference", "evaluate")
    split, out = settings.run["split"], Path(settings.run["out"] or Path("evaluation") / bundle.name)

    from ich_pipeline import tracking
    from ich_pipeline.box_evaluation import evaluate_boxes
    from ich_pipeline.manifest import read_manifest

    report = RunReport({"run": settings.run} | configs)
    report.bundle = {"name": bundle.name, "sha256": bundle.metadata["weights_sha256"]}
    evaluation = evaluate_boxes(bundle, configs, split, out, report)
    status = int(bool(evaluation.failed))
    report.write(out / "run.json", exit_status=status)
    print((out / "box_scores.md").read_text())
    manifest = Path(configs["evaluate"]["data"])
    with tracking.open_tracker(
        settings.run["tracking"] is not False,
        tracking_uri=settings.run["tracking_uri"],
        experiment=settings.run["experiment"],
        run_name=settings.run["run_name"] or f"evaluate {bundle.name} {split}",
        folder=Path.cwd(),
        patient_ids=[case.patient_id for case in read_manifest(manifest)],
    ) as run:
        run.set_tags(tracking.provenance_tags(manifest=manifest) | {"split": split, "bundle": bundle.name})
        run.log_params(configs["inference"])
        run.log_metrics(evaluation.metrics(), step=0)
    return status


def _unique(names: Sequence[str]) -> list[str]:
    """Names made unique by a number: two trainings of one architecture have the same."""
    return [name if names.index(name) == n else f"{name}_{names[:n].count(name) + 1}" for n, name in enumerate(names)]


def _evaluate_bundle(settings: Settings, bundle: Bundle, name: str, out: Path) -> tuple[int, Any, str]:
    """Evaluate one bundle into `out`; the exit status, the `Method` that tables need of it, and its scores in words."""
    configs = settings.config(bundle, "inference", "evaluate")

    from ich_pipeline.evaluation import compare, labelled_cases, write_evaluation
    from ich_pipeline.manifest import PHANTOM_FILE, read_manifest
    from ich_pipeline.paper_tables import Method

    manifest, split = configs["evaluate"]["data"], settings.run["split"]
    cases = labelled_cases(manifest, split)
    known = read_manifest(manifest)  # of other splits too: a table of boxes is that of all cases
    table, regions, probabilities = out / "volumes.csv", out / "regions", out / "probabilities"
    status = segment_cases(
        cases,
        [(bundle, configs["inference"])],
        out / "masks",
        table,
        settings,
        regions=regions,
        probabilities=probabilities,
        known=known,
    )
    evaluation = compare(cases, table, regions=regions, probabilities=probabilities, subtypes=settings.run["subtypes"])
    text = write_evaluation(evaluation, out)
    _write_html(table, settings, say=False)
    if settings.run["tracking"] is not False:
        from ich_pipeline import tracking

        with tracking.open_tracker(
            True,
            tracking_uri=settings.run["tracking_uri"],
            experiment=settings.run["experiment"],
            run_name=settings.run["run_name"] or f"evaluate {name} {split}",
            folder=Path.cwd(),
            patient_ids=[case.patient_id for case in cases],
        ) as run:
            run.set_tags(tracking.provenance_tags(manifest=Path(manifest)) | {"split": split, "bundle": bundle.name})
            run.log_params(configs["inference"])
            run.log_metrics(evaluation.metrics(), step=0)
            for file in ("evaluation.csv", "volumes.csv"):
                run.log_table(out / file)
            for case_id in evaluation.worst_and_best():
                if (out / "pictures" / f"{case_id}.png").is_file():
                    run.log_artifact(out / "pictures" / f"{case_id}.png", "pictures")
    synthetic = "synthetic phantoms, " if Path(manifest).with_name(PHANTOM_FILE).is_file() else ""
    data = f"{synthetic}{Path(manifest).name}, split {split}, {len(cases)} scans"
    return status, Method(name, data, evaluation), text
