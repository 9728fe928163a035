"""What a robust head is, what a method that fits one is, and the registry of the methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Linear
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.numbers import counted, percent, setting
from workbench.core.registry import Registry
from workbench.core.stats import Estimate

Regime = Literal["R0", "R1", "R2", "R3"]

REGIMES: Mapping[Regime, str] = {
    "R0": "no attribute labels and no minority rows",
    "R1": "attribute labels on a small or different set",
    "R2": "attribute labels on the training rows, with minorities",
    "R3": "no attribute labels on the training rows, but minorities among them",
}
"""What a method may see; heads of different regimes are not rivals on equal terms."""

NO_SELECTION = "defaults; nothing was selected"


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Head(Shown):
    """A linear classifier on frozen features, with what went into it.

    Attributes:
        method: that fitted it.
        regime: what the method saw, of `REGIMES`.
        weight: one row per class, for features as they are given.
        bias: one per class.
        n_attribute_labels: rows whose attribute label was used, for the fit or for a selection.
        selection: how hyperparameters were chosen.
        notes: cases in which the method can't do what it is for, in words.
        measured: what was measured on the way, by name.
        concepts: unit vectors whose cosines with the features are what the head reads; None if it reads the features.
    """

    method: str
    regime: Regime
    weight: Float[Tensor, "classes read"]
    bias: Float[Tensor, " classes"]
    n_attribute_labels: int = 0
    selection: str = NO_SELECTION
    notes: tuple[str, ...] = ()
    measured: tuple[tuple[str, Estimate], ...] = ()
    concepts: Float[Tensor, "read d"] | None = None

    def logits(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows classes"]:
        """Logits in fp64."""
        rows = x.detach().to(self.weight)
        if self.concepts is not None:
            rows = cosines_with(rows, self.concepts)
        return rows @ self.weight.T + self.bias

    def predict(self, x: Float[Tensor, "rows d"]) -> Int[Tensor, " rows"]:
        """Class of each row."""
        return self.logits(x).argmax(dim=1)

    def _shown_line(self) -> str:
        return (
            f"{self.method}, {self.regime} ({REGIMES[self.regime]}), "
            f"{counted(self.n_attribute_labels, 'attribute labels')} used; {'; '.join((self.selection, *self.notes))}"
        )

    def _shown_facts(self) -> Mapping[str, object]:
        return {
            "method": self.method, "sees": f"{self.regime}: {REGIMES[self.regime]}",
            "attribute labels used": self.n_attribute_labels, "hyperparameters": self.selection,
            **dict(self.measured), "notes": "; ".join(self.notes),
        }  # fmt: skip


def cosines_with(x: Float[Tensor, "rows d"], concepts: Float[Tensor, "k d"]) -> Float[Tensor, "rows k"]:
    """Cosine of each row with each unit vector; 0 for a row that is zero."""
    return (x @ concepts.T) / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@checked
@dataclass(frozen=True)
class HeadMethod(OneLine):
    """A way to fit a head. Subclasses are frozen dataclasses whose fields are its hyperparameters.

    `name`, `regime` and `information` say what it is and what it may see; `solve` fits the head.
    """

    name: ClassVar[str]
    regime: ClassVar[Regime]
    information: ClassVar[str]

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:
        """The head, for rows that fit each other."""
        raise NotImplementedError

    def fit(self, rows: HeadRows, *, validation: HeadRows | None = None, seed: int = 0) -> Head:
        """The head of these rows; equal rows, options and seed give an equal head.

        Args:
            rows: training rows.
            validation: other rows, for methods that are fitted or selected on them; others leave it unread.
            seed: decides draws and the order of rows, where there are any.

        Raises:
            ShapeError: if the two sets differ in width.
            InvalidInputError: if the method needs labels that are not there.
        """
        if validation is not None and validation.x.shape[1] != rows.x.shape[1]:
            raise ShapeError(
                f"{self.name}: training rows of width {rows.x.shape[1]} and validation rows of width "
                f"{validation.x.shape[1]}; they must agree."
            )
        if validation is not None and validation.n_labels > rows.n_labels:
            raise InvalidInputError(
                f"{self.name}: validation rows have {validation.n_labels} labels and training rows {rows.n_labels}. "
                "Give training rows of every label."
            )
        head = self.solve(rows, validation, seed)
        return replace(head, notes=(*head.notes, *_chance(head, rows)))

    def head(self, linear: Linear, **facts: object) -> Head:
        """A head of this method; `facts` are fields of `Head`."""
        weight, bias = torch.from_numpy(linear.weight), torch.from_numpy(linear.bias)
        fields: dict[str, object] = {"method": self.name, "regime": self.regime, "weight": weight, "bias": bias}
        return Head(**{**fields, **facts})  # type: ignore[arg-type]


HEADS: Registry[type[HeadMethod]] = Registry("robust head", "circuits.shift.heads")
"""Every way to fit a head; a file in this package registers its own."""


def require_above(what: str, least: int, **options: int | float) -> None:
    """Raises InvalidInputError for an option below `least`."""
    for name, value in options.items():
        if not value >= least:
            raise InvalidInputError(f"{what}({name}={setting(value)}): give {setting(least)} or more.")


def _chance(head: Head, rows: HeadRows) -> Iterable[str]:
    hit = float((head.predict(rows.x) == rows.label.to(head.weight.device)).double().mean())
    majority = float(torch.bincount(rows.label).max()) / len(rows)
    if hit <= majority:
        yield (
            f"the head is at chance: accuracy {percent(hit)} on its training rows, of which the most frequent label "
            f"has {percent(majority)}"
        )
