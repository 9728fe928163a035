"""LEACE: ERM on features from which the attribute is erased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Linear, Scale, fit_softmax
from workbench.core.arguments import checked
from workbench.core.numbers import counted
from workbench.probes.erase.leace import fit_leace
from workbench.probes.erase.moments import ClassMoments


@HEADS.register("LEACE")
@checked
@dataclass(frozen=True)
class ErasedERM(HeadMethod):
    """ERM behind a LEACE eraser of the attribute, both in one linear head.

    The eraser is fitted on the validation rows, which need attribute labels; without validation rows on the training
    rows. Where label and attribute go together in those rows, it erases the label with the attribute.

    Attributes:
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised features.
    """

    name: ClassVar[str] = "LEACE"
    regime: ClassVar[Regime] = "R1"
    information: ClassVar[str] = "labels of the training rows, attribute labels of the validation rows"
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_above("ErasedERM", 0, l2=self.l2)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head of least mean loss on erased features."""
        used, name = (rows, "training") if validation is None else (validation, "validation")
        groups, (x, y) = used.groups(f"{self.name} on {name} rows"), rows.arrays()
        scale = Scale.of(x)
        attributes = torch.from_numpy(groups.attribute)
        moments = ClassMoments.of(torch.from_numpy(scale(used.arrays()[0])), attributes, groups.n_attributes)
        eraser = fit_leace(moments)
        read, write, mean = (part.numpy() for part in (eraser.read, eraser.write, eraser.mean))
        z = scale(x)
        behind = fit_softmax(z - (z - mean) @ read.T @ write, y, rows.n_labels, l2=self.l2)
        taken = behind.weight @ write.T @ read
        linear = scale.folded(Linear(behind.weight - taken, behind.bias + taken @ mean))
        lost = ("erasing the attribute erases the label",) if groups.coincide else ()
        notes = (*groups.notes(name), *lost, f"the eraser takes {counted(eraser.rank, 'dimensions')}")
        return self.head(linear, regime="R2" if validation is None else "R1", n_attribute_labels=len(used), notes=notes)
