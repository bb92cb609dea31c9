"""How sure a handful of patients lets us be: statistics with 95 % bootstrap intervals over patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REPLICATES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over patients.

    `value` is None where it is undefined, the interval also where fewer than two patients remain to resample.
    """

    value: float | None
    low: float | None
    high: float | None


class Resampler:
    """The bootstrap: how often each row is drawn when patients are drawn with replacement.

    A resample is a row of counts, so that a statistic that takes counts does all replicates in one call.
    """

    def __init__(self, patient_ids: Sequence[str], replicates: int, seed: int) -> None:
        patients, row_of = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
        self.n_rows = len(patient_ids)
        self.counts: Floats | None = None
        if len(patients) >= 2:
            rng = np.random.default_rng(seed)
            drawn = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=replicates)
            self.counts = drawn[:, row_of].astype(np.float64)

    def estimate(self, statistic: Callable[[Floats], Floats]) -> Estimate:
        """Value on the rows themselves and percentile interval; replicates where it is undefined are left out."""
        if self.n_rows == 0:
            return Estimate(None, None, None)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = statistic(np.ones((1, self.n_rows)))[0]
            replicates = statistic(self.counts) if self.counts is not None else np.empty(0)
        return percentile_estimate(value, replicates)


def percentile_estimate(value: float, replicates: Floats) -> Estimate:
    """A value with the 95 % percentile interval of its replicates; what is not finite is undefined, and left out."""
    if not np.isfinite(value):
        return Estimate(None, None, None)
    replicates = replicates[np.isfinite(replicates)]
    if not replicates.size:
        return Estimate(float(value), None, None)
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def ratio(parts: Floats, wholes: Floats) -> Callable[[Floats], Floats]:
    """Statistic: sum of parts over sum of wholes."""
    return lambda counts: (counts @ parts) / (counts @ wholes)


def weighted_median(values: Floats, w: Floats) -> Floats:
    """Median of values repeated w times: the mean of the two middle ones."""
    order = np.argsort(values)
    if not order.size:
        return np.full(len(w), np.nan)
    upto = w[:, order].cumsum(axis=1)
    last = upto[:, -1] - 1
    low, high = ((upto > position[:, None]).argmax(axis=1) for position in (np.floor(last / 2), np.ceil(last / 2)))
    return np.where(last >= 0, (values[order][low] + values[order][high]) / 2, np.nan)
