"""Linear probes: L2-regularised logistic regression on the mean-pooled activations of a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.stats import Estimate, wilson


@checked
@dataclass(frozen=True, eq=False)
class Probe(Shown):
    """A linear classifier of two classes; class 1 where `x @ w + b > 0`.

    Attributes:
        w: weights in the units of the raw activations (standardisation is folded in).
        b: bias.
        site: where the activations were read.
        accuracy: cross-validated accuracy on the training rows, or None if it was not asked for.
        shuffled: the same after shuffling the labels; what a probe reaches without a signal.
        groups: cross-validated accuracy per named group of training rows.
    """

    w: Float[Tensor, " d"]
    b: float
    site: str
    accuracy: Estimate | None = None
    shuffled: Estimate | None = None
    groups: tuple[tuple[str, Estimate], ...] = ()

    def logit(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """Log-odds of class 1.

        >>> Probe(torch.tensor([1.0, 0.0]), -0.5, "resid_post.0").logit(torch.tensor([[2.0, 9.0]]))  # 2 * 1 - 0.5
        tensor([1.5000])
        """
        return x.to(self.w) @ self.w + self.b

    def predict(self, x: Float[Tensor, "rows d"]) -> Int[Tensor, " rows"]:
        """The class, 0 or 1, of each row."""
        return (self.logit(x) > 0).long()


@checked
@dataclass(frozen=True, kw_only=True)
class ProbeOptions(OneLine):
    """How a probe is fitted.

    Attributes:
        l2: strength of `l2 / 2 * |w|^2` against the summed log loss, on standardised activations.
        folds: folds of the cross-validation; 0 leaves it out.
        seed: decides the folds and the shuffled labels.
    """

    l2: float = 1.0
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.l2 <= 0:
            raise InvalidInputError(f"ProbeOptions(l2={self.l2}): needs a value above 0, such as 1.0.")
        if self.folds < 0 or self.folds == 1:
            raise InvalidInputError(f"ProbeOptions(folds={self.folds}): needs 0 (no cross-validation) or at least 2.")


@checked
def mean_pool(x: Float[Tensor, "batch pos d"], keep: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch d"]:
    """Mean over the kept tokens of each row, in fp32.

    Raises:
        DegenerateInputError: if a row keeps no token.

    >>> mean_pool(torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[False, True, True]]))  # (1 + 3) / 2
    tensor([[2.]])
    """
    keep = keep.to(x.device)
    counts = keep.sum(dim=1, keepdim=True)
    if not bool((counts > 0).all()):
        raise DegenerateInputError("mean_pool: a row keeps no token, so it has no mean. Check the mask.")
    # masked_fill and not a product: padding may hold non-finite values.
    return x.float().masked_fill(~keep[..., None], 0.0).sum(dim=1) / counts


@checked
def fit_probe(
    x: Float[Tensor, "rows d"],
    labels: Int[Tensor, " labels"],
    site: str,
    *,
    groups: tuple[str, ...] | None = None,
    options: ProbeOptions | None = None,
) -> Probe:
    """The L2 logistic probe of two classes.

    Each dimension is standardised first, so that massive activations do not decide what the penalty means; the scale
    is folded into `w`. Solved to convergence by Newton's method, so the result does not depend on a seed.

    Args:
        x: pooled activations.
        labels: 0 or 1 per row.
        site: where `x` was read.
        groups: name of each row's group, for the accuracy per group.
        options: penalty and cross-validation.

    Raises:
        ShapeError: if rows and labels do not pair up.
        InvalidInputError: for labels other than 0 and 1.
        DegenerateInputError: if only one class is there.
    """
    options = options or ProbeOptions()
    if x.shape[0] != labels.shape[0] or (groups is not None and len(groups) != len(labels)):
        raise ShapeError(
            f"fit_probe: {x.shape[0]} rows and {labels.shape[0]} labels must pair up, groups too if given."
        )
    if not set(labels.unique().tolist()) <= {0, 1}:
        raise InvalidInputError(f"fit_probe: labels are {first_few(labels.unique().tolist())}; give 0 and 1.")
    rows, y = x.double().cpu().numpy(), labels.cpu().numpy()
    if len(np.unique(y)) < 2:
        raise DegenerateInputError(f"fit_probe: all {len(y)} labels are {int(y[0])}; a probe needs both classes.")
    w, b = _logistic(rows, y, options.l2)
    fitted = Probe(torch.as_tensor(w, dtype=torch.float32), b, site)
    if not options.folds:
        return fitted
    correct = _cross_validated(rows, y, options)
    shuffled = _cross_validated(rows, np.random.default_rng(options.seed).permutation(y), options)
    names = tuple(dict.fromkeys(groups or ()))
    of_group = [(name, correct[[g == name for g in groups or ()]]) for name in names]
    return Probe(
        fitted.w,
        fitted.b,
        site,
        _share(correct),
        _share(shuffled),
        tuple((name, _share(hits)) for name, hits in of_group),
    )


def _share(correct: np.ndarray) -> Estimate:
    return wilson(int(correct.sum()), len(correct))


def _logistic(x: np.ndarray, y: np.ndarray, l2: float) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0
    # With an L2 penalty the solution lies in the span of the rows, which are fewer than the dimensions.
    u, s, vt = np.linalg.svd((x - centre) / scale, full_matrices=False)
    model = LogisticRegression(C=1.0 / l2, solver="newton-cholesky", tol=1e-8).fit(u * s, y)
    w = (model.coef_[0] @ vt) / scale
    return w, float(model.intercept_[0] - centre @ w)


def _cross_validated(x: np.ndarray, y: np.ndarray, options: ProbeOptions) -> np.ndarray:
    """Whether each row is classified rightly by the probe that was fitted without it; folds are stratified."""
    from sklearn.model_selection import StratifiedKFold

    smallest = int(np.bincount(y).min())
    if smallest < options.folds:
        raise DegenerateInputError(
            f"fit_probe: {options.folds} folds need as many rows of each class; the smaller has {smallest}. Use "
            "fewer folds."
        )
    correct = np.zeros(len(y), dtype=bool)
    for train, held in StratifiedKFold(options.folds, shuffle=True, random_state=options.seed).split(x, y):
        w, b = _logistic(x[train], y[train], options.l2)
        correct[held] = (x[held] @ w + b > 0) == (y[held] == 1)
    return correct
