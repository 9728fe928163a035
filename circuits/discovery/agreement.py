"""How stable clusters are: the same method on part of the documents, beside the same on shuffled vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csc_matrix, csr_matrix

from circuits.discovery.grouping import Labeller
from workbench.core.arguments import checked
from workbench.core.errors import require
from workbench.core.html import Shown
from workbench.core.progress import task
from workbench.core.similarity import SparseMatrix
from workbench.core.stats import SIGNED_SHARE, Estimate, sample_mean

if TYPE_CHECKING:
    import pandas as pd

SHARE = 0.8
"""Of the documents, so many are in a resample."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Stability(Shown):
    """Agreement of clusters with those of resamples.

    Attributes:
        ari: adjusted Rand index between the clusters of all samples and those of a resample, over resamples; 0 is
            chance, 1 is identity.
        null: the same for vectors of which every column was shuffled over samples: what a method finds where there is
            nothing.
        jaccard: per cluster, overlap with the cluster of a resample that is most alike, mean over resamples.
        jaccard_null: per cluster, the same when the resample's labels are shuffled over its samples.
        share: of the documents in a resample.
    """

    ari: Estimate
    null: Estimate
    jaccard: Float[np.ndarray, " clusters"]
    jaccard_null: Float[np.ndarray, " clusters"]
    share: float

    def frame(self) -> pd.DataFrame:
        """One row per cluster: jaccard, jaccard_null."""
        import pandas as pd

        return pd.DataFrame({"jaccard": self.jaccard, "jaccard_null": self.jaccard_null})

    def _shown_line(self) -> str:
        return f"ARI {' '.join(self.ari.shown())}; of shuffled vectors {' '.join(self.null.shown())}"


def adjusted_rand(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """Adjusted Rand index of two clusterings: 1 if they are the same, 0 on average by chance.

    >>> adjusted_rand(np.array([0, 0, 1, 1]), np.array([5, 5, 2, 2]))
    1.0
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(a, b))


def best_overlaps(
    a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"], n_clusters: int
) -> Float[np.ndarray, " clusters"]:
    """For each cluster of `a`, the largest Jaccard overlap with a cluster of `b`; nan for one without rows.

    >>> best_overlaps(np.array([0, 0, 0, 1]), np.array([3, 3, 4, 4]), 3)
    array([0.66666667, 0.5       ,        nan])
    """
    _, b = np.unique(b, return_inverse=True)
    both = np.zeros((n_clusters, b.max() + 1))
    np.add.at(both, (a, b), 1)
    union = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
    return np.where(both.sum(1) > 0, (both / np.maximum(union, 1)).max(1), np.nan)


def shuffled(matrix: SparseMatrix, seed: int) -> SparseMatrix:
    """The matrix with the values of every column moved to random rows: what is left is how common each entry is."""
    random, n = np.random.default_rng(seed), matrix.shape[0]
    columns = csc_matrix(matrix, copy=True)
    for start, stop in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        if stop > start:
            columns.indices[start:stop] = random.choice(n, stop - start, replace=False, shuffle=True)
    columns.has_sorted_indices = False
    return csr_matrix(columns)


def stability(
    matrix: SparseMatrix,
    labels: Int[np.ndarray, " n"],
    documents: Sequence[int],
    cluster: Labeller,
    *,
    resamples: int,
    seed: int = 0,
) -> Stability:
    """Clusters of random parts of the documents, compared with those of all.

    Args:
        matrix: a vector per sample.
        labels: clusters of all samples.
        documents: of each sample; samples of one document are drawn together.
        cluster: what makes the clusters.
        resamples: how many; at least 2.
        seed: of what is drawn.
    """
    require(resamples >= 2, f"resamples={resamples}", "an interval needs at least 2")
    random, docs = np.random.default_rng(seed), np.asarray(documents)
    nothing = shuffled(matrix, seed)
    values: dict[str, list[float]] = {"ari": [], "null": []}
    overlaps, chance = [], []
    n_clusters = int(labels.max()) + 1
    with task(total=2 * resamples + 1, description="stability of clusters", unit="clusterings") as bar:
        of_nothing = cluster(nothing)
        bar.advance()
        for _ in range(resamples):
            some = _part(docs, random)
            again = cluster(matrix[some])
            values["ari"].append(adjusted_rand(labels[some], again))
            overlaps.append(best_overlaps(labels[some], again, n_clusters))
            chance.append(best_overlaps(labels[some], random.permutation(again), n_clusters))
            bar.advance()
            values["null"].append(adjusted_rand(of_nothing[some], cluster(nothing[some])))
            bar.advance()
    ari, null = (
        sample_mean(values[name], unit="resamples", seed=seed, within=SIGNED_SHARE) for name in ("ari", "null")
    )
    return Stability(
        ari=ari, null=null, jaccard=_mean(overlaps), jaccard_null=_mean(chance), share=SHARE,
    )  # fmt: skip


def _part(documents: Int[np.ndarray, " n"], random: np.random.Generator) -> Int[np.ndarray, " some"]:
    """Rows of a random part of the documents; with a single document, of a random part of the rows."""
    known = np.unique(documents)
    units = documents if len(known) > 1 else np.arange(len(documents))
    known = np.unique(units)
    chosen = random.choice(known, max(1, round(SHARE * len(known))), replace=False)
    return np.flatnonzero(np.isin(units, chosen))


def _mean(rows: Sequence[Float[np.ndarray, " clusters"]]) -> Float[np.ndarray, " clusters"]:
    """Mean over the resamples in which a cluster has members."""
    table = np.stack(rows)
    counts = np.isfinite(table).sum(0)
    return np.where(counts > 0, np.nansum(table, 0) / np.maximum(counts, 1), np.nan)
