"""Merged edits against the same edits made one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.interventions.builders import edited
from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.interventions.intervention import Intervention
from workbench.interventions.merge import Merged
from workbench.interventions.op import Op, Where
from workbench.interventions.ops import Add, LowRank, Map, ProjectOut
from workbench.interventions.replacing import Ablate
from workbench.interventions.scopes import Last, Pos

IDS = torch.arange(10, 28).view(3, 6)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = 3
OPS: dict[str, Op] = {
    "add": Add(_random(D_MODEL, seed=1), -2.0),
    "add_rows": Add(_random(ROWS, D_MODEL, seed=2), torch.tensor([1.0, 0.0, 3.0])),
    "add_strengths": Add(_random(D_MODEL, seed=3), torch.tensor([0.5, -1.0, 0.0])),
    "out": ProjectOut(_random(D_MODEL, seed=4)),
    "out2": ProjectOut(_random(2, D_MODEL, seed=5)),
    "mean": Ablate("mean", _random(D_MODEL, seed=6), _random(2, D_MODEL, seed=7)),
    "zero": Ablate(directions=_random(D_MODEL, seed=8)),
    "loreft": LowRank(_random(2, D_MODEL, seed=9), _random(2, D_MODEL, seed=10), _random(2, seed=11)),
    "loreft0": LowRank(0.3 * _random(1, D_MODEL, seed=12), 0.3 * _random(1, D_MODEL, seed=13)),
}
CHAINS = [
    *itertools.permutations(["add", "out", "loreft"]),
    *itertools.permutations(["add_rows", "mean", "add_strengths"]),
    ("add", "add", "add_rows"),
    ("out2", "zero"),
    ("loreft0", "mean", "add", "out2", "add_strengths", "loreft", "zero"),
    ("out", "out"),
    ("add_rows", "loreft0", "out", "mean", "add_rows"),
]


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_merged_edits_and_the_norm_of_each_equal_the_edits_one_after_the_other(chain: tuple[str, ...]) -> None:
    h = 10 * _random(7, D_MODEL, seed=0)
    where = Where(torch.tensor([0, 1, 2, 2, 1, 0, 0]), torch.arange(7))
    forms = [OPS[name].low_rank() for name in chain]
    assert all(form is not None for form in forms)
    merged, norms = Merged([form for form in forms if form is not None])(h, where)
    x = h
    for name, norm in zip(chain, norms, strict=True):
        after = OPS[name](x, where)
        torch.testing.assert_close(norm, (after - x).norm(dim=1), atol=2e-3, rtol=1e-3)
        x = after
    torch.testing.assert_close(merged, x, atol=1e-3, rtol=1e-4)


def test_order_matters_in_a_merged_edit() -> None:
    h, where = _random(4, D_MODEL, seed=0), Where(torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.long))
    v = _random(D_MODEL, seed=1)
    add, out = Add(v), ProjectOut(v)
    first, _ = Merged([f for f in (add.low_rank(), out.low_rank()) if f])(h, where)
    then, _ = Merged([f for f in (out.low_rank(), add.low_rank()) if f])(h, where)
    unit = v / v.norm()
    torch.testing.assert_close(first @ unit, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(then @ unit, v.norm().expand(4), atol=1e-5, rtol=1e-5)


def test_a_plan_merges_what_follows_each_other_in_one_scope_and_reports_every_edit_by_itself() -> None:
    model = tiny_model()
    names = ("add", "out", "mean", "add_rows", "loreft")
    iv = sum((Intervention.at("resid_post.1", OPS[name]) for name in names), Intervention())
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"].flatten(0, 1)
    with model.plan(iv) as plan:
        found = model.capture(IDS, ["resid_pre.2"])["resid_pre.2"].flatten(0, 1)
    assert "merged into one edit of rank 5" in plan.explain()
    where = Where(torch.arange(3).repeat_interleave(6), torch.arange(6).repeat(3))
    x = clean
    for name, done in zip(names, plan.report, strict=True):
        after = OPS[name](x, where)
        assert done.mean_norm_intended == pytest.approx(float((after - x).norm(dim=1).mean()), rel=1e-3)
        x = after
    torch.testing.assert_close(found, x, atol=1e-3, rtol=1e-4)
    total = float((x - clean).norm(dim=1).mean())
    for done in plan.report:
        assert (done.tokens, done.fired, done.together) == (18, 1, 5)
        assert done.mean_norm_applied == pytest.approx(total, rel=1e-3)
        assert done.mean_norm_before == pytest.approx(float(clean.norm(dim=1).mean()), rel=1e-3)


def test_edits_of_other_scopes_or_other_forms_are_not_merged_but_keep_their_order() -> None:
    model = tiny_model()
    v = _random(D_MODEL, seed=1)
    parts = [
        Intervention.at("resid_post.1", Add(v)),
        Intervention.at("resid_post.1", ProjectOut(v), Last()),
        Intervention.at("resid_post.1", Map(lambda h: 2 * h)),
        Intervention.at("resid_post.1", Add(v, 0.5), Pos(0)),
        Intervention.at("resid_post.1", Add(v, 0.25), Pos(0)),
    ]
    plan = model.plan(sum(parts, Intervention()))
    assert plan.explain().count("merged") == 1
    assert "Add + Add (merged into one edit of rank 0) on Pos(positions=(0,))" in plan.explain()
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    x = clean + v
    x[:, -1] = ProjectOut(v)(x[:, -1])
    x = 2 * x
    x[:, 0] += 0.75 * v
    torch.testing.assert_close(edited(model, IDS, sum(parts, Intervention())), x, atol=1e-3, rtol=1e-4)


def test_merging_parameters_for_different_numbers_of_rows_is_refused_in_words() -> None:
    v = _random(D_MODEL, seed=1)
    two = Intervention.at("resid_post.1", Add(v, torch.ones(2))) + Intervention.at(
        "resid_post.1", Add(v, torch.ones(3))
    )
    with pytest.raises(ShapeError, match="for 2, 3 rows"):
        tiny_model().plan(two)


def test_one_row_of_parameters_serves_a_batch_of_any_size() -> None:
    model = tiny_model()
    v = _random(1, D_MODEL, seed=1)
    both = Intervention.at("resid_post.1", Add(v)) + Intervention.at("resid_post.1", Add(v[0], torch.tensor([2.0])))
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    torch.testing.assert_close(edited(model, IDS, both), clean + 3 * v[0], atol=1e-4, rtol=1e-4)


def test_heads_may_take_turns_since_they_do_not_overlap_but_not_with_their_whole_site() -> None:
    model = tiny_model()
    d_head = model.width("z.1.h0")
    zero = Ablate("zero")
    heads = [Intervention.at(f"z.1.h{head}", zero) for head in (0, 1, 0)]
    twice = heads[0] + heads[1] + heads[2]
    torch.testing.assert_close(edited(model, IDS, twice), edited(model, IDS, heads[0] + heads[1]))
    whole = Intervention.at("z.1", Add(torch.ones(model.width("z.1"))))
    with pytest.raises(InvalidInputError, match="go back and forth"):
        edited(model, IDS, heads[0] + whole + heads[0])
    assert d_head < model.width("z.1")
