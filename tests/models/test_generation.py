from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import (
    CACHES,
    D_MODEL,
    FAMILIES,
    FP32_LOGITS,
    cached_model,
    n_hooks,
    spaced_tokenizer,
    tiny_hf,
    tiny_model,
    tiny_tokenizer,
)
from workbench.core.errors import EditError, InvalidInputError
from workbench.core.tokenizer import continuation
from workbench.core.tokens import TokenBatch
from workbench.interventions.chosen import Mask
from workbench.interventions.gates import ProbeGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import After, All, Generated, Last, Pos, Prompt, Scope, TokenIs
from workbench.models import tiny
from workbench.models.decoding import Decoder
from workbench.models.generation import Generation
from workbench.models.model import Model
from workbench.models.sampling import Sampling

PROMPTS = ["abcdef", "xy", "qrs"]
VECTOR = torch.linspace(-1, 1, D_MODEL)
STOP = tuple("abcdefghijklm\x00\x01\x02\x03\x04\x05\x06")


@contextlib.contextmanager
def plain(model: Model) -> Iterator[None]:
    """The plain path: a hook of someone else, so that nothing is shared and no row leaves the batch."""
    handle = model.hf.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shape of the ids of every forward pass that generates."""
    seen: list[tuple[int, ...]] = []
    original = Decoder._last_logits

    def watched(self: Decoder, cache: object, ids: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return original(self, cache, ids, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "_last_logits", watched)
    return seen


def _same(mine: Generation, theirs: Generation) -> None:
    assert [row.tolist() for row in mine.ids] == [row.tolist() for row in theirs.ids]
    assert mine.texts == theirs.texts and mine.ended == theirs.ended
    assert mine.prompt_lengths == theirs.prompt_lengths
    for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=FP32_LOGITS, rtol=1e-4)
    assert mine.activations.keys() == theirs.activations.keys()
    for site, rows in mine.activations.items():
        for a, b in zip(rows, theirs.activations[site], strict=True):
            torch.testing.assert_close(a, b, atol=FP32_LOGITS, rtol=1e-4)


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


@pytest.mark.parametrize("scope", [None, All()], ids=str)
@pytest.mark.parametrize("family", CACHES)
def test_rows_of_any_cache_are_shared_and_leave_as_if_alone(family: str, scope: Scope | None) -> None:
    model = cached_model(family)
    iv = None if scope is None else Intervention.at("resid_post.1", Add(VECTOR), scope)
    prompts = ["abcdef", "abcdef", "xy", "abcdef", "q"]
    _same(
        model.generate(prompts, 9, intervention=iv, seed=4, stop=STOP),
        model.generate(prompts, 9, intervention=iv, seed=4, stop=STOP, batch_size=1),
    )


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


def test_each_row_says_why_it_ended() -> None:
    model = tiny_model()
    push = model.W_U[:, [model.tokenizer.eos_token_id, 50, 60]].T
    edit = Add(push / push.norm(dim=1, keepdim=True), torch.tensor([100.0, 100.0, 100.0]))
    stop = model.tokenizer.decode([50])
    out = model.generate(
        PROMPTS, 4, intervention=Intervention.at("final_norm", edit), temperature=0.0, stop=stop, capture=["embed"]
    )
    assert out.ended == ("stop_token", "stop_string", "length")
    assert [row.tolist() for row in out.ids] == [[], [50], [60] * 4]
    assert out.texts[1] == stop
    assert out.prompt_lengths == (6, 2, 3)
    # the last token that was sampled is not fed
    assert [len(row) for row in out.activations["embed"]] == [6, 2, 3 + 3]


MANY = [chr(97 + i % 7) * (1 + i % 5) + str(i) for i in range(12)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_ended_leave_the_batch_and_change_nothing(family: str, shapes: list[tuple[int, ...]]) -> None:
    model = tiny_model(family)
    options = {"seed": 3, "stop": STOP, "capture": ["resid_post.1"], "temperature": 1.5}
    mine = model.generate(MANY, 30, **options)
    sizes = [rows for rows, _ in shapes]
    assert len(set(sizes)) >= 2 and sizes == sorted(sizes, reverse=True)
    assert "stop_string" in mine.ended
    shapes.clear()
    with plain(model):
        _same(mine, model.generate(MANY, 30, **options))
    assert {rows for rows, _ in shapes} == {len(MANY)}


def _edit(scope: Scope) -> Intervention:
    strengths = torch.linspace(-8, 8, len(MANY))
    return Intervention.at("resid_post.0", Add(VECTOR.expand(len(MANY), -1).contiguous(), strengths), scope)


@pytest.mark.parametrize("scope", [All(), Generated(), Last() | Generated(), "mask"], ids=str)
def test_edits_of_rows_follow_the_rows_that_stay(scope: Scope | str, shapes: list[tuple[int, ...]]) -> None:
    model = tiny_model()
    batch = model.tokens(MANY)
    if isinstance(scope, str):
        chosen = batch.mask & (torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
        scope = Mask(chosen, may_skip_rows=True) | Generated()
    options = {
        "seed": 3, "stop": STOP, "capture": ["resid_post.1"], "intervention": _edit(scope), "temperature": 1.5,
    }  # fmt: skip
    mine = model.generate(batch, 30, **options)
    assert len({rows for rows, _ in shapes}) >= 3
    with plain(model):
        theirs = model.generate(batch, 30, **options)
    _same(mine, theirs)
    # A batch of its own, a row that ends at its first token has no generated token to edit, which a plan refuses.
    for split in (5,) if isinstance(scope, Generated) else (1, 5):
        _same(mine, model.generate(batch, 30, **options, batch_size=split))
    wrong = _edit(scope).take(torch.arange(len(MANY)).flip(0))
    if not isinstance(scope, Mask):
        assert model.generate(batch, 30, **{**options, "intervention": wrong}).texts != mine.texts


def test_rows_that_end_with_their_first_token_do_not_shift_the_edits_of_others(shapes: list[tuple[int, ...]]) -> None:
    model = tiny_model()
    first = [int(row[0]) for row in model.generate(MANY, 1, temperature=0.0).ids]
    model.hf.generation_config.eos_token_id = sorted(set(first[:8]))
    options = {"temperature": 0.0, "intervention": _edit(Generated())}
    shapes.clear()
    mine = model.generate(MANY, 6, **options)
    assert mine.ended[:8] == ("stop_token",) * 8 and 0 < shapes[-1][0] < len(MANY)
    with plain(model):
        _same(mine, model.generate(MANY, 6, **options))


@pytest.mark.parametrize("scope", [None, All(), Prompt(), Generated(), Last()], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_activations_are_those_of_the_finished_text(family: str, scope: Scope | None) -> None:
    model = tiny_model(family)
    sites = ["embed", "resid_post.1", "mlp_out.2", "z.1", "final_norm"]
    edit = None if scope is None else _edit(scope)
    mine = model.generate(MANY, 12, intervention=edit, stop=STOP, capture=sites, batch_size=7)
    for i, (prompt, ids) in enumerate(zip(MANY, mine.ids, strict=True)):
        start = model.tokens(prompt).ids
        assert mine.prompt_lengths[i] == start.shape[1]
        fed = torch.cat([start[0], ids if mine.ended[i] == "stop_token" else ids[:-1]])[None]
        is_prompt = (torch.arange(fed.shape[1]) < start.shape[1])[None]
        with contextlib.ExitStack() as stack:
            # A row that has ended at once has no generated token, which its plan alone would not accept.
            if edit is not None and not (isinstance(scope, Generated) and bool(is_prompt.all())):
                stack.enter_context(model.plan(edit.take(torch.tensor([i])))).roles(is_prompt)
            want = model.capture(fed, sites)
        for site in sites:
            found = mine.activations[site][i]
            assert found.shape == want[site][0].shape, site
            torch.testing.assert_close(found, want[site][0], atol=FP32_LOGITS, rtol=1e-4)
    wrong = mine.activations["resid_post.1"][0][1:] - mine.activations["resid_post.1"][0][:-1]
    assert bool(wrong.abs().amax() > 100 * FP32_LOGITS), "neighbours differ, so a shift would be seen"


def test_logits_of_every_token_can_be_kept() -> None:
    model = tiny_model()
    out = model.generate(PROMPTS, 5, capture=["logits"], temperature=0.0)
    row = torch.cat([model.tokens(PROMPTS[1]).ids[0], out.ids[1][:-1]])[None]
    torch.testing.assert_close(out.activations["logits"][1], model.logits(row, keep="all")[0], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_captured_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(InvalidInputError, match="got one text; give a list"):
        model.generate("abc", 2, capture="resid_post.1")
    with pytest.raises(InvalidInputError, match="Model.capture"):
        model.generate("abc", 2, capture=["pattern.1"])


HEAD = "the same long beginning of a chat "


@pytest.mark.parametrize("scope", [None, Generated()], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_share_goes_through_the_model_once(
    family: str, scope: Scope | None, shapes: list[tuple[int, ...]]
) -> None:
    model = tiny_model(family)
    prompts = [HEAD + "abc", HEAD + "xyzuvw", HEAD + "abc", HEAD[:-1], HEAD + "abc", HEAD[:20] + "q"]
    vectors = VECTOR * torch.linspace(-8, 8, len(prompts))[:, None]
    edit = None if scope is None else Intervention.at("resid_post.0", Add(vectors), scope)
    options = {"temperature": 0.0, "intervention": edit, "capture": ["resid_post.1", "z.2"]}
    mine = model.generate(prompts, 8, **options)
    width = len(HEAD) + 6
    prefix = len(HEAD) + 3  # where the padding of HEAD + "abc" and what it shares with the longest row end
    has_window = any("sliding" in str(kind) for kind in getattr(model.hf.config, "layer_types", None) or ())
    whole = [(4, width)] if has_window or getattr(model.hf.config, "sliding_window", None) else None
    assert shapes[:2] == [(1, prefix), (4, width - prefix)] or shapes[:1] == whole
    with plain(model):
        _same(mine, model.generate(prompts, 8, **options))
    for i, prompt in enumerate(prompts):
        alone = None if edit is None else edit.take(torch.tensor([i]))
        assert model.generate(prompt, 8, temperature=0.0, intervention=alone).texts[0] == mine.texts[i]


def test_identical_prompts_are_read_once_and_still_sampled_apart(shapes: list[tuple[int, ...]]) -> None:
    model = tiny_model("gemma2")
    mine = model.generate(["abcdef"] * 5, 6, seed=1)
    assert shapes[0] == (1, 6) and len(set(mine.texts)) == 5
    with plain(model):
        _same(mine, model.generate(["abcdef"] * 5, 6, seed=1))


def test_prompts_that_are_edited_are_not_shared(shapes: list[tuple[int, ...]]) -> None:
    model = tiny_model()
    edit = Intervention.at("resid_post.0", Add(VECTOR * torch.tensor([[0.0], [20.0]])), Last())
    out = model.generate(["abcdef"] * 2, 6, intervention=edit, temperature=0.0)
    assert shapes[0] == (2, 6)
    assert out.texts[0] != out.texts[1]


@pytest.mark.parametrize("what", ["gate", "marker"])
def test_what_decides_by_the_prompt_sees_the_prompt_of_every_row(what: str, shapes: list[tuple[int, ...]]) -> None:
    model = tiny_model()
    batch = model.tokens([HEAD + text for text in MANY])
    means = torch.stack([x[m].mean(0) for x, m in zip(model.capture(batch, ["resid_post.0"])["resid_post.0"], batch.mask,
                                                      strict=True)])  # fmt: skip
    direction = means[0] - means[1]
    middle = float((means @ direction).median())
    add = Add(VECTOR * torch.linspace(-8, 8, len(MANY))[:, None])
    if what == "gate":
        op, scope = When(ProbeGate(direction, bias=-middle, at="resid_post.0"), add), Generated()
    else:
        op, scope = add, Generated() & After("1")
    options = {
        "seed": 3, "stop": STOP, "temperature": 1.5, "capture": ["resid_post.1"],
        "intervention": Intervention.at("resid_post.1", op, scope),
    }  # fmt: skip
    mine = model.generate(batch, 30, **options)
    assert len({rows for rows, _ in shapes}) >= 2, "rows have left the batch"
    with plain(model):
        _same(mine, model.generate(batch, 30, **options))
    always = Intervention.at("resid_post.1", add, Generated())
    assert mine.texts != model.generate(batch, 30, **{**options, "intervention": always}).texts


def test_filtered_rows_do_not_depend_on_their_batch() -> None:
    model = tiny_model()
    options = {"seed": 2, "top_k": 40, "top_p": 0.8, "min_p": 0.01}
    together = model.generate(PROMPTS, 10, **options)
    _same(together, model.generate(PROMPTS, 10, **options, batch_size=1))
    assert together.texts != model.generate(PROMPTS, 10, seed=2).texts
    assert model.generate(PROMPTS, 10, seed=2, top_k=1).texts == model.generate(PROMPTS, 10, temperature=0.0).texts


@pytest.mark.parametrize("scope", [None, All(), Generated()], ids=str)
def test_an_interrupt_leaves_no_hooks(scope: Scope | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), []
    original = Decoder._last_logits

    def interrupted(self: Decoder, *args: object, **named: object) -> torch.Tensor:
        calls.append(n_hooks(model.hf))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "_last_logits", interrupted)
    edit = None if scope is None else Intervention.at("resid_post.0", Add(VECTOR), scope)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPTS, 10, intervention=edit, capture=["resid_post.1"])
    assert calls[-1] > 0 and n_hooks(model.hf) == 0
    assert model.active_edits() == ()


def test_an_outer_plan_sees_every_row() -> None:
    model = tiny_model()
    edit = Intervention.at("resid_post.0", Add(VECTOR * torch.linspace(-8, 8, 3)[:, None]), All())
    want = model.generate(["abcdef"] * 3, 8, intervention=edit, temperature=0.0, stop=STOP)
    with model.plan(edit):
        _same(model.generate(["abcdef"] * 3, 8, temperature=0.0, stop=STOP), want)
    assert len(set(want.texts)) == 3


def test_whether_an_edit_met_a_token_is_asked_of_all_batches_together() -> None:
    model = tiny_model()
    push = model.W_U[:, model.tokenizer.eos_token_id]
    # The first row ends at its first token, so a batch of it alone has no generated token to edit.
    ends = Intervention.at("final_norm", Add(torch.stack([push, VECTOR]), torch.tensor([100.0, 0.1])))
    iv = ends + Intervention.at("resid_post.1", Add(VECTOR), Generated())
    for batch_size in (1, 2):
        out = model.generate(PROMPTS[:2], 4, intervention=iv, temperature=0.0, batch_size=batch_size)
        assert out.report[1].tokens == len(out.ids[1]) - (out.ended[1] == "length")
    with pytest.raises(EditError, match="row 0 has no token there"):
        model.generate(PROMPTS, 4, intervention=Intervention.at("resid_post.1", Add(VECTOR), Pos(99)), batch_size=1)


def test_prompts_with_padding_that_no_row_fills_are_not_mixed_up() -> None:
    model = tiny_model()
    batch = model.tokens([HEAD + "abc", HEAD + "abcdefg", HEAD + "xyz"])
    pad = torch.nn.functional.pad
    wide = TokenBatch(pad(batch.ids, (5, 0)), pad(batch.mask, (5, 0)))
    decoder = Decoder(model.hf, Sampling(max_new_tokens=2))
    together = decoder.prefill(wide, share=True).logits
    torch.testing.assert_close(together, decoder.prefill(wide).logits, atol=FP32_LOGITS, rtol=1e-4)


def test_a_text_continues_its_prompt_with_the_space_in_front() -> None:
    tokenizer = spaced_tokenizer()
    model = Model(tiny.tiny_hf("llama", len(tokenizer)), tokenizer)
    prompt = model.tokens(["the dog", "ran"])
    out = model.generate(prompt, 12, temperature=0.0)
    for ids, new, text in zip(prompt.rows(), out.ids, out.texts, strict=True):
        before, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids, [*ids, *new]))
        assert before + text == whole
    words = [i for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if piece == "▁ran"]
    assert continuation(tokenizer, [1, 260], words) == " ran" != tokenizer.decode(words)
    whole = [3 + byte for byte in "日".encode()]
    assert continuation(tokenizer, [1, 260, *whole[:2]], whole[2:]) == "日", "what the prompt has begun"


def test_without_a_tokenizer_ids_are_generated_and_texts_are_refused(tmp_path: Path) -> None:
    model = Model(tiny_model().hf, None)
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(ids, 2, temperature=0.0)
    assert torch.equal(out.ids[0], tiny_model().generate(ids, 2, temperature=0.0).ids[0])
    assert out.texts == ("".join(f"⟨{i}⟩" for i in out.ids[0].tolist()),)
    assert "no tokenizer" in repr(model) and model.tokenizer is not None and not model.tokenizer
    edit = Intervention.at("resid_post.0", Add(VECTOR), TokenIs("a"))
    for call in (
        lambda: model.tokens("a"), lambda: model.logits("a"), lambda: model.session(), lambda: model.plan(edit),
        lambda: model.generate(ids, 1, stop="a"), lambda: model.tokenizer.decode([1]),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=r"no tokenizer.*Give token ids"):
            call()
    assert model.variants(ids, [edit_of_last()]).logits.shape == (1, 1, model.d_vocab)
    saved = model.export(Intervention.at("resid_post.0", Add(VECTOR)), "weights", tmp_path / "e").path
    assert saved is not None and not (saved / "tokenizer.json").exists()


def edit_of_last() -> Intervention:
    return Intervention.at("resid_post.0", Add(VECTOR), Last())


RULES = [
    {"suppress_tokens": range(60, 250)},
    {"begin_suppress_tokens": range(0, 200)},
    {"bad_words_ids": [[i] for i in range(90, 240)] + [[7, 8]]},
    {"sequence_bias": [[[40], 30.0], [[40, 41], 30.0]]},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 4, "sequence_bias": [[[1], 50.0]]},
    {"min_length": 5, "sequence_bias": [[[1], 50.0]]},
    {"forced_eos_token_id": 1},
    {"exponential_decay_length_penalty": (2, 9.0)},
    {"eos_token_id": [1, 40, 41], "sequence_bias": [[[41], 20.0]], "min_new_tokens": 2},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "+".join(rules))
def test_rules_of_the_generation_config_are_those_of_hugging_face(rules: dict[str, Any]) -> None:
    model = tiny_model()
    for name, value in rules.items():
        setattr(model.hf.generation_config, name, list(value) if isinstance(value, range) else value)
    mine = model.generate(PROMPTS, 6, temperature=0.0)
    for prompt, row in zip(PROMPTS, mine.ids, strict=True):
        batch = model.tokens(prompt)
        (want,) = model.hf.generate(**batch.hf(), max_new_tokens=6, do_sample=False)[:, batch.ids.shape[1] :]
        want = want[: model.text_length(want)]
        assert row.tolist() == want.tolist()
    _same(mine, model.generate(PROMPTS, 6, temperature=0.0, batch_size=1))
    assert mine.note == "" and mine.texts != tiny_model().generate(PROMPTS, 6, temperature=0.0).texts
    session = model.session(temperature=0.0, max_new_tokens=6)
    assert session.turn("ab") == model.generate(model.tokens(session.messages[:1]), 6, temperature=0.0).texts[0]


def test_rules_hold_for_sampled_tokens_too_and_log_probabilities_stay_those_of_the_model() -> None:
    model = tiny_model()
    model.hf.generation_config.suppress_tokens = list(range(200))
    out = model.generate(PROMPTS, 12, seed=3, top_p=0.9)
    assert min(int(row.min()) for row in out.ids) >= 200
    ids = torch.cat([model.tokens(PROMPTS[0]).ids[0], out.ids[0]])[None]
    want = model.logits(ids, keep="all").log_softmax(-1)[0, -1 - len(out.ids[0]) : -1]
    torch.testing.assert_close(out.logprobs[0], want.gather(1, out.ids[0][:, None])[:, 0], atol=FP32_LOGITS, rtol=1e-4)
    assert int(model.sample(model.tokens("abc").ids, 9).min()) >= 200


def test_sampling_settings_of_the_generation_config_are_left_aside_and_named() -> None:
    model = tiny_model()
    plain = model.generate(PROMPTS, 6, seed=1)
    config = model.hf.generation_config
    config.temperature, config.top_k, config.repetition_penalty, config.do_sample = 0.3, 5, 1.3, True
    out = model.generate(PROMPTS, 6, seed=1)
    assert out.texts == plain.texts and plain.note == ""
    half = Model(tiny_hf().to(torch.bfloat16), tiny_tokenizer())
    assert half.generate(PROMPTS, 1).note == "in bfloat16, the tokens of a row may depend on the rows beside it"
    assert half.generate(PROMPTS[:1], 1).note == ""
    assert out.note == (
        "left aside of the model's generation settings: temperature=0.3, top_k=5, repetition_penalty=1.3"
    )
    config.stop_strings = ["a", "b"]
    config.suppress_tokens = [i for i in range(258) if model.tokenizer.decode([i]) not in "abc"]
    stopped = model.generate(PROMPTS, 30, seed=1)
    assert set(stopped.ended) == {"stop_string"} and all(text[-1] in "ab" for text in stopped.texts)


def test_rules_that_cannot_be_used_are_refused_in_words() -> None:
    model = tiny_model()
    for rules in ({"bad_words_ids": [[9000]]}, {"bad_words_ids": 3}, {"suppress_tokens": list(range(258))}):
        for name, value in {"bad_words_ids": None, **rules}.items():
            setattr(model.hf.generation_config, name, value)
        with pytest.raises(InvalidInputError, match=r"generation_config.json|rule out all tokens"):
            model.generate(PROMPTS, 3)


def test_no_nan_passes_as_an_answer() -> None:
    model = tiny_model()
    model.hf.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    for what, ask in {
        "Row 0, token 0": lambda: model.generate(PROMPTS, 3),
        "Row 0, token": lambda: model.session(max_new_tokens=3).turn("ab"),
        "logits: NaN, first in row 0 at position 5": lambda: model.logits(PROMPTS),
        "logits: NaN, first in row 0 at position 0": lambda: model.logits(PROMPTS, keep="all", tokens=[5]),
        "capture: NaN at resid_post.1, first in row 0": lambda: model.capture(
            PROMPTS, ["resid_post.0", "resid_post.1"]
        ),
        "row 0 at position 1": lambda: model.capture(
            PROMPTS[1:] + PROMPTS, ["resid_post.1"], positions=Pos(-4) | Pos(-1)
        ),
        "loss: NaN": lambda: model.loss(PROMPTS),
        "without any edit": lambda: model.variants(PROMPTS, [Intervention.at("resid_post.1", Add(VECTOR))]),
    }.items():
        with pytest.raises(InvalidInputError, match=what):
            ask()
    kept = model.capture(PROMPTS, ["resid_post.0", "resid_post.1"], allow_nan=True)
    assert bool(kept["resid_post.1"].isnan().all()) and bool(kept["resid_post.0"].isfinite().all())


def test_a_row_that_becomes_nan_later_is_named_with_its_step() -> None:
    model = tiny_model("qwen2")  # whose unembedding has weights of its own
    third = model.generate(PROMPTS, 6, temperature=0.0).ids
    token = next(int(i) for i in third[2] if i not in third[0] and i not in third[1])
    step = third[2].tolist().index(token) + 1
    model.hf.get_input_embeddings().weight[token] = torch.nan
    for batch_size in (3, 1):
        with pytest.raises(InvalidInputError, match=f"Row 2, token {step}"):
            model.generate(PROMPTS, 6, temperature=0.0, batch_size=batch_size)


def test_nan_at_padding_is_no_answer() -> None:
    model = tiny_model()
    batch = model.tokens(PROMPTS)
    handle = model.hf.model.layers[0].register_forward_hook(
        lambda _m, _a, out: out.masked_fill(~batch.mask[..., None], torch.nan)
    )
    model.hf.model.layers[1].forward = lambda hidden_states, *_a, **_k: hidden_states
    model.hf.model.layers[2].forward = lambda hidden_states, *_a, **_k: hidden_states
    assert bool(model.capture(batch, ["resid_post.0"])["resid_post.0"].isnan().any())
    assert bool(model.logits(batch, keep="all")[batch.mask].isfinite().all())
    handle.remove()
