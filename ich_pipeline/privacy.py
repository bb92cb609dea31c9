"""What may leave the machine in a run: no path, no identifier column, no patient id."""

import csv
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ich_pipeline.files import write_csv_rows

WITHHELD = "(path withheld)"
_WORD_COLUMNS = ("status", "flags", "split", "fold", "subtype", "bundle", "weights_sha256")
_IDENTIFIER_COLUMN = re.compile(r"patient|accession|birth|(^|_)(mrn|dob|ssn|uid|id|date|name)s?($|_)", re.IGNORECASE)
_IDENTIFIER_KEY = re.compile(r"patient_?(id|name)|accession|birth|(^|_)(mrn|dob|ssn)($|_)", re.IGNORECASE)
_ABSOLUTE_PATH = re.compile(r"""(^|[\s'"=,(\[]|file:/*)(/|~/|[A-Za-z]:[\\/]|\\\\)[^\s/\\]""")


class Privacy:
    """Takes out of whatever is sent what could name a patient."""

    def __init__(self, patient_ids: Iterable[str] = ()) -> None:
        ids = sorted({patient_id.casefold() for patient_id in patient_ids if patient_id})
        self._numbers = {patient_id: f"anon-{number:04d}" for number, patient_id in enumerate(ids, start=1)}

    def name(self, text: str) -> str:
        """Replace each patient id that stands in `text` as whole words by its number: `DOE_scan2` -> `anon-0001_scan2`.

        The same id has the same number everywhere in a run, so table and pictures still belong together.
        """
        if not self._numbers:
            return text
        parts = re.split(r"([\W_]+)", text)
        done: list[str] = []
        start = 0
        while start < len(parts):
            ends = range(len(parts), start, -1)
            longest = next((end for end in ends if "".join(parts[start:end]).casefold() in self._numbers), None)
            end = longest or start + 1
            piece = "".join(parts[start:end])
            done.append(piece if longest is None else self._numbers[piece.casefold()])
            start = end
        return "".join(done)

    def config(self, value: Any) -> Any:
        """A plain config without absolute paths, identifier keys, and patient ids in relative paths."""
        if isinstance(value, Mapping):
            return {key: self.config(item) for key, item in value.items() if not _IDENTIFIER_KEY.search(key)}
        if isinstance(value, list):
            return [self.config(item) for item in value]
        if not isinstance(value, str):
            return value
        if _ABSOLUTE_PATH.search(value):
            return WITHHELD
        return self.name(value) if "/" in value or "\\" in value else value

    def reason(self, error: BaseException) -> str:
        """Type, place in this package and, unless it names a path, the message of an error."""
        text = str(error)
        if _ABSOLUTE_PATH.search(text) or re.search(r"[/\\]", re.sub(r"https?://\S+", "", text)):
            text = "(message withheld, it may name a path; run.json has it)"
        last = traceback.extract_tb(error.__traceback__)[-1:]
        place = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
        return f"{type(error).__name__}{place}: {self.name(text)}"

    def table(self, source: Path, target: Path) -> list[str]:
        """Copy a CSV table without identifiers; returns the columns left out (`Tracker.log_table` has the rule)."""
        with source.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), list(reader.fieldnames or ())
        if "case_id" not in columns:
            raise ValueError(f"{source.name}: no column case_id, only {', '.join(columns)}; not sent to tracking")
        patients = [row[column] for row in rows for column in columns if column == "patient_id" and row[column]]
        rename = self if not patients else Privacy([*self._numbers, *patients])
        kept = [column for column in columns if _may_leave(column, [row[column] for row in rows])]
        cells = [{column: row[column] for column in kept} for row in rows]
        write_csv_rows(target, [{**row, "case_id": rename.name(row["case_id"])} for row in cells], kept)
        return [column for column in columns if column not in kept]


def _may_leave(column: str, cells: Sequence[str]) -> bool:
    if column == "case_id" or column in _WORD_COLUMNS:
        return True
    filled = [cell for cell in cells if cell]
    return bool(filled) and not _IDENTIFIER_COLUMN.search(column) and all(map(_is_number, filled))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("True", "False")
    return True
