"""DFR: refits the last layer on group-balanced data that was held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import Groups, HeadRows
from circuits.shift.heads.solve import Linear, Scale
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted, setting

STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
"""The authors' values of C, the inverse of the penalty."""


@HEADS.register("DFR")
@checked
@dataclass(frozen=True)
class DFR(HeadMethod):
    """Deep feature reweighting: an l1 logistic head, averaged over balanced draws.

    Fitted on the validation rows, which need attribute labels; without validation rows on the training rows, which
    then need them. C is the one with the best worst-group accuracy on one half of those rows, for a head fitted on a
    balanced draw of the other half; of equal ones the first.

    Attributes:
        resamples: balanced draws whose coefficients are averaged; None is 20 on validation, 10 on training rows.
        strengths: values of C that are tried.

    Source: Kirichenko et al. 2022 (arXiv 2204.02937). Of more than two classes each is told from all others.
    """

    name: ClassVar[str] = "DFR"
    regime: ClassVar[Regime] = "R1"
    information: ClassVar[str] = "labels and attribute labels of the validation rows"
    resamples: int | None = None
    strengths: tuple[float, ...] = STRENGTHS

    def __post_init__(self) -> None:
        if not self.strengths or min(self.strengths) <= 0:
            raise InvalidInputError(f"DFR(strengths={self.strengths}): give one value above 0 or several.")
        require_above("DFR", 1, resamples=1 if self.resamples is None else self.resamples)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:
        """The mean of heads on balanced draws."""
        used, name = (rows, "training") if validation is None else (validation, "validation")
        groups, (x, y) = used.groups(f"{self.name} on {name} rows"), used.arrays()
        scale, random = Scale.of(rows.arrays()[0]), np.random.default_rng(seed)
        z, classes = scale(x), rows.n_labels
        strength, selection = self._strength(z, groups, classes, name, random)
        resamples = self.resamples or (20 if validation is not None else 10)
        drawn = [groups.balanced(random) for _ in range(resamples)]
        heads = [sparse_logistic(z[one], y[one], classes, strength) for one in drawn]
        linear = Linear(np.mean([h.weight for h in heads], axis=0), np.mean([h.bias for h in heads], axis=0))
        size = f"mean of {counted(resamples, 'balanced draws')} of {counted(len(drawn[0]), 'rows')}"
        return self.head(
            scale.folded(linear), regime="R2" if validation is None else "R1", n_attribute_labels=len(used),
            selection=selection, notes=(*groups.notes(name), size),
        )  # fmt: skip

    def _strength(
        self, z: np.ndarray, groups: Groups, classes: int, name: str, random: np.random.Generator
    ) -> tuple[float, str]:
        half = random.permutation(len(z))
        one, other = half[: len(half) // 2], half[len(half) // 2 :]
        if len(self.strengths) == 1 or len(np.unique(groups.label[one])) < classes or not len(other):
            return self.strengths[0], f"C = {setting(self.strengths[0])}; nothing was selected"
        fit, held = (
            Groups(groups.label[one], groups.attribute[one]),
            Groups(groups.label[other], groups.attribute[other]),
        )
        drawn = one[fit.balanced(random)]
        scores = [
            held.worst(sparse_logistic(z[drawn], groups.label[drawn], classes, c).predict(z[other]) == held.label)
            for c in self.strengths
        ]
        best = self.strengths[int(np.argmax(scores))]
        return best, f"C = {setting(best)} of {len(self.strengths)}, by worst-group accuracy on half of the {name} rows"


def sparse_logistic(z: np.ndarray, y: np.ndarray, classes: int, strength: float) -> Linear:
    """l1 logistic regression by liblinear, which penalises the bias as well; C is `strength`."""
    from sklearn.linear_model import LogisticRegression

    def one(target: np.ndarray) -> tuple[np.ndarray, float]:
        model = LogisticRegression(l1_ratio=1.0, C=strength, solver="liblinear", max_iter=1000, random_state=0)
        fitted = model.fit(z, target)
        return fitted.coef_[0], float(fitted.intercept_[0])

    if classes == 2:
        weight, bias = one(y)
        return Linear(np.stack([np.zeros_like(weight), weight]), np.array([0.0, bias]))
    parts = [one(y == label) for label in range(classes)]
    return Linear(np.stack([weight for weight, _ in parts]), np.array([bias for _, bias in parts]))
