"""A cohort's volumes, measured in more than one way: agreement over all cases and by group, tables, plots."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ich_pipeline.agreement import VolumeAgreement, volume_agreement
from ich_pipeline.errors import ManifestError
from ich_pipeline.files import write_csv_rows
from ich_pipeline.labels import Subtype
from ich_pipeline.pictures import bland_altman_plot, volume_scatter, write_png
from ich_pipeline.report import agreement_markdown
from ich_pipeline.volumetry import SubtypeMl

# As Xu et al. (arXiv 2401.04570, Fig. 2) part their cases: below the first, up to the second, above it.
VOLUME_EDGES_ML = (30.0, 60.0)
VOLUME_NAMES = ("below 30 mL", "30 to 60 mL", "above 60 mL")
LESION_NAMES = ("no lesion", "1 lesion", "2 to 5 lesions", "more than 5 lesions")
ALL = "all"
Column = Sequence[float | None]
Agreements = dict[str, dict[str, VolumeAgreement]]


@dataclass(frozen=True)
class Cohort:
    """Columns of one length: a case each.

    Attributes:
        reference_name: what the estimates are held against.
        estimates_ml: by name.
        patient_ids: what the bootstrap resamples.
        groups: for each way of grouping, such as `volume`, the name of each case's group; empty for a case in none.
    """

    reference_name: str
    reference_ml: Column
    estimates_ml: Mapping[str, Column]
    patient_ids: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def agreements(self) -> Agreements:
        """Agreement of every estimate over all cases and over each group: name of the group, name of the estimate."""
        found = {ALL: self._within(range(len(self.patient_ids)))}
        for names in self.groups.values():
            for name in dict.fromkeys(sorted(filter(None, names), key=_order)):
                found[name] = self._within([n for n, each in enumerate(names) if each == name])
        return found

    def _within(self, held: Sequence[int]) -> dict[str, VolumeAgreement]:
        reference_ml, patients = [self.reference_ml[n] for n in held], [self.patient_ids[n] for n in held]
        return {
            name: volume_agreement(reference_ml, [column[n] for n in held], patients)
            for name, column in self.estimates_ml.items()
        }


def volume_group(volume_ml: float | None) -> str:
    """Name of the group a reference volume is in; empty without one."""
    if volume_ml is None:
        return ""
    return VOLUME_NAMES[int(volume_ml >= VOLUME_EDGES_ML[0]) + int(volume_ml > VOLUME_EDGES_ML[1])]


def lesion_group(n_lesions: int) -> str:
    """Name of the group of a number of lesions."""
    return LESION_NAMES[min(n_lesions, 1) + int(n_lesions > 1) + int(n_lesions > 5)]


def subtype_group(subtype_ml: SubtypeMl | None) -> str:
    """Subtypes in a mask, as `IPH+IVH`; empty without blood or subtypes."""
    return "+".join(kind.name for kind, ml in sorted((subtype_ml or {}).items()) if ml)


def _order(name: str) -> tuple[int, str]:
    fixed = [*VOLUME_NAMES, *LESION_NAMES]
    return (fixed.index(name) if name in fixed else len(fixed), name)


def read_cohort(table: Path, reference: str, estimates: Sequence[str]) -> Cohort:
    """Two or more columns of any CSV table as a cohort.

    `patient_id` (else `case_id`, else the row) is what the bootstrap resamples. Groups are by the reference's volume,
    and by `n_lesions` and the subtype columns of `volumes.csv` where the table has them.

    Raises:
        ManifestError: no such table or column, or a cell that is no number; rows are named by their line.
    """
    if not table.is_file():
        raise ManifestError(f"{table}: no such table. Check the path.")
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        header, rows = list(reader.fieldnames or ()), list(reader)
    for name in (reference, *estimates):
        if name not in header:
            raise ManifestError(f"{table}: no column {name!r}; it has {', '.join(header)}.")

    def column(name: str) -> list[float | None]:
        return [_number(table, line, name, row[name]) for line, row in enumerate(rows, start=2)]

    reference_ml = column(reference)
    who = next((name for name in ("patient_id", "case_id") if name in header), None)
    patients = [row[who] if who else str(line) for line, row in enumerate(rows)]
    groups = {"volume": [volume_group(ml) for ml in reference_ml]}
    if "n_lesions" in header:
        groups["lesions"] = ["" if n is None else lesion_group(int(n)) for n in column("n_lesions")]
    kinds = {kind: f"volume_{kind.name.lower()}_ml" for kind in Subtype}
    if all(name in header for name in kinds.values()):
        of_kind = {kind: column(name) for kind, name in kinds.items()}
        held = [{kind: ml[n] or 0.0 for kind, ml in of_kind.items()} for n in range(len(rows))]
        groups["subtype"] = [subtype_group(each) for each in held]
    return Cohort(reference, reference_ml, {name: column(name) for name in estimates}, patients, groups)


def _number(table: Path, line: int, name: str, cell: str | None) -> float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        raise ManifestError(f"{table} row {line}: {name} is {cell!r}, expected a number or nothing.") from None


def write_cohort(cohort: Cohort, out: Path, *, plots: Mapping[str, str] | None = None) -> tuple[str, dict[str, str]]:
    """Write `agreement.csv` (a row a statistic) and, for every estimate, a Bland-Altman and a scatter plot.

    Args:
        plots: name of an estimate to what stands before its plots' names; by default every estimate, by its own name.

    Returns:
        Markdown of all cases, estimates side by side; and by estimate that of its groups, side by side.
    """
    agreements = cohort.agreements()
    write_csv_rows(out / "agreement.csv", _csv_rows(agreements), _CSV_COLUMNS)
    if plots is None:
        plots = {name: f"{re.sub('[^A-Za-z0-9]+', '_', name)}_" for name in cohort.estimates_ml}
    for name, before in plots.items():
        pairs = (cohort.reference_ml, cohort.estimates_ml[name], agreements[ALL][name])
        for plot, ending in ((bland_altman_plot, "bland_altman"), (volume_scatter, "scatter")):
            figure = plot(*pairs, reference_name=cohort.reference_name, estimate_name=name)
            write_png(out / f"{before}{ending}.png", figure)
    text = f"Against {cohort.reference_name}. Brackets: 95 % bootstrap interval over patients.\n\n"
    text += agreement_markdown(agreements[ALL])
    by_group = {name: found for name, found in agreements.items() if name != ALL}
    return text, {
        estimate: f"\n{estimate}, by group of the reference:\n\n"
        + agreement_markdown({name: found[estimate] for name, found in by_group.items()})
        for estimate in (cohort.estimates_ml if by_group else ())
    }


_CSV_COLUMNS = ("group", "estimate", "statistic", "value", "low", "high", "n", "n_patients", "missing")


def _csv_rows(agreements: Agreements) -> list[dict[str, object]]:
    return [
        {
            "group": group,
            "estimate": estimate,
            "statistic": statistic,
            **{end: "" if getattr(found, end) is None else f"{getattr(found, end):.6f}" for end in _ENDS},
            "n": agreement.n,
            "n_patients": agreement.n_patients,
            "missing": agreement.missing,
        }
        for group, by_estimate in agreements.items()
        for estimate, agreement in by_estimate.items()
        for statistic, found in agreement.statistics.items()
    ]


_ENDS = ("value", "low", "high")
