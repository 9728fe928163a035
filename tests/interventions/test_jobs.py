"""What belongs to the prompt is known in every way of calling the model, and each block is proven for itself."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.tiny import D_MODEL, FP32_LOGITS, tiny_hf, tiny_model
from workbench.core.errors import EditError, InvalidInputError
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add, Map
from workbench.interventions.scopes import Generated, Last, Pos, Prompt
from workbench.models.model import Model

VECTOR = torch.linspace(-3, 3, D_MODEL)


@pytest.mark.parametrize("scope", [Last(), Generated(), Prompt(), Last() | Generated()])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_way_of_generating_edits_the_same_tokens(family: str, options: dict[str, Any], scope: Any) -> None:
    model = tiny_model(family)
    one = "prompt_lookup_num_tokens" in options
    batch = model.tokens(["abcabcabcab"] if one else ["abcdef", "xyz"])
    iv = Intervention.at("resid_post.1", Add(VECTOR), scope)

    def generated(**options: Any) -> torch.Tensor:
        with model.plan(iv):
            return model.hf.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=1,
                eos_token_id=None,
                **options,
            )

    assert torch.equal(generated(**options), generated())
    assert "generate" not in vars(model.hf)


def test_a_prompt_that_is_the_last_one_and_a_token_more_is_a_prompt() -> None:
    model = tiny_model()
    iv = Intervention.at("resid_post.1", Add(VECTOR), Last())
    texts = ["the cat sat"[:n] for n in range(8, 12)]
    with model.plan(iv):
        together = [model.logits(text) for text in texts]
    for text, got in zip(texts, together, strict=True):
        with model.plan(iv):
            torch.testing.assert_close(got, model.logits(text), atol=FP32_LOGITS, rtol=1e-4)


def test_a_plan_that_is_entered_again_proves_its_second_block() -> None:
    model = tiny_model()
    plan = model.plan(Intervention.at("resid_post.1", Add(VECTOR), Pos(7)))
    with plan:
        model.logits("abcdefghij")
    with pytest.raises(EditError, match="never ran"), plan:
        pass
    with pytest.raises(EditError, match="no token"), plan:
        model.logits("abc")


def test_a_position_that_no_row_has_is_refused_beside_one_that_exists() -> None:
    model = tiny_model()
    iv = Intervention.at("resid_post.1", Add(VECTOR), Pos(1, 20))
    with pytest.raises(EditError, match=r"no row has a token at Pos\(positions=\(20,\)\)"), model.plan(iv):
        model.logits(["abcdef", "ab"])
    with model.plan(iv):
        model.logits(["abcdef", "abcdefghijklmnopqrstuvwxyz"])
    with pytest.raises(EditError, match="at least 2 new tokens"):
        model.generate("ab", 1, intervention=Intervention.at("resid_post.1", Add(VECTOR), Generated()))


def test_activations_that_are_not_finite_do_not_pass_for_an_edit() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[20] = float("nan")
    iv = Intervention.at("resid_post.1", Add(VECTOR), Last())
    with pytest.raises(EditError, match="non-finite"), model.plan(iv):
        model.hf(torch.tensor([[10, 20]]))


def test_a_recurrent_state_and_gradient_checkpointing_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    hf = MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    model = Model(hf, tiny_model().tokenizer)
    with pytest.raises(InvalidInputError, match="recurrent state"):
        model.generate("ab", 3)
    with pytest.raises(EditError, match="recurrent state"), model.plan(Intervention.at("resid_post.1", Add(VECTOR))):
        hf.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    checkpointed = tiny_model()
    checkpointed.hf.activation_checkpointing_enable()
    checkpointed.hf.train()
    with pytest.raises(EditError, match="checkpointing"), checkpointed.plan(Intervention.at("z.1", Map(torch.neg))):
        pass


def test_threads_that_read_one_model_do_not_mix() -> None:
    model = tiny_model()
    texts = ["abcdef", "uvwxyz", "qrstuv"]
    want = [model.capture(text, ["resid_post.1"])["resid_post.1"] for text in texts]
    wanted_logits = [model.logits(text, tokens=[5, 9]) for text in texts]
    wrong: list[str] = []

    def read(i: int) -> None:
        for _ in range(20):
            if not torch.allclose(model.capture(texts[i], ["resid_post.1"])["resid_post.1"], want[i], atol=1e-5):
                wrong.append("capture")
            if not torch.allclose(model.logits(texts[i], tokens=[5, 9]), wanted_logits[i], atol=1e-4):
                wrong.append("logits")

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_edit_of_the_logits_reaches_the_logits_of_chosen_tokens() -> None:
    push = torch.zeros(258)
    push[5] = 4.0
    iv = Intervention.at("logits", Add(push), Last())
    for warm in (False, True):
        model = tiny_model()
        clean = model.logits("hello", tokens=[5, 6]) if warm else tiny_model().logits("hello", tokens=[5, 6])
        with model.plan(iv):
            edited = model.logits("hello", tokens=[5, 6])
        torch.testing.assert_close(edited - clean, torch.tensor([[4.0, 0.0]]), atol=1e-4, rtol=0)


def test_prompts_that_fill_a_sliding_window_are_compared_all_the_same() -> None:
    hf = tiny_hf("mistral")
    hf.config.sliding_window = 6
    model = Model(hf, tiny_model().tokenizer)
    ivs = [Intervention.at("resid_post.1", Add(s * VECTOR), Last()) for s in (1.0, 2.0)]
    found = model.variants("abcdefghi", ivs)
    for got, iv in zip(found.logits, ivs, strict=True):
        with model.plan(iv):
            torch.testing.assert_close(got, model.logits("abcdefghi"), atol=FP32_LOGITS, rtol=1e-4)


def test_chosen_tokens_in_bfloat16_with_a_soft_cap_are_those_of_the_model() -> None:
    model = tiny_model("gemma2")
    model.hf.to(torch.bfloat16)
    got, whole = model.logits("hello", tokens=[5, 6]), model.logits("hello")
    torch.testing.assert_close(got, whole[:, [5, 6]], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("ids", [[[258, 3]], [[-1, 3]]])
def test_ids_without_an_embedding_and_texts_without_a_position_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(InvalidInputError, match="embeddings for ids 0 to 257"):
        tiny_model().capture(torch.tensor(ids), ["resid_post.1"])
    model = tiny_model("gpt2")
    with pytest.raises(InvalidInputError, match="128 positions"):
        model.logits(torch.full((1, 129), 5))
    with pytest.raises(InvalidInputError, match="128 positions"):
        model.generate("abcd", 125)


def test_edits_of_a_whole_site_and_of_its_heads_keep_their_order_or_are_refused() -> None:
    model = tiny_model()
    whole, head = Intervention.at("z.1", Map(lambda z: 2 * z)), Intervention.at("z.1.h0", Map(lambda z: z + 1))
    clean = model.capture("abc", ["z.1"])["z.1"]
    found = []
    for iv in (whole + head, head + whole):
        with model.plan(iv):
            found.append(model.capture("abc", ["z.1"])["z.1"])
    torch.testing.assert_close(found[0][:, :, 0], 2 * clean[:, :, 0] + 1)
    torch.testing.assert_close(found[1][:, :, 0], 2 * (clean[:, :, 0] + 1))
    torch.testing.assert_close(found[0][:, :, 1], 2 * clean[:, :, 1])
    with pytest.raises(InvalidInputError, match="back and forth"):
        model.plan(head + whole + head)


def test_a_plan_needs_an_intervention_and_a_generation_a_batch() -> None:
    model = tiny_model()
    with pytest.raises((InvalidInputError, TypeCheckError), match="Intervention"):
        model.plan(Add(VECTOR))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="batch_size=0"):
        model.generate("ab", 2, batch_size=0)
