"""Interventions: what to edit where, described without a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine, brief, first_few
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, ShapeError
from workbench.core.html import Shown, table
from workbench.core.numbers import counted
from workbench.core.wording import Wording
from workbench.hooks.sites import Site
from workbench.interventions.files import load, save
from workbench.interventions.op import Op
from workbench.interventions.scopes import All, Scope

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup


@dataclass(frozen=True)
class Edit(OneLine):
    """One op at one site on the tokens of one scope."""

    how_to_make: ClassVar[str] = "Intervention.at('resid_post.10', op) makes an intervention of one edit."
    site: Site
    op: Op
    scope: Scope

    def __str__(self) -> str:
        return f"{self.op.name} at {self.site} on {self.scope}"

    def row(self) -> dict[str, object]:
        """The edit as a row of a table; numbers among the parameters of its op have columns of their own."""
        values = {field.name: getattr(self.op, field.name) for field in dataclasses.fields(self.op)}  # type: ignore[arg-type]
        single = {name: value for name, value in values.items() if isinstance(value, int | float)}
        return {"site": str(self.site), "op": self.op.name, "scope": brief(self.scope), **single}


@checked
@dataclass(frozen=True)
class Intervention(Shown):
    """An ordered list of edits, without reference to a model.

    `a + b` does b after a; `a * 2` and `2 * a` have twice the strength. `Intervention()` edits nothing and is the
    neutral element of `+`.

    Attributes:
        edits: at one site they are made in this order.
        made_for: fingerprint of the model that the vectors come from, or None; another model refuses it.
    """

    how_to_make: ClassVar[str] = (
        "Intervention.at('resid_post.10', op) makes one, a + b one of two, sum(several, Intervention()) one of all."
    )
    edits: tuple[Edit, ...] = ()
    made_for: str | None = None

    @classmethod
    def at(cls, site: str | Site, op: Op, scope: Scope | None = None) -> Intervention:
        """One edit. The default scope is every token.

        Raises:
            UnknownSiteError: if there is no such kind of site.
        """
        return cls((Edit(Site.parse(site), op, scope or All()),))

    def __add__(self, other: Intervention) -> Intervention:
        if self.made_for and other.made_for and self.made_for != other.made_for:
            raise MismatchError(
                f"The two interventions were made for different models, {self.made_for} and {other.made_for}. "
                "Set made_for=None on one of them if that is meant."
            )
        return Intervention(self.edits + other.edits, self.made_for or other.made_for)

    def scaled(self, factor: int | float) -> Intervention:
        """The same intervention with `factor` times the strength; written `factor * intervention`.

        Raises:
            InvalidInputError: if an edit has no strength, or for an infinite factor.
        """
        if math.isinf(factor):
            raise InvalidInputError(f"Intervention * {factor}: give a finite number.")
        return self._mapped(lambda edit: replace(edit, op=edit.op.scaled(float(factor))))

    def __mul__(self, factor: int | float) -> Intervention:
        return self.scaled(factor)

    __rmul__ = __mul__

    @property
    def n_rows(self) -> int | None:
        """Number of batch rows that per-row parameters and masks are for, or None."""
        sizes = {part.n_rows for edit in self.edits for part in (edit.op, edit.scope)} - {None}
        if len(sizes) > 1:
            raise ShapeError(
                f"The edits have parameters for {first_few(sorted(map(str, sizes)))} rows; they must agree."
            )
        return next(iter(sizes), None)

    def for_rows(self, batch: int) -> Intervention:
        """The same intervention with parameters for so many rows, where it has parameters per row.

        Parameters of one row are those of every row; a mask of one row is not.

        Raises:
            ShapeError: if it has parameters for another number of rows.
        """
        n = self.n_rows
        if n is None or n == batch:
            return self
        if n > 1 or any(edit.scope.n_rows is not None for edit in self.edits):
            raise ShapeError(
                f"The intervention has parameters for {counted(n, 'rows')}; asked for {counted(batch, 'prompts')}. "
                f"Give parameters for {batch} rows, or without an axis of rows for all of them."
            )
        return self.take(torch.zeros(batch, dtype=torch.long))

    @property
    def edits_prompt(self) -> bool:
        """Whether an edit may touch prompt tokens; False is certain, True is not."""
        return any(edit.scope.touches_prompt for edit in self.edits)

    def take(self, rows: Int[Tensor, " chosen"]) -> Intervention:
        """The same intervention for a choice of batch rows."""
        return self._mapped(lambda edit: Edit(edit.site, edit.op.take(rows), edit.scope.take(rows)))

    def resolve(self, wording: Wording) -> Intervention:
        """The same intervention for one tokenizer: with what texts in its scopes stand for there."""
        return self._mapped(lambda edit: replace(edit, scope=edit.scope.resolve(wording)))

    def parameters(self) -> Iterator[Tensor]:
        """Tensors of the edits that are being trained, each once."""
        found = {id(tensor): tensor for edit in self.edits for tensor in edit.op.parameters()}
        yield from found.values()

    def save(self, folder: str | Path) -> Path:
        """Writes `intervention.json` and `tensors.safetensors`, and each SAE as a folder of sae_lens.

        Raises:
            InvalidInputError: if an edit holds a Python function, which can't be written to a file.
        """
        edits = [{"site": str(e.site), "op": e.op, "scope": e.scope} for e in self.edits]
        return save(folder, {"made_for": self.made_for, "edits": edits})

    @classmethod
    def load(cls, folder: str | Path) -> Intervention:
        """Reads what `save` wrote, or the ZIP archive of it that the playground gives.

        Raises:
            MissingFileError: if there is none.
            CorruptFileError: if it can't be used.
        """
        content = load(folder)
        try:
            edits = tuple(Edit(Site.parse(e["site"]), e["op"], e["scope"]) for e in content["edits"])
            if all(isinstance(e.op, Op) and isinstance(e.scope, Scope) for e in edits):
                return cls(edits, content["made_for"])
            raise TypeError("an op or a scope")
        except (KeyError, TypeError) as error:
            raise CorruptFileError(f"{folder} is not a saved intervention: {error!r} is missing or wrong.") from error

    def row(self) -> dict[str, object]:
        """The whole intervention as one row of a table: that of its edit, or what several edits are in words."""
        if len(self.edits) == 1:
            return self.edits[0].row()
        rows = [edit.row() for edit in self.edits]
        return {name: "; ".join(str(row[name]) for row in rows) or "none" for name in ("site", "op", "scope")}

    def frame(self) -> pd.DataFrame:
        """One row per edit, in their order: site, op, scope, and the numbers among the parameters of the op."""
        import pandas as pd

        return pd.DataFrame([edit.row() for edit in self.edits])

    def _shown_line(self) -> str:
        edits = "; ".join(f"{edit.op!r} at {edit.site} on {brief(edit.scope)}" for edit in self.edits) or "no edits"
        return f"{edits}; made for {self.made_for}" if self.made_for else edits

    def _shown_note(self) -> str:
        return counted(len(self.edits), "edits") + (f"; made for {self.made_for}" if self.made_for else "")

    def _shown_parts(self) -> Iterable[Markup]:
        yield table(
            ("site", "op", "scope"), [(str(edit.site), repr(edit.op), brief(edit.scope)) for edit in self.edits]
        )

    def _mapped(self, change: Callable[[Edit], Edit]) -> Intervention:
        return replace(self, edits=tuple(change(edit) for edit in self.edits))
