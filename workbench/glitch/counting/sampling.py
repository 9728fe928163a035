"""How many glitch tokens there are, and how many a ranking finds, from a sample with known inclusion probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, require
from workbench.core.numbers import number
from workbench.core.stats import Estimate, clopper_pearson

_DRAWS = 4000


@dataclass(frozen=True)
class Stratum(OneLine):
    """What is known of one part of the vocabulary.

    Attributes:
        tested: of these, drawn at random without replacement and tested.
    """

    size: int
    tested: int
    glitch: int

    def __post_init__(self) -> None:
        require(0 <= self.glitch <= self.tested <= self.size, self, "needs 0 <= glitch <= tested <= size.")

    @property
    def is_complete(self) -> bool:
        """Whether every token was tested."""
        return self.tested == self.size


def by_rank(ranked: np.ndarray, shares: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Ids, the most suspicious first, in strata: the first share of a ranking, those up to the next one, and the rest.

    Raises:
        InvalidInputError: if a share is not between 0 and 1.

    >>> [part.tolist() for part in by_rank(np.arange(10), [0.2, 0.5])]
    [[0, 1], [2, 3, 4], [5, 6, 7, 8, 9]]
    """
    are_valid = all(0 < share <= 1 for share in shares)
    require(are_valid, f"shares={list(shares)}", "ends of strata lie between 0 and 1, such as 0.02 for 2%.")
    ends = sorted({round(share * len(ranked)) for share in shares} | {len(ranked)})
    starts = [0, *ends[:-1]]
    return tuple(ranked[start:end] for start, end in zip(starts, ends, strict=True) if end > start)


def draw(strata: Sequence[np.ndarray], n: int, seed: int) -> np.ndarray:
    """A sample of `n` ids in random order: the strata get equal numbers, those too small for that are taken whole.

    Every stratum gets at least two, as far as it has them, so that none is left without an estimate.

    Raises:
        InvalidInputError: if `n` is too small for that.

    >>> sorted(draw([np.array([7]), np.arange(100, 200)], 4, seed=0).tolist())[0]
    7
    """
    least = 2 * len(strata)
    require(n >= least, f"A sample of {n} tokens", f"too small for {len(strata)} strata; ask for at least {least}.")
    rng, left, chosen = np.random.default_rng(seed), n, []
    ordered = sorted(strata, key=len)
    for k, members in enumerate(ordered):
        size = min(len(members), left // (len(ordered) - k))
        chosen.append(rng.choice(members, size, replace=False))
        left -= size
    return rng.permutation(np.concatenate(chosen))


def tally(strata: Sequence[np.ndarray], best: np.ndarray, threshold: float) -> tuple[Stratum, ...]:
    """Counts of each stratum of ids; `best` is by id, nan where a token was not tested."""
    return tuple(
        Stratum(len(ids), int((~np.isnan(best[ids])).sum()), int((best[ids] < threshold).sum())) for ids in strata
    )


def total(strata: Sequence[Stratum], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Number of glitch tokens in all strata together, by Horvitz and Thompson: each found one counts `1 / pi`.

    `pi = tested / size` is the chance that a token of its stratum was tested, so the estimate is unbiased. The normal
    interval would have width zero where no glitch token was drawn; the ends of this one are quantiles of the number of
    glitch tokens among the untested ones, beta-binomial in each stratum: the lower end with the lower Clopper-Pearson
    rate of every stratum, the upper end with the upper one. It covers at least as often as it says. One prior for both
    ends would add a little to each large stratum without a find, which together lifts the lower end above the truth.

    Raises:
        DegenerateInputError: if a stratum has tokens of which none was tested.

    >>> total([Stratum(10, 10, 4), Stratum(100, 20, 1)]).value  # 4 + 1 / 0.2
    9.0
    """
    _require_tested(strata)
    value = sum(s.glitch * s.size / s.tested for s in strata)
    few, many = _draws(strata, seed)
    return _interval(value, few.sum(0), many.sum(0), strata, level)


def recall(strata: Sequence[Stratum], first: int, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Share of all glitch tokens that lie in the `first` strata: the recall of testing these and nothing else.

    A ratio of two Horvitz-Thompson totals. Where everything was tested it is exact for this vocabulary; the interval
    is then Clopper-Pearson's, which takes the glitch tokens for a sample of such tokens.

    Raises:
        DegenerateInputError: if no glitch token was found at all, or a stratum was not tested.

    >>> recall([Stratum(10, 10, 4), Stratum(100, 20, 1)], 1).value  # 4 / (4 + 1 / 0.2)
    0.4444444444444444
    """
    _require_tested(strata)
    if not sum(s.glitch for s in strata):
        raise DegenerateInputError(
            f"Recall has no value: none of the {number(sum(s.tested for s in strata))} tested tokens is a glitch token."
        )
    if all(s.is_complete for s in strata):
        among_first, everything = sum(s.glitch for s in strata[:first]), sum(s.glitch for s in strata)
        return clopper_pearson(among_first, everything, unit="glitch tokens", level=level)
    totals = [s.glitch * s.size / s.tested for s in strata]
    few, many = _draws(strata, seed)
    return _interval(
        sum(totals[:first]) / sum(totals),
        _share(few[:first].sum(0), many[first:].sum(0)), _share(many[:first].sum(0), few[first:].sum(0)), strata, level,
    )  # fmt: skip


def _draws(strata: Sequence[Stratum], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of glitch tokens that are plausibly few, and plausibly many, each `(strata, draws)`.

    Those found, and those that may be among the untested; the rate is drawn from the beta distribution whose quantile
    is the lower, or the upper, end of Clopper and Pearson's interval.
    """
    rng = np.random.default_rng(seed)
    few = [_drawn(rng, s, s.glitch, s.tested - s.glitch + 1) for s in strata]
    many = [_drawn(rng, s, s.glitch + 1, s.tested - s.glitch) for s in strata]
    return np.stack(few).astype(np.float64), np.stack(many).astype(np.float64)


def _drawn(rng: np.random.Generator, stratum: Stratum, a: int, b: int) -> np.ndarray:
    """Draws with a rate from Beta(a, b), which is a point at 0 for a = 0 and at 1 for b = 0."""
    rate = rng.beta(a, b, _DRAWS) if a and b else np.full(_DRAWS, float(a > 0))
    return stratum.glitch + rng.binomial(stratum.size - stratum.tested, rate)


def _share(part: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Share of a part in the whole, draw by draw; a found glitch token is in every draw, so there is a whole."""
    return part / (part + rest)


def _interval(value: float, low: np.ndarray, high: np.ndarray, strata: Sequence[Stratum], level: float) -> Estimate:
    n = sum(s.tested for s in strata)
    method = f"Horvitz-Thompson, {len(strata)} strata, Clopper-Pearson rates"
    ends = float(np.quantile(low, (1 - level) / 2)), float(np.quantile(high, (1 + level) / 2))
    return Estimate(float(value), min(ends[0], value), max(ends[1], value), n, method, "tested tokens", level)


def _require_tested(strata: Sequence[Stratum]) -> None:
    bare = [k for k, s in enumerate(strata) if s.size and not s.tested]
    if bare or not strata:
        raise DegenerateInputError(
            f"{len(bare)} of {len(strata)} strata have no tested token, so nothing is known of them. Test more tokens."
        )
