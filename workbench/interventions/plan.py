"""Interventions, and plans that bind them to a model and prove that they happened."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.errors import DegenerateInputError, EditError, InvalidInputError, ShapeError
from workbench.hooks.attach import Fn, attached
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.interventions.ops import Op
from workbench.interventions.scopes import All, Scope, Step


@dataclass(frozen=True)
class Edit:
    """One op at one site on the tokens of one scope."""

    site: Site
    op: Op
    scope: Scope

    def __str__(self) -> str:
        return f"{type(self.op).__name__} at {self.site} on {self.scope}"


@dataclass(frozen=True)
class Intervention:
    """An ordered list of edits, without reference to a model. `+` puts one after the other."""

    edits: tuple[Edit, ...] = ()

    @classmethod
    def at(cls, site: str | Site, op: Op, scope: Scope | None = None) -> Intervention:
        """One edit. The default scope is every token.

        Raises:
            UnknownSiteError: if there is no such kind of site.
        """
        if not isinstance(op, Op):
            raise InvalidInputError(
                f"Intervention.at: {type(op).__name__} is not an op; give Add(vector), SAEAblate(...)."
            )
        return cls((Edit(Site.parse(site), op, scope or All()),))

    def __add__(self, other: Intervention) -> Intervention:
        return Intervention(self.edits + other.edits)

    @property
    def n_rows(self) -> int | None:
        """Number of batch rows that per-row parameters are for, or None."""
        sizes = {edit.op.n_rows for edit in self.edits} - {None}
        if len(sizes) > 1:
            raise ShapeError(f"The edits have parameters for {sorted(map(str, sizes))} rows; they must agree.")
        return next(iter(sizes), None)

    def take(self, rows: Int[Tensor, " chosen"]) -> Intervention:
        """The same intervention for a choice of batch rows."""
        return Intervention(tuple(Edit(e.site, e.op.take(rows), e.scope.take(rows)) for e in self.edits))


@dataclass(frozen=True)
class EditReport:
    """What one edit did.

    Attributes:
        edit: the edit in words.
        site: where.
        fired: number of forward passes in which its hook ran.
        tokens: number of tokens that were edited.
        mean_norm_intended: mean L2 norm of the change as computed in fp32.
        mean_norm_applied: mean L2 norm of the change that reached the model, after rounding to its dtype.
        mean_norm_before: mean L2 norm of the hidden states that were edited.
    """

    edit: str
    site: str
    fired: int
    tokens: int
    mean_norm_intended: float
    mean_norm_applied: float
    mean_norm_before: float

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

        norms = [mean(name) for name in ("mean_norm_intended", "mean_norm_applied", "mean_norm_before")]
        return cls(parts[0].edit, parts[0].site, sum(part.fired for part in parts), tokens, *norms)

    def __str__(self) -> str:
        return (
            f"{self.edit}: fired {self.fired}x on {self.tokens} tokens, mean norm added {self.mean_norm_applied:.4g} "
            f"({100 * self.share:.3g} % of the activation norm)"
        )


class _Tally:
    """Sums of one edit, kept on the device so that no forward pass waits for them."""

    def __init__(self) -> None:
        self.fired = 0
        self.tokens: Tensor | int = 0
        self.intended: Tensor | float = 0.0
        self.applied: Tensor | float = 0.0
        self.before: Tensor | float = 0.0

    def add(self, before: Tensor, wanted: Tensor, written: Tensor) -> None:
        self.tokens = self.tokens + before.shape[0]
        self.intended = self.intended + (wanted - before).norm(dim=1).sum()
        self.applied = self.applied + (written.float() - before).norm(dim=1).sum()
        self.before = self.before + before.norm(dim=1).sum()

    def report(self, edit: Edit) -> EditReport:
        tokens = int(self.tokens)
        n = max(tokens, 1)
        norms = [float(total) / n for total in (self.intended, self.applied, self.before)]
        return EditReport(str(edit), str(edit.site), self.fired, tokens, *norms)


class Plan:
    """An intervention bound to a model; a context manager in which every use of the model is edited.

    One hook per site, edits of a site in list order, computed in fp32 and cast back once. Leaving the block raises
    `EditError` if an edit never ran, met no token, or changed nothing although it had to.

    Attributes:
        report: one `EditReport` per edit, up to now.
    """

    def __init__(self, hf: nn.Module, sites: SiteMap, intervention: Intervention) -> None:
        if not intervention.edits:
            raise DegenerateInputError(
                "plan(Intervention()): there is no edit in it. Add one with Intervention.at(...)."
            )
        self._hf, self._intervention = hf, intervention
        self._by_point: dict[Point, list[tuple[Edit, _Tally]]] = {}
        self._tallies: list[tuple[Edit, _Tally]] = []
        for edit in intervention.edits:
            point = sites[edit.site]
            if point.width is not None and edit.op.width not in (None, point.width):
                raise ShapeError(
                    f"{edit}: the op is for width {edit.op.width}; site {edit.site} has width {point.width}."
                )
            entry = (edit, _Tally())
            self._tallies.append(entry)
            self._by_point.setdefault(point, []).append(entry)
        self._n_rows = intervention.n_rows
        self._step: Step | None = None
        self._last_ids: Tensor | None = None
        self._prompt_width = 0
        self._stack: contextlib.ExitStack | None = None

    @property
    def intervention(self) -> Intervention:
        """What this plan does."""
        return self._intervention

    @property
    def report(self) -> tuple[EditReport, ...]:
        """What each edit did up to now."""
        return tuple(tally.report(edit) for edit, tally in self._tallies)

    def __enter__(self) -> Plan:
        if self._stack is not None:
            raise EditError("This plan is already active. Leave its block first, or make a second plan.")
        with contextlib.ExitStack() as stack:
            handle = self._hf.register_forward_pre_hook(self._begin_step, with_kwargs=True)
            stack.callback(handle.remove)
            stack.enter_context(attached([(point, self._writer(point)) for point in self._by_point]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None
        if kind is None:
            self._prove()

    def _prove(self) -> None:
        for edit, tally in self._tallies:
            done = tally.report(edit)
            if done.fired == 0:
                raise EditError(
                    f"{edit}: the hook never ran. Nothing was edited; was the model called inside the block?"
                )
            if done.tokens == 0:
                raise EditError(f"{edit}: no token was in scope in {done.fired} forward passes, so nothing was edited.")
            if done.mean_norm_applied == 0 and edit.op.must_change:
                raise EditError(
                    f"{edit}: {done.tokens} tokens met the edit, but the change of mean norm "
                    f"{done.mean_norm_intended:.3g} was lost in rounding to the model's dtype. "
                    "Use a larger strength or load the model in float32."
                )

    def _begin_step(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        if source is None:
            raise EditError("The edited model was called without input_ids or inputs_embeds.")
        batch, width = source.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, past + width, dtype=torch.bool, device=source.device)
        elif mask.ndim != 2:
            raise EditError(
                f"attention_mask has shape {tuple(mask.shape)}; edits need the (batch, pos) mask to know padding."
            )
        if past == 0 and not self._continues(ids):
            self._prompt_width = width
        elif self._prompt_width == 0:
            self._prompt_width = past + width
        self._last_ids = ids if past == 0 else None
        self._step = _step(ids, mask.bool(), past, width, self._prompt_width)
        if self._n_rows is not None and batch % self._n_rows:
            raise ShapeError(f"The intervention has parameters for {self._n_rows} rows; the batch has {batch} rows.")

    def _continues(self, ids: Tensor | None) -> bool:
        """Whether this uncached call is the previous one with one generated token appended."""
        last = self._last_ids
        if last is None or ids is None or ids.shape[0] != last.shape[0] or ids.shape[1] != last.shape[1] + 1:
            return False
        return torch.equal(ids[:, :-1], last)

    def _writer(self, point: Point) -> Fn:
        entries = self._by_point[point]

        def write(x: Tensor) -> Tensor:
            step = self._step
            if step is None or x.shape[:2] != step.is_real.shape:
                raise EditError(f"Site {point.site} has shape {tuple(x.shape)}; the batch says {self._expected()}.")
            for edit, tally in entries:
                x = self._apply(x, edit, tally, step)
            return x

        return write

    def _expected(self) -> str:
        return "no forward pass" if self._step is None else f"(batch, pos) = {tuple(self._step.is_real.shape)}"

    def _apply(self, x: Tensor, edit: Edit, tally: _Tally, step: Step) -> Tensor:
        tally.fired += 1
        row, column = edit.scope.mask(step).to(x.device).nonzero(as_tuple=True)
        if row.numel() == 0:
            return x
        before = x[row, column].float()
        # Beams and returned sequences repeat each row next to itself.
        owner = row if self._n_rows is None else row // (x.shape[0] // self._n_rows)
        wanted = edit.op(before, owner)
        if wanted.shape != before.shape:
            raise EditError(f"{edit}: the op returned shape {tuple(wanted.shape)} for {tuple(before.shape)}.")
        written = wanted.to(x.dtype)
        edited = x.clone()
        edited[row, column] = written
        tally.add(before.detach(), wanted.detach(), written.detach())
        return edited


def _step(ids: Tensor | None, mask: Tensor, past: int, width: int, prompt_width: int) -> Step:
    column = torch.arange(past, past + width, device=mask.device)
    position = (mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    is_prompt = (column < prompt_width)[None].expand(mask.shape[0], -1)
    return Step(ids, column, position, mask[:, :prompt_width].sum(1), mask[:, past:], is_prompt)

