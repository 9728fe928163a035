"""Bootstrap over test rows by how often each is drawn, so that several quantities share their resamples."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from workbench.core.stats import MIN_BOOTSTRAP_ROWS, Estimate

RESAMPLES = 1000

Counts = Float[np.ndarray, "resamples rows"]


def resampled(n: int, seed: int) -> Counts:
    """How often each row is there: first in the rows as they are, then in each resample; counts keep sums exact."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.full((1, n), 1.0), counts])


def share(counts: Counts, hits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Share of hits among the chosen rows in each resample; 0 where a resample has none of them.

    >>> share(np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]]), np.array([1, 0, 1]), np.array([1, 1, 0])).tolist()
    [0.5, 1.0]
    """
    total = counts @ chosen
    return np.divide(counts @ (hits * chosen), total, out=np.zeros_like(total, dtype=float), where=total > 0)


def estimate(values: Float[np.ndarray, " resamples"], n: int, limit: float = 1.0) -> Estimate:
    """The first value, with the percentiles of the others; no interval but `limit` for too few rows."""
    value = float(values[0]) + 0.0
    if n < MIN_BOOTSTRAP_ROWS:
        return Estimate(
            value, min(-limit, value), max(limit, value), n, f"none below {MIN_BOOTSTRAP_ROWS} rows", "texts"
        )
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value), n, "percentile bootstrap", "texts")
