"""SHIFT with three labels: one probe of all of them, effects on the margin of each row's label."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import circuits
from circuits.shift.deciders import Node
from circuits.shift.effects import effects_on
from circuits.shift.judgement import most_effective
from circuits.shift.judging.within_label import WithinLabelDecider
from circuits.shift.methods import Scorer
from circuits.shift.multiclass import SoftmaxProbe, logits_of
from circuits.shift.options import ShiftOptions
from circuits.shift.reading import read_study
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import Prediction, ShiftTask
from circuits.shift.texts import LabelledTexts
from tests.circuits.planted import SITE, SPURIOUS, SPURIOUS_FEATURES, planted_model, planted_sae
from workbench.controls.methods import Method
from workbench.core.errors import MismatchError

LABEL = ("T", "N", "q")
OPTIONS = ShiftOptions(top_k=12, random_draws=2)


def _text(label: int, attribute: int, i: int) -> str:
    """Every third repeats the label's letter, so that there the label outweighs the attribute."""
    repeats = 4 if i % 3 == 0 else 1
    return f"x {'bcd'[i % 3]} {SPURIOUS[attribute]} {'fgh'[i // 3 % 3]}" + f" {LABEL[label]}" * repeats


def _rows(groups: list[tuple[int, int]], each: int) -> LabelledTexts:
    made = [(_text(y, a, i), y, a) for i in range(each) for y, a in groups]
    texts, label, attribute = zip(*made, strict=True)
    return LabelledTexts(texts, label, attribute)


def _task() -> ShiftTask:
    """M goes with T and q, F with N."""
    every = [(y, a) for y in range(3) for a in (0, 1)]
    train = _rows([(0, 0), (1, 1), (2, 0)], 12)
    swapped = tuple(_text(y, 1 - a, i // 3) for i, (y, a) in enumerate(train.groups))  # type: ignore[operator,arg-type]
    return ShiftTask(
        name="three", label_names=LABEL, spurious_names=SPURIOUS, train=train, swapped=swapped,
        balanced=_rows(every, 6), test=_rows(every, 9), spurious_words=frozenset(SPURIOUS),
        target_words=frozenset(LABEL),
    )  # fmt: skip


@functools.cache
def _report() -> ShiftReport:
    methods = ["skyline + retrain", "ERM", "swap direction removed", "oracle probe"]
    return circuits.shift(planted_model(), {SITE: planted_sae()}, _task(), methods=methods, options=OPTIONS)


def test_three_labels_are_told_apart_and_the_attribute_is_ablated() -> None:
    row = _report().method
    ablated = {int(v.feature.rpartition("/")[2]) for v in _report().verdicts if v.decision == "spurious"}
    assert ablated == SPURIOUS_FEATURES
    original, retrained, oracle = row("original"), row("SHIFT + retrain"), row("oracle probe")
    assert original.worst.value < 0.6 and original.spurious.value > 0.6 and original.worst.n == 9
    assert retrained.label.value == 1.0 >= oracle.label.value and retrained.spurious.value == 0.5
    assert row("random features + retrain").label.value < 0.95
    assert row("ERM").label == original.label, "the probe of the study is the same softmax regression"
    assert row("skyline + retrain").label.value == row("swap direction removed").label.value == 1.0
    assert "softmax regression" in _report()._method_text()


def test_exact_effects_are_what_ablating_each_feature_does_to_the_margin_of_each_label() -> None:
    study = read_study(planted_model(), {SITE: planted_sae()}, replace(_task(), swapped=None, balanced=None), OPTIONS)
    effects = effects_on(study, study.train, _task().train.label, OPTIONS.attribution, 8)[SITE]
    assert isinstance(study.probe, SoftmaxProbe)

    def margin(x: torch.Tensor) -> torch.Tensor:
        logits, label = logits_of(study.probe, x), torch.tensor(_task().train.label)
        own = logits.gather(1, label[:, None])[:, 0]
        return (own - (logits.sum(1) - own) / 2).mean()

    clean = margin(study.train.x)
    for feature in (0, 1, 2, 4, 9):
        by_hand = clean - margin(study.reader.ablated(study.train, [Node(SITE, feature)]))
        assert float(effects.effect[feature]) == pytest.approx(float(by_hand), abs=1e-5), feature
    assert float(effects.effect.abs().max()) > 0.5


def test_estimated_effects_rank_as_exact_ones_and_the_skyline_reads_the_attribute() -> None:
    task = replace(_task(), swapped=None)
    here, above = (
        read_study(planted_model(), {SITE: planted_sae()}, task, replace(OPTIONS, probe_site=site))
        for site in (SITE, "resid_post.2")
    )
    exact, estimated = (
        effects_on(study, study.train, task.train.label, OPTIONS.attribution, 36)[SITE].effect
        for study in (here, above)
    )
    chosen = exact.abs() > 0.1
    assert torch.equal(exact[chosen] > 0, estimated[chosen] > 0)
    assert torch.corrcoef(torch.stack([exact, estimated]))[0, 1] > 0.8
    for study in (here, above):
        assert {node.feature for node in most_effective(study, 2)} == SPURIOUS_FEATURES


def test_agreement_with_an_attribute_that_goes_with_several_labels_by_hand() -> None:
    scorer, task = Scorer(_task()), _task()
    label, attribute = torch.tensor(task.test.label), torch.tensor(task.test.spurious)

    def score(name: str, predicted: torch.Tensor) -> None:
        scorer.add(Method(name=name, information="", run=lambda _: Prediction(())), Prediction((predicted,)))

    score("right", label)
    score("follows", torch.where(attribute == 1, 1, 2 * (label == 2).long()))  # N for F; of T and q the right one, or T
    right, follows = scorer.rows
    assert (right.spurious.value, right.cue_mcc.value) == (0.5, pytest.approx(0.0))
    assert (follows.spurious.value, follows.cue_mcc.value) == (1.0, 1.0)
    assert follows.label.value == 0.5  # T and q with M, N with F: three of six groups
    gain = scorer.compare("right", "follows")
    assert gain.conflict is not None and (gain.conflict.value, gain.conflict.n) == (1.0, 27)


def test_a_classifier_of_three_labels_is_saved_and_judges_of_two_are_refused(tmp_path: Path) -> None:
    model = planted_model()
    report = circuits.shift(model, circuits.neurons(model, [SITE]), _task(), options=replace(OPTIONS, top_k=16))
    loaded = circuits.load_classifier(report.save(tmp_path), model)
    labels = loaded(_task().test.texts)
    hits = sum(name == LABEL[truth] for name, truth in zip(labels, _task().test.label, strict=True))
    assert hits / len(labels) == report.method("SHIFT + retrain").label.value
    assert loaded.probabilities(["x b M f q"]).shape == (1, 3) and loaded.label_names == LABEL
    with pytest.raises(MismatchError, match="tells two labels apart, and the task has 3"):
        circuits.shift(model, {}, _task(), WithinLabelDecider())
