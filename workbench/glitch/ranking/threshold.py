"""Below which value of an indicator a token becomes a candidate: where the low tail is more than the bulk explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Method = Literal["false discovery rate", "percentile"]

PUBLISHED_PERCENT = 2.0
"""Share of ordinary tokens, in percent, that Land and Bartolo 2024 call candidates."""
MAX_FALSE_DISCOVERY_RATE = 0.1
"""Share of the candidates that may be ordinary tokens by the estimate."""
_MIN_VALUES = 200
_BINS, _SMOOTH = 64, 3
MAX_VALLEY_SHARE = 0.2
"""Two modes lie apart if the density between them falls below this share of the lower one's peak."""
_MIN_SHARE_BELOW, _MAX_SHARE_BELOW = 0.05, 0.75
"""Between these shares of the tokens a group below would distort the spread of the bulk and is not the bulk itself."""
_MIN_PEAK_COUNT = 20
"""A group needs so many tokens in its fullest bin: fewer may be a chance."""


@dataclass(frozen=True)
class Threshold:
    """Candidates lie at or below `value`, as do `percentile` % of the ordinary tokens; how it was chosen, and why."""

    value: float
    percentile: float
    method: Method
    why: str


def find_threshold(values: np.ndarray, percentile: float | None = None) -> Threshold:
    """The threshold for the indicator of ordinary tokens (finite; lower is more suspicious).

    Trained tokens are taken as normal around the median with the spread of the lower flank (median minus 16% quantile,
    which a few per cent of untrained tokens barely move). Where a larger group lies apart below the others, with a
    valley of the density between them, median and flank are those of the tokens above it. The threshold is the highest
    value at which the number of tokens that this normal puts below it is at most `MAX_FALSE_DISCOVERY_RATE` of the
    number found there. A percentile is used if it is asked for, or if that estimate is not to be had: fewer than 200
    values, no spread, or no excess in the tail.
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
    if len(low) < _MIN_VALUES:
        return _by_percentile(
            low, PUBLISHED_PERCENT, f"{len(low)} ordinary tokens are too few to model their distribution"
        )
    bulk, apart = _without_group(low)
    middle, flank = np.quantile(bulk, [0.5, 0.16])
    if middle <= flank:
        return _by_percentile(low, PUBLISHED_PERCENT, "a third of the ordinary tokens have the same value")
    expected = len(bulk) * torch.special.ndtr(torch.from_numpy((low - middle) / (middle - flank))).numpy()
    n_below = np.searchsorted(low, low, side="right")
    fits = np.flatnonzero((expected <= MAX_FALSE_DISCOVERY_RATE * n_below) & (low < flank))
    if not len(fits):
        return _by_percentile(low, PUBLISHED_PERCENT, "the low tail holds no more tokens than the bulk explains")
    k = int(fits[-1])
    n = int(n_below[k])
    why = (
        f"{n:,} ordinary tokens lie there and the bulk (median {middle:.3f}, lower spread {middle - flank:.3f}) "
        f"explains {expected[k]:.1f}: a false discovery rate of {expected[k] / n:.1%}, if the bulk is normal{apart}"
    )
    return Threshold(float(low[k]), 100 * n / len(low), "false discovery rate", why)


def _without_group(low: np.ndarray) -> tuple[np.ndarray, str]:
    """The sorted values above a group that lies apart below the others, and a sentence about that group."""
    valley = find_valley(low)
    n = 0 if valley is None else int(np.searchsorted(low, valley))
    if valley is None:
        return low, ""
    return low[n:], (
        f". {n:,} tokens ({n / len(low):.1%}) form a group of their own below {valley:.3f}; the bulk is what lies above"
    )


def find_valley(low: np.ndarray) -> float | None:
    """The deepest place between two modes of sorted values, or None if they have one mode.

    From a histogram of 64 bins, smoothed; both modes need a peak that is no chance, the density between them has to
    fall below `MAX_VALLEY_SHARE` of the lower peak, and `_MIN_SHARE_BELOW` to `_MAX_SHARE_BELOW` of the values lie
    below.

    >>> bell = torch.special.ndtri(torch.linspace(0.001, 0.999, 999)).numpy()
    >>> find_valley(bell) is None, 2 < find_valley(np.concatenate([bell, bell + 8])) < 6
    (True, True)
    """
    start, end = np.quantile(low, [0.001, 0.999])
    if end <= start:
        return None
    bins = min(_BINS, int(np.sqrt(len(low))))
    counts, edges = np.histogram(low, bins, (start, end))
    height = np.convolve(counts, np.full(_SMOOTH, 1 / _SMOOTH), "same")
    lower = np.minimum(np.maximum.accumulate(height), np.maximum.accumulate(height[::-1])[::-1])
    below = np.searchsorted(low, (edges[:-1] + edges[1:]) / 2) / len(low)
    fits = (lower >= _MIN_PEAK_COUNT) & (below >= _MIN_SHARE_BELOW) & (below <= _MAX_SHARE_BELOW)
    depth = np.where(fits, height / np.maximum(lower, 1), 1.0)
    at = int(depth.argmin())
    return float((edges[at] + edges[at + 1]) / 2) if depth[at] < MAX_VALLEY_SHARE else None


def _by_percentile(low: np.ndarray, percentile: float, why: str) -> Threshold:
    value = float(np.percentile(low, percentile))
    return Threshold(value, percentile, "percentile", f"the {percentile:g}% percentile of ordinary tokens, {why}")
