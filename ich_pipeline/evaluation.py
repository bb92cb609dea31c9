"""Predicted masks against labels on the native grid: every case scored, none dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ich_pipeline.agreement import (
    Aggregate,
    CaseAgreement,
    Summary,
    VolumeAgreement,
    compare_masks,
    summarise,
    volume_agreement,
)
from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.manifest import read_manifest
from ich_pipeline.pictures import bland_altman_plot, montage, volume_scatter, write_png
from ich_pipeline.reading import read_mask, read_scan
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import (
    aggregates_markdown,
    agreement_markdown,
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
    return [{"image": str(case.image), "label": str(case.label)} for case in labelled_cases(manifest, split)]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a batch.

    Attributes:
        rows: a case each, in the order of the manifest; failed cases are not among them.
        references: measurement of each row's label.
        summary: aggregates over rows, with the number of failed cases.
        volumes: agreement with the label's voxel volume over the bleeding cases, by way of measuring.
        coarse_recall: share of the label's lesions that a cascade's first stage touches, all and by size; empty
            where there is no such stage.
    """

    rows: list[CaseAgreement]
    references: list[VolumeReport]
    summary: Summary
    volumes: dict[str, VolumeAgreement]
    coarse_recall: tuple[Aggregate, ...] = ()

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
        }
        return {name: float(value) for name, value in {**numbers, **maes}.items() if value is not None}

    def worst_and_best(self, each: int = 4) -> list[str]:
        """Case ids with the lowest and highest Dice."""
        ranked = [row.case_id for row in sorted(self.rows, key=lambda row: row.dice)]
        return list(dict.fromkeys(ranked[:each] + ranked[-each:]))


def compare(cases: Sequence[CaseRecord], table: Path, regions: Path | None = None) -> Evaluation:
    """Score the masks of a batch against the labels of its cases.

    Args:
        cases: with labels.
        table: `volumes.csv` of the batch; a case that failed there is counted, not scored.
        regions: folder of what a cascade's first stage found in these cases, if the bundle has one.

    Raises:
        GeometryError: a mask and its label are on different grids.
        ManifestError: the table has no row for a case.
    """
    by_id = {row.case_id: row for row in read_rows(table)}
    missing = [case.case_id for case in cases if case.case_id not in by_id]
    if missing:
        raise ManifestError(f"{table}: no row for {missing[0]} ({len(missing)} cases in all). Run the batch again.")
    rows, references, coarse, failed = [], [], [], 0
    for case in cases:
        mask_file = by_id[case.case_id].mask
        if by_id[case.case_id].status != "ok" or mask_file is None or case.label is None:
            failed += 1
            continue
        (pred, _), (label, _) = read_mask(mask_file, case.case_id), read_mask(case.label, case.case_id)
        rows.append(compare_masks(case.case_id, pred, label, patient_id=case.patient_id))
        references.append(measure(case.case_id, label))
        if regions and (file := regions / mask_file.name).is_file():
            region, _ = read_mask(file, case.case_id)
            coarse.append(compare_masks(case.case_id, region, label, patient_id=case.patient_id))
    summary = summarise(rows, n_failed=failed)
    bleeding = [(row, reference) for row, reference in zip(rows, references, strict=True) if row.positive]
    truth = [row.label_ml for row, _ in bleeding]
    patients = [row.patient_id for row, _ in bleeding]
    estimates = {
        MODEL: [row.pred_ml for row, _ in bleeding],
        TADA: [reference.tada_ml for _, reference in bleeding],
        ABC2: [reference.abc2_ml for _, reference in bleeding],
    }
    volumes = {name: volume_agreement(truth, column, patients) for name, column in estimates.items()} if truth else {}
    return Evaluation(rows, references, summary, volumes, _coarse_recall(coarse) if coarse else ())


def _coarse_recall(rows: Sequence[CaseAgreement]) -> tuple[Aggregate, ...]:
    """Lesion recall of a cascade's first stage, all and by size: what it misses, its second stage sees by chance."""
    found = [each for each in summarise(rows).aggregates if each.name.startswith("lesion_recall")]
    return tuple(replace(each, name=f"coarse_{each.name}") for each in found)


def write_evaluation(evaluation: Evaluation, out: Path) -> str:
    """Write `evaluation.csv`, `evaluation.md` and the plots.

    Returns:
        The Markdown summary.
    """
    write_agreement(out / "evaluation.csv", evaluation.rows)
    text = summary_markdown(evaluation.summary)
    if evaluation.coarse_recall:
        text += "\nLesions of the label that the first stage touches: a cascade's second stage looks nowhere else.\n\n"
        text += aggregates_markdown(evaluation.coarse_recall)
    if evaluation.volumes:
        text += "\nVolumes of the bleeding cases against the voxel volume of the reference mask.\n\n"
        text += agreement_markdown(evaluation.volumes)
        pairs = [(row.label_ml, row.pred_ml) for row in evaluation.rows if row.positive]
        truth, pred = [a for a, _ in pairs], [b for _, b in pairs]
        names = {"reference_name": "reference mask", "estimate_name": "predicted mask"}
        write_png(out / "bland_altman.png", bland_altman_plot(truth, pred, evaluation.volumes[MODEL], **names))
        write_png(out / "scatter.png", volume_scatter(truth, pred, evaluation.volumes[MODEL], **names))
    write_text(out / "evaluation.md", text)
    return text


def draw_with_labels(cases: Sequence[CaseRecord], table: Path, pictures: Path) -> None:
    """Redraw the montages of a batch with the label's outline beside the mask's."""
    by_id = {row.case_id: row for row in read_rows(table)}
    for case in cases:
        row = by_id[case.case_id]
        if row.mask is None or case.label is None:
            continue
        scan = read_scan(case.image, case.case_id)
        (mask, _), (label, _) = read_mask(row.mask), read_mask(case.label)
        picture = montage(scan.image_hu, mask, case_id=case.case_id, label=label, report=row.report)
        write_png(pictures / f"{case.case_id}.png", picture)
