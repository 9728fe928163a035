from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import D_MODEL, FP32_LOGITS, tiny_model
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, ShapeError
from workbench.interventions.bytoken import MixEntries, ReplaceTokens
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Where
from workbench.interventions.ops import PerRow
from workbench.interventions.scopes import All, TokenIs

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(2, D_MODEL, generator=GENERATOR)
IDS = torch.tensor([50, 9])
EDIT = Intervention.at("embed", ReplaceTokens(IDS, ROWS), TokenIs(50, 9))


def _batch(seed: int = 1) -> torch.Tensor:
    rows = torch.randint(100, 200, (3, 7), generator=torch.Generator().manual_seed(seed))
    rows[0, 2], rows[1, 5], rows[1, 6] = 50, 9, 50
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_each_token_gets_its_own_row(family: str) -> None:
    model, rows = tiny_model(family), _batch()
    with model.plan(EDIT) as plan:
        edited = model.capture(rows, ["embed"])["embed"]
    plain = model.capture(rows, ["embed"])["embed"]
    assert (
        torch.equal(edited[0, 2], ROWS[0]) and torch.equal(edited[1, 6], ROWS[0]) and torch.equal(edited[1, 5], ROWS[1])
    )
    others = ~torch.isin(rows, IDS)
    assert torch.equal(edited[others], plain[others])
    assert plan.report[0].tokens == 3


def test_a_text_without_the_tokens_raises_and_an_edit_of_all_tokens_leaves_it_alone() -> None:
    model, rows = tiny_model("llama"), torch.randint(100, 200, (2, 5), generator=GENERATOR)
    with pytest.raises(EditError, match="no token was in scope"), model.plan(EDIT):
        model.logits(rows)
    with model.plan(Intervention.at("embed", ReplaceTokens(IDS, ROWS), All())):
        same = model.logits(rows)
    assert torch.equal(same, model.logits(rows))


def test_cached_generation_edits_the_tokens_that_are_fed_back() -> None:
    model, prompt = tiny_model("neox"), torch.tensor([[120, 130, 140]])
    said = model.sample(prompt, 8)[0].tolist()
    target = next(i for i in said[:3] if i not in prompt)
    with model.plan(Intervention.at("embed", ReplaceTokens(torch.tensor([target]), 50 * ROWS[:1]), TokenIs(target))):
        edited = model.sample(prompt, 8)[0].tolist()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[target] = 50 * ROWS[0]
    assert edited == model.sample(prompt, 8)[0].tolist() != said


def test_variants_know_the_ids_of_each_row() -> None:
    model, rows = tiny_model("gpt2"), _batch()
    other = Intervention.at("embed", ReplaceTokens(IDS, 2 * ROWS), All())
    found = model.variants(rows, [EDIT, other, Intervention()]).logits
    for v, edit in enumerate((EDIT, other)):
        with model.plan(edit):
            assert torch.allclose(found[v], model.logits(rows), atol=FP32_LOGITS)
    op = PerRow((ReplaceTokens(IDS, ROWS),), torch.tensor([-1, 0]))
    where = Where(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([50, 50]))
    assert torch.equal(op(torch.zeros(2, D_MODEL), where), torch.stack([torch.zeros(D_MODEL), ROWS[0]]))


def test_without_ids_nothing_is_guessed() -> None:
    op = ReplaceTokens(IDS, ROWS)
    with pytest.raises(DegenerateInputError, match="token ids"):
        op(torch.zeros(2, D_MODEL))
    model = tiny_model("llama")
    embeddings = model.hf.get_input_embeddings()(_batch())
    with pytest.raises(DegenerateInputError, match="token ids"), model.plan(Intervention.at("resid_pre.0", op, All())):
        model.hf(inputs_embeds=embeddings)


def test_mixed_logits_equal_a_changed_output_row() -> None:
    model, rows = tiny_model("neox"), _batch()
    head = model.hf.get_output_embeddings()
    sources, weights = torch.tensor([[3, 4, 5], [50, 6, 6]]), torch.tensor([[0.5, 0.25, -1.0], [1.0, 2.0, 0.0]])
    op = MixEntries(IDS, sources, weights, torch.tensor([0.3, 0.0]), torch.tensor([0.0, 1.5]))
    with model.plan(Intervention.at("logits", op)):
        edited, some = model.logits(rows, "all"), model.logits(rows, tokens=[9, 50, 7])
        greedy = model.generate(["abc"], 5, temperature=0.0).ids
    W = head.weight.detach().clone()
    with torch.no_grad():
        head.weight[50] = (weights[0, :, None] * W[sources[0]]).sum(0) + 0.3 * W.mean(0)
        head.weight[9] = (weights[1, :, None] * W[sources[1]]).sum(0)
    expected = model.logits(rows, "all")
    expected[..., 9] += 1.5
    assert torch.allclose(edited, expected, atol=FP32_LOGITS)
    assert torch.allclose(some, expected[:, -1, [9, 50, 7]], atol=FP32_LOGITS)
    assert len(greedy) == 1


def test_ids_are_distinct_and_sizes_agree() -> None:
    with pytest.raises(InvalidInputError, match="distinct"):
        ReplaceTokens(torch.tensor([3, 3]), ROWS)
    with pytest.raises(ShapeError, match="1 ids"):
        ReplaceTokens(torch.tensor([3]), ROWS)
    with pytest.raises(ShapeError, match="give"):
        MixEntries(IDS, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2))
    op = MixEntries(IDS, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ShapeError, match="entry 50"):
        op(torch.zeros(1, 20))


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    model, rows = tiny_model("llama"), _batch()
    op = MixEntries(IDS, torch.tensor([[3], [4]]), torch.ones(2, 1), torch.zeros(2), torch.tensor([-1e4, 0.0]))
    both = EDIT + Intervention.at("logits", op)
    with model.plan(both):
        before = model.logits(rows)
    both.save(tmp_path / "iv")
    with model.plan(Intervention.load(tmp_path / "iv")):
        assert torch.equal(model.logits(rows), before)
    assert not torch.equal(model.logits(rows), before)
