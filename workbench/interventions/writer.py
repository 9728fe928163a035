"""What is written at each site: edits grouped by site, merged where they can be, with their gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import EditError, InvalidInputError, ShapeError
from workbench.hooks.attach import Fn
from workbench.hooks.sites import Point, SiteMap
from workbench.interventions.gates import Gate, GateState, When
from workbench.interventions.intervention import Edit
from workbench.interventions.merge import Merged
from workbench.interventions.op import LowRankForm, Op, Where
from workbench.interventions.proof import Tally
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step
from workbench.interventions.tracker import Tracker


@dataclass(eq=False)
class Group:
    """Edits of one site that are written as one.

    Attributes:
        tallies: one per edit.
        ops: the ops, one per edit.
        scope: their common scope.
        gate: makes the edit conditional; such an edit is alone in its group.
        negated: the edit is made where the gate is closed.
        merged: all ops as one; None for a single op.
    """

    tallies: list[Tally]
    ops: list[Op]
    scope: Scope
    gate: GateState | None = None
    negated: bool = False
    merged: Merged | None = None

    def takes(self, edit: Edit, op: Op) -> bool:
        """Whether an edit behind these can be merged with them."""
        if self.scope != edit.scope or self.gate is not None:
            return False
        # What is being trained changes between forward passes; it is not folded into anything.
        forms = (self.ops[0].low_rank(), op.low_rank())
        return all(f is not None and not any(t.requires_grad for t in (f.read, f.write, f.bias)) for f in forms)

    def merge(self) -> None:
        """Makes one low-rank edit of several."""
        forms: list[LowRankForm] = [form for op in self.ops if (form := op.low_rank()) is not None]
        self.merged = Merged(forms) if len(self.ops) > 1 else None

    def through_gate(self, row: Tensor, column: Tensor, width: int) -> Bool[Tensor, " n"] | None:
        """Which of the tokens pass the gate, or None if there is no gate; `width` is the number of columns here."""
        if self.gate is None:
            return None
        if not row.numel():
            return torch.ones_like(row, dtype=torch.bool)
        decided = self.gate.at(row, column, width)
        if decided is None:
            raise EditError(
                f"{self.tallies[0].edit}: its gate has not decided yet; it never saw a prompt. Enter the plan before "
                "the prompt is run."
            )
        return ~decided if self.negated else decided

    def count(self, row: Int[Tensor, " n"], chosen: Tensor | None, step: Step) -> None:
        """Notes that the hook ran on tokens in scope, of which rows they are, and how many passed the gate."""
        n = len(row)
        for tally in self.tallies:
            tally.in_scope += n
            tally.look_for(step, row)
            if self.negated:
                continue
            tally.fired += 1
            if chosen is not None:
                tally.gate_decided += n
                tally.gate_open = tally.gate_open + chosen.sum()

    def apply(self, before: Float[Tensor, "n d"], where: Where) -> Float[Tensor, "n d"]:
        """The edited hidden states; each edit's own change is added to its tally."""
        if self.merged is not None:
            wanted, norms = self.merged(before, where)
        else:
            wanted = self.ops[0](before, where)
            if wanted.shape != before.shape:
                raise EditError(
                    f"{self.tallies[0].edit}: the op returned shape {tuple(wanted.shape)} for {tuple(before.shape)}."
                )
            norms = [(wanted.detach() - before.detach()).norm(dim=1)]
        for tally, norm in zip(self.tallies, norms, strict=True):
            tally.intended = tally.intended + norm.detach().sum()
        return wanted

    def measure(self, before: Float[Tensor, "n d"], change: Float[Tensor, "n d"], where: Where) -> None:
        """Adds what reached the model."""
        size, applied = before.detach().norm(dim=1), change.detach().norm(dim=1)
        for tally in self.tallies:
            tally.measure(size, applied, where.rows)

    def __str__(self) -> str:
        merged = f" (merged into one edit of rank {self.merged.rank})" if self.merged else ""
        where = "closed" if self.negated else "open"
        gate = "" if self.gate is None else f" where {type(self.gate.gate).__name__} is {where}"
        return f"{' + '.join(op.name for op in self.ops)}{merged} on {self.scope}{gate}"


class Writer:
    """The edits of an intervention bound to the points of a model, and the tallies that prove them.

    Attributes:
        points: every point that is read or written.

    Raises:
        UnknownSiteError: for a site that this model does not have.
        ShapeError: for an op or a gate of the wrong width.
        InvalidInputError: for a gate that is read too late.
    """

    def __init__(self, sites: SiteMap, tallies: Sequence[Tally], tracker: Tracker, device: torch.device) -> None:
        self._sites, self._tracker = sites, tracker
        self._groups: dict[Point, list[Group]] = {}
        self._gates: dict[Point, list[GateState]] = {}
        for tally in tallies:
            self._add(tally, sites[tally.edit.site], device)
        _refuse_turns([sites[tally.edit.site] for tally in tallies])
        for groups in self._groups.values():
            count = len({id(tally) for group in groups for tally in group.tallies})
            for group in groups:
                group.merge()
                for tally in group.tallies:
                    tally.together = count
        self.points = [*(point for point in self._gates if point not in self._groups), *self._groups]

    def _add(self, tally: Tally, point: Point, device: torch.device) -> None:
        edit = tally.edit
        for part in edit.op.walk():
            _check_width(str(edit), part.width, point)
            if isinstance(part, When) and part is not edit.op:
                raise InvalidInputError(
                    f"{edit}: the gate is inside another edit, where it could not read its own site. Put it outside: "
                    "When(gate, NormPreserve(...)), or one edit per condition."
                )
        op, groups = edit.op.to(device), self._groups.setdefault(point, [])
        if isinstance(op, When):
            gate = self._gate(edit, op.gate, point)
            groups.append(Group([tally], [op.op], edit.scope, gate))
            if op.otherwise is not None:
                groups.append(Group([tally], [op.otherwise], edit.scope, gate, negated=True))
        elif groups and groups[-1].takes(edit, op):
            groups[-1].tallies.append(tally)
            groups[-1].ops.append(op)
        else:
            groups.append(Group([tally], [op], edit.scope))

    def _gate(self, edit: Edit, gate: Gate, point: Point) -> GateState:
        """The state of a gate; a gate of two edits that each read their own site has two."""
        read_at = point if gate.site is None else self._sites[gate.site]
        _check_width(f"{edit}, its gate", gate.width, read_at)
        if point.site.precedes(read_at.site) and (gate.when == "token" or edit.scope.touches_prompt):
            raise InvalidInputError(
                f"{edit}: the gate reads {read_at.site}, which is computed after {point.site}. Read an earlier site, "
                "or decide on the prompt (when='prompt') and edit Generated() tokens only."
            )
        states = self._gates.setdefault(read_at, [])
        if not any(state.gate is gate for state in states):
            states.append(GateState(gate, read_at.site))
        return next(state for state in states if state.gate is gate)

    def forget(self) -> None:
        """Forgets what the gates decided."""
        for state in self._states:
            state.forget()

    def select_rows(self, index: Int[Tensor, " kept"]) -> None:
        """Keeps what the gates decided for some rows."""
        for state in self._states:
            state.select(index)

    @property
    def _states(self) -> list[GateState]:
        return [state for states in self._gates.values() for state in states]

    def at(self, point: Point) -> Fn:
        """The function that reads the gates and makes the edits of one site."""
        gates, groups, tracker = self._gates.get(point, ()), self._groups.get(point, ()), self._tracker

        def run(x: Tensor) -> Tensor | None:
            flat = point.flat(x)
            step = tracker.step_at(point, flat.shape)
            for gate in gates:
                gate.read(flat, step)
            edited = _write(flat, step, groups, tracker)
            return None if edited is None else point.unflat(edited, x)

        return run

    def explain(self) -> str:
        """One line per site and group."""
        lines = []
        for point in sorted(self.points, key=lambda point: point.site.order):
            reads = [f"read by {type(s.gate).__name__} per {s.gate.when}" for s in self._gates.get(point, ())]
            reads += map(str, self._groups.get(point, ()))
            lines.append(f"{point.site} ({point.path}, {point.side}put): " + "; ".join(reads))
        if lines:
            first = min((point.site for point in self.points), key=lambda site: site.order)
            lines.append(f"everything before {first} is as without the plan and need not be run again for another edit")
        return "\n".join(lines) or "no edits"


def _write(flat: Tensor, step: Step, groups: Sequence[Group], tracker: Tracker) -> Tensor | None:
    """The edited activations, or None if no token was in scope."""
    work: Tensor | None = None
    done: list[tuple[Group, Tensor, Tensor, Tensor, Where]] = []
    for group in groups:
        row, column = tracker.select(group.scope, step, flat.device)
        chosen = group.through_gate(row, column, flat.shape[1])
        group.count(row, chosen, step)
        if chosen is not None:
            row, column = row[chosen], column[chosen]
        if row.numel() == 0:
            continue
        source = flat if work is None else work
        whole = row.numel() == flat.shape[0] * flat.shape[1]
        before = _exact(source.reshape(-1, flat.shape[2]) if whole else source[row, column])
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


def _refuse_turns(points: Sequence[Point]) -> None:
    """Refuses edits that go back and forth between a whole site and its heads: one hook makes all edits of a point."""
    for kind, layer in {(point.site.kind, point.site.layer) for point in points}:
        same = [p for p in points if (p.site.kind, p.site.layer) == (kind, layer)]
        turns = [p for i, p in enumerate(same) if i == 0 or same[i - 1] != p]
        # Heads alone don't overlap, so their order among each other makes no difference.
        if len(turns) > len(set(turns)) and any(p.site.head is None for p in turns):
            raise InvalidInputError(
                f"The edits go back and forth between {', '.join(str(p.site) for p in turns)}. Keep the edits of each "
                "of them together, or use nested plans."
            )


def _check_width(what: str, width: int | None, point: Point) -> None:
    if point.width is not None and width not in (None, point.width):
        raise ShapeError(f"{what}: the op is for width {width}; site {point.site} has width {point.width}.")
