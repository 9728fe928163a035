"""Judges by a name, as a command takes them."""

from __future__ import annotations

from circuits.shift.deciders import DECIDERS, Decider
from circuits.shift.judging.annotated import AnnotatedDecider
from workbench.core.arguments import checked
from workbench.core.errors import UnknownNameError, did_you_mean
from workbench.judges.files import FileJudge
from workbench.judges.protocol import Judge

FILES = "annotations"
"""`annotations:FILE,FILE` are verdicts that stand in files."""
QUESTIONS = "questions"
"""`questions:FOLDER` writes questions to a file, and reads replies."""


@checked
def judge_named(name: str) -> Decider | Judge:
    """The judge of a name: one of `DECIDERS`, "annotations:FILE,FILE", or "questions:FOLDER".

    Raises:
        UnknownNameError: if there is none.
    """
    kind, _, rest = name.partition(":")
    if kind == FILES and rest:
        return AnnotatedDecider.of(*rest.split(","))
    if kind == QUESTIONS and rest:
        return FileJudge(rest)
    if name not in DECIDERS:
        raise UnknownNameError(
            f"There is no judge of features {name!r}. {did_you_mean(name, DECIDERS)} There are also "
            f"{FILES}:FILE,FILE (verdicts of one person or more) and {QUESTIONS}:FOLDER (questions are written there, "
            "replies are read)."
        )
    return DECIDERS[name]()
