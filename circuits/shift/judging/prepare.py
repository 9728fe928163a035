"""Judges that look at the whole training set before they judge a feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from circuits.shift.deciders import Decider, Node
from circuits.shift.heads.base import REGIMES, Regime
from circuits.shift.multiclass import SoftmaxProbe
from circuits.shift.task import ShiftStudy
from workbench.core.errors import MismatchError
from workbench.probes.linear import Probe

Candidate = tuple[Node, float]
"""A feature with its effect."""


@runtime_checkable
class StudyReader(Protocol):
    """A judge that first looks at all training texts, such as for environments among them."""

    def of_study(self, study: ShiftStudy, candidates: Sequence[Candidate]) -> Decider:
        """The judge of these features of a study; it must not look at test texts or balanced labels."""
        ...


def prepared(decider: Decider, study: ShiftStudy, candidates: Sequence[Candidate]) -> Decider:
    """The decider for this study."""
    return decider.of_study(study, candidates) if isinstance(decider, StudyReader) else decider


def regime_of(decider: Decider) -> Regime:
    """What features are chosen from: what the decider says of itself, else nothing that others do not have."""
    declared = getattr(decider, "regime", "R1" if decider.is_oracle else "R0")
    for regime in REGIMES:
        if regime == declared:
            return regime
    return "R0"


def of_two_labels(study: ShiftStudy, what: str) -> Probe:
    """The probe of two labels.

    Raises:
        MismatchError: if the study has more.
    """
    if isinstance(study.probe, SoftmaxProbe):
        raise MismatchError(
            f"{what} works on two labels, and the task has {len(study.task.label_names)}. Give "
            "ShiftOptions(positive=...) the one that is told from all others."
        )
    return study.probe
