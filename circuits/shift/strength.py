"""How strongly attribute and label go together in training, and how rows are split."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import setting

_FINEST = 1_000
"""The largest denominator of a strength: .999 is as fine as it gets."""


def as_fraction(rho: float) -> Fraction:
    """A strength as the fraction that somebody meant by it.

    Raises:
        InvalidInputError: if it is not between 0.5 and 1.

    >>> as_fraction(0.95)
    Fraction(19, 20)
    """
    if not 0.5 <= rho <= 1:
        raise InvalidInputError(f"rho={setting(rho)}: give the share in which attribute and label agree, 0.5 to 1.")
    return Fraction(rho).limit_denominator(_FINEST)


@checked
@dataclass(frozen=True, kw_only=True)
class SplitOptions(OneLine):
    """How the rows of a table become training and test texts.

    Attributes:
        test_share: share of each group that is held out where the table names no splits.
        rho: share of training rows in which attribute and label agree; rows are left out to reach it exactly. 1.0
            makes the training set ambiguous; None takes all rows.
        balance_test: whether test rows are left out until all groups are equally large.
        leaks: where a text, its duplicate or its twin is in two splits of the table: refuse the table, or leave out the
            test rows.
        seed: decides which rows.
    """

    test_share: float = 0.3
    rho: float | None = None
    balance_test: bool = True
    leaks: Literal["refuse", "leave out"] = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise InvalidInputError(f"SplitOptions(test_share={setting(self.test_share)}): needs more than 0, below 1.")
        if self.rho is not None:
            as_fraction(self.rho)
