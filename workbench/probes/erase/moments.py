"""Counts, means and covariances of activations by class, summed over chunks of rows in one pass."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import counted, setting


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class ClassMoments(OneLine):
    """What the classes of a concept look like, up to their second moments, in fp64.

    `a + b` are the moments of the rows of both. Each part is centred on its own means before products are taken, so
    that large means cost no digits. It holds one `(d, d)` matrix per class, however many rows it has seen.

    Attributes:
        n: rows of each class.
        means: mean of each class; zero for a class without rows.
        scatter: sum over the rows of a class of `(x - mean) (x - mean)^T`.

    >>> one = ClassMoments.of(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 2)
    >>> both = one + ClassMoments.of(torch.tensor([[8.0]]), torch.tensor([1]), 2)
    >>> both.n.tolist(), both.mean.tolist(), both.covariance_of(0).tolist()  # over n: ((1 - 2)^2 + (3 - 2)^2) / 2
    ([2, 1], [4.0], [[1.0]])
    """

    n: Int[Tensor, " classes"]
    means: Float[Tensor, "classes d"]
    scatter: Float[Tensor, "classes d d"]

    @classmethod
    def of(cls, x: Float[Tensor, "rows d"], labels: Int[Tensor, " labels"], n_classes: int) -> ClassMoments:
        """Moments of some rows.

        Args:
            x: activations, such as one mean per text or one row per token.
            labels: class of each row, counted from 0.
            n_classes: how many classes there are, also such as are not among these rows.

        Raises:
            ShapeError: if rows and labels do not pair up.
            InvalidInputError: for labels outside the classes, fewer than two classes, or non-finite activations.
        """
        _check_rows(x, labels, n_classes)
        rows, labels = x.detach().double(), labels.to(x.device)
        n = torch.bincount(labels, minlength=n_classes)
        sums = rows.new_zeros(n_classes, x.shape[1]).index_add_(0, labels, rows)
        means = sums / n.clamp_min(1)[:, None]
        scatter = torch.stack([_gram(rows[labels == k] - means[k]) for k in range(n_classes)])
        return cls(n=n, means=means, scatter=scatter)

    @classmethod
    def over(
        cls, chunks: Iterable[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]], n_classes: int
    ) -> ClassMoments:
        """Moments of a stream of rows with their labels, read once.

        Raises:
            DegenerateInputError: if there is no chunk.
        """
        parts = (cls.of(x, labels, n_classes) for x, labels in chunks)
        first = next(parts, None)
        if first is None:
            raise DegenerateInputError("ClassMoments.over: there is no chunk of rows. Give at least one.")
        return functools.reduce(ClassMoments.__add__, parts, first)

    def __add__(self, other: ClassMoments) -> ClassMoments:
        if self.means.shape != other.means.shape:
            raise ShapeError(
                f"ClassMoments: means of shape {tuple(self.means.shape)} and {tuple(other.means.shape)} can't be "
                "added; give parts with the same classes and width."
            )
        device = self.means.device
        n = self.n + other.n.to(device)
        gap, share = other.means.to(device) - self.means, other.n.to(device) / n.clamp_min(1)
        between = (self.n * share)[:, None, None] * gap[:, :, None] * gap[:, None, :]
        return ClassMoments(
            n=n, means=self.means + share[:, None] * gap, scatter=self.scatter + other.scatter.to(device) + between
        )

    @property
    def width(self) -> int:
        """Size of one row."""
        return self.means.shape[1]

    @property
    def shares(self) -> Float[Tensor, " classes"]:
        """Share of the rows that each class has."""
        return self.n.double() / self.n.sum()

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of all rows."""
        return self.shares @ self.means

    @property
    def within(self) -> Float[Tensor, "d d"]:
        """Covariance within the classes, over n."""
        return self.scatter.sum(0) / self.n.sum()

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance of all rows, over n: within the classes and between them."""
        gaps = self.means - self.mean
        return self.within + (self.shares[:, None] * gaps).T @ gaps

    @property
    def cross(self) -> Float[Tensor, "d classes"]:
        """Covariance of the rows with the indicator of each class."""
        return (self.shares[:, None] * (self.means - self.mean)).T

    def covariance_of(self, label: int) -> Float[Tensor, "d d"]:
        """Covariance of one class, over n."""
        return self.scatter[label] / self.n[label]

    def shrunk(self, shrinkage: float | None = None) -> Float[Tensor, "d d"]:
        """The covariance of all rows, shrunk towards a multiple of the identity with the same trace.

        Args:
            shrinkage: share of the identity; None takes the oracle-approximating share of Chen et al. 2010, which
                goes to zero as rows outnumber dimensions.

        >>> m = ClassMoments.of(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.tensor([0, 1]), 2)
        >>> m.shrunk(0.5)  # half of diag(4, 0) and half of diag(2, 2)
        tensor([[3., 0.],
                [0., 1.]], dtype=torch.float64)
        """
        s, d = self.covariance, self.width
        share = _oracle_approximating(s, int(self.n.sum())) if shrinkage is None else shrinkage
        if not 0 <= share <= 1:
            raise InvalidInputError(f"shrunk(shrinkage={setting(share)}): give a share from 0 to 1, or None.")
        return (1 - share) * s + share * (s.trace() / d) * torch.eye(d, dtype=s.dtype, device=s.device)

    def mapped(self, weight: Float[Tensor, "d d"], bias: Float[Tensor, " d"], label: int | None = None) -> ClassMoments:
        """Moments of the rows after `x W^T + b`, for all classes or a single one; exact, without the rows."""
        chosen = torch.arange(len(self.n), device=self.n.device) == label if label is not None else self.n >= 0
        means = torch.where(chosen[:, None], self.means @ weight.T + bias, self.means)
        return replace(
            self,
            means=means,
            scatter=torch.where(chosen[:, None, None], weight @ self.scatter @ weight.T, self.scatter),
        )

    def class_r2(self) -> float:
        """Share of the variance of the class indicators that an affine map of the rows explains.

        0 says that no affine predictor beats the constant. The regression uses the shrunk covariance, so with more
        dimensions than rows it is not 1 by itself.
        """
        self.require_classes("class_r2")
        cross = self.cross
        w = torch.linalg.solve(self.shrunk() + _tiny(self.covariance), cross)
        explained = 2 * (w * cross).sum() - ((self.covariance @ w) * w).sum()
        return float((explained / (self.shares * (1 - self.shares)).sum()).clamp_min(0))

    def require_classes(self, what: str) -> None:
        """Raises DegenerateInputError unless two classes or more have rows."""
        empty = [k for k, n in enumerate(self.n.tolist()) if n == 0]
        if empty:
            raise DegenerateInputError(
                f"{what}: no row of {counted(len(empty), 'classes')} ({first_few(empty)}); the others have "
                f"{first_few(n for n in self.n.tolist() if n)} rows. Give rows of each, or fewer classes."
            )


def _gram(centred: Float[Tensor, "rows d"]) -> Float[Tensor, "d d"]:
    return centred.T @ centred


def _tiny(s: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A ridge of rounding size, so that dimensions without variance can be solved for."""
    size = (s.trace() / len(s)).clamp_min(torch.finfo(s.dtype).tiny) * 1e-12
    return size * torch.eye(len(s), dtype=s.dtype, device=s.device)


def _oracle_approximating(s: Float[Tensor, "d d"], n: int) -> float:
    """Chen, Wiesel, Eldar and Hero 2010, equation 23, in the simpler form that scikit-learn uses."""
    d, mean_square, mean_variance = len(s), float(s.square().mean()), float(s.trace() / len(s))
    spread = (n + 1) * (mean_square - mean_variance**2 / d)
    return 1.0 if spread <= 0 else min(1.0, (mean_square + mean_variance**2) / spread)


def _check_rows(x: Tensor, labels: Tensor, n_classes: int) -> None:
    if x.shape[0] != labels.shape[0]:
        raise ShapeError(
            f"ClassMoments: {counted(x.shape[0], 'rows')} and {counted(labels.shape[0], 'labels')}; they must pair up."
        )
    if n_classes < 2:
        raise InvalidInputError(f"ClassMoments(n_classes={n_classes}): a concept has 2 classes or more.")
    outside = sorted(set(labels.unique().tolist()) - set(range(n_classes)))
    if outside:
        raise InvalidInputError(
            f"ClassMoments: labels {first_few(outside)} with n_classes={n_classes}; give labels from 0 to "
            f"{n_classes - 1}."
        )
    if not bool(torch.isfinite(x).all()):
        raise InvalidInputError(
            f"ClassMoments: activations of shape {tuple(x.shape)} hold non-finite values. Leave those rows out."
        )
