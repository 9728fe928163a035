"""Agreement of scores, and intervals over inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from workbench.core.stats import ANY, Estimate, sample_mean

Row = Float[np.ndarray, " items"]


def spearman(a: Row, b: Row) -> float:
    """Rank correlation, with mean ranks of ties; 0 where one of both is constant and ranks nothing.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0])), spearman(np.ones(3), np.arange(3.0))
    (1.0, 0.0)
    """
    from scipy.stats import rankdata

    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return round(float(x @ y) / size, 12) if size > 0 else 0.0


def row_correlations(a: Float[np.ndarray, "inputs items"], b: Float[np.ndarray, "inputs items"]) -> np.ndarray:
    """Rank correlation of each input's scores over the items that one of both scores; 1 where neither scores any.

    >>> row_correlations(np.array([[1.0, 2.0, 0.0, 0.0]]), np.array([[2.0, 1.0, 0.0, 0.0]])).tolist()
    [-1.0]
    >>> row_correlations(np.array([[1.0, 2.0, 0.0]]), np.array([[0.0, 0.0, 1.0]])).round(3).tolist()
    [-0.866]
    """
    found = []
    for x, y in zip(a, b, strict=True):
        scored = (x != 0) | (y != 0)  # items that are inactive in an input would agree for nothing
        found.append(spearman(x[scored], y[scored]) if scored.any() else 1.0)
    return np.array(found)


def sign_agreement(scores: Row, effects: Row) -> float:
    """Share of items whose score has the sign of the measured effect; items without effect are left out, 1 if none.

    >>> sign_agreement(np.array([1.0, -1.0, 1.0]), np.array([2.0, 1.0, 0.0]))
    0.5
    """
    real = np.abs(effects) > 1e-6 * max(float(np.abs(effects).max()), 1e-30)
    return float((np.sign(scores[real]) == np.sign(effects[real])).mean()) if real.any() else 1.0


def precision_at(scores: Row, effects: Row, k: int) -> float:
    """Share of the k largest scores, by absolute value, that are among the k largest effects.

    >>> precision_at(np.array([3.0, -2.0, 1.0]), np.array([0.1, -5.0, 4.0]), 2)
    0.5
    """
    best = [set(np.argsort(-np.abs(v), kind="stable")[:k].tolist()) for v in (scores, effects)]
    return len(best[0] & best[1]) / k


def mean_of(values: np.ndarray, unit: str = "inputs", within: tuple[float, float] = ANY) -> Estimate | float:
    """Mean over inputs with its interval; of a single input its value, which has none."""
    if len(values) == 1:
        return float(values[0])
    # A t interval of values that are all alike has no width, also where they are at an end of their range.
    if float(np.ptp(values)) == 0.0:
        return Estimate(float(values[0]), float(values[0]), float(values[0]), len(values), "all alike", unit)
    return sample_mean(values, unit=unit, within=within)


def median_of(values: np.ndarray, unit: str = "inputs") -> Estimate | float:
    """Median with the interval of order statistics that covers it in 95 %; below six values their whole range.

    >>> median_of(np.arange(30.0)).low, median_of(np.arange(30.0)).high
    (9.0, 20.0)
    """
    from scipy.stats import binom

    ordered, n = np.sort(values), len(values)
    if n == 1:
        return float(values[0])
    below = int(binom.ppf(0.025, n, 0.5)) - 1
    place = max(0, below)
    return Estimate(
        float(np.median(ordered)), float(ordered[place]), float(ordered[n - 1 - place]), n, "order statistics", unit
    )


def quartiles(values: np.ndarray) -> tuple[float, ...]:
    """Least value, quartiles, largest value."""
    return tuple(float(v) for v in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))


def averaged(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Per input the mean over sites."""
    return np.stack(rows).mean(0)
