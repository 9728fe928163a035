from __future__ import annotations

import pytest
import torch

from tests.tiny import D_MODEL, FAMILIES, FP32_LOGITS, tiny_model
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import Generated, Last, Mask

PROMPTS = ["abcdef", "xy", "qrs"]
VECTOR = torch.linspace(-1, 1, D_MODEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_hugging_face(family: str) -> None:
    model = tiny_model(family)
    batch = model.tokens(PROMPTS)
    mine = model.generate(batch, 8, temperature=0.0)
    theirs = model.hf.generate(**batch.hf(), max_new_tokens=8, do_sample=False)[:, batch.ids.shape[1] :]
    for row, want in zip(mine.ids, theirs, strict=True):
        assert torch.equal(row, want[: len(row)])


def test_the_result_of_a_row_does_not_depend_on_its_batch() -> None:
    model = tiny_model()
    together = model.generate(PROMPTS, 10, seed=5)
    split = model.generate(PROMPTS, 10, seed=5, batch_size=2)
    assert together.texts == split.texts
    assert together.texts != model.generate(PROMPTS, 10, seed=6).texts


def test_logprobs_are_those_of_a_forward_pass() -> None:
    model = tiny_model()
    batch = model.tokens("abcdef")
    out = model.generate(batch, 6, seed=1)
    ids = torch.cat([batch.ids[0], out.ids[0]])[None]
    want = (
        model.logits(ids, keep="all")
        .log_softmax(-1)[0, batch.ids.shape[1] - 1 : -1]
        .gather(1, out.ids[0][:, None])[:, 0]
    )
    torch.testing.assert_close(out.logprobs[0], want, atol=FP32_LOGITS, rtol=1e-4)


def test_steered_generation_with_row_parameters_equals_single_runs() -> None:
    model = tiny_model()
    vectors = torch.stack([VECTOR * s for s in (1.0, -2.0, 4.0)])
    iv = Intervention.at("resid_post.1", Add(vectors), Last() | Generated())
    together = model.generate(PROMPTS, 6, intervention=iv, temperature=0.0)
    chunked = model.generate(PROMPTS, 6, intervention=iv, temperature=0.0, batch_size=2)
    assert together.texts == chunked.texts
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(
            prompt,
            6,
            intervention=Intervention.at("resid_post.1", Add(vectors[i]), Last() | Generated()),
            temperature=0.0,
        )
        assert alone.texts[0] == together.texts[i]
    assert together.report[0].tokens == 3 * 6
    (whole,), (parts,) = together.report, chunked.report
    assert (parts.tokens, parts.fired) == (whole.tokens, 2 * whole.fired)
    assert parts.mean_norm_applied == pytest.approx(whole.mean_norm_applied, rel=1e-4)
    assert parts.share == pytest.approx(whole.share, rel=1e-4)


def test_a_mask_keeps_its_columns_when_the_batch_is_split() -> None:
    model = tiny_model()
    batch = model.tokens(["abcdefgh", "xyz", "qr"])
    chosen = torch.zeros_like(batch.mask)
    chosen[1:, -1] = True
    chosen[0, 0] = True
    iv = Intervention.at("resid_post.1", Add(50 * VECTOR), Mask(chosen))
    whole = model.generate(batch, 6, intervention=iv, temperature=0.0)
    split = model.generate(batch, 6, intervention=iv, temperature=0.0, batch_size=1)
    assert [row.tolist() for row in whole.ids] == [row.tolist() for row in split.ids]
    assert whole.report[0].tokens == split.report[0].tokens == 3


def test_rows_of_different_length_are_returned_as_such() -> None:
    model = tiny_model()
    push = model.W_U[:, model.tokenizer.eos_token_id]
    edit = Add(torch.stack([push, VECTOR, VECTOR]), torch.tensor([100.0, 0.1, 0.1]))
    out = model.generate(PROMPTS, 5, intervention=Intervention.at("final_norm", edit), temperature=0.0)
    assert len(out.ids[0]) == 0 and len(out.ids[1]) > 0


def test_stop_tokens_end_a_row_and_are_not_part_of_it() -> None:
    model = tiny_model()
    push = model.W_U[:, model.tokenizer.eos_token_id]
    iv = Intervention.at("final_norm", Add(push, 100.0))
    out = model.generate(PROMPTS, 5, intervention=iv)
    assert [len(row) for row in out.ids] == [0, 0, 0]
    assert out.texts == ("", "", "")
    assert model.sample(torch.tensor([[5], [6]]), 4).shape == (2, 4)
