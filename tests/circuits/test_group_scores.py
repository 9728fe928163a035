"""Scores by group against tables computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from circuits.shift.group_scores import GroupScores, group_scores, matthews
from circuits.shift.shortcuts import in_distribution_weights, shortcut_scores, traded
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.stats import wilson


def of_table(table: dict[tuple[int, int, int], int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions, labels and attributes from counts by (label, attribute, prediction)."""
    rows = torch.tensor([key for key, n in table.items() for _ in range(n)])
    return rows[:, 2], rows[:, 0], rows[:, 1]


def test_scores_of_a_table_by_hand() -> None:
    # label 0: attribute 0 9 of 10 right, attribute 1 1 of 5; label 1: attribute 0 2 of 5, attribute 1 10 of 10
    table = {(0, 0, 0): 9, (0, 0, 1): 1, (0, 1, 0): 1, (0, 1, 1): 4, (1, 0, 0): 3, (1, 0, 1): 2, (1, 1, 1): 10}
    scores = group_scores(*of_table(table), label_names=("nurse", "professor"), attribute_names=("female", "male"))
    assert scores.accuracy == wilson(22, 30, unit="texts")
    assert dict(scores.groups) == {
        "female nurse": wilson(9, 10, unit="texts"), "male nurse": wilson(1, 5, unit="texts"),
        "female professor": wilson(2, 5, unit="texts"), "male professor": wilson(10, 10, unit="texts"),
    }  # fmt: skip
    assert (scores.worst_group, scores.worst) == ("male nurse", wilson(1, 5, unit="texts"))
    assert scores.attribute_accuracy == wilson(9 + 3 + 4 + 10, 30, unit="texts")
    # attribute by prediction: [[12, 3], [1, 14]]; (12 * 14 - 3 * 1) / sqrt(15 * 15 * 13 * 17)
    assert scores.mcc.value == pytest.approx(165 / (15 * (13 * 17) ** 0.5))
    assert 0.4 < scores.mcc.low < scores.mcc.value < scores.mcc.high < 1 and scores.mcc.n == 30
    assert scores.frame().set_index("group").loc["male nurse", "n"] == 5
    assert len(repr(scores)) <= 300 and "<table" in scores._repr_html_()


def test_the_worst_group_is_one_that_has_rows_and_empty_ones_are_named() -> None:
    scores = group_scores(*of_table({(0, 0, 0): 3, (1, 1, 1): 2, (1, 1, 0): 1, (2, 0, 2): 2, (2, 1, 1): 4}))
    assert scores.worst_group == "label 2, attribute 1" and scores.worst.value == 0
    assert scores.empty == ("label 0, attribute 1", "label 1, attribute 0")
    assert (scores.mcc.low, scores.mcc.high) == (-1, 1), "12 rows are too few for an interval"
    assert isinstance(scores, GroupScores)


def test_the_correlation_is_that_of_sklearn_and_zero_for_a_constant_prediction() -> None:
    random = np.random.default_rng(0)
    for k in (2, 3):
        a, p = random.integers(0, k, 60), random.integers(0, k, 60)
        p = np.where(random.random(60) < 0.5, a, p)
        table = np.bincount(a * k + p, minlength=k * k).reshape(k, k)
        assert float(matthews(table)) == pytest.approx(matthews_corrcoef(a, p))
    assert float(matthews(np.array([[5, 0], [7, 0]]))) == 0
    draws = np.stack([np.eye(2, dtype=int) * 4, np.array([[0, 3], [2, 0]])])
    assert matthews(draws).tolist() == [1, -1]


def rows_of(accuracy: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hits, labels and cues with n rows per group; `accuracy` is by label, cue A and cue B."""
    cells = np.array(
        [
            (y, a, b, i < round(float(accuracy[y, a, b]) * n))
            for y, a, b in np.ndindex(*accuracy.shape)
            for i in range(n)
        ]
    )
    return cells[:, 3].astype(bool), cells[:, 0], cells[:, 1].astype(bool), cells[:, 2].astype(bool)


BY_CUES = np.array([[0.3, 0.8], [0.6, 1.0]])
"""Without and with A by without and with B."""


def test_weights_and_gaps_of_two_shortcuts_by_hand() -> None:
    weights = in_distribution_weights((0.9, 0.8), (0.25, 0.75))
    assert weights.sum() == pytest.approx(1)
    assert weights[1, 1, 0] == pytest.approx(0.75 * 0.9 * 0.2) and weights[0, 0, 1] == pytest.approx(0.25 * 0.1 * 0.8)
    accuracy = np.stack([BY_CUES, BY_CUES - 0.1])
    scores = shortcut_scores(*rows_of(accuracy, 200))
    # 0.0025 * 0.25 + 0.0475 * 0.75 + 0.0475 * 0.55 + 0.9025 * 0.95
    inside = 0.919750
    assert scores.in_distribution.value == pytest.approx(inside)
    assert scores.gap_a.value == pytest.approx(0.75 - inside) and scores.gap_b.value == pytest.approx(0.55 - inside)
    assert scores.gap_both.value == pytest.approx(0.25 - inside)
    assert len(scores.groups) == 8 and scores.groups[1] == (
        "label 0, without A, with B", wilson(160, 200, unit="texts"),
    )  # fmt: skip
    # the standard error of a mean of two groups of 200 at 0.8 and 0.7 is 0.021
    assert scores.gap_a.high - scores.gap_a.low == pytest.approx(4 * 0.0215, rel=0.15)
    assert len(repr(scores)) <= 300 and "<table" in scores._repr_html_()


def test_a_method_that_trades_one_shortcut_for_the_other_is_called_out() -> None:
    erm = np.stack([BY_CUES, BY_CUES])
    swapped = rows_of(erm.transpose(0, 2, 1), 150)[0]
    hits, *groups = rows_of(erm, 150)
    mole = traded(swapped, hits, *groups)
    assert mole.is_whac_a_mole and mole.text().startswith("relies less on cue B and more on cue A")
    assert mole.change_a.value == pytest.approx(0.2) and mole.change_b.value == pytest.approx(-0.2)
    same = traded(hits, hits, *groups)
    assert not same.is_whac_a_mole and same.change_a.value == 0 and not same.change_a.excludes(0.0)
    better = traded(rows_of(np.full((2, 2, 2), 0.9), 150)[0], hits, *groups)
    assert not better.is_whac_a_mole and better.change_both.high < 0
    assert "gap without A is smaller" in better.text() and "makes gaps small by itself" in better.text()
    few = [part[::30] for part in (swapped, hits, *groups)]
    assert not traded(*few).is_whac_a_mole, "five rows per group do not show it"
    assert len(repr(mole)) <= 300 and "relies less on cue B" in mole._repr_html_()


def test_intervals_of_differences_keep_rows_paired() -> None:
    random = np.random.default_rng(0)
    hits, *groups = rows_of(np.full((2, 2, 2), 0.5), 100)
    method = hits.copy()
    method[random.choice(800, 20, replace=False)] ^= True
    paired = traded(method, hits, *groups).change_in_distribution
    shuffled = traded(random.permutation(method), hits, *groups).change_in_distribution
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_wrong_input_is_refused() -> None:
    ones = torch.ones(4).long()
    with pytest.raises(ShapeError, match="pair up"):
        group_scores(ones, ones, ones[:3])
    with pytest.raises(DegenerateInputError, match="no rows"):
        group_scores(ones[:0], ones[:0], ones[:0])
    with pytest.raises(InvalidInputError, match="from 0"):
        group_scores(ones, -ones, ones)
    with pytest.raises(InvalidInputError, match="give 2 names"):
        group_scores(ones, ones, ones, label_names=("a",))
    hits, y, a, b = rows_of(np.stack([BY_CUES, BY_CUES]), 10)
    with pytest.raises(DegenerateInputError, match="no row of label 1 without cue A and with cue B"):
        kept = ~((y == 1) & ~a & b)
        shortcut_scores(hits[kept], y[kept], a[kept], b[kept])
    with pytest.raises(ShapeError, match="pair up"):
        shortcut_scores(hits[1:], y, a, b)
    with pytest.raises(InvalidInputError, match="sum to 1"):
        in_distribution_weights((1.0, 0.5))
