import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ich_pipeline.agreement import STATISTICS, volume_agreement


def test_the_bootstrap_draws_patients_not_scans() -> None:
    """Ten scans of each of four patients hold four scans' worth of surprise."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(0, 5, 4)
    error = np.repeat(of_patient, 10)
    reference = rng.uniform(10, 40, 40)
    patients = [f"p{n // 10}" for n in range(40)]
    by_patient = volume_agreement(reference, reference + error, patients).statistics["bias_ml"]
    by_scan = volume_agreement(reference, reference + error, [str(n) for n in range(40)]).statistics["bias_ml"]
    assert by_patient.high - by_patient.low > 2 * (by_scan.high - by_scan.low)


def test_one_patient_has_no_interval() -> None:
    found = volume_agreement([1, 2, 3], [1, 2, 4], ["p", "p", "p"]).statistics["bias_ml"]
    assert (found.value, found.low, found.high) == (pytest.approx(1 / 3), None, None)


def reference_statistics(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, float]:
    """The same statistics from their definitions and scipy, for one sample."""
    difference, n = y - x, len(x)
    table = np.column_stack([x, y])
    grand = table.mean()
    rows = 2 * ((table.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    columns = n * ((table.mean(axis=0) - grand) ** 2).sum()
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + grand
    error = (residual**2).sum() / (n - 1)
    held = x != 0
    return {
        "bias_ml": difference.mean(),
        "sd_ml": difference.std(ddof=1),
        "limit_low_ml": difference.mean() - 1.96 * difference.std(ddof=1),
        "limit_high_ml": difference.mean() + 1.96 * difference.std(ddof=1),
        "mae_ml": np.abs(difference).mean(),
        "rmse_ml": np.sqrt((difference**2).mean()),
        "median_relative_error": np.median(difference[held] / x[held]),
        "median_abs_relative_error": np.median(np.abs(difference[held] / x[held])),
        "icc_2_1": (rows - error) / (rows + error + 2 / n * (columns - error)),
        "ccc": 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
    }


@pytest.mark.parametrize("seed", range(4))
def test_statistics_and_their_resamples_follow_the_definitions(seed: int) -> None:
    """A resample given as counts must equal the statistic of the rows repeated that often, ties and all."""
    rng = np.random.default_rng(seed)
    x = rng.lognormal(2, 1, 31).round(seed % 3)
    y = (x * rng.normal(1.1, 0.2, 31)).round(seed % 3)
    counts = np.vstack([np.ones(31), rng.multinomial(31, np.full(31, 1 / 31), size=20)]).astype(float)
    for name, statistic in STATISTICS.items():
        expected = [
            reference_statistics(np.repeat(x, w.astype(int)), np.repeat(y, w.astype(int)))[name] for w in counts
        ]
        np.testing.assert_allclose(statistic(x, y, counts), expected, rtol=1e-9, atol=1e-12, err_msg=name)
    found = volume_agreement(x, y, [str(n) for n in range(31)]).statistics
    for name, value in reference_statistics(x, y).items():
        assert found[name].value == pytest.approx(value), name
        assert found[name].low <= found[name].value <= found[name].high


def test_interval_of_a_mean_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(5)
    error = rng.normal(1, 3, 300)
    reference = rng.uniform(5, 50, 300)
    bias = volume_agreement(reference, reference + error, [str(n) for n in range(300)]).statistics["bias_ml"]
    half = 1.96 * error.std(ddof=1) / np.sqrt(300)
    assert (bias.low, bias.high) == pytest.approx((error.mean() - half, error.mean() + half), abs=0.05)


def test_pairs_without_a_number_and_zero_references_are_counted() -> None:
    found = volume_agreement([10, 0, None, 40, 20], [12, 1, 3, None, float("nan")], list("abcde"))
    assert (found.n, found.n_patients, found.missing, found.zero_reference) == (2, 2, 3, 1)
    assert found.statistics["bias_ml"].value == pytest.approx(1.5)
    assert found.statistics["median_relative_error"].value == pytest.approx(0.2)


def test_threshold_crossings_in_both_directions() -> None:
    found = volume_agreement([29, 30, 31, 50, 30], [31, 30, 30, 20, 30.1], list("abcde"))
    assert (found.only_estimate_above, found.only_reference_above) == (2, 2)


@pytest.mark.parametrize(
    ("reference", "estimate"), [([], []), ([5.0], [6.0]), ([5.0, 5.0], [5.0, 5.0]), ([0.0, 0.0], [1.0, 2.0])]
)
def test_what_is_undefined_is_none_and_never_nan(reference: list[float], estimate: list[float]) -> None:
    found = volume_agreement(reference, estimate, [str(n) for n in range(len(reference))])
    numbers = [v for each in found.statistics.values() for v in (each.value, each.low, each.high) if v is not None]
    assert np.isfinite(numbers).all()
    assert found.statistics["pearson"].value is None


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 reference volumes, 1 estimates and 2 patients"):
        volume_agreement([1, 2], [1], ["a", "b"])
