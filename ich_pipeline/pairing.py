"""Which two scans are compared: by name in two places, or by time in one manifest."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from ich_pipeline.errors import ConfigError, ManifestError
from ich_pipeline.manifest import read_manifest
from ich_pipeline.records import CaseRecord

TIMEPOINT = "timepoint"  # column of a manifest


@dataclass(frozen=True)
class Pair:
    """Two cases of one patient, or the reason in words why they are not compared."""

    pair_id: str
    baseline: CaseRecord | None
    followup: CaseRecord | None
    error: str = ""
    patient_id: str = ""

    @property
    def cases(self) -> list[CaseRecord]:
        """What is to be measured, baseline first; nothing where there is an error."""
        return [] if self.error else [case for case in (self.baseline, self.followup) if case]


def cases_of(pairs: Sequence[Pair]) -> list[CaseRecord]:
    """What is to be measured for these pairs, each once."""
    return list({case.case_id: case for pair in pairs for case in pair.cases}.values())


def find_pairs(scans: Sequence[Path], *, masks: bool) -> list[Pair]:
    """Pair the scans, or the masks, of one patient or of many.

    Two files, or two folders that are each one DICOM series, are a pair whatever they are called. Two folders or
    manifests pair what has the same case id. One manifest pairs each patient's earliest scan with every later one.

    Args:
        scans: BASELINE and FOLLOWUP, or one manifest with the columns `patient_id` and `timepoint`.
        masks: they are masks; that of a manifest's case is its label where it has one, else its image.

    Returns:
        Every case that was found is in a pair; one that cannot be compared has an error.

    Raises:
        ConfigError: another number of paths.
        ManifestError: nothing to compare, or a time point that cannot be used.
        ReadError: no scans there.
    """
    from ich_pipeline.finding import find_scans

    def measured(records: Sequence[CaseRecord]) -> list[CaseRecord]:
        return [replace(each, image=each.label) if masks and each.label else each for each in records]

    if len(scans) == 1 and scans[0].is_file() and scans[0].suffix.lower() == ".csv":
        pairs = pair_by_time(measured(read_manifest(scans[0])))
    elif len(scans) == 2:
        baseline, followup = (measured(find_scans([path])) for path in scans)
        if [case.image for case in (*baseline, *followup)] == [path.resolve() for path in scans]:
            names = dict.fromkeys((baseline[0].case_id, followup[0].case_id))
            pairs = [_from_two_places("_".join(names), baseline[0], followup[0])]
        else:
            pairs = pair_by_id(baseline, followup)
    else:
        raise ConfigError(
            f"compare: {len(scans)} paths, expected BASELINE and FOLLOWUP, or one manifest (.csv) with the columns "
            f"patient_id and {TIMEPOINT}"
        )
    if all(pair.error for pair in pairs):
        raise ManifestError(f"nothing to compare ({len(pairs)} without a partner), such as {pairs[0].error}")
    return pairs


def pair_by_id(baseline: Sequence[CaseRecord], followup: Sequence[CaseRecord]) -> list[Pair]:
    """Pair what has the same case id on both sides, sorted by it."""
    first, second = ({case.case_id: case for case in side} for side in (baseline, followup))
    return [_from_two_places(name, first.get(name), second.get(name)) for name in sorted({*first, *second})]


def pair_by_time(records: Sequence[CaseRecord]) -> list[Pair]:
    """Pair each patient's earliest case with every later one; a pair has the id of its later case.

    Raises:
        ManifestError: a time point that is neither a number nor an ISO date, a patient with both, or with two cases at
            the same time.
    """
    cases_of_patient: defaultdict[str, list[CaseRecord]] = defaultdict(list)
    for record in records:
        cases_of_patient[record.patient_id].append(record)
    return [pair for patient, cases in cases_of_patient.items() for pair in _pairs_of_patient(patient, cases)]


def _pairs_of_patient(patient: str, cases: Sequence[CaseRecord]) -> list[Pair]:
    times = {case.case_id: _time(case) for case in cases}
    kinds = sorted({kind for kind, _ in times.values()})
    if len(kinds) > 1:
        raise ManifestError(f"patient {patient}: {TIMEPOINT} is {' and '.join(kinds)}, expected one kind. Unify them.")
    ordered = sorted(cases, key=lambda case: times[case.case_id])
    for one, other in pairwise(ordered):
        if times[one.case_id] == times[other.case_id]:
            raise ManifestError(
                f"patient {patient}: {one.case_id} and {other.case_id} are both at {TIMEPOINT} "
                f"{other.extra[TIMEPOINT]}, expected one scan a time. Remove one, or correct its time."
            )
    first, *later = ordered
    if not later:
        error = f"{first.case_id}: the only scan of patient {patient}, expected two or more. Check patient_id."
        return [Pair(first.case_id, first, None, error, patient)]
    return [_complete(case.case_id, first, case) for case in later]


def _time(record: CaseRecord) -> tuple[str, float | datetime]:
    """Kind and value of a time point; only values of one kind can be compared."""
    text = record.extra.get(TIMEPOINT, "")
    try:
        if math.isfinite(number := float(text)):
            return "a number", number
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ManifestError(
            f"{record.case_id}: {TIMEPOINT} {text!r}, expected a number (hours, days) or an ISO date such as "
            "2024-05-31T14:30. Fill the column."
        ) from None
    return f"a date with{'' if moment.tzinfo else 'out'} a time zone", moment


def _from_two_places(pair_id: str, baseline: CaseRecord | None, followup: CaseRecord | None) -> Pair:
    """A pair whose cases may have one name; in the pair their ids tell the sides apart."""
    if baseline and followup:
        sides = {"baseline": baseline, "followup": followup}
        return _complete(pair_id, *(replace(case, case_id=f"{pair_id}_{side}") for side, case in sides.items()))
    missing, present, case = ("follow-up", "baseline", baseline) if baseline else ("baseline", "follow-up", followup)
    error = f"{pair_id}: no {missing}, only a {present}. Give both the same name, or the two scans themselves."
    return Pair(pair_id, baseline, followup, error, case.patient_id if case else "")


def _complete(pair_id: str, baseline: CaseRecord, followup: CaseRecord) -> Pair:
    error = ""
    if baseline.image.resolve() == followup.image.resolve():
        error = f"{pair_id}: {baseline.image.name} is both baseline and follow-up, expected two. Give the other one."
    if baseline.patient_id != followup.patient_id:
        error = f"{pair_id}: patients {baseline.patient_id!r} and {followup.patient_id!r}, expected one. Rename a case."
    return Pair(pair_id, baseline, followup, error, baseline.patient_id)
