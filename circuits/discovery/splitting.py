"""Clusters that hold two mechanisms: the rule by which they are split, and how often it splits where there is nothing.

Members of a cluster are put in two groups by one half of the nodes, which holds one of every two nodes of similar size.
The cluster is split if the groups use different nodes of the other half: they share less than half as much effect there
as random groups of the same sizes do, and less than 99 % of those. What two groups share is `sum over nodes of min(a,
b)`, where a and b are the parts of a group's mean effect that lie on the node, 0 where the signs differ: 1 for groups
that use the same nodes alike, 0 for groups that use different ones.

The two halves are what makes it a test: two groups that are chosen by some nodes always differ in those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_matrix

from circuits.discovery.agreement import shuffled
from circuits.discovery.grouping import by_size, spherical_kmeans, units
from workbench.core.similarity import SparseMatrix

SHARED = 0.5
"""Groups that share a smaller part of what random groups share are two mechanisms."""
_DRAWS, _LEVEL = 199, 0.01
_DEPTH = 3
"""A cluster is split at most so many times, into at most 8 parts."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A cluster that was put in two groups.

    Attributes:
        sizes: of the groups.
        shared: of their effect on the nodes that the groups were not made by, the part that both share.
        by_chance: the same for random groups of these sizes, mean.
        p: share of random groups that share as little.
        is_split: whether the rule holds.
    """

    sizes: tuple[int, int]
    shared: float
    by_chance: float
    p: float
    is_split: bool


def two_groups(matrix: SparseMatrix, min_size: int, seed: int = 0) -> tuple[Split, Int[np.ndarray, " n"]] | None:
    """Two groups of the rows, and whether they are two mechanisms; None if there are no two groups of this size.

    Args:
        matrix: a vector per member; its columns are nodes.
        min_size: members of each group.
        seed: of the halves and of the random groups.
    """
    n = matrix.shape[0]
    if n < 2 * min_size:
        return None
    random = np.random.default_rng(seed)
    made_by, compared_by = (units(csr_matrix(matrix[:, half])) for half in _halves(matrix, random))
    groups = by_size(spherical_kmeans(made_by, 2, seed))
    sizes = np.bincount(groups, minlength=2)
    if sizes.min() < min_size:
        return None
    rows = compared_by.toarray()
    shared = _shared(rows, groups)
    chance = np.array([_shared(rows, random.permutation(groups)) for _ in range(_DRAWS)])
    p = (1 + int((chance <= shared).sum())) / (1 + _DRAWS)
    is_split = bool(shared < SHARED * chance.mean() and p <= _LEVEL)
    split = Split(
        sizes=(int(sizes[0]), int(sizes[1])), shared=shared, by_chance=float(chance.mean()), p=p, is_split=is_split
    )
    return split, groups


def _halves(matrix: SparseMatrix, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the nodes: of every two of similar size one is in each, at random."""
    used = np.unique(matrix.indices)
    size = np.asarray(abs(matrix).sum(0)).ravel()[used]
    order = used[np.argsort(-size, kind="stable")]
    order = order[: len(order) // 2 * 2].reshape(-1, 2)
    first = random.integers(2, size=len(order))
    each = np.arange(len(order))
    return order[each, first], order[each, 1 - first]


def _shared(rows: np.ndarray, groups: np.ndarray) -> float:
    """The part of their mean effect that two groups put on the same nodes, with the same sign."""
    means = [rows[groups == group].mean(0) for group in (0, 1)]
    a, b = (mean / max(float(np.abs(mean).sum()), 1e-30) for mean in means)
    return float((np.minimum(np.abs(a), np.abs(b)) * (a * b > 0)).sum())


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What the rule did to all clusters.

    Attributes:
        tested: clusters, and parts of split ones, that were large enough.
        split: how many of these were split.
        null_tested: the same clusters with every node shuffled over the members, so that nothing distinguishes two
            groups of them.
        null_split: how many of those were split all the same.
    """

    tested: int
    split: int
    null_tested: int
    null_split: int


def split_clusters(
    matrix: SparseMatrix, labels: Int[np.ndarray, " n"], min_size: int, seed: int = 0
) -> tuple[Int[np.ndarray, " n"], Splits]:
    """The clusters after the rule was applied, to parts again; its count beside that of shuffled clusters."""
    labels, counts = labels.copy(), np.zeros(4, dtype=np.int64)
    waiting = [(label, 0) for label in range(int(labels.max()) + 1)]
    while waiting:
        label, depth = waiting.pop()
        rows = np.flatnonzero(labels == label)
        result = two_groups(matrix[rows], min_size, seed)
        if result is None:
            continue
        null = two_groups(shuffled(matrix[rows], seed), min_size, seed)
        split, groups = result
        counts += (1, split.is_split, null is not None, null is not None and null[0].is_split)
        if split.is_split:
            new = int(labels.max()) + 1
            labels[rows[groups == 1]] = new
            if depth + 1 < _DEPTH:
                waiting += [(label, depth + 1), (new, depth + 1)]
    names = ("tested", "split", "null_tested", "null_split")
    return by_size(labels), Splits(**dict(zip(names, counts.tolist(), strict=True)))
