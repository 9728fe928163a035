"""Two shortcuts at once: what a method loses without each, and whether it trades one for the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.numbers import counted, setting
from workbench.core.stats import Estimate, wilson

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 4000
"""Draws of an interval."""
SHARES = (0.95, 0.95)
"""How often each cue is there in training, whatever the label."""

JEFFREYS, PAIRED = "draws of the groups' accuracies (Jeffreys)", "draws of the groups' paired outcomes (Dirichlet)"

Pair = tuple[float, float]


@checked
@dataclass(frozen=True, kw_only=True)
class ShortcutScores(Shown):
    """What a method loses where cues are missing. A low in-distribution accuracy makes gaps small by itself.

    Attributes:
        groups: accuracy of each group of label and cues, by its name.
        in_distribution: mean of the groups with their shares in training as weights.
        gap_a: accuracy where cue A is missing and B is there, less the in-distribution accuracy.
        gap_b: the same where B is missing and A is there.
        gap_both: the same where both are missing.
    """

    groups: tuple[tuple[str, Estimate], ...]
    in_distribution: Estimate
    gap_a: Estimate
    gap_b: Estimate
    gap_both: Estimate

    def frame(self) -> pd.DataFrame:
        """One row per group: accuracy, the ends of its interval, rows."""
        import pandas as pd

        rows = [(name, e.value, e.low, e.high, e.n) for name, e in self.groups]
        return pd.DataFrame(rows, columns=["group", "accuracy", "low", "high", "n"])  # pyright: ignore[reportArgumentType]

    def _shown_facts(self) -> Mapping[str, object]:
        return {
            "accuracy in distribution": self.in_distribution, "gap without cue A": self.gap_a.change(),
            "gap without cue B": self.gap_b.change(), "gap without both": self.gap_both.change(),
        }  # fmt: skip

    def _shown_line(self) -> str:
        return (
            f"in distribution {self.in_distribution}; gap without A {self.gap_a.change()}, without B "
            f"{self.gap_b.change()}, without both {self.gap_both.change()}"
        )


@checked
@dataclass(frozen=True, kw_only=True)
class Trade(Shown):
    """How a method changes the sizes of the gaps of a baseline on the same rows; negative is smaller.

    Attributes:
        change_a: of the gap without cue A.
        change_b: of the gap without cue B.
        change_both: of the gap without both.
        change_in_distribution: of the accuracy in distribution.
    """

    change_a: Estimate
    change_b: Estimate
    change_both: Estimate
    change_in_distribution: Estimate

    @property
    def is_whac_a_mole(self) -> bool:
        """Whether one gap shrinks and the other grows, both beyond their intervals."""
        a, b = self.change_a, self.change_b
        return (a.high < 0 < b.low) or (b.high < 0 < a.low)

    def text(self) -> str:
        """The finding as a sentence."""
        if self.is_whac_a_mole:
            less, more = ("A", "B") if self.change_a.high < 0 else ("B", "A")
            found = f"relies less on cue {less} and more on cue {more}"
        else:
            words = {name: c.words("larger", "smaller", "not clearly different") for name, c in self._changes().items()}
            found = "; ".join(f"the gap without {name} is {word}" for name, word in words.items())
        lower = self.change_in_distribution.high < 0
        return found + ("; accuracy in distribution is lower, which makes gaps small by itself" if lower else "")

    def _changes(self) -> dict[str, Estimate]:
        return {"A": self.change_a, "B": self.change_b, "both": self.change_both}

    def _shown_facts(self) -> Mapping[str, object]:
        changes = {f"size of the gap without {name}": c.change() for name, c in self._changes().items()}
        return {"finding": self.text(), **changes, "accuracy in distribution": self.change_in_distribution.change()}

    def _shown_line(self) -> str:
        return f"{self.text()}; A {self.change_a.change()}, B {self.change_b.change()}"


@checked
def in_distribution_weights(
    shares: Pair = SHARES, label_shares: tuple[float, ...] = (0.5, 0.5)
) -> Float[np.ndarray, "labels 2 2"]:
    """Share in training of each label with cue A missing or there and cue B missing or there; they sum to 1.

    >>> in_distribution_weights()[0].round(5).tolist()  # 0.5 * 0.05 * 0.05, 0.5 * 0.05 * 0.95, ...
    [[0.00125, 0.02375], [0.02375, 0.45125]]
    """
    if not all(0 < share < 1 for share in shares) or abs(sum(label_shares) - 1) > 1e-9 or min(label_shares) < 0:
        raise InvalidInputError(
            f"in_distribution_weights(shares=({setting(shares[0])}, {setting(shares[1])}), label_shares of sum "
            f"{setting(sum(label_shares))}): give shares of the cues between 0 and 1, and shares of the labels that "
            "sum to 1."
        )
    a, b = (np.array([1 - share, share]) for share in shares)
    return np.array(label_shares)[:, None, None] * a[None, :, None] * b[None, None, :]


@checked
def shortcut_scores(
    hits: Bool[np.ndarray, " hits"],
    label: Int[np.ndarray, " labels"],
    has_a: Bool[np.ndarray, " a"],
    has_b: Bool[np.ndarray, " b"],
    *,
    shares: Pair = SHARES,
    unit: str = "texts",
    seed: int = 0,
) -> ShortcutScores:
    """Accuracy by group and the gaps of a method; labels are taken as equally frequent in training.

    Args:
        hits: whether each row is predicted rightly.
        label: its label.
        has_a: whether cue A of its label is there.
        has_b: whether cue B of its label is there.
        shares: how often each cue is there in training.
        unit: what the rows are.
        seed: of the intervals.

    Raises:
        ShapeError: if they do not pair up.
        DegenerateInputError: if one of the groups has no rows.

    Source: Li et al. 2023 (arXiv 2212.04825), "A Whac-A-Mole dilemma", section 3.
    """
    cells = _cells(label, has_a, has_b, hits)
    n, right = cells.sum(axis=-1), cells[..., 1]
    names = (
        f"label {y}, {'with' if a else 'without'} A, {'with' if b else 'without'} B" for y, a, b in np.ndindex(*n.shape)
    )
    groups = tuple(
        (name, wilson(int(k), int(m), unit=unit)) for name, k, m in zip(names, right.flat, n.flat, strict=True)
    )
    draws = np.random.default_rng(seed).beta(right + 0.5, n - right + 0.5, size=(DRAWS, *n.shape))
    point, spread = _scores(right / n, shares), _scores(draws, shares)
    estimates = {name: _estimate(point[name], spread[name], int(n.sum()), unit, JEFFREYS) for name in point}
    return ShortcutScores(groups=groups, **estimates)


@checked
def traded(
    hits: Bool[np.ndarray, " hits"],
    baseline_hits: Bool[np.ndarray, " baseline"],
    label: Int[np.ndarray, " labels"],
    has_a: Bool[np.ndarray, " a"],
    has_b: Bool[np.ndarray, " b"],
    *,
    shares: Pair = SHARES,
    unit: str = "texts",
    seed: int = 0,
) -> Trade:
    """How a method changes the gaps of a baseline, such as ERM, over the same rows; intervals keep the rows paired.

    Args:
        hits: whether the method predicts each row rightly.
        baseline_hits: whether the baseline does.
        label: label of each row.
        has_a: whether cue A of its label is there.
        has_b: whether cue B of its label is there.
        shares: how often each cue is there in training.
        unit: what the rows are.
        seed: of the intervals.

    Raises:
        ShapeError: if they do not pair up.
        DegenerateInputError: if one of the groups has no rows.
    """
    cells = _cells(label, has_a, has_b, hits, baseline_hits)
    n = cells.sum(axis=-1, keepdims=True)
    random = np.random.default_rng(seed)
    gammas = random.gamma(cells + 0.25, size=(DRAWS, *cells.shape))
    draws = gammas / gammas.sum(axis=-1, keepdims=True)
    changes = []
    for joint in (cells / n, draws):
        # cell 2 * method + baseline of the rows of a group
        method, baseline = (_scores(joint[..., one] + joint[..., 3], shares) for one in (2, 1))
        change = {name: np.abs(method[name]) - np.abs(baseline[name]) for name in ("gap_a", "gap_b", "gap_both")}
        changes.append({**change, "in_distribution": method["in_distribution"] - baseline["in_distribution"]})
    point, spread = changes
    total = int(n.sum())
    return Trade(
        change_a=_estimate(point["gap_a"], spread["gap_a"], total, unit, PAIRED),
        change_b=_estimate(point["gap_b"], spread["gap_b"], total, unit, PAIRED),
        change_both=_estimate(point["gap_both"], spread["gap_both"], total, unit, PAIRED),
        change_in_distribution=_estimate(point["in_distribution"], spread["in_distribution"], total, unit, PAIRED),
    )


def _scores(accuracy: Float[np.ndarray, "*draws labels 2 2"], shares: Pair) -> dict[str, np.ndarray]:
    """In-distribution accuracy and the three gaps, labels being equally frequent."""
    labels = accuracy.shape[-3]
    weights = in_distribution_weights(shares, (1 / labels,) * labels)
    inside, by_cues = (accuracy * weights).sum(axis=(-1, -2, -3)), accuracy.mean(axis=-3)
    gaps = {"gap_a": by_cues[..., 0, 1], "gap_b": by_cues[..., 1, 0], "gap_both": by_cues[..., 0, 0]}
    return {"in_distribution": np.asarray(inside)} | {name: np.asarray(one - inside) for name, one in gaps.items()}


def _estimate(point: np.ndarray | np.float64, draws: np.ndarray, n: int, unit: str, method: str) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    value = float(point) + 0.0
    return Estimate(value, min(float(low), value), max(float(high), value), n, method, unit)


def _cells(
    label: np.ndarray, has_a: np.ndarray, has_b: np.ndarray, *outcomes: np.ndarray
) -> Int[np.ndarray, "labels 2 2 outcomes"]:
    """Rows by label, cue A, cue B and the joint outcome, the first being the highest digit."""
    sizes = {len(values) for values in (label, has_a, has_b, *outcomes)}
    if len(sizes) > 1:
        raise ShapeError(f"Shortcuts: {sorted(sizes)} hits, labels and cues; they must pair up.")
    if not len(label) or label.min() < 0:
        raise DegenerateInputError(
            f"Shortcuts: {counted(len(label), 'rows')}; give labels from 0, and one row at least."
        )
    code = (label * 2 + has_a) * 2 + has_b
    for outcome in outcomes:
        code = code * 2 + outcome
    labels, kinds = int(label.max()) + 1, 2 ** len(outcomes)
    cells = np.bincount(code, minlength=labels * 4 * kinds).reshape(labels, 2, 2, kinds)
    if not (cells.sum(axis=-1) > 0).all():
        y, a, b = np.argwhere(cells.sum(axis=-1) == 0)[0]
        raise DegenerateInputError(
            f"Shortcuts: no row of label {y} {'with' if a else 'without'} cue A and {'with' if b else 'without'} cue "
            f"B. Give rows of all {labels * 4} groups."
        )
    return cells
