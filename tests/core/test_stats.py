from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu, ttest_1samp

from workbench.core import stats
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import (
    MIN_BOOTSTRAP_ROWS,
    POSITIVE,
    SHARE,
    SIGNED_SHARE,
    bootstrap_mean,
    discovery_rates,
    paired_difference,
    sample_mean,
    sample_ratio,
)


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


@pytest.mark.parametrize("n", [3, 5, 10])
def test_an_interval_stays_within_what_the_quantity_can_be_and_covers_the_truth(n: int) -> None:
    rng, missed = np.random.default_rng(0), []
    for _ in range(1000):
        found = sample_mean(rng.beta(8, 2, n), within=SHARE)
        missed.append(found.excludes(0.8))
        assert 0 <= found.low < found.value < found.high <= 1
    assert np.mean(missed) < 0.08  # 3.2 standard errors above 5%, and some skewness of the mean
    plain, share = sample_mean([0.318, 0.95, 0.99]), sample_mean([0.318, 0.95, 0.99], within=SHARE)
    assert plain.high > 1 > share.high and share.value == plain.value and share.method == "Student's t of the logit"
    positive = sample_mean([0.1, 0.2, 3.0], within=POSITIVE)
    assert 0 < positive.low < positive.value < positive.high


def test_rows_at_an_end_leave_room_on_the_other_side_alone() -> None:
    full, none = sample_mean([1.0] * 10, within=SHARE), sample_mean([0.0] * 10, within=SHARE)
    assert full.high == 1 and full.low == pytest.approx(0.6915, abs=1e-4)  # 1 - 0.3085, as Clopper and Pearson have it
    assert none.low == 0 and none.high == pytest.approx(0.3085, abs=1e-4)
    assert (sample_mean([0.5], within=SHARE).low, sample_mean([0.5], within=SHARE).high) == SHARE
    assert sample_mean([0.25] * 3, within=SHARE).low == 0.25, "rows that agree leave no doubt, whatever the scale"
    with pytest.raises(InvalidInputError, match="outside"):
        sample_mean([1.5], within=SHARE)


def test_rates_are_those_of_benjamini_and_hochberg() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(40) < 10
    acts = rng.random((40, 300)).clip(0.5, None)
    acts[label, :5] += 1
    (q,) = discovery_rates(acts, np.arange(acts.shape[1]), label[None])
    assert (q[:5] < 1e-3).all() and (q[5:] <= 0.05).sum() <= 1
    constant = np.zeros((40, 3))
    assert discovery_rates(constant, np.arange(3), label[None]).tolist() == [[1.0, 1.0, 1.0]]


def test_ranks_taken_once_give_the_tests_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.core.stats.COLUMNS_AT_ONCE", 5)
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.normal(-0.5, 1, (60, 17)), 0)  # many ties at zero
    acts[:, 3] = 1.0
    labels = np.stack([rng.permutation(np.arange(60) < 12) for _ in range(4)])
    columns = np.array([0, *range(2, 17)])
    found = discovery_rates(acts, columns, labels)
    for label, rates in zip(labels, found, strict=True):
        p = mannwhitneyu(acts[label][:, columns], acts[~label][:, columns], axis=0, method="asymptotic").pvalue
        assert rates == pytest.approx(false_discovery_control(np.nan_to_num(p, nan=1.0)))


def test_a_difference_of_shares_stays_between_minus_one_and_one() -> None:
    right, wrong = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    assert paired_difference(right, wrong).high > 1
    bounded = paired_difference(right, wrong, within=SIGNED_SHARE)
    assert bounded.value == 0.75 and -1 <= bounded.low < 0.75 < bounded.high <= 1
    alone = paired_difference([0.9], [0.4], within=SIGNED_SHARE)
    assert (alone.low, alone.high) == (-1.0, 1.0)
