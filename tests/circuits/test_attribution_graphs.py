"""Attribution graphs add up, say what the model does with everything else held fast, and hold little memory."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuits
from circuits.attribution_graphs import replacement as replacement_module
from circuits.attribution_graphs.choice import ChoiceOptions
from circuits.attribution_graphs.coders import CrossLayerTranscoder, placed
from circuits.attribution_graphs.estimate import estimated
from circuits.attribution_graphs.graph import AttributionGraph
from circuits.attribution_graphs.outputs import Output
from circuits.attribution_graphs.replacement import Replacement
from circuits.attribution_graphs.tables import CONSTANT, ERRORS, FEATURE, LOGIT, REST, GraphNodes
from circuits.attribution_graphs.validation import Frozen
from circuits.graph.influence import Links, influences, threshold
from tests.circuits.frozen_oracle import AutogradGraph, exact_norms
from tests.circuits.toys import exact_model, skip_transcoder
from tests.tiny import D_MODEL, tiny_hf, tiny_tokenizer
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ResourceError
from workbench.hooks.ends import unembedding
from workbench.hooks.sites import Site
from workbench.models.model import Model

TEXT = "abXde"
FROZEN = ("gpt2", "neox", "llama", "gemma2")


@functools.cache
def coder(read: str, layer: int, seed: int = 0) -> Any:
    """A skip transcoder of a layer; not to be changed."""
    sae = skip_transcoder(f"{read}.{layer}", f"mlp_out.{layer}")
    g = torch.Generator().manual_seed(10 * seed + layer)
    for parameter in sae.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return sae


def read_of(model: Model) -> str:
    return "resid_pre" if model.site_map.is_parallel else "resid_mid"


@functools.cache
def precise_model(family: str) -> Model:
    """In float64 with norms that compute in it; shared, not to be changed."""
    hf = tiny_hf(family).double()
    exact_norms(hf)
    return Model(hf, tiny_tokenizer(), name=f"exact-{family}")


def graph_of(family: str = "gpt2", layers: tuple[int, ...] = (0, 2), read: str = "", **more: Any) -> AttributionGraph:
    model = precise_model(family)
    coders = {f"mlp_out.{i}": coder(read or read_of(model), i) for i in layers}
    return circuits.attribution_graph(model, coders, TEXT, **{"features": 500, "mass": 1.0, **more})


@functools.cache
def whole(family: str = "gpt2", read: str = "") -> AttributionGraph:
    return graph_of(family, read=read, first_token=True)


def into(graph: AttributionGraph, node: int) -> dict[int, float]:
    links = graph.target == node
    return dict(zip(graph.source[links].tolist(), graph.weight[links].tolist(), strict=True))


def node_of(graph: AttributionGraph, kind: int, pos: int, feature: int, site: str = "") -> int:
    n = graph.nodes
    found = (n.kind == kind) & (n.pos == pos) & (n.feature == feature) & ((n.site == site) if site else True)
    return int(np.flatnonzero(found)[0])


# What links are.


@pytest.mark.parametrize(
    ("family", "read"), [*((family, "") for family in FROZEN), ("gpt2", "mlp_in"), ("gemma2", "mlp_in")]
)
def test_links_are_the_gradients_of_the_model_with_everything_held_fast(family: str, read: str) -> None:
    graph, model = whole(family, read), precise_model(family)
    hf = tiny_hf(family).double()
    exact_norms(hf)
    ids = model.tokens(TEXT).ids
    read = read or read_of(model)
    saes = {i: coder(read, i) for i in (0, 2)}
    oracle = AutogradGraph(Model(hf, tiny_tokenizer()), saes, read, ids)
    n = graph.nodes
    targets = [int(i) for i in np.flatnonzero((n.site == "mlp_out.2") & (n.kind == FEATURE))[::5]]
    targets += [int(np.flatnonzero(n.kind == LOGIT)[1])]
    W = unembedding(hf).weight
    for node in targets:
        pos, feature = int(n.pos[node]), int(n.feature[node])
        if n.kind[node] == LOGIT:
            value = oracle.last[0][0, -1] @ (W[feature] - W.mean(0))
        else:
            value = oracle.reads[2][0, pos] @ saes[2].W_enc[:, feature]
        features, errors, tokens = oracle.row(value)
        value = value.detach()
        wanted = {**{f"mlp_out.{i}": (features[i], errors[i]) for i in features}}
        total = 0.0
        for source, weight in into(graph, node).items():
            site, at, number = str(n.site[source]), int(n.pos[source]), int(n.feature[source])
            match int(n.kind[source]):
                case 0:
                    assert weight == pytest.approx(float(wanted[site][0][at, number]), abs=1e-9)
                case 1:
                    assert weight == pytest.approx(float(wanted[site][1][at]), abs=1e-9)
                case 2:
                    assert weight == pytest.approx(float(tokens[at]), abs=1e-9)
            total += weight
        assert total == pytest.approx(float(value), abs=1e-9), "with constant and rest"
        constant = into(graph, node)[len(n) - 2]
        assert abs(constant) > 1e-4, "and without the constant it would not"


@pytest.mark.parametrize("family", FROZEN)
def test_maps_give_what_attention_and_mlps_wrote(family: str) -> None:
    run = graph_of(family, features=1).origin.run  # type: ignore[union-attr]
    stream = read_of(run.model)
    for layer, mlp in run.mlp.items():
        found = mlp.write(run.acts[Site(stream, layer)])
        assert float((found - run.acts[Site("mlp_out", layer)]).abs().max()) < 1e-10
    for layer, attention in run.attention.items():
        found = attention.output.write(attention.mixed(attention.values.read(run.acts[Site("resid_pre", layer)])))
        assert float((found - run.acts[Site("attn_out", layer)]).abs().max()) < 1e-10


def test_without_attention_a_link_is_a_product_of_weights() -> None:
    hf: Any = tiny_hf("gpt2").double()
    for block in hf.transformer.h:
        block.attn.c_proj.weight.zero_()
    model = Model(hf, tiny_tokenizer())
    saes = {i: coder("resid_mid", i) for i in (0, 1)}
    graph = circuits.attribution_graph(model, {f"mlp_out.{i}": sae for i, sae in saes.items()}, TEXT, mass=1.0)
    n, x = graph.nodes, model.capture(TEXT, ["resid_mid.0"])["resid_mid.0"][0]
    seen = 0
    for node in np.flatnonzero((n.site == "mlp_out.1") & (n.kind == FEATURE)):
        for source, weight in into(graph, int(node)).items():
            if n.kind[source] == FEATURE and n.pos[source] == n.pos[node]:
                i, j, pos = int(n.feature[source]), int(n.feature[node]), int(n.pos[node])
                act = saes[0].encode(x[pos])[i]
                assert weight == pytest.approx(float(act * saes[0].W_dec[i] @ saes[1].W_enc[:, j]), abs=1e-12)
                seen += 1
    assert seen > 50


def _cross_layer(model: Model, read: str = "resid_mid") -> CrossLayerTranscoder:
    bases = circuits.bases(model, {f"mlp_out.{i}": coder(read, i) for i in range(3)})
    g = torch.Generator().manual_seed(5)
    later = {key: torch.randn(40, D_MODEL, generator=g, dtype=torch.float64) for key in ((0, 1), (0, 2), (1, 2))}
    return CrossLayerTranscoder(layers={i: bases[f"mlp_out.{i}"] for i in range(3)}, later=later)


def _coders(kind: str, model: Model) -> Any:
    if kind == "cross-layer":
        return _cross_layer(model)
    if kind == "behind the norm":
        return _cross_layer(model, "mlp_in")
    if kind == "neurons":
        return circuits.mlp_hidden(model)
    sites = ["resid_post.0", "attn_out.1", "resid_mid.1", "mlp_out.2"]
    return circuits.random(model, sites, 30, 5)


@pytest.mark.parametrize(
    ("kind", "first"),
    [(kind, first) for kind in ("cross-layer", "neurons", "SAEs") for first in (True, False)]
    + [("behind the norm", True)],
)
def test_what_is_doubled_moves_each_target_by_its_link(kind: str, first: bool) -> None:
    model = precise_model("gpt2")
    graph = circuits.attribution_graph(model, _coders(kind, model), TEXT, 80, first_token=first)
    tested = graph.validate(12)
    assert graph.gap < 1e-12 and tested.row_error < 1e-10 and tested.n_links > 50


def test_with_norms_that_move_the_links_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = whole()
    assert graph.validate(6).row_error < 1e-10
    monkeypatch.setattr(Frozen, "_norms", lambda _self: iter(()))
    assert graph.validate(6).row_error > 1e-3


def test_influence_is_compared_with_real_ablations() -> None:
    tested = whole().validate(24)
    assert len(tested.frame()) == 24 and tested.influence.n == 24
    assert tested.effect.value > 0 and tested.control_effect.value > 0
    model, graph = precise_model("gpt2"), whole()
    name = next(name for name in tested.node if ", mlp_out.2/" in name and name.startswith("4, "))
    feature, sae = int(name.split("/")[1]), coder("resid_mid", 2)
    acts = model.capture(TEXT, ["resid_mid.2", "resid_post.2"])
    x, stream = acts["resid_mid.2"][0, 4], acts["resid_post.2"][0, 4]
    moved = stream - sae.encode(x)[feature] * sae.W_dec[feature]
    logits = [unembedding(model.hf)(model.site_map["final_norm"].module(y)) for y in (stream, moved)]
    change = logits[1] - logits[0]
    ids = [output.token for output in graph.outputs]
    weights = torch.tensor([output.weight for output in graph.outputs], dtype=torch.float64)
    wanted = float((change[ids] - change.mean()).abs() @ weights)
    assert tested.effects[tested.node.index(name)] == pytest.approx(wanted, rel=1e-9)


def test_sources_behind_a_target_or_to_its_right_add_nothing() -> None:
    model = precise_model("gpt2")
    run = Replacement(model, placed(model, _cross_layer(model)), model.tokens(TEXT), mlps="half", first=True)
    middle = run.coders[1]
    index = (middle.pos == 2).nonzero()[:3, 0]
    row = run.rows(run.features(middle, index)).sources.abs()
    for c in run.coders:
        part = row[:, c.start : c.start + len(c)]
        assert bool((part[:, c.pos > 2] == 0).all())
        assert bool((part == 0).all()) == (c is not run.coders[0])
    for site in run.columns.sites:
        assert bool((row[:, run.columns.errors(site)] == 0).all()) == (site.layer != 0)
    assert bool((row[:, run.columns.tokens][:, 3:] == 0).all())


# Influence, scores, pruning.


def test_influence_is_the_sum_over_all_paths() -> None:
    random = np.random.default_rng(0)
    n = 12
    level = np.sort(random.integers(0, 5, n))
    dense = random.random((n, n)) * (level[:, None] > level[None])  # target, source
    target, source = dense.nonzero()
    links = Links(source=source, target=target, size=dense[target, source], level=level)
    own = np.where(level == 4, 1.0, 0.0)
    total = dense.sum(1) * 1.25  # a fifth enters from what is not listed
    N = np.divide(dense, total[:, None], out=np.zeros_like(dense), where=total[:, None] > 0)
    wanted = own @ sum(np.linalg.matrix_power(N, k) for k in range(1, n))
    assert influences(links, links.shares(total), own) == pytest.approx(wanted, abs=1e-12)


def test_the_threshold_is_that_of_a_full_sort() -> None:
    random = np.random.default_rng(1)
    for scores in (random.lognormal(0, 4, 5000), random.random(7), np.ones(9), np.array([2.0])):
        for share in (0.05, 0.8, 0.98, 1.0):
            order = np.sort(scores)[::-1]
            place = int(np.searchsorted(np.cumsum(order), share * order.sum() * (1 - 1e-12)))
            assert threshold(scores, share) == order[min(place, len(order) - 1)]


def _by_hand(links: list[tuple[int, int, float]], kinds: list[int]) -> AttributionGraph:
    """A graph of nodes of some kinds, constant and rest behind them, with weights (source, target, weight)."""
    n = len(kinds)
    every = [*kinds, CONSTANT, REST]
    targets = sorted({target for _, target, _ in links})
    links = [*links, *((n, t, 0.0) for t in targets), *((n + 1, t, 0.0) for t in targets)]
    source, target, weight = (np.array(x) for x in zip(*links, strict=True))
    level = np.array([5 if k == LOGIT else i if k == FEATURE else -1 for i, k in enumerate(every)])
    nodes = GraphNodes(
        kind=np.array(every), site=np.array(["x"] * n + ["", ""], dtype=object), pos=np.zeros(n + 2, dtype=np.int64),
        feature=np.arange(n + 2), activation=np.full(n + 2, np.nan), level=level,
    )  # fmt: skip
    return AttributionGraph(
        nodes=nodes, source=source, target=target, weight=weight.astype(float), size=np.abs(weight).astype(float),
        outputs=(Output(label="a", token=0, weight=1.0),), tokens=("t",), gap=0.0, made="by hand",
    )  # fmt: skip


TOKEN = 2


@pytest.mark.parametrize(
    ("links", "kinds", "ours", "reference"),
    [
        ([(0, 1, 2.0)], [ERRORS, LOGIT], 0.0, 0.5),
        ([(0, 1, 1.0), (1, 3, 1.0), (2, 3, -1.0)], [TOKEN, FEATURE, ERRORS, LOGIT], 2 / 3, 0.8),
        ([(0, 1, 1.0), (1, 2, 1.0)], [ERRORS, FEATURE, LOGIT], 0.5, 2 / 3),
    ],
)
def test_completeness_counts_targets_alone(
    links: list[tuple[int, int, float]], kinds: list[int], ours: float, reference: float
) -> None:
    scores = _by_hand(links, kinds).scores()
    assert scores.completeness == pytest.approx(ours) and scores.reference_completeness == pytest.approx(reference)


def test_constant_and_rest_count_as_unexplained() -> None:
    graph = _by_hand([(0, 1, 1.0)], [TOKEN, LOGIT])
    assert graph.scores().replacement == graph.scores().completeness == 1.0
    for extra in (2, 3):
        size = np.where(graph.source == extra, 1.0, graph.size)
        scores = replace(graph, size=size).scores()
        assert scores.replacement == scores.completeness == 0.5 and scores.reference_replacement == 1.0


def test_a_model_without_errors_and_biases_is_explained_whole_and_empty_decoders_have_no_influence() -> None:
    hf: Any = tiny_hf("gpt2").double()
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    model = Model(hf, tiny_tokenizer())
    neurons = circuits.mlp_hidden(model)
    graph = circuits.attribution_graph(model, neurons, TEXT, 10_000, first_token=True, mass=1.0)
    scores = graph.scores()
    assert scores.replacement == pytest.approx(1, abs=1e-12) and scores.completeness == pytest.approx(1, abs=1e-12)
    cut = circuits.attribution_graph(model, neurons, TEXT, 10_000, mass=1.0).scores()
    assert cut.replacement < 0.99, "the first token's neurons are a constant now"
    silent = skip_transcoder("resid_mid.1", "mlp_out.1")
    silent.W_dec.zero_()
    assert circuits.attribution_graph(model, {"mlp_out.1": silent}, TEXT).n_features == 0


def test_pruning_keeps_what_adds_up_and_drops_dead_ends() -> None:
    graph = whole()
    small = graph.prune(nodes=0.6, edges=0.9)
    assert 0 < small.n_features < graph.n_features and 0 < small.n_links < graph.n_links
    kind = small.nodes.kind
    inner = ~np.isin(kind, (CONSTANT, REST))[small.source]
    for node in np.flatnonzero(kind == FEATURE):
        assert (small.source[inner] == node).any() and (small.target[inner] == node).any()
    assert all((small.source[inner] == node).any() for node in np.flatnonzero(kind == ERRORS))
    for node in np.flatnonzero(kind == FEATURE)[:5]:
        name = small.nodes
        same = node_of(graph, FEATURE, int(name.pos[node]), int(name.feature[node]), str(name.site[node]))
        assert sum(into(small, int(node)).values()) == pytest.approx(sum(into(graph, same).values()), abs=1e-12)
    with pytest.raises(InvalidInputError, match="nodes=1.5"):
        graph.prune(nodes=1.5)


def test_pruning_is_that_of_the_dense_procedure() -> None:
    graph = whole()
    n, size, own = len(graph.nodes) - 2, np.zeros((len(graph.nodes),) * 2), graph.own
    size[graph.target, graph.source] = graph.size
    size = size[:n, :n]
    always = graph.of_kind(TOKEN, LOGIT)[:n]

    def cut(scores: np.ndarray, share: float) -> float:
        order = np.sort(scores[scores > 0])[::-1]
        return float(order[min(np.searchsorted(np.cumsum(order) / order.sum(), share * (1 - 1e-12)), len(order) - 1)])

    keep = always | (graph.influence[:n] >= cut(graph.influence[:n], 0.8))
    size *= keep[:, None] & keep[None]
    total = size.sum(1, keepdims=True)
    N = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    influence = own[:n] @ sum(np.linalg.matrix_power(N, k) for k in range(1, 6))
    score = N * (influence + own[:n])[:, None]
    edges = score >= cut(score.ravel(), 0.98)
    is_feature, is_error = graph.of_kind(FEATURE)[:n], graph.of_kind(ERRORS)[:n]
    while True:
        leaves, enters = edges.any(0), edges.any(1)
        dead = keep & ~always & (is_feature & ~(leaves & enters) | is_error & ~leaves)
        if not dead.any():
            break
        keep, edges = keep & ~dead, edges & ~dead[:, None] & ~dead[None]
    small = graph.prune()
    assert sorted(small.names()[:-2]) == sorted(np.array(graph.names(), dtype=object)[:n][keep])
    assert small.n_links == int(edges.sum())


def test_a_planted_circuit_of_two_hops_is_found() -> None:
    hf: Any = tiny_hf("gpt2").double()
    model = Model(hf, tiny_tokenizer())
    saes = [skip_transcoder(f"resid_mid.{i}", f"mlp_out.{i}") for i in (0, 2)]
    for sae in saes:
        for parameter in sae.parameters():
            parameter.mul_(0.02)
        sae.b_enc.zero_()
    x = model.capture(TEXT, ["resid_mid.0", "resid_mid.2"])
    signal = torch.zeros(D_MODEL, dtype=torch.float64)
    signal[3] = 30.0
    saes[0].W_enc[:, 7] = x["resid_mid.0"][0, -1] / x["resid_mid.0"][0, -1].square().sum()
    saes[0].W_dec[7] = signal
    saes[1].W_enc[:, 9] = signal / 30
    saes[1].W_dec[9] = 40 * unembedding(hf).weight[5]

    # the model really does it: its MLPs write what the transcoders do
    def written(sae: Any) -> Any:
        return lambda m, args, out: sae.encode(m.read) @ sae.W_dec + sae.b_dec + m.read @ sae.W_skip.T

    for sae, layer in zip(saes, (0, 2), strict=True):
        block = hf.transformer.h[layer]
        block.ln_2.register_forward_pre_hook(lambda _m, args, mlp=block.mlp: setattr(mlp, "read", args[0]))
        block.mlp.register_forward_hook(written(sae))
    graph = circuits.attribution_graph(
        model, {"mlp_out.0": saes[0], "mlp_out.2": saes[1]}, TEXT, targets={"planted": unembedding(hf).weight[5]}
    )
    frame = graph.frame()
    best = frame[frame.kind == "feature"].head(2)
    assert set(zip(best.site, best.pos, best.feature, strict=True)) == {("mlp_out.0", 4, 7), ("mlp_out.2", 4, 9)}
    first, second = node_of(graph, FEATURE, 4, 7), node_of(graph, FEATURE, 4, 9)
    assert into(graph, second)[first] == pytest.approx(30.0, rel=0.02)
    small = graph.prune()
    assert {"4, mlp_out.0/7", "4, mlp_out.2/9"} <= set(small.names())


# Memory, shards, what is explained, what is refused.


def test_rows_in_shards_and_small_pieces_are_the_same_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(features=60)
    monkeypatch.setattr(replacement_module, "ROWS_AT_ONCE", 5)
    pieces = graph_of(features=60, out=tmp_path / "rows")
    for mine, theirs in ((graph.scores(), pieces.scores()), (graph.prune().scores(), pieces.prune().scores())):
        assert mine.completeness == pytest.approx(theirs.completeness, abs=1e-9)
    assert set(graph.prune().names()) == set(pieces.prune().names())
    done = sorted((tmp_path / "rows" / "parts").glob("rows-*.json"))
    done[-1].unlink()
    calls: list[int] = []
    rows = Replacement.rows
    monkeypatch.setattr(Replacement, "rows", lambda self, t: (calls.append(len(t.pos)), rows(self, t))[1])
    again = graph_of(features=60, out=tmp_path / "rows")
    assert len(calls) == 3, "two to time a row, and the one that was lost"
    assert np.array_equal(again.weight, pieces.weight)
    with pytest.raises(MismatchError, match="features"):
        graph_of(features=61, out=tmp_path / "rows")


def test_what_is_dropped_from_a_row_is_in_rest() -> None:
    exact, short = graph_of(), graph_of(mass=0.6)
    assert short.n_links < 0.7 * exact.n_links
    for node in np.flatnonzero(short.of_kind(LOGIT)):
        assert sum(into(short, int(node)).values()) == pytest.approx(
            sum(into(exact, len(exact.nodes) - len(short.nodes) + int(node)).values()), abs=1e-12
        )
    assert short.gap == pytest.approx(exact.gap, abs=1e-12)
    held = graph_of(mass=0.999)
    assert held.scores().completeness == pytest.approx(exact.scores().completeness, abs=2e-3)


def test_too_much_memory_is_refused_with_what_fits() -> None:
    with pytest.raises(ResourceError, match="above the budget") as told:
        graph_of(features=500, budget_gb=0.0008)
    model = precise_model("gpt2")
    given = placed(model, {f"mlp_out.{i}": coder("resid_mid", i) for i in (0, 2)})
    fits = int(str(told.value).lower().split("features=")[2].split(",")[0].split(" or")[0].split()[0].rstrip("."))
    assert 0 < fits < 500
    assert graph_of(features=fits, budget_gb=0.0008).n_features <= fits
    sizes = [estimated(model, given, "half", ChoiceOptions(features=50), t, 20 * t).bytes for t in (64, 128)]
    assert sizes[1] < 2.3 * sizes[0]


def test_what_is_explained() -> None:
    graph = graph_of(features=2)
    model = precise_model("gpt2")
    chances = model.logits(TEXT)[0].softmax(-1)
    ids = [output.token for output in graph.outputs]
    assert ids == chances.topk(len(ids)).indices.tolist() and len(ids) <= 10
    assert sum(output.weight for output in graph.outputs) == pytest.approx(1)
    logits = model.logits(TEXT)[0]
    for node, token in zip(np.flatnonzero(graph.of_kind(LOGIT)), ids, strict=True):
        assert sum(into(graph, int(node)).values()) == pytest.approx(float(logits[token] - logits.mean()), abs=1e-5)
    pair = graph_of(features=2, targets=[("a", "b")])
    a, b = (model.tokens(t, bos=False).ids[0, 0] for t in "ab")
    node = int(np.flatnonzero(pair.of_kind(LOGIT))[0])
    assert sum(into(pair, node).values()) == pytest.approx(float(logits[a] - logits[b]), abs=1e-5)
    assert pair.outputs[0].token == model.d_vocab and pair.outputs[0].label == "a −b"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"targets": ["ab"]}, InvalidInputError, "it is 2 tokens"),
        ({"targets": []}, DegenerateInputError, "nothing is asked for"),
        ({"targets": [("a", "a")]}, DegenerateInputError, "is zero"),
        ({"features": 0}, InvalidInputError, "at least 1"),
        ({"mass": 0.0}, InvalidInputError, "mass is a share"),
    ],
)
def test_what_is_asked_wrongly_is_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        graph_of(**given)


def test_prompts_and_sites_that_can_not_be_followed_are_refused() -> None:
    model = exact_model("gpt2")
    sae = {"mlp_out.1": coder("resid_mid", 1)}
    for text, error in ((model.tokens(["ab", "cd"]), InvalidInputError), ("a", DegenerateInputError)):
        with pytest.raises(error, match="prompt"):
            circuits.attribution_graph(model, sae, text)
    with pytest.raises(InvalidInputError, match="no path through mlp_pre.1"):
        circuits.attribution_graph(model, circuits.neurons(model, ["mlp_pre.1"]), TEXT)
    with pytest.raises(InvalidInputError, match="later one"):
        CrossLayerTranscoder(layers=_cross_layer(precise_model("gpt2")).layers, later={(2, 1): torch.zeros(40, 16)})


# Files, pruning of circuits, controls.


def test_the_file_is_read_back_and_has_what_viewers_need(tmp_path: Path) -> None:
    graph = whole().prune()
    path = graph.to_json(tmp_path / "graph.json", slug="a-graph_1", scan="tiny")
    record = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["node_id"]: node for node in record["nodes"]}
    assert len(nodes) == len(record["nodes"]) == len(graph.nodes)
    assert {node["feature_type"] for node in nodes.values()} == {
        "cross layer transcoder", "mlp reconstruction error", "embedding", "logit", "bias",
    }  # fmt: skip
    assert all(link["source"] in nodes and link["target"] in nodes for link in record["links"])
    assert all("(p=" in node["clerp"] for node in nodes.values() if node["feature_type"] == "logit")
    for node in nodes.values():
        if node["feature_type"] == "cross layer transcoder":
            layer, feature, pos = map(int, node["node_id"].split("_"))
            assert node["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature
            assert node["ctx_idx"] == pos
    shares = sorted(node["influence"] for node in nodes.values() if node["influence"] is not None)
    assert shares[-1] == pytest.approx(1) and shares[0] == pytest.approx(graph.influence.max() / graph.influence.sum())
    loaded = circuits.load_graph_json(path)
    n = graph.nodes
    mine = {node for node in zip(n.site, n.pos, n.feature, strict=True) if str(node[0]).startswith("mlp_out")}
    assert set(loaded.circuit.nodes()) == mine and loaded.prompt == graph.tokens
    inner = np.isin(n.kind[graph.source], (FEATURE, ERRORS)) & (n.kind[graph.target] == FEATURE)
    effects = sorted(loaded.edges.frame().effect)
    assert effects == pytest.approx(sorted(graph.weight[inner & (graph.weight != 0)]))
    for names in ({"slug": "a b"}, {"slug": ""}, {"scan": "a/b"}):
        with pytest.raises(InvalidInputError, match="viewers take letters"):
            graph.to_json(tmp_path / "no.json", **names)


def test_the_page_names_tokens_outputs_and_scores(tmp_path: Path) -> None:
    graph = whole().prune()
    text = graph.to_html(tmp_path / "graph.html").read_text(encoding="utf-8")
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert set(data["nodes"]["kind"]) == {"feature", "error", "token", "output"} and data["columns"] == list(TEXT)
    assert len(data["edges"]["source"]) == graph.n_links and "Completeness" in text
    assert "<svg" in graph._repr_html_() and "completeness" in repr(graph)


def test_a_circuit_is_pruned_to_what_leads_to_its_output() -> None:
    def site(features: list[int], effects: list[float]) -> circuits.SiteNodes:
        return replace(circuits.SiteNodes.of(50, features), effect=torch.tensor(effects))

    sites = {"resid_post.0": site([1, 2], [5.0, 5.0]), "resid_post.1": site([3, 4], [9.0, 1.0])}
    circuit = circuits.Circuit(sites=sites, bases=dict.fromkeys(sites, "x"), model_fingerprint="m")
    key = "resid_post.0", "resid_post.1"
    up, down = torch.tensor([[-1, 1], [-1, 2]]), torch.tensor([[-1, 3], [-1, 4]])
    effect = torch.tensor([[8.0, 0.0], [0.2, -1.0]])  # 1 -> 3; 2 -> 4 and a little to 3
    table = circuits.EdgeTable(upstream=up, downstream=down, effect=effect, se=torch.zeros(2, 2))
    edges = circuits.Edges(tables={key: table}, n=1, metric="m", has_positions=False, made="by hand")
    # influence: 3: .9, 4: .1, 1: .9 * 8 / 8.2 = .878, 2: .022 + .1 = .122; all 2
    found = edges.prune(circuit, nodes=0.85)
    assert {f for _, _, f in found.circuit.nodes()} == {1, 3}
    assert found.edges.tables[key].effect.tolist() == [[8.0, 0.0], [0.0, 0.0]]
    assert {f for _, _, f in edges.prune(circuit, nodes=0.94, edges=1.0).circuit.nodes()} == {1, 2, 3}
    assert edges.prune(circuit, nodes=1.0, edges=1.0).circuit.n == 4
    assert edges.prune(circuit, nodes=1.0, edges=0.98).edges.tables[key].effect[1, 0] == 0
    other = replace(circuit, sites={"resid_post.0": site([9], [1.0]), "resid_post.1": site([], [])})
    with pytest.raises(MismatchError, match="none of the edges"):
        edges.prune(other)


def test_random_coders_are_as_active() -> None:
    model = precise_model("gpt2")
    coders = {"mlp_out.2": coder("resid_mid", 2)}
    drawn: Any = circuits.random_coders(model, coders, TEXT)
    x = model.capture(TEXT, ["resid_mid.2"])["resid_mid.2"][0, 1:]
    active = [(basis.encode(x) != 0).sum(1).double().mean() for basis in (coders["mlp_out.2"], drawn["mlp_out.2"])]
    assert abs(float(active[0] - active[1])) < 6
    assert drawn["mlp_out.2"].d_sae == 40 and drawn["mlp_out.2"].site == "resid_mid.2"
    graph = circuits.attribution_graph(model, drawn, TEXT)
    assert graph.gap < 1e-12 and graph.n_features > 10
    assert isinstance(circuits.random_coders(model, _cross_layer(model), TEXT), CrossLayerTranscoder)
