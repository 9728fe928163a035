"""Shuffles: what is found where labels or owners carry no information."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Shaped

from workbench.core.errors import DegenerateInputError

Random = int | np.random.Generator
"""A seed, or a generator that draws on."""


def shuffled(values: Shaped[np.ndarray, " rows"], n: int = 1, *, random: Random = 0) -> Shaped[np.ndarray, "n rows"]:
    """`n` permutations of the values, drawn one after the other from one generator.

    The counts of every value stay; which row has which value carries no information.

    >>> shuffled(np.array([1, 1, 0]), 2).sum(axis=1).tolist()
    [2, 2]
    """
    generator = np.random.default_rng(random)
    return np.stack([generator.permutation(values) for _ in range(n)])


def another(n: int, *, random: Random = 0) -> Int[np.ndarray, " n"]:
    """For each of n owners the index of another one, a different one for each: nobody keeps what is its own.

    Raises:
        DegenerateInputError: for fewer than two owners.

    >>> another(2).tolist()
    [1, 0]
    """
    if n < 2:
        raise DegenerateInputError(f"another(n={n}): nobody has anyone to exchange with. Give two or more.")
    order = np.random.default_rng(random).permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner
