"""Tables: a row a case, a row a lesion, a row a score. Written whole or not at all, and read back to resume."""

import csv
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from ich_pipeline.agreement import VolumeAgreement
from ich_pipeline.bootstrap import Estimate
from ich_pipeline.errors import ManifestError, reason
from ich_pipeline.files import atomic_path, write_csv_rows
from ich_pipeline.growth import Growth
from ich_pipeline.labels import Subtype
from ich_pipeline.overlap import LESION_BIN_NAMES, Aggregate, CaseAgreement, Summary
from ich_pipeline.records import CaseRecord
from ich_pipeline.run_report import CaseStatus
from ich_pipeline.volumetry import LesionReport, SubtypeMl, VolumeReport

log = logging.getLogger(__name__)

STATUSES = get_args(CaseStatus)
LESIONS_NAME = "lesions.csv"
HTML_NAME = "report.html"

_SUBTYPE_COLUMNS = {kind: f"volume_{kind.name.lower()}_ml" for kind in Subtype}
_LESION_COLUMNS = [each.name for each in fields(LesionReport) if each.name != "subtype_ml"]
_REPORT_COLUMNS = [each.name for each in fields(VolumeReport) if each.name not in ("subtype_ml", "lesions")]
# The sums over lesions came after the columns that design and users rely on, and stand behind them.
_FIRST_SUM = _REPORT_COLUMNS.index("abc2_lesions_sum_ml")
VOLUME_COLUMNS = [
    *("case_id", "status", "error", "flags", "image", "mask"),
    *_REPORT_COLUMNS[:_FIRST_SUM],
    *("seconds", "bundle", "weights_sha256"),
    *_REPORT_COLUMNS[_FIRST_SUM:],
]


@dataclass(frozen=True)
class CaseRow:
    """One case of volumes.csv and its lesions.

    Attributes:
        status: `ok` with a report; `failed` with an error in words and no report; `skipped` without either.
        flags: short names without `;`.
        image, mask: absolute paths, or None.
        extra: further columns, name to text, behind the fixed ones.

    Raises:
        ValueError: the parts contradict each other, or an extra column has the name of a fixed one.
    """

    case_id: str
    status: CaseStatus
    error: str = ""
    flags: tuple[str, ...] = ()
    image: Path | None = None
    mask: Path | None = None
    report: VolumeReport | None = None
    seconds: float | None = None
    bundle: str = ""
    weights_sha256: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"{self.case_id}: status {self.status!r}, expected one of {', '.join(STATUSES)}.")
        if (self.status == "ok") != (self.report is not None):
            raise ValueError(f"{self.case_id}: status {self.status}: only a case that is ok has a report, and always.")
        if self.status == "failed" and not self.error.strip():
            raise ValueError(f"{self.case_id}: failed without a reason. Say in `error` what happened.")
        if any(";" in flag for flag in self.flags):
            raise ValueError(f"{self.case_id}: flags {self.flags}: ';' separates flags in the table; use another sign.")
        taken = set(self.extra) & {*VOLUME_COLUMNS, *_SUBTYPE_COLUMNS.values()}
        if taken:
            raise ValueError(f"{self.case_id}: extra columns {sorted(taken)} have a fixed meaning. Rename them.")


def failed_row(case: CaseRecord, error: BaseException) -> CaseRow:
    """The row of a case that could not be done: no numbers, the reason in words."""
    log.debug("%s failed", case.case_id, exc_info=error)
    return CaseRow(case_id=case.case_id, status="failed", error=reason(error), image=case.image)


def write_tables(table: Path | str, rows: Sequence[CaseRow]) -> None:
    """Write `table` (volumes.csv) and lesions.csv beside it.

    Numbers have six decimals, booleans are 1 or 0, and what does not exist is an empty cell. Subtype columns appear
    when a mask has subtypes.

    Raises:
        ValueError: a number is not finite, or a case occurs twice.
    """
    table = Path(table)
    twice = [case_id for case_id, n in Counter(row.case_id for row in rows).items() if n > 1]
    if twice:
        raise ValueError(f"{table.name}: cases {twice} occur twice. Give each case its own id.")
    with_subtypes = any(row.report and row.report.subtype_ml is not None for row in rows)
    subtypes = list(_SUBTYPE_COLUMNS.values()) if with_subtypes else []
    extra = list(dict.fromkeys(name for row in rows for name in row.extra))
    # Lesions first: a volumes.csv that can be read is always accompanied by its lesions.
    write_csv_rows(
        table.with_name(LESIONS_NAME),
        (
            _cells(row.case_id, {"case_id": row.case_id, **measures(lesion)})
            for row in rows
            if row.report
            for lesion in row.report.lesions
        ),
        ["case_id", *_LESION_COLUMNS, *subtypes],
    )
    write_csv_rows(
        table,
        (_cells(row.case_id, case_values(row, table.parent)) for row in rows),
        [*VOLUME_COLUMNS, *subtypes, *extra],
    )


def read_rows(table: Path | str) -> list[CaseRow]:
    """Read back what write_tables wrote, to resume; writing it again gives the same files.

    Raises:
        ManifestError: a column is missing, a cell cannot be read, or lesions.csv does not fit the table.
    """
    table = Path(table)
    lesions: dict[str, list[LesionReport]] = {}
    beside = table.with_name(LESIONS_NAME)
    for cells in _read(beside, ["case_id", *_LESION_COLUMNS]) if beside.exists() else ():
        try:
            lesions.setdefault(cells["case_id"], []).append(
                LesionReport(**_parse(LesionReport, _LESION_COLUMNS, cells), subtype_ml=_parse_subtypes(cells))
            )
        except ValueError as reason:
            raise ManifestError(
                f"{beside}: case {cells['case_id']}: {reason}. Remove the table to start anew."
            ) from None
    rows = []
    for cells in _read(table, VOLUME_COLUMNS):
        try:
            rows.append(_parse_case(cells, tuple(lesions.get(cells["case_id"], ())), table.parent))
        except ValueError as reason:
            raise ManifestError(
                f"{table}: case {cells['case_id']}: {reason}. Remove the table to start anew."
            ) from None
    return rows


def case_values(row: CaseRow, folder: Path) -> dict[str, Any]:
    """Every column of one case and its value, with paths relative to `folder`."""
    return {
        "case_id": row.case_id,
        "status": row.status,
        "error": row.error,
        "flags": ";".join(row.flags),
        "image": _relative(row.image, folder),
        "mask": _relative(row.mask, folder),
        "seconds": row.seconds,
        "bundle": row.bundle,
        "weights_sha256": row.weights_sha256,
        **(measures(row.report) if row.report else {}),
        **row.extra,
    }


def measures(report: VolumeReport | LesionReport) -> dict[str, Any]:
    """Columns of a report and their values, subtypes among them; lesions are a table of their own."""
    values = {each.name: getattr(report, each.name) for each in fields(report)}
    values.pop("lesions", None)
    subtype_ml: SubtypeMl | None = values.pop("subtype_ml")
    return values | {_SUBTYPE_COLUMNS[kind]: ml for kind, ml in (subtype_ml or {}).items()}


def _cells(case_id: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text.

    Raises:
        ValueError: a number is not finite; what could not be measured is None, never NaN.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{case_id}: {name} is {value}, expected a number or nothing. Report the case as failed.")
    return {name: _cell(value) for name, value in values.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _relative(path: Path | None, folder: Path) -> str:
    return "" if path is None else Path(os.path.relpath(path, folder)).as_posix()


def _read(table: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        absent = [name for name in columns if name not in (reader.fieldnames or ())]
        if absent:
            raise ManifestError(f"{table}: columns {absent} are missing: not a table of this version. Remove it.")
        rows = list(reader)
    for line, cells in enumerate(rows, start=2):
        if None in cells or None in cells.values():
            raise ManifestError(f"{table}: row {line} has another number of cells than the header. Remove the table.")
    return rows


def _parse(kind: type, names: Iterable[str], cells: Mapping[str, str]) -> dict[str, Any]:
    types = get_type_hints(kind)
    return {name: _value(types[name], cells[name]) for name in names}


def _value(kind: Any, cell: str) -> Any:
    """A cell as its column's type; an empty one is None where the type allows it."""
    options = get_args(kind)
    if options:
        return None if cell == "" else _value(options[0], cell)
    return bool(int(cell)) if kind is bool else kind(cell)


def _parse_subtypes(cells: Mapping[str, str]) -> SubtypeMl | None:
    if not cells.get(_SUBTYPE_COLUMNS[Subtype.EDH]):
        return None
    return {kind: float(cells[name]) for kind, name in _SUBTYPE_COLUMNS.items()}


def _parse_case(cells: Mapping[str, str], lesions: tuple[LesionReport, ...], folder: Path) -> CaseRow:
    report = None
    if cells["status"] == "ok":
        numbers = _parse(VolumeReport, _REPORT_COLUMNS, cells)
        report = VolumeReport(**numbers, subtype_ml=_parse_subtypes(cells), lesions=lesions)
        if report.n_lesions != len(lesions):
            raise ValueError(f"{report.n_lesions} lesions, {len(lesions)} rows in {LESIONS_NAME}")
    fixed = {*VOLUME_COLUMNS, *_SUBTYPE_COLUMNS.values()}
    return CaseRow(
        case_id=cells["case_id"],
        status=cast(CaseStatus, cells["status"]),
        error=cells["error"],
        flags=tuple(cells["flags"].split(";")) if cells["flags"] else (),
        image=_absolute(cells["image"], folder),
        mask=_absolute(cells["mask"], folder),
        report=report,
        seconds=float(cells["seconds"]) if cells["seconds"] else None,
        bundle=cells["bundle"],
        weights_sha256=cells["weights_sha256"],
        extra={name: text for name, text in cells.items() if name not in fixed},
    )


def _absolute(cell: str, folder: Path) -> Path | None:
    return Path(os.path.abspath(folder / cell)) if cell else None


def write_agreement(path: Path | str, rows: Sequence[CaseAgreement]) -> None:
    """Write the per-case table of an evaluation; a score that does not exist is an empty cell.

    Raises:
        ValueError: a number is not finite.
    """
    cells = [_cells(row.case_id, _agreement_values(row)) for row in rows]
    write_csv_rows(path, cells, AGREEMENT_COLUMNS)


AGREEMENT_COLUMNS = [
    *(each.name for each in fields(CaseAgreement) if each.name not in ("lesions", "slices")),
    *("slices_labelled", "slices_hit"),
    *("lesions_labelled", "lesions_found", "lesions_predicted", "lesions_false", "lesion_f1"),
    *(f"lesions_{what}_{name}" for what in ("labelled", "found") for name in LESION_BIN_NAMES),
]


def _agreement_values(row: CaseAgreement) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in AGREEMENT_COLUMNS if not name.startswith(("lesion", "slices"))}
    values |= {"slices_labelled": len(row.slices), "slices_hit": sum(each.hit for each in row.slices)}
    counts = asdict(row.lesions)
    for what in ("labelled", "found"):
        bins = counts.pop(f"{what}_by_bin")
        values |= {f"lesions_{what}_{name}": n for name, n in zip(LESION_BIN_NAMES, bins, strict=True)}
    return values | {f"lesions_{name}": n for name, n in counts.items()} | {"lesion_f1": row.lesions.f1}


GROWTH_COLUMNS = [each.name for each in fields(Growth)]


def write_growth(path: Path | str, rows: Sequence[Growth]) -> None:
    """Write growth.csv, a row a pair; what does not exist is an empty cell.

    Raises:
        ValueError: a number is not finite.
    """
    write_csv_rows(path, [_cells(row.pair_id, asdict(row)) for row in rows], GROWTH_COLUMNS)


def summary_markdown(summary: Summary) -> str:
    """The aggregates of an evaluation as a Markdown table."""
    failed = f"; {summary.n_failed} failed and are in no score" if summary.n_failed else ""
    lines = [
        f"{summary.n_cases} cases of {summary.n_patients} patients: {summary.n_positive} with blood, "
        f"{summary.n_negative} without{failed}. Brackets: 95 % bootstrap interval over patients.",
        "",
        aggregates_markdown(summary.aggregates),
    ]
    return "\n".join(lines)


def aggregates_markdown(aggregates: Iterable[Aggregate]) -> str:
    """Aggregates as a Markdown table, a line each."""
    lines = [
        "| score | group | n | missed | mean or share | median |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {each.name} | {each.group} | {each.n} | {each.missed} | {interval(each.mean)} | {interval(each.median)} |"
        for each in aggregates
    ]
    return "\n".join(lines) + "\n"


def agreement_markdown(agreements: Mapping[str, VolumeAgreement]) -> str:
    """Volume agreement as a Markdown table, a column for each named estimate against the common reference."""
    columns = list(agreements.values())
    table = {
        "pairs (patients)": [f"{each.n} ({each.n_patients})" for each in columns],
        "without a number": [str(each.missing) for each in columns],
        "reference 0, no relative error": [str(each.zero_reference) for each in columns],
        **{name: [interval(each.statistics[name]) for each in columns] for name in columns[0].statistics},
        "only estimate above threshold": [f"{e.only_estimate_above} (> {e.threshold_ml:g} mL)" for e in columns],
        "only reference above threshold": [f"{e.only_reference_above} (> {e.threshold_ml:g} mL)" for e in columns],
    }
    lines = [f"| | {' | '.join(agreements)} |", f"|---|{'--:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in table.items()]
    return "\n".join(lines) + "\n"


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def interval(estimate: Estimate | None) -> str:
    """A number with its interval in brackets, `-` where there is none."""
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
