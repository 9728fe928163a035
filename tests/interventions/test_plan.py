from __future__ import annotations

import pytest
import torch

from tests.tiny import D_MODEL, FAMILIES, FP32_LOGITS, N_LAYERS, n_hooks, tiny_model
from workbench.core.errors import DegenerateInputError, EditError, ShapeError
from workbench.core.tokens import TokenBatch
from workbench.interventions.chosen import Mask
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add, Map, ProjectOut
from workbench.interventions.scopes import All, Generated, Last, Pos, Prompt, Scope, TokenIs

IDS = torch.arange(10, 22).view(2, 6)
VECTOR = torch.linspace(-1, 1, D_MODEL)


def resid(model, ids, iv):
    """What the edit makes of resid_post.1, seen from the next block."""
    with model.plan(iv):
        return model.capture(ids, ["resid_pre.2"])["resid_pre.2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_add_changes_the_stream_by_exactly_the_vector_and_only_in_scope(family: str) -> None:
    model = tiny_model(family)
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    edited = resid(model, IDS, Intervention.at("resid_post.1", Add(VECTOR, 2.0), Pos(3)))
    torch.testing.assert_close(edited[:, 3] - clean[:, 3], (2 * VECTOR).expand(2, -1), atol=1e-5, rtol=1e-5)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(edited[:, others], clean[:, others])


def test_the_report_says_how_often_on_how_many_tokens_and_how_much() -> None:
    model = tiny_model()
    with model.plan(Intervention.at("resid_post.1", Add(VECTOR, 2.0), Last())) as plan:
        model.logits(IDS)
        model.logits(IDS)
    (done,) = plan.report
    assert (done.fired, done.tokens) == (2, 4)
    assert done.mean_norm_applied == pytest.approx(2 * float(VECTOR.norm()), rel=1e-5)
    norms = model.capture(IDS, ["resid_post.1"])["resid_post.1"][:, -1].norm(dim=1)
    assert done.share == pytest.approx(float((2 * VECTOR.norm() / norms).mean()), rel=1e-5)


def test_an_edit_that_did_not_happen_raises() -> None:
    model = tiny_model()
    iv = Intervention.at("resid_post.1", Add(VECTOR))
    with pytest.raises(EditError, match="never ran"), model.plan(iv):
        pass
    with pytest.raises(EditError, match="never ran"), model.plan(iv):
        model.capture(IDS, ["resid_post.0"])  # stops before the edited layer
    with (
        pytest.raises(EditError, match="no token was in scope"),
        model.plan(Intervention.at("resid_post.1", Add(VECTOR), Pos(99))),
    ):
        model.logits(IDS)
    with pytest.raises(DegenerateInputError, match="zero"):
        Add(torch.zeros(D_MODEL))
    with pytest.raises(ShapeError, match="width"):
        model.plan(Intervention.at("resid_post.1", Add(torch.ones(7))))
    assert n_hooks(model.hf) == 0


def test_an_addition_lost_in_bfloat16_raises() -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    with pytest.raises(EditError, match="lost in rounding"):  # noqa: SIM117
        with model.plan(Intervention.at("resid_post.1", Add(VECTOR, 1e-6))):
            model.logits(IDS)


def test_a_bfloat16_edit_reports_the_intended_and_the_applied_norm() -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    with model.plan(Intervention.at("resid_post.1", Add(VECTOR, 0.02))) as plan:
        assert model.logits(IDS).dtype == torch.float32
    (done,) = plan.report
    assert done.mean_norm_intended == pytest.approx(0.02 * float(VECTOR.norm()), rel=1e-4)
    assert done.mean_norm_applied != pytest.approx(done.mean_norm_intended, rel=1e-4)


def test_nothing_stays_behind() -> None:
    model = tiny_model()
    clean = model.logits(IDS)
    with pytest.raises(ZeroDivisionError), model.plan(Intervention.at("resid_post.1", Add(VECTOR, 5.0))):
        raise ZeroDivisionError
    assert n_hooks(model.hf) == 0
    assert torch.equal(model.logits(IDS), clean)


def test_a_zero_strength_edit_is_bit_identical() -> None:
    model = tiny_model()
    clean = model.logits(IDS)
    with model.plan(Intervention.at("resid_post.1", Add(VECTOR, 0.0))):
        assert torch.equal(model.logits(IDS), clean)


def test_order_matters_and_plus_composes() -> None:
    model = tiny_model()
    add, out = Intervention.at("resid_post.1", Add(VECTOR)), Intervention.at("resid_post.1", ProjectOut(VECTOR))
    unit = VECTOR / VECTOR.norm()
    first = resid(model, IDS, add + out) @ unit
    then = resid(model, IDS, out + add) @ unit
    torch.testing.assert_close(first, torch.zeros_like(first), atol=1e-5, rtol=0)
    torch.testing.assert_close(then, torch.full_like(then, float(VECTOR.norm())), atol=1e-5, rtol=1e-5)


def test_nested_plans_both_apply() -> None:
    model = tiny_model()
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    with model.plan(Intervention.at("resid_post.1", Add(VECTOR))):
        edited = resid(model, IDS, Intervention.at("resid_post.1", Add(VECTOR, 2.0)))
    torch.testing.assert_close(edited - clean, (3 * VECTOR).expand_as(clean), atol=1e-4, rtol=1e-4)


def test_per_row_parameters_equal_single_runs() -> None:
    model = tiny_model()
    vectors = torch.stack([VECTOR, VECTOR.flip(0)])
    with model.plan(Intervention.at("resid_post.1", Add(vectors, torch.tensor([1.0, -3.0])))):
        together = model.logits(IDS)
    for row, strength in enumerate((1.0, -3.0)):
        with model.plan(Intervention.at("resid_post.1", Add(vectors[row], strength))):
            alone = model.logits(IDS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=FP32_LOGITS, rtol=1e-4)
    with (
        pytest.raises(ShapeError, match="3 rows"),
        model.plan(Intervention.at("resid_post.1", Add(torch.ones(3, D_MODEL)))),
    ):
        model.logits(IDS)


SCOPES: list[Scope] = [
    All(),
    Prompt(),
    Generated(),
    Last(),
    Pos(1),
    Pos(-2),
    Last() | Generated(),
    ~Pos(0),
    All() & ~Last(),
    Pos(5),
]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_cached_and_uncached_generation_agree(family: str, scope: Scope) -> None:
    model = tiny_model(family)
    iv = Intervention.at("resid_post.0", Add(VECTOR, 3.0), scope) + Intervention.at("mlp_out.1", Map(lambda h: 1.1 * h))
    options = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    runs = []
    for use_cache in (True, False):
        with model.plan(iv):
            runs.append(model.hf.generate(**TokenBatch.of_rows(IDS[:, :4]).hf(), use_cache=use_cache, **options))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=FP32_LOGITS, rtol=1e-4)


@pytest.mark.parametrize("scope", [All(), Last(), Pos(1), Pos(-2), TokenIs(12)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_left_padding_right_padding_and_none_agree(family: str, scope: Scope) -> None:
    model = tiny_model(family)
    iv = Intervention.at("resid_post.0", Add(VECTOR, 3.0), scope)
    row = IDS[0, :4]
    with model.plan(iv):
        alone = model.hf(**TokenBatch.of_rows(row[None]).hf(), use_cache=False).logits[0]
    # The pad id is a token that also occurs inside the text: only the mask tells them apart.
    pad = torch.tensor([12, 12])
    for ids, keep in ((torch.cat([pad, row]), slice(2, None)), (torch.cat([row, pad]), slice(0, 4))):
        mask = torch.zeros(1, 6, dtype=torch.bool)
        mask[0, keep] = True
        with model.plan(iv) as plan:
            padded = model.hf(**TokenBatch(ids[None], mask).hf(), use_cache=False).logits[0, keep]
        assert plan.report[0].tokens == (4 if isinstance(scope, All) else 1)
        torch.testing.assert_close(padded, alone, atol=FP32_LOGITS, rtol=1e-4)


def test_mask_scope_follows_batch_columns_into_generation() -> None:
    model = tiny_model()
    chosen = torch.zeros(2, 6, dtype=torch.bool)
    chosen[0, 2] = True
    with model.plan(Intervention.at("resid_post.0", Add(VECTOR), Mask(chosen, may_skip_rows=True))) as plan:
        model.hf.generate(**TokenBatch.of_rows(IDS).hf(), max_new_tokens=3, do_sample=False)
    assert plan.report[0].tokens == 1
    with pytest.raises(DegenerateInputError):
        Mask(torch.zeros(2, 6, dtype=torch.bool))


def test_beams_and_returned_sequences_repeat_the_row_parameters() -> None:
    model = tiny_model()
    vectors = torch.stack([VECTOR, VECTOR.flip(0)])
    with model.plan(Intervention.at("resid_post.1", Add(vectors, 4.0))):
        both = model.hf.generate(**TokenBatch.of_rows(IDS).hf(), max_new_tokens=4, num_beams=2, do_sample=False)
    for row in range(2):
        with model.plan(Intervention.at("resid_post.1", Add(vectors[row], 4.0))):
            one = model.hf.generate(
                **TokenBatch.of_rows(IDS[row : row + 1]).hf(), max_new_tokens=4, num_beams=2, do_sample=False
            )
        assert torch.equal(both[row, : one.shape[1]], one[0])


def test_edits_reach_every_layer_below_the_logits() -> None:
    model = tiny_model()
    clean = model.logits(IDS)
    for layer in range(N_LAYERS):
        with model.plan(Intervention.at(f"resid_post.{layer}", Add(VECTOR, 3.0))):
            assert float((model.logits(IDS) - clean).abs().max()) > 1e-2


def test_a_row_whose_edit_was_lost_raises_although_the_others_changed() -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    strengths = torch.tensor([2.0, 1e-6])
    with pytest.raises(EditError, match=r"row 1 \(1 of 2 rows\)"):  # noqa: SIM117
        with model.plan(Intervention.at("resid_post.1", Add(VECTOR, strengths))):
            model.logits(IDS)
    # A zero strength or a zero vector in one row is asked for, as for an unedited row beside edited ones.
    for op in (Add(VECTOR, torch.tensor([2.0, 0.0])), Add(torch.stack([VECTOR, 0 * VECTOR]))):
        with model.plan(Intervention.at("resid_post.1", op)):
            model.logits(IDS)
