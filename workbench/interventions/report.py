"""What an edit did: counted and measured while the model ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions.intervention import Edit
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step


@dataclass(frozen=True)
class EditReport:
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
    together: int = 1
    gate_open: int | None = None
    gate_decided: int | None = None

    @property
    def share(self) -> float:
        """Mean applied norm divided by the mean norm of the edited hidden states."""
        return self.mean_norm_applied / self.mean_norm_before if self.mean_norm_before else 0.0

    @classmethod
    def merged(cls, parts: Sequence[EditReport]) -> EditReport:
        """One report of the same edit in several batches; means are over tokens."""
        tokens = sum(part.tokens for part in parts)

        def mean(name: str) -> float:
            return sum(part.tokens * getattr(part, name) for part in parts) / max(tokens, 1)

        def total(name: str) -> int | None:
            counts = [getattr(part, name) for part in parts]
            return None if counts[0] is None else sum(counts)

        norms = [mean(name) for name in ("mean_norm_intended", "mean_norm_applied", "mean_norm_before")]
        gates = [total(name) for name in ("gate_open", "gate_decided")]
        fired = sum(part.fired for part in parts)
        return replace(
            parts[0], fired=fired, tokens=tokens, mean_norm_intended=norms[0], mean_norm_applied=norms[1],
            mean_norm_before=norms[2], gate_open=gates[0], gate_decided=gates[1],
        )  # fmt: skip

    def __str__(self) -> str:
        text = (
            f"{self.edit}: fired {self.fired}x on {self.tokens} tokens, mean norm added {self.mean_norm_applied:.4g} "
            f"({100 * self.share:.3g} % of the activation norm)"
        )
        if self.together > 1:
            text += f", together with {self.together - 1} more; its own intended norm is {self.mean_norm_intended:.4g}"
        if self.gate_decided is not None:
            text += f"; gate open for {self.gate_open} of {self.gate_decided} tokens"
        return text


class Tally:
    """Sums of one edit, kept on the device so that no forward pass waits for them."""

    def __init__(self, edit: Edit, *, gated: bool, n_rows: int | None = None) -> None:
        self.edit, self.gated, self.n_rows = edit, gated, n_rows
        self.together = 1
        self.reset()

    def reset(self) -> None:
        """Begins to count anew."""
        self.of_rows: Tensor | None = None
        self.missing: list[Scope] = list(self.edit.scope.parts)
        # Rows of the batch that wait for a token at a position asked for by name, with their numbers.
        self.waiting: tuple[Tensor, Tensor] | None = None
        # Of the batches before it: how many rows met none, and the number of one of them.
        self.empty: tuple[Tensor, Tensor] | None = None
        self.fired = self.tokens = self.in_scope = 0
        self.intended: Tensor | float = 0.0
        self.applied: Tensor | float = 0.0
        self.before: Tensor | float = 0.0
        self.gate_open: Tensor | int = 0
        self.gate_decided = 0

    def measure(self, before: Float[Tensor, " n"], applied: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> None:
        """Adds the norms of some tokens before the edit and of their change, and the rows that they belong to."""
        self.tokens += len(before)
        self.before = self.before + before.sum()
        self.applied = self.applied + applied.sum()
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
        """The batch goes on with these rows; the others have ended and need no token any more."""
        if self.waiting is not None:
            waiting, number = self.waiting
            self.waiting = waiting[index.to(waiting.device)], number[index.to(number.device)]

    def end_rows(self, ended: Bool[Tensor, " batch"]) -> None:
        """These rows have ended and need no token any more."""
        if self.waiting is not None and len(self.waiting[0]) == len(ended):
            self.waiting[0].masked_fill_(ended.to(self.waiting[0].device), False)

    def rows_without(self) -> tuple[int, int]:
        """How many rows had to meet a token and met none, and the number of one of them."""
        empty = self._all_empty()
        return (0, -1) if empty is None else (int(empty[0]), int(empty[1]))

    def unchanged_rows(self) -> list[int]:
        """Rows of the parameters that met tokens and changed none of them."""
        if self.of_rows is None:
            return []
        return ((self.of_rows[0] > 0) & (self.of_rows[1] == 0)).nonzero().flatten().tolist()

    def report(self) -> EditReport:
        """The sums as means."""
        n = max(self.tokens, 1)
        return EditReport(
            str(self.edit), str(self.edit.site), self.fired, self.tokens, float(self.intended) / n,
            float(self.applied) / n, float(self.before) / n, self.together,
            int(self.gate_open) if self.gated else None, self.gate_decided if self.gated else None,
        )  # fmt: skip
