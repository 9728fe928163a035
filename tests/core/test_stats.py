from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from workbench.core import stats
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import MIN_BOOTSTRAP_ROWS, bootstrap_mean, paired_difference, sample_mean, sample_ratio


def test_few_rows_have_the_interval_of_students_t() -> None:
    x = np.random.default_rng(0).normal(size=7)
    expected = ttest_1samp(x, 0).confidence_interval(0.9)
    found = sample_mean(x, level=0.9, unit="runs")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.method == "Student's t"
    assert (found.n, found.unit, found.level) == (7, "runs", 0.9)


def test_many_rows_are_resampled() -> None:
    x = np.random.default_rng(0).exponential(size=MIN_BOOTSTRAP_ROWS)
    assert sample_mean(x, seed=3) == bootstrap_mean(x, seed=3) and sample_mean(x[1:], seed=3).method == "Student's t"


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_interval_of_few_rows_covers_the_truth(n: int) -> None:
    rng = np.random.default_rng(0)
    missed = np.mean([paired_difference(rng.normal(1, 1, n), np.ones(n)).excludes(0.0) for _ in range(1000)])
    assert missed < 0.072  # 3.2 standard errors of 1,000 draws above 5%; a bootstrap misses 10 to 24%


def test_the_interval_of_a_ratio_of_few_rows_covers_the_truth() -> None:
    rng, true, missed = np.random.default_rng(0), math.exp(-1.5 + 0.5 * 0.2**2), []
    for _ in range(1000):
        b = rng.lognormal(0, 0.2, 4)
        missed.append(sample_ratio(b * rng.lognormal(-1.5, 0.2, 4), b).excludes(true))
    assert np.mean(missed) < 0.072  # as above; a percentile bootstrap misses 22%


def test_a_ratio_is_of_sums_and_its_interval_is_over_rows() -> None:
    b, noise = np.random.default_rng(0).lognormal(size=(2, 400))
    a = 0.3 * b + 0.05 * noise
    found, few = sample_ratio(a, b), sample_ratio(a[:8], b[:8])
    assert found.value == a.sum() / b.sum() and found.low < found.value < found.high
    spread = np.std(a - found.value * b, ddof=1) / math.sqrt(400) / b.mean()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert few.method.startswith("Student's t") and few.high - few.value == pytest.approx(few.value - few.low)
    same = sample_ratio(0.3 * b[:8], b[:8])
    assert same.high - same.low < 1e-12, "rows that all have the same ratio leave no doubt, whatever their size"
    assert sample_ratio([1.0], [2.0]).high == math.inf


def test_one_row_says_nothing_of_its_spread() -> None:
    found = sample_mean([2.0])
    assert (found.value, found.low, found.high) == (2.0, -math.inf, math.inf)
    assert sample_mean([1.0, 1.0]).low == 1.0


def test_what_has_no_mean_is_refused() -> None:
    with pytest.raises(DegenerateInputError, match="sample_mean"):
        sample_mean([])
    with pytest.raises(InvalidInputError, match="not finite"):
        sample_mean([1.0, math.nan])
    with pytest.raises(InvalidInputError, match="paired_difference: 1 and 2 rows"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(DegenerateInputError, match="denominators sum to zero"):
        sample_ratio([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(InvalidInputError, match="2 numerators and 1 denominators"):
        sample_ratio([1.0, 2.0], [1.0])


def test_resamples_in_parts_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=101)
    whole, ratio = bootstrap_mean(x, seed=4), sample_ratio(x, x + 9, seed=4)
    for at_once in (1, 101, 5000):
        monkeypatch.setattr(stats, "VALUES_DRAWN_AT_ONCE", at_once)
        assert bootstrap_mean(x, seed=4) == whole and sample_ratio(x, x + 9, seed=4) == ratio
