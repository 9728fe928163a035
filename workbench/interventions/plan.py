"""Plans: interventions bound to a model, which prove that they happened."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.errors import EditError, ShapeError
from workbench.hooks.attach import Fn, attach
from workbench.hooks.handles import Hooks, refuse_compiled, weakly
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.interventions.compiled import Compiled, GateState, compile_edits, refuse_missing, refuse_unmet
from workbench.interventions.intervention import Intervention
from workbench.interventions.jobs import Job, cached_columns, unwatch_generate, watch_generate
from workbench.interventions.op import Where
from workbench.interventions.report import EditReport
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Plan]]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # a plan that is freed while the lock is held takes its hooks off under it


def active_plans(hf: nn.Module) -> tuple[Plan, ...]:
    """The plans that are on for a model, outermost first."""
    with _LOCK:
        plans = [plan() for plan in _ACTIVE.get(hf, ())]
    return tuple(plan for plan in plans if plan is not None)


def _deactivate(hf: nn.Module, plan: weakref.ref[Plan]) -> None:
    with _LOCK:
        left = [known for known in _ACTIVE.get(hf, ()) if known is not plan and known() is not None]
        _ACTIVE[hf] = left
        if not left:
            unwatch_generate(hf)


def require_met(plans: Sequence[Plan]) -> None:
    """Raises EditError for an edit, or a position asked for by name, that met no token in any of several plans."""
    for tallies in zip(*(plan._compiled.tallies for plan in plans), strict=True):
        edit = tallies[0].edit
        if all(tally in plan._compiled.unmet for tally, plan in zip(tallies, plans, strict=True)):
            refuse_unmet(edit, sum(tally.fired for tally in tallies))
        missing = [part for part in tallies[0].missing if all(part in tally.missing for tally in tallies)]
        if missing:
            refuse_missing(edit, missing)


@checked
class Plan:
    """An intervention bound to a model; a context manager in which every use of the model is edited.

    One hook per site; edits of a site in list order, computed in fp32 and rounded to the model's dtype once; edits of
    the form `h + (h U^T) V + b` that follow each other are merged. Leaving the block raises `EditError` if an edit
    never ran, met no token, or changed nothing although it had to. Plans may be nested; they belong to one thread. The
    edits are on as long as the block lasts and the plan is referred to: a plan that is freed takes its hooks off.

    Attributes:
        report: one `EditReport` per edit, up to now.
        proves_scope: whether leaving raises for an edit that met no token. Where one job is done in several blocks, as
            a generation in batches, this is asked of all of them together, by `require_met`.
        first_row: number of the batch's first row in the whole job, for the texts of errors.
        keeps_counts: whether a second block goes on counting, as the turns of a session do, instead of beginning anew.
    """

    proves_scope = True
    keeps_counts = False
    first_row = 0

    def __init__(self, hf: nn.Module, sites: SiteMap, intervention: Intervention) -> None:
        self._hf, self._intervention = hf, intervention
        self._n_rows = intervention.n_rows
        self._compiled: Compiled = compile_edits(sites, intervention, next(hf.parameters()).device)
        self._wants_history = any(edit.scope.needs_history for edit in intervention.edits)
        self._hooks = Hooks()
        self._forget()

    def _forget(self) -> None:
        self._step: Step | None = None
        self._began: nn.Module | None = None
        self.job: Job | None = None
        self._prompt_width = 0
        self._roles: Tensor | None = None
        self._row: Tensor | None = None
        self._history: Tensor | None = None
        self._ignored: Tensor | None = None
        self._selected: dict[tuple[Scope, int], tuple[Tensor, Tensor]] = {}
        self._gates: dict[tuple[int, Site], GateState] = {}

    @property
    def intervention(self) -> Intervention:
        """What this plan does."""
        return self._intervention

    @property
    def report(self) -> tuple[EditReport, ...]:
        """What each edit did up to now."""
        return tuple(tally.report() for tally in self._compiled.tallies)

    def explain(self) -> str:
        """Which edits are made where, which are merged, and from which layer on the model has to be run again."""
        return self._compiled.explain()

    def __str__(self) -> str:
        return f"Plan({'; '.join(map(str, self._intervention.edits)) or 'no edits'})"

    # Entering and leaving.

    def __enter__(self) -> Plan:
        if self._hooks:
            raise EditError("This plan is already active. Leave its block first, or make a second plan.")
        if self._hf.training and any(getattr(m, "gradient_checkpointing", False) for m in self._hf.modules()):
            raise EditError(
                f"{self}: gradient checkpointing runs blocks again, outside of any forward pass that an edit could "
                "know. Call hf.gradient_checkpointing_disable() first."
            )
        refuse_compiled(self._hf, self._compiled.points)
        if not self.keeps_counts:
            self._compiled.reset()
        self._thread = threading.get_ident()
        try:
            self._activate(self._hooks)
            # The base model as well, for calls that do not go through the language model head.
            for module in dict.fromkeys((self._hf, getattr(self._hf, "base_model", self._hf))):
                self._hooks.add(module, weakly(self._begin_step), before=True)
                self._hooks.add(module, weakly(self._end_step), always=True)
            attach(self._hooks, [(point, self.at(point)) for point in self._compiled.points])
            return self
        except BaseException:
            self._hooks.remove()
            raise

    def _activate(self, hooks: Hooks) -> None:
        this: weakref.ref[Plan] = weakref.ref(self)
        with _LOCK:
            others = [plan for plan in active_plans(self._hf) if plan._thread != self._thread]
            if others:
                raise EditError(
                    f"{others[0]} is active on this model in another thread; the edits of both would reach both. "
                    "Put the edits of both into one plan, or give each thread a model of its own."
                )
            hooks.note(partial(_deactivate, self._hf, this))
            _ACTIVE.setdefault(self._hf, []).append(this)
            watch_generate(self._hf, partial(active_plans, self._hf))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._hooks.remove()
        finally:
            self._hooks.remove()
        self._forget()
        if kind is None:
            if self.proves_scope:
                require_met([self])
            self._compiled.prove(self.first_row)

    # What is known about the tokens of a forward pass.

    def roles(
        self, is_prompt: Bool[Tensor, "batch columns"] | None, ids: Int[Tensor, "batch columns"] | None = None
    ) -> None:
        """States which columns of the whole sequence are prompt; those behind it are generated.

        Without it, everything in the first uncached call is prompt. None returns to that.

        Args:
            is_prompt: True at prompt tokens.
            ids: the tokens, where some are cached already that this plan has not seen; `After` looks at them.
        """
        self._roles = is_prompt
        if ids is not None and self._wants_history:
            self._history = ids

    def select_rows(self, index: Int[Tensor, " kept"]) -> None:
        """From the next forward pass on, the batch consists of these rows of the present one."""
        for name in ("_roles", "_row", "_history"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[index.to(value.device)])
        for gate in self._gates.values():
            gate.select(index)
        for tally in self._compiled.tallies:
            tally.keep_rows(index)

    def ignore_rows(self, ended: Bool[Tensor, " batch"]) -> None:
        """States which rows of the batch only keep their place: they are not edited, and not counted."""
        self._ignored = ended
        for tally in self._compiled.tallies:
            tally.end_rows(ended)

    @property
    def points(self) -> Sequence[Point]:
        """Every point that is read or written."""
        return self._compiled.points

    @contextlib.contextmanager
    def stepping(self, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], past: int = 0) -> Iterator[None]:
        """A forward pass of prompts that does not begin at the model's own `forward`, as when resuming.

        Args:
            ids: the whole prompts.
            mask: True at real tokens.
            past: number of columns that are cached and not run.
        """
        self._forget()
        self._prompt_width = ids.shape[1]
        self._history = ids[:, :past] if past else None
        self._set_step(ids[:, past:], ids[:, past:], mask, past)
        try:
            yield
        finally:
            self._forget()

    def _begin_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            raise EditError(f"The model was called from another thread than the one in which {self} is active.")
        # The base model inside the language model; but a second begin of one module follows a pass that was cut short.
        if self._step is not None and module is not self._began:
            return
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)
        ids = given.get("input_ids")
        source = ids if ids is not None else given.get("inputs_embeds")
        if source is None:
            raise EditError("The edited model was called without input_ids or inputs_embeds.")
        past = cached_columns(given)
        batch, width = source.shape[:2]
        mask = given.get("attention_mask")
        plain = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if mask is not None and plain is None and self.job is None:
            what = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            raise EditError(f"attention_mask {what}; edits need the (batch, pos) mask to know padding.")
        if self.job is not None:
            prompt = self.job.prompt_mask(plain, batch, source.device)
            if plain is None:
                new = torch.ones(batch, max(0, past + width - self.job.width), dtype=torch.bool, device=source.device)
                plain = torch.cat([prompt, new], 1)[:, : past + width]
        elif plain is None:
            plain = torch.ones(batch, past + width, dtype=torch.bool, device=source.device)
        self._set_step(ids, source, plain, past)
        self._began = module

    def _end_step(self, module: nn.Module, *_: object) -> None:
        # A pass that was refused in another thread ends here as well.
        if module is self._began and threading.get_ident() == self._thread:
            self._step = self._began = None

    def _set_step(self, ids: Tensor | None, source: Tensor, mask: Tensor, past: int) -> None:
        batch, width = source.shape[:2]
        mask = mask[:, : past + width]
        job = self.job
        if job.fresh if job is not None else past == 0:
            self._prompt_width, self._row, self._ignored = width if job is None else job.width, None, None
            if job is not None:
                job.fresh, self._roles, self._history = False, None, None
            for tally in self._compiled.tallies:
                tally.begin_batch()
        elif self._prompt_width == 0:
            self._prompt_width = past + width
        if self._row is None or len(self._row) != batch:
            self._row = self._rows_of(source, batch, mask.device)
        if self._wants_history:
            self._remember(ids, past)
        roles = self._roles
        if roles is None:
            roles = torch.ones(1, self._prompt_width, dtype=torch.bool, device=mask.device)
        roles = nn.functional.pad(roles, (0, max(0, past + width - roles.shape[1])))[:, : past + width]
        roles = roles.expand(batch, -1)
        position = (mask.long().cumsum(1) - 1).clamp_min(0)
        # One more than the position of the last real prompt token.
        length = (position + 1).masked_fill(~(roles & mask), 0).amax(1)
        if job is not None:
            length = job.prompt_mask(mask, batch, mask.device).sum(1)
        real = mask[:, past:]
        if self._ignored is not None and len(self._ignored) == batch:
            real = real & ~self._ignored[:, None]
        self._step = Step(
            ids, torch.arange(past, past + width, device=mask.device), position[:, past:], length,
            real, roles[:, past:], self._row, self._history,
            None if self._history is None else mask[:, : self._history.shape[1]],
        )  # fmt: skip
        self._selected.clear()

    def _remember(self, ids: Tensor | None, past: int) -> None:
        if ids is None or (past and (self._history is None or self._history.shape[1] < past)):
            self._history = None
        elif past:
            assert self._history is not None
            self._history = torch.cat([self._history[:, :past], ids], 1)
        else:
            self._history = ids

    def _rows_of(self, source: Tensor, batch: int, device: torch.device) -> Tensor:
        """The row of per-row parameters for each batch row; beams and returned sequences repeat each row.

        `source` holds the ids or the embeddings of the pass.
        """
        n = self._n_rows
        if n is None:
            return torch.arange(batch, device=device)
        if batch % n:
            raise ShapeError(f"The intervention has parameters for {n} rows; the batch has {batch} rows.")
        repeats = batch // n
        masks = any(edit.scope.n_rows is not None for edit in self._intervention.edits)
        if repeats > 1 and (n > 1 or masks):
            groups = source.reshape(n, repeats, -1)
            if not bool((groups == groups[:, :1]).all()):
                raise ShapeError(
                    f"The intervention has parameters for {n} rows; the batch has {batch} rows, and they are not each "
                    f"row repeated {repeats} times (as beams or returned sequences are). Give parameters for {batch}."
                )
        return torch.arange(n, device=device).repeat_interleave(repeats)

    # Reading gates and writing edits.

    def at(self, point: Point) -> Fn:
        """The function that reads the gates and makes the edits of one site, as long as this plan exists."""
        gates, groups, this = self._compiled.gates_at(point), self._compiled.groups_at(point), weakref.ref(self)

        def run(x: Tensor) -> Tensor | None:
            plan = this()
            if plan is None:
                return None
            flat = point.flat(x)
            step = plan._step_for(point, flat)
            for gate in gates:
                plan._gates.setdefault((id(gate), point.site), GateState()).read(gate, flat, step)
            edited = plan._write(flat, step, groups)
            return None if edited is None else point.unflat(edited, x)

        return run

    def _step_for(self, point: Point, flat: Tensor) -> Step:
        step = self._step
        if step is None:
            raise EditError(
                f"Site {point.site} was reached without a call of the model itself; call model.hf(...), "
                f"not one of its blocks."
            )
        if flat.shape[0] != step.is_real.shape[0] or flat.shape[1] > step.is_real.shape[1]:
            raise EditError(
                f"Site {point.site} has shape {tuple(flat.shape)}; the batch says (batch, pos) = "
                f"{tuple(step.is_real.shape)}."
            )
        # Behind `logits_to_keep` only the last positions are left.
        return step if flat.shape[1] == step.is_real.shape[1] else step.tail(flat.shape[1])

    def _select(self, scope: Scope, step: Step, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (scope, step.is_real.shape[1])
        if key not in self._selected:
            row, column = scope.mask(step).nonzero(as_tuple=True)
            self._selected[key] = row.to(device), column.to(device)
        row, column = self._selected[key]
        return row.to(device), column.to(device)

    def _write(self, flat: Tensor, step: Step, groups: Any) -> Tensor | None:
        """The edited activations, or None if no token was in scope."""
        work: Tensor | None = None
        done = []
        for group in groups:
            row, column = self._select(group.scope, step, flat.device)
            chosen = group.through_gate(self._gates, row, column, flat.shape[1])
            group.count(row, chosen, step)
            if chosen is not None:
                row, column = row[chosen], column[chosen]
            if row.numel() == 0:
                continue
            source = flat if work is None else work
            whole = row.numel() == flat.shape[0] * flat.shape[1]
            before = source.reshape(-1, flat.shape[2]) if whole else source[row, column]
            before = _exact(before)
            ids = None if step.ids is None else step.ids.to(row.device)[row, column]
            where = Where(step.row.to(row.device)[row], step.position.to(row.device)[row, column], ids)
            wanted = group.apply(before, where)
            if len(groups) == 1:
                written = wanted.to(flat.dtype)
                group.measure(before, _exact(written) - before, where)
                return _put(flat, written, row, column, whole)
            work = _put(_exact(flat) if work is None else work, wanted, row, column, whole)
            done.append((group, row, column, before, where))
        if work is None:
            return None
        written = work.to(flat.dtype)
        change = _exact(written).detach() - _exact(flat).detach()
        for group, row, column, before, where in done:
            group.measure(before, change[row, column], where)
        return written


def _exact(x: Tensor) -> Tensor:
    """In fp32, unless the model computes in something better."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _put(x: Tensor, values: Tensor, row: Tensor, column: Tensor, whole: bool) -> Tensor:
    if whole:
        return values.view_as(x)
    x = x.clone()
    x[row, column] = values
    return x
