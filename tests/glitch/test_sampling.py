from __future__ import annotations

import numpy as np
import pytest

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.glitch.counting.sampling import Stratum, by_rank, draw, recall, tally, total

N_TOKENS, N_GLITCH, IN_TOP, TOP = 31_747, 137, 76, 637
SHARES = (TOP / N_TOKENS, 0.05, 0.1, 0.25, 0.5)


def _population(seed: int = 0) -> np.ndarray:
    """Highest probabilities by rank: 76 glitch tokens among the first 2%, 61 thinning out behind, as published once."""
    rng = np.random.default_rng(seed)
    best = np.full(N_TOKENS, 0.9)
    best[rng.choice(TOP, IN_TOP, replace=False)] = 0.001
    weight = np.exp(-np.arange(N_TOKENS - TOP) / 6000)
    behind = rng.choice(N_TOKENS - TOP, N_GLITCH - IN_TOP, replace=False, p=weight / weight.sum())
    best[TOP + behind] = 0.001
    return best


def _sampled(best: np.ndarray, n: int, seed: int) -> tuple[Stratum, ...]:
    strata = by_rank(np.arange(len(best)), SHARES)
    seen = np.full(len(best), np.nan)
    chosen = draw(strata, n, seed)
    assert len(set(chosen.tolist())) == len(chosen) == n
    seen[chosen] = best[chosen]
    return tally(strata, seen, 0.01)


def test_a_census_reproduces_the_published_gap_exactly() -> None:
    strata = tally(by_rank(np.arange(N_TOKENS), SHARES), _population(), 0.01)
    assert strata[0].size == TOP and total(strata).value == N_GLITCH
    found = recall(strata, 1)
    assert found.value == IN_TOP / N_GLITCH and round(100 * found.value) == 55
    assert found.n == N_GLITCH and found.low < 0.55 < found.high < 0.65
    assert total(strata).low == total(strata).high == N_GLITCH


def test_samples_are_unbiased_and_their_intervals_cover_the_truth() -> None:
    best, n_draws = _population(), 300
    totals = [_sampled(best, 4000, seed) for seed in range(n_draws)]
    found = [total(strata) for strata in totals]
    counts = np.array([one.value for one in found])
    standard_error = counts.std() / np.sqrt(n_draws)
    assert standard_error < 1.5 and abs(counts.mean() - N_GLITCH) < 4 * standard_error
    covered = np.mean([not one.excludes(float(N_GLITCH)) for one in found])
    recalled = np.mean([not recall(strata, 1).excludes(IN_TOP / N_GLITCH) for strata in totals])
    # 3.3 standard errors of 300 draws below 95%
    assert min(covered, recalled) > 0.905
    # a wide interval would cover too: it has to be narrower than knowing the top alone
    assert np.median([one.high - one.low for one in found]) < 1.2 * N_GLITCH


WIDE = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
FALLING = (0.9, 0.5, 0.2, 0.05, 0.01, 0.002, 0.0005, 0.0001, 0.0)


@pytest.mark.parametrize(
    ("rates", "n"), [(FALLING, 1000), (FALLING, 100), ((0.9, 0.5, 0.2, 0.05, *[0.0] * 5), 1000), ((0.01,) * 9, 500)]
)
def test_intervals_cover_the_truth_where_large_strata_hold_few_glitch_tokens(rates: tuple[float, ...], n: int) -> None:
    rng, n_draws, covered, recalled = np.random.default_rng(0), 100, 0, 0
    strata = by_rank(np.arange(49_000), WIDE)
    for seed in range(n_draws):
        glitch = np.concatenate([rng.random(len(part)) < rate for part, rate in zip(strata, rates, strict=True)])
        best = np.full(len(glitch), np.nan)
        chosen = draw(strata, n, seed)
        best[chosen] = np.where(glitch[chosen], 0.0, 1.0)
        counted = tally(strata, best, 0.01)
        covered += not total(counted).excludes(float(glitch.sum()))
        recalled += not recall(counted, 4).excludes(glitch[:980].sum() / glitch.sum())
    # three standard errors of 100 draws below 95%
    assert min(covered, recalled) >= 89


def test_ignoring_the_inclusion_probabilities_would_be_badly_wrong() -> None:
    strata = _sampled(_population(), 4000, 1)
    found, tested = sum(s.glitch for s in strata), sum(s.tested for s in strata)
    naive = found / tested * N_TOKENS
    assert naive > 3 * N_GLITCH > 2 * total(strata).value


def test_an_interval_has_width_where_nothing_was_found() -> None:
    found = total([Stratum(1000, 100, 0)])
    assert found.value == 0 == found.low and 5 < found.high < 60
    assert total([Stratum(100, 100, 0)]).high == 0


def test_a_finished_stratum_adds_no_uncertainty() -> None:
    some = total([Stratum(50, 50, 7), Stratum(1000, 100, 1)])
    other = total([Stratum(1000, 100, 1)])
    assert abs(some.low - other.low - 7) <= 1 and abs(some.high - other.high - 7) <= 4


def test_samples_take_small_strata_whole_and_share_the_rest() -> None:
    strata = by_rank(np.arange(100, 1100), (0.005, 0.1))
    chosen = draw(strata, 105, seed=3)
    assert [int(np.isin(chosen, part).sum()) for part in strata] == [5, 50, 50]
    assert not np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, draw(strata, 105, seed=3))
    assert not np.array_equal(np.sort(chosen), np.sort(draw(strata, 105, seed=4)))
    assert len(draw(strata, 5000, seed=0)) == 1000


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(DegenerateInputError, match="1 of 2 strata"):
        total([Stratum(10, 10, 1), Stratum(5, 0, 0)])
    with pytest.raises(DegenerateInputError, match="none of the 10"):
        recall([Stratum(10, 10, 0)], 1)
    with pytest.raises(InvalidInputError, match="glitch"):
        Stratum(10, 5, 6)
    with pytest.raises(InvalidInputError, match="too small"):
        draw([np.arange(5), np.arange(5, 10)], 3, seed=0)
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        by_rank(np.arange(10), (0.0,))
