"""Judges of explanations: what they are asked, and what their answers are worth once they have proved competent.

A judge sees an explanation and one window and gives the probability that the answer is yes. Before it is believed on
any real feature it has to tell apart windows of units whose meaning is known (`judge_gate`). An answer that can't be
read is counted and shown; beyond a tenth of such answers there is no score.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from workbench.activations.store import ActivationStore
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError
from workbench.core.stats import Estimate, wilson
from workbench.features.card import Explanation
from workbench.features.explain.examples import ExampleOptions, Examples, examples_of
from workbench.features.explain.testing import (
    Items,
    answer_scores,
    auroc,
    auroc_difference,
    detection_items,
    fuzzing_items,
)
from workbench.features.explain.units import KnownUnit, KnownUnits, families, unit_bank
from workbench.features.passes.windows import WindowOptions, collect_windows
from workbench.features.token_classes import TokenSource, TokenTexts
from workbench.judges.gate import JudgeGate, Trial, trial
from workbench.judges.protocol import MAX_FAILED_SHARE, Cost, Judge, Question, ask

Kind = Literal["detection", "fuzzing"]
KINDS: tuple[Kind, ...] = ("detection", "fuzzing")
MIN_AUROC_MARGIN = 0.2
"""By how much the AUROC with the true explanation must exceed that with another unit's, interval included."""
NOT_NEEDED = ("position",)
"""Families that are measured but not needed: a window does not show where in its row it stands."""


def detection_prompt(explanation: str, window: str) -> str:
    """Asks whether a passage contains what an explanation describes."""
    return (
        "A detector reacts to certain tokens in text. It is described like this:\n"
        f"{explanation or '(no description)'}\n\nPassage:\n{window}\n\n"
        "Does the detector react anywhere in this passage? Reply with the single digit 1 for yes or 0 for no.\nReply:"
    )


def fuzzing_prompt(explanation: str, window: str) -> str:
    """Asks whether the marked tokens of a passage are those that an explanation describes."""
    return (
        "A detector reacts to certain tokens in text. It is described like this:\n"
        f"{explanation or '(no description)'}\n\nIn the passage some tokens stand between << and >>.\n"
        f"Passage:\n{window}\n\nAre the tokens between << and >> those to which the detector reacts? Reply with the "
        "single digit 1 for yes or 0 for no.\nReply:"
    )


def questions_of(kind: Kind, explanation: str, items: Items, vocabulary: TokenTexts) -> list[Question]:
    """One question per window, answered by yes or no."""
    make = detection_prompt if kind == "detection" else fuzzing_prompt
    return [Question(make(explanation, _window_text(items, i, vocabulary))) for i in range(len(items))]


def _window_text(items: Items, i: int, vocabulary: TokenTexts) -> str:
    parts = []
    for j in items.windows.inside[i].nonzero()[0]:
        text = vocabulary.text(int(items.windows.view.ids[i, j]))
        parts.append(f"<<{text}>>" if items.marks is not None and items.marks[i, j] else text)
    return "".join(parts)


@dataclass(frozen=True, eq=False)
class CalibratedAnswers:
    """Answers to the windows of one test, calibrated by those without an explanation.

    Attributes:
        yes: probability of yes; nan where there was no readable reply.
        above_empty: the same less the probability of yes without an explanation, which removes what length and content
            of the window give by themselves.
    """

    yes: np.ndarray
    above_empty: np.ndarray

    @property
    def failed(self) -> int:
        """Windows without a readable reply, to either question."""
        return int(np.isnan(self.above_empty).sum())


@dataclass(eq=False)
class _Asking:
    """One test's windows before one judge; the answers without an explanation are asked for once."""

    judge: Judge
    kind: Kind
    items: Items
    vocabulary: TokenTexts
    cost: Cost = field(default_factory=Cost)

    @functools.cached_property
    def _empty(self) -> np.ndarray:
        return self._yes("")

    def _yes(self, explanation: str) -> np.ndarray:
        answers = ask(self.judge, questions_of(self.kind, explanation, self.items, self.vocabulary))
        self.cost += answers.cost
        return answers.values

    def answers(self, explanation: str) -> CalibratedAnswers:
        yes = self._yes(explanation) if explanation else self._empty
        return CalibratedAnswers(yes, yes - self._empty)


@checked
@dataclass(frozen=True, kw_only=True)
class GateOptions(OneLine):
    """How a judge is tried.

    Attributes:
        per_family: units of each family, as far as the text has them.
        per_unit: windows with a unit, and as many without.
        windows: how windows are collected.
        seed: of units and windows.
    """

    per_family: int = 7
    per_unit: int = 8
    windows: WindowOptions = WindowOptions(top=1, sample=40, before=12, after=7, background=256, co_entries=0)
    seed: int = 0


@checked
def judge_gate(
    judge: Judge, store: ActivationStore, site: str, tokenizer: TokenSource, options: GateOptions | None = None
) -> JudgeGate:
    """Tries a judge on units whose meaning is known, over the text of a store.

    Each unit's windows are judged with its own explanation and with that of a unit of another family.

    Raises:
        DegenerateInputError: if no unit has enough windows.
    """
    options, vocabulary = options or GateOptions(), TokenTexts.of(tokenizer)
    bank = unit_bank(store, per_family=options.per_family, seed=options.seed)
    units = KnownUnits(bank, vocabulary)
    found = collect_windows(store, site, units, replace(options.windows, seed=options.seed))
    split = ExampleOptions(tested=options.per_unit, fewest=3, seed=options.seed)
    every = {i: examples_of(found, i, i, split) for i in range(len(bank))}
    usable = [i for i, examples in every.items() if not examples.lacking(split.fewest)]
    if not usable:
        raise DegenerateInputError(f"judge_gate: none of {len(bank)} known units has enough windows. Use more text.")
    trials, cost = [], Cost()
    for kind in KINDS:
        for family in families(bank):
            members = [i for i in usable if bank[i].family == family]
            tried = [_tried(judge, kind, every[i], _texts(bank, i, vocabulary), vocabulary) for i in members]
            if tried:
                trials.append(_family(kind, family, tried))
                cost = sum((one.cost for one in tried), cost)
    return JudgeGate(judge.name, tuple(trials), cost)


def _texts(bank: Sequence[KnownUnit], i: int, vocabulary: TokenTexts) -> tuple[str, str]:
    """The unit's own explanation, and that of a unit of another family."""
    around = [(i + len(bank) // 2 + step) % len(bank) for step in range(len(bank))]
    other = next((j for j in around if bank[j].family != bank[i].family), i)
    return bank[i].rule.text(vocabulary), bank[other].rule.text(vocabulary)


@dataclass(frozen=True, eq=False)
class _Tried:
    """One known unit's windows, with the answers to its own explanation and to another one."""

    labels: np.ndarray
    documents: np.ndarray
    own: np.ndarray
    other: np.ndarray
    cost: Cost


def _tried(judge: Judge, kind: Kind, examples: Examples, texts: tuple[str, str], vocabulary: TokenTexts) -> _Tried:
    items = items_of(kind, examples)
    asking = _Asking(judge, kind, items, vocabulary)
    own, other = (asking.answers(text).above_empty for text in texts)
    return _Tried(items.labels, items.windows.documents, own, other, asking.cost)


def items_of(kind: Kind, examples: Examples) -> Items:
    """The windows of a test."""
    return detection_items(examples) if kind == "detection" else fuzzing_items(examples)


def _family(kind: Kind, family: str, tried: Sequence[_Tried]) -> Trial:
    labels, documents, own, other = (
        np.concatenate([getattr(one, name) for one in tried]) for name in ("labels", "documents", "own", "other")
    )

    def margin(read: np.ndarray) -> Estimate | None:
        has_both = labels[read].any() and not labels[read].all()
        return auroc_difference(labels[read], own[read], other[read], documents[read]) if has_both else None

    return trial(
        kind, own, other, margin, needed_margin=MIN_AUROC_MARGIN, group=family, is_needed=family not in NOT_NEEDED
    )


@checked
def judge_explanations(
    judge: Judge, gate: JudgeGate, texts: Mapping[int, str], examples: Mapping[int, Examples], tokenizer: TokenSource
) -> dict[int, Explanation]:
    """A judge's scores of explanations on held-out windows, for the tests that its gate allows.

    Scores: "detection" and "fuzzing" (balanced accuracy of yes at one half and above), their "auroc" (of the
    probability less that without an explanation), and "failed replies". A test that the gate refuses, or in which more
    than a tenth of the replies could not be read, has no score; the explanation's text says so. Controls: the
    explanation of another feature, none, and the list of the tokens that the strongest windows peak on.

    Args:
        judge: who answers.
        gate: of this judge.
        texts: explanation of each feature, from wherever.
        examples: windows of each feature.
        tokenizer: a Hugging Face tokenizer, or a `TokenTexts`.
    """
    vocabulary, numbers = TokenTexts.of(tokenizer), list(texts)
    explanations = {}
    for place, feature in enumerate(numbers):
        windows = examples[feature]
        top = f"token is one of {vocabulary.quoted(windows.top_tokens)}"
        others = {"empty": "", "top tokens": top}
        if len(numbers) > 1:
            others["shuffled"] = texts[numbers[(place + 1) % len(numbers)]]
        lacking = windows.lacking(ExampleOptions().fewest)
        judged = _Judged(notes=[lacking]) if lacking else _judged(
            judge, gate, texts[feature], others, windows, vocabulary
        )  # fmt: skip
        note = f" ({'; '.join(judged.notes)})" if judged.notes else ""
        explanations[feature] = Explanation(
            texts[feature] + note, judge.name, judged.scores, judged.controls,
            n_windows=2 * min(len(windows.tested), len(windows.tested_silent)), cost=judged.cost,
        )  # fmt: skip
    return explanations


@dataclass(eq=False)
class _Judged:
    scores: dict[str, Estimate] = field(default_factory=dict)
    controls: dict[str, Estimate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


def _judged(
    judge: Judge, gate: JudgeGate, text: str, others: Mapping[str, str], examples: Examples, vocabulary: TokenTexts
) -> _Judged:
    judged = _Judged()
    scores, controls, notes = judged.scores, judged.controls, judged.notes
    for kind in KINDS:
        if refusal := gate.refusal(kind):
            notes.append(refusal)
            continue
        items = items_of(kind, examples)
        if not len(items):
            notes.append(f"no window for {kind}")
            continue
        asking = _Asking(judge, kind, items, vocabulary)
        # All at once, so that whoever answers from files is asked once.
        answers = asking.answers(text)
        compared = {name: asking.answers(other) for name, other in others.items()}
        judged.cost += asking.cost
        scores[f"{kind}: failed replies"] = wilson(answers.failed, len(items), unit="windows")
        if answers.failed > MAX_FAILED_SHARE * len(items):
            notes.append(f"{kind}: {answers.failed} of {len(items)} replies could not be read")
            continue
        scores.update(_values(kind, items, answers))
        for name, control in compared.items():
            if control.failed <= MAX_FAILED_SHARE * len(items):
                controls |= {f"{name}: {score}": value for score, value in _values(kind, items, control).items()}
            else:
                notes.append(f"{kind} without the control {name!r}: {control.failed} replies could not be read")
    return judged


def _values(kind: Kind, items: Items, answers: CalibratedAnswers) -> dict[str, Estimate]:
    read = ~np.isnan(answers.above_empty)
    labels, documents = items.labels[read], items.windows.documents[read]
    if labels.all() or not labels.any():
        return {}
    ratios = answer_scores(labels, answers.yes[read] >= 0.5, documents)
    graded = auroc(labels, answers.above_empty[read], documents)
    return {kind: ratios["balanced_accuracy"], f"{kind}: auroc": graded}
