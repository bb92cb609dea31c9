"""How well two columns of volumes agree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ich_pipeline.bootstrap import REPLICATES, Estimate, Floats, Resampler, ratio, weighted_median
from ich_pipeline.volumetry import THRESHOLD_ML


@dataclass(frozen=True)
class VolumeAgreement:
    """Two ways to measure the same bleeds; `statistics` holds an Estimate for each name of STATISTICS.

    Attributes:
        n: pairs with both numbers; `missing`: pairs without, which count nowhere else.
        zero_reference: pairs whose reference is 0: they have no relative error, and count in all the rest.
        only_estimate_above, only_reference_above: pairs on two sides of `threshold_ml` (above means greater); their
            shares are among the statistics.
    """

    n: int
    n_patients: int
    missing: int
    zero_reference: int
    threshold_ml: float
    only_estimate_above: int
    only_reference_above: int
    statistics: Mapping[str, Estimate]


def volume_agreement(
    reference_ml: Sequence[float | None],
    estimate_ml: Sequence[float | None],
    patient_ids: Sequence[str],
    *,
    threshold_ml: float = THRESHOLD_ML,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> VolumeAgreement:
    """Agreement of two columns of volumes, with 95 % bootstrap intervals over patients.

    Bias and 95 % limits after Bland and Altman (Lancet 1986;1:307), ICC(2,1) after Shrout and Fleiss (Psychol Bull
    1979;86:420), concordance after Lin (Biometrics 1989;45:255).

    Args:
        patient_ids: one a pair; scans of one patient are drawn together.

    Raises:
        ValueError: the three columns differ in length.
    """
    if not len(reference_ml) == len(estimate_ml) == len(patient_ids):
        raise ValueError(
            f"{len(reference_ml)} reference volumes, {len(estimate_ml)} estimates and {len(patient_ids)} patients: "
            "expected one of each for every case."
        )
    pairs = np.array([reference_ml, estimate_ml], dtype=np.float64)  # None becomes NaN
    held = np.flatnonzero(np.isfinite(pairs).all(axis=0))
    x, y = pairs[:, held]
    patients = [patient_ids[i] for i in held.tolist()]
    resampler = Resampler(patients, replicates, seed)
    estimates = {name: resampler.estimate(partial(statistic, x, y)) for name, statistic in STATISTICS.items()}
    up, down = (y > threshold_ml) & (x <= threshold_ml), (x > threshold_ml) & (y <= threshold_ml)
    all_pairs = np.ones(len(x))
    for side, crossed in (("estimate", up), ("reference", down)):
        share = ratio(crossed.astype(np.float64), all_pairs)
        estimates[f"share_only_{side}_above"] = resampler.estimate(share)
    return VolumeAgreement(
        n=len(x),
        n_patients=len(set(patients)),
        missing=len(patient_ids) - len(held),
        zero_reference=int((x == 0).sum()),
        threshold_ml=threshold_ml,
        only_estimate_above=int(up.sum()),
        only_reference_above=int(down.sum()),
        statistics=estimates,
    )


# Statistics of paired values x, y (n,) for resamples given as counts w (replicates, n) -> (replicates,).


def _bias(x: Floats, y: Floats, w: Floats) -> Floats:
    return w @ (y - x) / w.sum(axis=1)


def _sd(x: Floats, y: Floats, w: Floats) -> Floats:
    """Of the differences, with n - 1."""
    difference = y - x
    return np.sqrt(_cross(difference, difference, w) / (w.sum(axis=1) - 1))


def _limit(side: int) -> Callable[[Floats, Floats, Floats], Floats]:
    return lambda x, y, w: _bias(x, y, w) + side * 1.96 * _sd(x, y, w)


def _mae(x: Floats, y: Floats, w: Floats) -> Floats:
    return w @ np.abs(y - x) / w.sum(axis=1)


def _rmse(x: Floats, y: Floats, w: Floats) -> Floats:
    return np.sqrt(w @ np.square(y - x) / w.sum(axis=1))


def _median_relative(x: Floats, y: Floats, w: Floats) -> Floats:
    held = x != 0
    return weighted_median((y[held] - x[held]) / x[held], w[:, held])


def _median_abs_relative(x: Floats, y: Floats, w: Floats) -> Floats:
    held = x != 0
    return weighted_median(np.abs(y[held] - x[held]) / x[held], w[:, held])


def _icc_2_1(x: Floats, y: Floats, w: Floats) -> Floats:
    """Two-way random effects, absolute agreement, single rater, from the mean squares of a table with two columns."""
    n = w.sum(axis=1)
    sxx, syy, sxy = _cross(x, x, w), _cross(y, y, w), _cross(x, y, w)
    rows = (sxx + syy + 2 * sxy) / 2 / (n - 1)
    error = (sxx + syy - 2 * sxy) / 2 / (n - 1)
    columns = n * np.square(_bias(x, y, w)) / 2
    return (rows - error) / (rows + error + 2 * (columns - error) / n)


def _ccc(x: Floats, y: Floats, w: Floats) -> Floats:
    """Lin's concordance with moments over n, as in the paper."""
    n = w.sum(axis=1)
    return 2 * _cross(x, y, w) / (_cross(x, x, w) + _cross(y, y, w) + n * np.square(_bias(x, y, w)))


def _pearson(x: Floats, y: Floats, w: Floats) -> Floats:
    return _cross(x, y, w) / np.sqrt(_cross(x, x, w) * _cross(y, y, w))


def _spearman(x: Floats, y: Floats, w: Floats) -> Floats:
    return _pearson(_ranks(x, w), _ranks(y, w), w)


STATISTICS: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "bias_ml": _bias,
    "sd_ml": _sd,
    "limit_low_ml": _limit(-1),
    "limit_high_ml": _limit(1),
    "mae_ml": _mae,
    "rmse_ml": _rmse,
    "median_relative_error": _median_relative,
    "median_abs_relative_error": _median_abs_relative,
    "icc_2_1": _icc_2_1,
    "ccc": _ccc,
    "pearson": _pearson,
    "spearman": _spearman,
}


def _cross(x: Floats, y: Floats, w: Floats) -> Floats:
    """Sum of products about the means. x and y are (n,) or one row a replicate."""
    n = w.sum(axis=1)
    x_mean, y_mean = (((w * v).sum(axis=1) / n)[:, None] for v in (x, y))
    return (w * (x - x_mean) * (y - y_mean)).sum(axis=1)


def _ranks(values: Floats, w: Floats) -> Floats:
    """(replicates, n) mid-ranks of values repeated w times."""
    order = np.argsort(values)
    _, first, level = np.unique(values[order], return_index=True, return_inverse=True)
    equal = np.add.reduceat(w[:, order], first, axis=1)
    ranks = np.empty_like(w)
    ranks[:, order] = (equal.cumsum(axis=1) - equal + (equal + 1) / 2)[:, level]
    return ranks
