"""Judges of explanations: what they are asked, and what their answers are worth once they have proved competent.

A judge sees an explanation and one window and gives the probability that the answer is yes. Before it is believed on
any real feature it has to tell apart windows of units whose meaning is known (`judge_gate`). An answer that can't be
read is counted and shown; beyond a tenth of such answers there is no score.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from workbench.activations.store import ActivationStore
from workbench.core.errors import DegenerateInputError, InvalidInputError
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
from workbench.features.explain.units import KnownUnits, families, unit_bank
from workbench.features.passes.windows import WindowOptions, collect_windows
from workbench.features.token_classes import Vocabulary

Kind = Literal["detection", "fuzzing"]
KINDS: tuple[Kind, ...] = ("detection", "fuzzing")
MOST_FAILED = 0.1
"""Share of unreadable answers beyond which there is no score."""
GATE_MARGIN = 0.2
"""By how much the AUROC with the true explanation must exceed that with another unit's, interval included."""
TOP_RATING = 2.0
_RATINGS = (
    re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"),
    re.compile(r"\brating\s*(?:\([^)]*\))?\W*?(-?\d+(?:\.\d+)?)", re.IGNORECASE),
    re.compile(r"\A\W*?(-?\d+(?:\.\d+)?)\W*(?:\n|\Z)"),
)
"""A rating in double brackets, behind its name, or alone in the first line."""
_REPLY = re.compile(r"\W*(?:(?:answer|reply)\W+)?([01])(?!\w|[.,]\d)", re.IGNORECASE)
_DIGIT = re.compile(r"(?<!\w)([01])(?!\w)")
NOT_NEEDED = ("position",)
"""Families that are measured but not needed: a window does not show where in its row it stands."""


@runtime_checkable
class Rater(Protocol):
    """Someone who rates on a scale from 0 to 2."""

    @property
    def name(self) -> str:
        """What stands beside the ratings."""
        ...

    def rate(self, prompts: Sequence[str]) -> list[float | None]:
        """The rating that each prompt asks for; None where there is no readable reply."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Someone who answers questions with yes or no."""

    @property
    def name(self) -> str:
        """What stands beside the scores."""
        ...

    def answer(self, prompts: Sequence[str]) -> list[float | None]:
        """The probability of "1" for each prompt; None where there is no readable reply."""
        ...


def parse_reply(text: str) -> float | None:
    """1.0 or 0.0 if a reply begins with that digit alone, bold or after "Answer:", and does not name both; else None.

    >>> parse_reply(" 1."), parse_reply("**0**"), parse_reply("Answer: 1")
    (1.0, 0.0, 1.0)
    >>> parse_reply("10"), parse_reply("0.9"), parse_reply("1 or 0?"), parse_reply("Sure! 1")
    (None, None, None, None)
    """
    found = _REPLY.match(text)
    if found is None or set(_DIGIT.findall(text)) != {found[1]}:
        return None
    return float(found[1])


def parse_rating(reply: str) -> float | None:
    r"""The last rating in a judge's reply: in double brackets, else behind "rating", else a first line of its own.

    None if there is none from 0 to 2.

    AxBench counts None as 0; whether to do so is left to the caller, who should say how many there were.

    >>> parse_rating("Rating (0-2): [[1]]")
    1.0
    >>> parse_rating("Rating: [[2]]."), parse_rating("Rating: **1**"), parse_rating("Rating: 3"), parse_rating("good")
    (2.0, 1.0, None, None)
    >>> parse_rating("2 sentences mention it: [[1]]"), parse_rating(" 2\n"), parse_rating("2 pets")
    (1.0, 2.0, None)
    """
    found = next((found for kind in _RATINGS if (found := kind.findall(reply))), None)
    if found is None:
        return None
    rating = float(found[-1])
    return rating if 0 <= rating <= TOP_RATING else None


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


def prompts_of(kind: Kind, explanation: str, items: Items, vocabulary: Vocabulary) -> list[str]:
    """One prompt per window."""
    make = detection_prompt if kind == "detection" else fuzzing_prompt
    return [make(explanation, _window_text(items, i, vocabulary)) for i in range(len(items))]


def _window_text(items: Items, i: int, vocabulary: Vocabulary) -> str:
    parts = []
    for j in items.windows.inside[i].nonzero()[0]:
        text = vocabulary.text(int(items.windows.view.ids[i, j]))
        parts.append(f"<<{text}>>" if items.marks is not None and items.marks[i, j] else text)
    return "".join(parts)


@dataclass(frozen=True, eq=False)
class Answers:
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


@dataclass(frozen=True, eq=False)
class _Asking:
    """One test's windows before one judge; what it says without an explanation is asked once."""

    judge: Judge
    kind: Kind
    items: Items
    vocabulary: Vocabulary

    @functools.cached_property
    def _empty(self) -> np.ndarray:
        return self._yes("")

    def _yes(self, explanation: str) -> np.ndarray:
        prompts = prompts_of(self.kind, explanation, self.items, self.vocabulary)
        replies = self.judge.answer(prompts)
        if len(replies) != len(prompts):
            raise InvalidInputError(f"{self.judge.name} gave {len(replies)} answers to {len(prompts)} questions.")
        return np.array([np.nan if p is None else p for p in replies])

    def answers(self, explanation: str) -> Answers:
        yes = self._yes(explanation) if explanation else self._empty
        return Answers(yes, yes - self._empty)


@dataclass(frozen=True)
class FamilyGate:
    """What a judge can do with one family of known units.

    Attributes:
        kind: the test.
        family: of units.
        units: how many were tried.
        margin: AUROC with the true explanation less that with another unit's; None if too many replies failed.
        failed: share of replies that could not be read.
    """

    kind: Kind
    family: str
    units: int
    margin: Estimate | None
    failed: Estimate

    @property
    def passed(self) -> bool:
        """Whether the whole interval lies above the margin that is asked for."""
        return self.margin is not None and self.margin.low > GATE_MARGIN


@dataclass(frozen=True)
class Gate:
    """Which tests a judge may give scores for."""

    judge: str
    results: tuple[FamilyGate, ...]

    def refusal(self, kind: Kind) -> str:
        """Why a judge gets no scores in a test; "" if it does."""
        needed = [r for r in self.results if r.kind == kind and r.family not in NOT_NEEDED]
        wrong = [
            f"{r.family} ({r.margin or f'{r.failed.value:.0%} of replies unreadable'})" for r in needed if not r.passed
        ]
        if not needed:
            return f"judge not competent: it was not tried on {kind}"
        return f"judge not competent at {kind}: fails on {', '.join(wrong)}" if wrong else ""


@dataclass(frozen=True, kw_only=True)
class GateOptions:
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


def judge_gate(
    judge: Judge, store: ActivationStore, site: str, tokenizer: Any, options: GateOptions | None = None
) -> Gate:
    """Tries a judge on units whose meaning is known, over the text of a store.

    Each unit's windows are judged with its own explanation and with that of a unit of another family.

    Raises:
        DegenerateInputError: if no unit has enough windows.
    """
    options, vocabulary = options or GateOptions(), Vocabulary.of(tokenizer)
    bank = unit_bank(store, per_family=options.per_family, seed=options.seed)
    units = KnownUnits(bank, vocabulary)
    found = collect_windows(store, site, units, replace(options.windows, seed=options.seed))
    split = ExampleOptions(tested=options.per_unit, fewest=3, seed=options.seed)
    every = {i: examples_of(found, i, i, split) for i in range(len(bank))}
    usable = [i for i, examples in every.items() if not examples.lacking(split.fewest)]
    if not usable:
        raise DegenerateInputError(f"judge_gate: none of {len(bank)} known units has enough windows. Use more text.")
    results = []
    for kind in KINDS:
        for family in families(bank):
            members = [i for i in usable if bank[i].family == family]
            if members:
                trials = [_trial(judge, kind, every[i], _texts(bank, i, vocabulary), vocabulary) for i in members]
                results.append(_family(kind, family, trials))
    return Gate(judge.name, tuple(results))


def _texts(bank: Sequence[Any], i: int, vocabulary: Vocabulary) -> tuple[str, str]:
    """The unit's own explanation, and that of a unit of another family."""
    around = [(i + len(bank) // 2 + step) % len(bank) for step in range(len(bank))]
    other = next((j for j in around if bank[j].family != bank[i].family), i)
    return bank[i].rule.text(vocabulary), bank[other].rule.text(vocabulary)


@dataclass(frozen=True, eq=False)
class _Trial:
    labels: np.ndarray
    documents: np.ndarray
    own: np.ndarray
    other: np.ndarray


def _trial(judge: Judge, kind: Kind, examples: Examples, texts: tuple[str, str], vocabulary: Vocabulary) -> _Trial:
    items = items_of(kind, examples)
    asking = _Asking(judge, kind, items, vocabulary)
    own, other = (asking.answers(text).above_empty for text in texts)
    return _Trial(items.labels, items.windows.documents, own, other)


def items_of(kind: Kind, examples: Examples) -> Items:
    """The windows of a test."""
    return detection_items(examples) if kind == "detection" else fuzzing_items(examples)


def _family(kind: Kind, family: str, trials: Sequence[_Trial]) -> FamilyGate:
    labels, documents, own, other = (
        np.concatenate([getattr(trial, name) for trial in trials]) for name in ("labels", "documents", "own", "other")
    )
    unread = np.isnan(own) | np.isnan(other)
    failed = wilson(int(unread.sum()), len(unread), unit="windows") if len(unread) else wilson(1, 1, unit="windows")
    margin = None
    read = ~unread
    if failed.value <= MOST_FAILED and labels[read].any() and not labels[read].all():
        margin = auroc_difference(labels[read], own[read], other[read], documents[read])
    return FamilyGate(kind, family, len(trials), margin, failed)


def judge_explanations(
    judge: Judge, gate: Gate, texts: Mapping[int, str], examples: Mapping[int, Examples], tokenizer: Any
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
        tokenizer: a Hugging Face tokenizer, or a `Vocabulary`.
    """
    vocabulary, numbers = Vocabulary.of(tokenizer), list(texts)
    found = {}
    for place, feature in enumerate(numbers):
        windows = examples[feature]
        top = f"token is one of {vocabulary.quoted(windows.top_tokens)}"
        others = {"empty": "", "top tokens": top}
        if len(numbers) > 1:
            others["shuffled"] = texts[numbers[(place + 1) % len(numbers)]]
        lacking = windows.lacking(ExampleOptions().fewest)
        scores, controls, notes = ({}, {}, [lacking]) if lacking else _judged(
            judge, gate, texts[feature], others, windows, vocabulary
        )  # fmt: skip
        note = f" ({'; '.join(notes)})" if notes else ""
        n = 2 * min(len(windows.tested), len(windows.tested_silent))
        found[feature] = Explanation(texts[feature] + note, judge.name, scores, controls, n)
    return found


def _judged(
    judge: Judge, gate: Gate, text: str, others: Mapping[str, str], examples: Examples, vocabulary: Vocabulary
) -> tuple[dict[str, Estimate], dict[str, Estimate], list[str]]:
    scores: dict[str, Estimate] = {}
    controls: dict[str, Estimate] = {}
    notes: list[str] = []
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
        scores[f"{kind}: failed replies"] = wilson(answers.failed, len(items), unit="windows")
        if answers.failed > MOST_FAILED * len(items):
            notes.append(f"{kind}: {answers.failed} of {len(items)} replies could not be read")
            continue
        scores.update(_values(kind, items, answers))
        for name, control in compared.items():
            if control.failed <= MOST_FAILED * len(items):
                controls |= {f"{name}: {score}": value for score, value in _values(kind, items, control).items()}
            else:
                notes.append(f"{kind} without the control {name!r}: {control.failed} replies could not be read")
    return scores, controls, notes


def _values(kind: Kind, items: Items, answers: Answers) -> dict[str, Estimate]:
    read = ~np.isnan(answers.above_empty)
    labels, documents = items.labels[read], items.windows.documents[read]
    if labels.all() or not labels.any():
        return {}
    ratios = answer_scores(labels, answers.yes[read] >= 0.5, documents)
    graded = auroc(labels, answers.above_empty[read], documents)
    return {kind: ratios["balanced_accuracy"], f"{kind}: auroc": graded}
