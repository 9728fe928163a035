"""Clusters of sparse vectors by their angles: spectral, spherical k-means, Leiden.

Similarity of two samples is `1 - arccos(cosine) / pi`, between 0 and 1. Spectral clustering and Leiden see a graph of
nearest neighbours instead of all pairs, so memory grows with samples times neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, diags_array
from scipy.sparse.linalg import eigsh

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.leiden import leiden
from workbench.core.similarity import SparseMatrix

ClusterMethod = Literal["spectral", "kmeans", "leiden"]
METHODS: dict[str, str] = {
    "spectral": "spectral clustering of the graph of nearest neighbours",
    "kmeans": "spherical k-means",
    "leiden": "Leiden communities of the graph of nearest neighbours",
}
SHARES = (32, 24, 16, 12, 8)
"""Where no number of clusters is asked for, these average sizes of a cluster are tried."""
_ROWS_AT_ONCE = 512
_ITERATIONS, _STARTS = 100, 3
_DENSE = 400
"""Rows up to which all eigenvectors are computed."""
_STEPS = 12
"""Resolutions that are tried for a number of communities."""


def units(matrix: SparseMatrix) -> SparseMatrix:
    """The rows scaled to length 1; a zero row stays."""
    matrix = csr_matrix(matrix, dtype=np.float64)
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    return csr_matrix(diags_array(1 / np.where(norms > 0, norms, 1)) @ matrix)


def angular(cosines: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Angular similarity of a cosine.

    >>> angular(np.array([1.0, 0.0, -1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return 1 - np.arccos(np.clip(cosines, -1, 1)) / np.pi


def similarities(unit: SparseMatrix) -> Iterator[tuple[slice, Float[np.ndarray, "rows n"]]]:
    """Angular similarity of some rows at a time with all; 1 with themselves."""
    turned = unit.T.tocsc()
    for start in range(0, unit.shape[0], _ROWS_AT_ONCE):
        some = slice(start, min(unit.shape[0], start + _ROWS_AT_ONCE))
        block = angular((unit[some] @ turned).toarray())
        block[np.arange(len(block)), np.arange(some.start, some.stop)] = 1.0
        yield some, block


def neighbour_graph(unit: SparseMatrix, neighbours: int) -> SparseMatrix:
    """Symmetric graph of each row's nearest ones, with their angular similarity; no row is its own neighbour."""
    n = unit.shape[0]
    k = min(neighbours, n - 1)
    if k < 1:
        raise DegenerateInputError(f"A graph of {n} samples has no neighbours. Give more samples.")
    rows, columns, values = [], [], []
    for some, block in similarities(unit):
        block[np.arange(len(block)), np.arange(some.start, some.stop)] = -1
        near = np.argpartition(-block, k - 1, axis=1)[:, :k]
        rows.append(np.repeat(np.arange(some.start, some.stop), k))
        columns.append(near.ravel())
        values.append(np.take_along_axis(block, near, 1).ravel())
    graph = csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(n, n))
    return csr_matrix(graph.maximum(graph.T))


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How samples are put into clusters.

    Attributes:
        method: "spectral", "kmeans" or "leiden".
        k: number of clusters; None tries several and takes that with most clusters of at least `min_size`.
        neighbours: of each sample in the graph.
        min_size: members of a cluster that counts.
        seed: of starts and orders.
    """

    method: ClusterMethod
    k: int | None
    neighbours: int
    min_size: int
    seed: int

    def labels(self, matrix: SparseMatrix) -> Int[np.ndarray, " n"]:
        """Number of the cluster of each row; the largest cluster is 0."""
        unit, n = units(matrix), matrix.shape[0]
        if self.k is not None and not 1 <= self.k <= n:
            raise InvalidInputError(f"k={self.k}: {n} samples make 1 to {n} clusters. Choose among these.")
        ks = [self.k] if self.k is not None else sorted({max(1, n // share) for share in SHARES})
        tried = [by_size(labels) for labels in self._for(unit, ks)]
        return max(tried, key=lambda labels: int((np.bincount(labels) >= self.min_size).sum()))

    def _for(self, unit: SparseMatrix, ks: list[int]) -> Iterator[Int[np.ndarray, " n"]]:
        if self.method == "kmeans":
            return (spherical_kmeans(unit, k, self.seed) for k in ks)
        graph = neighbour_graph(unit, self.neighbours)
        if self.method == "leiden":
            return (communities(graph, k, self.seed) for k in (ks if self.k is not None else [None]))
        space = eigenvectors(graph, max(ks), self.seed)
        return (_in_space(space[:, :k], k, self.seed) for k in ks)


def by_size(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same clusters, the largest first; of equal ones that of the earlier row.

    >>> by_size(np.array([7, 2, 2, 7, 2, 9])).tolist()
    [1, 0, 0, 1, 0, 2]
    """
    _, first, which, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[which]


def eigenvectors(graph: SparseMatrix, k: int, seed: int) -> Float[np.ndarray, "n k"]:
    """The eigenvectors of the largest eigenvalues of `D^-1/2 W D^-1/2`, the largest first.

    Source: Ng, Jordan and Weiss 2001.
    """
    n = graph.shape[0]
    degree = np.asarray(graph.sum(1)).ravel()
    scale = diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    normal = csr_matrix(scale @ graph @ scale)
    if n <= _DENSE or k >= n - 1:
        return np.linalg.eigh(normal.toarray())[1][:, ::-1][:, :k]
    start = np.random.default_rng(seed).standard_normal(n)
    values, vectors = eigsh(normal, k=k, which="LA", v0=start, tol=0)
    return vectors[:, np.argsort(-values, kind="stable")]


def _in_space(space: Float[np.ndarray, "n k"], k: int, seed: int) -> Int[np.ndarray, " n"]:
    from sklearn.cluster import KMeans

    norms = np.linalg.norm(space, axis=1, keepdims=True)
    rows = space / np.where(norms > 0, norms, 1)
    k = min(k, len(np.unique(rows.round(9), axis=0)))  # of fewer different rows k-means warns
    found = KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(rows)  # pyright: ignore[reportArgumentType]
    return np.asarray(found, dtype=np.int64)


def communities(graph: SparseMatrix, k: int | None, seed: int) -> Int[np.ndarray, " n"]:
    """Leiden communities; with `k` at the resolution that comes closest to so many.

    Raises:
        MissingFileError: if leidenalg is not installed.
    """
    upper = csr_matrix(graph).tocoo()
    once = upper.row < upper.col
    edges, weights = np.stack([upper.row[once], upper.col[once]], 1).astype(np.int64), upper.data[once]

    def at(resolution: float) -> Int[np.ndarray, " n"]:
        return leiden(
            graph.shape[0], edges, who="Leiden clustering", instead='another method: "spectral", "kmeans"',
            weights=weights, resolution=resolution, seed=seed,
        )  # fmt: skip

    best = at(1.0)
    if k is None:
        return best
    low, high = 1e-3, 1e3
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        labels = at(middle)
        best = min(best, labels, key=lambda found: abs(int(found.max()) + 1 - k))
        low, high = (middle, high) if labels.max() + 1 < k else (low, middle)
    return best


def spherical_kmeans(unit: SparseMatrix, k: int, seed: int, starts: int = _STARTS) -> Int[np.ndarray, " n"]:
    """Clusters of which each row is nearest by cosine to the mean of its own; the best of several starts.

    Source: Dhillon and Modha 2001; starts as in k-means++ (Arthur and Vassilvitskii 2007).
    """
    random = np.random.default_rng(seed)
    found = [_one_start(unit, k, random) for _ in range(starts)]
    return max(found, key=lambda pair: pair[0])[1]


def _one_start(unit: SparseMatrix, k: int, random: np.random.Generator) -> tuple[float, Int[np.ndarray, " n"]]:
    n = unit.shape[0]
    centres = unit[_spread(unit, k, random)]
    labels = np.full(n, -1)
    best = np.zeros(n)
    for _ in range(_ITERATIONS):
        cosines = _dense(unit @ centres.T)
        new = cosines.argmax(1)
        best = cosines[np.arange(n), new]
        counts = np.bincount(new, minlength=k)
        for empty in np.flatnonzero(counts == 0):  # takes the row that fits its cluster worst
            worst = int(np.where(counts[new] > 1, best, np.inf).argmin())
            counts[new[worst]] -= 1
            new[worst], best[worst], counts[empty] = empty, 1.0, 1
        if (new == labels).all():
            break
        labels = new
        centres = units(csr_matrix((np.ones(n), (labels, np.arange(n))), shape=(k, n)) @ unit)
    return float(best.sum()), labels


def _spread(unit: SparseMatrix, k: int, random: np.random.Generator) -> list[int]:
    """Rows far from each other: each is drawn with its distance to the nearest before it."""
    chosen = [int(random.integers(unit.shape[0]))]
    far = np.full(unit.shape[0], np.inf)
    for _ in range(k - 1):
        far = np.minimum(far, np.clip(1 - _dense(unit @ unit[chosen[-1:]].T)[:, 0], 0, None))
        far[chosen] = 0
        total = far.sum()
        rest = np.setdiff1d(np.arange(len(far)), chosen)
        chosen.append(int(random.choice(len(far), p=far / total) if total > 1e-12 else random.choice(rest)))
    return chosen


def _dense(product: SparseMatrix) -> Float[np.ndarray, "rows columns"]:
    return product.toarray()


Labeller = Callable[[SparseMatrix], Int[np.ndarray, " n"]]
"""What puts the rows of a matrix into clusters."""
