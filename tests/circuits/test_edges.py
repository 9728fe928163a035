from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

import circuits
from circuits.edges.tables import Edges
from circuits.graph.circuit import ERROR
from circuits.pairs import Pairs
from tests.circuits.oracle import Nodes, Oracle, Part, points_of
from tests.circuits.toys import (
    EXACT,
    close,
    exact_model,
    exact_sae,
    mixed_saes,
    oracle_of,
    other_bases,
    pairs_of,
)
from tests.interventions.builders import padded
from tests.tiny import FAMILIES, as_user, tiny_hf, tiny_tokenizer
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.models.model import Model

DIFFERENCE = circuits.logit_difference()
SITES = ["embed", "attn_out.0", "mlp_out.0", "resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1"]
BLOCK = ["resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1"]


def _whole(model: Model, bases: Any, pairs: Pairs, aggregation: Any = "none", **options: Any) -> circuits.Circuit:
    options = {"method": "atp", "measured": False, **options}
    return circuits.node_effects(model, bases, pairs, DIFFERENCE, aggregation=aggregation, **options).circuit(
        threshold=0.0
    )


def _row(edges: Edges, up: str, down: str, node: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Effects of all earlier nodes through one later node, (pos, features and the error last)."""
    table, out = edges.tables[up, down], torch.zeros(shape[0], shape[1] + 1, dtype=torch.float64)
    (column,) = (table.downstream == torch.tensor(node)).all(1).nonzero()[0]
    out[table.upstream[:, 0], table.upstream[:, 1]] = table.effect[:, column]
    return out


def _strongest(left: Nodes, changes: Nodes, n: int = 3) -> list[tuple[int, int]]:
    """The features of largest effect, and the error at the last two positions."""
    mean = (left[0] * changes[0]).mean(0)
    order = mean.abs().flatten().argsort(descending=True)[:n]
    return [*((int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order), (3, ERROR), (4, ERROR)]


@pytest.mark.parametrize(("family", "left", "baseline"), [
    ("gpt2", "clean", "patch"), ("neox", "ig", "patch"), pytest.param("gpt2", "ig", "zero", marks=pytest.mark.slow),
])  # fmt: skip
def test_edges_between_all_sites_are_those_of_one_backward_pass_each(family: str, left: Any, baseline: Any) -> None:
    model, pairs, saes = exact_model(family), pairs_of(family), mixed_saes(SITES, shift=4)
    keep = pairs.clean.mask
    if baseline == "zero":  # as of prompts: the first token stays
        keep = keep.clone()
        keep[:, 0] = False
    slow = oracle_of(family, saes, pairs, keep)
    whole = _whole(model, saes, pairs, baseline=baseline)
    edges = circuits.edge_effects(model, saes, pairs, DIFFERENCE, whole, left=left, steps=2, baseline=baseline)
    parallel = {("attn_out.0", "mlp_out.0"), ("attn_out.1", "mlp_out.1")} if family == "neox" else set()
    direct = {
        *(("embed", s) for s in SITES[1:4]), ("attn_out.0", "mlp_out.0"), ("attn_out.0", "resid_post.0"),
        ("mlp_out.0", "resid_post.0"), *(("resid_post.0", s) for s in SITES[4:]), ("attn_out.1", "mlp_out.1"),
        ("attn_out.1", "resid_post.1"), ("mlp_out.1", "resid_post.1"),
    }  # fmt: skip
    assert set(edges.tables) == direct - parallel, "what passes through the stream is its own"
    gradients, changes = slow.gradients(), slow.changes(baseline)
    for up, down in edges.tables:
        at = gradients[down] if left == "clean" else slow.integrated(down, points_of("midpoint", 2), baseline)
        nodes = _strongest(at, changes[down])
        features, errors = slow.edges(up, down, at, nodes, baseline)
        wanted = torch.cat([features, errors[..., None]], dim=-1).mean(1)
        for node, right in zip(nodes, wanted, strict=True):
            found = _row(edges, up, down, node, (5, 40))
            assert float((found - right).abs().max()) <= 1e-12 * max(1.0, float(wanted.abs().max())), (up, down, node)
        assert float(wanted[:3, :, -1].abs().max()) > 1e-5, "out of errors into features, which are not zero"
        assert float(wanted[3:, :, -1].abs().max()) > 1e-5, "out of errors into errors"
        table = edges.tables[up, down]
        ahead = table.downstream[None, :, 0] - table.upstream[:, None, 0]
        reaching = ahead[table.effect.abs() > 1e-14]
        assert set(reaching.unique().tolist()) == ({0, 1, 2, 3, 4} if "attn" in down else {0}) & set(
            ahead.unique().tolist()
        )


@pytest.mark.parametrize("row", [0, 2])
def test_what_comes_into_a_feature_of_the_stream_is_its_own_effect(row: int) -> None:
    model, pairs = exact_model(), pairs_of()[[row]]
    saes = {
        site: exact_sae(kind, seed=i)
        for i, (site, kind) in enumerate(zip(BLOCK, ("gated", "topk", "jumprelu", "jumprelu"), strict=True))
    }
    effects = circuits.node_effects(model, saes, pairs, DIFFERENCE, method="atp", aggregation="none")
    edges = circuits.edge_effects(model, saes, pairs, DIFFERENCE, effects.circuit(threshold=0.0))
    slow = oracle_of("gpt2", saes, pairs)
    before, after = (slow.state(which)["resid_post.1"][0][0] for which in ("", "patch"))
    both = (before > 0) & (after > 0)
    own, incoming, features = _incoming(effects, edges, BLOCK[:3], "resid_post.1", both)
    assert len(own) > 3 and close(incoming, own, 1e-13)
    assert float((features - own).abs().max()) > 1e-2, "without the errors"


def _incoming(
    effects: circuits.NodeEffects, edges: Edges, ups: list[str], down: str, nodes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the features of a site where `nodes`, (pos, f), is True: the effect, all that comes in, and from features."""
    site, shape = effects[down], tuple(nodes.shape)
    chosen = [
        (p, f, v)
        for p, f, v in zip(site.pos.tolist(), site.feature.tolist(), site.value.tolist(), strict=True)
        if f != ERROR and nodes[p, f]
    ]
    rows = [sum(_row(edges, up, down, (p, f), shape) for up in ups) for p, f, _ in chosen]
    found = torch.stack([torch.as_tensor(row) for row in rows])
    own = torch.tensor([v for _, _, v in chosen], dtype=torch.float64)
    return own, found.sum((1, 2)), found[..., :-1].sum((1, 2))


def test_with_everything_at_zero_the_constants_are_what_is_missing() -> None:
    model, pairs = exact_model(), pairs_of()[[1]]
    saes = {site: exact_sae("standard", seed=i) for i, site in enumerate(BLOCK)}
    effects = circuits.node_effects(model, saes, pairs, DIFFERENCE, method="atp", aggregation="none", baseline="zero")
    edges = circuits.edge_effects(model, saes, pairs, DIFFERENCE, effects.circuit(threshold=0.0), baseline="zero")
    slow, sae = oracle_of("gpt2", saes, pairs), saes["resid_post.1"]
    left, constants = slow.gradients()["resid_post.1"][0][0], sum(saes[site].b_dec for site in BLOCK[:3])
    site = effects["resid_post.1"]
    for p, f, own in zip(site.pos.tolist(), site.feature.tolist(), site.value.tolist(), strict=True):
        if f != ERROR:
            missing = left[p, f] * (sae.b_enc[f] + sae.W_enc[:, f] @ (constants - sae.b_dec))
            incoming = sum(float(_row(edges, up, "resid_post.1", (p, f), (5, 40)).sum()) for up in BLOCK[:3])
            assert incoming == pytest.approx(own + float(missing), abs=1e-12)


def _assert_conserved(
    model: Model, bases: Any, pairs: Pairs, last: str, rel: float, metric: Any = DIFFERENCE, baseline: Any = "patch"
) -> None:
    """What leaves a node, into features and errors, is its effect by attribution patching."""
    effects = circuits.node_effects(model, bases, pairs, metric, method="atp", measured=False, baseline=baseline)
    whole = effects.circuit(threshold=0.0)
    edges = circuits.edge_effects(model, bases, pairs, metric, whole, baseline=baseline)
    for name, site in effects.items():
        if name == last:
            continue
        table, d_sae = site.nodes(), site.d_sae
        outgoing = torch.zeros(d_sae + 1, dtype=torch.float64)
        for (up, _), edge in edges.tables.items():
            if up == name:
                outgoing[edge.upstream[:, 1]] += edge.effect.sum(1)
        wanted = torch.zeros_like(outgoing)
        wanted[table.feature] = table.effect.double()
        assert close(outgoing, wanted, rel), name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_leaves_a_node_is_its_effect_in_every_architecture(family: str) -> None:
    # For any SAE, since what is decoded and the error add up to the identity; norms of most families compute in fp32.
    saes = mixed_saes(BLOCK, shift=FAMILIES.index(family))
    rel = 1e-12 if family in EXACT else 1e-5
    _assert_conserved(exact_model(family), saes, pairs_of(family)[[0, 1]], "resid_post.1", rel)


def test_what_leaves_a_node_is_its_effect_for_transcoders_channels_and_neurons() -> None:
    bases, _ = other_bases()
    _assert_conserved(exact_model(), bases, pairs_of()[[0, 1]], "resid_post.1", 1e-11)


def test_the_stream_passes_each_coordinate_to_itself_alone() -> None:
    # With attention and MLP held, `resid_post.1 = resid_post.0 + what is held`: no coordinate reaches another one.
    model, pairs = exact_model(), pairs_of()[[0, 1]]
    bases = circuits.neurons(model, BLOCK)
    edges = circuits.edge_effects(model, bases, pairs, DIFFERENCE, _whole(model, bases, pairs))
    crossing = {}
    for (up, down), table in edges.tables.items():
        same = (table.upstream[:, None] == table.downstream[None]).all(-1)
        crossing[up, down] = float((table.effect * ~same).abs().max()) / float(table.effect.abs().max())
    into = {pair: crossing.pop(pair) for pair in [(up, "resid_post.1") for up in BLOCK[:3]]}
    assert max(into.values()) == 0.0, into
    assert min(crossing.values()) > 0.01, "attention and MLP mix coordinates"


def test_sites_without_a_basis_in_between_pass_everything_on() -> None:
    # attn_out.1 has no basis: its part is in the edges of the stream before it.
    saes = mixed_saes(["resid_post.0", "mlp_out.1", "resid_post.1", "resid_post.2"])
    _assert_conserved(exact_model(), saes, pairs_of()[[0, 2]], "resid_post.2", 1e-12)


def test_what_leaves_a_node_is_its_effect_for_prompts_of_any_length_and_other_baselines() -> None:
    model, saes = exact_model(), mixed_saes(BLOCK, shift=6)
    pairs = Pairs.of(model, clean=["ab", "ecXafgh"], patch=["aX", "ecWahgh"], answers=[("p", "q"), ("q", "t")])
    assert pairs.patch is not None
    sides = (padded([row.tolist() for row in batch.rows()], "right") for batch in (pairs.clean, pairs.patch))
    alone = pairs_of(patched=False)[[0, 1]]
    _assert_conserved(model, saes, Pairs(*sides, pairs.answers), "resid_post.1", 1e-12)
    for baseline in ("mean", "zero_keep_error"):
        _assert_conserved(model, saes, alone, "resid_post.1", 1e-12, circuits.log_probability(), baseline)


def test_paper_and_reference_take_other_nodes_by_hand() -> None:
    # A later node that is strong in one pair alone, or strong with both signs, falls below the threshold on average.
    model, pairs, threshold = exact_model(), pairs_of()[[0, 1]], 0.08
    saes = {"resid_post.0": exact_sae("jumprelu"), "resid_post.1": exact_sae("standard")}
    options: dict[str, Any] = {"steps": 2, "rule": "left"}
    effects = circuits.node_effects(model, saes, pairs, DIFFERENCE, aggregation="none", **options)
    site = effects["resid_post.1"]
    each = [
        {(p, f): v for e, p, f, v in zip(*(getattr(site, k).tolist() for k in ("example", "pos", "feature", "value")), strict=True) if e == row}
        for row in (0, 1)
    ]  # fmt: skip
    nodes = set(each[0]) | set(each[1])
    on_average = {n for n in nodes if abs(sum(one.get(n, 0.0) for one in each)) / 2 > threshold}
    in_a_pair = {n for n in nodes if any(abs(one.get(n, 0.0)) > threshold for one in each)}
    assert on_average != in_a_pair and on_average and in_a_pair
    alone = [
        circuits.edge_effects(
            model, saes, pairs[[row]], DIFFERENCE, _whole(model, saes, pairs[[row]]), left="ig", **options
        )
        for row in (0, 1)
    ]

    def by_hand(node: tuple[int, int], rows: list[int]) -> Tensor:
        return (
            sum(
                (_row(alone[row], BLOCK[0], BLOCK[3], node, (5, 40)) for row in rows if node in each[row]),
                torch.zeros(5, 41),
            )
            / 2
        )  # type: ignore[return-value]

    paper = circuits.edge_effects(
        model, saes, pairs, DIFFERENCE, effects.circuit(threshold=threshold), left="ig", **options
    )
    table = paper.tables["resid_post.0", "resid_post.1"]
    assert {tuple(n) for n in table.downstream.tolist()} == on_average
    for j, n in enumerate(table.downstream.tolist()):
        right = by_hand(tuple(n), [0, 1])
        assert torch.allclose(table.effect[:, j], right[table.upstream[:, 0], table.upstream[:, 1]], atol=1e-13)
    reference = circuits.edge_effects(
        model,
        saes,
        pairs,
        DIFFERENCE,
        effects.circuit(n=0),
        left="ig",
        semantics="reference",
        threshold=threshold,
        **options,
    )
    table = reference.tables["resid_post.0", "resid_post.1"]
    into = {tuple(n): table.effect[:, j] for j, n in enumerate(table.downstream.tolist())}
    assert {n for n, values in into.items() if bool(values.any())} == in_a_pair
    assert len(table.upstream) > len(paper.tables["resid_post.0", "resid_post.1"].upstream), "every earlier node"
    for n in in_a_pair:
        right = by_hand(n, [row for row in (0, 1) if abs(each[row].get(n, 0.0)) > threshold])
        assert torch.allclose(into[n], right[table.upstream[:, 0], table.upstream[:, 1]], atol=1e-13), n


def test_a_planted_network_is_found_again_and_nothing_else() -> None:
    # Only the MLP of block 1 writes, and only coordinate 7; the metric reads coordinates 0, 3 and 7 above it.
    hf: Any = tiny_hf("gpt2").double()
    for i, block in enumerate(hf.transformer.h):
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.bias.zero_()
            columns = torch.arange(16) != 7 if (i, projection) == (1, block.mlp.c_proj) else slice(None)
            projection.weight[:, columns] = 0.0
    model = Model(hf, tiny_tokenizer(), name="planted")
    pairs = Pairs.of(model, clean=["abX", "kbY"], patch=["abY", "kbZ"], answers=[("p", "q")] * 2)
    metric = circuits.of_site("resid_post.2", lambda x, _: x[:, -1] @ torch.eye(16, dtype=x.dtype)[[0, 3, 7]].sum(0))
    bases = circuits.neurons(model, ["resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1"])
    effects = circuits.node_effects(model, bases, pairs, metric, aggregation="none")
    chosen = effects.circuit(threshold=1e-9)
    assert {(s, p, f) for s, p, f in chosen.nodes() if s == "resid_post.1"} == {
        ("resid_post.1", 2, f) for f in (0, 3, 7)
    }
    edges = circuits.edge_effects(model, bases, pairs, metric, chosen).frame(threshold=1e-9)
    into = edges[edges.downstream_site == "resid_post.1"]
    found = {
        (u, f, d) for u, f, d in zip(into.upstream_site, into.upstream_feature, into.downstream_feature, strict=True)
    }
    assert found == {("resid_post.0", 0, 0), ("resid_post.0", 3, 3), ("resid_post.0", 7, 7), ("mlp_out.1", 7, 7)}
    assert set(edges[edges.downstream_site == "mlp_out.1"].downstream_feature) == {7}
    one = circuits.node_effects(model, circuits.neurons(model, ["resid_post.1"]), pairs, metric, aggregation="none")
    for complement, value in ((False, 1.0), (True, 0.0)):
        f = circuits.faithfulness(
            model, circuits.neurons(model, ["resid_post.1"]), one.circuit(n=3), pairs, metric, complement=complement
        )
        assert f.value.value == pytest.approx(value, abs=1e-12)


def test_wrong_input_is_answered_in_words() -> None:
    model, pairs = exact_model(), pairs_of()
    saes, other = mixed_saes(BLOCK[:2]), {site: exact_sae("standard", seed=9) for site in BLOCK[:2]}
    whole, book = _whole(model, saes, pairs), cast("Any", "book")
    short = Pairs.of(model, clean=["aX"], patch=["aY"], answers=[("p", "q")])
    for call, error, words in (
        (
            lambda: circuits.edge_effects(model, other, pairs, DIFFERENCE, whole),
            MismatchError,
            "the circuit was made with bases at",
        ),
        (
            lambda: circuits.edge_effects(exact_model("neox"), saes, pairs_of("neox"), DIFFERENCE, whole),
            MismatchError,
            "another model",
        ),
        (
            lambda: circuits.edge_effects(model, saes, short, DIFFERENCE, whole),
            MismatchError,
            "prompts with 5 tokens, and these have up to 2",
        ),
        (lambda: circuits.edge_effects(model, saes, pairs, DIFFERENCE, whole, left="mean"), InvalidInputError, "left"),  # type: ignore[arg-type]
        (
            lambda: circuits.edge_effects(model, saes, pairs, DIFFERENCE, whole, semantics=book),
            InvalidInputError,
            "semantics",
        ),  # type: ignore[arg-type]
    ):
        with as_user(), pytest.raises(error, match=words):
            call()
    single = {"embed": exact_sae("standard")}
    with pytest.raises(InvalidInputError, match="between no two sites"):
        circuits.edge_effects(model, single, pairs, DIFFERENCE, _whole(model, single, pairs)).frame()


# The embedded model.


@pytest.mark.embedded
@pytest.mark.parametrize(
    "layer", [14, pytest.param(3, marks=pytest.mark.slow), pytest.param(28, marks=pytest.mark.slow)]
)
def test_both_laws_hold_on_the_embedded_model(embedded: Model, layer: int) -> None:
    pairs = circuits.behaviours.pairs("sva_nounpp", embedded, n=2)
    sites = [f"resid_post.{layer - 1}", f"attn_out.{layer}", f"mlp_out.{layer}", f"resid_post.{layer}"]
    bases = circuits.random(embedded, sites, d_sae=96, k=8)
    _assert_conserved(embedded, bases, pairs, sites[-1], 1e-5)
    # Into features that are active in both runs comes their own effect.
    pair, down = pairs[[0]], sites[-1]
    assert pair.patch is not None
    effects = circuits.node_effects(embedded, bases, pair, DIFFERENCE, method="atp", aggregation="none", measured=False)
    edges = circuits.edge_effects(embedded, bases, pair, DIFFERENCE, effects.circuit(threshold=0.0))
    before, after = (
        bases[down].coefficients(embedded.capture(batch, [down])[down][0]) > 0 for batch in (pair.clean, pair.patch)
    )
    own, incoming, features = _incoming(effects, edges, sites[:3], down, before & after)
    assert len(own) > 3 and close(incoming, own, 2e-6) and not close(features, own, 0.1)


@pytest.mark.embedded
@pytest.mark.slow
def test_the_published_code_is_reproduced_on_the_embedded_model(embedded: Model) -> None:
    pairs, steps, threshold, k = circuits.behaviours.pairs("sva_nounpp", embedded, n=2), 4, 0.02, 16
    sites = ["resid_post.26", "attn_out.27", "mlp_out.27", "resid_post.27"]
    bases = circuits.random(embedded, sites, d_sae=256, k=k)

    def part(site: str) -> Part:
        rows = bases[site].rows()

        def encode(x: Tensor) -> Tensor:
            pre = x @ rows.T
            return (pre * (pre >= pre.topk(k).values[..., -1:])).relu()

        return Part(site, rows, encode, torch.zeros_like)

    answers = pairs.answers[:, 0]
    slow = Oracle(
        embedded, [part(site) for site in sites], pairs.clean, pairs.patch,
        lambda logits: -logits[torch.arange(2), answers], pairs.clean.mask,
    )  # fmt: skip
    options: dict[str, Any] = {"rule": "left", "steps": steps}
    metric = circuits.negative_logit()
    effects = circuits.node_effects(embedded, bases, pairs, metric, aggregation="none", **options)
    edges = circuits.edge_effects(
        embedded,
        bases,
        pairs,
        metric,
        effects.circuit(n=0),
        left="ig",
        semantics="reference",
        threshold=threshold,
        **options,
    )
    changes, n_tokens = slow.changes("patch"), pairs.length
    assert n_tokens is not None
    left = {site: slow.integrated(site, points_of("left", steps), "patch") for site in sites}
    for site in sites:
        found = torch.zeros(2, n_tokens, 257)
        e = effects[site]
        found[e.example, e.pos, e.feature] = e.value
        products = left[site][0] * changes[site][0], (left[site][1] * changes[site][1]).sum(-1)
        assert close(found, torch.cat([products[0], products[1][..., None]], -1), 1e-5), site
        large = [(part.abs() > threshold) for part in products]
        left[site] = left[site][0] * large[0], left[site][1] * large[1][..., None]
    for up, down in edges.tables:
        nodes = [(p, f) for p, f in _strongest(left[down], changes[down]) if f >= 0] + [(n_tokens - 1, ERROR)]
        features, errors = slow.edges(up, down, left[down], nodes, "patch")
        wanted = torch.cat([features, errors[..., None]], -1).mean(1)
        found = torch.stack([_row(edges, up, down, node, (n_tokens, 256)).float() for node in nodes])
        assert close(found, wanted, 1e-5), (up, down)
