"""Whac-A-Mole: how far each method of a study relies on each of several cues, and whether it trades one for another.

Source: Li et al. 2023 (arXiv 2212.04825). Departures: reliance is measured for each cue by itself, and the gaps are of
cues that agree or conflict with the label, since a cue of `circuits.with_cues` has a value in every text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from circuits.shift.resamples import Counts, estimate, resampled, share
from circuits.shift.shortcuts import ShortcutScores, Trade, shortcut_scores, traded
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import counted
from workbench.core.stats import Estimate
from workbench.report.base import Table

if TYPE_CHECKING:
    import pandas as pd

START = "original"
"""The method that others are compared with."""

Drawn = Int[np.ndarray, "draws rows"]


@dataclass(frozen=True, kw_only=True)
class CueReliance(OneLine):
    """How far one method relies on one cue, over test rows.

    Attributes:
        method: the method.
        cue: name of the cue.
        mcc: Matthews correlation of cue and prediction: 1 follows the cue, 0 ignores it, -1 is its opposite.
        drop: accuracy where the cue agrees with the label, less that where it conflicts.
        change: of the size of `mcc` against the original probe on the same rows; negative relies less. None for that
            probe itself.
        drop_change: of the size of `drop`.
    """

    method: str
    cue: str
    mcc: Estimate
    drop: Estimate
    change: Estimate | None = None
    drop_change: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class CueGaps(OneLine):
    """Accuracies of a method where the first, the second or both of two cues conflict with the label.

    Attributes:
        method: the method.
        scores: accuracy with the cues as in training, and the gaps to it.
        trade: changes of the gaps against the original probe; None for that probe itself.
    """

    method: str
    scores: ShortcutScores
    trade: Trade | None


@dataclass(frozen=True, kw_only=True)
class CuePanel(OneLine):
    """Reliance on each cue, before and after each method.

    Attributes:
        cues: names of the cues.
        rows: one per method and cue.
        gaps: one per method, where there are two cues that training does not make certain; methods of several draws
            are left out.
    """

    cues: tuple[str, ...]
    rows: tuple[CueReliance, ...]
    gaps: tuple[CueGaps, ...] = ()

    def of(self, method: str, cue: str) -> CueReliance:
        """The row of a method and a cue."""
        return next(row for row in self.rows if (row.method, row.cue) == (method, cue))

    def frame(self) -> pd.DataFrame:
        """One row per method and cue: correlation, drop of accuracy and their changes, each with its interval."""
        import pandas as pd

        columns = ("mcc", "drop", "change", "drop_change")
        return pd.DataFrame(
            {"method": row.method, "cue": row.cue}
            | {
                f"{name}{end}": None if (e := getattr(row, name)) is None else getattr(e, end[1:] or "value")
                for name in columns for end in ("", "_low", "_high")
            }
            for row in self.rows
        )  # fmt: skip

    def trades(self) -> tuple[str, ...]:
        """Methods that rely clearly less on one cue and clearly more on another."""
        return tuple(
            method
            for method in dict.fromkeys(row.method for row in self.rows)
            if {"less", "more"} <= {_said(row.change) for row in self.rows if row.method == method}
        )

    def findings(self) -> tuple[str, ...]:
        """What the original probe relies on, and which methods trade one cue for another."""
        relied = "; ".join(f"{cue} {self.of(START, cue).mcc}" for cue in self.cues)
        first = f"Reliance of the original probe on each cue, as the correlation of cue and prediction: {relied}."
        if len(self.cues) < 2:
            return (first,)
        methods, trading = len(self.rows) // len(self.cues) - 1, self.trades()
        if not trading:
            return (
                first,
                f"None of {counted(methods, 'methods')} relies clearly less on one cue and more on another; each "
                "interval stands for itself.",
            )
        return (first, *(f"{method} {self._traded(method)}." for method in trading))

    def _traded(self, method: str) -> str:
        said = []
        for word, verb in (("less", "relies less on"), ("more", "and more on")):
            rows = [row for row in self.rows if row.method == method and _said(row.change) == word]
            changes = (f"{row.cue} ({row.change.change()})" for row in rows if row.change is not None)
            said.append(f"{verb} {first_few(changes)}")
        return " ".join(said)

    def tables(self) -> tuple[Table, ...]:
        """Reliance per cue, and the gaps where there are two cues."""
        rows = Table.of(
            self.rows,
            {
                "method": "method", "cue": "cue", "correlation with the prediction": "mcc", "change": "change",
                "drop of accuracy": "drop", "change of the drop": "drop_change",
            },
            "Whac-A-Mole: reliance on each cue. The drop is accuracy where the cue agrees with the label, less that "
            "where it conflicts. Changes are of sizes, against the original probe on the same texts; negative relies "
            "less. Intervals are not corrected for the number of methods.",
        )  # fmt: skip
        if not self.gaps:
            return (rows,)
        a, b = self.cues
        gaps = Table.of(
            self.gaps,
            {
                "method": "method", "accuracy as in training": lambda gap: gap.scores.in_distribution,
                f"where {a} conflicts": lambda gap: gap.scores.gap_a,
                f"where {b} conflicts": lambda gap: gap.scores.gap_b,
                "where both conflict": lambda gap: gap.scores.gap_both,
                "against the original probe": lambda gap: _named(gap.trade, a, b),
            },
            "Gaps: accuracy where cues conflict with the label, less the accuracy with cues as often as in training.",
        )  # fmt: skip
        return rows, gaps


def cue_panel(task: ShiftTask, predictions: Mapping[str, Drawn], seed: int = 0) -> CuePanel | None:
    """Reliance of each method on each cue of the test texts; None if they have none or there is no `START`.

    Args:
        task: its test texts name the cues.
        predictions: labels that each method predicts for these texts, several draws of a random one.
        seed: of the bootstrap over rows, which are the same for all methods.
    """
    test = task.test
    if not test.cues or START not in predictions or len(task.label_names) != 2:
        return None
    draws = resampled(len(test), seed)
    label = np.array(test.label)
    measured = {
        method: {cue: _measured(draws, np.array(values), label, drawn) for cue, values in test.cues}
        for method, drawn in predictions.items()
    }
    n = len(test)
    rows = [
        CueReliance(
            method=method, cue=cue, mcc=estimate(mcc, n), drop=estimate(drop, n),
            change=None if method == START else estimate(_size(mcc) - _size(measured[START][cue][0]), n, 2.0),
            drop_change=None if method == START else estimate(_size(drop) - _size(measured[START][cue][1]), n, 2.0),
        )
        for method, by_cue in measured.items() for cue, (mcc, drop) in by_cue.items()
    ]  # fmt: skip
    return CuePanel(cues=tuple(name for name, _ in test.cues), rows=tuple(rows), gaps=_gaps(task, predictions, seed))


def _measured(counts: Counts, cue: np.ndarray, label: np.ndarray, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Correlation and drop of each resample, the first being that of the rows as they are; means over draws."""
    predicted, hits = drawn.astype(float), (drawn == label).mean(axis=0)
    n, ones, of_cue = len(label), counts @ predicted.T, (counts @ cue)[:, None]
    top = n * (counts @ (predicted * cue).T) - ones * of_cue
    bottom = np.sqrt(ones * (n - ones) * of_cue * (n - of_cue))
    mcc = np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0).mean(axis=1)
    agrees = (cue == label).astype(float)
    return mcc, share(counts, hits, agrees) - share(counts, hits, 1 - agrees)


def _size(values: np.ndarray) -> np.ndarray:
    """With the sign turned where it is clearly negative; sizes of each resample would push small ones away from 0."""
    return values * (-1.0 if np.quantile(values[1:], 0.975) < 0 else 1.0)


def _said(change: Estimate | None) -> str:
    return "" if change is None else change.words("more", "less", "")


def _gaps(task: ShiftTask, predictions: Mapping[str, Drawn], seed: int) -> tuple[CueGaps, ...]:
    """Gaps of two cues; none where another number is there, training makes one certain, or a group is empty."""
    test, shares = task.test, tuple(_agreement(task.train, name) for name, _ in task.train.cues)
    if len(test.cues) != 2 or len(shares) != 2 or not all(0 < share < 1 for share in shares):
        return ()
    label = np.array(test.label)
    has_a, has_b = (np.array(values) == label for _, values in test.cues)
    hits = {method: drawn[0] == label for method, drawn in predictions.items() if len(drawn) == 1}
    try:
        return tuple(
            CueGaps(
                method=method, scores=shortcut_scores(hit, label, has_a, has_b, shares=shares, seed=seed),
                trade=None
                if method == START
                else traded(hit, hits[START], label, has_a, has_b, shares=shares, seed=seed),
            )
            for method, hit in hits.items()
        )  # fmt: skip
    except DegenerateInputError:  # a group without rows
        return ()


def _agreement(rows: LabelledTexts, cue: str) -> float:
    values = dict(rows.cues)[cue]
    return sum(a == b for a, b in zip(values, rows.label, strict=True)) / len(rows)


def _named(trade: Trade | None, a: str, b: str) -> str:
    """The finding with the names of the cues."""
    if trade is None:
        return ""
    if trade.is_whac_a_mole:
        less, more = (a, b) if trade.change_a.high < 0 else (b, a)
        return f"relies less on {less} and more on {more}"
    words = {a: trade.change_a, b: trade.change_b}
    return "; ".join(
        f"{name}: {change.words('larger', 'smaller', 'not clearly different')}" for name, change in words.items()
    )
