"""Concept bottleneck: a head that reads cosines with the vectors of a few words and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, cosines_with, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Scale, fit_softmax
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.numbers import counted


@HEADS.register("concept bottleneck")
@checked
@dataclass(frozen=True, eq=False)
class ConceptBottleneck(HeadMethod):
    """A linear head on the cosines of each row with centred concept vectors.

    Attributes:
        concepts: one vector per concept word, such as its activation at the same site; their mean is subtracted.
        l2: strength of `l2 / 2 |W|^2` against the summed loss, on standardised cosines.

    Source: the concept bottleneck probe of Marks et al. 2025 (arXiv 2403.19647), with 20 words.
    """

    name: ClassVar[str] = "concept bottleneck"
    regime: ClassVar[Regime] = "R0"
    information: ClassVar[str] = "labels of the training rows and a list of words of the label"
    concepts: Float[Tensor, "k d"]
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_above("ConceptBottleneck", 0, l2=self.l2)
        if len(self.concepts) < 2 or not bool((self.unit.norm(dim=1) > 0.5).all()):
            raise DegenerateInputError(
                f"ConceptBottleneck: {counted(len(self.concepts), 'concept vectors')}, centred on their mean, of which "
                "some are zero. Give two or more different ones."
            )

    @property
    def unit(self) -> Float[Tensor, "k d"]:
        """The vectors less their mean, at unit length."""
        rows = self.concepts.detach().double().cpu()
        return torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head on cosines."""
        if rows.x.shape[1] != self.concepts.shape[1]:
            raise ShapeError(
                f"ConceptBottleneck: concepts of width {self.concepts.shape[1]} and rows of width {rows.x.shape[1]}; "
                "read both at the same site."
            )
        read = cosines_with(rows.x.detach().double().cpu(), self.unit).numpy()
        scale = Scale.of(read)
        linear = fit_softmax(scale(read), rows.arrays()[1], rows.n_labels, l2=self.l2)
        return self.head(
            scale.folded(linear), concepts=self.unit, notes=(f"reads {counted(len(self.unit), 'cosines')}",)
        )
