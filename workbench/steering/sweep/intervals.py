"""Intervals for values by feature and prompt: both are resampled, because both were drawn from many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.stats import Estimate

RESAMPLES = 2000
METHOD = "percentile bootstrap over prompts and features"


@checked
def two_level(
    values: Float[np.ndarray, "features prompts"], *, seed: int = 0, unit: str = "prompts"
) -> Estimate | None:
    """Mean over features and prompts with an interval for other features and other prompts; None if no value is known.

    Each resample draws features and, independently, prompts; a cell counts as often as its feature and its prompt were
    drawn. nan cells are left out. Prompts alone would say how sure one is of these very features.

    Raises:
        DegenerateInputError: for an empty table.

    Source: the pigeonhole bootstrap of Owen 2007 for two crossed factors; slightly conservative.

    >>> two_level(np.array([[1.0, 3.0]])).value  # (1 + 3) / 2
    2.0
    """
    return two_level_of(lambda means: means[0], values, seed=seed, unit=unit)


def two_level_ratio(
    above: Float[np.ndarray, "features prompts"], below: Float[np.ndarray, "others _"], *, seed: int = 0
) -> Estimate | None:
    """Ratio of two means over the same prompts and different features, with its interval; None if the lower one is 0.

    Prompts are resampled together, the two sets of features independently. A resample whose lower mean is zero counts
    as an infinite ratio.

    >>> two_level_ratio(np.array([[2.0, 4.0]]), np.array([[1.0, 1.0]])).value  # 3 / 1
    3.0
    """

    def ratio(means: list[np.ndarray]) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(means[1] > 0, means[0] / means[1], np.where(means[0] > 0, np.inf, 1.0))

    if not np.nanmean(below) > 0:
        return None
    return two_level_of(ratio, above, below, seed=seed)


def two_level_difference(
    a: Float[np.ndarray, "features prompts"], b: Float[np.ndarray, "others _"], *, seed: int = 0
) -> Estimate | None:
    """Mean of `a` minus mean of `b` over the same prompts, the two sets of features resampled independently.

    >>> two_level_difference(np.array([[2.0, 4.0]]), np.array([[1.0, 1.0], [1.0, 1.0]])).value  # 3 - 1
    2.0
    """
    return two_level_of(lambda means: means[0] - means[1], a, b, seed=seed)


def two_level_of(
    statistic: Callable[[list[np.ndarray]], np.ndarray],
    *tables: Float[np.ndarray, "_ _"],
    seed: int = 0,
    unit: str = "prompts",
    level: float = 0.95,
) -> Estimate | None:
    """A statistic of the means of some tables over the same prompts, with a two-level interval.

    Args:
        statistic: from the mean of each table, one number per resample, to the statistic of each resample.
        *tables: values by feature and prompt; the features of each table are resampled by themselves.
        seed: of the resamples.
        unit: what the columns are.
        level: coverage.

    Raises:
        DegenerateInputError: for an empty table.
        ShapeError: if the tables are over different prompts.
    """
    prompts = tables[0].shape[1]
    if any(table.shape[1] != prompts for table in tables):
        raise ShapeError(f"two_level: tables of shapes {[table.shape for table in tables]}; the prompts must agree.")
    if any(table.size == 0 for table in tables):
        raise DegenerateInputError("two_level: a table without any value has no mean. Give one feature and prompt.")
    if any(not np.isfinite(table).any() for table in tables):
        return None
    random = np.random.default_rng(seed)
    by_prompt = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    draws = []
    for table in tables:
        by_feature = random.multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES)
        draws.append(_weighted(table, by_feature, by_prompt))
    point = statistic([np.array([np.nanmean(table)]) for table in tables])
    spread = statistic(draws)
    spread = spread[~np.isnan(spread)]
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    features = " and ".join(str(len(table)) for table in tables)
    words = f"{unit} x {features} feature{'' if features == '1' else 's'}"
    return Estimate(float(point[0]), float(low), float(high), prompts, METHOD, words, level)


def _weighted(table: np.ndarray, by_feature: np.ndarray, by_prompt: np.ndarray) -> np.ndarray:
    """Mean of the known cells in each resample, nan where a resample has none."""
    known = np.isfinite(table)
    filled = np.where(known, table, 0.0)
    total = ((by_feature @ filled) * by_prompt).sum(1)
    count = ((by_feature @ known.astype(float)) * by_prompt).sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)
