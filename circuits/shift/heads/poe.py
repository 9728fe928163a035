"""PoE: a head that learns what a weak model does not already explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Scale, fit_softmax, log_probabilities
from workbench.core.arguments import checked
from workbench.core.errors import ShapeError
from workbench.core.numbers import counted
from workbench.core.stats import wilson


@HEADS.register("PoE")
@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class PoE(HeadMethod):
    """Product of experts: minimises `CE(softmax(log p_weak + log p))` and predicts with p alone.

    The weak model is frozen: a head on the first principal components of the features, or on features of its own.
    Where both heads read the same features and are linear, the sum of their logits is what ERM finds, so the head is
    ERM less the weak model: what it does is decided by what the weak model is kept from learning.

    Attributes:
        weak_components: principal components that the weak model reads.
        weak_x: features of the training rows for the weak model, such as counts of words, in place of the components.
        own_loss: weight of `CE(p)`, the head's loss without the weak model.
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised features.

    Source: Sanh et al. 2021 (arXiv 2012.01300).
    """

    name: ClassVar[str] = "PoE"
    regime: ClassVar[Regime] = "R3"
    information: ClassVar[str] = "labels of the training rows; that the attribute is easier to learn than the label"
    weak_components: int = 1
    weak_x: Float[Tensor, "rows k"] | None = None
    own_loss: float = 0.0
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_above("PoE", 0, own_loss=self.own_loss, l2=self.l2)
        require_above("PoE", 1, weak_components=self.weak_components)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head that the weak model is multiplied with."""
        x, y = rows.arrays()
        scale = Scale.of(x)
        z, read = scale(x), self._weak_features(x)
        weak = fit_softmax(read, y, rows.n_labels, l2=self.l2)
        offset = log_probabilities(weak(read))
        weights = np.ones(len(y))
        if self.own_loss:
            z, y = np.concatenate([z, z]), np.concatenate([y, y])
            offset = np.concatenate([offset, np.zeros_like(offset)])
            weights = np.concatenate([weights, self.own_loss * weights])
        linear = fit_softmax(z, y, rows.n_labels, l2=self.l2, weights=weights, offset=offset)
        hits = int((weak.predict(read) == rows.label.cpu().numpy()).sum())
        kind = "components" if self.weak_x is None else "features of its own"
        return self.head(
            scale.folded(linear), notes=(f"the weak model reads {counted(read.shape[1], kind)}",),
            measured=(("accuracy of the weak model on the training rows", wilson(hits, len(rows))),),
        )  # fmt: skip

    def _weak_features(self, x: np.ndarray) -> np.ndarray:
        """What the weak model reads: scaled features of its own, or principal components in units of the largest."""
        if self.weak_x is not None:
            if len(self.weak_x) != len(x):
                raise ShapeError(
                    f"PoE(weak_x={tuple(self.weak_x.shape)}): {counted(len(x), 'training rows')}; give a row for each."
                )
            own = self.weak_x.detach().double().cpu().numpy()
            return Scale.of(own)(own)
        u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        kept = min(self.weak_components, len(s))
        return u[:, :kept] * (s[:kept] / max(s[0], np.finfo(float).tiny)) * np.sqrt(len(x))
