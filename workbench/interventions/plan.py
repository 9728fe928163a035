"""Plans: interventions bound to a model, which prove that they happened."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Bool, Int
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.errors import EditError
from workbench.core.html import Shown, ShownText, preformatted
from workbench.hooks.attach import Fn, attach
from workbench.hooks.handles import Hooks, refuse_compiled, weakly
from workbench.hooks.sites import Point, SiteMap
from workbench.interventions.intervention import Intervention
from workbench.interventions.jobs import unwatch_generate, watch_generate
from workbench.interventions.proof import EditReports, Tally, require_met
from workbench.interventions.tracker import Tracker
from workbench.interventions.writer import Writer

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Plan]]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # a plan that is freed while the lock is held takes its hooks off under it


def active_plans(hf: nn.Module) -> tuple[Plan, ...]:
    """The plans that are on for a model, outermost first."""
    with _LOCK:
        plans = [plan() for plan in _ACTIVE.get(hf, ())]
    return tuple(plan for plan in plans if plan is not None)


def _trackers(hf: nn.Module) -> Iterator[Tracker]:
    return (plan.tracker for plan in active_plans(hf))


def _deactivate(hf: nn.Module, plan: weakref.ref[Plan]) -> None:
    with _LOCK:
        left = [known for known in _ACTIVE.get(hf, ()) if known is not plan and known() is not None]
        _ACTIVE[hf] = left
        if not left:
            unwatch_generate(hf)


@checked
class Plan(Shown):
    """An intervention bound to a model; a context manager in which every use of the model is edited.

    One hook per site; edits of a site in list order, computed in fp32 and rounded to the model's dtype once; edits of
    the form `h + (h U^T) V + b` that follow each other are merged. Leaving the block raises `EditError` if an edit
    never ran, met no token, or changed nothing although it had to. Plans may be nested; they belong to one thread. The
    edits are on as long as the block lasts and the plan is referred to: a plan that is freed takes its hooks off.

    Attributes:
        intervention: what it does.
        tracker: knows which token is what.
        tallies: count and measure what each edit does.
        points: every point that is read or written.
        proves_scope: whether leaving raises for an edit that met no token. Where one job is done in several blocks, as
            a generation in batches, this is asked of all of them together, by `require_met`.
        first_row: number of the batch's first row in the whole job, for the texts of errors.
        keeps_counts: whether a second block continues the counts of the first, as the turns of a session do.
    """

    proves_scope = True
    keeps_counts = False
    first_row = 0

    def __init__(self, hf: nn.Module, sites: SiteMap, intervention: Intervention) -> None:
        self._hf, self.intervention = hf, intervention
        self.tracker = Tracker(intervention)
        self.tallies = [Tally(edit, intervention.n_rows) for edit in intervention.edits]
        self._writer = Writer(sites, self.tallies, self.tracker, next(hf.parameters()).device)
        self.points: Sequence[Point] = self._writer.points
        self._hooks = Hooks()

    @property
    def report(self) -> EditReports:
        """One `EditReport` per edit: what it did up to now."""
        return EditReports(tally.report() for tally in self.tallies)

    def explain(self) -> ShownText:
        """Which edits are made where, which are merged, and from which layer on the model has to be run again."""
        return ShownText(self._writer.explain())

    def frame(self) -> pd.DataFrame:
        """One row per edit: what it is, and what it did up to now."""
        return self.report.frame()

    def __str__(self) -> str:
        return f"Plan({'; '.join(map(str, self.intervention.edits)) or 'no edits'})"

    def _shown_note(self) -> str:
        return "on" if self._hooks else "off"

    def _shown_line(self) -> str:
        return f"{self._shown_note()}: {'; '.join(map(str, self.intervention.edits)) or 'no edits'}"

    def _shown_parts(self) -> Iterable[Markup]:
        yield self.report.shown_table("what each edit did up to now")
        yield preformatted(self.explain())

    # Entering and leaving.

    def __enter__(self) -> Plan:
        if self._hooks:
            raise EditError("This plan is already active. Leave its block first, or make a second plan.")
        if self._hf.training and any(getattr(m, "gradient_checkpointing", False) for m in self._hf.modules()):
            raise EditError(
                f"{self}: gradient checkpointing runs blocks again, outside of any forward pass that an edit could "
                "know. Call hf.gradient_checkpointing_disable() first."
            )
        refuse_compiled(self._hf, self.points)
        if not self.keeps_counts:
            for tally in self.tallies:
                tally.reset()
        self._thread = threading.get_ident()
        try:
            self._activate(self._hooks)
            # The base model as well, for calls that do not go through the language model head.
            for module in dict.fromkeys((self._hf, getattr(self._hf, "base_model", self._hf))):
                self._hooks.add(module, weakly(self._begin_step), before=True)
                self._hooks.add(module, weakly(self._end_step), always=True)
            attach(self._hooks, [(point, self.at(point)) for point in self.points])
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
            watch_generate(self._hf, partial(_trackers, self._hf))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._hooks.remove()
        finally:
            self._hooks.remove()
        self._forget()
        if kind is None:
            if self.proves_scope:
                require_met([self.tallies])
            for tally in self.tallies:
                tally.prove(self.first_row)

    def _forget(self) -> None:
        self.tracker.forget()
        self._writer.forget()

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
        self.tracker.set_roles(is_prompt, ids)

    def select_rows(self, index: Int[Tensor, " kept"]) -> None:
        """From the next forward pass on, the batch consists of these rows of the present one."""
        self.tracker.select_rows(index)
        self._writer.select_rows(index)
        for tally in self.tallies:
            tally.keep_rows(index)

    def ignore_rows(self, ended: Bool[Tensor, " batch"]) -> None:
        """States which rows of the batch only keep their place: they are not edited, and not counted."""
        self.tracker.ignore_rows(ended)
        for tally in self.tallies:
            tally.end_rows(ended)

    def at(self, point: Point) -> Fn:
        """The function that reads the gates and makes the edits of one site."""
        return self._writer.at(point)

    @contextlib.contextmanager
    def stepping(self, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], past: int = 0) -> Iterator[None]:
        """A forward pass of prompts that does not begin at the model's own `forward`, as in a segment.

        Args:
            ids: the whole prompts.
            mask: True at real tokens.
            past: number of columns that are cached and not run.
        """
        self._writer.forget()
        self._begin_batch(self.tracker.prefill(ids, mask, past))
        try:
            yield
        finally:
            self._forget()

    def _begin_step(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        if threading.get_ident() != self._thread:
            raise EditError(f"The model was called from another thread than the one in which {self} is active.")
        self._begin_batch(self.tracker.begin(module, args, kwargs))

    def _begin_batch(self, is_new: bool) -> None:
        if is_new:
            for tally in self.tallies:
                tally.begin_batch()

    def _end_step(self, module: nn.Module, *_: object) -> None:
        # A pass that was refused in another thread ends here as well.
        if threading.get_ident() == self._thread:
            self.tracker.end(module)
