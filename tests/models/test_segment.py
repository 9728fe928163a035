"""The fast paths give what the model gives."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.tiny import CACHES, D_MODEL, FAMILIES, FP32_LOGITS, MIXTURES, N_LAYERS, cached_model, n_hooks, tiny_model
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, ShapeError, UnknownSiteError
from workbench.core.tokens import TokenBatch
from workbench.features.scores.last_token import LastToken
from workbench.hooks.attach import attached
from workbench.hooks.sites import Point, Site
from workbench.interventions.chosen import Mask, Rows
from workbench.interventions.gates import CosineGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add, Map, ProjectOut
from workbench.interventions.scopes import All, Last, Pos, Scope
from workbench.models.blockcalls import BlockCall
from workbench.models.head import Head
from workbench.models.model import Model

TEXTS = ["abcdef", "xyz"]
SITES = (
    "embed",
    "resid_pre.0",
    "resid_pre.1",
    "resid_mid.1",
    "mlp_out.1",
    "resid_post.1",
    "resid_post.-1",
    "final_norm",
)


def vectors(model: Model, site: str, rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, model.width(site), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_gives_the_logits_of_the_whole_model(family: str, last: bool) -> None:
    model = tiny_model(family)
    batch = model.tokens(TEXTS)
    for site in (name for name in SITES if not (name == "resid_mid.1" and family == "neox")):
        segment = model.segment(batch, site, last=last)
        assert segment.skips_blocks == (site != "embed")
        iv = Intervention.at(site, Add(vectors(model, site, 6)), Last() if last else All())
        with torch.no_grad(), model.plan(iv) as plan:
            got = segment.run(rows=3, plan=plan).logits()
        for v in range(3):
            with model.plan(iv.take(torch.tensor([2 * v, 2 * v + 1]))):
                torch.testing.assert_close(got[2 * v : 2 * v + 2], model.logits(batch), atol=FP32_LOGITS, rtol=1e-4)
        torch.testing.assert_close(segment.logits, model.logits(batch), atol=FP32_LOGITS, rtol=1e-4)
    assert n_hooks(model.hf) == 0


STARTS = ("embed", "resid_pre.1", "resid_post.0", "attn_out.1", "mlp_out.1", "q.1", "z.1", "mlp_post.1", "pattern.1")


@pytest.mark.parametrize("family", (*FAMILIES, *MIXTURES))
def test_other_activations_at_a_site_give_the_values_and_gradients_of_the_whole_model(family: str) -> None:
    model = tiny_model(family)
    batch = model.tokens(TEXTS)
    rows = torch.tensor([1, 0, 1])
    part = TokenBatch(batch.ids[rows], batch.mask[rows])
    keep = part.mask & (torch.arange(part.ids.shape[1]) % 2 == 1)
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(part.ids.shape[1], D_MODEL, generator=draws) * part.mask[..., None]
    for site in (site for site in map(Site.parse, STARTS) if site in model.site_map.points):
        ends = ["resid_post.1", "resid_post.-1"]
        segment = model.segment(batch, site, [*ends, "logits"])
        assert segment.skips_blocks == (site.kind != "embed")
        point, x = model.site_map[site], segment.x[rows][keep]
        x = (x + torch.randn(x.shape, generator=draws)).requires_grad_(True)

        def write(h: torch.Tensor, point: Point = point, x: torch.Tensor = x) -> torch.Tensor:
            flat = point.flat(h).clone()
            flat[keep] = x
            return point.unflat(flat, h)

        with attached([(point, write)]):
            want, logits = model.capture(part, ends, grad=True), model.logits(part)
        got = segment.run(x, rows=rows, keep=keep)
        for end in ends:
            torch.testing.assert_close(got.acts[end] * weight, want[end] * weight, atol=FP32_LOGITS, rtol=1e-4)
        torch.testing.assert_close(got.logits(), logits, atol=FP32_LOGITS, rtol=1e-4)
        slopes = [torch.autograd.grad((acts[ends[1]] * weight).sum(), x)[0] for acts in (got.acts, want)]
        torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)
        assert slopes[1].abs().max() > 1e-3
    assert n_hooks(model.hf) == 0


def test_other_rows_another_layer_or_all_tokens_would_give_other_values() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    segment = model.segment(batch, "resid_post.0", "resid_post.1")
    clean = segment.run(rows=2).acts["resid_post.1"]
    whole = model.capture(batch, ["resid_post.1"])["resid_post.1"].repeat(2, 1, 1)
    torch.testing.assert_close(clean[:, -3:], whole[:, -3:], atol=FP32_LOGITS, rtol=1e-4)
    x, keep = segment.x + 1, torch.zeros_like(batch.mask)
    keep[:, 4] = True
    some = segment.run(x[keep], keep=keep).acts["resid_post.1"]
    torch.testing.assert_close(some[:, 3], clean[:2, 3], atol=FP32_LOGITS, rtol=1e-4)  # what stands before the token
    others = (
        segment.run(x).acts["resid_post.1"],
        segment.run(x[keep].flip(0), keep=keep).acts["resid_post.1"],
        segment.run(x[keep], rows=torch.tensor([1, 0]), keep=keep).acts["resid_post.1"],
        model.segment(batch, "resid_pre.0", "resid_post.1").run(x[keep], keep=keep).acts["resid_post.1"],
        model.segment(batch, "attn_out.1", "resid_post.1").run(x[keep], keep=keep).acts["resid_post.1"],
        model.segment(batch, "resid_post.0", "resid_post.-1").run(x[keep], keep=keep).acts["resid_post.-1"],
    )
    assert all((some - other)[:, 4:].abs().max() > 0.01 for other in others)


def test_gradients_over_cached_keys_are_those_without_a_cache_also_after_another_run() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    short, whole = (model.segment(batch, "resid_post.0", last=last) for last in (True, False))
    assert short.last and short.x.shape[1] == 1
    x = (short.x + 1).requires_grad_(True)
    first = short.run(x).logits()
    short.run(x * 2).logits()
    at_end = torch.zeros_like(batch.mask)
    at_end[:, -1] = True
    want = whole.run(x[:, 0], keep=at_end).logits()
    slopes = [torch.autograd.grad(logits[:, 7].sum(), x)[0] for logits in (first, want)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
@pytest.mark.parametrize("texts", [TEXTS, ["abcdef", "uvwxyz"]])
def test_several_last_tokens_run_over_the_cache_of_the_others(family: str, texts: list[str]) -> None:
    model = tiny_model(family)
    batch = model.tokens(texts)
    tail, whole = (model.segment(batch, "resid_pre.1", last=last) for last in (3, False))
    assert tail.x.shape[1] == 3 and tail.how.endswith("the last 3 tokens of each prompt, over cached keys and values")
    x = whole.x.clone()
    x[:, -3] += 1
    rows = torch.arange(len(texts)).flip(0)
    torch.testing.assert_close(
        tail.run(x[rows, -3:], rows=rows).logits(), whole.run(x[rows], rows=rows).logits(), atol=FP32_LOGITS, rtol=1e-3
    )
    assert not torch.allclose(tail.run(x[:, -3:].roll(1, 1)).logits(), whole.run(x).logits(), atol=1e-2)


@pytest.mark.parametrize("last", [False, 2])
def test_segments_from_later_sites_are_those_of_a_run_of_their_own(last: bool | int) -> None:
    model = tiny_model("llama")
    batch = model.tokens(TEXTS)
    ran: list[int] = []
    first = model.segment(batch, "resid_pre.0", ["logits", "resid_post.2"], last=last)
    handle = model.hf.model.layers[0].register_forward_hook(lambda *_: ran.append(0))
    later = first.later(["attn_out.1", "resid_post.1", "z.2", "resid_pre.1"])
    assert len(ran) == 1, "one run reads what all of them hold"
    for site, segment in later.items():
        own = model.segment(batch, site, ["logits", "resid_post.2"], last=last)
        torch.testing.assert_close(segment.x, own.x, atol=FP32_LOGITS, rtol=1e-4)
        assert (segment.first_block, segment.how) == (own.first_block, own.how)
        a, b = (s.run(own.x + 1, rows=1) for s in (segment, own))
        torch.testing.assert_close(a.logits(), b.logits(), atol=FP32_LOGITS, rtol=1e-4)
        torch.testing.assert_close(a.acts["resid_post.2"], b.acts["resid_post.2"], atol=FP32_LOGITS, rtol=1e-4)
    handle.remove()
    with pytest.raises(InvalidInputError, match="does not reach"):
        model.segment(batch, "resid_pre.1").later(["resid_pre.0"])
    with pytest.raises(InvalidInputError, match="does not reach"):
        model.segment(batch, "resid_pre.0", "resid_post.1").later(["z.2"])
    with pytest.raises(UnknownSiteError):
        first.later(["final_norm"])


def test_only_the_blocks_behind_the_site_run_again() -> None:
    model = tiny_model()
    segment = model.segment("abcdef", "resid_post.1")
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.hf.model.layers)]
    with torch.no_grad(), model.plan(Intervention.at("resid_post.1", Add(torch.ones(model.d_model)))) as plan:
        segment.run(rows=4, plan=plan)
    assert ran == list(range(2, N_LAYERS))
    short = model.segment("abcdef", "mlp_out.0", "mlp_out.1")
    ran.clear()
    short.run(short.x + 1)
    assert ran == [0]  # block 1 is left behind its MLP
    for handle in handles:
        handle.remove()
    assert segment.how == "blocks 2 to 2 of 3, on all tokens"


def test_resuming_refuses_what_it_cannot_do() -> None:
    model = tiny_model()
    ones = torch.ones(model.d_model)
    run = model.segment("abcdef", "resid_post.1")
    with (
        pytest.raises(InvalidInputError, match=r"computed before"),
        model.plan(Intervention.at("resid_post.0", Add(ones))) as plan,
    ):
        run.run(plan=plan)
    short = model.segment("abcdef", "resid_post.1", last=True)
    with (
        pytest.raises(InvalidInputError, match=r"Last\(\)"),
        model.plan(Intervention.at("resid_post.1", Add(ones))) as plan,
    ):
        short.run(plan=plan)
    with (
        pytest.raises(InvalidInputError, match="both x and the plan"),
        model.plan(Intervention.at("resid_post.1", Add(ones))) as plan,
    ):
        run.run(run.x, plan=plan)
    for site, to in (("resid_post.1", "resid_post.0"), ("q.1", "k.1"), ("logits", "logits"), ("resid_post.1", [])):
        with pytest.raises(InvalidInputError, match="does not reach|nothing is to be computed"):
            model.segment("abcdef", site, to)
    with pytest.raises(InvalidInputError, match="ends before the logits"):
        _ = model.segment("abcdef", "resid_post.0", "resid_post.1").run().logits()
    for x, named in ((run.x[:, 1:], {}), (run.x, {"rows": 2}), (run.x, {"keep": torch.ones(1, 6, dtype=torch.bool)})):
        with pytest.raises(ShapeError, match="x has shape"):
            run.run(x, **named)
    with pytest.raises(EditError, match="non-finite"):
        run.run(run.x / 0)


def test_another_head_of_the_start_is_neither_before_it_nor_behind_it() -> None:
    model = tiny_model()
    segment = model.segment("abcdef", "z.1.h0")
    width = model.width("z.1.h1")
    with torch.no_grad(), model.plan(Intervention.at("z.1.h1", Add(torch.ones(width)))) as plan:
        torch.testing.assert_close(segment.run(plan=plan).logits(), model.logits("abcdef"), atol=FP32_LOGITS, rtol=1e-4)
        with pytest.raises(InvalidInputError, match="both x and the plan"):
            segment.run(segment.x + 1, plan=plan)


def test_a_gradient_that_the_model_does_not_have_is_refused_at_either_end() -> None:
    model = tiny_model()
    plain = model.site_map
    for withdrawn in ("resid_post.0", "resid_post.2"):
        model.site_map = plain.without_gradient({Site.parse(withdrawn): "planted"})
        segment = model.segment("abcdef", "resid_post.0", "resid_post.2")
        x = (segment.x + 1).requires_grad_(True)
        with pytest.raises(UnknownSiteError, match=rf"{withdrawn}.*planted"):
            segment.run(x)
        with torch.no_grad():
            segment.run(x)
        segment.run(x.detach())


def test_a_module_that_no_longer_runs_reads_nothing_and_says_so() -> None:
    model = tiny_model()
    segment = model.segment("abcdef", "resid_post.0", ["mlp_out.2", "resid_post.2"])
    model.hf.model.layers[2].mlp = torch.nn.Identity()
    with pytest.raises(EditError, match=r"never ran the module of mlp_out\.2"):
        segment.run()


def test_a_block_that_returns_more_than_the_stream_is_continued_from_the_stream() -> None:
    class Pair(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, extra: int) -> tuple[torch.Tensor, str]:
            return hidden_states * extra, "a cache"

    stream = torch.ones(2, 3, 4)
    for call in (BlockCall((3,), {}, is_positional=True), BlockCall((), {"extra": 3}, is_positional=False)):
        assert torch.equal(call.over(Pair(), stream), 3 * stream)


def test_running_out_of_memory_is_no_sign_of_another_architecture() -> None:
    model = tiny_model()
    block, calls = model.hf.model.layers[2], []
    plain = block.forward

    def full(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **kwargs)

    block.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        model.segment("abcdef", "resid_post.0")
    assert len(calls) == 2 and n_hooks(model.hf) == 0


def test_a_model_that_does_more_between_its_blocks_is_run_whole() -> None:
    model = tiny_model()
    block = model.hf.model.layers[2]
    plain = block.forward
    calls = []

    def moody(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return plain(hidden_states, *args, **kwargs) + len(calls) * torch.linspace(-1, 1, 16)

    block.forward = moody
    assert not model.segment("abcdef", "resid_post.0").skips_blocks


VARIANTS = [
    [Intervention.at("resid_post.1", Add(torch.full((16,), s))) for s in (1.0, -2.0, 3.0)],
    [Intervention.at("resid_post.1", Add(torch.full((16,), s)), Last()) for s in (1.0, -2.0)],
    [
        Intervention.at("resid_post.1", Add(torch.ones(16)), Last()),
        Intervention.at("mlp_out.2", ProjectOut(torch.ones(16)), Pos(1)),
        Intervention(),
    ],
    [Intervention.at("resid_pre.0", Map(lambda h: -h)), Intervention.at("resid_post.2", Add(torch.ones(16)))],
    [Intervention.at("logits", Add(torch.ones(258)), Last()), Intervention()],
    [Intervention.at("resid_post.0", Add(torch.ones(16))) + Intervention.at("pattern.1", Map(lambda h: h / 2))],
    [
        Intervention.at("resid_post.1", When(CosineGate(torch.ones(16), at="resid_pre.1"), Add(torch.ones(16)))),
        Intervention.at("resid_post.1", Add(torch.ones(2, 16), torch.tensor([1.0, 5.0]))),
    ],
]


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
@pytest.mark.parametrize("interventions", VARIANTS)
def test_variants_are_the_single_runs(family: str, interventions: list[Intervention]) -> None:
    model = tiny_model(family)
    batch = model.tokens(TEXTS)
    found = model.variants(batch, interventions)
    some = model.variants(batch, interventions, tokens=[5, 77])
    for got, few, iv in zip(found.logits, some.logits, interventions, strict=True):
        if iv.edits:
            with model.plan(iv):
                want = model.logits(batch)
        else:
            want = model.logits(batch)
        torch.testing.assert_close(got, want, atol=FP32_LOGITS, rtol=1e-4)
        torch.testing.assert_close(few, want[:, [5, 77]], atol=FP32_LOGITS, rtol=1e-4)
    torch.testing.assert_close(found.clean, model.logits(batch), atol=FP32_LOGITS, rtol=1e-4)
    assert n_hooks(model.hf) == 0


def test_variants_in_small_parts_are_the_same_and_each_edit_is_proven() -> None:
    from workbench.models.compare import compare

    model = tiny_model()
    batch = model.tokens(TEXTS)
    ivs = [Intervention.at("resid_post.1", Add(torch.full((16,), float(s)))) for s in range(1, 8)]
    whole = model.variants(batch, ivs)
    parts = compare(model, batch, ivs, model.plan, max_tokens=24)
    torch.testing.assert_close(parts.logits, whole.logits, atol=FP32_LOGITS, rtol=1e-4)
    assert sum(r.tokens for r in whole.report) == sum(r.tokens for r in parts.report) == 7 * batch.n_tokens
    with pytest.raises(EditError, match="no token"):
        model.variants(batch, [Intervention.at("resid_post.1", Add(torch.ones(16)), Pos(50))])
    with pytest.raises(DegenerateInputError):
        model.variants(batch, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_logits_are_those_of_a_full_forward(family: str) -> None:
    model = tiny_model(family)
    batch = model.tokens(TEXTS)
    whole = model.logits(batch, keep="all")
    plain = model.hf(**batch.hf(), use_cache=False).logits
    torch.testing.assert_close(whole[batch.mask], plain[batch.mask], atol=FP32_LOGITS, rtol=1e-4)
    scopes: list[Scope] = [Last(), Pos(0, 2), All() & ~Pos(1), Mask(batch.mask)]
    for scope in scopes:
        chosen = torch.zeros_like(batch.mask)
        at = {Last: [-1], Pos: [0, 2]}.get(type(scope))
        for row, length in enumerate(batch.lengths.tolist()):
            for position in range(length):
                inside = position != 1 if at is None and not isinstance(scope, Mask) else True
                inside = inside if at is None else position in [p % length for p in at]
                chosen[row, batch.ids.shape[1] - length + position] = inside
        torch.testing.assert_close(model.logits(batch, keep=scope), plain[chosen], atol=FP32_LOGITS, rtol=1e-4)
        few = model.logits(batch, keep=scope, tokens=[3, 200, 7])
        torch.testing.assert_close(few, plain[chosen][:, [3, 200, 7]], atol=FP32_LOGITS, rtol=1e-4)


def test_the_last_token_of_right_padded_rows_is_found() -> None:
    model = tiny_model()
    ids = torch.tensor([[20, 21, 22, 23], [30, 31, 1, 1]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    got = model.logits(TokenBatch(ids, mask))
    torch.testing.assert_close(got[1], model.logits(ids[1:, :2])[0], atol=FP32_LOGITS, rtol=1e-4)


def test_only_the_positions_asked_for_are_unembedded() -> None:
    model = tiny_model()
    seen = []
    head = model.hf.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
    model.logits(TEXTS, keep=Pos(0, 1))
    model.logits(TEXTS, tokens=[4])
    model.logits(TEXTS, tokens=[4])
    handle.remove()
    # The first request for chosen tokens is checked against a full one; after that the unembedding is cut short.
    assert len(seen) == 3
    assert model.head.logits(model.tokens(TEXTS).hf(), None, torch.tensor([4])).shape == (2, 6, 1)


def test_a_head_that_does_more_is_refused_for_chosen_tokens() -> None:
    model = tiny_model()
    head = Head(model.hf)
    hidden = torch.randn(2, 16)
    with pytest.raises(InvalidInputError, match="tokens=None"):
        head.require(hidden, head.all(hidden).exp())
    for bad in ([], [-1], [258]):
        with pytest.raises(InvalidInputError):
            model.logits("abc", tokens=bad)
    with pytest.raises((InvalidInputError, TypeCheckError), match="keep"):
        model.logits("abc", keep="first")  # type: ignore[arg-type]


def test_rows_scope_edits_its_rows_only() -> None:
    model = tiny_model()
    ids = torch.arange(10, 22).view(2, 6)
    clean = model.capture(ids, ["resid_pre.2"])["resid_pre.2"]
    with model.plan(Intervention.at("resid_post.1", Add(torch.ones(16)), Rows(torch.tensor([False, True])))):
        edited = model.capture(ids, ["resid_pre.2"])["resid_pre.2"]
    assert torch.equal(edited[0], clean[0]) and not torch.allclose(edited[1], clean[1])


@pytest.mark.parametrize("family", ["bloom", "opt", "mpt"])
def test_families_that_arrange_batch_and_heads_in_their_own_way_are_right_or_refused(family: str) -> None:
    from transformers import AutoModelForCausalLM, BloomConfig, MptConfig, OPTConfig

    size = {"vocab_size": 258, "hidden_size": 16}
    config = {
        "bloom": lambda: BloomConfig(**size, n_layer=3, n_head=2),
        "opt": lambda: OPTConfig(
            **size, num_hidden_layers=3, ffn_dim=24, num_attention_heads=2, max_position_embeddings=64,
            word_embed_proj_dim=16,
        ),
        "mpt": lambda: MptConfig(vocab_size=258, d_model=16, n_heads=2, n_layers=3, max_seq_len=64),
    }[family]()  # fmt: skip
    torch.manual_seed(0)
    model = Model(AutoModelForCausalLM.from_config(config).eval(), tiny_model().tokenizer)
    report = model.self_check()
    assert report.ok, str(report)
    # OPT gives its second norm (batch * pos, d); Bloom computes its pattern in three axes.
    refused = {"opt": "resid_mid", "bloom": "pattern"}.get(family)
    assert refused is None or refused in {site.kind for site in report.withdrawn}
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    ivs = [Intervention.at("resid_post.1", Add(s * vector), Last()) for s in (1.0, 2.0)]
    found = model.variants(TEXTS, ivs)
    for got, iv in zip(found.logits, ivs, strict=True):
        with model.plan(iv):
            torch.testing.assert_close(got, model.logits(TEXTS), atol=FP32_LOGITS, rtol=1e-4)


@pytest.mark.parametrize("family", [*CACHES, "llama", "mistral"])
@pytest.mark.parametrize("texts", [["abcdef", "xyz"], ["a"], ["q", "abc"]], ids=len)
def test_last_tokens_over_any_cache_are_the_uncached_run(family: str, texts: list[str]) -> None:
    model = cached_model(family) if family in CACHES else tiny_model(family)
    vector = torch.linspace(-3, 3, 16)
    ivs = [Intervention.at("resid_post.1", Add(s * vector), Last()) for s in (1.0, -2.0)]
    found = model.variants(texts, ivs)
    for got, iv in zip(found.logits, ivs, strict=True):
        with model.plan(iv):
            torch.testing.assert_close(got, model.logits(texts), atol=FP32_LOGITS, rtol=1e-4)
    segment = model.segment(texts[0], "resid_post.1", last=True)
    torch.testing.assert_close(segment.logits, model.logits(texts[0]), atol=FP32_LOGITS, rtol=1e-4)
    last = LastToken(model, model.tokens(texts[0]).ids, model.resolve("resid_post.1"), rows=2)
    with model.plan(ivs[0]):
        want = model.logits(texts[0])
    torch.testing.assert_close(model.head.all(last.hidden(vector[None])), want, atol=FP32_LOGITS, rtol=1e-4)


def test_a_model_that_ignores_its_cache_is_not_resumed_from_it() -> None:
    model = tiny_model()
    plain = model.hf.model.forward
    model.hf.model.forward = lambda *args, past_key_values=None, **named: plain(*args, **named)
    segment = model.segment("abcdef", "resid_post.1", last=True)
    assert not segment.last
    torch.testing.assert_close(segment.logits, model.logits("abcdef"), atol=FP32_LOGITS, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="outside of the cache"):
        model.generate("abcdef", 3)
