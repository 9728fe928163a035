"""The inside of a plan: edits grouped by site, merged where they can be, with their gates and their measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import EditError, InvalidInputError, ShapeError
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.interventions.gates import Gate, When
from workbench.interventions.intervention import Edit, Intervention
from workbench.interventions.merge import Merged
from workbench.interventions.op import LowRankForm, Op, Where
from workbench.interventions.report import Tally
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step


class GateState:
    """What one gate has decided."""

    def __init__(self) -> None:
        self.of_row: Tensor | None = None
        self.of_token: Tensor | None = None

    def read(self, gate: Gate, x: Float[Tensor, "batch pos d"], step: Step) -> None:
        """Decides from the activations at the gate's site; a prompt's decision is held while generating."""
        with torch.no_grad():
            if gate.when == "token":
                self.of_token = gate.open(gate.score(x.flatten(0, 1).float())).view(x.shape[:2])
                return
            prompt = (step.is_prompt & step.is_real).to(x.device)
            if bool(prompt.any()):
                self.of_row = gate.decide(x, prompt)

    def select(self, index: Tensor) -> None:
        """Keeps the decisions of some rows."""
        if self.of_row is not None:
            self.of_row = self.of_row[index.to(self.of_row.device)]

    def at(self, row: Tensor, column: Tensor, width: int) -> Bool[Tensor, " n"] | None:
        """The decision for each token of the last `width` columns, or None if there is none yet."""
        if self.of_token is not None:
            return self.of_token.to(row.device)[row, column - width]
        return None if self.of_row is None else self.of_row.to(row.device)[row]


GateStates = Mapping[tuple[int, Site], GateState]
"""By id of the gate and the site that it reads: a gate of two edits that each read their own site decides twice."""


@dataclass(eq=False)
class Group:
    """Edits of one site that are written as one.

    Attributes:
        tallies: one per edit.
        ops: the ops, one per edit.
        scope: their common scope.
        gate: makes the edit conditional; such an edit is alone in its group.
        read_at: the site that the gate reads.
        negated: the edit is made where the gate is closed.
        merged: all ops as one; None for a single op.
    """

    tallies: list[Tally]
    ops: list[Op]
    scope: Scope
    gate: Gate | None = None
    read_at: Site | None = None
    negated: bool = False
    merged: Merged | None = None

    def through_gate(self, states: GateStates, row: Tensor, column: Tensor, width: int) -> Bool[Tensor, " n"] | None:
        """Which of the tokens pass the gate, or None if there is no gate; `width` is the number of columns here."""
        if self.gate is None or self.read_at is None:
            return None
        if not row.numel():
            return torch.ones_like(row, dtype=torch.bool)
        state = states.get((id(self.gate), self.read_at))
        decided = None if state is None else state.at(row, column, width)
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


@dataclass
class Compiled:
    """An intervention bound to the points of a model."""

    tallies: list[Tally] = field(default_factory=list)
    groups: dict[Point, list[Group]] = field(default_factory=dict)
    gates: dict[Point, list[Gate]] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        """Every point that is read or written."""
        return [*(point for point in self.gates if point not in self.groups), *self.groups]

    def groups_at(self, point: Point) -> Sequence[Group]:
        """What is written at a point."""
        return self.groups.get(point, ())

    def gates_at(self, point: Point) -> Sequence[Gate]:
        """What is read at a point."""
        return self.gates.get(point, ())

    def reset(self) -> None:
        """Begins to count anew."""
        for tally in self.tallies:
            tally.reset()

    @property
    def unmet(self) -> list[Tally]:
        """Edits that met no token, although their scope may hold some."""
        return [tally for tally in self.tallies if tally.in_scope == 0 and not tally.edit.scope.is_empty]

    def prove(self, first_row: int = 0) -> None:
        """Raises EditError if an edit met tokens and did not change them as it had to, or met none in some row.

        Args:
            first_row: number of the first row of the batch in the whole job, for the text of the error.
        """
        for tally in self.tallies:
            done = tally.report()
            n_empty, row = tally.rows_without()
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
            if done.tokens and done.mean_norm_applied == 0 and tally.edit.op.must_change:
                why = (
                    f"the change of mean norm {done.mean_norm_intended:.3g} was lost in rounding to the model's dtype. "
                    "Use a larger strength or load the model in float32."
                )
                if done.mean_norm_intended == 0:
                    why = "the change was exactly zero. Use a larger strength, unless what it multiplies is zero there."
                elif tally.together > 1:
                    why = f"the {tally.together} edits of this site cancel, or were lost in rounding to its dtype."
                raise EditError(f"{done.edit}: {done.tokens} tokens met the edit, but {why}")
            lost = [row for row in tally.unchanged_rows() if tally.edit.op.take(torch.tensor([row])).must_change]
            if lost:
                raise EditError(
                    f"{done.edit}: its parameters of row {', '.join(map(str, lost[:10]))} ({len(lost)} of "
                    f"{tally.n_rows} rows) met tokens, but changed none of them; the change was zero or lost in "
                    "rounding. Use a larger strength there."
                )

    def explain(self) -> str:
        """One line per site and group."""
        lines = []
        for point in sorted(self.points, key=lambda point: point.site.order):
            reads = [f"read by {type(gate).__name__} per {gate.when}" for gate in self.gates_at(point)]
            for group in self.groups_at(point):
                names = " + ".join(op.name for op in group.ops)
                merged = f" (merged into one edit of rank {group.merged.rank})" if group.merged else ""
                gate = "" if group.gate is None else f" where {type(group.gate).__name__} is "
                gate += "" if group.gate is None else ("closed" if group.negated else "open")
                reads.append(f"{names}{merged} on {group.scope}{gate}")
            lines.append(f"{point.site} ({point.path}, {point.side}put): " + "; ".join(reads))
        if lines:
            first = min((point.site for point in self.points), key=lambda site: site.order)
            lines.append(f"everything before {first} is as without the plan and need not be run again for another edit")
        return "\n".join(lines) or "no edits"


def refuse_missing(edit: Edit, missing: Sequence[Scope]) -> NoReturn:
    """Raises EditError for positions that no row has."""
    places = ", ".join(map(str, missing))
    raise EditError(f"{edit}: no row has a token at {places}. Leave it out, or give longer prompts.")


def refuse_unmet(edit: Edit, fired: int) -> NoReturn:
    """Raises EditError for an edit that met no token."""
    if fired == 0 and not edit.scope.touches_prompt:
        raise EditError(
            f"{edit}: no generated token went through the model, so nothing was edited. A token is edited when it is "
            "fed back: ask for at least 2 new tokens, and check that rows do not end at once."
        )
    if fired == 0:
        raise EditError(f"{edit}: the hook never ran. Nothing was edited; was the model called inside the block?")
    raise EditError(f"{edit}: no token was in scope in {fired} forward passes, so nothing was edited.")


def compile_edits(sites: SiteMap, intervention: Intervention, device: torch.device) -> Compiled:
    """Checks every edit against the model, groups by site, and merges.

    Raises:
        UnknownSiteError: for a site that this model does not have.
        ShapeError: for an op or a gate of the wrong width.
        InvalidInputError: for a gate that is read too late.
    """
    compiled = Compiled()
    for edit in intervention.edits:
        point = sites[edit.site]
        for part in edit.op.walk():
            _check_width(str(edit), part.width, point)
            if isinstance(part, When) and part is not edit.op:
                raise InvalidInputError(
                    f"{edit}: the gate is inside another edit, where it could not read its own site. Put it outside: "
                    "When(gate, NormPreserve(...)), or one edit per condition."
                )
        op = edit.op.to(device)
        tally = Tally(edit, gated=isinstance(op, When), n_rows=intervention.n_rows)
        compiled.tallies.append(tally)
        groups = compiled.groups.setdefault(point, [])
        if isinstance(op, When):
            read_at = _add_gate(compiled, sites, edit, op.gate, point)
            groups.append(Group([tally], [op.op], edit.scope, op.gate, read_at))
            if op.otherwise is not None:
                groups.append(Group([tally], [op.otherwise], edit.scope, op.gate, read_at, negated=True))
        elif groups and _merges(groups[-1], edit, op):
            groups[-1].tallies.append(tally)
            groups[-1].ops.append(op)
        else:
            groups.append(Group([tally], [op], edit.scope))
    _check_order(compiled, [sites[edit.site] for edit in intervention.edits])
    for groups in compiled.groups.values():
        count = len({id(tally) for group in groups for tally in group.tallies})
        for group in groups:
            group.merged = Merged(list(_forms(group))) if len(group.ops) > 1 else None
            for tally in group.tallies:
                tally.together = count
    return compiled


def _merges(group: Group, edit: Edit, op: Op) -> bool:
    if group.scope != edit.scope or group.gate is not None:
        return False
    # What is being trained changes between forward passes; it is not folded into anything.
    forms = (group.ops[0].low_rank(), op.low_rank())
    return all(f is not None and not any(t.requires_grad for t in (f.read, f.write, f.bias)) for f in forms)


def _forms(group: Group) -> Iterator[LowRankForm]:
    for op in group.ops:
        form = op.low_rank()
        if form is not None:
            yield form


def _check_order(compiled: Compiled, points: Sequence[Point]) -> None:
    """Refuses edits that go back and forth between a whole site and its heads: one hook makes all edits of a point."""
    for point in compiled.groups:
        same = [p for p in points if (p.site.kind, p.site.layer) == (point.site.kind, point.site.layer)]
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


def _add_gate(compiled: Compiled, sites: SiteMap, edit: Edit, gate: Gate, point: Point) -> Site:
    read_at = point if gate.site is None else sites[gate.site]
    _check_width(f"{edit}, its gate", gate.width, read_at)
    late = read_at.site.order > point.site.order
    if late and (gate.when == "token" or edit.scope.touches_prompt):
        raise InvalidInputError(
            f"{edit}: the gate reads {read_at.site}, which is computed after {point.site}. Read an earlier site, or "
            "decide on the prompt (when='prompt') and edit Generated() tokens only."
        )
    gates = compiled.gates.setdefault(read_at, [])
    if not any(known is gate for known in gates):
        gates.append(gate)
    return read_at.site
