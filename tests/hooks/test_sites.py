from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import FAMILIES, N_LAYERS, n_hooks, tiny_model
from workbench.core.errors import DegenerateInputError, EditError, UnknownSiteError
from workbench.hooks.attach import attached
from workbench.hooks.sites import HEAD_KINDS, Point, Site


def test_text_and_transformer_lens_names_are_the_same_site() -> None:
    assert Site.parse("resid_post.3") == Site.parse("blocks.3.hook_resid_post") == Site("resid_post", 3)
    assert Site.parse("hook_embed") == Site("embed")
    for name in ("resid_pre.0", "z.2", "final_norm"):
        assert str(Site.parse(Site.parse(name).tl_name)) == name


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("resid_pst.1", "resid_post"),
        ("blocks.1.hook_resid_pst", "no site"),
        ("resid_post", "layer number"),
        ("resid_post.x", "layer number"),
        ("embed.0", "no site"),
    ],
)
def test_a_misspelt_site_raises_with_a_hint(asked: str, says: str) -> None:
    with pytest.raises(UnknownSiteError, match=says):
        Site.parse(asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_and_withdraws_nothing(family: str) -> None:
    model = tiny_model(family)
    report = model.self_check()
    assert report.ok, str(report)
    assert not report.withdrawn
    assert n_hooks(model.hf) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_is_the_stream_that_hugging_face_reports(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(10, 22).view(2, 6)
    hidden = model.hf(ids, output_hidden_states=True, use_cache=False).hidden_states
    acts = model.capture(
        ids, [f"resid_pre.{layer}" for layer in range(N_LAYERS)] + [f"resid_post.{N_LAYERS - 1}", "final_norm"]
    )
    for layer in range(N_LAYERS):
        assert torch.equal(acts[f"resid_pre.{layer}"], hidden[layer])
    assert torch.equal(acts["final_norm"], hidden[-1])
    # hidden_states[-1] is after the final norm: the neighbouring site must not pass for it.
    assert not torch.allclose(acts[f"resid_post.{N_LAYERS - 1}"], hidden[-1], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_add_up_and_their_neighbours_do_not(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(10, 22).view(2, 6)
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    acts = model.capture(ids, [f"{kind}.{layer}" for kind in kinds for layer in range(N_LAYERS)])
    total = acts["resid_pre.1"] + acts["attn_out.1"] + acts["mlp_out.1"]
    torch.testing.assert_close(total, acts["resid_post.1"], atol=1e-4, rtol=1e-4)
    wrong = acts["resid_pre.1"] + acts["attn_out.0"] + acts["mlp_out.1"]
    assert not torch.allclose(wrong, acts["resid_post.1"], atol=1e-2)


def test_parallel_blocks_have_no_resid_mid_and_say_why() -> None:
    model = tiny_model("neox")
    with pytest.raises(UnknownSiteError, match="parallel"):
        model.capture("abc", ["resid_mid.0"])
    assert tiny_model("neox_sequential").resolve("resid_mid.0") == Site("resid_mid", 0)


def test_capture_stops_after_the_last_site_needed() -> None:
    model = tiny_model()
    ran = []
    handle = model.hf.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    model.capture("abc", ["resid_post.1"])
    assert ran == []
    model.capture("abc", ["resid_post.2"])
    assert ran == [2]
    handle.remove()


def test_hooks_are_gone_after_an_exception_anywhere_and_foreign_hooks_stay() -> None:
    model = tiny_model()
    foreign = model.hf.model.layers[0].register_forward_hook(lambda *_: None)
    point = model.site_map["resid_post.0"]
    with pytest.raises(ZeroDivisionError), attached([(point, lambda x: x)]):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), attached([(point, lambda x: 1 / 0)]):
        model.logits("abc")

    class Broken(torch.nn.Module):
        def register_forward_hook(self, *_, **__):
            raise ZeroDivisionError

    broken = Point(point.site, "broken", Broken(), "out", 16)
    with pytest.raises(ZeroDivisionError), attached([(point, lambda x: x), (broken, lambda x: x)]):
        pass
    assert n_hooks(model.hf) == 1
    foreign.remove()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda x: x[:, :1], "shape"),
        (lambda x: x.double(), "float64"),
        (lambda x: x * float("nan"), "non-finite"),
        (lambda x: "no", "str"),
    ],
)
def test_a_hook_that_returns_something_else_raises(bad, says: str) -> None:
    model = tiny_model()
    with pytest.raises(EditError, match=says), attached([(model.site_map["resid_post.1"], bad)]):
        model.logits("abc")


def test_block_input_given_by_keyword_or_position_is_read_and_written() -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
            return hidden_states + 1, "cache"

    block = Block()
    into = Point(Site("resid_pre", 0), "b", block, "in", 2)
    out = Point(Site("resid_post", 0), "b", block, "out", 2)
    with attached([(into, lambda x: 2 * x), (out, lambda x: 10 * x)]):
        for result in (block(torch.ones(1, 2)), block(hidden_states=torch.ones(1, 2))):
            assert isinstance(result, tuple) and result[1] == "cache"
            assert torch.equal(result[0], torch.full((1, 2), 30.0))  # (1 * 2 + 1) * 10


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "neox"])
def test_an_edit_of_resid_mid_reaches_the_mlp_and_the_sum_behind_it(family: str) -> None:
    """A replaced argument of the second norm would reach the MLP alone."""
    from workbench.interventions.intervention import Intervention
    from workbench.interventions.ops import Add

    model = tiny_model(family)
    ids = torch.arange(10, 22).view(2, 6)
    names = ["resid_mid.1", "mlp_out.1", "resid_post.1"]
    clean = model.capture(ids, names)
    vector = 3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    with model.plan(Intervention.at("resid_mid.1", Add(vector))):
        edited = model.capture(ids, names)
    torch.testing.assert_close(edited["resid_mid.1"] - clean["resid_mid.1"], vector.expand(2, 6, 16), atol=1e-5, rtol=0)
    total = edited["resid_mid.1"] + edited["mlp_out.1"]
    torch.testing.assert_close(edited["resid_post.1"], total, atol=1e-5, rtol=1e-5)
    # The same as adding to what attention writes.
    with model.plan(Intervention.at("attn_out.1", Add(vector))):
        other = model.capture(ids, names)
    torch.testing.assert_close(edited["resid_post.1"], other["resid_post.1"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(edited["mlp_out.1"], clean["mlp_out.1"])


def test_what_was_captured_of_resid_mid_is_not_changed_by_a_later_edit() -> None:
    from workbench.interventions.intervention import Intervention
    from workbench.interventions.ops import Add

    model = tiny_model()
    seen = []
    point = model.site_map["resid_mid.1"]
    clean = model.capture("abc", ["resid_mid.1"])["resid_mid.1"]
    with attached([(point, lambda x: seen.append(x))]), model.plan(Intervention.at("resid_mid.1", Add(torch.ones(16)))):
        model.logits("abc")
    assert torch.equal(seen[0], clean)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("blocks.1.hook_resid_pots", "Did you mean blocks.1.hook_resid_post"),
        ("blocks.1.attn.hook_attn_scores", "pattern is"),
        ("blocks.1.attn.hook_result", "z.1.h0"),
        ("blocks.1.attn.hook_rot_q", "before the rotary"),
    ],
)
def test_a_transformer_lens_name_without_a_site_says_what_is_close_or_why(asked: str, says: str) -> None:
    with pytest.raises(UnknownSiteError, match=says):
        Site.parse(asked)


def test_more_forms_of_transformer_lens_are_read() -> None:
    assert Site.parse("blocks.2.hook_in") == Site("resid_pre", 2)
    assert Site.parse("blocks.2.hook_out") == Site("resid_post", 2)
    assert Site.parse("blocks.2.attn.hook_z.h1") == Site("z", 2, 1)
    with pytest.raises(UnknownSiteError, match="no heads"):
        Site.parse("blocks.2.hook_resid_post.h1")


def test_the_mean_is_that_of_all_real_tokens_in_any_batches() -> None:
    from workbench.interventions.scopes import NotPrefix

    model = tiny_model()
    texts = ["abc", "defghij", "k"]
    alone = torch.cat([model.capture(text, ["resid_post.1"])["resid_post.1"][0] for text in texts])
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(model.mean(iter(texts), "resid_post.1", batch_size=batch_size), alone.mean(0))
    rest = torch.cat([model.capture(text, ["z.1.h1"])["z.1.h1"][0, 1:] for text in texts[:2]])
    torch.testing.assert_close(model.mean(texts[:2], "z.1.h1", positions=NotPrefix(1)), rest.mean(0))
    with pytest.raises(DegenerateInputError):
        model.mean([], "resid_post.1")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "neox", "gemma2"])
def test_a_site_reaches_exactly_the_sites_that_change_with_it(family: str) -> None:
    model = tiny_model(family)
    sites, ids = model.site_map, torch.arange(5, 17).view(2, 6)
    inside = [site for site in sites.points if site.layer == 1]
    heads = [
        replace(site, head=head) for site in inside for head in range(sites[site].heads or 0) if site.kind in HEAD_KINDS
    ]
    read = [*sites.points, *heads]
    before = model.capture(ids, read)
    for here in [*inside, *heads, Site("embed"), Site("final_norm")]:
        with attached([(sites[here], lambda x: torch.rand_like(x) + 0.5 * x)]):
            after = model.capture(ids, read)
        changed = {there for there in read if not torch.allclose(before[there], after[there], atol=1e-6)}
        assert changed == {there for there in read if sites.reaches(here, there)}, here
