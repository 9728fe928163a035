"""INLP, MiMiC and MiMiC+ of the attribute, each with a head behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.shift.heads.rows import Groups, HeadRows
from circuits.shift.heads.solve import Linear, Scale, fit_softmax
from circuits.shift.table.base import SHIFT_METHODS, balanced_rows, training_rows
from circuits.shift.task import Prediction, ShiftStudy
from workbench.controls.methods import Method
from workbench.core.numbers import counted, setting
from workbench.probes.erase.inlp import INLPOptions, fit_inlp
from workbench.probes.erase.mimic import PUBLISHED_ALPHA, fit_mimic
from workbench.probes.erase.moments import ClassMoments

MARGIN = 0.05
"""By how much a classifier of the attribute may stay above the majority, on rows that INLP was not fitted on."""
RIDGE = 1.0
"""Added to variances of standardised dimensions where a value of the attribute has fewer rows than `MIN_ROWS` of them;
without it the transport would be decided by directions in which these rows happen not to differ."""
MIN_ROWS = 4
"""Rows per dimension that a covariance is used as it is from."""
L2 = 1.0


def _fitted_on(study: ShiftStudy) -> tuple[HeadRows, str, tuple[str, ...]]:
    """The rows that the attribute is read from: balanced ones where there are any, in which it is not the label."""
    balanced = balanced_rows(study)
    rows, name = (training_rows(study), "training") if balanced is None else (balanced, "balanced")
    groups = rows.groups(name)
    lost = ("erasing the attribute erases the label",) if groups.coincide else ()
    return rows, "R2" if balanced is None else "R1", (*groups.notes(name), *lost)


def _moments(x: Float[np.ndarray, "rows d"], groups: Groups) -> ClassMoments:
    return ClassMoments.of(torch.from_numpy(x), torch.from_numpy(groups.attribute), groups.n_attributes)


def _head(x: np.ndarray, y: np.ndarray, test: Tensor) -> Tensor:
    """Labels of the test rows by a head on standardised rows."""
    linear: Linear = fit_softmax(x, y, int(y.max()) + 1, l2=L2)
    return torch.from_numpy(linear.predict(test.numpy()))


def _inlp(study: ShiftStudy) -> Prediction:
    rows, regime, notes = _fitted_on(study)
    (x, y), scale = training_rows(study).arrays(), Scale.of(training_rows(study).arrays()[0])
    order = np.random.default_rng(study.options.seed).permutation(len(rows))
    fit, held = rows.take(order[::2]), rows.take(order[1::2])
    assert held.attribute is not None
    moments = _moments(scale(fit.arrays()[0]), fit.groups("INLP"))
    eraser = fit_inlp(moments, torch.from_numpy(scale(held.arrays()[0])), held.attribute, INLPOptions(margin=MARGIN))
    test = eraser(torch.from_numpy(scale(study.test.x.double().numpy())))
    labels = _head(eraser(torch.from_numpy(scale(x))).numpy(), y, test)
    notes = (*notes, f"{eraser.name}, {counted(eraser.rank, 'dimensions')} removed")
    return Prediction((labels,), regime=regime, n_attribute_labels=len(rows), notes=notes)


@dataclass(frozen=True)
class _Transported:
    """A head of the training rows and of each one moved to the other values of the attribute.

    Attributes:
        alpha: of MiMiC+; 0 is MiMiC.
    """

    alpha: float = 0.0

    def __call__(self, study: ShiftStudy) -> Prediction:
        rows, _, notes = _fitted_on(study)
        train = training_rows(study)
        x, y = train.arrays()
        scale, of_train, groups = Scale.of(x), train.groups("MiMiC").attribute, rows.groups("MiMiC")
        moments = _moments(scale(rows.arrays()[0]), groups)
        few = int(moments.n.min()) < MIN_ROWS * moments.width
        z = torch.from_numpy(scale(x))
        moved, labels = [z], [y]
        for source in range(groups.n_attributes):
            chosen = of_train == source
            for target in range(groups.n_attributes):
                if source != target and chosen.any():
                    map_ = fit_mimic(moments, source, target, alpha=self.alpha, ridge=RIDGE if few else 0.0)
                    moved.append(map_(z[chosen]))
                    labels.append(y[chosen])
        ridge = (f"a ridge of {setting(RIDGE)} variance per dimension, for want of rows",) if few else ()
        test = torch.from_numpy(scale(study.test.x.double().numpy()))
        predicted = _head(torch.cat(moved).numpy(), np.concatenate(labels), test)
        return Prediction((predicted,), regime="R2", n_attribute_labels=len(rows) + len(train), notes=(*notes, *ridge))


SHIFT_METHODS.add(
    "INLP",
    Method(
        name="INLP", run=_inlp, role="rival", needs=("attribute",), regime="R1",
        information="labels of the training rows, attribute labels of balanced rows, or else of the training rows",
    ),
)  # fmt: skip
for _name, _alpha in (("MiMiC", 0.0), ("MiMiC+", PUBLISHED_ALPHA)):
    SHIFT_METHODS.add(
        _name,
        Method(
            name=_name, run=_Transported(_alpha), role="rival", needs=("attribute",), regime="R2",
            information="labels and attribute labels of the training rows, each moved to the other value of the "
            "attribute; the transport is fitted on balanced rows, or else on the training rows",
        ),
    )  # fmt: skip
