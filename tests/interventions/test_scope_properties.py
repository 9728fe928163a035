"""Random scopes against a reference that looks at one token at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.interventions.builders import padded
from tests.tiny import tiny_model
from workbench.core.errors import EditError
from workbench.interventions.chosen import Mask, Rows
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op, Where
from workbench.interventions.plan import Plan
from workbench.interventions.scopes import (
    After,
    All,
    Both,
    Either,
    Generated,
    Last,
    Not,
    NotPrefix,
    Pos,
    Prompt,
    Scope,
    TokenIs,
)
from workbench.models.model import Model

TOKENS = (1, 5, 6)  # 1 is also the padding token
PROPERTY = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@functools.cache
def model() -> Model:
    return tiny_model()


@dataclass(frozen=True, eq=False)
class _Record(Op):
    """Changes nothing and remembers which tokens it met."""

    seen: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, h: torch.Tensor, where: Where | None = None) -> torch.Tensor:
        assert where is not None
        self.seen.extend(zip(where.rows.tolist(), where.positions.tolist(), strict=True))
        return h

    def drain(self) -> list[tuple[int, int]]:
        found = list(self.seen)
        self.seen.clear()
        return found


@dataclass(frozen=True)
class Case:
    """Prompts, what follows each of them, and how they are padded."""

    prompts: list[list[int]]
    new: list[list[int]]
    side: str
    scope: Scope

    def start(self, row: int) -> int:
        """Column of the first real token."""
        width = max(map(len, self.prompts))
        return width - len(self.prompts[row]) if self.side == "left" else 0


def holds(scope: Scope, case: Case, row: int, p: int) -> bool:
    """Whether token p of a row is in scope, by the words of the documentation."""
    n, text = len(case.prompts[row]), case.prompts[row] + case.new[row]
    match scope:
        case Both():
            return holds(scope.left, case, row, p) and holds(scope.right, case, row, p)
        case Either():
            return holds(scope.left, case, row, p) or holds(scope.right, case, row, p)
        case Not():
            return not holds(scope.inner, case, row, p)
        case All():
            return True
        case Prompt():
            return p < n
        case Generated():
            return p >= n
        case Last():
            return p == n - 1
        case Pos():
            return p in [q if q >= 0 else n + q for q in scope.positions]
        case NotPrefix():
            return p >= scope.n
        case TokenIs():
            return text[p] in scope.ids
        case Rows():
            return bool(scope.chosen[row])
        case Mask():
            column = case.start(row) + p
            return column < scope.chosen.shape[1] and bool(scope.chosen[row, column])
        case After():
            marker = list(scope.marker)
            until = p if scope.occurrence == "first" else min(p, n)
            ends = [e for e in range(len(marker), until + 1) if text[e - len(marker) : e] == marker]
            if scope.occurrence == "last":
                # Behind the last one of the whole prompt, so a token between two of them is not in scope.
                ends = [e for e in range(len(marker), n + 1) if text[e - len(marker) : e] == marker]
                return bool(ends) and p >= ends[-1]
            return bool(ends)
    raise AssertionError(scope)


def reference(case: Case, first: int, until: int) -> list[tuple[int, int]]:
    """Tokens in scope in columns `first` to `until` of the whole, in the order of rows and columns."""
    return [
        (row, p)
        for row in range(len(case.prompts))
        for p in range(len(case.prompts[row]) + len(case.new[row]))
        if first <= case.start(row) + p < until and holds(case.scope, case, row, p)
    ]


# Plain values, because type-checked objects may not be made inside a strategy (beartype draws random numbers).
LEAVES = st.one_of(
    st.sampled_from([("all",), ("prompt",), ("generated",), ("last_prompt",), ("mask",), ("rows",)]),
    st.lists(st.integers(-7, 9), min_size=1, max_size=2).map(lambda ps: ("pos", *ps)),
    st.lists(st.sampled_from(TOKENS), min_size=1, max_size=2).map(lambda ids: ("token", *ids)),
    st.tuples(st.sampled_from(["first", "last"]), st.lists(st.sampled_from(TOKENS), min_size=1, max_size=2)),
    st.tuples(st.just("not_prefix"), st.integers(0, 5)),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=4,
)


@st.composite
def drawn(draw: Any, *, side: str | None = None) -> dict[str, Any]:
    rows = draw(st.integers(1, 3))
    side = side or draw(st.sampled_from(["left", "right"]))
    prompts = [draw(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=6)) for _ in range(rows)]
    n_new = draw(st.integers(1, 4)) if side == "left" else 0
    new = [draw(st.lists(st.sampled_from(TOKENS), min_size=n_new, max_size=n_new)) for _ in range(rows)]
    width = max(map(len, prompts))
    table = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    chosen = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return {"prompts": prompts, "new": new, "side": side, "table": table, "chosen": chosen, "tree": draw(TREES)}


def built(values: dict[str, Any]) -> Case:
    rows = len(values["prompts"])
    table, chosen = torch.tensor(values["table"]).view(rows, -1), torch.tensor(values["chosen"])
    table[0, 0], chosen[0] = True, True

    def scope(tree: Any) -> Scope:
        kind, *parts = tree
        plain = {"all": All, "prompt": Prompt, "generated": Generated, "last_prompt": Last}
        if kind in plain:
            return plain[kind]()
        if kind in ("first", "last"):
            return After(tuple(parts[0]), kind)
        known = {
            "mask": lambda: Mask(table, may_skip_rows=True),
            "rows": lambda: Rows(chosen),
            "pos": Pos,
            "token": TokenIs,
            "not_prefix": NotPrefix,
        }
        if kind in known:
            return known[kind](*parts)
        left, *right = map(scope, parts)
        return ~left if kind == "not" else left & right[0] if kind == "and" else left | right[0]

    return Case(values["prompts"], values["new"], values["side"], scope(values["tree"]))


@contextlib.contextmanager
def recording(scope: Scope, *, expected: bool = True) -> Iterator[tuple[Plan, _Record]]:
    """A plan that records; it must refuse to end if no token was ever in scope."""
    op = _Record()
    with contextlib.nullcontext() if expected else pytest.raises(EditError, match="no token was in scope"):
        with model().plan(Intervention.at("resid_post.0", op, scope)) as plan:
            yield plan, op
            # Positions that no row has, or that some row lacks, are refused by name, which is tested elsewhere.
            for tally in plan.tallies:
                tally.missing, tally.waiting, tally.empty = [], None, None


def _forward(ids: torch.Tensor, mask: torch.Tensor, past: Any, width: int, *, cached: bool) -> Any:
    position = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -width:]
    return model().hf(
        input_ids=ids[:, -width:],
        attention_mask=mask.long(),
        position_ids=position,
        past_key_values=past,
        use_cache=cached,
    )


@PROPERTY
@given(values=drawn())
@torch.no_grad()
def test_a_scope_holds_the_tokens_of_the_reference_and_never_padding_cached_or_not(values: dict[str, Any]) -> None:
    case = built(values)
    batch = padded(case.prompts, case.side)
    width, n_new = batch.ids.shape[1], len(case.new[0])
    ids = torch.cat([batch.ids, torch.tensor(case.new, dtype=torch.long).view(len(case.prompts), n_new)], 1)
    mask = torch.cat([batch.mask, torch.ones(len(case.prompts), n_new, dtype=torch.bool)], 1)
    anything = bool(reference(case, 0, width + n_new))
    with recording(case.scope, expected=anything) as (_, op):
        past = _forward(ids[:, :width], mask[:, :width], None, width, cached=True).past_key_values
        assert op.drain() == reference(case, 0, width)
        for end in range(width + 1, width + n_new + 1):
            _forward(ids[:, :end], mask[:, :end], past, 1, cached=True)
            assert op.drain() == reference(case, end - 1, end)
    with recording(case.scope, expected=anything) as (plan, op):
        # Without a cache a forward pass can't tell generated tokens from prompt; hf.generate is watched, this loop is not.
        plan.roles(torch.ones(len(ids), width, dtype=torch.bool))
        for end in range(width, width + n_new + 1):
            _forward(ids[:, :end], mask[:, :end], None, end, cached=False)
            assert op.drain() == reference(case, 0, end)
    if not case.scope.touches_prompt:
        assert reference(case, 0, width) == []


@PROPERTY
@given(values=drawn(side="left"), data=st.data())
@torch.no_grad()
def test_rows_taken_from_a_batch_keep_their_scope(values: dict[str, Any], data: st.DataObject) -> None:
    case = built(values)
    batch = padded(case.prompts, "left")
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(case.prompts) - 1), min_size=1, max_size=3)))
    wanted = [
        (new, p)
        for new, old in enumerate(chosen.tolist())
        for row, p in reference(case, 0, batch.ids.shape[1])
        if row == old
    ]
    taken = case.scope.take(chosen)
    if taken.is_empty:
        assert not wanted
    with recording(taken, expected=bool(wanted) or taken.is_empty) as (_, op):
        model().logits(type(batch)(batch.ids[chosen], batch.mask[chosen]))
        assert op.drain() == wanted


@PROPERTY
@given(values=drawn(side="left"), data=st.data())
@torch.no_grad()
def test_rows_that_leave_a_batch_while_generating_leave_the_scope_of_the_others_as_it_was(
    values: dict[str, Any], data: st.DataObject
) -> None:
    case = built(values)
    batch = padded(case.prompts, "left")
    width, n = batch.ids.shape[1], len(case.prompts)
    new = torch.tensor(case.new)
    keep = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    found = []
    with recording(case.scope) as (plan, op):
        past = _forward(batch.ids, batch.mask, None, width, cached=True).past_key_values
        past.batch_select_indices(keep)
        plan.select_rows(keep)
        op.drain()
        ids, mask = batch.ids[keep], batch.mask[keep]
        for step in range(new.shape[1]):
            ids, mask = (
                torch.cat([ids, new[keep, step : step + 1]], 1),
                torch.nn.functional.pad(mask, (0, 1), value=True),
            )
            _forward(ids, mask, past, 1, cached=True)
            found.append(op.drain())
            assert found[-1] == [
                (row, p) for row, p in reference(case, width + step, width + step + 1) if row in keep.tolist()
            ]
        plan.tallies.clear()  # whether anything was in scope is not the question here


@PROPERTY
@given(values=drawn(side="left"))
@torch.no_grad()
def test_each_row_alone_and_without_padding_has_the_scope_that_it_has_in_the_batch(values: dict[str, Any]) -> None:
    case = built(values)
    whole = reference(case, 0, 99)
    for row, prompt in enumerate(case.prompts):
        # A Mask speaks of columns, so the row keeps its own where it has no padding left.
        start = case.start(row)
        scope = _shifted(case.scope.take(torch.tensor([row])), start)
        ids = torch.tensor([prompt + case.new[row]])
        wanted = [(0, p) for r, p in whole if r == row]
        with recording(scope, expected=bool(wanted) or scope.is_empty) as (plan, op):
            plan.roles(torch.tensor([[True] * len(prompt) + [False] * len(case.new[row])]))
            _forward(ids, torch.ones_like(ids, dtype=torch.bool), None, ids.shape[1], cached=False)
            assert op.drain() == wanted


def _shifted(scope: Scope, start: int) -> Scope:
    if isinstance(scope, Mask):
        full = torch.ones(1, scope.chosen.shape[1] - start, dtype=torch.bool)
        out = Mask(full)
        object.__setattr__(out, "chosen", scope.chosen[:, start:])
        return out
    return scope._mapped(lambda inner: _shifted(inner, start))
