"""Edits in running models: caches, padding, beams, precision, threads, and what is left when a block ends."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.interventions.builders import bad_sae, edited, padded, sae_lens_sae
from tests.tiny import D_MODEL, FP32_LOGITS, n_hooks, spaced_tokenizer, tiny_model
from workbench.core.errors import EditError, InvalidInputError, MismatchError
from workbench.core.tokens import TokenBatch
from workbench.core.wording import Wording
from workbench.hooks import attach, handles, pattern
from workbench.interventions import jobs
from workbench.interventions import plan as plans
from workbench.interventions.chosen import Mask
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add, Map, PerRow, ProjectOut
from workbench.interventions.plan import Plan, active_plans
from workbench.interventions.replacing import Ablate
from workbench.interventions.saes import SAEAddMax, SAEClamp
from workbench.interventions.scopes import After, All, Generated, Last, NotPrefix, Pos, Prompt, Scope, TokenIs
from workbench.models import tiny
from workbench.models.choice import chosen_tokens
from workbench.models.model import Model

IDS = torch.arange(10, 22).view(2, 6)
V = torch.linspace(-1, 1, D_MODEL)
ADD = Intervention.at("resid_post.1", Add(V, 3.0))
MASK = torch.zeros(2, 6, dtype=torch.bool)
MASK[0, 1], MASK[1, 4:] = True, True


def greedy(model: Model, batch: TokenBatch, n: int = 8, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.hf.generate(
        **batch.hf(), max_new_tokens=n, min_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **more,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


# What reaches the model.


def test_the_arad_edit_adds_s_times_a_max_at_the_last_token_and_leaves_every_other_bit() -> None:
    model = tiny_model()
    sae, f, s = sae_lens_sae("jumprelu"), torch.tensor([4, 30]), torch.tensor([2.0, 5.0])
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    found = edited(model, IDS, Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[f], s), Last()))
    a_max = sae.encode(clean[:, -1]).amax(1)
    assert not torch.allclose(a_max, a_max.amax())  # a maximum over the batch would couple the rows
    torch.testing.assert_close(found[:, -1] - clean[:, -1], (s * a_max)[:, None] * sae.W_dec[f], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, :-1], clean[:, :-1])


def test_eight_prompts_with_features_and_strengths_of_their_own_equal_eight_single_runs() -> None:
    model = tiny_model("gemma2")
    sae = sae_lens_sae("topk")
    rows = [list(range(10 + i, 13 + 2 * i)) for i in range(8)]
    f, s = torch.arange(8) * 3, torch.arange(8) + 0.5
    batch = padded(rows, "left")
    with model.plan(Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[f], s), Last() | Generated())):
        together = model.logits(batch)
    for i, row in enumerate(rows):
        with model.plan(Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[f[i]], float(s[i])), Last())):
            alone = model.logits(torch.tensor([row]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=FP32_LOGITS, rtol=1e-4)


SCOPES: list[Scope] = [
    All(), Prompt(), Generated(), Last(), NotPrefix(3), NotPrefix(7), TokenIs(12, 18), Pos(0, 7, -2), Mask(MASK),
    After((12, 13)), After((12,), "last"), After((16,)) & ~Last(), (NotPrefix(2) & Prompt()) | Pos(8), ~After((12,)) | Generated(),
]  # fmt: skip


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_generation_with_and_without_a_cache_agrees_over_eight_steps(family: str, scope: Scope) -> None:
    model = tiny_model(family)
    iv = Intervention.at("resid_post.0", Add(V, 3.0), scope) + Intervention.at(
        "mlp_out.1", SAEClamp(bad_sae(), [1, 2], 1.0), scope
    )
    runs = []
    for use_cache in (True, False):
        with model.plan(iv):
            runs.append(greedy(model, TokenBatch.of_rows(IDS), use_cache=use_cache))
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=FP32_LOGITS, rtol=1e-4)
    assert float((greedy(model, TokenBatch.of_rows(IDS))[1] - runs[0][1]).abs().max()) > 0.01


@pytest.mark.parametrize("use_cache", [True, False])
def test_behind_a_marker_that_is_generated_every_later_token_is_edited_and_no_earlier_one(use_cache: bool) -> None:
    model = tiny_model()
    batch = TokenBatch.of_rows(IDS[:1])
    clean, logits = greedy(model, batch, use_cache=use_cache)
    marker = tuple(clean[0, 7:9].tolist())  # the second and third new token
    with model.plan(Intervention.at("resid_post.0", Add(V, 30.0), After(marker))) as plan:
        ids, found = greedy(model, batch, use_cache=use_cache)
    assert torch.equal(ids[0, :10], clean[0, :10])  # the token behind the marker is chosen before it is edited
    assert torch.equal(found[:, :4], logits[:, :4])
    assert float((found[:, 4] - logits[:, 4]).abs().max()) > 0.1
    assert plan.report[0].tokens == (4 if use_cache else 1 + 2 + 3 + 4)


def test_the_scope_of_the_newest_token_only_depends_on_the_cache_which_is_why_there_is_none() -> None:
    # The edit of the reference code: position -1 of whatever the hook is given.
    model = tiny_model()

    def newest(_m: Any, _a: Any, output: torch.Tensor) -> torch.Tensor:
        out = output.clone()
        out[:, -1] += 40 * V
        return out

    runs = []
    for use_cache in (True, False):
        handle = model.site_map["resid_post.0"].module.register_forward_hook(newest)
        runs.append(greedy(model, TokenBatch.of_rows(IDS), use_cache=use_cache)[1])
        handle.remove()
    assert float((runs[0] - runs[1]).abs().max()) > 0.1
    with model.plan(Intervention.at("resid_post.0", Add(V, 40.0), Last() | Generated())):
        wanted = greedy(model, TokenBatch.of_rows(IDS))[1]
    torch.testing.assert_close(runs[0], wanted, atol=FP32_LOGITS, rtol=1e-4)


@pytest.mark.parametrize(
    "scope", [All(), Last(), Pos(0), Pos(-3), NotPrefix(2), TokenIs(1), After((1,)), After((1,), "last")], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "neox"])
def test_padding_on_either_side_changes_nothing_and_padding_tokens_inside_the_prompt_are_edited(
    family: str, scope: Scope
) -> None:
    model = tiny_model(family)
    rows = [[10, 1, 12, 1, 14], [1, 15, 16], [20, 1, 22, 23, 24, 25, 26]]  # 1 is the padding token
    iv = Intervention.at("resid_post.0", Add(V, 3.0), scope)
    with model.plan(iv) as plan:
        alone = [model.logits(torch.tensor([row]), "all")[0] for row in rows]
    count = plan.report[0].tokens
    for side in ("left", "right"):
        batch = padded(rows, side)
        with model.plan(iv) as plan:
            found = model.logits(batch, "all")
        assert plan.report[0].tokens == count
        for i, wanted in enumerate(alone):
            torch.testing.assert_close(found[i][batch.mask[i]], wanted, atol=FP32_LOGITS, rtol=1e-4)


def test_a_marker_of_an_earlier_turn_of_a_conversation_is_still_seen_in_the_next_one() -> None:
    model = tiny_model()
    marker = After((0,))  # the BOS in front of the first turn
    session = model.session(intervention=Intervention.at("resid_post.0", Add(V, 3.0), marker), max_new_tokens=3)
    plain = model.session(intervention=Intervention.at("resid_post.0", Add(V, 3.0), NotPrefix(1)), max_new_tokens=3)
    for text in ("ab", "cde", "f"):
        session.turn(text, temperature=0.0)
        plain.turn(text, temperature=0.0)
    assert session.messages == plain.messages
    assert session.report[0].tokens == plain.report[0].tokens


# Beams and returned sequences.


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scope", [All(), Generated(), Last()], ids=str)
def test_beams_and_returned_sequences_of_a_left_padded_batch_equal_single_prompts(
    scope: Scope, use_cache: bool
) -> None:
    model = tiny_model()
    rows = [[10, 11, 12], [13, 14, 15, 16, 17, 18]]
    vectors = torch.stack([V, V.flip(0)])
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 2,
        "num_return_sequences": 2,
        "do_sample": False,
        "use_cache": use_cache,
    }
    with model.plan(Intervention.at("resid_post.1", Add(vectors, 6.0), scope)) as plan:
        both = model.hf.generate(**padded(rows, "left").hf(), **options)
    n = 0
    for i, row in enumerate(rows):
        with model.plan(Intervention.at("resid_post.1", Add(vectors[i], 6.0), scope)) as one:
            alone = model.hf.generate(**TokenBatch.of_rows(torch.tensor([row])).hf(), **options)
        assert torch.equal(both[2 * i : 2 * i + 2, -4:], alone[:, -4:])
        n += one.report[0].tokens
    assert plan.report[0].tokens == n
    clean = model.hf.generate(**padded(rows, "left").hf(), **options)
    assert not torch.equal(both, clean)


# Precision and safety of the model's own tensors.


@pytest.mark.parametrize(
    "op",
    [Add(V, 3.0), ProjectOut(V), SAEClamp(sae_lens_sae("jumprelu"), [1], 3.0), Map(lambda h: h * 2)],
    ids=lambda o: o.name,
)
def test_a_bfloat16_model_stays_bfloat16_and_the_edit_is_computed_in_fp32_and_rounded_once(op: Any) -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    seen = []
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    record = Map(lambda h: (seen.append(h.dtype), h)[1])
    iv = Intervention.at("resid_post.1", record) + Intervention.at("resid_post.1", op)
    found = edited(model, IDS, iv)
    assert (clean.dtype, found.dtype, seen) == (torch.bfloat16, torch.bfloat16, [torch.float32])
    assert torch.equal(found.flatten(0, 1), op(clean.flatten(0, 1).float()).to(torch.bfloat16))


def test_several_edits_of_a_site_are_rounded_once_together() -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    tiny_steps = sum(
        (Intervention.at("resid_post.1", Add(torch.ones(D_MODEL), 1e-3)) for _ in range(200)), Intervention()
    )
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    wanted = (clean.float() + 0.2).to(torch.bfloat16)
    found = edited(model, IDS, tiny_steps)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0.01)
    assert not torch.equal(found, clean)


def test_a_double_precision_model_is_edited_in_double_precision() -> None:
    model = tiny_model()
    model.hf.double()
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    for op in (ProjectOut(V), Add(V, 0.1), Ablate("mean", V, V.flip(0) + 2)):
        found = edited(model, IDS, Intervention.at("resid_post.1", op))
        assert found.dtype == torch.float64
        assert not torch.equal(found, clean)
    unit = V.double() / V.double().norm()
    out = edited(model, IDS, Intervention.at("resid_post.1", ProjectOut(V)))
    torch.testing.assert_close(out, clean - (clean @ unit)[..., None] * unit, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "op",
    [
        Add(V),
        ProjectOut(V),
        Ablate(),
        Map(lambda h: h.mul_(3)),
        PerRow((Map(lambda h: h.zero_()),), torch.tensor([0, -1])),
        SAEClamp(bad_sae(), [1], 9.0),
    ],
    ids=lambda o: o.name,
)
@pytest.mark.parametrize("scope", [All(), Last()], ids=str)
def test_tensors_held_by_an_outer_hook_or_by_the_output_are_never_changed_in_place(op: Any, scope: Scope) -> None:
    model = tiny_model()
    held: list[torch.Tensor] = []
    module = model.site_map["resid_post.1"].module
    handle = module.register_forward_hook(lambda _m, _a, out: held.append(out))
    clean = model.hf(IDS, output_hidden_states=True)
    with model.plan(Intervention.at("resid_post.1", op, scope) + Intervention.at("resid_post.1", Add(V), scope)):
        again = model.hf(IDS, output_hidden_states=True)
    handle.remove()
    assert torch.equal(held[0], held[1])  # both before the edit, the second one after the pass was edited
    assert torch.equal(clean.hidden_states[1], again.hidden_states[1])
    assert not torch.equal(clean.logits, again.logits)


def test_a_function_that_changes_the_shape_is_refused_where_it_would_be_broadcast() -> None:
    model = tiny_model()
    for fn in (lambda h: h[:1], lambda h: h.sum(1), lambda h: None, lambda h: h.mean(0)):
        for op in (Map(fn), PerRow((Map(fn),), torch.tensor([0, -1]))):
            with pytest.raises(EditError, match="keep the shape"), model.plan(Intervention.at("resid_post.1", op)):
                model.logits(IDS)
    assert n_hooks(model.hf) == 0


# Cleaning up.


def _broken(h: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize("where", ["registration", "hook", "body", "non-finite"])
def test_after_an_exception_there_is_no_hook_no_active_plan_and_no_changed_bit(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    clean, weights = model.logits(IDS), [p.clone() for p in model.hf.parameters()]
    iv = ADD + Intervention.at("mlp_out.2", Add(V))
    if where == "hook":
        iv += Intervention.at("resid_post.2", Map(_broken))
    if where == "non-finite":
        iv += Intervention.at("resid_post.2", Map(lambda h: h / 0))
    plan = model.plan(iv)
    error = {
        "hook": ZeroDivisionError,
        "body": ZeroDivisionError,
        "registration": RuntimeError,
        "non-finite": EditError,
    }[where]
    with monkeypatch.context() as patch:
        if where == "registration":

            def fails(*args: object, **kwargs: object) -> None:
                raise RuntimeError("no more hooks")

            patch.setattr(model.site_map["mlp_out.2"].module, "register_forward_hook", fails)
        with pytest.raises(error):
            with plan:
                model.logits(IDS)
                raise ZeroDivisionError
    assert n_hooks(model.hf) == 0
    assert active_plans(model.hf) == ()
    assert torch.equal(model.logits(IDS), clean)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.hf.parameters(), strict=True))
    # The same plan can be entered again, and another one too.
    if where in ("body", "registration"):
        with plan:
            model.logits(IDS)
    with model.plan(ADD):
        assert not torch.equal(model.logits(IDS), clean)


def interrupts(run: Callable[[], object]) -> Iterator[tuple[str, int, str]]:
    """Runs it again and again, each time with a KeyboardInterrupt at another line of what puts hooks on and off."""
    seen: set[tuple[str, int, str]] = set()
    files = {handles.__file__, attach.__file__, pattern.__file__, plans.__file__, jobs.__file__, contextlib.__file__}

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        code = frame.f_code
        if code.co_filename not in files and not code.co_name.startswith("register_forward"):
            return None
        place = (code.co_filename, frame.f_lineno, code.co_name)
        if place not in seen and code.co_name != "__del__":
            seen.add(place)
            hit.append(place)
            raise KeyboardInterrupt  # Python stops tracing here
        return trace

    while True:
        hit: list[tuple[str, int, str]] = []
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if not hit:
            return
        yield hit[0]


@pytest.mark.parametrize("kind", ["plan", "capture", "attached"])
def test_an_interrupt_at_any_line_leaves_no_hook_and_no_setting_behind(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a third of the time
    model = tiny_model()
    clean, points = model.logits(IDS), [model.site_map[site] for site in ("resid_mid.0", "pattern.0", "mlp_out.0")]
    both = Intervention.at("pattern.0", Map(lambda h: 2 * h)) + Intervention.at("resid_mid.1", Add(V, 3.0))
    held: list[Plan] = []

    def run() -> None:
        if kind == "capture":
            model.capture(IDS[:1, :2], ["pattern.0"])
        elif kind == "attached":
            with attach.attached([(point, lambda x: x + 1) for point in points]):
                pass
        else:
            held[:] = [model.plan(both)]
            with pytest.raises(EditError, match="never ran"), held[0]:
                pass

    def left() -> tuple[object, ...]:
        setting = model.hf.config._attn_implementation_internal
        return n_hooks(model.hf), len(active_plans(model.hf)), "generate" in vars(model.hf), setting

    nothing, n = left(), 0
    for _file, _line, name in interrupts(run):
        n += 1
        if name == "__exit__" and kind == "plan" and left() != nothing:
            # Before the first line of __exit__ nothing can be done; the plan takes its hooks off when it is freed.
            held.clear()
        assert left() == nothing, (_file, _line, name)
    assert n > 40
    model.capture(IDS, ["pattern.0"])
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(model.logits(IDS), clean)


def test_a_plan_that_is_left_open_keeps_no_model_in_memory_and_ends_when_it_is_freed() -> None:
    model = tiny_model()
    clean = model.logits(IDS)
    plan = model.plan(ADD + Intervention.at("pattern.0", Map(lambda h: 2 * h)))
    plan.__enter__()
    assert not torch.equal(model.logits(IDS), clean)
    plan = model.plan(ADD)
    assert n_hooks(model.hf) == 0
    assert torch.equal(model.logits(IDS), clean)
    plan.__enter__()
    weak = weakref.ref(model.hf)
    del model, plan
    gc.collect()
    assert weak() is None


def test_hooks_of_others_stay_and_fire() -> None:
    model = tiny_model()
    fired: list[int] = []
    handle = model.site_map["resid_post.1"].module.register_forward_hook(lambda *_: fired.append(1))
    with model.plan(ADD):
        model.logits(IDS)
    model.logits(IDS)
    assert len(fired) == 2
    handle.remove()


def test_nested_plans_act_in_the_order_in_which_they_were_entered_and_leave_one_by_one() -> None:
    model = tiny_model()
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    out = Intervention.at("resid_post.1", ProjectOut(V))
    with model.plan(ADD) as outer:
        with model.plan(out):
            both = model.capture(IDS, ["resid_pre.2"])["resid_pre.2"]
            assert model.active_edits() == ("Add at resid_post.1 on All()", "ProjectOut at resid_post.1 on All()")
        only = model.capture(IDS, ["resid_pre.2"])["resid_pre.2"]
        assert model.active_edits() == ("Add at resid_post.1 on All()",)
        with pytest.raises(EditError, match="already active"), outer:
            pass
    assert model.active_edits() == ()
    torch.testing.assert_close(both, ProjectOut(V)(clean.flatten(0, 1)).view_as(clean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(only, clean + 3 * V, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.capture(IDS, ["resid_pre.2"])["resid_pre.2"], clean)


def _in_thread(fn: Any) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            fn()
        except BaseException as error:  # noqa: BLE001
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_a_plan_in_another_thread_and_a_forward_pass_of_another_thread_are_refused() -> None:
    model = tiny_model()

    def enter() -> None:
        with model.plan(ADD):
            model.logits(IDS)

    with model.plan(ADD):
        clean = model.logits(IDS)
        error = _in_thread(enter)
        assert isinstance(error, EditError)
        assert "another thread" in str(error)
        error = _in_thread(lambda: model.logits(IDS))
        assert isinstance(error, EditError)
        assert "another thread" in str(error)
        # Also in the middle of a pass of this thread.
        inside: list[BaseException | None] = []
        probe = Map(lambda h: (inside.append(_in_thread(lambda: model.hf(IDS[:, :6], use_cache=False))), h)[1])
        with model.plan(Intervention.at("resid_post.0", probe)):
            model.logits(IDS)
        assert isinstance(inside[0], EditError)
        assert torch.equal(model.logits(IDS), clean)
    assert _in_thread(enter) is None
    assert n_hooks(model.hf) == 0


def test_a_pass_that_was_interrupted_leaves_nothing_that_the_next_one_could_take_for_its_own() -> None:
    model = tiny_model()
    stop = [True]

    def interrupted(h: torch.Tensor) -> torch.Tensor:
        if stop[0]:
            raise KeyboardInterrupt
        return h

    iv = Intervention.at("resid_post.1", Add(V, 3.0), Last()) + Intervention.at("resid_post.2", Map(interrupted))
    with model.plan(ADD + Intervention.at("resid_post.2", Map(lambda h: h))):
        pass_through = model.logits(IDS)
    assert pass_through.shape == (2, model.d_vocab)
    with model.plan(iv) as plan:
        with pytest.raises(KeyboardInterrupt):
            model.logits(IDS[:, :3])
        stop[0] = False
        found = model.logits(IDS)
    with model.plan(Intervention.at("resid_post.1", Add(V, 3.0), Last())):
        assert torch.equal(model.logits(IDS), found)
    assert plan.report[0].tokens == 4


def test_arguments_given_by_position_are_read_like_those_given_by_name() -> None:
    model = tiny_model()
    batch = padded([[10, 11, 12], [13, 14, 15, 16, 17]], "left")
    inputs = batch.hf()
    for scope in (All(), Pos(0), Last()):
        iv = Intervention.at("resid_post.0", Add(V, 3.0), scope)
        with model.plan(iv) as named:
            wanted = model.hf(**inputs, use_cache=False).logits
        with model.plan(iv) as plan:
            found = model.hf(
                inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"], use_cache=False
            ).logits
        assert plan.report[0].tokens == named.report[0].tokens
        assert torch.equal(found, wanted)


def test_an_intervention_of_another_model_is_refused_unless_that_is_meant() -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    mine = Intervention(ADD.edits, model.fingerprint)
    with model.plan(mine):
        model.logits(IDS)
    for iv in (mine, mine + ADD, ADD + mine, mine * 2.0, mine.take(torch.tensor([0]))):
        with pytest.raises(MismatchError, match="made for the model"):
            other.plan(iv)
        with other.plan(iv, any_model=True):
            other.logits(IDS)
    with pytest.raises(MismatchError, match="different models"):
        _ = mine + Intervention(ADD.edits, other.fingerprint)


def spaced_model() -> Model:
    tokenizer = spaced_tokenizer()
    return Model(tiny.tiny_hf("llama", len(tokenizer)), tokenizer)


def edited_strings(model: Model, text: str, scope: Scope) -> list[str]:
    """The strings of the tokens that a scope chooses."""
    batch = model.tokens(text)
    chosen = chosen_tokens(batch, scope, Wording(model.tokenizer))[0].tolist()
    return [string for string, wanted in zip(batch.str_tokens[0], chosen, strict=True) if wanted]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [(" the", [" the", " the"]), ("the", ["the"]), (".", ["."]), (" dog", [" dog"]), ("<s>", ["<s>"])],
)
def test_a_text_is_the_token_that_reads_so_in_running_text(text: str, chosen: list[str]) -> None:
    assert edited_strings(spaced_model(), "the dogthe. the", TokenIs(text)) == chosen


def test_a_text_of_several_tokens_is_refused_with_what_comes_close() -> None:
    model = spaced_model()
    for text, says in (
        ("The", r"4 tokens, '' \(259\), 'T'.*come close: ' the' \(260\), 'the' \(274\)"),
        ("the dog", r"2 tokens, 'the' \(260\), ' dog' \(261\)\. Give"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            model.plan(Intervention.at("resid_post.0", Add(V), TokenIs(text)))


@pytest.mark.parametrize(
    ("marker", "behind"),
    [
        ("</think>", ["the", " ran", ".", " the"]),
        ("k>the", [" ran", ".", " the"]),
        (" ran", [".", " the"]),
        ("the", ["<", "/", "th", "i", "n", "k", ">", "the", " ran", ".", " the"]),
    ],
)
def test_a_marker_is_found_behind_a_word_and_across_tokens(marker: str, behind: list[str]) -> None:
    assert edited_strings(spaced_model(), "dogthe</think>the ran. the", After(marker)) == behind


def test_words_of_a_vocabulary_without_spaces() -> None:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "dog", "##s", "##the", "<", "/", "think", ">", "a", "test"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[SEP]", cls_token="[CLS]", sep_token="[SEP]"
    )
    model = Model(tiny.tiny_hf("llama", len(words)), tokenizer)
    text = "The dogs</think>the"
    assert edited_strings(model, text, TokenIs("the")) == edited_strings(model, text, TokenIs(" The")) == [" the"] * 2
    assert edited_strings(model, text, After("</think>")) == [" the"]
    with pytest.raises(InvalidInputError, match=r"TokenIs\('dogs'\).*2 tokens"):
        edited_strings(model, text, TokenIs("dogs"))
    with pytest.raises(InvalidInputError, match=r"TokenIs\('cat'\)"):
        edited_strings(model, text, TokenIs("cat"))
