"""Masks that exist: read and measured, on several cores. Nothing here needs torch."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from ich_pipeline.errors import ConfigError
from ich_pipeline.reading import read_mask
from ich_pipeline.records import CaseRecord, NativeMask
from ich_pipeline.report import CaseRow, failed_row
from ich_pipeline.volumetry import measure

# A process takes about as long to start as this many masks to measure.
MASKS_WORTH_A_PROCESS = 40


@dataclass(frozen=True)
class Measured:
    """A mask's row, and the seconds that reading and measuring took."""

    row: CaseRow
    seconds: dict[str, float]


def measure_file(case: CaseRecord, *, subtypes: bool = False, edema_value: int | None = None) -> Measured:
    """Measure the mask of a case: its label where it has one (a manifest), else its image. It never raises.

    Args:
        case: with `edema`, a file, where edema is a mask of its own.
        subtypes: the values are those of `labels.py`.
        edema_value: the value in the mask that is edema and no blood.

    Returns:
        The row; flag `several_values` where a mask with more than one value was taken as hemorrhage throughout.
    """
    path = case.label or case.image
    seconds: dict[str, float] = {}
    try:
        start = time.perf_counter()
        mask, _ = read_mask(path, case.case_id)
        edema = read_mask(case.edema, case.case_id)[0] if case.edema else None
        if edema_value is not None:
            mask, edema = _parted(case.case_id, mask, edema, edema_value)
        seconds["read"] = time.perf_counter() - start
        report = measure(case.case_id, mask, subtypes=subtypes, edema=edema)
        seconds["measure"] = time.perf_counter() - start - seconds["read"]
        flags = () if subtypes or not _several_values(mask) else ("several_values",)
        row = CaseRow(case.case_id, "ok", flags=flags, mask=path, report=report, seconds=sum(seconds.values()))
    except Exception as error:
        row = replace(failed_row(case, error), image=None, mask=path)
    return Measured(row, seconds)


def measure_files(
    cases: Sequence[CaseRecord],
    *,
    subtypes: bool = False,
    edema_value: int | None = None,
    jobs: int | str = "auto",
    on_case: Callable[[Measured], object] = lambda measured: None,
) -> list[Measured]:
    """`measure_file` for many cases; results in their order, whatever the number of processes.

    Args:
        jobs: processes, or `auto`: one a core, fewer where there are few masks.
        on_case: called for each result, in order.

    Raises:
        ConfigError: `jobs` is neither.
    """
    work = partial(measure_file, subtypes=subtypes, edema_value=edema_value)
    found = []
    for measured in _each(work, cases, _processes(jobs, len(cases))):
        on_case(measured)
        found.append(measured)
    return found


def _processes(jobs: int | str, masks: int) -> int:
    if jobs == "auto":
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return max(1, min(cores, masks // MASKS_WORTH_A_PROCESS))
    if not isinstance(jobs, int) or jobs < 1:
        raise ConfigError(f"jobs={jobs!r}, expected a number of processes from 1, or auto")
    return min(jobs, masks)


def _each(work: Callable[[CaseRecord], Measured], cases: Sequence[CaseRecord], processes: int) -> Iterator[Measured]:
    if processes < 2:
        yield from map(work, cases)
        return
    # Spawned: a fork would copy the locks of threads that are not there any more.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, cases, chunksize=4)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _parted(
    case_id: str, mask: NativeMask, edema: NativeMask | None, edema_value: int
) -> tuple[NativeMask, NativeMask]:
    """Blood and edema of a mask that holds both."""
    if edema is not None:
        raise ConfigError(f"{case_id}: edema={edema_value} and a file of its edema: which? Leave one out.")
    is_edema = mask.values == edema_value
    blood = mask.values.copy()
    blood[is_edema] = 0
    return NativeMask(blood, mask.grid), NativeMask(is_edema, mask.grid)


def _several_values(mask: NativeMask) -> bool:
    highest = mask.values.max()
    return bool(highest > 1 and ((mask.values != 0) & (mask.values != highest)).any())
