"""Random features that match chosen ones in frequency and norm: what any features of that size would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted

N_NEAREST = 20
MAX_POOL_SHARE = 0.05
MAX_FREQUENCY_RATIO = 1.5
MAX_NORM_RATIO = 1.5


@checked
def matched_features(
    chosen: Sequence[int],
    frequency: Float[Tensor, " d_sae"],
    n_sets: int = 1,
    *,
    norm: Float[Tensor, " d_sae"] | None = None,
    excluded: Iterable[int] = (),
    seed: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """Sets of random features, the i-th of each set matched to the i-th chosen one in frequency, and in norm if given.

    A feature is eligible if it is active (its frequency is above 0), writes something (its norm, if given, is above 0),
    is neither chosen nor excluded, and is not in the same set yet. Each match is drawn in three steps:

    1. Of the eligible features keep those within a factor `MAX_NORM_RATIO` of the norm; all of them if none is.
    2. Of these take the `N_NEAREST` nearest in frequency, by the ratio, but at most the share `MAX_POOL_SHARE`, and
       two at least if there are several sets: sets from a pool of one would all be the same.
    3. Of these keep those within a factor `MAX_FREQUENCY_RATIO` of the frequency, the nearest if none is, and draw one,
       all equally likely.

    Where the frequency of a chosen feature is not finite, steps 2 and 3 are left out; where no frequency is finite,
    every feature counts as active.

    Args:
        chosen: features that need a control.
        frequency: share of tokens on which each feature is active; nan where it is not known.
        n_sets: how many sets.
        norm: length of what one unit of each feature adds.
        excluded: features that are never drawn, besides the chosen ones.
        seed: of one generator that draws set after set, so fewer sets are the first of more.

    Raises:
        DegenerateInputError: if a set would need more features than are eligible.
        InvalidInputError: for a feature that has no frequency.

    >>> matched_features([0], torch.tensor([0.5, 0.4, 0.01]))  # 0.01 is no match for 0.5
    ((1,),)
    """
    excluded = tuple(excluded)
    if bad := [feature for feature in (*chosen, *excluded) if not 0 <= feature < len(frequency)]:
        raise InvalidInputError(
            f"matched_features: feature {bad[0]} does not exist; frequencies are given of features 0 to "
            f"{len(frequency) - 1}. Name one of these."
        )
    eligible = eligible_features(frequency, norm=norm, excluded=(*chosen, *excluded))
    if (there := int(eligible.sum())) < max(1, len(chosen)):
        raise DegenerateInputError(
            f"matched_features: a random control for {counted(len(chosen), 'features')} needs as many others, and "
            f"{there} of "
            f"{len(eligible)} are active, write something and are not excluded, so there is no control. Use a larger "
            "SAE or more text, or choose fewer features."
        )
    pools = [
        (_log_ratio(frequency, feature), torch.zeros(len(eligible)) if norm is None else _log_ratio(norm, feature))
        for feature in chosen
    ]
    random = np.random.default_rng(seed)
    sets = []
    for _ in range(n_sets):
        free, drawn = eligible.clone(), []
        for by_frequency, by_norm in pools:
            pool = _pool(free.nonzero().flatten(), by_frequency, by_norm, n_sets)
            drawn.append(int(pool[int(random.integers(len(pool)))]))
            # A feature drawn twice would be edited once, and the control would be smaller than what it controls.
            free[drawn[-1]] = False
        sets.append(tuple(drawn))
    return tuple(sets)


def eligible_features(
    frequency: Float[Tensor, " d_sae"], *, norm: Float[Tensor, " d_sae"] | None = None, excluded: Iterable[int] = ()
) -> Bool[Tensor, " d_sae"]:
    """True at the features that `matched_features` may draw; on the CPU."""
    is_known = bool(frequency.isfinite().any())
    eligible = frequency.cpu() > 0 if is_known else torch.ones(len(frequency), dtype=torch.bool)
    if norm is not None:
        eligible &= norm.cpu() > 0
    eligible[list(excluded)] = False
    return eligible


def _log_ratio(values: Float[Tensor, " d_sae"], feature: int) -> Float[Tensor, " d_sae"]:
    """Size of the logarithm of each value over that of the feature."""
    # fp64, so that equal ratios of counts stay equal; the addition keeps the logarithm of 0 finite.
    logs = (values.double().cpu() + 1e-12).log()
    return (logs - logs[feature]).abs()


def _pool(free: Int[Tensor, " free"], by_frequency: Tensor, by_norm: Tensor, n_sets: int) -> Int[Tensor, " pool"]:
    """The features that one is drawn from, nearest first."""
    of_norm = free[by_norm[free] <= math.log(MAX_NORM_RATIO)]
    pool = of_norm if len(of_norm) else free
    far = by_frequency[pool]
    if bool(by_frequency.isnan().all()):
        return pool
    order = far.argsort(stable=True)[: min(N_NEAREST, max(min(n_sets, 2), int(MAX_POOL_SHARE * len(pool))))]
    matches = order[far[order] <= math.log(MAX_FREQUENCY_RATIO)]
    return pool[matches if len(matches) else order[far[order] == far[order[0]]]]
