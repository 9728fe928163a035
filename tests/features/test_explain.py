from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.features.corpus import SITE, VOCABULARY, Planted, corpus, corpus_store, examples_from, word
from tests.tiny import tiny_model
from workbench.activations.harvest import harvest
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.features.explain.examples import ExampleOptions, Examples, Windows, examples_of, is_held_out
from workbench.features.explain.rule_explanations import explain_by_rules, score_rules
from workbench.features.explain.rules import TokenView
from workbench.features.explain.testing import (
    MARK_SHARE,
    answer_scores,
    auroc,
    auroc_difference,
    detection_items,
    frequency_weighted,
    fuzzing_items,
)
from workbench.features.passes.windows import FeatureWindows, WindowOptions, collect_windows

PETS = (word(" dog"), word(" cat"))
UNITS = Planted((
    lambda ids, p: (2.0 - p / 24) * (ids[p] in PETS),
    lambda ids, p: float(ids[p] == word(" Paris") and p == 9 and ids[p - 1] < 8),
    lambda ids, p: 1.0,
))  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return corpus_store(tmp_path_factory.mktemp("e") / "s")


@pytest.fixture(scope="module")
def found(store: ActivationStore) -> FeatureWindows:
    return collect_windows(store, SITE, UNITS, WindowOptions(before=6, after=6))


@pytest.fixture(scope="module")
def examples(found: FeatureWindows) -> Examples:
    return examples_of(found, 0, 0, ExampleOptions())


def test_no_document_is_shown_and_tested(examples: Examples) -> None:
    shown = {*examples.shown.documents.tolist(), *examples.shown_silent.documents.tolist()}
    tested = {*examples.tested.documents.tolist(), *examples.tested_silent.documents.tolist()}
    assert len(shown) > 30 < len(tested)
    assert not shown & tested
    assert not bool(is_held_out(torch.tensor(sorted(shown)), ExampleOptions()).any())
    assert bool(is_held_out(torch.tensor(sorted(tested)), ExampleOptions()).all())
    share = is_held_out(torch.arange(4000), ExampleOptions(held_out=0.25)).double().mean()
    assert float(share) == pytest.approx(0.25, abs=0.03)


def test_windows_hold_what_the_labels_say(examples: Examples) -> None:
    assert bool(examples.shown.active.any(1).all())
    assert bool(examples.tested.active.any(1).all())
    assert not examples.tested_silent.active.any()
    assert not np.isin(examples.tested_silent.view.ids, PETS).any()
    assert set(examples.top_tokens) <= set(PETS)
    assert len(np.unique(examples.shown.rows)) == len(examples.shown), "no row twice"


def test_unknown_activations_are_no_evidence(examples: Examples) -> None:
    left_out = examples.shown.inside & np.isnan(examples.shown.values)
    assert left_out.any(), "the first token of a row is left out of the store"
    data = examples.data()
    both = [examples.shown, examples.shown_silent]
    assert len(data.active) == sum(int(w.known.sum()) for w in both)
    assert 0 not in data.view.ids.tolist()
    assert np.array_equal(data.active, np.isin(data.view.ids, PETS))


def test_wrong_marks_are_as_many_and_below_the_threshold(examples: Examples) -> None:
    items = fuzzing_items(examples)
    n = len(items) // 2
    assert items.marks is not None
    assert n + items.unusable == len(examples.tested)
    right, wrong = items.marks[:n], items.marks[n:]
    assert items.labels.tolist() == [True] * n + [False] * n
    assert np.array_equal(right.sum(1), wrong.sum(1))
    assert not (right & wrong).any()
    values = items.windows.values[:n]
    limit = MARK_SHARE * np.nanmax(values, axis=1, keepdims=True)
    assert (values[right] >= np.broadcast_to(limit, values.shape)[right]).all()
    assert (values[wrong] < np.broadcast_to(limit, values.shape)[wrong]).all()
    assert items.windows.known[:n][wrong].all(), "a token that was left out is never marked"
    again, other = fuzzing_items(examples).marks, fuzzing_items(examples, seed=1).marks
    assert again is not None and other is not None
    assert np.array_equal(again, items.marks)
    assert not np.array_equal(other, items.marks), "the wrong tokens are not always the same ones"


def test_windows_that_give_no_wrong_marks_are_counted() -> None:
    values = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    view = TokenView(np.full((2, 3), 2), np.full((2, 3, 8), -1), np.tile(np.arange(3), (2, 1)), np.full((2, 3), -1))
    windows = Windows(view, values, np.ones((2, 3), dtype=bool), np.arange(2), np.arange(2))
    items = fuzzing_items(examples_from(windows))
    assert (len(items), items.unusable) == (2, 1)


def test_detection_is_balanced(examples: Examples) -> None:
    items = detection_items(examples)
    assert items.labels.sum() * 2 == len(items) > 40


def test_features_without_enough_windows_say_so(found: FeatureWindows) -> None:
    rules = explain_by_rules(found, torch.arange(3), VOCABULARY)
    assert [rule.fitted is None for rule in rules] == [False, True, True]
    tests = score_rules(rules, VOCABULARY)
    assert tests[1].text.startswith("no explanation: ")
    assert "windows" in tests[1].text
    assert "0 held-out windows without it" in tests[2].text, "it is active in every window"
    assert tests[2].scores == {}
    assert "shuffled: detection" not in tests[0].controls, "there is no other rule to shuffle with"


def test_ratios_by_hand() -> None:
    labels = np.array([True] * 4 + [False] * 4)
    answers = np.array([True, True, True, False, True, False, False, False])
    scores = answer_scores(labels, answers, np.arange(8))
    assert {name: round(e.value, 6) for name, e in scores.items()} == {
        "balanced_accuracy": 0.75, "precision": 0.75, "recall": 0.75, "f1": 0.75,
    }  # fmt: skip
    assert scores["recall"].low < 0.75 < scores["recall"].high
    never = answer_scores(labels, np.zeros(8, dtype=bool), np.arange(8))
    assert (never["balanced_accuracy"].value, never["precision"].value, never["f1"].value) == (0.5, 0.0, 0.0)
    with pytest.raises(DegenerateInputError):
        answer_scores(np.ones(3, dtype=bool), np.ones(3, dtype=bool), np.arange(3))
    with pytest.raises(ShapeError):
        answer_scores(labels, answers[:3], np.arange(8))


def test_intervals_resample_documents_not_windows() -> None:
    labels, documents = np.tile([True, False], 50), np.arange(100) // 20
    answers = documents % 2 == 0
    few = answer_scores(labels, answers, documents)["recall"]
    many = answer_scores(labels, answers, np.arange(100))["recall"]
    assert (few.n, many.n) == (5, 100)
    assert few.value == many.value == 0.6
    assert few.high - few.low > 2 * (many.high - many.low), "answers within a document are alike"


def test_areas_by_hand() -> None:
    labels, documents = np.array([True, True, False, False]), np.arange(4)
    scores = np.array([0.9, 0.4, 0.4, 0.1])
    assert auroc(labels, scores, documents).value == pytest.approx(3.5 / 4)
    assert auroc(labels, np.ones(4), documents).value == 0.5
    assert auroc(labels, -scores, documents).value == pytest.approx(0.5 / 4)
    difference = auroc_difference(labels, scores, -scores, documents)
    assert difference.value == pytest.approx(3 / 4)


def test_frequency_weighting_and_options() -> None:
    assert frequency_weighted([0.2, 0.8], [3, 1]) == pytest.approx(0.35)
    with pytest.raises(DegenerateInputError):
        frequency_weighted([0.2], [0])
    with pytest.raises(InvalidInputError):
        ExampleOptions(held_out=1.0)


def test_results_do_not_depend_on_the_other_features(store: ActivationStore, found: FeatureWindows) -> None:
    alone = collect_windows(store, SITE, Planted(UNITS.functions[:1]), WindowOptions(before=6, after=6))
    rules = [explain_by_rules(f, torch.arange(1), VOCABULARY)[0].fitted for f in (alone, found)]
    assert rules[0] == rules[1]


def test_a_passage_that_was_shown_is_not_tested(tmp_path: Path) -> None:
    ids = corpus(60)
    ids[:, :20] = ids[0, :20]  # documents that differ in their ends alone
    store = harvest(tiny_model(), TokenRows(ids, batch_rows=8), [SITE], tmp_path / "s")
    unit = Planted((lambda row, p: float(p == 9), lambda row, p: float(p == 22)))
    windows = collect_windows(store, SITE, unit, WindowOptions(before=6, after=6))
    shared, own = (examples_of(windows, slot, slot, ExampleOptions()) for slot in (0, 1))
    assert len(shared.shown) == 1 and len(shared.tested) == 0 and "0 held-out windows" in shared.lacking(1)
    assert "1 window to explain it from" in shared.lacking(2)
    assert len(own.shown) > 10 < len(own.tested)
