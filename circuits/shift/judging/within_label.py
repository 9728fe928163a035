"""Statistics without twins: how a feature varies with the attribute among texts of one label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from circuits.shift.deciders import DECIDERS, Decision, FeatureDossier, Rows, Verdict
from circuits.shift.judging.prepare import Candidate, of_two_labels
from circuits.shift.task import NEEDS, ShiftStudy
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import counted, number

MIN_CELL = 3
"""Texts of each label with each value of the attribute, below which there is no variation to speak of."""


@DECIDERS.register("within-label")
@checked
@dataclass(frozen=True)
class WithinLabelDecider(OneLine):
    """Spurious if, among texts of one label, a feature varies more with the attribute than with the label otherwise.

    Let m_ys be the mean activation over training texts of label y whose attribute goes with label s. Then
    `A = ((m_01 - m_00) + (m_11 - m_10)) / 2` is the variation with the attribute within a label and
    `L = ((m_10 - m_00) + (m_11 - m_01)) / 2` that with the label at one value of the attribute. The score is the z
    statistic of `|A| - |L|`: above `z` the feature is spurious, below `-z` it belongs to the label.

    Attributes:
        z: how many standard errors a decision needs.
        min_tokens: features active on fewer tokens are not judged.
    """

    z: float = 2.0
    min_tokens: int = 5

    name = "within-label"
    regime = "R2"
    information = (
        "ambiguous training texts with their labels and attribute labels; it needs texts in which the two disagree, "
        "and no twins, word lists or balanced rows"
    )
    is_oracle = False

    def __post_init__(self) -> None:
        if self.z < 0 or self.min_tokens < 0:
            raise InvalidInputError(
                f"WithinLabelDecider(z={self.z}, min_tokens={self.min_tokens}): both must be 0 or more."
            )

    def of_study(self, study: ShiftStudy, candidates: Sequence[Candidate] = ()) -> WithinLabel:
        """The judge with the attribute labels of the training texts.

        Raises:
            MismatchError: if the attribute is not known, or hardly any training text breaks the correlation.
        """
        del candidates
        of_two_labels(study, "the within-label judge")
        task = study.task
        if "attribute" in task.missing():
            raise MismatchError(f"WithinLabelDecider: {NEEDS['attribute']}. Give another judge, such as instability.")
        label, shortcut = np.array(task.train.label), np.array(task.expected(task.train))
        counts = [int(((label == y) & (shortcut == s)).sum()) for y in (0, 1) for s in (0, 1)]
        if min(counts) < MIN_CELL:
            raise MismatchError(
                f"WithinLabelDecider: of the training texts only {counted(min(counts), 'texts')} of one label "
                f"break the correlation, and {MIN_CELL} of each are needed. Give the statistics or lexicon judge, "
                "which need twins or words instead."
            )
        return WithinLabel(self, shortcut.astype(float))

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """Refused: it needs the attribute labels that `of_study` reads."""
        del dossier
        raise MismatchError(
            "WithinLabelDecider: no study is given. Pass it to circuits.shift, or call of_study(study)."
        )


@dataclass(frozen=True, eq=False)
class WithinLabel(OneLine):
    """`WithinLabelDecider` of one study.

    Attributes:
        decider: its options.
        shortcut: for each training text the label that its attribute goes with.
    """

    decider: WithinLabelDecider
    shortcut: Rows

    name = WithinLabelDecider.name
    information = WithinLabelDecider.information
    is_oracle = False

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        if dossier.n_tokens < self.decider.min_tokens:
            return Verdict(dossier.node, "unsure", 0.0, f"active on {dossier.n_tokens} tokens only")
        by_attribute, by_label, z = within_label(dossier.acts, dossier.label, self.shortcut)
        limit = self.decider.z
        decision: Decision = "spurious" if z > limit else "intended" if z < -limit else "unsure"
        why = (
            f"differs by {number(by_attribute)} with the attribute within a label, by {number(by_label)} with the "
            f"label at one value of the attribute (z = {number(z)})"
        )
        return Verdict(dossier.node, decision, z, why)


def within_label(acts: Rows, label: Rows, shortcut: Rows) -> tuple[float, float, float]:
    """Variation with the attribute within a label, with the label within the attribute, and z of their difference.

    >>> acts = np.array([0.0, 0.0, 4.0, 4.0, 1.0, 1.0, 5.0, 5.0])  # 4 with the attribute, 1 with the label
    >>> y, s = np.repeat([0.0, 0.0, 1.0, 1.0], 2), np.repeat([0.0, 1.0, 0.0, 1.0], 2)
    >>> within_label(acts, y, s)
    (4.0, 1.0, inf)
    """
    cells = {(y, s): acts[(label == y) & (shortcut == s)] for y in (0, 1) for s in (0, 1)}
    mean = {cell: float(rows.mean()) for cell, rows in cells.items()}
    half = {cell: (1 if cell[1] else -1, 1 if cell[0] else -1) for cell in cells}
    by_attribute = sum(half[cell][0] * mean[cell] for cell in cells) / 2
    by_label = sum(half[cell][1] * mean[cell] for cell in cells) / 2
    a, b = (1 if value >= 0 else -1 for value in (by_attribute, by_label))
    weights = {cell: (a * half[cell][0] - b * half[cell][1]) / 2 for cell in cells}
    excess = abs(by_attribute) - abs(by_label)
    spread = math.sqrt(sum(weights[cell] ** 2 * float(rows.var(ddof=1)) / len(rows) for cell, rows in cells.items()))
    z = excess / spread if spread > 0 else math.copysign(math.inf, excess) if excess else 0.0
    return by_attribute, by_label, z
