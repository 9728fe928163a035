"""Conditional edits: closed rows are untouched, open rows are those of the edit without a condition."""

from __future__ import annotations

import pytest
import torch

from tests.interventions.builders import bad_sae, edited, padded
from tests.tiny import D_MODEL, FP32_LOGITS, n_hooks, tiny_model
from workbench.core.errors import EditError, InvalidInputError, ShapeError
from workbench.core.tokens import TokenBatch
from workbench.interventions.gates import CosineGate, FnGate, Gate, ProbeGate, SAEGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add, PerRow, ProjectOut
from workbench.interventions.scopes import All, Generated, Last, Prompt
from workbench.interventions.shapes import NormPreserve
from workbench.models.model import Model

IDS = torch.arange(10, 28).view(3, 6)
V = torch.linspace(-1, 2, D_MODEL)
EDIT = Add(V, 4.0)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def separating(model: Model, ids: torch.Tensor, row: int, **options: object) -> ProbeGate:
    """A probe on the mean of resid_post.0 that is open for exactly one row."""
    x = model.capture(ids, ["resid_post.0"])["resid_post.0"].mean(1)
    weight = x[row] - x[[i for i in range(len(x)) if i != row]].mean(0)
    best = (x @ weight).topk(2).values
    gate = ProbeGate(weight, -float(best.mean()), at="resid_post.0", **options)
    assert (gate.score(x) > 0).tolist() == [i == row for i in range(len(x))]
    return gate


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_closed_rows_are_bit_identical_to_no_edit_and_open_rows_to_the_edit_without_a_gate(
    family: str, padding: str
) -> None:
    model = tiny_model(family)
    rows = IDS.tolist() if padding == "none" else [IDS[0].tolist(), IDS[1, :4].tolist(), IDS[2, :5].tolist()]
    batch = TokenBatch.of_rows(IDS) if padding == "none" else padded(rows, padding)
    means = torch.stack(
        [model.capture(torch.tensor([row]), ["resid_post.0"])["resid_post.0"][0].mean(0) for row in rows]
    )
    weight = means[1] - means[[0, 2]].mean(0)
    gate = ProbeGate(weight, -float((means @ weight).topk(2).values.mean()), at="resid_post.0")
    clean = model.logits(batch, "all")
    with model.plan(Intervention.at("resid_post.1", EDIT)):
        always = model.logits(batch, "all")
    with model.plan(Intervention.at("resid_post.1", When(gate, EDIT))) as plan:
        found = model.logits(batch, "all")
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert torch.equal(found[1], always[1])
    assert not torch.equal(found[1], clean[1])
    (done,) = plan.report
    n = int(batch.mask.sum())
    assert (done.gate_open, done.gate_decided, done.tokens) == (len(rows[1]), n, len(rows[1]))
    assert f"gate open for {len(rows[1])} of {n} tokens" in str(done)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompts_decision_is_held_while_generating_even_where_new_tokens_would_change_it(use_cache: bool) -> None:
    model = tiny_model()
    # Open where the mean over the tokens read is greater; the edit pushes every later score far below.
    gate = separating(model, IDS, 2)
    push = Add(-1000 * gate.weight / gate.weight.norm())
    iv = Intervention.at("resid_post.1", When(gate, EDIT)) + Intervention.at("resid_pre.0", push, Generated())
    always = Intervention.at("resid_post.1", EDIT) + Intervention.at("resid_pre.0", push, Generated())
    never = Intervention.at("resid_pre.0", push, Generated())
    inputs = {
        **TokenBatch.of_rows(IDS).hf(),
        **GREEDY,
        "use_cache": use_cache,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = {}
    for name, one in (("gated", iv), ("always", always), ("never", never)):
        with model.plan(one):
            found[name] = torch.stack(model.hf.generate(**inputs).logits, 1)
    assert torch.equal(found["gated"][:2], found["never"][:2])
    assert torch.equal(found["gated"][2], found["always"][2])
    assert float((found["always"] - found["never"]).abs().max()) > 0.1


def test_a_token_gate_decides_for_each_token_by_itself() -> None:
    model = tiny_model()
    x = model.capture(IDS, ["resid_post.0"])["resid_post.0"]
    gate = ProbeGate(V, at="resid_post.0", when="token")
    open_ = (x @ V) > 0
    assert 0 < int(open_.sum()) < open_.numel()
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    found = edited(model, IDS, Intervention.at("resid_post.1", When(gate, EDIT, Add(V, -1.0))))
    torch.testing.assert_close(found, clean + torch.where(open_, 4.0, -1.0)[..., None] * V, atol=1e-4, rtol=1e-4)
    only = edited(model, IDS, Intervention.at("resid_post.1", When(gate, EDIT)))
    assert torch.equal(only[~open_], clean[~open_])


def test_a_token_gate_follows_the_token_into_generation_and_with_logits_of_the_last_position_only() -> None:
    model = tiny_model()
    gate = ProbeGate(V, at="resid_post.0", when="token")
    runs = []
    for use_cache in (True, False):
        with model.plan(Intervention.at("resid_post.1", When(gate, EDIT))) as plan:
            runs.append(model.hf.generate(**TokenBatch.of_rows(IDS).hf(), **GREEDY, use_cache=use_cache))
        assert 0 < (plan.report[0].gate_open or 0) < (plan.report[0].gate_decided or 0)
    assert torch.equal(runs[0], runs[1])
    # At the logits only the last column is left; its gate is that of the last column, not of the first.
    bump = torch.zeros(model.d_vocab)
    bump[5] = 50.0
    open_ = (model.capture(IDS, ["resid_post.0"])["resid_post.0"] @ V) > 0
    assert open_[:, 0].tolist() != open_[:, -1].tolist()
    clean = model.hf(IDS, use_cache=False, logits_to_keep=1).logits[:, 0]
    with model.plan(Intervention.at("logits", When(gate, Add(bump)))):
        found = model.hf(IDS, use_cache=False, logits_to_keep=1).logits[:, 0]
    torch.testing.assert_close(found, clean + open_[:, -1:].float() * bump)


@pytest.mark.parametrize(
    ("reduce", "below"), [("mean", False), ("last", False), ("max", False), ("last", True), ("max", True)]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_reduced_over_its_real_tokens_only(reduce: str, below: bool, side: str) -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(4, 6, D_MODEL, generator=g)
    lengths = [6, 3, 1, 4]
    real = torch.zeros(4, 6, dtype=torch.bool)
    for i, n in enumerate(lengths):
        real[i, slice(6 - n, 6) if side == "left" else slice(0, n)] = True
    h[~real] = 1e4 if not below else -1e4  # padding that would open every gate
    scores = []
    for i in range(4):
        own = h[i][real[i]]
        s = own @ V
        reduced = {"mean": own.mean(0) @ V, "last": s[-1], "max": s.amin() if below else s.amax()}
        scores.append(float(reduced[reduce]))
    threshold = sum(scores) / 4
    gate = ProbeGate(V, threshold=threshold, reduce=reduce, below=below)  # type: ignore[arg-type]
    wanted = [s < threshold if below else s > threshold for s in scores]
    assert gate.decide(h, real).tolist() == wanted
    assert 0 < sum(wanted) < 4


def test_a_row_without_a_real_token_stays_closed() -> None:
    h, real = torch.ones(2, 3, D_MODEL), torch.tensor([[True, True, True], [False, False, False]])
    for reduce in ("mean", "last", "max"):
        for gate in (
            FnGate(lambda h: torch.ones(len(h)), reduce=reduce),
            FnGate(lambda h: -torch.ones(len(h)), reduce=reduce, below=True),
        ):
            assert gate.decide(h, real).tolist() == [True, False]


def test_a_gate_that_is_read_behind_its_edit_is_refused_unless_it_only_edits_what_comes_later() -> None:
    model = tiny_model()
    for gate, scope in (
        (ProbeGate(V, at="resid_post.2"), All()),
        (ProbeGate(V, at="resid_post.2"), Generated() | Last()),
        (ProbeGate(V, at="mlp_out.1", when="token"), Generated()),
        (ProbeGate(V, at="resid_pre.2", when="token"), All()),
    ):
        with pytest.raises(InvalidInputError, match="computed after"):
            model.plan(Intervention.at("resid_post.0", When(gate, EDIT), scope))
    assert n_hooks(model.hf) == 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_gate_behind_its_edit_decides_on_the_prompt_for_the_tokens_that_are_generated(use_cache: bool) -> None:
    model = tiny_model()
    x = model.capture(IDS, ["resid_post.2"])["resid_post.2"].mean(1)
    weight = x[0] - x[1:].mean(0)
    gate = ProbeGate(weight, -float((x @ weight).topk(2).values.mean()), at="resid_post.2")
    inputs = {
        **TokenBatch.of_rows(IDS).hf(),
        **GREEDY,
        "use_cache": use_cache,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    clean = torch.stack(model.hf.generate(**inputs).logits, 1)
    with model.plan(Intervention.at("resid_post.0", EDIT, Generated())):
        always = torch.stack(model.hf.generate(**inputs).logits, 1)
    with model.plan(Intervention.at("resid_post.0", When(gate, EDIT), Generated())) as plan:
        found = torch.stack(model.hf.generate(**inputs).logits, 1)
    assert torch.equal(found[1:], clean[1:])
    assert torch.equal(found[0], always[0])
    assert plan.report[0].tokens == (5 if use_cache else 1 + 2 + 3 + 4 + 5)


def test_one_gate_of_two_edits_that_read_their_own_sites_decides_for_each() -> None:
    model = tiny_model()
    sites = ("resid_post.0", "resid_post.1")
    x = {site: model.capture(IDS, [site])[site].mean(1) for site in sites}
    # A direction on which row 0 is above at the first site and below at the second.
    for seed in range(200):
        w = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
        if float(x[sites[0]][0] @ w) > 1 and float(x[sites[1]][0] @ w) < -1:
            break
    gate = ProbeGate(w)
    small = Add(V, 1e-4)  # does not move any decision
    iv = Intervention.at(sites[0], When(gate, small)) + Intervention.at(sites[1], When(gate, small))
    with model.plan(iv) as plan:
        model.hf.generate(**TokenBatch.of_rows(IDS[:1]).hf(), **GREEDY)
    first, second = plan.report
    assert (first.gate_open, second.gate_open) == (first.gate_decided, 0)
    assert first.gate_decided == second.gate_decided == 6 + 5


def test_a_gate_that_never_saw_a_prompt_is_an_error_and_not_a_closed_gate() -> None:
    model = tiny_model()
    cache = model.hf(input_ids=IDS, use_cache=True).past_key_values
    with (
        pytest.raises(EditError, match="has not decided"),
        model.plan(Intervention.at("resid_post.1", When(ProbeGate(V), EDIT))) as plan,
    ):
        plan.roles(torch.ones(3, 6, dtype=torch.bool))
        model.hf(input_ids=IDS[:, :1], past_key_values=cache)
    assert n_hooks(model.hf) == 0


def test_a_gate_inside_another_edit_is_refused_because_it_could_not_read_its_own_site() -> None:
    gated = When(ProbeGate(V, at="resid_post.0"), EDIT)
    for op in (NormPreserve(gated), PerRow((gated,), torch.tensor([0, 0, 0]))):
        with pytest.raises(InvalidInputError, match="inside another edit"):
            tiny_model().plan(Intervention.at("resid_post.1", op))
        with pytest.raises(InvalidInputError, match="combine"):
            When(ProbeGate(V), op)


def test_edits_inside_others_are_checked_for_their_width() -> None:
    narrow = Add(torch.ones(1))
    for op in (
        When(ProbeGate(V), EDIT, narrow),
        PerRow((EDIT, narrow), torch.zeros(3, dtype=torch.long)),
        NormPreserve(narrow),
    ):
        with pytest.raises(ShapeError, match="width"):
            tiny_model().plan(Intervention.at("resid_post.1", op))
    with pytest.raises(ShapeError, match="gate"):
        tiny_model().plan(Intervention.at("resid_post.1", When(ProbeGate(torch.ones(3)), EDIT)))


def test_a_gated_edit_that_is_lost_in_rounding_raises() -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    with (
        pytest.raises(EditError, match="lost in rounding"),
        model.plan(Intervention.at("resid_post.1", When(FnGate(lambda h: torch.ones(len(h))), Add(V, 1e-6)))),
    ):
        model.logits(IDS)


def test_a_gate_that_never_opens_is_no_error_and_says_so() -> None:
    model = tiny_model()
    clean = model.logits(IDS)
    with model.plan(
        Intervention.at("resid_post.1", When(FnGate(lambda h: -torch.ones(len(h))), EDIT), Prompt())
    ) as plan:
        assert torch.equal(model.logits(IDS), clean)
    (done,) = plan.report
    assert (done.gate_open, done.gate_decided, done.tokens) == (0, 18, 0)


@pytest.mark.parametrize(
    "gate",
    [CosineGate(V, threshold=0.1), SAEGate(bad_sae(), 3, threshold=0.5), FnGate(lambda h: h.mul_(3) @ V)],
    ids=lambda g: type(g).__name__,
)
def test_every_kind_of_gate_leaves_closed_tokens_and_the_models_own_tensors_alone(gate: Gate) -> None:
    import dataclasses

    model = tiny_model()
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    with torch.no_grad():
        open_ = gate.open(gate.score(clean.clone().flatten(0, 1))).view(3, 6)
    assert 0 < int(open_.sum()) < 18
    found = edited(
        model, IDS, Intervention.at("resid_post.1", When(dataclasses.replace(gate, when="token"), ProjectOut(V)))
    )
    assert torch.equal(found[~open_], clean[~open_])
    torch.testing.assert_close(found[open_], ProjectOut(V)(clean[open_]), atol=FP32_LOGITS, rtol=1e-4)


def test_rows_that_leave_the_batch_take_their_decisions_with_them() -> None:
    model = tiny_model()
    gate = separating(model, IDS, 1)
    iv = Intervention.at("resid_post.1", When(gate, EDIT), Generated())
    together = model.generate(TokenBatch.of_rows(IDS), 8, intervention=iv, temperature=1.0, seed=3)
    split = model.generate(TokenBatch.of_rows(IDS), 8, intervention=iv, temperature=1.0, seed=3, batch_size=2)
    for a, b in zip(together.ids, split.ids, strict=True):
        assert torch.equal(a, b)
