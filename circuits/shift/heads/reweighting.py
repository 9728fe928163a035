"""Reweighting: every group has the same weight in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Scale, fit_softmax
from workbench.core.arguments import checked


@HEADS.register("reweighting")
@checked
@dataclass(frozen=True)
class Reweighting(HeadMethod):
    """ERM with `n / (G n_g)` as the weight of each row of group g.

    Attributes:
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised features.
    """

    name: ClassVar[str] = "reweighting"
    regime: ClassVar[Regime] = "R2"
    information: ClassVar[str] = "labels and attribute labels of the training rows"
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_above("Reweighting", 0, l2=self.l2)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head of least mean loss with equal groups."""
        groups, (x, y) = rows.groups(self.name), rows.arrays()
        scale = Scale.of(x)
        linear = fit_softmax(scale(x), y, rows.n_labels, l2=self.l2, weights=groups.weights())
        return self.head(scale.folded(linear), n_attribute_labels=len(rows), notes=groups.notes("training"))
