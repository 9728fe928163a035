"""Which directions and features are the same: activations first, cosines second and never without their null.

A cosine is no property of the model. The weights behind an RMSNorm can be divided by what its gain is multiplied by
without changing one logit, and a factorisation can be rescaled without changing one prediction; both change cosines at
will (Steck et al. 2024, arXiv 2403.05440). How large a chance cosine is depends on the width of the space and on the
number of directions. So features are matched by what they do on the same tokens where that is possible
(`workbench.saes.comparison.matching`, `correlations`), gains are folded (`fold_gain`), variants are named
(`cosine_views`), and a cosine comes with those of dictionaries that cannot match (`workbench.controls.overlap`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import setting

SparseMatrix: TypeAlias = Any  # of scipy, whose sparse arrays and matrices have no common type with `shape` and `data`

EXACT_ASSIGNMENT = 8192
"""Directions up to which the assignment is solved on the full matrix."""
CANDIDATE_FLOOR = 0.5
"""Above that, cosines below this count as this."""
BLOCK = 1024


def cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d_b"]) -> Float[Tensor, "n m"]:
    """Signed cosines between the rows of two matrices, in fp32; a zero row has cosine 0 with everything.

    Raises:
        ShapeError: if the rows have different widths.

    >>> cosines(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]))
    tensor([[ 1., -1.,  0.]])
    """
    if a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"cosines: rows of width {a.shape[1]} and {b.shape[1]}. Directions of different spaces have no cosine; "
            "compare features by their activations on the same tokens."
        )
    return normalize(a.float(), dim=1) @ normalize(b.float(), dim=1).T


@dataclass(frozen=True, eq=False)
class MaxCosines:
    """For each row, the largest signed cosine with a row of another matrix, and that row's index."""

    values: Float[Tensor, " n"]
    indices: Int[Tensor, " n"]


def max_cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d_b"], block: int = BLOCK) -> MaxCosines:
    """The nearest row of `b` for each row of `a`; memory grows with `block * m`, not with `n * m`.

    >>> max_cosines(torch.eye(2), torch.tensor([[0.0, 3.0], [0.0, -1.0]])).indices
    tensor([0, 0])
    """
    if not len(a) or not len(b):
        raise DegenerateInputError(f"max_cosines: {len(a)} and {len(b)} directions; each side needs at least one.")
    best = [cosines(part, b).max(dim=1) for part in a.split(block)]
    return MaxCosines(torch.cat([found.values for found in best]), torch.cat([found.indices for found in best]))


@dataclass(frozen=True, eq=False)
class Assignment:
    """A one-to-one matching of the largest possible sum.

    Attributes:
        columns: the column of each row; -1 for a row without one.
        scores: the score of each pair; 0 for a row without a column.
        method: "exact", or "exact with scores below 0.5 counted as 0.5": what the sum is the largest of.
    """

    columns: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]
    method: str

    @property
    def total(self) -> float:
        """Sum of the scores of the pairs."""
        return float(self.scores.double().sum())


def assign(scores: Float[Tensor, "n m"]) -> Assignment:
    """The assignment of the largest sum on a full matrix (Hungarian); with more rows than columns some stay alone.

    >>> assign(torch.tensor([[0.9, 0.8], [0.8, 0.1]])).columns  # 0.8 + 0.8 > 0.9 + 0.1
    tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    if not torch.isfinite(scores).all():
        raise InvalidInputError(f"assign: scores of shape {tuple(scores.shape)} are not all finite. Mend them first.")
    rows, found = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
    columns, values = torch.full((len(scores),), -1), torch.zeros(len(scores))
    columns[rows] = torch.from_numpy(found)
    values[rows] = scores.cpu()[rows, found].float()
    return Assignment(columns, values, "exact")


def assign_candidates(candidates: SparseMatrix, floor: float) -> Assignment:
    """The assignment of the largest sum where every score below `floor` counts as `floor`.

    Pairs at the floor are left out, so this is a matching on the candidates alone, which sparse matrices can hold.
    """
    from scipy.sparse import coo_array, hstack, identity
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    pairs: SparseMatrix = coo_array(candidates)
    n, m = pairs.shape
    above = pairs.data > floor
    # A column of its own for each row means "alone". One is added everywhere, since explicit zeros would be no edges.
    gains = coo_array((pairs.data[above] - floor + 1, (pairs.row[above], pairs.col[above])), shape=(n, m))
    rows, found = min_weight_full_bipartite_matching(hstack([gains, identity(n)]).tocsr(), maximize=True)
    columns, values = torch.full((n,), -1), torch.zeros(n)
    real = found < m
    columns[rows[real]] = torch.from_numpy(found[real]).long()
    values[rows[real]] = torch.from_numpy(entries(pairs, rows[real], found[real])).float()
    return Assignment(columns, values, f"exact with scores below {setting(floor)} counted as {setting(floor)}")


def entries(matrix: SparseMatrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Single entries of a scipy sparse matrix, one per pair of row and column; 0 where nothing is stored."""
    from scipy.sparse import coo_array

    pairs: SparseMatrix = coo_array(matrix)
    keys = pairs.row.astype(np.int64) * pairs.shape[1] + pairs.col
    order = np.argsort(keys)
    asked = rows.astype(np.int64) * pairs.shape[1] + columns
    at = np.minimum(np.searchsorted(keys[order], asked), max(0, len(keys) - 1))
    if not len(keys):
        return np.zeros(len(asked))
    return np.where(keys[order[at]] == asked, pairs.data[order[at]], 0.0)


def assign_directions(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d_b"], *, floor: float = CANDIDATE_FLOOR, block: int = BLOCK
) -> Assignment:
    """One-to-one matching of directions by signed cosine; its `method` says how it was solved.

    Up to 8192 directions the full matrix is solved. Above, cosines below `floor` count as `floor`, which keeps the
    problem sparse and cannot change what is said about cosines above it other than by which pairs below make way.
    """
    if max(len(a), len(b)) <= EXACT_ASSIGNMENT:
        return assign(cosines(a, b))
    return assign_candidates(cosines_above(a, b, floor, block=block), floor)


def cosines_above(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d_b"], floor: float, *, block: int = BLOCK
) -> SparseMatrix:
    """The cosines above `floor` as a scipy sparse matrix, found block by block."""
    from scipy.sparse import coo_array

    rows, columns, values = [], [], []
    for start in range(0, len(a), block):
        part = cosines(a[start : start + block], b)
        row, column = (part > floor).nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(column)
        values.append(part[row, column])
    where = torch.cat(rows).numpy(), torch.cat(columns).numpy()
    return coo_array((torch.cat(values).double().numpy(), where), shape=(len(a), len(b))).tocsr()


def fold_gain(
    x: Float[Tensor, "n d"], gain: Float[Tensor, " d_gain"], kind: Literal["reads", "states"]
) -> Float[Tensor, "n d"]:
    """Directions or states in the space before the gain of a norm, where they don't depend on how it was chosen.

    A gain `g` and matrices `W` behind it compute the same as `g * D` and `W / D`. Of what stands behind the norm,
    "reads" (rows of `W` that read it) are multiplied by the gain and "states" (its output) divided by it.

    Raises:
        ShapeError: if the gain has another width.
        DegenerateInputError: for states where a gain is zero, which can't be undone.

    >>> fold_gain(torch.tensor([[2.0, 3.0]]), torch.tensor([0.5, 2.0]), "reads")
    tensor([[1., 6.]])
    """
    if gain.shape[0] != x.shape[1]:
        raise ShapeError(f"fold_gain: gain of {gain.shape[0]}, rows of width {x.shape[1]}. Give the gain of this norm.")
    if kind == "reads":
        return x.float() * gain.float()
    if bool((gain == 0).any()):
        dims = (gain == 0).nonzero().flatten().tolist()
        raise DegenerateInputError(f"fold_gain: the gain is zero at {dims[:10]}. Leave these dimensions out.")
    return x.float() / gain.float()


def cosine_views(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d_b"],
    reference: Float[Tensor, "rows d_ref"] | None = None,
    *,
    ridge: float = 1e-3,
) -> dict[str, Float[Tensor, "n m"]]:
    """Cosines of the same rows in the spaces that one may mean, by name.

    "raw"; "centred", with the mean row of each side taken off; with a reference also "whitened", in the inner product
    `x C^-1 y`, C the covariance of the reference rows (activations: Mahalanobis; rows of the unembedding: the causal
    inner product). Show them together: where they differ, the raw cosine measured a common offset or a few dimensions.
    """
    views = {"raw": cosines(a, b), "centred": cosines(a.float() - a.float().mean(0), b.float() - b.float().mean(0))}
    if reference is None:
        return views
    if len(reference) < 2:
        raise DegenerateInputError(f"cosine_views: a reference of {len(reference)} rows has no covariance; give more.")
    centred = reference.double() - reference.double().mean(0)
    covariance = centred.T @ centred / (len(reference) - 1)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
    factor = torch.linalg.cholesky(covariance)

    def whitened(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, x.double().T, upper=False).T

    return views | {"whitened": cosines(whitened(a), whitened(b))}


def correlations(a: Float[Tensor, "rows n"], b: Float[Tensor, "rows_b m"]) -> Float[Tensor, "n m"]:
    """Correlation over the rows of each column of `a` with each of `b`, in fp64; 0 where a column is constant.

    >>> correlations(torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0, 9.0], [7.0, 9.0]])).round()
    tensor([[1., 0.]], dtype=torch.float64)
    """
    if len(a) != len(b):
        raise ShapeError(f"correlations: {len(a)} and {len(b)} rows; give both sides on the same tokens.")
    x, y = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    return normalize(x, dim=0).T @ normalize(y, dim=0)
