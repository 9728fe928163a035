"""Judges that look at the whole training set before they judge a feature."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from circuits.shift.deciders import Decider
from circuits.shift.task import ShiftStudy


@runtime_checkable
class StudyReader(Protocol):
    """A judge that first looks at all training texts, such as for environments among them."""

    def of_study(self, study: ShiftStudy) -> Decider:
        """The judge of the features of this study; it must not look at test texts or balanced labels."""
        ...


def prepared(decider: Decider, study: ShiftStudy) -> Decider:
    """The decider for this study."""
    return decider.of_study(study) if isinstance(decider, StudyReader) else decider
