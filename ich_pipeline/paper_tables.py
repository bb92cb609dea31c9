"""Published figures beside ours, a table for each of the papers', every row with the data it was measured on.

The figures are in `configs/published.yaml`. No row of ours is on a paper's data unless its `data` says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ich_pipeline.bootstrap import REPLICATES, Estimate, Resampler, ratio
from ich_pipeline.bundles import read_yaml, resource
from ich_pipeline.evaluation import Evaluation, Scored
from ich_pipeline.files import write_csv_rows
from ich_pipeline.labels import Subtype
from ich_pipeline.overlap import Aggregate
from ich_pipeline.report import interval, write_text

PUBLISHED, OURS = "published", "this run"
# Which bleeds Xu et al. average together in their table 2.
WITH_A_RULER = {Subtype.IPH.name, Subtype.IVH.name}


@dataclass(frozen=True)
class Method:
    """A row of ours.

    Attributes:
        name: as the tables call it.
        data: what it was measured on, in words.
    """

    name: str
    data: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Cell:
    """A figure; `sd` is the paper's, interval, `n` and `missed` are ours."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    n: int | None = None
    missed: int | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.n is None:
            return f"{self.value:g}" + (f" ± {self.sd:g}" if self.sd is not None else "")
        return f"{interval(Estimate(self.value, self.low, self.high))}, n {self.n}" + (
            f", {self.missed} missed" if self.missed else ""
        )


def write_paper_tables(methods: Sequence[Method], out: Path) -> None:
    """Write `paper_tables/<id>.csv` for each published table, and all of them as `paper_tables.md`."""
    text = "# Published figures and ours\n\nRows on different data cannot be compared with each other.\n"
    for table in read_yaml(resource("configs") / "published.yaml")["tables"]:
        columns = table["columns"]
        rows = [*_published(table), *_ours(table, methods)]
        with_groups = any(row["group"] for row in rows)
        first = ["source", "data", *(["group"] if with_groups else []), "method"]
        headings = [*(["Stages"] if with_groups else []), "Method", "Data", *(each["heading"] for each in columns)]
        text += f"\n## {table['paper']}: {table['title']}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
        for row in rows:
            cells = [*([row["group"]] if with_groups else []), f"{row['method']} ({row['source']})", row["data"]]
            text += f"| {' | '.join([*cells, *(str(row['cells'][each['key']]) for each in columns)])} |\n"
        text += f"\n{table['note'].strip()}\n"
        write_csv_rows(
            out / "paper_tables" / f"{table['id']}.csv",
            ({name: row[name] for name in first} | _csv_cells(row["cells"]) for row in rows),
            [*first, *_csv_cells({each["key"]: Cell() for each in columns})],
        )
    write_text(out / "paper_tables.md", text)


def _published(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys = [each["key"] for each in table["columns"]]
    rows = []
    for row in table["rows"]:
        values = [*row["values"], *[None] * (len(keys) - len(row["values"]))]
        sd = [*row.get("sd", ()), *[None] * (len(keys) - len(row.get("sd", ())))]
        cells = {key: Cell(value, sd=each) for key, value, each in zip(keys, values, sd, strict=True)}
        data = row.get("data", table.get("data"))
        rows.append(_row(PUBLISHED, data, row.get("group", ""), row["method"], cells))
    return rows


def _ours(table: Mapping[str, Any], methods: Sequence[Method]) -> list[dict[str, Any]]:
    rows = []
    if "tada" in table and methods:
        # The labels are the same whatever the bundle; a case that failed in one of them is measured by another.
        scored = {each.scores.case_id: each for method in methods for each in method.evaluation.scored}
        found = _volume_errors(list(scored.values()), lambda each: each.reference.tada_ml - each.scores.label_ml)
        cells = {each["key"]: _cell(found.get(each["ours"]), each) for each in table["columns"]}
        rows.append(_row(OURS, methods[0].data, "", table["tada"], cells))
    for method in methods:
        found = _aggregates(method.evaluation)
        cells = {each["key"]: _cell(found[each["ours"]], each) for each in table["columns"]}
        rows.append(_row(OURS, method.data, "", method.name, cells))
    return rows


def _row(source: str, data: str, group: str, method: str, cells: dict[str, Cell]) -> dict[str, Any]:
    return {"source": source, "data": data, "group": group, "method": method, "cells": cells}


def _aggregates(evaluation: Evaluation) -> dict[str, Aggregate]:
    """What a column's `ours` may name."""
    seconds = [each.seconds for each in evaluation.scored if each.seconds is not None]
    mean = Estimate(float(np.mean(seconds)) if seconds else None, None, None)
    return {
        **{each.name: each for each in evaluation.summary.aggregates},
        **_volume_errors(evaluation.scored, lambda each: each.scores.error_ml),
        "seconds": Aggregate("seconds", "all", len(seconds), 0, mean),
    }


def _volume_errors(scored: Sequence[Scored], error_ml: Callable[[Scored], float]) -> dict[str, Aggregate]:
    """Mean absolute error of the volume over the cases that Xu et al. take together."""
    kinds = [set(filter(None, each.subtypes.split("+"))) for each in scored]
    return {
        "mae_iph_ivh_ml": _mean_error(scored, error_ml, [bool(each) and each <= WITH_A_RULER for each in kinds]),
        "mae_sah_ml": _mean_error(scored, error_ml, [each == {Subtype.SAH.name} for each in kinds]),
    }


def _mean_error(scored: Sequence[Scored], error_ml: Callable[[Scored], float], counts: Sequence[bool]) -> Aggregate:
    held = [each for each, counted in zip(scored, counts, strict=True) if counted]
    errors = np.array([abs(error_ml(each)) for each in held])
    patients = Resampler([each.scores.patient_id for each in held], REPLICATES, seed=0)
    missed = sum(bool(each.scores.missed) for each in held)
    return Aggregate("mae_ml", "positive", len(held), missed, patients.estimate(ratio(errors, np.ones(len(held)))))


def _cell(aggregate: Aggregate | None, column: Mapping[str, Any]) -> Cell:
    if aggregate is None:
        return Cell()
    scale = float(column.get("scale", 1))
    value, low, high = (
        None if each is None else scale * each
        for each in (aggregate.mean.value, aggregate.mean.low, aggregate.mean.high)
    )
    return Cell(value, low, high, n=aggregate.n, missed=aggregate.missed)


def _csv_cells(cells: Mapping[str, Cell]) -> dict[str, Any]:
    """`key`, then `key_low`, `key_high`, `key_sd`, `key_n`, `key_missed`; what does not exist is empty."""
    found: dict[str, Any] = {}
    for key, cell in cells.items():
        for what in ("value", "low", "high", "sd", "n", "missed"):
            number = getattr(cell, what)
            name = key if what == "value" else f"{key}_{what}"
            found[name] = f"{number:.6f}" if isinstance(number, float) else number
    return found
