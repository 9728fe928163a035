"""Several interventions as rows of one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.core.errors import DegenerateInputError
from workbench.interventions.chosen import Rows
from workbench.interventions.intervention import Edit, Intervention
from workbench.interventions.op import Op, changed
from workbench.interventions.ops import PerRow
from workbench.interventions.scopes import All


def variants(interventions: Sequence[Intervention], batch: int) -> Intervention:
    """Several interventions as one, for a batch in which the prompts are repeated once per intervention.

    Row `v * batch + i` gets intervention v on prompt i. Interventions that differ only in parameters become one edit
    with parameters per row; others keep an edit each, on their rows.

    Args:
        interventions: what to compare; an empty one is the unedited model.
        batch: number of prompts.

    Raises:
        DegenerateInputError: if there are none.
        ShapeError: if one has parameters for another number of rows.
        MismatchError: if they were made for different models.
    """
    if not interventions:
        raise DegenerateInputError("variants([]): there is no intervention to compare. Give at least one.")
    interventions = [intervention.for_rows(batch) for intervention in interventions]
    made_for = sum(interventions, Intervention()).made_for
    stacked = _stacked(interventions, batch)
    if stacked is not None:
        return Intervention(stacked, made_for)
    total = len(interventions) * batch
    row = torch.arange(total)
    edits = []
    for v, intervention in enumerate(interventions):
        mine = Rows(row // batch == v)
        for edit in intervention.edits:
            # Also where nothing is per row: what is drawn at random is drawn by the number of the prompt.
            scope = mine if isinstance(edit.scope, All) else edit.scope.take(row % batch) & mine
            edits.append(Edit(edit.site, edit.op.take(row % batch), scope))
    return Intervention(tuple(edits), made_for)


def _stacked(interventions: Sequence[Intervention], batch: int) -> tuple[Edit, ...] | None:
    """One edit with parameters per row for each place, if the interventions differ in parameters only."""
    if len({len(intervention.edits) for intervention in interventions}) > 1:
        return None
    row = torch.arange(len(interventions) * batch)
    edits = []
    for same in zip(*(intervention.edits for intervention in interventions), strict=True):
        first = same[0]
        if any(edit.site != first.site or edit.scope != first.scope for edit in same):
            return None
        op = _stacked_op([edit.op for edit in same], batch)
        if op is None:
            return None
        edits.append(Edit(first.site, op, first.scope.take(row % batch)))
    return tuple(edits)


def _stacked_op(ops: Sequence[Op], batch: int) -> Op | None:
    first = ops[0]
    if any(type(op) is not type(first) for op in ops) or isinstance(first, PerRow):
        return None
    ops = [op.take(torch.arange(batch)) for op in ops]
    first = ops[0]
    changes: dict[str, object] = {}
    for field in dataclasses.fields(first):  # type: ignore[arg-type]
        values = [getattr(op, field.name) for op in ops]
        if field.name in first.per_row and not all(value is None for value in values):
            parts = [_for_rows(op, field.name, batch) for op in ops]
            if len({part.shape[1:] for part in parts}) > 1:
                return None
            changes[field.name] = torch.cat(parts)
        elif any(value is not values[0] and not _same(value, values[0]) for value in values):
            return None
    return changed(first, changes)


def _for_rows(op: Op, name: str, batch: int) -> Tensor:
    """A parameter with one entry per prompt."""
    value = torch.as_tensor(getattr(op, name))
    return value if name in op._row_values() else value.expand(batch, *value.shape)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not (a.requires_grad or b.requires_grad) and a.device == b.device and torch.equal(a, b)
    return isinstance(a, (str, int, float, bool, type(None))) and type(a) is type(b) and a == b
