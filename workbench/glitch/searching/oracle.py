"""What every search asks, and what asking cost it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import Estimate, clopper_pearson

Oracle = Callable[[np.ndarray], np.ndarray]
"""Token ids to booleans: is this a glitch token? The labels of a census, or a test of the model."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one search asked, each id once and in order; gradient passes come on top, counted in prompts."""

    method: str
    asked: np.ndarray
    glitch: np.ndarray
    gradient_passes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """Tokens tested."""
        return len(self.asked)

    @property
    def n_found(self) -> int:
        """Glitch tokens found."""
        return int(self.glitch.sum())

    @property
    def precision(self) -> Estimate:
        """Share of the tested tokens that are glitch tokens, with the Clopper-Pearson interval.

        The list that a search returns holds tested tokens only; what it says is always right by the oracle.
        """
        return clopper_pearson(self.n_found, self.calls, unit="tested tokens")

    def first(self, calls: int) -> Found:
        """The same search stopped after so many calls."""
        return Found(self.method, self.asked[:calls], self.glitch[:calls], self.gradient_passes, self.notes)

    def recall(self, n_glitch: int) -> Estimate:
        """Share of all glitch tokens that were found, with the Clopper-Pearson interval."""
        return clopper_pearson(self.n_found, n_glitch, unit="glitch tokens")


class Asker:
    """Asks an oracle, never twice for the same token, and counts."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._known: dict[int, bool] = {}

    def __call__(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The label of each id."""
        new = np.array([i for i in dict.fromkeys(np.asarray(ids).tolist()) if i not in self._known], dtype=np.int64)
        if len(new):
            labels = np.asarray(self._oracle(new), dtype=bool)
            if labels.shape != new.shape:
                raise InvalidInputError(
                    f"The oracle was asked for {len(new)} tokens and gave {labels.shape}. Give one boolean each."
                )
            self._known.update(zip(new.tolist(), labels.tolist(), strict=True))
        return np.array([self._known[i] for i in np.asarray(ids).tolist()], dtype=bool)

    def knows(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id has been asked."""
        return np.array([i in self._known for i in ids.tolist()], dtype=bool)

    def found(self, method: str, gradient_passes: int = 0, notes: Sequence[str] = ()) -> Found:
        """Everything asked so far."""
        asked = np.array(list(self._known), dtype=np.int64)
        glitch = np.array(list(self._known.values()), dtype=bool)
        return Found(method, asked, glitch, gradient_passes, tuple(notes))


def in_order(oracle: Oracle, method: str, ids: np.ndarray, budget: int) -> Found:
    """The simplest search: the first tokens of a list, be it a ranking or a random order.

    >>> found = in_order(lambda ids: ids % 2 == 0, "even", np.array([1, 2, 3, 4]), budget=2)
    >>> found.calls, found.n_found
    (2, 1)
    """
    if budget < 1 or not len(ids):
        raise DegenerateInputError(f"{method}: budget={budget} of {len(ids)} tokens leaves nothing to test.")
    asker = Asker(oracle)
    asker(ids[:budget])
    return asker.found(method)
