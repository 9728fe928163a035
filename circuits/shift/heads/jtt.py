"""JTT: train, find the training rows that are misclassified, train again with more weight on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Descent, DescentRun, Linear, Scale, fit_softmax
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted, setting
from workbench.core.stats import Estimate, wilson


@HEADS.register("JTT")
@checked
@dataclass(frozen=True, kw_only=True)
class JTT(HeadMethod):
    """Just train twice: rows of the error set of an ERM head weigh `1 + lambda`.

    Attribute labels of the training rows are not used; where there are any, the precision and recall of the error set
    for the minority are reported.

    Attributes:
        extra: lambda, how often a row of the error set is repeated. Of several the one with the best validation
            accuracy is taken, that of the worst group where the validation rows have attribute labels; without
            validation rows the first.
        epochs: of gradient descent in the first training; None trains it to convergence.
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised features.

    Source: Liu et al. 2021 (arXiv 2107.09044). As in the authors' code, lambda copies are added to the full set.
    """

    name: ClassVar[str] = "JTT"
    regime: ClassVar[Regime] = "R3"
    information: ClassVar[str] = "labels of the training rows; validation rows, if given, to choose lambda"
    extra: tuple[float, ...] = (5.0, 4.0, 6.0, 20.0, 50.0, 100.0)
    epochs: int | None = None
    l2: float = 1.0

    def __post_init__(self) -> None:
        if not self.extra:
            raise InvalidInputError("JTT(extra=()): give one value of lambda or several.")
        require_above("JTT", 0, l2=self.l2, extra=min(self.extra))
        require_above("JTT", 1, epochs=1 if self.epochs is None else self.epochs)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:
        """The head of the second training."""
        x, y = rows.arrays()
        scale = Scale.of(x)
        z = scale(x)
        in_error = self._first(z, y, rows.n_labels, seed).predict(z) != y

        def second(extra: float) -> Linear:
            return fit_softmax(z, y, rows.n_labels, l2=self.l2, weights=1 + extra * in_error)

        linear, selection, labels = self._chosen(second, scale, validation)
        measured, notes = _of_minority(in_error, rows)
        return self.head(
            scale.folded(linear), n_attribute_labels=labels, selection=selection, notes=notes, measured=measured
        )

    def _first(self, z: np.ndarray, y: np.ndarray, classes: int, seed: int) -> Linear:
        if self.epochs is None:
            return fit_softmax(z, y, classes, l2=self.l2)
        how = Descent(weight_decay=self.l2 / len(y))
        return DescentRun(z, y, classes, how, seed).epochs(self.epochs, np.arange(len(y)))

    def _chosen(
        self, second: Callable[[float], Linear], scale: Scale, validation: HeadRows | None
    ) -> tuple[Linear, str, int]:
        if validation is None or len(self.extra) == 1:
            return second(self.extra[0]), f"lambda {setting(self.extra[0])}; nothing was selected", 0
        x, y = validation.arrays()
        groups = None if validation.attribute is None else validation.groups(self.name)
        heads = [second(extra) for extra in self.extra]
        hits = [head.predict(scale(x)) == y for head in heads]
        scores = [float(hit.mean()) if groups is None else groups.worst(hit) for hit in hits]
        best = int(np.argmax(scores))
        by = "accuracy" if groups is None else "worst-group accuracy"
        selection = f"lambda {setting(self.extra[best])} of {len(self.extra)}, by {by} on {len(y)} validation rows"
        return heads[best], selection, 0 if groups is None else len(y)


def _of_minority(in_error: np.ndarray, rows: HeadRows) -> tuple[tuple[tuple[str, Estimate], ...], tuple[str, ...]]:
    """Precision and recall of the error set for the minority, where that is known, and what is wrong with the set."""
    n = int(in_error.sum())
    notes = [f"error set: {counted(n, 'rows')} of {len(in_error)}"]
    if not n:
        return (), (*notes, "the error set is empty, so the head is that of ERM")
    if rows.attribute is None:
        return (), (*notes, "without attribute labels it is not known whether the error set has a minority")
    minority = rows.groups("JTT").is_minority
    both = int((in_error & minority).sum())
    measured = [("precision of the error set for the minority", wilson(both, n))]
    if minority.any():
        measured.append(("recall of the minority in the error set", wilson(both, int(minority.sum()))))
    return tuple(measured), (*notes, *(() if both else ("error set has no minority",)))
