"""Below which value of an indicator a token becomes a candidate: where the low tail is more than the bulk explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Method = Literal["false discovery rate", "percentile"]

PUBLISHED = 2.0
"""Share of ordinary tokens, in percent, that Land and Bartolo 2024 call candidates."""
FDR = 0.1
"""Share of the candidates that may be ordinary tokens by the estimate."""
_ENOUGH = 200


@dataclass(frozen=True)
class Threshold:
    """Where the line lies and how it was drawn.

    Attributes:
        value: candidates lie at or below it.
        percentile: share of ordinary tokens, in percent, at or below it.
        method: how it was chosen.
        why: the reason, in words.
    """

    value: float
    percentile: float
    method: Method
    why: str


def find_threshold(values: np.ndarray, percentile: float | None = None) -> Threshold:
    """The threshold for the indicator of ordinary tokens (finite; lower is more suspicious).

    Trained tokens are taken as normal around the median with the spread of the lower flank (median minus 16% quantile,
    which a few per cent of untrained tokens barely move). The threshold is the highest value at which the number of
    tokens that this normal puts below it is at most `FDR` of the number found there. A percentile is used if it is
    asked for, or if that estimate is not to be had: fewer than 200 values, no spread, or no excess in the tail.
    Source: Efron 2004 (empirical null, central matching); on one flank, since these distributions are skewed.

    >>> values = np.concatenate([np.full(3, 0.01), torch.special.ndtri(torch.linspace(0.001, 0.999, 997)).numpy() + 9])
    >>> find_threshold(values).value, find_threshold(values).percentile  # 3 of 1,000, while the bulk predicts none
    (0.01, 0.3)
    """
    low = np.sort(values)
    if not len(low):
        return Threshold(float("nan"), 0.0, "percentile", "there is nothing to rank")
    if percentile is not None:
        return _by_percentile(low, percentile, "as asked")
    if len(low) < _ENOUGH:
        return _by_percentile(low, PUBLISHED, f"{len(low)} ordinary tokens are too few to model their distribution")
    middle, flank = np.quantile(low, [0.5, 0.16])
    if middle <= flank:
        return _by_percentile(low, PUBLISHED, "a third of the ordinary tokens have the same value")
    expected = len(low) * torch.special.ndtr(torch.from_numpy((low - middle) / (middle - flank))).numpy()
    found = np.searchsorted(low, low, side="right")
    fits = np.flatnonzero((expected <= FDR * found) & (low < flank))
    if not len(fits):
        return _by_percentile(low, PUBLISHED, "the low tail holds no more tokens than the bulk explains")
    k = int(fits[-1])
    n = int(found[k])
    why = (
        f"{n:,} ordinary tokens lie there and the bulk (median {middle:.3f}, lower spread {middle - flank:.3f}) "
        f"explains {expected[k]:.1f}: a false discovery rate of {expected[k] / n:.1%}, if the bulk is normal"
    )
    return Threshold(float(low[k]), 100 * n / len(low), "false discovery rate", why)


def _by_percentile(low: np.ndarray, percentile: float, why: str) -> Threshold:
    value = float(np.percentile(low, percentile))
    return Threshold(value, percentile, "percentile", f"the {percentile:g}% percentile of ordinary tokens, {why}")
