from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from workbench import stats
from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.stats import FEW, bootstrap_mean, paired_difference, sample_mean


def test_few_rows_have_the_interval_of_students_t() -> None:
    x = np.random.default_rng(0).normal(size=7)
    expected = ttest_1samp(x, 0).confidence_interval(0.9)
    found = sample_mean(x, level=0.9, unit="runs")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.method == "Student's t"
    assert (found.n, found.unit, found.level) == (7, "runs", 0.9)


def test_many_rows_are_resampled() -> None:
    x = np.random.default_rng(0).exponential(size=FEW)
    assert sample_mean(x, seed=3) == bootstrap_mean(x, seed=3) and sample_mean(x[1:], seed=3).method == "Student's t"


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_interval_of_few_rows_covers_the_truth(n: int) -> None:
    rng = np.random.default_rng(0)
    missed = np.mean([paired_difference(rng.normal(1, 1, n), np.ones(n)).excludes(0.0) for _ in range(1000)])
    assert missed < 0.072  # 3.2 standard errors of 1,000 draws above 5%; a bootstrap misses 10 to 24%


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


def test_resamples_in_parts_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=101)
    whole = bootstrap_mean(x, seed=4)
    for at_once in (1, 101, 5000):
        monkeypatch.setattr(stats, "_AT_ONCE", at_once)
        assert bootstrap_mean(x, seed=4) == whole
