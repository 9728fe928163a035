"""What a judge is asked and what it answers: a number on a scale, with who gave it and at what cost."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted, number
from workbench.core.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

MAX_FAILED_SHARE = 0.1
"""Share of unreadable answers beyond which there is no score."""
MAX_HIGHEST = 9
"""Answers are single digits."""


@checked
@dataclass(frozen=True)
class Question(OneLine):
    """A question that one whole number answers.

    Attributes:
        text: the whole prompt, scale included; ends with the words that the number follows.
        highest: answers run from 0 to this number; with 1 they mean no and yes.
        reasons: whether the judge may write reasons before the number.

    Raises:
        InvalidInputError: for a scale that does not consist of digits.

    >>> Question("Is it a pet?").read("**1**"), Question("How good?", 2, reasons=True).read("Fine. Rating: 2")
    (1.0, 2.0)
    """

    text: str
    highest: int = 1
    reasons: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.highest <= MAX_HIGHEST:
            raise InvalidInputError(
                f"Question(highest={self.highest}): answers are single digits. Choose 1 for yes or no, or a scale up "
                f"to {MAX_HIGHEST}."
            )

    @property
    def id(self) -> str:
        """Identifies the text in files: the start of its SHA-256."""
        return hashlib.sha256(self.text.encode("utf-8", errors="backslashreplace")).hexdigest()[:16]

    def read(self, reply: str) -> float | None:
        """The number in a written reply; None if there is none on the scale."""
        return parse_rating(reply, self.highest) if self.reasons else parse_reply(reply, self.highest)


@dataclass(frozen=True)
class Cost(OneLine):
    """What a set of answers took.

    Attributes:
        answers: how many there are.
        kept: how many of them come from an earlier run, and cost nothing now.
        tokens: read and written for the others, where the judge counts them.
        seconds: time that the others took.

    >>> str(Cost(3, 1, 120, 2.0) + Cost(1))
    '4 answers, 1 of them kept from earlier; 120 tokens, 2.0 s'
    """

    answers: int = 0
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.answers + other.answers,
            self.kept + other.kept,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        kept = f", {number(self.kept)} of them kept from earlier" if self.kept else ""
        return (
            f"{counted(self.answers, 'answers')}{kept}; {counted(self.tokens, 'tokens')}, {number(self.seconds, 1)} s"
        )


@dataclass(frozen=True, kw_only=True)
class Answer(OneLine):
    """One judge's answer to one question.

    Attributes:
        value: from 0 to the question's highest, graded where the judge gives probabilities; None without a readable
            reply.
        judge: who answered.
        reply: what was written; "" where probabilities were read alone.
        tokens: read and written for it; 0 where the judge does not count them.
        seconds: time it took.
        kept: whether an earlier run had asked the same.
    """

    value: float | None
    judge: str
    reply: str = ""
    tokens: int = 0
    seconds: float = 0.0
    kept: bool = False

    @property
    def cost(self) -> Cost:
        """What this answer took now."""
        return Cost(1, 1) if self.kept else Cost(1, 0, self.tokens, self.seconds)


@runtime_checkable
class Judge(Protocol):
    """Someone who answers questions with numbers: a model, a server, a file, a person."""

    @property
    def name(self) -> str:
        """Who judges; shown with the scores."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order."""
        ...


JUDGES: Registry[type[Judge]] = Registry("judge", package="workbench.judges")
"""Every kind of judge by its short name."""


@dataclass(frozen=True, eq=False)
class Answers(Shown):
    """Checked answers to a list of questions.

    Attributes:
        values: one per question; nan without a readable reply.
        cost: of all.
    """

    values: Float[np.ndarray, " questions"]
    cost: Cost = field(default_factory=Cost)

    def frame(self) -> pd.DataFrame:
        """One row per question: the number that was answered."""
        import pandas as pd

        return pd.DataFrame({"value": self.values})


@checked
def ask(judge: Judge, questions: Sequence[Question]) -> Answers:
    """Asks a judge, and checks that each question got one answer on its scale.

    Raises:
        InvalidInputError: if answers are missing or off the scale.
    """
    answers = judge.ask(questions) if questions else []
    if len(answers) != len(questions):
        raise InvalidInputError(
            f"{judge.name} gave {len(answers)} answers to {len(questions)} questions. A judge returns one Answer per "
            "question, with the value None where there is none."
        )
    for question, answer in zip(questions, answers, strict=True):
        if answer.value is not None and not 0 <= answer.value <= question.highest:
            raise InvalidInputError(
                f"{judge.name} answered {answer.value}, and the scale goes from 0 to {question.highest}. Give None "
                "where there is no number on the scale."
            )
    values = np.array([math.nan if answer.value is None else answer.value for answer in answers], dtype=float)
    return Answers(values, sum((answer.cost for answer in answers), Cost()))


@checked
def parse_reply(reply: str, highest: int = 1) -> float | None:
    """The digit that a reply begins with, alone, bold or after "Answer:"; None if it names another one too.

    >>> parse_reply(" 1."), parse_reply("**0**"), parse_reply("Answer: 1"), parse_reply("2", highest=4)
    (1.0, 0.0, 1.0, 2.0)
    >>> parse_reply("10"), parse_reply("0.9"), parse_reply("1 or 0?"), parse_reply("Sure! 1"), parse_reply("2")
    (None, None, None, None, None)
    """
    first = re.match(rf"\W*(?:(?:answer|reply)\W+)?([0-{highest}])(?!\w|[.,]\d)", reply, re.IGNORECASE)
    if first is None or set(re.findall(rf"(?<!\w)([0-{highest}])(?!\w)", reply)) != {first[1]}:
        return None
    return float(first[1])


_RATINGS = (
    re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"),
    re.compile(r"\brating\s*(?:\([^)]*\))?\W*?(-?\d+(?:\.\d+)?)", re.IGNORECASE),
    re.compile(r"\A\W*?(-?\d+(?:\.\d+)?)\W*(?:\n|\Z)"),
)
"""A rating in double brackets, behind its name, or alone in the first line."""


@checked
def parse_rating(reply: str, highest: int = 2) -> float | None:
    r"""The last rating in a judge's reply: in double brackets, else behind "rating", else a first line of its own.

    None if there is none from 0 to `highest`. AxBench counts None as 0; whether to do so is left to the caller, who
    should report how many there were.

    >>> parse_rating("Rating (0-2): [[1]]")
    1.0
    >>> parse_rating("Rating: [[2]]."), parse_rating("Rating: **1**"), parse_rating("Rating: 3"), parse_rating("good")
    (2.0, 1.0, None, None)
    >>> parse_rating("2 sentences mention it: [[1]]"), parse_rating(" 2\n"), parse_rating("2 pets")
    (1.0, 2.0, None)
    """
    numbers = next((numbers for pattern in _RATINGS if (numbers := pattern.findall(reply))), None)
    if numbers is None:
        return None
    rating = float(numbers[-1])
    return rating if 0 <= rating <= highest else None
