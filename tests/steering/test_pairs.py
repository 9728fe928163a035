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
from workbench.steering.directions.pairs import _separated

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
    assert 0.3 < found.shuffled.value < 0.7 and found.shuffled.n == 20
    headline = found.section().headline
    assert headline is not None and headline.control == found.shuffled
    assert found.section().metrics["random_direction"] is found.random


def test_a_pair_is_judged_by_a_direction_that_others_made() -> None:
    gaps, folds = torch.eye(4).double(), torch.arange(4)
    assert _separated(gaps, folds, lambda others: others.mean(0)) == 0, "orthogonal gaps say nothing of each other"
    assert _separated(gaps + 1, folds, lambda others: others.mean(0)) == 4
    seen = []
    _separated(gaps, folds, lambda others: seen.append(len(others)) or others[0])
    assert seen == [3, 3, 3, 3]


def test_sides_without_a_difference_in_kind_are_no_better_than_shuffled(model: Model) -> None:
    same = wb.direction(model, ["ab c", "de f", "gh i", "jk l"], ["mn c", "op f", "qr i", "st l"], "resid_post.1")
    headline = same.section().headline
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
