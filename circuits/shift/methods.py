"""Scores of several methods over the same balanced test rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from circuits.shift.shift_report import Comparison, MethodRow, OverDraws
from circuits.shift.task import ShiftTask
from workbench.core.stats import Estimate, paired_difference, sample_mean, wilson


class Scorer:
    """Collects predictions per method and turns them into accuracies with intervals.

    Attributes:
        rows: one per method, in order.
    """

    def __init__(self, task: ShiftTask) -> None:
        self._task = task
        self._label, self._spurious = np.array(task.test.label), np.array(task.test.spurious)
        self._hits: dict[str, np.ndarray] = {}
        self._by_draw: dict[str, np.ndarray] = {}
        self.rows: list[MethodRow] = []

    def add(
        self,
        name: str,
        information: str,
        n_features: int,
        predictions: Sequence[Int[Tensor, " rows"]],
        *,
        is_random: bool = False,
    ) -> None:
        """One method. Predictions of a random one are draws: averaged per row, and per draw for another interval."""
        drawn = np.stack([np.asarray(p.cpu()) for p in predictions])
        every_hit, every_agreement = drawn == self._label, drawn == self._spurious
        hits, agrees = every_hit.mean(axis=0), every_agreement.mean(axis=0)
        self._hits[name] = hits
        groups = {
            self._task.group_name(a, b): (self._label == a) & (self._spurious == b) for a in (0, 1) for b in (0, 1)
        }
        worst = min(groups, key=lambda group: float(hits[groups[group]].mean()))
        over_draws = None
        if is_random:
            self._by_draw[name] = every_hit.mean(axis=1)
            over_draws = OverDraws(
                label=sample_mean(self._by_draw[name], unit="draws"),
                spurious=sample_mean(every_agreement.mean(axis=1), unit="draws"),
                worst=sample_mean(every_hit[:, groups[worst]].mean(axis=1), unit="draws"),
            )
        self.rows.append(
            MethodRow(
                name,
                information,
                n_features,
                accuracy(hits),
                accuracy(agrees),
                accuracy(hits[groups[worst]]),
                worst,
                over_draws,
            )  # fmt: skip
        )

    def compare(self, better: str, other: str) -> Comparison:
        """Paired difference in label accuracy, over all rows, over those that break the correlation, and over draws."""
        conflict = self._label != self._ambiguous_label()
        a, b = self._hits[better], self._hits[other]
        return Comparison(
            better,
            other,
            paired_difference(a, b, unit="texts"),
            paired_difference(a[conflict], b[conflict], unit="texts"),
            sample_mean(a.mean() - self._by_draw[other], unit="draws") if other in self._by_draw else None,
        )

    def _ambiguous_label(self) -> np.ndarray:
        """The label that went with each test row's attribute in training."""
        train = self._task.train
        label, spurious = np.array(train.label), np.array(train.spurious)
        goes_with = [
            int(round(float(label[spurious == value].mean()))) if (spurious == value).any() else value
            for value in (0, 1)
        ]
        return np.array(goes_with)[self._spurious]


def accuracy(hits: np.ndarray) -> Estimate:
    """Share of hits: Wilson for single draws, `sample_mean` for averages of several.

    >>> accuracy(np.array([1.0, 0.0])).value, accuracy(np.array([0.5, 0.5])).method
    (0.5, "Student's t")
    """
    if np.isin(hits, (0.0, 1.0)).all():
        return wilson(int(hits.sum()), len(hits), unit="texts")
    return sample_mean(hits, unit="texts")
