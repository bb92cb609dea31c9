"""Growth of a bleed between two scans of one patient: how much, how sure that is, and whether it is expansion."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from ich_pipeline.errors import ConfigError
from ich_pipeline.labels import Subtype
from ich_pipeline.pairing import Pair
from ich_pipeline.run_report import CaseStatus
from ich_pipeline.volumetry import VolumeReport

# Millilitres are rounded as in the tables before they meet a threshold: growth of exactly 6 mL is not lost to binary
# fractions. A ratio of such volumes has more decimals; those cut off here are the noise of binary arithmetic.
ML_DECIMALS, RATIO_DECIMALS = 6, 12

NAMED_CRITERIA = {
    # Yogendrakumar et al., Stroke 2020;51:1120, call this the standard definition.
    "standard": ">=6mL or >=33%",
    # "more than 6 mL or 33%": Brouwers et al., JAMA Neurol 2014;71:158.
    "strict": ">6mL or >33%",
    # One cutoff alone, of those that Dowlatshahi et al., Neurology 2011;76:1238, compare.
    "absolute_6ml": ">=6mL",
    "absolute_12_5ml": ">=12.5mL",
    "relative_33": ">=33%",
    # After the revised definition of Yogendrakumar et al.; IVH counts when the baseline has none.
    "revised": ">=6mL or >=33% or new IVH",
}


@dataclass(frozen=True)
class Threshold:
    """A cutoff; growth equal to `value` meets it when it is inclusive (>=)."""

    value: float
    inclusive: bool

    def met(self, found: float) -> bool:
        """Whether a growth in the threshold's own unit reaches or, if not inclusive, exceeds it."""
        return found > self.value or (self.inclusive and found == self.value)

    def text(self, scale: float, unit: str) -> str:
        """Such as `>=33%`: the value times `scale`, with its unit."""
        return f"{'>=' if self.inclusive else '>'}{self.value * scale:.10g}{unit}"


@dataclass(frozen=True)
class Criterion:
    """What counts as expansion: any one of its terms. `relative` is a fraction of the baseline; 33 % is 0.33."""

    absolute_ml: Threshold | None = None
    relative: Threshold | None = None
    new_ivh: bool = False

    def __str__(self) -> str:
        terms = [
            self.absolute_ml and self.absolute_ml.text(1, "mL"),
            self.relative and self.relative.text(100, "%"),
            "new IVH" if self.new_ivh else None,
        ]
        return " or ".join(term for term in terms if term)

    def met(self, growth_ml: float, relative_growth: float | None, new_ivh: bool | None) -> bool:
        """Whether any term is met; what is None decides nothing."""
        return (
            (self.absolute_ml is not None and self.absolute_ml.met(growth_ml))
            or (self.relative is not None and relative_growth is not None and self.relative.met(relative_growth))
            or (self.new_ivh and bool(new_ivh))
        )


def parse_criterion(text: str) -> Criterion:
    """A criterion from its name in NAMED_CRITERIA, or from terms such as `>=6mL or >33% or new IVH`.

    Case and spaces do not matter.

    Raises:
        ConfigError: a term that is none, or two of one kind.
    """
    found: dict[str, Any] = {}
    for term in re.split(r"\s+or\s+", NAMED_CRITERIA.get(text.strip().lower(), text).strip(), flags=re.IGNORECASE):
        parts = re.fullmatch(r"(>=?)\s*(\d+(?:\.\d+)?)\s*(ml|%)|(new\s+ivh)", term, flags=re.IGNORECASE)
        kind = "" if not parts else "new_ivh" if parts[4] else "relative" if parts[3] == "%" else "absolute_ml"
        if not parts or kind in found:
            wrong = "a second term of its kind" if parts else "no term"
            raise ConfigError(
                f"criterion={text}: '{term}' is {wrong}. Expected a name ({', '.join(NAMED_CRITERIA)}) or at most one "
                "each of '>=6mL', '>=33%' and 'new IVH', joined by 'or'; > and >= with any number."
            )
        value = round(float(parts[2] or 0) / (100 if kind == "relative" else 1), RATIO_DECIMALS)
        found[kind] = True if kind == "new_ivh" else Threshold(value, inclusive=parts[1] == ">=")
    return Criterion(**found)


@dataclass(frozen=True)
class Growth:
    """A pair's result; the fields are the columns of growth.csv. A failed pair has an error in words and no numbers.

    Attributes:
        pair_id: the pair's name; from a manifest, the case id of its later scan.
        patient_id: from a manifest, else empty.
        baseline, followup: case ids, as in volumes.csv.
        baseline_ml, followup_ml: volume of the whole mask, with its band in `_low_ml` and `_high_ml`.
        growth_ml: follow-up less baseline. Low is the follow-up's low less the baseline's high, high the reverse: as
            if the two errors were as bad as can be and opposite.
        relative_growth: growth / baseline, a fraction; its ends are those of `growth_ml`, each over its own baseline.
            None where the baseline is 0; the high end alone where the baseline's band reaches 0.
        new_ivh: intraventricular blood at follow-up and none at baseline; None unless both masks have subtypes.
        ivh_growth_ml: of intraventricular blood; None likewise.
        criterion: in its normal form.
        expansion: whether the criterion is met.
        expansion_certain: it gives the same answer everywhere in the two bands. New IVH has no band.
        distance_ml, distance_relative: growth less the criterion's threshold; None where it has no such term.
    """

    pair_id: str
    patient_id: str
    status: CaseStatus
    error: str = ""
    baseline: str = ""
    followup: str = ""
    baseline_ml: float | None = None
    baseline_low_ml: float | None = None
    baseline_high_ml: float | None = None
    followup_ml: float | None = None
    followup_low_ml: float | None = None
    followup_high_ml: float | None = None
    growth_ml: float | None = None
    growth_low_ml: float | None = None
    growth_high_ml: float | None = None
    relative_growth: float | None = None
    relative_growth_low: float | None = None
    relative_growth_high: float | None = None
    new_ivh: bool | None = None
    ivh_growth_ml: float | None = None
    criterion: str = ""
    expansion: bool | None = None
    expansion_certain: bool | None = None
    distance_ml: float | None = None
    distance_relative: float | None = None

    def line(self) -> str:
        """The result as a line to read."""
        if self.status == "failed":
            return f"{self.pair_id}: failed: {self.error.removeprefix(f'{self.pair_id}: ')}"
        relative = "no blood at baseline"
        if self.relative_growth is not None and self.relative_growth_low is not None:
            high = "no limit" if self.relative_growth_high is None else f"{self.relative_growth_high:+.0%}"
            relative = f"{self.relative_growth:+.0%} [{self.relative_growth_low:+.0%}, {high}]"
        new_ivh = ", new IVH" if self.new_ivh else ""
        answer = f"{'expansion' if self.expansion else 'no expansion'} ({self.criterion})"
        return (
            f"{self.pair_id}: {self.baseline_ml:.2f} to {self.followup_ml:.2f} mL, growth {self.growth_ml:+.2f} mL "
            f"[{self.growth_low_ml:+.2f}, {self.growth_high_ml:+.2f}], {relative}{new_ivh}: "
            f"{answer}{'' if self.expansion_certain else ', uncertain: the band holds both answers'}"
        )


def failed_growth(pair: Pair, error: str) -> Growth:
    """The row of a pair that could not be compared."""
    baseline, followup = (case.case_id if case else "" for case in (pair.baseline, pair.followup))
    return Growth(pair.pair_id, pair.patient_id, "failed", error, baseline, followup)


def measure_growth(pair: Pair, baseline: VolumeReport, followup: VolumeReport, criterion: Criterion) -> Growth:
    """Compare the measures of a pair.

    Growth rises with the follow-up's volume and falls with the baseline's, relative growth too, so two ends say what
    holds in between.

    Args:
        pair: complete.
        baseline: of the earlier mask.
        followup: of the later one.
        criterion: what counts as expansion.

    Raises:
        ValueError: the criterion asks for new IVH and a mask has no subtypes.
    """
    new_ivh, ivh_growth_ml = _ivh(baseline, followup)
    if criterion.new_ivh and new_ivh is None:
        raise ValueError(f"{pair.pair_id}: new IVH is asked for, expected masks with subtypes. Measure them so.")
    before, before_low, before_high = _ml(baseline.volume_ml, baseline.volume_low_ml, baseline.volume_high_ml)
    after, after_low, after_high = _ml(followup.volume_ml, followup.volume_low_ml, followup.volume_high_ml)
    growth, low, high = _ml(after - before, after_low - before_high, after_high - before_low)
    relative, relative_low, relative_high = (
        _relative(growth, before),
        _relative(low, before_high),
        _relative(high, before_low),
    )
    # A baseline band that only reaches 0 has relative growth without limit at that end.
    steepest = math.inf if relative_high is None and before_high > 0 and after_high > 0 else relative_high
    answers = [
        criterion.met(growth, relative, new_ivh),
        criterion.met(low, relative_low, new_ivh),
        criterion.met(high, steepest, new_ivh),
    ]
    absolute_ml, fraction = criterion.absolute_ml, criterion.relative
    return replace(
        failed_growth(pair, ""),
        status="ok",
        baseline_ml=before,
        baseline_low_ml=before_low,
        baseline_high_ml=before_high,
        followup_ml=after,
        followup_low_ml=after_low,
        followup_high_ml=after_high,
        growth_ml=growth,
        growth_low_ml=low,
        growth_high_ml=high,
        relative_growth=relative,
        relative_growth_low=None if relative is None else relative_low,
        relative_growth_high=None if relative is None else relative_high,
        new_ivh=new_ivh,
        ivh_growth_ml=ivh_growth_ml,
        criterion=str(criterion),
        expansion=answers[0],
        expansion_certain=len(set(answers)) == 1,
        distance_ml=_ml(growth - absolute_ml.value)[0] if absolute_ml else None,
        distance_relative=relative - fraction.value if fraction and relative is not None else None,
    )


def _ml(*values: float) -> list[float]:
    return [round(value, ML_DECIMALS) for value in values]


def _relative(growth_ml: float, baseline_ml: float) -> float | None:
    return round(growth_ml / baseline_ml, RATIO_DECIMALS) if baseline_ml > 0 else None


def _ivh(baseline: VolumeReport, followup: VolumeReport) -> tuple[bool | None, float | None]:
    """Whether there is new intraventricular blood, and how much more of it; None without subtypes."""
    if baseline.subtype_ml is None or followup.subtype_ml is None:
        return None, None
    before, after = _ml(baseline.subtype_ml[Subtype.IVH], followup.subtype_ml[Subtype.IVH])
    return before == 0 < after, _ml(after - before)[0]
