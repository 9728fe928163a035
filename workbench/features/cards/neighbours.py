"""Features that are close: by their activations on the same tokens, and by decoder cosine, each with its null."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.controls.overlap import NULL_SEED, NULLS
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.similarity import SparseMatrix, cosines
from workbench.features.card import Neighbour
from workbench.features.passes.coactivation import CoSample

BLOCK_ENTRIES = 2**22
"""Entries of a dense block of the co-activation matrix, or of cosines: 32 MB in fp64."""
NULL_ROWS = 512
"""Features from which a null is estimated."""
NULL_QUANTILE = 0.95


@checked
@dataclass(frozen=True, kw_only=True)
class NeighbourOptions(OneLine):
    """How neighbours are found.

    Attributes:
        n: neighbours of each kind.
        min_fired: sampled tokens on which both features must fire to be compared: two that fire once correlate fully.
        seed: of the nulls.
    """

    n: int = 5
    min_fired: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 0 or self.min_fired < 1:
            raise InvalidInputError(f"{self}: n may not be negative, min_fired is at least 1.")


@checked
def activation_neighbours(
    co: CoSample, ids: Int[Tensor, " features"], options: NeighbourOptions | None = None
) -> list[tuple[Neighbour, ...]]:
    """For each feature those whose activations correlate most with its own, with the overlap of firing.

    Pearson correlation over the sampled tokens, zeros included, in fp64; only features that fire together at all are
    neighbours. The null is the 95th percentile of the largest correlation that features reach when the tokens of one
    side are shuffled. Blocks of features are taken in turn, so memory grows with the sample, not with features squared.
    """
    options = options or NeighbourOptions()
    often, numbers = _Firing.of(co, options.min_fired), ids.tolist()
    null = _activation_null(often, options)
    neighbours: list[tuple[Neighbour, ...]] = []
    for rows in _blocks(co.n_features, co.n_features):
        correlation, together = often.compare(rows, often.by_token)
        correlation[together <= 0] = -np.inf
        jaccard = together / np.maximum(often.fired[rows][:, None] + often.fired - together, 1)
        neighbours += [
            tuple(Neighbour(numbers[j], "activation", value, float(jaccard[i, j]), null) for value, j in near)
            for i, near in enumerate(_nearest(torch.from_numpy(correlation), rows, options.n))
        ]
    return neighbours


@checked
def decoder_neighbours(
    W_dec: Float[Tensor, "d_sae d_out"], ids: Int[Tensor, " features"], options: NeighbourOptions | None = None
) -> list[tuple[Neighbour, ...]]:
    """For each chosen feature the features of the whole SAE whose decoder rows have the largest signed cosine with its.

    A row of zeros has no direction: it has no neighbours and is nobody's.
    The null is the 95th percentile of the largest cosine with a dictionary that holds no match: the larger of random
    directions and of the decoder with each dimension shuffled (`workbench.core.similarity`). A cosine is no property
    of the model: where activations disagree with it, believe the activations.
    """
    options = options or NeighbourOptions()
    W = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=1)
    is_zero = (W == 0).all(dim=1)
    null = 0.0 if bool(is_zero.all()) else _decoder_null(W[~is_zero], options)
    neighbours: list[tuple[Neighbour, ...]] = []
    for block in _blocks(len(ids), len(W)):
        rows = ids[torch.from_numpy(block)]
        cosine = W[rows] @ W.T
        cosine[is_zero[rows]] = -torch.inf
        cosine[:, is_zero] = -torch.inf
        nearest = _nearest(cosine, rows.numpy(), options.n)
        neighbours += [tuple(Neighbour(j, "decoder", value, None, null) for value, j in near) for near in nearest]
    return neighbours


def _nearest(closeness: Float[Tensor, "rows columns"], own: np.ndarray, n: int) -> list[list[tuple[float, int]]]:
    """The n largest values of each row with their columns, its own and -inf left out; of equal values the first."""
    closeness[torch.arange(len(own)), torch.from_numpy(own)] = -torch.inf
    best = closeness.topk(min(n, closeness.shape[1] - 1), dim=1)
    pairs = (zip(*row, strict=True) for row in zip(best.values.tolist(), best.indices.tolist(), strict=True))
    return [sorted((p for p in row if math.isfinite(p[0])), key=lambda p: (-p[0], p[1])) for row in pairs]


@dataclass(frozen=True, eq=False)
class _Firing:
    """Sparse activations `(features, tokens)` of features that fire often enough; the rows of the others are empty."""

    acts: SparseMatrix
    fires: SparseMatrix
    by_token: tuple[SparseMatrix, SparseMatrix]
    fired: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    n_tokens: int

    @classmethod
    def of(cls, co: CoSample, min_fired: int) -> _Firing:
        from scipy.sparse import csr_array

        n = max(co.n_tokens, 1)
        counts = torch.bincount(co.feature, minlength=co.n_features)
        kept = (counts >= min_fired)[co.feature]
        where = (co.feature[kept].numpy(), co.token[kept].numpy())
        acts = csr_array((co.value[kept].double().numpy(), where), shape=(co.n_features, n))
        fires = csr_array((np.ones(int(kept.sum())), where), shape=acts.shape)
        mean = np.asarray(acts.sum(axis=1)).ravel() / n
        square = np.asarray((acts * acts).sum(axis=1)).ravel() / n
        std = np.sqrt(np.maximum(square - mean**2, 0))
        fired = np.asarray(fires.sum(axis=1)).ravel()
        return cls(acts, fires, (acts.T.tocsr(), fires.T.tocsr()), fired, mean, std, n)

    def compare(self, rows: np.ndarray, other: tuple[SparseMatrix, SparseMatrix]) -> tuple[np.ndarray, np.ndarray]:
        """Correlations and common tokens of some features with all; -inf where a feature does not vary."""
        products = (self.acts[rows] @ other[0]).toarray()
        together = (self.fires[rows] @ other[1]).toarray()
        spread = self.std[rows][:, None] * self.std[None]
        covariance = products / self.n_tokens - self.mean[rows][:, None] * self.mean[None]
        return np.divide(covariance, spread, out=np.full_like(spread, -np.inf), where=spread > 0), together


def _activation_null(often: _Firing, options: NeighbourOptions) -> float:
    alive = (often.std > 0).nonzero()[0]
    if len(alive) < 2:
        return 0.0
    random = np.random.default_rng(options.seed)
    rows = np.sort(random.permutation(alive)[:NULL_ROWS])
    order = random.permutation(often.n_tokens)
    shuffled = (often.by_token[0][order], often.by_token[1][order])
    best = [often.compare(rows[block], shuffled)[0].max(axis=1) for block in _blocks(len(rows), len(often.std))]
    return float(np.quantile(np.concatenate(best), NULL_QUANTILE))


def _decoder_null(W: Tensor, options: NeighbourOptions) -> float:
    random = torch.Generator().manual_seed(options.seed)
    rows = W[torch.randperm(len(W), generator=random)[:NULL_ROWS]]
    worst = 0.0
    for make in NULLS.values():
        null = make(W, NULL_SEED + options.seed)
        best = torch.cat([cosines(rows[block], null).amax(1) for block in _blocks(len(rows), len(W))])
        worst = max(worst, float(best.double().quantile(NULL_QUANTILE)))
    return worst


def _blocks(n: int, width: int) -> list[np.ndarray]:
    size = max(1, BLOCK_ENTRIES // max(width, 1))
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]
