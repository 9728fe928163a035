"""Scopes that are an explicit choice of tokens or rows of a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from workbench.core.arguments import checked, shown
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step


@dataclass(frozen=True, eq=False)
class _Chosen(Scope):
    """Shared by the scopes that are an explicit choice, one row of it per row of the intervention."""

    chosen: Bool[Tensor, "rows ..."]
    counted: ClassVar[str]
    ndim: ClassVar[int]

    def __post_init__(self) -> None:
        name = f"{type(self).__name__}({shown(self.chosen)})"
        if self.chosen.ndim != self.ndim:
            raise ShapeError(f"{name}: give booleans with {self.ndim} axes, rows first.")
        if not bool(self.chosen.any()):
            raise DegenerateInputError(f"{name} chooses nothing, so nothing would be edited.")

    @property
    def n_rows(self) -> int | None:
        return len(self.chosen)

    @property
    def is_empty(self) -> bool:
        return not bool(self.chosen.any())

    def take(self, rows: Int[Tensor, " chosen"]) -> Scope:
        # Copied, not made anew: that some of the rows hold no token is not what the user asked for.
        out = copy.copy(self)
        object.__setattr__(out, "chosen", self.chosen[rows.to(self.chosen.device)])
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self.chosen.sum())} of {self.chosen.numel()} {self.counted})"


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Mask(_Chosen):
    """An explicit choice of prompt tokens: True where the batch column is to be edited.

    Attributes:
        chosen: one row of columns per batch row; each row holds a True, and meets a token there.
        may_skip_rows: rows without a token are allowed, and left as they are.
    """

    chosen: Bool[Tensor, "batch pos"]
    may_skip_rows: bool = False
    counted: ClassVar[str] = "columns"
    ndim: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        empty = (~self.chosen.any(1)).nonzero().flatten().tolist()
        if empty and not self.may_skip_rows:
            raise DegenerateInputError(
                f"Mask({shown(self.chosen)}) chooses no token in row {str(empty[:10])[1:-1]} ({len(empty)} in all). "
                "Leave such rows out of the batch, or give may_skip_rows=True to leave them as they are."
            )

    def wanted_rows(self, step: Step) -> Bool[Tensor, " batch"] | None:
        return None if self.may_skip_rows else self.chosen.any(1).to(step.row.device)[step.row]

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        if bool((step.row >= self.chosen.shape[0]).any()):
            raise ShapeError(f"Mask has {self.chosen.shape[0]} rows; the batch has {step.is_real.shape[0]}.")
        chosen = self.chosen.to(step.column.device)[step.row]
        inside = step.column < chosen.shape[1]
        return chosen[:, step.column.clamp_max(chosen.shape[1] - 1)] & inside


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Rows(_Chosen):
    """Every token of some batch rows."""

    chosen: Bool[Tensor, " rows"]
    counted: ClassVar[str] = "rows"
    ndim: ClassVar[int] = 1

    def only_rows(self, step: Step) -> Bool[Tensor, " batch"] | None:
        return self.chosen.to(step.row.device)[step.row]

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return self.chosen.to(step.row.device)[step.row][:, None].expand_as(step.is_real)
