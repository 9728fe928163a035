"""Likeness of windows by their tokens, on windows made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.features.corpus import examples_from
from workbench.features.explain.examples import Examples, Windows
from workbench.features.explain.rule_explanations import RuleTests, rule_scores
from workbench.features.explain.rules import Never, TokenIn, TokenView
from workbench.features.explain.testing import (
    detection_items,
    fuzzing_items,
    hard_items,
    intruder_score,
    most_alike,
    tf_idf,
)
from workbench.features.token_classes import TokenTexts


def windows(rows: list[list[int]], active: int = -1) -> Windows:
    ids = np.array(rows)
    values = (ids == active).astype(float)
    before = np.full((*ids.shape, 8), -1)
    n = len(ids)
    view = TokenView(ids, before, np.tile(np.arange(ids.shape[1]), (n, 1)), np.full_like(ids, -1))
    return Windows(view, values, ids >= 0, np.arange(n), np.arange(n))


def test_weights_by_hand() -> None:
    found = tf_idf(windows([[5, 1], [5, 2], [5, 2]]))
    assert found[:, 2].tolist() == [0, 0, 0], "a token of every window weighs nothing"
    np.testing.assert_allclose(found[0], [1, 0, 0])  # log 3 for token 1, alone
    np.testing.assert_allclose(found[1], [0, 1, 0])  # log 3/2 for token 2, alone
    assert tf_idf(windows([[5, 5], [5, 5]])).tolist() == [[0], [0]]


def test_tokens_beyond_the_window_do_not_count() -> None:
    assert tf_idf(windows([[1, -1], [2, 3]])).shape == (2, 3)


def test_the_most_alike_come_first() -> None:
    pool = windows([[1, 2, 3], [7, 8, 9], [7, 8, 3]])
    found = most_alike(pool, windows([[7, 8, 9], [7, 8, 5]]), 2)
    assert found.view.ids.tolist() == [[7, 8, 9], [7, 8, 3]]
    assert len(most_alike(pool, pool[:0], 2)) == 0


def feature() -> Examples:
    """Token 9 where token 8 stands before it; silent windows hold either 9 alone, or neither."""
    other = iter(range(20, 4000))  # tokens that occur once
    yes = [[*itertools.islice(other, 4), 8, 9] for _ in range(20)]
    near = [[*itertools.islice(other, 4), 7, 9] for _ in range(20)]
    far = [list(itertools.islice(other, 6)) for _ in range(60)]
    with_it = windows(yes)
    with_it.values[:, 5] = 1.0
    silent = windows([*far, *near])
    return examples_from(
        with_it, shown_silent=silent[:5], tested_silent=silent[:20], top_tokens=(9,), held_silent=silent
    )


def test_hard_negatives_hold_the_token_without_its_condition() -> None:
    items = hard_items(feature())
    assert items.labels.sum() * 2 == len(items) == 40
    assert (items.windows.view.ids[~items.labels] == 9).any(1).all()
    assert not items.windows.active[~items.labels].any()


def test_a_rule_that_forgets_the_condition_fails_the_hard_test_alone() -> None:
    examples = feature()
    tests = RuleTests(detection_items(examples), hard_items(examples), fuzzing_items(examples))
    vocabulary = TokenTexts.of_texts([str(i) for i in range(4000)])
    scores = rule_scores(TokenIn((9,)), tests, vocabulary)
    assert scores["detection"].value == 1.0
    assert scores["hard detection"].value < 0.6
    assert rule_scores(TokenIn((8,)), tests, vocabulary)["hard detection"].value == 1.0
    assert rule_scores(Never(), tests, vocabulary)["hard detection"].value == 0.5


def test_a_rule_that_fires_on_a_token_of_unknown_activation_says_nothing() -> None:
    examples = feature()
    items = detection_items(examples)
    tests = RuleTests(items, hard_items(examples), fuzzing_items(examples))
    vocabulary = TokenTexts.of_texts([str(i) for i in range(4000)])
    items.windows.view.ids[:, 3] = 19
    items.windows.values[~items.labels, 3] = np.nan
    assert rule_scores(TokenIn((19,)), tests, vocabulary)["detection"].value == 1.0
    items.windows.values[items.labels, 3] = np.nan
    assert rule_scores(TokenIn((19,)), tests, vocabulary)["detection"].value == 0.5


def test_the_intruder_is_found_where_windows_share_words() -> None:
    found = intruder_score(feature())
    assert found.chance == pytest.approx(0.2)
    assert found.accuracy is not None and found.accuracy.value > 0.9
    assert found.control is not None and found.control.low < 0.2 < found.control.high


def test_windows_that_are_all_alike_are_guessed_at_chance() -> None:
    same = windows([[1, 2, 3]] * 50)
    found = intruder_score(examples_from(same))
    assert found.accuracy is not None and found.accuracy.value == pytest.approx(0.2, abs=0.05)


def test_without_a_full_trial_there_is_no_score() -> None:
    few = windows([[1, 2, 3]] * 3)
    assert intruder_score(examples_from(few)).accuracy is None
