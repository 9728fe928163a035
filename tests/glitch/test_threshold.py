from __future__ import annotations

import numpy as np
import pytest

from workbench.glitch.ranking.indicators import find_threshold, find_valley


def _bulk(n: int = 5000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.1, n)


def test_a_tail_beyond_the_bulk_is_found_and_the_bulk_left_alone() -> None:
    planted = np.random.default_rng(1).uniform(0.0, 0.4, 30)
    found = find_threshold(np.concatenate([_bulk(), planted]))
    assert found.method == "false discovery rate"
    assert planted.max() <= found.value < 0.75
    assert "30 ordinary tokens" in found.why or "31 ordinary tokens" in found.why or "32 ordinary" in found.why
    assert found.percentile == pytest.approx(100 * 30 / 5030, abs=0.1)


def test_a_skewed_upper_side_changes_nothing() -> None:
    skewed = np.where(_bulk() > 1.0, 1.0 + 4 * (_bulk() - 1.0), _bulk())
    found = find_threshold(np.concatenate([skewed, np.full(10, 0.2)]))
    assert found.method == "false discovery rate" and 0.2 <= found.value < 0.7


def test_without_a_tail_the_published_percentile_is_used_and_said() -> None:
    found = find_threshold(np.random.default_rng(0).uniform(0.5, 1.5, 5000))
    assert (found.method, found.percentile) == ("percentile", 2.0) and "no more tokens" in found.why
    assert find_threshold(np.ones(500)).method == "percentile"
    few = find_threshold(np.arange(50.0))
    assert few.value == np.percentile(np.arange(50.0), 2.0) and "too few" in few.why


@pytest.mark.parametrize("share", [0.02, 0.14, 0.18, 0.4, 0.6])
def test_however_many_tokens_are_untrained_they_are_found(share: float) -> None:
    rng, n = np.random.default_rng(0), 20_000
    untrained = rng.normal(0.05, 0.01, int(share * n))
    trained = rng.normal(0.5, 0.1, n - len(untrained))
    found = find_threshold(np.concatenate([untrained, trained]))
    assert found.method == "false discovery rate" and (untrained <= found.value).all()
    assert (trained <= found.value).sum() <= 0.12 * (len(untrained) + (trained <= found.value).sum())
    assert ("group of their own" in found.why) == (share > 0.05)


@pytest.mark.parametrize("above", [0.003, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("below", [0.0, 0.1])
def test_a_group_above_the_bulk_makes_no_group_of_the_bulk(above: float, below: float) -> None:
    rng, n = np.random.default_rng(0), 49_152
    untrained = rng.normal(0.05, 0.01, int(below * n))
    far = rng.normal(1.3, 0.05, int(above * n))
    values = np.sort(np.concatenate([untrained, rng.normal(0.5, 0.1, n - len(untrained) - len(far)), far]))
    valley = find_valley(values)
    assert valley is None if not below else valley is not None and 0.05 < valley < 0.4
    found = find_threshold(values)
    assert abs((values <= found.value).sum() - len(untrained)) <= max(0.15 * len(untrained), 0.025 * n * (not below))


def test_one_mode_has_no_valley_whatever_its_shape() -> None:
    rng = np.random.default_rng(0)
    shapes = (rng.normal(size=5000), rng.exponential(size=5000), -rng.exponential(size=5000), rng.standard_t(3, 5000))
    for values in (*shapes, rng.normal(size=200), rng.uniform(size=5000), np.ones(300)):
        assert find_valley(np.sort(values)) is None
    two = np.sort(np.concatenate([rng.normal(0, 1, 500), rng.normal(6, 1, 4500)]))
    valley = find_valley(two)
    assert valley is not None and 1.5 < valley < 4.5


def test_a_percentile_that_was_asked_for_is_used() -> None:
    values = np.concatenate([_bulk(), np.zeros(30)])
    found = find_threshold(values, 5.0)
    assert (found.method, found.value) == ("percentile", np.percentile(values, 5.0)) and "as asked" in found.why


def test_ties_at_the_threshold_are_taken_together() -> None:
    values = np.concatenate([np.round(_bulk(), 2), np.full(40, 0.25)])
    found = find_threshold(values)
    assert (values <= found.value).sum() == round(found.percentile * len(values) / 100) >= 40
