"""Predicted masks against labels on the native grid: every case scored, none dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ich_pipeline.agreement import VolumeAgreement
from ich_pipeline.cohort import ALL, Cohort, lesion_group, subtype_group, volume_group, write_cohort
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.geometry import Grid, require_same_grid
from ich_pipeline.manifest import read_manifest
from ich_pipeline.overlap import Aggregate, CaseAgreement, Summary, compare_masks, count_lesions, summarise
from ich_pipeline.pictures import montage, precision_recall_plot, write_png
from ich_pipeline.precision_recall import PrecisionRecall, precision_recall, score_histogram
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.report import (
    aggregates_markdown,
    interval,
    read_rows,
    summary_markdown,
    write_agreement,
    write_text,
)
from ich_pipeline.volumetry import VolumeReport, measure

MODEL, TADA, ABC2 = "voxels of the predicted mask", "Tada on the reference mask", "ABC/2 on the reference mask"


def labelled_cases(manifest: str | Path | None, split: str) -> list[CaseRecord]:
    """Cases of one split of a manifest; every one must have a label.

    Raises:
        ConfigError: no manifest was named.
        ManifestError: it cannot be used, or the split is empty.
    """
    if not manifest:
        raise ConfigError("evaluation needs data=MANIFEST, a CSV with case_id, image, label and split")
    records = read_manifest(Path(manifest), require_label=True, check_grids=True)
    chosen = [record for record in records if record.split == split]
    if not chosen:
        found = sorted({record.split or "(empty)" for record in records})
        raise ManifestError(f"{manifest}: no case in split '{split}'; found {', '.join(found)}. Give split=.")
    return chosen


def labelled_items(manifest: str | Path | None, split: str) -> list[dict[str, str]]:
    """`labelled_cases` as a MONAI data list."""
    return [case.item() for case in labelled_cases(manifest, split)]


@dataclass(frozen=True)
class Scored:
    """A case with its mask scored and its label measured.

    Attributes:
        subtypes: in the label, as `IPH+IVH`: measured, or what the manifest's column `subtype` says; empty if neither.
        seconds: that the mask took, from the table of the batch.
    """

    scores: CaseAgreement
    reference: VolumeReport
    subtypes: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a batch.

    Attributes:
        scored: a case each, in the order of the manifest; failed cases are not among them.
        summary: aggregates over cases, with the number of failed ones.
        cohort: volumes of the bleeding cases, in the three ways of measuring them; None without such cases.
        curve: precision and recall of the voxels over all cases; None where not every case has its probabilities.
        coarse_recall: share of the label's lesions that a cascade's first stage touches, all and by size; empty
            where there is no such stage.
        notes: what a reader of the scores should know.
    """

    scored: list[Scored]
    summary: Summary
    cohort: Cohort | None = None
    curve: PrecisionRecall | None = None
    coarse_recall: tuple[Aggregate, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> list[CaseAgreement]:
        """The scores alone."""
        return [each.scores for each in self.scored]

    @cached_property
    def volumes(self) -> dict[str, VolumeAgreement]:
        """Agreement with the label's voxel volume over the bleeding cases, by way of measuring."""
        return self.cohort.agreements()[ALL] if self.cohort else {}

    def metrics(self) -> dict[str, float]:
        """Numbers for tracking, named as in the tables."""
        numbers = {
            f"{each.group}/{each.name}": each.mean.value
            for each in (*self.summary.aggregates, *self.coarse_recall)
            if each.mean.value is not None
        }
        errors = {name: agreement.statistics["mae_ml"].value for name, agreement in self.volumes.items()}
        maes = {
            "volume/model_mae_ml": errors.get(MODEL),
            "volume/tada_mae_ml": errors.get(TADA),
            "volume/abc2_mae_ml": errors.get(ABC2),
            "voxels/average_precision": self.curve.average_precision.value if self.curve else None,
        }
        return {name: float(value) for name, value in {**numbers, **maes}.items() if value is not None}

    def worst_and_best(self, each: int = 4) -> list[str]:
        """Case ids with the lowest and highest Dice."""
        ranked = [row.case_id for row in sorted(self.rows, key=lambda row: row.dice)]
        return list(dict.fromkeys(ranked[:each] + ranked[-each:]))


def compare(
    cases: Sequence[CaseRecord],
    table: Path,
    *,
    regions: Path | None = None,
    probabilities: Path | None = None,
    subtypes: bool = False,
) -> Evaluation:
    """Score the masks of a batch against the labels of its cases.

    Args:
        cases: with labels.
        table: `volumes.csv` of the batch; a case that failed there is counted, not scored.
        regions: folder of what a cascade's first stage found in these cases, if the bundle has one.
        probabilities: folder of the voxels' probabilities, 0 to 255, if they were kept.
        subtypes: the labels hold the values of `labels.py`; volumes are grouped by subtype as well.

    Raises:
        GeometryError: a mask and its label are on different grids.
        ManifestError: the table has no row for a case.
    """
    by_id = {row.case_id: row for row in read_rows(table)}
    missing = [case.case_id for case in cases if case.case_id not in by_id]
    if missing:
        raise ManifestError(f"{table}: no row for {missing[0]} ({len(missing)} cases in all). Run the batch again.")
    scored: list[Scored] = []
    coarse, histograms, several, failed = [], [], 0, 0
    for case in cases:
        row = by_id[case.case_id]
        if row.status != "ok" or row.mask is None or case.label is None:
            failed += 1
            continue
        (pred, _), (label, _) = read_mask(row.mask, case.case_id), read_mask(case.label, case.case_id)
        several += not subtypes and int(label.values.max()) > int(label.values[label.values > 0].min(initial=255))
        probability, region = (_kept(folder, row.mask, case.case_id, label.grid) for folder in (probabilities, regions))
        reference = measure(case.case_id, label, subtypes=subtypes)
        scores = compare_masks(
            case.case_id,
            pred,
            label,
            patient_id=case.patient_id,
            probability=None if probability is None else np.asarray(probability.values),
        )
        named = subtype_group(reference.subtype_ml) if subtypes else case.extra.get("subtype", "")
        scored.append(Scored(scores, reference, named, row.seconds))
        if probability is not None:
            histograms.append(score_histogram(np.asarray(probability.values), label.values))
        if region is not None:
            # Its lesions alone: distances to the surface of a region as large as the head took minutes.
            coarse.append(replace(scores, lesions=count_lesions(region, label)))
    notes: list[str] = []
    if several:
        notes.append(
            f"The labels of {several} cases hold several values: all above 0 count. With subtypes: subtypes=true."
        )
    curve = None
    if histograms and len(histograms) == len(scored):
        voxel_ml = [each.reference.voxel_volume_mm3 / 1000 for each in scored]
        curve = precision_recall(histograms, voxel_ml, [each.scores.patient_id for each in scored])
    elif probabilities and scored:
        notes.append(
            f"No precision-recall curve: {len(scored) - len(histograms)} of {len(scored)} cases have no probabilities "
            f"in {probabilities.name}/. overwrite=true segments them again."
        )
    return Evaluation(
        scored,
        summarise([each.scores for each in scored], n_failed=failed),
        _bleeding(scored),
        curve,
        _coarse_recall(coarse) if coarse else (),
        tuple(notes),
    )


def _kept(folder: Path | None, mask_file: Path, case_id: str, grid: Grid) -> NativeMask | None:
    """What was kept of a case beside its mask."""
    if folder is None or not (folder / mask_file.name).is_file():
        return None
    kept, _ = read_mask(folder / mask_file.name, case_id)
    require_same_grid(case_id, f"{folder.name}/{mask_file.name}", kept.grid, grid)
    return kept


def _bleeding(scored: Sequence[Scored]) -> Cohort | None:
    held = [each for each in scored if each.scores.positive]
    if not held:
        return None
    label_ml = [each.scores.label_ml for each in held]
    groups = {
        "volume": [volume_group(ml) for ml in label_ml],
        "lesions": [lesion_group(each.reference.n_lesions) for each in held],
        "subtype": [each.subtypes for each in held],
    }
    estimates = {
        MODEL: [each.scores.pred_ml for each in held],
        TADA: [each.reference.tada_ml for each in held],
        ABC2: [each.reference.abc2_ml for each in held],
    }
    patients = [each.scores.patient_id for each in held]
    return Cohort("voxels of the reference mask", label_ml, estimates, patients, groups)


def _coarse_recall(rows: Sequence[CaseAgreement]) -> tuple[Aggregate, ...]:
    """Lesion recall of a cascade's first stage, all and by size: what it misses, its second stage sees by chance."""
    found = [each for each in summarise(rows).aggregates if each.name.startswith("lesion_recall")]
    return tuple(replace(each, name=f"coarse_{each.name}") for each in found)


def write_evaluation(evaluation: Evaluation, out: Path) -> str:
    """Write `evaluation.csv`, `evaluation.md`, `agreement.csv` and the plots.

    Returns:
        The Markdown summary; the file has the volumes by group as well.
    """
    write_agreement(out / "evaluation.csv", evaluation.rows)
    text = summary_markdown(evaluation.summary)
    if evaluation.coarse_recall:
        text += "\nLesions of the label that the first stage touches: a cascade's second stage looks nowhere else.\n\n"
        text += aggregates_markdown(evaluation.coarse_recall)
    if evaluation.curve:
        ap = evaluation.curve.average_precision
        text += f"\nAverage precision of the voxels of all {evaluation.curve.n} cases together: {interval(ap)}.\n"
        write_png(out / "precision_recall.png", precision_recall_plot(evaluation.curve))
    else:
        (out / "precision_recall.png").unlink(missing_ok=True)  # one of an earlier run would mislead
    text += "".join(f"\n{note}\n" for note in evaluation.notes)
    by_group = ""
    if evaluation.cohort:
        overall, groups = write_cohort(evaluation.cohort, out, plots={MODEL: ""})
        text += f"\nVolumes of the bleeding cases. {overall}"
        by_group = groups.get(MODEL, "")
    write_text(out / "evaluation.md", text + by_group)
    return text


def draw_with_labels(cases: Sequence[CaseRecord], table: Path, pictures: Path) -> None:
    """Redraw the montages of a batch with the label's outline beside the mask's."""
    by_id = {row.case_id: row for row in read_rows(table)}
    for case in cases:
        row = by_id[case.case_id]
        if row.mask is None or case.label is None:
            continue
        scan = read_scan(case.image, case.case_id, case.series)
        (mask, _), (label, _) = read_mask(row.mask), read_mask(case.label)
        picture = montage(scan.image_hu, mask, case_id=case.case_id, label=label, report=row.report)
        write_png(pictures / f"{case.case_id}.png", picture)
