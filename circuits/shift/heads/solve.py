"""Penalised softmax regression of weighted rows, solved to convergence, and the same by epochs of gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

Rows = Float[np.ndarray, "rows d"]
Labels = Int[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class Linear:
    """`x W^T + b`; of two classes the first has the logit 0.

    Attributes:
        weight: W, one row per class.
        bias: b.
    """

    weight: Float[np.ndarray, "classes d"]
    bias: Float[np.ndarray, " classes"]

    def __call__(self, x: Rows) -> Float[np.ndarray, "rows classes"]:
        """Logits of each row."""
        return x @ self.weight.T + self.bias

    def predict(self, x: Rows) -> Labels:
        """Class of each row."""
        return self(x).argmax(axis=1)


@dataclass(frozen=True, eq=False)
class Scale:
    """Centre and scale of each dimension, so that a penalty means the same for all of them.

    >>> z = Scale.of(np.array([[0.0, 7.0], [4.0, 7.0]]))(np.array([[4.0, 7.0]]))  # (4 - 2) / 2; no spread: divided by 1
    >>> z.tolist()
    [[1.0, 0.0]]
    """

    centre: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]

    @classmethod
    def of(cls, x: Rows) -> Scale:
        """That of some rows; a dimension without spread keeps its scale."""
        spread = x.std(axis=0)
        return cls(x.mean(axis=0), np.where(spread > 0, spread, 1.0))

    def __call__(self, x: Rows) -> Rows:
        """The rows centred and scaled."""
        return (x - self.centre) / self.scale

    def folded(self, head: Linear) -> Linear:
        """The same head for rows that are not scaled."""
        weight = head.weight / self.scale
        return Linear(weight, head.bias - weight @ self.centre)


def cross_entropy(logits: Float[np.ndarray, "rows classes"], y: Labels) -> Float[np.ndarray, " rows"]:
    """Loss of each row, in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]


def log_probabilities(logits: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Log softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def fit_softmax(
    x: Rows,
    y: Labels,
    classes: int,
    *,
    l2: float,
    weights: Float[np.ndarray, " rows"] | None = None,
    offset: Float[np.ndarray, "rows classes"] | None = None,
    start: Linear | None = None,
) -> Linear:
    """Minimises `sum_i weight_i CE_i + l2 / 2 |W|^2`; the bias is not penalised.

    Args:
        x: scaled rows.
        y: their classes.
        classes: how many there are.
        l2: strength of the penalty.
        weights: of the rows; by default 1.
        offset: added to the logits of each row, and no part of the result.
        start: where to start; the minimum does not depend on it.
    """
    from scipy.optimize import minimize

    weights = np.ones(len(y)) if weights is None else weights
    total, d = weights.sum(), x.shape[1]
    first = 1 if classes == 2 else 0  # of two classes only the difference of the logits counts
    fixed = np.zeros((len(y), classes)) if offset is None else offset
    place = (np.arange(len(y)), y)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        free = theta.reshape(classes - first, d + 1)
        logits = fixed.copy()
        logits[:, first:] += x @ free[:, :d].T + free[:, d]
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        sums = p.sum(axis=1)
        value = weights @ (np.log(sums) - logits[place]) + 0.5 * l2 * (free[:, :d] ** 2).sum()
        p /= sums[:, None]
        p[place] -= 1
        error = weights[:, None] * p[:, first:]
        slope = np.column_stack([error.T @ x + l2 * free[:, :d], error.sum(axis=0)])
        return value / total, slope.ravel() / total

    at = np.zeros((classes - first) * (d + 1))
    if start is not None:
        at = np.column_stack([start.weight, start.bias])[first:].ravel()
    options = {"maxiter": 2000, "gtol": 1e-7, "ftol": 1e-13}
    free = minimize(loss, at, jac=True, method="L-BFGS-B", options=options).x.reshape(-1, d + 1)
    free = np.concatenate([np.zeros((first, d + 1)), free])
    return Linear(free[:, :d].copy(), free[:, d].copy())


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Stochastic gradient descent with momentum on scaled rows.

    Attributes:
        lr: step size.
        weight_decay: `weight_decay / 2 |W|^2` is added to the mean loss of a batch.
        batch: rows per step.
        momentum: share of the last step that is kept.
    """

    lr: float = 0.01
    weight_decay: float = 0.01
    batch: int = 64
    momentum: float = 0.9


class DescentRun:
    """A head on its way; which rows an epoch goes through may differ from one to the next."""

    def __init__(self, x: Rows, y: Labels, classes: int, how: Descent, seed: int) -> None:
        self._x, self._y = torch.from_numpy(x), torch.from_numpy(y)
        self._how, self._random = how, torch.Generator().manual_seed(seed)
        self._theta = torch.zeros(classes, x.shape[1] + 1, dtype=torch.double)
        self._step = torch.zeros_like(self._theta)

    def epochs(self, n: int, rows: Int[np.ndarray, " chosen"]) -> Linear:
        """Goes n times through these rows, each time in another order."""
        x, y = self._x[rows], self._y[rows]
        design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.double)], dim=1)
        onehot = torch.nn.functional.one_hot(y, len(self._theta)).double()
        decay = torch.full_like(self._theta, self._how.weight_decay)
        decay[:, -1] = 0
        for _ in range(n):
            for part in torch.randperm(len(x), generator=self._random).split(self._how.batch):
                h = design[part]
                error = (h @ self._theta.T).softmax(dim=1) - onehot[part]
                slope = error.T @ h / len(part) + decay * self._theta
                self._step = self._how.momentum * self._step + slope
                self._theta = self._theta - self._how.lr * self._step
        return Linear(self._theta[:, :-1].numpy().copy(), self._theta[:, -1].numpy().copy())
