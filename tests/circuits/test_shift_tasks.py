"""What a SHIFT task may leave out, and what a study then does."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from circuits.shift.asked import AskedDecider
from circuits.shift.deciders import FeatureDossier, LexiconDecider, OracleDecider, StatisticsDecider, Verdict
from circuits.shift.methods import Scorer
from circuits.shift.reading import ShiftOptions, of_two_labels
from circuits.shift.shift_report import ShiftReport
from circuits.shift.study import shift
from circuits.shift.task import Prediction, ShiftStudy, ShiftTask
from circuits.shift.texts import LabelledTexts
from tests.circuits.planted import LABEL, SITE, SPURIOUS, SPURIOUS_FEATURES, planted_model, planted_sae, planted_task
from workbench.controls.methods import Method, possible
from workbench.core.errors import DegenerateInputError, MismatchError, ShapeError, UnknownNameError
from workbench.judges import Answer, Question

OPTIONS = ShiftOptions(top_k=10, random_draws=2)
TASK = planted_task(40, 16)
NO_WORDS: dict[str, frozenset[str]] = {"spurious_words": frozenset(), "target_words": frozenset()}


@dataclass(frozen=True)
class Planted:
    """Knows which features the attribute has."""

    name = "planted"
    information = "the truth"
    is_oracle = False

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        assert dossier.swapped is None and dossier.spurious_share is None
        is_spurious = dossier.node.feature in SPURIOUS_FEATURES
        return Verdict(dossier.node, "spurious" if is_spurious else "intended", 0.0, "planted")


class Silent:
    """A judge that must not be asked."""

    name = "silent"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        raise AssertionError(questions)


def _bare() -> ShiftTask:
    """Texts and labels alone."""

    def alone(rows: LabelledTexts) -> LabelledTexts:
        return replace(rows, spurious=None)

    return replace(
        TASK, spurious_names=(), train=alone(TASK.train), test=alone(TASK.test), swapped=None, balanced=None, **NO_WORDS
    )


@functools.cache
def _study(task: ShiftTask, judge: object = None, options: ShiftOptions = OPTIONS) -> ShiftReport:
    return shift(planted_model(), {SITE: planted_sae()}, task, judge, options=options)  # type: ignore[arg-type]


def test_methods_without_what_they_need_are_left_out_and_the_others_stay_what_they_are() -> None:
    whole, without = _study(TASK, LexiconDecider()), _study(replace(TASK, swapped=None, balanced=None))
    lost = {"swap direction removed", "skyline", "skyline + retrain", "SHIFT, oracle judge",
            "SHIFT, oracle judge + retrain", "oracle probe"}  # fmt: skip
    assert not whole.left_out and without.judge == "lexicon"
    assert without.methods == tuple(row for row in whole.methods if row.name not in lost)
    assert {line.partition(" is left out: ")[0] for line in without.left_out} == lost
    assert "swap direction removed is left out: the task has no twins (training texts with the attribute swapped)." in (
        without.findings()
    )
    assert not {c.other for c in without.comparisons} & lost and all(
        v.oracle_decision is None for v in without.verdicts
    )
    json.dumps(without.to_json())


def test_a_study_of_texts_and_labels_alone_measures_labels_alone() -> None:
    report, whole = _study(_bare(), Planted()), _study(TASK, LexiconDecider())
    for name in ("original", "SHIFT", "SHIFT + retrain"):
        assert report.method(name).label == whole.method(name).label and report.method(name).spurious is None
    assert report.method("original").worst_group in LABEL and report.method("original").worst.n == 8
    section = report.section()
    assert not any("agreement" in column for table in section.blocks for column in getattr(table, "columns", ()))
    assert "shift.label" in section.metrics and "shift.spurious" not in section.metrics
    assert all(c.conflict is None for c in report.comparisons)
    assert "the attribute of the texts is not known" in report.findings()[0]
    assert report.headline().sentence


def test_a_judge_that_needs_more_than_the_task_has_is_refused_before_anything_is_read() -> None:
    for judge, task, reason in (
        (None, replace(TASK, swapped=None, **NO_WORDS), "no twins .* and the task has no lists of words"),
        (StatisticsDecider(), replace(TASK, swapped=None), "the statistics judge can't decide, since .* no twins"),
        (LexiconDecider(), replace(TASK, **NO_WORDS), "the lexicon judge can't decide, since .* no lists"),
        (OracleDecider(), replace(TASK, balanced=None), "the oracle judge can't decide, since .* balanced"),
    ):
        with pytest.raises(MismatchError, match=reason):
            shift(planted_model(), {}, task, judge)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="no lists of words"):
        AskedDecider.of(Silent(), replace(TASK, **NO_WORDS))  # type: ignore[arg-type]


def test_one_of_more_than_two_labels_is_told_from_the_rest() -> None:
    def three(rows: LabelledTexts) -> LabelledTexts:
        return replace(rows, label=tuple(label and 1 + i // 4 % 2 for i, label in enumerate(rows.label)))

    task = replace(
        TASK, label_names=("T", "N", "third"), train=three(TASK.train), test=three(TASK.test), balanced=three(TASK.balanced)  # type: ignore[arg-type]
    )  # fmt: skip
    assert of_two_labels(task, OPTIONS) == task
    assert of_two_labels(task, replace(OPTIONS, positive="T")) == task.one_against_rest("T")
    with pytest.raises(UnknownNameError, match="no label 'thrid'. Did you mean third"):
        task.one_against_rest("thrid")
    against = task.one_against_rest("T")
    assert against.label_names == ("not T", "T")
    assert against.train.label == tuple(1 - label for label in TASK.train.label)
    assert against.swapped == TASK.swapped and against.shortcut() == (1, 0), "M goes with T, which is label 1 now"
    report = _study(against)
    assert report.method("original").label == _study(TASK).method("original").label
    assert report.method("skyline").n_features == len(SPURIOUS_FEATURES)
    assert report.method("skyline").label == report.method("SHIFT").label, "on the attribute's side of the new label"


def test_agreement_and_conflict_follow_what_the_attribute_goes_with() -> None:
    """Attribute values 0, 1, 2 go with label 1, 0, 1, at unequal sizes of the labels."""
    spurious, label = (0,) * 4 + (1,) * 3 + (2,) * 5, (1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0)
    train = LabelledTexts(tuple("abcdefghijkl"), label, spurious)
    test = LabelledTexts(tuple("mnopqr"), (0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2))
    task = ShiftTask(name="t", label_names=("no", "yes"), spurious_names=("a", "b", "c"), train=train, test=test)
    assert task.shortcut() == (1, 0, 1) and task.expected(task.test) == (1, 0, 1, 1, 0, 1)
    scorer = Scorer(task)
    for name, labels in (("follows", [1, 0, 1, 1, 0, 1]), ("constant", [1] * 6)):
        method = Method(name=name, information="", run=lambda _: Prediction(()))
        scorer.add(method, Prediction((torch.tensor(labels),)))
    follows, constant = scorer.rows
    assert follows.spurious is not None and follows.spurious.value == 1.0 and follows.label.value == 0.5
    assert constant.spurious is not None and constant.spurious.value == pytest.approx(4 / 6)
    assert (follows.worst_group, follows.worst.n) == ("a no", 1)
    conflict = scorer.compare("constant", "follows").conflict
    assert conflict is not None and conflict.n == 3 and conflict.value == pytest.approx(1 / 3)
    independent = replace(task, train=LabelledTexts(tuple("abcdef"), (0, 1) * 3, (0, 0, 1, 1, 2, 2)))
    assert independent.shortcut() == (0, 1, 1), "no value tells the label"


def test_a_method_says_what_it_needs() -> None:
    def method(name: str, *needs: str) -> Method[ShiftStudy, Prediction]:
        compared = ("other",) if name == "one" else ()
        return Method(name=name, information="", run=lambda _: Prediction(()), needs=needs, compared_with=compared)

    kept, left_out = possible([method("one"), method("other", "twins")], ["twins"], {"twins": "no twins"})
    assert [one.name for one in kept] == ["one"] and kept[0].compared_with == ()
    assert left_out == ("other is left out: no twins.",)
    assert len(possible([method("one"), method("other", "twins")], ["twins"], {})[0]) == 2
    with pytest.raises(UnknownNameError, match="'twin'. Did you mean twins"):
        possible([method("one", "twin")], ["twins"], {})


def test_sets_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(MismatchError, match="test has no attributes, and there are 2 names"):
        replace(TASK, test=replace(TASK.test, spurious=None))
    with pytest.raises(MismatchError, match="train has labels 0, 1, but only 1"):
        replace(TASK, label_names=("T",))
    with pytest.raises(DegenerateInputError, match="train has no row of the label 'third'"):
        replace(TASK, label_names=("T", "N", "third"))
    with pytest.raises(DegenerateInputError, match=r"test has no row .*\(1, 0\).*give rows of M N"):
        few = [i for i, group in enumerate(TASK.test.groups) if group != (1, 0)]
        replace(TASK, test=TASK.test.rows(few))
    with pytest.raises(DegenerateInputError, match="without a gap"):
        LabelledTexts(("a", "b"), (0, 2))
    with pytest.raises(ShapeError, match="cue 'length' has 1 value"):
        LabelledTexts(("a", "b"), (0, 1), None, (("length", (1,)),))


def test_a_task_shows_its_sizes() -> None:
    assert len(TASK.frame()) == 2 + 4 + 4 and sum(TASK.frame()["n"]) == 40 + 40 + 16
    assert list(TASK.frame().iloc[0]) == ["train", "T", "M", 20]
    assert list(_bare().frame().columns) == ["set", "label", "n"]
    assert "labels T, N, attribute M, F; train 40, balanced 40, test 16, twins, words" in repr(TASK)
    assert SPURIOUS[0] in TASK._repr_html_()
