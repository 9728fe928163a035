"""q, k, v, z, pattern and the MLP's inner sites: shapes, layouts, identities, and one head of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import D_MODEL, FAMILIES, MIXTURES, N_LAYERS, tiny_model
from workbench.core.errors import EditError, UnknownSiteError
from workbench.hooks.attach import attached
from workbench.hooks.sites import Point, Site
from workbench.models.innerchecks import weighted_values

IDS = torch.arange(10, 22).view(2, 6)
HEADS, D_HEAD = 2, 8
OF_HEADS = ("q", "k", "v", "z", "pattern")


def _kv_heads(family: str) -> int:
    return HEADS if family in ("gpt2", "neox", "neox_sequential") else 1


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_shapes_are_canonical_and_the_points_tell_them(family: str) -> None:
    model = tiny_model(family)
    acts = model.capture(IDS, list(model.site_map.points))
    one = {"q": HEADS, "k": _kv_heads(family), "v": _kv_heads(family), "z": HEADS}
    for kind, heads in one.items():
        assert acts[f"{kind}.1"].shape == (2, 6, heads, D_HEAD)
    assert acts["pattern.1"].shape == (2, HEADS, 6, 6)
    sizes: dict[str | int, int] = {"batch": 2, "pos": 6, "q_pos": 6, "k_pos": 6}
    for site, point in model.site_map.points.items():
        assert acts[site].shape == tuple(sizes.get(axis, axis) for axis in point.shape)
        flat = point.flat(acts[site])
        assert flat.shape[:2] == (2, 6) and point.width in (None, flat.shape[2])
        assert torch.equal(point.unflat(flat, acts[site]), acts[site])


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_pattern_times_v_is_z_and_its_neighbours_are_not(family: str) -> None:
    model = tiny_model(family)
    kinds = ("pattern", "v", "z", "k", "q")
    acts = model.capture(IDS, [f"{kind}.{layer}" for kind in kinds for layer in range(N_LAYERS)])
    for layer in range(N_LAYERS):
        pattern, v, z = (acts[f"{kind}.{layer}"] for kind in kinds[:3])
        torch.testing.assert_close(weighted_values(pattern, v), z, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(weighted_values(pattern, acts[f"k.{layer}"]), z, atol=1e-2)
        assert not torch.allclose(weighted_values(pattern, acts[f"v.{(layer + 1) % N_LAYERS}"]), z, atol=1e-2)
        assert not torch.allclose(weighted_values(pattern.transpose(2, 3), v), z, atol=1e-2)
        assert not torch.allclose(weighted_values(pattern.flip(1), v), z, atol=1e-4)
        total = pattern.sum(-1)
        # An attention sink takes part of the weight, so rows of gpt-oss add up to less than one.
        assert bool((total < 1).all()) if family == "gpt_oss" else torch.allclose(total, torch.ones_like(total))
        assert float(pattern.triu(1).abs().max()) == 0


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
@pytest.mark.parametrize("kind", ["q", "k"])
def test_a_head_without_scores_attends_evenly_and_only_that_head_changes(family: str, kind: str) -> None:
    model = tiny_model(family)
    for name, parameter in model.hf.named_parameters():
        if "sinks" in name:
            parameter.fill_(-1e4)
    clean = model.capture(IDS, ["pattern.1"])["pattern.1"]
    heads = HEADS if kind == "q" else _kv_heads(family)
    even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    for head in range(heads):
        with attached([(model.site_map[f"{kind}.1.h{head}"], torch.zeros_like)]):
            pattern = model.capture(IDS, ["pattern.1"])["pattern.1"]
        mine = [h for h in range(HEADS) if h // (HEADS // heads) == head]
        others = [h for h in range(HEADS) if h not in mine]
        torch.testing.assert_close(pattern[:, mine], even.expand(2, len(mine), 6, 6), atol=1e-5, rtol=1e-5)
        # A norm over the whole projection, as in OLMo-2, lets heads touch each other.
        if family != "olmo2":
            torch.testing.assert_close(pattern[:, others], clean[:, others], atol=1e-6, rtol=1e-5)


def _fused(family: str, model: Any) -> tuple[Tensor, Tensor]:
    """Input and output of the fused projection of layer 1, seen by hooks of torch alone."""
    block = {"gpt2": "transformer.h.1.attn.c_attn", "phi3": "model.layers.1.self_attn.qkv_proj"}.get(
        family, "gpt_neox.layers.1.attention.query_key_value"
    )
    seen = []
    handle = model.hf.get_submodule(block).register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model.hf(IDS, use_cache=False)
    handle.remove()
    return seen[0]


def _concatenated(out: Tensor, kv: int) -> list[Tensor]:
    parts = out.split([HEADS * D_HEAD, kv * D_HEAD, kv * D_HEAD], dim=-1)
    return [part.unflatten(-1, (-1, D_HEAD)) for part in parts]


def _interleaved(out: Tensor) -> list[Tensor]:
    return list(out.unflatten(-1, (HEADS, 3, D_HEAD)).unbind(dim=-2))


@pytest.mark.parametrize("family", ["gpt2", "neox", "neox_sequential", "phi3"])
def test_fused_projections_are_read_in_their_layout_and_not_in_another(family: str) -> None:
    model = tiny_model(family)
    out = _fused(family, model)[1]
    is_neox = family.startswith("neox")
    right = _interleaved(out) if is_neox else _concatenated(out, _kv_heads(family))
    acts = model.capture(IDS, ["q.1", "k.1", "v.1"])
    for kind, expected in zip("qkv", right, strict=True):
        assert torch.equal(acts[f"{kind}.1"], expected)
    if family != "phi3":
        wrong = _concatenated(out, HEADS) if is_neox else _interleaved(out)
        for kind, swapped in zip("qkv", wrong, strict=True):
            assert not torch.allclose(acts[f"{kind}.1"], swapped, atol=1e-2)
    assert not torch.equal(acts["k.1"], acts["v.1"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3"])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_write_to_one_projection_leaves_the_others_bit_equal(family: str, kind: str) -> None:
    model = tiny_model(family)
    clean = model.capture(IDS, ["q.1", "k.1", "v.1"])
    with attached([(model.site_map[f"{kind}.1"], lambda x: x + 1)]):
        edited = model.capture(IDS, ["q.1", "k.1", "v.1"])
    for other in "qkv":
        expected = clean[f"{other}.1"] + (other == kind)
        assert torch.equal(edited[f"{other}.1"], expected)


@pytest.mark.parametrize("kind", OF_HEADS)
@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2", "phi3"])
def test_one_head_is_read_and_written_alone(kind: str, family: str) -> None:
    model = tiny_model(family)
    whole = model.capture(IDS, [f"{kind}.1"])[f"{kind}.1"]
    axis = 1 if kind == "pattern" else 2
    for head in range(whole.shape[axis]):
        site = f"{kind}.1.h{head}"
        assert torch.equal(model.capture(IDS, [site])[site], whole.select(axis, head))
        with attached([(model.site_map[site], lambda x: 0.5 * x)]):
            edited = model.capture(IDS, [f"{kind}.1"])[f"{kind}.1"]
        expected = whole.clone()
        expected.select(axis, head).mul_(0.5)
        assert torch.equal(edited, expected)
        point = model.site_map[site]
        one = whole.select(axis, head)
        assert torch.equal(point.unflat(point.flat(one), one), one) and point.width in (None, D_HEAD)


def test_heads_that_do_not_exist_are_refused_with_the_range() -> None:
    model = tiny_model("llama")
    assert str(Site.parse("z.1.h0")) == "z.1.h0"
    for asked, says in (
        ("z.1.h2", "heads 0 to 1"),
        ("k.1.h1", "heads 0 to 0"),
        ("resid_post.1.h0", "has no heads"),
        ("z.h1", "layer number"),
        ("z.1.2", "layer number"),
    ):
        with pytest.raises(UnknownSiteError, match=says):
            model.resolve(asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_sites_sit_on_both_sides_of_the_gate(family: str) -> None:
    model = tiny_model(family)
    acts = model.capture(IDS, ["mlp_pre.1", "mlp_post.1"])
    pre, post = acts["mlp_pre.1"], acts["mlp_post.1"]
    mlp = model.hf.get_submodule(model.site_map["resid_pre.1"].path).get_submodule("mlp")
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None) or mlp.act
    if family in ("gpt2", "neox", "neox_sequential"):
        assert torch.equal(act(pre), post)
        return
    x = _input_of(model, mlp)
    up = mlp.gate_up_proj(x).chunk(2, dim=-1)[1] if family == "phi3" else mlp.up_proj(x)
    torch.testing.assert_close(act(pre) * up, post, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(act(up) * pre, post, atol=1e-2)


def _input_of(model: Any, module: torch.nn.Module) -> Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.hf(IDS, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_refuse_the_inner_sites_and_say_what_exists(family: str) -> None:
    model = tiny_model(family)
    for kind in ("mlp_pre", "mlp_post"):
        with pytest.raises(UnknownSiteError, match="mixture of experts.*It has .*mlp_out"):
            model.capture("abc", [f"{kind}.1"])


def test_olmo2_has_resid_mid_although_no_norm_reads_it() -> None:
    model = tiny_model("olmo2")
    acts = model.capture(IDS, ["resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1"])
    torch.testing.assert_close(acts["resid_pre.1"] + acts["attn_out.1"], acts["resid_mid.1"])
    torch.testing.assert_close(acts["resid_mid.1"] + acts["mlp_out.1"], acts["resid_post.1"])
    block = model.hf.model.layers[1]
    raw = _input_of(model, block.post_feedforward_layernorm)
    # The post-norm's input is the raw MLP output, which a wrong map takes for resid_mid.
    assert not torch.allclose(raw, acts["resid_mid.1"], atol=1e-2)
    assert not torch.allclose(raw, acts["mlp_out.1"], atol=1e-2)


def test_a_fused_projection_of_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.hooks.families.FUSED_QKV", {})
    model = tiny_model("gpt2")
    with pytest.raises(UnknownSiteError, match="c_attn holds q, k and v in an order that is not known for gpt2"):
        model.resolve("q.0")
    assert model.self_check().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_the_self_check_holds_in_both_dtypes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    model.hf.to(dtype)
    report = model.self_check()
    assert report.ok and not report.withdrawn, str(report)
    said = str(report)
    assert "pattern @ v == z" in said and "q = 0 and k = 0" in said
    assert ("mlp_post is an activation of mlp_pre" in said) == (family in FAMILIES)


@pytest.mark.parametrize(
    ("family", "layout", "gone"), [("neox", "concatenated", {"pattern"}), ("gpt2", "interleaved", {"pattern"})]
)
def test_a_swapped_layout_is_withdrawn(
    family: str, layout: str, gone: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.hooks import families

    model_type = {"neox": "gpt_neox"}.get(family, family)
    monkeypatch.setattr(families, "FUSED_QKV", {model_type: layout})
    model = tiny_model(family)
    report = model.self_check()
    assert gone <= {site.kind for site in report.withdrawn}
    with pytest.raises(UnknownSiteError, match="pattern @ v == z fails by"):
        model.resolve("pattern.0")


def test_wrong_points_for_q_and_for_the_gate_are_withdrawn() -> None:
    model = tiny_model("llama")
    points = dict(model.site_map.points)
    for layer in range(N_LAYERS):
        up = model.hf.model.layers[layer].mlp.up_proj
        points[Site("mlp_pre", layer)] = Point(Site("mlp_pre", layer), "up", up, "out", 24)
        norm = model.hf.model.layers[layer].input_layernorm
        points[Site("q", layer)] = Point(Site("q", layer), "norm", norm, "out", D_MODEL, heads=HEADS)
    model.site_map = type(model.site_map)(points, {}, N_LAYERS)
    withdrawn = {site.kind for site in model.self_check().withdrawn}
    assert withdrawn == {"mlp_pre", "q", "k"}


@pytest.mark.parametrize("kind", OF_HEADS)
def test_a_wrong_shape_is_refused_in_canonical_form(kind: str) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(EditError, match="shape"), attached([(model.site_map[f"{kind}.1"], lambda x: x.flatten(2))]):
        model.logits("abc")
