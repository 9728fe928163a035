"""ERM: the mean loss over all rows, whatever they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Scale, fit_softmax
from workbench.core.arguments import checked


@HEADS.register("ERM")
@checked
@dataclass(frozen=True)
class ERM(HeadMethod):
    """Empirical risk minimisation: the head that everything else is compared with.

    Attributes:
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised features.
    """

    name: ClassVar[str] = "ERM"
    regime: ClassVar[Regime] = "R0"
    information: ClassVar[str] = "labels of the training rows"
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_above("ERM", 0, l2=self.l2)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head of least mean loss."""
        x, y = rows.arrays()
        scale = Scale.of(x)
        return self.head(scale.folded(fit_softmax(scale(x), y, rows.n_labels, l2=self.l2)))
