"""Several bundles on the same cases: scores side by side, and paired differences."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ich_pipeline.bootstrap import REPLICATES, Resampler, ratio
from ich_pipeline.files import write_csv_rows
from ich_pipeline.overlap import Aggregate, CaseAgreement
from ich_pipeline.paper_tables import Method
from ich_pipeline.report import interval

SHOWN = ("dice", "nsd", "hd95_mm", "lesion_f1", "abs_error_ml", "sensitivity", "false_alarm_ml")
PAIRED: dict[str, Callable[[CaseAgreement], float]] = {
    "dice": lambda row: row.dice,
    "nsd": lambda row: row.nsd,
    "abs_error_ml": lambda row: abs(row.error_ml),
}
_COLUMNS = ("method", "score", "group", "n", "missed", "value", "low", "high", "median")


def write_comparison(methods: Sequence[Method], out: Path) -> str:
    """Write `comparison.csv`, a row a score of a method.

    Returns:
        Markdown: the scores people ask for first, then differences to the first method over the bleeding cases that
        both scored, with intervals over patients.
    """
    write_csv_rows(out / "comparison.csv", _csv_rows(methods), _COLUMNS)
    text = f"# {len(methods)} bundles on {methods[0].data}\n\nBrackets: 95 % bootstrap interval over patients.\n\n"
    text += f"| | scored | failed | {' | '.join(SHOWN)} |\n|---|--:|--:|{'--:|' * len(SHOWN)}\n"
    for method in methods:
        summary = method.evaluation.summary
        cells = " | ".join(_counted(summary[name]) for name in SHOWN)
        text += f"| {method.name} | {summary.n_cases} | {summary.n_failed} | {cells} |\n"
    first = methods[0]
    text += f"\nDifference to {first.name}, bleeding cases that both scored:\n\n"
    text += f"| | cases | {' | '.join(PAIRED)} |\n|---|--:|{'--:|' * len(PAIRED)}\n"
    for method in methods[1:]:
        found = paired_differences(first, method)
        n = found["dice"].n
        text += f"| {method.name} | {n} | {' | '.join(interval(found[name].mean) for name in PAIRED)} |\n"
    return text


def paired_differences(first: Method, second: Method) -> dict[str, Aggregate]:
    """Mean of second less first over the bleeding cases that both scored; n is their number."""
    before = {row.case_id: row for row in first.evaluation.rows if row.positive}
    pairs = [(before[row.case_id], row) for row in second.evaluation.rows if row.case_id in before]
    patients = Resampler([row.patient_id for row, _ in pairs], REPLICATES, seed=0)
    found = {}
    for name, score in PAIRED.items():
        differences = np.array([score(after) - score(row) for row, after in pairs])
        missed = sum(bool(after.missed) for _, after in pairs)
        mean = patients.estimate(ratio(differences, np.ones(len(pairs))))
        found[name] = Aggregate(name, "positive", len(pairs), missed, mean)
    return found


def _counted(aggregate: Aggregate) -> str:
    return interval(aggregate.mean) + (f", {aggregate.missed} missed" if aggregate.missed else "")


def _csv_rows(methods: Sequence[Method]) -> list[dict[str, object]]:
    return [
        {
            "method": method.name,
            "score": each.name,
            "group": each.group,
            "n": each.n,
            "missed": each.missed,
            **{
                name: "" if number is None else f"{number:.6f}"
                for name, number in (
                    ("value", each.mean.value),
                    ("low", each.mean.low),
                    ("high", each.mean.high),
                    ("median", each.median.value if each.median else None),
                )
            },
        }
        for method in methods
        for each in (*method.evaluation.summary.aggregates, *method.evaluation.coarse_recall)
    ]
