"""Intervals and nulls: every number that the workbench prints comes with one of these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import sample_size, with_interval

Values = Sequence[float] | np.ndarray

VALUES_DRAWN_AT_ONCE = 2**24
"""Limit of the memory of a bootstrap."""

COLUMNS_AT_ONCE = 256
"""Features that are ranked at once; it limits memory."""

MIN_BOOTSTRAP_ROWS = 20
"""Below so many rows a percentile bootstrap is too narrow: it cannot know more spread than the rows show."""

ANY, SHARE, POSITIVE = (-math.inf, math.inf), (0.0, 1.0), (0.0, math.inf)
"""Where a quantity can lie: anywhere, such as a difference; a share or an accuracy; a norm or a divergence."""

SIGNED_SHARE = (-1.0, 1.0)
"""Where a difference of two shares, a cosine or a correlation can lie."""


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval and what it was measured on.

    Attributes:
        n: number of independent units (prompts, documents, tokens: `unit` says which).
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    unit: str = "rows"
    level: float = 0.95

    def __str__(self) -> str:
        return f"{' '.join(self.shown())} ({sample_size(self.n, self.unit)})"

    @checked
    def shown(self, *, sign: bool = False) -> tuple[str, str]:
        """Value and interval as text, with equal decimals.

        >>> Estimate(0.5, 0.25, 0.75, 40, "Wilson", "prompts").shown()
        ('0.500', '[0.250, 0.750]')
        """
        return with_interval(self.value, self.low, self.high, sign=sign)

    def change(self) -> str:
        """A difference: signed, with n.

        >>> Estimate(0.5, 0.25, 0.75, 1, "t", "rows").change()
        '+0.500 [+0.250, +0.750] (n = 1 row)'
        """
        return f"{' '.join(self.shown(sign=True))} ({sample_size(self.n, self.unit)})"

    @checked
    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of `value`."""
        return not self.low <= value <= self.high

    @checked
    def words(self, above: str, below: str, neither: str = "not clearly different") -> str:
        """One of three texts: the interval lies above 0, below 0, or holds it.

        >>> Estimate(0.5, -0.1, 1.1, 9, "t").words("more", "less")
        'not clearly different'
        """
        return above if self.low > 0 else below if self.high < 0 else neither


def _finite(values: Values, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DegenerateInputError(
            f"{name}: asked for an interval over shape {array.shape}; needs a non-empty 1-d array."
        )
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InvalidInputError(f"{name}: {bad} of {array.size} values are not finite. Remove or mend them first.")
    return array


def _resamples(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of each resample, a part of the resamples at a time."""
    random, most = np.random.default_rng(seed), VALUES_DRAWN_AT_ONCE // n + 1
    for k in range(0, resamples, most):
        yield random.integers(0, n, size=(min(most, resamples - k), n))


def _percentile(point: float, draws: np.ndarray, n: int, unit: str, method: str, level: float) -> Estimate:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # Plus zero: a negative zero would be shown as -0.
    return Estimate(float(point) + 0.0, float(low) + 0.0, float(high) + 0.0, n, method, unit, level)


def bootstrap_mean(
    values: Values, *, unit: str = "rows", seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """Mean with a percentile bootstrap interval over rows.

    Raises:
        DegenerateInputError: if `values` is empty.
        InvalidInputError: if a value is not finite.

    >>> bootstrap_mean([1.0, 1.0, 1.0]).low
    1.0
    """
    x = _finite(values, "bootstrap_mean")
    draws = np.concatenate([x[rows].mean(axis=1) for rows in _resamples(x.size, resamples, seed)])
    return _percentile(x.mean(), draws, x.size, unit, "percentile bootstrap", level)


def sample_mean(
    values: Values,
    *,
    unit: str = "rows",
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    within: tuple[float, float] = ANY,
) -> Estimate:
    """Mean with a percentile bootstrap interval, or below `MIN_BOOTSTRAP_ROWS` rows Student's t interval.

    One row says nothing about its spread, so its interval is all of `within`.

    Args:
        values: one per row.
        unit: what the rows are.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        level: of the interval.
        within: least and largest value that the quantity can have, such as `SHARE`. The t interval is then made on a
            scale without ends (see `student_mean`), so that it stays inside.

    Raises:
        DegenerateInputError: if `values` is empty.
        InvalidInputError: if a value is not finite, or lies outside `within`.

    >>> round(sample_mean([1.0, 2.0, 3.0]).high, 3)  # 2 + 4.303 * 1 / sqrt(3)
    4.484
    """
    x = _finite(values, "sample_mean")
    if x.size >= MIN_BOOTSTRAP_ROWS:
        return bootstrap_mean(x, unit=unit, seed=seed, resamples=resamples, level=level)
    return student_mean(x.mean(), x, unit, "Student's t", level, within)


def student_mean(
    point: float, values: np.ndarray, unit: str, method: str, level: float, within: tuple[float, float] = ANY
) -> Estimate:
    """A mean with Student's t interval; its rows deviate as `values` do.

    Of a quantity between two ends the interval is one of the logit of the mean, of a quantity above 0 one of its
    logarithm, with the standard error that the delta method gives; so it never says what can't be. Where every row is
    at an end, the other end of the interval is that of Clopper and Pearson for as many rows.

    Raises:
        InvalidInputError: if a value lies outside `within`.

    >>> sample_mean([0.5, 0.9, 0.98]).high > 1 > sample_mean([0.5, 0.9, 0.98], within=SHARE).high
    True
    """
    from scipy.stats import t

    low, high = within
    n, point = values.size, float(point) + 0.0  # plus zero: a negative zero would be shown as -0
    if not low <= point <= high:
        raise InvalidInputError(f"A mean of {point} lies outside [{low}, {high}], where this quantity is. Scale it.")
    if n == 1:
        return Estimate(point, low, high, n, method, unit, level)
    half = float(t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1)) / math.sqrt(n)
    if math.isinf(low) or half == 0 and point not in within:
        return Estimate(point, point - half, point + half, n, method, unit, level)
    if point in within:
        reach = (high - low) * (1 - ((1 - level) / 2) ** (1 / n)) if math.isfinite(high) else half
        first, last = (low, low + reach) if point == low else (high - reach, high)
        return Estimate(point, first, last, n, f"{method}, Clopper-Pearson at the end", unit, level)
    if math.isinf(high):
        factor = math.exp(half / (point - low))
        return Estimate(
            point, low + (point - low) / factor, low + (point - low) * factor, n, f"{method} of the logarithm", unit,
            level,
        )  # fmt: skip
    share = (point - low) / (high - low)
    step, logit = half / ((high - low) * share * (1 - share)), math.log(share / (1 - share))
    first, last = (low + (high - low) / (1 + math.exp(min(700.0, -logit + side * step))) for side in (1, -1))
    return Estimate(point, first, last, n, f"{method} of the logit", unit, level)


def sample_ratio(
    numerator: Values,
    denominator: Values,
    *,
    unit: str = "rows",
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Ratio of sums over paired rows, with an interval over rows.

    The percentile bootstrap draws numerator and denominator together. Below `MIN_BOOTSTRAP_ROWS` rows it is Student's t
    of the linearised ratio: row i deviates by `(a_i - ratio * b_i) / mean(b)`.

    Raises:
        DegenerateInputError: if there are no rows, or the denominators sum to zero.
        InvalidInputError: if a value is not finite, or the rows don't pair up.

    >>> sample_ratio([1.0, 3.0], [2.0, 2.0]).value  # (1 + 3) / (2 + 2)
    1.0
    """
    a, b = _finite(numerator, "sample_ratio"), _finite(denominator, "sample_ratio")
    if a.shape != b.shape:
        raise InvalidInputError(f"sample_ratio: {a.size} numerators and {b.size} denominators; they must pair up.")
    if b.sum() == 0:
        raise DegenerateInputError("sample_ratio: the denominators sum to zero.")
    point = a.sum() / b.sum()
    if a.size < MIN_BOOTSTRAP_ROWS:
        return student_mean(point, (a - point * b) / b.mean(), unit, "Student's t of a linearised ratio of sums", level)
    sums = [(a[rows].sum(axis=1), b[rows].sum(axis=1)) for rows in _resamples(a.size, resamples, seed)]
    tops, bottoms = map(np.concatenate, zip(*sums, strict=True))
    draws = tops[bottoms != 0] / bottoms[bottoms != 0]
    return _percentile(point, draws, a.size, unit, "percentile bootstrap of a ratio of sums", level)


def paired_difference(
    a: Values, b: Values, *, unit: str = "rows", seed: int = 0, level: float = 0.95, within: tuple[float, float] = ANY
) -> Estimate:
    """Mean of `a - b` over paired rows, with the interval of `sample_mean`.

    Of shares, probabilities or accuracies the difference lies `within=SIGNED_SHARE`.

    >>> paired_difference([2.0, 3.0], [1.0, 2.0]).value
    1.0
    """
    x, y = _finite(a, "paired_difference"), _finite(b, "paired_difference")
    if x.shape != y.shape:
        raise InvalidInputError(f"paired_difference: {x.size} and {y.size} rows; they must pair up.")
    return sample_mean(x - y, unit=unit, seed=seed, level=level, within=within)


def rank_correlation(a: Values, b: Values, *, unit: str = "rows", level: float = 0.95) -> Estimate:
    """Spearman's correlation of the ranks of `a` and `b`, with an interval on Fisher's scale.

    Raises:
        InvalidInputError: if the numbers of rows differ.
        DegenerateInputError: below 4 rows, or where one of both is constant.

    Source: Bonett and Wright 2000: the variance is `(1 + r^2 / 2) / (n - 3)`.

    >>> rank_correlation([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 4.0, 9.0, 16.0, 25.0]).value
    1.0
    """
    from scipy.stats import norm, rankdata

    x, y = _finite(a, "rank_correlation"), _finite(b, "rank_correlation")
    if x.shape != y.shape:
        raise InvalidInputError(f"rank_correlation: {x.size} and {y.size} rows; they must pair up.")
    if x.size < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise DegenerateInputError(
            f"rank_correlation: {x.size} rows of {len(np.unique(x))} and {len(np.unique(y))} different values have no "
            "correlation. Give at least 4 rows that differ."
        )
    r = float(np.clip(np.corrcoef(rankdata(x), rankdata(y))[0, 1], -1, 1))
    r = round(r, 15)
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt((1 + r * r / 2) / (x.size - 3))
    middle = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15))
    low, high = math.tanh(middle - half), math.tanh(middle + half)
    return Estimate(r, min(low, r), max(high, r), x.size, "Fisher's scale, Bonett and Wright", unit, level)


def wilson(successes: int, n: int, *, unit: str = "rows", level: float = 0.95) -> Estimate:
    """Proportion with the Wilson score interval.

    >>> wilson(0, 10).value, round(wilson(0, 10).high, 4)
    (0.0, 0.2775)
    """
    from scipy.stats import norm

    _check_counts(successes, n)
    z, p = float(norm.ppf((1 + level) / 2)), successes / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return Estimate(p, min(low, p), max(high, p), n, "Wilson", unit, level)


def difference_of_shares(first: Estimate, second: Estimate) -> Estimate:
    """First share minus second, of different rows, with Newcombe's interval from the Wilson intervals of both.

    Source: Newcombe 1998, method 10.

    >>> d = difference_of_shares(wilson(56, 70), wilson(48, 80))  # his table II, first row: .0524 to .3339
    >>> round(d.value, 4), round(d.low, 4), round(d.high, 4)
    (0.2, 0.0524, 0.3339)
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high, min(first.n, second.n), "Newcombe", first.unit, first.level)


def clopper_pearson(successes: int, n: int, *, unit: str = "rows", level: float = 0.95) -> Estimate:
    """Proportion with the exact (conservative) Clopper-Pearson interval.

    >>> round(clopper_pearson(0, 10).high, 4)  # 1 - 0.025 ** (1 / 10)
    0.3085
    """
    from scipy.stats import beta

    _check_counts(successes, n)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return Estimate(successes / n, low, high, n, "Clopper-Pearson", unit, level)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value for paired yes/no outcomes: are two conditions met equally often?

    Only the discordant pairs count: under the null each is as likely to favour the first as the second. 1.0 where no
    pair differs.

    Source: McNemar 1947, in its exact (binomial) form.

    >>> mcnemar(0, 5), mcnemar(3, 3)  # 2 * 0.5 ** 5, and min(1, more than 1)
    (0.0625, 1.0)
    """
    from scipy.stats import binom

    n = only_first + only_second
    if n == 0:
        return 1.0
    _check_counts(only_first, n)
    return min(1.0, 2 * float(binom.cdf(min(only_first, only_second), n, 0.5)))


def discovery_rates(
    acts: Float[np.ndarray, "rows features"], columns: np.ndarray, labels: Bool[np.ndarray, "labellings rows"]
) -> Float[np.ndarray, "labellings columns"]:
    """q-value of each of some features under each labelling: the false discovery rate at which it would just be named.

    Two-sided Mann-Whitney tests with the corrections for ties and continuity, then Benjamini and Hochberg 1995. Ranks
    do not depend on the labels, so they are taken once, some features at a time.
    """
    from scipy.stats import false_discovery_control

    blocks = (columns[start : start + COLUMNS_AT_ONCE] for start in range(0, len(columns), COLUMNS_AT_ONCE))
    p = np.concatenate([_rank_tests(acts[:, block], labels) for block in blocks], axis=1)
    return false_discovery_control(p, method="bh", axis=1)


def _rank_tests(acts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """p-value by labelling and feature; 1 for a feature that is the same on every row and has no ranks to compare."""
    from scipy.stats import norm, rankdata

    n = len(acts)
    ours = labels.sum(1, keepdims=True)
    centred = rankdata(acts, axis=0) - (n + 1) / 2
    # the ranks' own variance, without replacement, is the normal approximation's with its correction for ties
    variance = ours * (n - ours) / (n * (n - 1)) * (centred * centred).sum(0)
    distance = np.maximum(np.abs(labels.astype(np.float64) @ centred) - 0.5, 0.0)
    return np.where(variance > 0, 2 * norm.sf(distance / np.sqrt(np.where(variance > 0, variance, 1.0))), 1.0)


def _check_counts(successes: int, n: int) -> None:
    if n <= 0:
        raise DegenerateInputError(f"A proportion of n={n} rows has no value; measure at least one row.")
    if not 0 <= successes <= n:
        raise InvalidInputError(f"{successes} successes of n={n} rows is impossible.")
