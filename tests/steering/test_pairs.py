"""A direction is found where one is planted, and its controls find nothing."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import workbench as wb
from tests.tiny import tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.models.model import Model
from workbench.steering.directions.contrast import difference_of_means
from workbench.steering.directions.pairs import SHUFFLES, _flips, _more, _separated

WITH, WITHOUT = [f"{c}{c} yes" for c in "abcdefghij"], [f"{c}{c} non" for c in "abcdefghij"]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def found(model: Model) -> wb.Direction:
    return wb.direction(model, WITH, WITHOUT, "resid_post.1")


def test_the_vector_is_the_difference_of_means_without_the_first_token(model: Model, found: wb.Direction) -> None:
    means = []
    for texts in (WITH, WITHOUT):
        acts = model.capture(texts, ["resid_post.1"])["resid_post.1"]
        means.append(acts[:, 1:].mean(1))
    torch.testing.assert_close(found.vector, difference_of_means(*means))
    projected = torch.cat(means) @ found.unit
    torch.testing.assert_close(found.projections, projected)
    last = wb.direction(model, WITH, WITHOUT, "resid_post.1", tokens="last")
    ends = [model.capture(texts, ["resid_post.1"], positions=wb.Last())["resid_post.1"] for texts in (WITH, WITHOUT)]
    torch.testing.assert_close(last.vector, difference_of_means(*ends))


def test_held_out_pairs_are_separated_and_the_controls_are_at_chance(found: wb.Direction) -> None:
    assert found.separated.value == 1.0 and found.separated.n == 10
    assert 0.3 < found.shuffled.value < 0.7 and found.shuffled.n == SHUFFLES
    headline = found.section().headline
    assert headline is not None and headline.control == found.shuffled and headline.difference == found.more
    assert headline.verdict == "works"
    assert found.section().metrics["random_direction"] is found.random


def test_a_pair_is_judged_by_a_direction_that_others_made() -> None:
    gaps, folds = torch.eye(4).double(), torch.arange(4)
    as_given = torch.ones(1, 4).double()
    assert _separated(gaps @ gaps.T, folds, as_given) == [0], "orthogonal gaps say nothing of each other"
    assert _separated((gaps + 1) @ (gaps + 1).T, folds, as_given) == [4]
    random = torch.Generator().manual_seed(0)
    gaps, folds = torch.randn(7, 3, generator=random).double(), torch.arange(7) % 3
    flips = torch.tensor([[1.0] * 7, [-1.0] * 7, [1.0, -1.0] * 3 + [1.0]]).double()
    expected = [
        sum(float(gap @ (gaps * flip[:, None])[folds != fold].mean(0) * sign) > 0
            for gap, fold, sign in zip(gaps, folds, flip, strict=True))
        for flip in flips
    ]  # fmt: skip
    assert _separated(gaps @ gaps.T, folds, flips) == expected and expected[0] == expected[1] != expected[2]


@pytest.mark.parametrize(("n", "works"), [(2, False), (5, False), (6, True), (9, True), (12, True)])
def test_six_pairs_that_agree_are_enough_and_five_are_not(n: int, works: bool) -> None:
    alike, folds, flips = torch.ones(n, n).double(), torch.arange(n) % min(5, n), _flips(n, 0)
    (own,), shuffled = _separated(alike, folds, flips.abs()[:1]), _separated(alike, folds, flips)
    assert own == n and (_more(own, shuffled, n).low > 0) == works
    assert len(flips.unique(dim=0)) == len(flips) == min(2**n, SHUFFLES) or n > 9


def test_labels_that_say_nothing_seldom_work() -> None:
    random, folds, works = torch.Generator().manual_seed(0), torch.arange(8) % 5, 0
    for _ in range(400):
        gaps = torch.randn(8, 16, generator=random).double()
        flips = _flips(8, 0)
        shuffled = _separated(gaps @ gaps.T, folds, flips)
        works += _more(shuffled[0], shuffled, 8).low > 0  # the first leaves all pairs as they are
    assert works / 400 < 0.085  # 3.2 standard errors above 5 %


def test_sides_without_a_difference_in_kind_are_no_better_than_shuffled(model: Model) -> None:
    ends, starts = ["c", "f", "i", "l", "o", "q", "s", "u"], ["ab", "de", "gh", "jk", "mn", "op", "qr", "st"]
    sides = [
        [f"{start} {end}" for start, end in zip(some, ends, strict=True)] for some in (starts, starts[3:] + starts[:3])
    ]
    headline = wb.direction(model, *sides, "resid_post.1").section().headline
    assert headline is not None and headline.verdict == "no better than its control"


def test_it_steers_at_its_site_in_its_own_model(model: Model, found: wb.Direction) -> None:
    edit = found.intervention(2.0, wb.Last())
    assert edit.made_for == model.fingerprint and edit.edits[0].op.strength == 2.0
    with model.plan(edit):
        steered = model.capture("one", ["resid_post.1"])["resid_post.1"]
    plain = model.capture("one", ["resid_post.1"])["resid_post.1"]
    torch.testing.assert_close(steered[0, -1] - plain[0, -1], 2 * found.vector, atol=1e-5, rtol=1e-5)


def test_columns_of_a_table_give_labelled_rows(model: Model) -> None:
    pairs = pd.DataFrame({"yes": WITH, "no": WITHOUT}, index=list("abcdefghij"))
    frame = wb.direction(model, pairs["yes"], pairs["no"], "resid_post.1").frame()
    assert frame.index.tolist() == [*"abcdefghij"] * 2 and frame.side.tolist() == ["positive"] * 10 + ["negative"] * 10
    assert pairs.join(frame[frame.side == "negative"].projection).projection.notna().all()


def test_sides_that_are_no_pairs_or_do_not_differ_are_refused(model: Model) -> None:
    with pytest.raises(InvalidInputError, match="2 positives and 1 negatives"):
        wb.direction(model, ["ab", "cd"], ["ef"], "resid_post.1")
    with pytest.raises(DegenerateInputError, match="do not differ"):
        wb.direction(model, ["ab", "cd"], ["ab", "cd"], "resid_post.1")
