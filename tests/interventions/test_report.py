"""What plans say they did: counts, norms, decisions, and the edits that must not go by in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.interventions.builders import bad_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import EditError
from workbench.core.tokens import TokenBatch
from workbench.interventions.chosen import Mask
from workbench.interventions.gates import FnGate, ProbeGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import Add, AddScaled, Map, PerRow, ProjectOut
from workbench.interventions.proof import EditReport, EditReports
from workbench.interventions.saes import SAEAdd, SAEAddMax
from workbench.interventions.scopes import All, Generated, Last, Pos, Prompt
from workbench.interventions.shapes import NormPreserve

IDS = torch.arange(10, 28).view(3, 6)
V = torch.linspace(-1, 2, D_MODEL)
SITE = "resid_post.1"
NORM = float(V.norm())


def test_two_edits_of_one_site_report_their_own_intended_norm_and_the_norm_of_both_together() -> None:
    model = tiny_model()
    w = torch.zeros(D_MODEL)
    w[0] = 3.0
    iv = (
        Intervention.at(SITE, Add(V, 2.0))
        + Intervention.at(SITE, Add(w), Last())
        + Intervention.at("mlp_out.0", Add(V), Pos(0, 2))
    )
    with model.plan(iv) as plan:
        model.logits(IDS)
        model.logits(IDS)
    first, second, elsewhere = plan.report
    assert [done.fired for done in plan.report] == [2, 2, 2]
    assert [done.tokens for done in plan.report] == [2 * 18, 2 * 3, 2 * 6]
    assert [done.together for done in plan.report] == [2, 2, 1]
    assert first.mean_norm_intended == pytest.approx(2 * NORM, rel=1e-5)
    assert second.mean_norm_intended == pytest.approx(3.0, rel=1e-5)
    last = float((2 * V + w).norm())
    assert first.mean_norm_applied == pytest.approx((15 * 2 * NORM + 3 * last) / 18, rel=1e-4)
    assert second.mean_norm_applied == pytest.approx(last, rel=1e-4)
    assert elsewhere.mean_norm_applied == elsewhere.mean_norm_intended == pytest.approx(NORM, rel=1e-4)
    assert "together with 1 more; its own intended norm is 3" in str(second)
    assert "together" not in str(elsewhere)


def test_the_norm_before_is_that_of_the_edited_tokens_only() -> None:
    model = tiny_model()
    clean = model.capture(IDS, [SITE])[SITE]
    with model.plan(Intervention.at(SITE, Add(V), Pos(2))) as plan:
        model.logits(IDS)
    (done,) = plan.report
    assert done.mean_norm_before == pytest.approx(float(clean[:, 2].norm(dim=1).mean()), rel=1e-5)
    assert done.share == pytest.approx(float((NORM / clean[:, 2].norm(dim=1)).mean()), rel=1e-4)
    assert "fired 1x on 3 tokens" in str(done)


def test_an_attention_sink_counts_as_one_token_of_the_share() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[IDS[0, 0]] *= 10_000
    norms = model.capture(IDS, [SITE])[SITE].norm(dim=-1)
    with model.plan(Intervention.at(SITE, Add(V)) + Intervention.at("resid_post.2", Map(lambda h: h / 2))) as plan:
        model.logits(IDS)
    added, scaled = plan.report
    assert added.share == pytest.approx(float((NORM / norms).mean()), rel=1e-4)
    assert added.share > 10 * added.mean_norm_applied / added.mean_norm_before
    assert scaled.share == pytest.approx(0.5, rel=1e-4)
    assert f"({100 * added.share:.3g}% of the activation norm)" in str(added)


def test_a_bfloat16_model_reports_what_was_meant_and_what_was_left_of_it() -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    clean = model.capture(IDS, [SITE])[SITE].float()
    for op in (Add(V, 0.01), ProjectOut(V)):
        with model.plan(Intervention.at(SITE, op)) as plan:
            found = model.capture(IDS, ["resid_pre.2"])["resid_pre.2"].float()
        (done,) = plan.report
        meant = op(clean.flatten(0, 1)) - clean.flatten(0, 1)
        assert done.mean_norm_intended == pytest.approx(float(meant.norm(dim=1).mean()), rel=1e-3)
        assert done.mean_norm_applied == pytest.approx(float((found - clean).norm(dim=-1).mean()), rel=1e-3)
    assert done.mean_norm_applied != pytest.approx(done.mean_norm_intended, rel=1e-5)


def test_a_gate_counts_its_decisions_and_only_the_tokens_that_were_edited() -> None:
    model = tiny_model()
    gate = ProbeGate(V, at="resid_post.0", when="token")
    open_ = int(((model.capture(IDS, ["resid_post.0"])["resid_post.0"][:, 1:4] @ V) > 0).sum())
    assert 0 < open_ < 9
    with model.plan(
        Intervention.at(SITE, When(gate, Add(V)), Pos(1, 2, 3)) + Intervention.at("mlp_out.2", Add(V))
    ) as plan:
        model.logits(IDS)
    gated, plain = plan.report
    assert (gated.gate_open, gated.gate_decided, gated.tokens) == (open_, 9, open_)
    assert (plain.gate_open, plain.gate_decided) == (None, None)
    with model.plan(Intervention.at(SITE, When(gate, Add(V), Add(V, -2.0)), Pos(1, 2, 3))) as plan:
        model.logits(IDS)
    (both,) = plan.report
    assert (both.gate_open, both.gate_decided, both.tokens, both.fired) == (open_, 9, 9, 1)
    assert both.mean_norm_intended == pytest.approx((open_ + 2 * (9 - open_)) * NORM / 9, rel=1e-4)


def test_reports_of_several_batches_become_one_with_means_over_tokens() -> None:
    def made(*values: Any) -> EditReport:
        means = ("mean_norm_intended", "mean_norm_applied", "mean_norm_before", "share")
        counts = ("fired", "tokens", *means, "together")
        return EditReport(
            edit="e", site=SITE, **dict(zip((*counts, "gate_open", "gate_decided"), values, strict=False))
        )

    a, b = made(1, 1, 4.0, 3.0, 10.0, 0.3, 1, 1, 5), made(2, 3, 8.0, 7.0, 20.0, 0.5, 1, 0, 7)
    both = EditReport.merged([a, b])
    # (1 * 4 + 3 * 8) / 4, (1 * 3 + 3 * 7) / 4, (1 * 10 + 3 * 20) / 4, (1 * 0.3 + 3 * 0.5) / 4
    assert both == made(3, 4, 7.0, 6.0, 17.5, 0.45, 1, 1, 12)
    assert EditReport.merged([made(1, 0, 0.0, 0.0, 0.0, 0.0)]).share == 0.0
    assert EditReport.merged([a]) == a


def test_a_scope_that_is_met_now_and_then_counts_every_pass_of_the_hook() -> None:
    model = tiny_model()
    iv = Intervention.at(SITE, Add(V), Pos(7)) + Intervention.at("resid_post.0", Add(V), Generated())
    with model.plan(iv) as plan:
        model.hf.generate(**TokenBatch.of_rows(IDS).hf(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert [(done.fired, done.tokens) for done in plan.report] == [(4, 3), (4, 9)]


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Add(V, 1e-30), "exactly zero"),
        (AddScaled(V, 1e-30), "exactly zero"),
        (PerRow((Add(V, 1e-30), Map(lambda h: h)), torch.tensor([0, 1, 0])), "exactly zero"),
        (NormPreserve(Add(V, 1e-30)), "exactly zero"),
        (SAEAdd(bad_sae(), [2], 1e-30), "exactly zero"),
        (When(FnGate(lambda h: torch.ones(len(h))), Add(V, 1e-30)), "exactly zero"),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else "",
)
def test_an_edit_that_has_to_change_something_and_changed_nothing_raises(op: Op, message: str) -> None:
    model = tiny_model()
    with pytest.raises(EditError, match=message), model.plan(Intervention.at(SITE, op)):
        model.logits(IDS)


def test_an_addition_that_follows_a_dead_sae_says_so() -> None:
    sae = bad_sae()
    sae.b_enc -= 1000
    model = tiny_model()
    with (
        pytest.raises(EditError, match="what it multiplies is zero"),
        model.plan(Intervention.at(SITE, SAEAddMax(sae, V, 3.0))),
    ):
        model.logits(IDS)


def test_two_edits_that_cancel_are_an_error_in_words_of_their_own() -> None:
    model = tiny_model()
    with (
        pytest.raises(EditError, match="2 edits of this site cancel"),
        model.plan(Intervention.at(SITE, Add(V)) + Intervention.at(SITE, Add(V, -1.0))),
    ):
        model.logits(IDS)


def test_edits_that_may_change_nothing_do_not_raise() -> None:
    model = tiny_model()
    clean = model.logits(IDS)
    for op in (Map(lambda h: h), Add(V, 0.0), PerRow((Add(V, 1e-30),), torch.tensor([-1, -1, -1]))):
        with model.plan(Intervention.at(SITE, op)):
            assert torch.equal(model.logits(IDS), clean)


def test_only_the_edit_that_met_no_token_is_named() -> None:
    model = tiny_model()
    iv = Intervention.at(SITE, Add(V)) + Intervention.at("mlp_out.0", Add(V), Pos(60))
    with pytest.raises(EditError, match=r"Add at mlp_out.0 on Pos\(positions=\(60,\)\): no token"), model.plan(iv):
        model.logits(IDS)


def test_an_exception_in_the_block_is_not_covered_by_the_proof() -> None:
    with pytest.raises(ZeroDivisionError), tiny_model().plan(Intervention.at(SITE, Add(V))):
        raise ZeroDivisionError


def test_explain_says_what_is_read_and_written_where_in_the_order_of_the_pass() -> None:
    mask = torch.ones(3, 6, dtype=torch.bool)
    iv = (
        Intervention.at("resid_post.2", When(ProbeGate(V, at="resid_post.0"), Add(V), ProjectOut(V)), Prompt())
        + Intervention.at("resid_post.1", Add(V))
        + Intervention.at("resid_post.1", ProjectOut(V))
        + Intervention.at("mlp_out.1", Map(lambda h: 2 * h), Mask(mask))
    )
    lines = tiny_model().plan(iv).explain().splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "resid_post.0",
        "mlp_out.1",
        "resid_post.1",
        "resid_post.2",
        "everything",
    ]
    assert "read by ProbeGate per prompt" in lines[0]
    assert "Map on Mask(18 of 18 columns)" in lines[1]
    assert "(model.layers.0, output)" in lines[0]
    assert "Add + ProjectOut (merged into one edit of rank 1) on All()" in lines[2]
    assert "Add on Prompt() where ProbeGate is open; ProjectOut on Prompt() where ProbeGate is closed" in lines[3]
    assert "everything before resid_post.0" in lines[4]


def test_a_plan_and_its_edits_have_names_for_people() -> None:
    iv = Intervention.at(SITE, NormPreserve(Add(V)), ~Last() & All())
    assert str(iv.edits[0]) == "NormPreserve(Add) at resid_post.1 on (~Last() & All())"
    assert str(tiny_model().plan(iv)) == f"Plan({iv.edits[0]})"
    assert str(tiny_model().plan(Intervention())) == "Plan(no edits)"


def test_reports_are_a_tuple_that_shows_itself_as_a_table() -> None:
    model = tiny_model()
    both = Intervention.at("resid_post.0", Add(V)) + Intervention.at("resid_post.1", ProjectOut(V))
    reports = model.generate(["one <b>day"], max_new_tokens=2, intervention=both).report
    assert type(reports) is EditReports and reports == tuple(reports) and isinstance(reports, tuple)
    assert repr(reports).startswith(f"EditReports(2 edits; {reports[0]}")
    assert reports.frame()["tokens"].tolist() == [done.tokens for done in reports]
    html = reports._repr_html_()
    assert html.count("<tr>") == 3 and "mean_norm_applied" in html and "gate_open" not in html
    assert repr(EditReports()) == "EditReports(0 edits)" and EditReports().frame().empty
    assert model.generate(["one day"], max_new_tokens=2).report == ()
