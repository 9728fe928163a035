"""LEACE: the smallest affine edit after which no affine predictor of a concept beats the constant."""

from __future__ import annotations

import torch

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError
from workbench.probes.erase.eraser import Eraser, eraser_of
from workbench.probes.erase.moments import ClassMoments

SMALLEST_CORRELATION = 1e-7
"""Singular values of the whitened cross-covariance below this are rounding, such as the one of indicators that sum
to 1."""


@checked
def fit_leace(moments: ClassMoments, *, shrinkage: float | None = None) -> Eraser:
    """The LEACE eraser of a concept with two classes or more.

    `x' = x - W^+ u u^T W (x - mean)`, with `W` the inverse root of the covariance and `u` the left singular vectors of
    `W S_xz`. No affine predictor of the classes then beats the constant on the rows of the moments, whatever the
    shrinkage is; shrinkage decides only how far rows move, which is never farther than by the orthogonal projection of
    equal rank.

    Args:
        moments: of the classes.
        shrinkage: of the covariance; None chooses it from the number of rows, see `ClassMoments.shrunk`.

    Raises:
        DegenerateInputError: if a class has no rows, or the classes have the same mean.

    Source: Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3, and EleutherAI's concept-erasure. Departures:
    singular values down to 1e-7 count, not 0.01, which leaves a rare class readable; the edit is kept as an orthonormal
    basis of what it writes and what is read for each, so no root of a singular value is taken; the total variance is
    not constrained, because with shrinkage towards the identity it never grows.
    """
    moments.require_classes("fit_leace")
    cross = moments.cross
    variances, axes = torch.linalg.eigh(moments.shrunk(shrinkage))
    kept = variances > variances[-1] * len(variances) * torch.finfo(variances.dtype).eps
    roots, axes = variances[kept].sqrt(), axes[:, kept]
    u, s, _ = torch.linalg.svd((axes.T @ cross) / roots[:, None], full_matrices=False)
    u = u[:, s > SMALLEST_CORRELATION]
    if not u.shape[1]:
        raise DegenerateInputError(
            f"fit_leace: the {len(moments.n)} classes have the same mean, so an affine predictor reads nothing and "
            "there is nothing to erase. Check the labels."
        )
    written, read = axes @ (roots[:, None] * u), (axes @ (u / roots[:, None])).T
    basis, inner = torch.linalg.qr(written)
    return eraser_of("LEACE", moments, inner @ read, basis.T.contiguous())
