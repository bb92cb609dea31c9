"""Many cases: reading, network and writing overlap, failures stay apart, every case keeps its row."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ich_pipeline.pipeline import Pipeline
from ich_pipeline.records import CaseRecord
from ich_pipeline.report import CaseRow, failed_row, write_tables

# Tables that take longer than this to write are not written after every case, or a batch would take the square of its
# length: they may have a twentieth of the time.
QUICK_S, SHARE = 0.1, 1 / 20


def run_batch(
    cases: Sequence[CaseRecord],
    pipeline: Pipeline,
    table: Path,
    *,
    done: Iterable[CaseRow] = (),
    on_row: Callable[[CaseRow], None] = lambda row: None,
) -> list[CaseRow]:
    """Run every case that is not done yet; the tables are rewritten after each.

    A kill loses at most the case under way; of a table so long that writing it takes over a tenth of a second, also the
    rows of the last 20 times as long. Ctrl-C and errors lose none.

    While the network works on one case the next is read and the one before is written. Three cases are in memory.

    Args:
        cases: with unique ids.
        pipeline: the three steps.
        table: `volumes.csv`.
        done: rows of an earlier run of the same command, kept as they are.
        on_row: called for every new row, in order.

    Returns:
        Rows in the order of `cases`; `seconds` are those of the case's own steps, whatever ran beside them.
    """
    rows = {row.case_id: row for row in done}
    for row in rows.values():
        pipeline.report.add_case(row.case_id, row.status)
    todo = [case for case in cases if case.case_id not in rows]
    order = [case.case_id for case in cases]

    written_at, took_s, unwritten = time.perf_counter(), 0.0, False

    def write() -> None:
        nonlocal written_at, took_s, unwritten
        start, unwritten = time.perf_counter(), False
        write_tables(table, [rows[case_id] for case_id in order if case_id in rows])
        written_at = time.perf_counter()
        took_s = written_at - start

    def keep(case: CaseRecord, finished: Future[CaseRow] | BaseException) -> None:
        nonlocal unwritten
        try:
            if isinstance(finished, BaseException):
                raise finished
            row = finished.result()
        except Exception as error:
            row = failed_row(case, error)
        row = replace(row, seconds=pipeline.report.case_seconds(case.case_id))
        rows[case.case_id] = row
        pipeline.report.add_case(case.case_id, row.status, error=row.error or None)
        unwritten = True
        if took_s <= QUICK_S or took_s <= SHARE * (time.perf_counter() - written_at):
            write()
        on_row(row)

    try:
        with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:
            ahead = [reading.submit(pipeline.read, case) for case in todo[:1]]
            behind: tuple[CaseRecord, Future[CaseRow] | BaseException] | None = None
            for n, case in enumerate(todo):
                loading = ahead.pop()
                pipeline.report.add_input(case.image)
                try:
                    loaded = loading.result()
                    ahead += [reading.submit(pipeline.read, following) for following in todo[n + 1 : n + 2]]
                    finishing: Future[CaseRow] | BaseException = writing.submit(
                        pipeline.finish, pipeline.segment(loaded)
                    )
                except Exception as error:
                    if not ahead:
                        ahead += [reading.submit(pipeline.read, following) for following in todo[n + 1 : n + 2]]
                    finishing = error
                if behind:
                    keep(*behind)
                behind = (case, finishing)
            if behind:
                keep(*behind)
    finally:
        if unwritten:
            write()
    return [rows[case_id] for case_id in order]
