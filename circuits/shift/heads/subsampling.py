"""Subsampling: as many rows of each group as the smallest one has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Scale, fit_softmax
from workbench.core.arguments import checked
from workbench.core.numbers import counted


@HEADS.register("subsampling")
@checked
@dataclass(frozen=True)
class Subsampling(HeadMethod):
    """ERM on a draw of equally many rows of each group.

    Attributes:
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised features.
    """

    name: ClassVar[str] = "subsampling"
    regime: ClassVar[Regime] = "R2"
    information: ClassVar[str] = "labels and attribute labels of the training rows"
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_above("Subsampling", 0, l2=self.l2)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head of least mean loss on a balanced draw."""
        groups, (x, y) = rows.groups(self.name), rows.arrays()
        drawn = groups.balanced(np.random.default_rng(seed))
        scale = Scale.of(x)
        linear = fit_softmax(scale(x[drawn]), y[drawn], rows.n_labels, l2=self.l2)
        notes = (*groups.notes("training"), f"fitted on {counted(len(drawn), 'rows')} of {len(rows)}")
        return self.head(scale.folded(linear), n_attribute_labels=len(rows), notes=notes)
