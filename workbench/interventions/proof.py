"""The proof that edits happened: what each did, counted and measured while the model ran."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import EditError
from workbench.core.html import Shown, frame_table
from workbench.core.numbers import counted, number, percent
from workbench.interventions.intervention import Edit
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

MAX_ROWS_NAMED = 10
"""Rows that an error names."""


@dataclass(frozen=True, kw_only=True)
class EditReport(Shown):
    """What one edit did.

    Attributes:
        edit: the edit in words.
        site: where.
        fired: number of forward passes in which its hook ran.
        tokens: number of tokens that were edited.
        mean_norm_intended: mean L2 norm of this edit's change as computed in fp32.
        mean_norm_applied: mean L2 norm of the change that reached the model, after rounding to its dtype. Several
            edits of one site are rounded once, together; it is then that of their sum, on this edit's tokens.
        mean_norm_before: mean L2 norm of the hidden states that were edited.
        share: mean over the tokens of the norm of the change, divided by that of the hidden state; a zero state counts
            0. An attention sink, whose norm is a hundred times that of the others, counts as one token.
        together: number of edits that were written at once at this site.
        gate_open: tokens in scope for which the edit's gate was open; None without a gate.
        gate_decided: tokens in scope for which it was asked; None without a gate.
    """

    edit: str
    site: str
    fired: int
    tokens: int
    mean_norm_intended: float
    mean_norm_applied: float
    mean_norm_before: float
    share: float
    together: int = 1
    gate_open: int | None = None
    gate_decided: int | None = None

    @classmethod
    @checked
    def merged(cls, parts: Sequence[EditReport]) -> EditReport:
        """One report of the same edit in several batches; means are over tokens."""
        tokens = sum(part.tokens for part in parts)
        means = {
            name: sum(part.tokens * getattr(part, name) for part in parts) / max(tokens, 1)
            for name in ("mean_norm_intended", "mean_norm_applied", "mean_norm_before", "share")
        }
        gated = ("gate_open", "gate_decided") if parts[0].gate_decided is not None else ()
        counts = {name: sum(getattr(part, name) for part in parts) for name in ("fired", *gated)}
        return replace(parts[0], tokens=tokens, **means, **counts)

    def _shown_line(self) -> str:
        return str(self)

    def __str__(self) -> str:
        text = (
            f"{self.edit}: fired {self.fired}x on {counted(self.tokens, 'tokens')}, mean norm added "
            f"{number(self.mean_norm_applied)} ({percent(self.share)} of the activation norm)"
        )
        if self.together > 1:
            text += (
                f", together with {self.together - 1} more; its own intended norm is {number(self.mean_norm_intended)}"
            )
        if self.gate_decided is not None:
            text += f"; gate open for {self.gate_open} of {self.gate_decided} tokens"
        return text


class EditReports(Shown, tuple[EditReport, ...]):
    """What each edit of a run did, in the order of the edits: a tuple that shows itself as a table."""

    def frame(self) -> pd.DataFrame:
        """One row per edit, with the fields of `EditReport` as columns."""
        import pandas as pd

        names = [field.name for field in fields(EditReport)]
        return pd.DataFrame([{name: getattr(done, name) for name in names} for done in self], columns=names)

    def _shown_line(self) -> str:
        return "; ".join([counted(len(self), "edits"), *map(str, self[:3])])

    def _shown_note(self) -> str:
        return counted(len(self), "edits")

    def shown_table(self, caption: str = "") -> Markup:
        """A table for a notebook: what a reader looks at first; `frame` has all."""
        gate = ["gate_open"] if any(done.gate_decided is not None for done in self) else []
        columns = ["edit", "fired", "tokens", "mean_norm_applied", "mean_norm_before", "share", *gate]
        return frame_table(self.frame().reindex(columns=columns), caption)

    def _shown_parts(self) -> Iterator[Markup]:
        yield self.shown_table()


class Tally:
    """Sums of one edit, kept on the device so that no forward pass waits for them."""

    def __init__(self, edit: Edit, n_rows: int | None) -> None:
        self.edit, self.n_rows = edit, n_rows
        self.together = 1
        self.reset()

    def reset(self) -> None:
        """Sets every count to zero."""
        self.of_rows: Tensor | None = None
        self.missing: list[Scope] = list(self.edit.scope.parts)
        # Rows of the batch that wait for a token at a position asked for by name, with their numbers.
        self.waiting: tuple[Tensor, Tensor] | None = None
        # Of the batches before it: how many rows met none, and the number of one of them.
        self.empty: tuple[Tensor, Tensor] | None = None
        self.fired = self.tokens = self.in_scope = self.gate_decided = 0
        self.intended: Tensor | float = 0.0
        self.applied: Tensor | float = 0.0
        self.before: Tensor | float = 0.0
        self.shares: Tensor | float = 0.0
        self.gate_open: Tensor | int = 0

    def measure(self, before: Float[Tensor, " n"], applied: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> None:
        """Adds the norms of some tokens before the edit and of their change, and the rows that they belong to."""
        self.tokens += len(before)
        self.before = self.before + before.sum()
        self.applied = self.applied + applied.sum()
        self.shares = self.shares + (applied / before).masked_fill(before == 0, 0.0).sum()
        if self.n_rows is not None:
            if self.of_rows is None:
                self.of_rows = torch.zeros(2, self.n_rows, device=applied.device)
            of_rows = self.of_rows.to(applied.device)
            self.of_rows = of_rows.index_add(1, rows, torch.stack([torch.ones_like(applied), applied]).float())

    def look_for(self, step: Step, row: Int[Tensor, " n"]) -> None:
        """Notes which of the positions that were asked for by name are in this forward pass, and in which rows."""
        if self.missing:
            self.missing = [part for part in self.missing if not bool(part.mask(step).any())]
        wanted = self.edit.scope.wanted_rows(step)
        if wanted is None:
            return
        if self.waiting is None or len(self.waiting[0]) != len(wanted):
            self.waiting = wanted.clone(), step.row
        self.waiting[0][row.to(wanted.device)] = False

    def begin_batch(self) -> None:
        """Other prompts follow."""
        self.empty, self.waiting = self._all_empty(), None

    def _all_empty(self) -> tuple[Tensor, Tensor] | None:
        if self.waiting is None:
            return self.empty
        waiting, number = self.waiting
        n, row = waiting.sum(), number.masked_fill(~waiting.to(number.device), -1).amax()
        return (n, row) if self.empty is None else (n + self.empty[0], torch.maximum(row, self.empty[1]))

    def keep_rows(self, index: Int[Tensor, " kept"]) -> None:
        """The batch consists of these rows from now on; the others have ended and need no token any more."""
        if self.waiting is not None:
            waiting, number = self.waiting
            self.waiting = waiting[index.to(waiting.device)], number[index.to(number.device)]

    def end_rows(self, ended: Bool[Tensor, " batch"]) -> None:
        """These rows have ended and need no token any more."""
        if self.waiting is not None and len(self.waiting[0]) == len(ended):
            self.waiting[0].masked_fill_(ended.to(self.waiting[0].device), False)

    def report(self) -> EditReport:
        """The sums as means."""
        n, gated = max(self.tokens, 1), self.edit.op.gated
        return EditReport(
            edit=str(self.edit), site=str(self.edit.site), fired=self.fired, tokens=self.tokens,
            mean_norm_intended=float(self.intended) / n, mean_norm_applied=float(self.applied) / n,
            mean_norm_before=float(self.before) / n, share=float(self.shares) / n, together=self.together,
            gate_open=int(self.gate_open) if gated else None, gate_decided=self.gate_decided if gated else None,
        )  # fmt: skip

    def prove(self, first_row: int = 0) -> None:
        """Raises EditError if the edit met tokens and did not change them as it had to, or met none in some row.

        Args:
            first_row: number of the first row of the batch in the whole job, for the text of the error.
        """
        done, must_change = self.report(), self.edit.op.must_change
        n_empty, row = (0, -1) if (empty := self._all_empty()) is None else map(int, empty)
        if n_empty:
            raise EditError(
                f"{done.edit}: row {row + first_row} has no token there, so it was not edited ({n_empty} such rows "
                "in all). Leave them out of the batch, or give longer prompts."
            )
        if not math.isfinite(done.mean_norm_applied) or not math.isfinite(done.mean_norm_before):
            raise EditError(
                f"{done.edit}: the activations there hold non-finite values, with or without the edit. Look for "
                "the first site at which they appear with model.capture."
            )
        if done.tokens and done.mean_norm_applied == 0 and must_change:
            why = (
                f"the change of mean norm {number(done.mean_norm_intended)} was lost in rounding to the model's dtype. "
                "Use a larger strength or load the model in float32."
            )
            if done.mean_norm_intended == 0:
                why = "the change was exactly zero. Use a larger strength, unless what it multiplies is zero there."
            elif self.together > 1:
                why = f"the {self.together} edits of this site cancel, or were lost in rounding to its dtype."
            raise EditError(f"{done.edit}: {done.tokens} tokens met the edit, but {why}")
        unchanged = () if self.of_rows is None else ((self.of_rows[0] > 0) & (self.of_rows[1] == 0)).nonzero()
        lost = [int(row) for row in unchanged if self.edit.op.take(row.cpu()).must_change]
        if lost:
            raise EditError(
                f"{done.edit}: its parameters of row {', '.join(map(str, lost[:MAX_ROWS_NAMED]))} ({len(lost)} of "
                f"{self.n_rows} rows) met tokens, but changed none of them; the change was zero or lost in "
                "rounding. Use a larger strength there."
            )


def require_met(parts: Sequence[Sequence[Tally]]) -> None:
    """Raises EditError for an edit, or a position asked for by name, that met no token in any part of a job."""
    for tallies in zip(*parts, strict=True):
        edit, fired = tallies[0].edit, sum(tally.fired for tally in tallies)
        if not edit.scope.is_empty and not any(tally.in_scope for tally in tallies):
            why = "the hook never ran. Nothing was edited; was the model called inside the block?"
            if fired:
                why = f"no token was in scope in {fired} forward passes, so nothing was edited."
            elif not edit.scope.touches_prompt:
                why = (
                    "no generated token went through the model, so nothing was edited. A token is edited when it is "
                    "fed back: ask for at least 2 new tokens, and check that rows do not end at once."
                )
            raise EditError(f"{edit}: {why}")
        missing = [part for part in tallies[0].missing if all(part in tally.missing for tally in tallies)]
        if missing:
            places = ", ".join(map(str, missing))
            raise EditError(f"{edit}: no row has a token at {places}. Leave it out, or give longer prompts.")
