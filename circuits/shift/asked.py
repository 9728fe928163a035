"""A judge that answers questions, asked which features carry the spurious attribute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.shift.deciders import (
    Decider,
    Decision,
    FeatureDossier,
    LexiconDecider,
    OracleDecider,
    StatisticsDecider,
    Verdict,
)
from circuits.shift.judging.named import judge_named
from circuits.shift.needs import NEEDS, Need
from circuits.shift.task import ShiftTask
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import MismatchError
from workbench.core.numbers import number
from workbench.core.stats import Estimate, paired_difference
from workbench.judges.files import FileJudge
from workbench.judges.gate import JudgeGate, Trial, trial
from workbench.judges.protocol import Judge, Question, ask

KNOWN_CASES = 12
WORDS_PER_CASE = 5
MIN_MARGIN = 0.3
"""By how much, of 1, the probability of yes must be higher for words of the list that is asked about."""
MIN_YES = 0.5


@checked
@dataclass(frozen=True, eq=False)
class AskedDecider(OneLine):
    """Asks a judge whether a feature's strongest tokens tell the attribute, and whether they tell the label.

    A feature is spurious if the judge says yes to the attribute, and more so than to the label. Where the attribute has
    no name, it is spurious if its tokens do not tell the label. Before that the judge has to tell the task's two word
    lists apart; until it does, no feature is decided.

    Attributes:
        judge: who answers.
        attribute: names of the attribute's values, () if it has none.
        label: names of the labels.
        gate: what the judge can do; None if it was not tried, since the task has no word lists.
    """

    judge: Judge
    attribute: tuple[str, ...]
    label: tuple[str, ...]
    gate: JudgeGate | None

    is_oracle = False

    @classmethod
    def of(cls, judge: Judge, task: ShiftTask, seed: int = 0, *, allow_untested: bool = False) -> AskedDecider:
        """Tries the judge on the words of the task.

        Args:
            judge: who answers.
            task: with lists of words for attribute and label.
            seed: decides the words.
            allow_untested: take the judge's word where the task has no lists to try it on; the report says so.

        Raises:
            MismatchError: if there are no lists, and an untested judge is not allowed.
        """
        is_untested = allow_untested and "words" in task.missing()
        gate = None if is_untested else words_gate(judge, task, seed)
        return cls(judge, task.spurious_names, task.label_names, gate)

    @property
    def name(self) -> str:
        """Short name."""
        return self.judge.name

    @property
    def information(self) -> str:
        """What the judge uses, in words."""
        names = "the names of attribute and label" if self.attribute else "the names of the labels"
        tried = "tried on the task's two word lists" if self.gate else "UNTESTED, since the task has no word lists"
        return f"the tokens on which a feature is most active, and {names}; {tried}; no text, no label of a row"

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature; "unsure" where the judge is refused or gives no readable reply."""
        refusal = self.gate.refusal() if self.gate else None
        if refusal and not isinstance(self.judge, FileJudge):  # who answers in a file is asked everything at once
            return Verdict(dossier.node, "unsure", 0.0, refusal)
        words = [token for token, _ in dossier.top_tokens]
        asked = [names for names in (self.attribute, self.label) if names]
        told = ask(self.judge, [words_question(words, names) for names in asked]).values.tolist()
        label, attribute = told[-1], told[0] if self.attribute else 1.0 - told[-1]
        score = attribute - label
        if refusal or np.isnan(score):
            return Verdict(dossier.node, "unsure", 0.0, refusal or "no readable reply")
        decision: Decision = "unsure"
        if max(attribute, label) >= MIN_YES and score:
            decision = "spurious" if score > 0 else "intended"
        shares = (f"{' or '.join(names)}: {number(share)}" for names, share in zip(asked, told, strict=True))
        untested = "" if self.gate else "; the judge is untested"
        return Verdict(dossier.node, decision, score, f"its tokens tell {'; '.join(shares)}{untested}")


_NEEDED: tuple[tuple[type[Decider] | type[AskedDecider], Need], ...] = (
    (StatisticsDecider, "twins"), (LexiconDecider, "words"), (OracleDecider, "balanced"),
)  # fmt: skip


def decider_of(judge: Decider | Judge | str | None, task: ShiftTask, seed: int = 0) -> Decider:
    """The decider itself or that of this name, a judge as one, or by default one that needs no more than the task has.

    Raises:
        UnknownNameError: if there is no decider of this name.
        MismatchError: if the decider needs what the task does not have.
    """
    missing = task.missing()
    if judge is None:
        return _default(missing)
    if isinstance(judge, str):
        judge = judge_named(judge)
    for kind, need in _NEEDED:
        if isinstance(judge, kind) and need in missing:
            raise MismatchError(f"shift: the {judge.name} judge can't decide, since {missing[need]}. Give another.")
    return AskedDecider.of(judge, task, seed) if isinstance(judge, Judge) else judge


def _default(missing: Mapping[str, str]) -> Decider:
    if "twins" not in missing:
        return StatisticsDecider()
    if "words" not in missing:
        return LexiconDecider()
    raise MismatchError(
        f"shift: {missing['twins']}, and {missing['words']}. Give the task one of these, or give a judge of your own."
    )


def words_question(words: Iterable[str], names: Sequence[str]) -> Question:
    """Asks whether words tell one of two or more names from the others."""
    which = "the two" if len(names) == 2 else "them"
    return Question(
        f"Somebody is either {' or '.join(names)}. Which of {which} is not known, but a text about them contains "
        f"these words:\n{', '.join(word.strip() for word in words)}\n\nDo the words as such tell which of {which} it "
        "is? Reply with the single digit 1 for yes or 0 for no.\nReply:"
    )


def words_gate(judge: Judge, task: ShiftTask, seed: int = 0) -> JudgeGate:
    """Tries a judge on words of the task's two lists, each with the question that fits and with the other one."""
    if not (task.spurious_words and task.target_words):
        raise MismatchError(
            f"words_gate: {NEEDS['words']}, so the judge {judge.name} can't be tried. Give both lists, "
            "or circuits.AskedDecider.of(judge, task, allow_untested=True) to take its word."
        )
    random, pairs = np.random.default_rng(seed), (task.spurious_names, task.label_names)
    lists = [sorted(task.spurious_words), sorted(task.target_words)]
    cases = [random.choice(words, min(WORDS_PER_CASE, len(words)), replace=False).tolist()
             for words in lists for _ in range(KNOWN_CASES)]  # fmt: skip
    questions = [words_question(words, pair) for words in cases for pair in pairs]
    answers = ask(judge, questions)
    values = answers.values.reshape(2, KNOWN_CASES, 2)  # list, case, question

    def tried(subject: str, right: np.ndarray, wrong: np.ndarray) -> Trial:
        def margin(read: np.ndarray) -> Estimate:
            return paired_difference(right[read], wrong[read], unit="known lists of words", seed=seed)

        return trial(subject, right, wrong, margin, needed_margin=MIN_MARGIN)

    trials = tried("attribute", values[0, :, 0], values[0, :, 1]), tried("label", values[1, :, 1], values[1, :, 0])
    return JudgeGate(judge.name, trials, answers.cost)
