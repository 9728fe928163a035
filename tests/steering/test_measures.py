"""Measures of texts and distributions, rules for the strength, aggregates of ratings, intervals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import FP32_LOGITS, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.judges import parse_rating
from workbench.steering import (
    best_strength,
    continuation_nll,
    distinct_2,
    distinct_n,
    generation_success,
    harmonic_of_means,
    kl_divergence,
    lens_log_odds,
    mean_of_harmonics,
    paper_strength,
    pareto_front,
    repeated,
    two_level,
)
from workbench.steering.sweep.intervals import two_level_difference, two_level_ratio
from workbench.steering.sweep.measures import text_losses


def test_generation_success_counts_occurrences_in_the_continuation() -> None:
    texts = [torch.tensor(t) for t in ([7, 7, 3], [9], [3])]
    assert generation_success(texts, torch.tensor([7, 9])) == 1.0
    assert generation_success(texts, torch.tensor([7])) == pytest.approx(2 / 3)
    with pytest.raises(DegenerateInputError, match="no continuations"):
        generation_success([], torch.tensor([7]))


def test_repetition_lowers_distinct_and_raises_repeated() -> None:
    same = torch.tensor([5] * 11)
    assert distinct_2(same) == 0.1
    assert distinct_n(same, 1) == pytest.approx(1 / 11)
    assert repeated(same) == pytest.approx(10 / 11)
    assert repeated(torch.arange(9)) == 0.0
    assert math.isnan(distinct_2(torch.tensor([5])))
    assert math.isnan(repeated(torch.tensor([], dtype=torch.long)))


def test_only_the_window_before_counts_as_repetition() -> None:
    assert repeated(torch.tensor([1, 2, 3, 1]), window=2) == 0.0
    assert repeated(torch.tensor([1, 2, 3, 1]), window=3) == 0.25


def test_log_odds_take_all_lens_tokens_together() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0, 1.0]])
    p = logits.softmax(1)[0, [0, 3]].sum()
    assert float(lens_log_odds(logits, torch.tensor([[0, 3]]))) == pytest.approx(float((p / (1 - p)).log()), abs=1e-5)
    sure = lens_log_odds(torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0]]))
    assert float(sure) == pytest.approx(60 - math.log(2), rel=1e-6), "1 - P would be 0 in fp32"
    with pytest.raises(ShapeError, match="pair up"):
        lens_log_odds(torch.zeros(2, 3), torch.tensor([[0]]))


def test_kl_is_taken_under_the_unsteered_model() -> None:
    base, steered = torch.tensor([[2.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    p, q = base.softmax(1), steered.softmax(1)
    expected = float((p * (p / q).log()).sum())
    assert float(kl_divergence(base, steered)) == pytest.approx(expected, abs=1e-6)
    assert abs(float(kl_divergence(steered, base)) - expected) > 1e-3
    assert float(kl_divergence(base, base + 3)) == pytest.approx(0.0, abs=1e-6)


def test_nll_is_that_of_the_continuation_alone() -> None:
    model = tiny_model()
    batch = model.tokens(["ab", "abcde"])
    new = [torch.tensor([40, 50, 60]), torch.tensor([70])]
    found = continuation_nll(model, batch, new)
    for i, prompt in enumerate(("ab", "abcde")):
        ids = torch.cat([model.tokens(prompt).ids[0], new[i]])[None]
        alone = model.loss(ids)[0, -len(new[i]) :].mean()
        assert float(found[i]) == pytest.approx(float(alone), abs=FP32_LOGITS)
    assert continuation_nll(model, batch, [torch.tensor([], dtype=torch.long), new[1]])[0].isnan()


def test_losses_of_texts_are_those_of_the_model() -> None:
    model = tiny_model()
    batch = model.tokens(["some text", "more"])
    hidden = model.capture(batch, ["final_norm"])["final_norm"]
    found = text_losses(model, batch, torch.cat([hidden, hidden]))
    assert torch.allclose(found, model.loss(batch).nanmean(1)[:, None].expand(2, 2), atol=FP32_LOGITS)


def strengths(*rows: tuple[list[float], list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([count for count, _ in rows], dtype=float), np.array([nll for _, nll in rows])


def test_best_strength_weighs_success_against_perplexity() -> None:
    table = strengths(([0, 1], [1.0, 1.0]), ([2, 2], [1.1, 1.1]), ([3, 3], [5.0, 5.0]))
    assert best_strength(*table) == paper_strength(*table) == (1, False)


def test_both_rules_drop_repetition() -> None:
    table = strengths(([1, 1], [2.0, 2.0]), ([9, 9], [0.5, 0.5]))
    assert best_strength(*table) == paper_strength(*table) == (0, False)
    repeats = strengths(([9, 9], [0.5, 0.5]), ([8, 8], [0.5, 0.5]))
    assert best_strength(*repeats) == paper_strength(*repeats) == (0, True)


def test_the_paper_averages_perplexities_and_not_their_logarithms() -> None:
    """One very surprising text among four: its perplexity fills the mean of perplexities, not that of logarithms."""
    table = strengths(([1, 1, 1, 1], [1.0] * 4), ([2, 2, 2, 2], [0.5, 0.5, 0.5, 4.0]))
    assert paper_strength(*table) == (0, False)  # 1 / e against 2 / 14.9
    assert best_strength(*table) == (1, False)  # 1 / e against 2 / e^1.375


def test_texts_without_a_perplexity_do_not_decide() -> None:
    table = strengths(([0, 0], [math.nan, math.nan]), ([1, 1], [2.0, math.nan]))
    assert best_strength(*table) == paper_strength(*table) == (1, False)


def test_the_front_holds_no_dominated_point_and_all_others() -> None:
    random = np.random.default_rng(0)
    effect, cost = random.random(40).round(1).tolist(), random.random(40).round(1).tolist()
    front = pareto_front(effect, cost)
    for i in range(40):
        beaten = any(
            effect[j] >= effect[i] and cost[j] <= cost[i] and (effect[j] > effect[i] or cost[j] < cost[i])
            for j in range(40)
        )
        assert (i in front) != beaten
    assert [cost[i] for i in front] == sorted(cost[i] for i in front)
    assert pareto_front([1.0, 1.0], [0.0, 0.0]) == (0, 1), "equals do not beat each other"
    assert pareto_front([math.nan, 1.0], [0.0, 5.0]) == (1,)


def test_the_two_aggregates_differ_as_published() -> None:
    scores = torch.tensor([[2.0, 2.0, 2.0], [0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert mean_of_harmonics(scores) == pytest.approx(1.0)
    assert harmonic_of_means(scores) == pytest.approx(1.3636, abs=1e-4)
    assert harmonic_of_means(torch.stack([scores, scores * 0])) == pytest.approx(1.3636 / 2, abs=1e-4)
    with pytest.raises(InvalidInputError, match="0 to 2"):
        mean_of_harmonics(scores + 1)
    with pytest.raises(ShapeError, match="examples, 3"):
        mean_of_harmonics(scores[:, :2])


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("Rating: [[2]].", 2), ("Rating: **1**", 1), ("no idea", None), ("Rating: 3", None),
     ("Rating: 1\nno, Rating: 0", 0), ("rating 1.5", 1.5)],
)  # fmt: skip
def test_ratings_are_read_from_replies(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


def test_the_interval_knows_that_features_were_drawn_too() -> None:
    """All prompts agree and features differ: over prompts alone the interval would have no width."""
    values = np.repeat(np.array([[0.0], [1.0], [2.0], [3.0]]), 6, axis=1)
    found = two_level(values)
    assert found is not None
    assert found.value == 1.5
    assert found.high - found.low > 1.0
    across = two_level(values.T)
    assert across is not None
    assert across.high - across.low > 1.0, "and that prompts were"
    assert (found.n, found.unit) == (6, "prompts x 4 features")


def test_unknown_cells_are_left_out() -> None:
    found = two_level(np.array([[1.0, math.nan], [3.0, 2.0]]))
    assert found is not None
    assert found.value == 2.0
    assert two_level(np.array([[math.nan]])) is None


def test_intervals_of_ratios_and_differences() -> None:
    a, b = np.full((3, 4), 6.0), np.full((5, 4), 2.0)
    ratio, difference = two_level_ratio(a, b), two_level_difference(a, b)
    assert ratio is not None and difference is not None
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 3.0, 3.0)
    assert (difference.value, difference.low, difference.high) == (4.0, 4.0, 4.0)
    assert two_level_ratio(a, b * 0) is None
    assert two_level_ratio(a, np.where(np.arange(5)[:, None] == 0, 1.0, 0.0 * b)).high == math.inf
    with pytest.raises(ShapeError, match="prompts must agree"):
        two_level_difference(a, b[:, :2])


def test_the_interval_covers_the_mean_of_the_population() -> None:
    """Crossed effects of features and prompts; the nominal 95 % may be exceeded, hardly missed."""
    random = np.random.default_rng(1)
    hits = 0
    for i in range(60):
        table = random.normal(size=(12, 1)) + random.normal(size=(1, 12)) + random.normal(size=(12, 12))
        found = two_level(table, seed=i)
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert hits >= 52
    narrow = replace(found, low=found.value - 0.01, high=found.value + 0.01)
    assert narrow.high - narrow.low < found.high - found.low
