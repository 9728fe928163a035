"""Curves of faithfulness, their controls, faithfulness of edges, and the study that puts them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuits
from circuits.edges.report import FoundEdges
from circuits.faithful.curves import ATTRIBUTION, RANDOM, TOP_ACTIVATION
from circuits.faithful.study import ALL_EDGES, NO_EDGES, circuit_study
from circuits.graph.circuit import ERROR
from circuits.pairs import Pairs
from tests.circuits.tokenizers import agreeing_model
from tests.interventions.builders import sae_lens_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.models.model import Model

METRIC = circuits.logit_difference()
SITES = ["attn_out.0", "mlp_out.0", "resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1", "resid_post.2"]
FOUND, HELD_OUT = ("abcdef", "bbcdef", "cacdef"), ("abxdef", "bbxyef", "fgxdef", "gfxdef", "hhcdef")


def _pairs(model: Model, texts: tuple[str, ...]) -> Pairs:
    answers = [("g", "h"), ("g", "i"), ("k", "g"), ("p", "q"), ("a", "b")][: len(texts)]
    return Pairs.of(model, clean=list(texts), patch=[f"{t[0]}zy{t[3:]}" for t in texts], answers=answers)


def _saes(model: Model) -> dict[str, Any]:
    return {site: sae_lens_sae("standard", d_in=model.width(site)) for site in SITES}


@pytest.mark.parametrize("family", ["neox", "gemma2"])
@pytest.mark.parametrize("aggregation", ["sum", "none"])
@pytest.mark.parametrize("ablation", ["mean", "resample"])
@pytest.mark.parametrize("sites", [SITES, ["resid_post.0", "attn_out.2"], ["attn_out.0", "mlp_out.1", "mlp_out.2"]])
def test_all_edges_are_the_circuit_itself_and_fewer_are_not(
    family: str, aggregation: Any, ablation: Any, sites: list[str]
) -> None:
    model = tiny_model(family)
    bases = circuits.neurons(model, sites[:2]) | circuits.random(model, sites[2:] or sites[:1], d_sae=20, k=6)
    found, held_out = _pairs(model, FOUND), _pairs(model, HELD_OUT)
    circuit = circuits.node_effects(model, bases, found, METRIC, steps=3, aggregation=aggregation).circuit(n=30)
    edges = circuits.edge_effects(model, bases, found, METRIC, circuit)
    itself = circuits.faithfulness(model, bases, circuit, held_out, METRIC, ablation=ablation)

    def through(n: int | None, drawn: int | None = None) -> torch.Tensor:
        return circuits.edge_faithfulness(
            model, bases, circuit, edges, held_out, METRIC, n=n, random_seed=drawn, ablation=ablation, batch_size=3
        ).kept

    scale = float((itself.full - itself.empty).abs().max())
    torch.testing.assert_close(through(None), itself.kept, atol=1e-4 * scale, rtol=1e-4)
    if len(edges):
        some = [through(0), through(len(edges) // 2), through(len(edges) // 2, drawn=0)]
        assert all(float((kept - itself.kept).abs().max()) > 1e-3 * scale for kept in some)
        assert float((some[1] - some[2]).abs().max()) > 1e-3 * scale


def test_controls_have_as_many_features_and_the_same_errors() -> None:
    model = tiny_model("neox")
    bases, found = _saes(model), _pairs(model, FOUND)
    for aggregation in ("sum", "none"):
        effects = circuits.node_effects(model, bases, found, METRIC, steps=3, aggregation=aggregation)
        circuit = effects.circuit(n=25)
        own = set(circuit.nodes())
        for other in (
            circuits.random_circuit(effects, circuit, seed=1),
            circuits.random_circuit(effects, circuit, seed=2),
            circuits.top_activation_circuit(model, bases, found, circuit),
        ):
            nodes = set(other.nodes())
            assert (other.n_features, other.n_errors) == (circuit.n_features, circuit.n_errors) and nodes != own
            assert {node for node in nodes if node[2] == ERROR} == {node for node in own if node[2] == ERROR}
        active = {
            (name, *pair)
            for name, site in effects.sites.items()
            for pair in zip(site.pos.tolist(), site.feature.tolist(), strict=True)
        }
        assert set(circuits.random_circuit(effects, circuit).nodes()) <= active


def test_the_most_active_features_are_those_that_write_most() -> None:
    model = tiny_model("gpt2")
    found = _pairs(model, FOUND)
    bases = circuits.neurons(model, ["resid_post.1"])
    circuit = circuits.node_effects(model, bases, found, METRIC, steps=2).circuit(n=4)
    top = circuits.top_activation_circuit(model, bases, found, circuit)
    x = model.capture(found.clean, ["resid_post.1"])["resid_post.1"][found.clean.mask]
    wanted = x.abs().sum(0).topk(4).indices
    assert set(top.sites["resid_post.1"].feature.tolist()) == set(wanted.tolist())


def test_a_curve_is_the_faithfulness_of_its_circuits() -> None:
    model = tiny_model("gpt2")
    bases, found, held_out = _saes(model), _pairs(model, FOUND), _pairs(model, HELD_OUT)
    effects = circuits.node_effects(model, bases, found, METRIC, steps=3)
    curve = circuits.faithfulness_curve(model, bases, effects, held_out, METRIC, counts=(0, 7, 20), draws=2)
    frame = curve.frame()
    assert len(frame) == 3 * 3 * 3 and set(frame.nodes) == {ATTRIBUTION, RANDOM, TOP_ACTIVATION}
    for n in (0, 7, 20):
        for errors in ("circuit", "all", "none"):
            single = circuits.faithfulness(model, bases, effects.circuit(n=n), held_out, METRIC, errors=errors)
            torch.testing.assert_close(curve.at(n, errors=errors).kept, single.kept)
            row = frame[(frame.n == n) & (frame.errors == errors) & (frame.nodes == ATTRIBUTION)].iloc[0]
            assert single.value.value == row.F and row.n_features == single.n_features
    drawn = [circuits.random_circuit(effects, effects.circuit(n=20), seed) for seed in (0, 1)]
    kept = torch.stack([circuits.faithfulness(model, bases, c, held_out, METRIC).kept for c in drawn]).mean(0)
    torch.testing.assert_close(curve.at(20, nodes=RANDOM).kept, kept)
    with pytest.raises(InvalidInputError, match=r"at\(8.*Ask for one of its counts"):
        curve.at(8)


def test_edges_of_other_nodes_are_refused() -> None:
    model = tiny_model("gpt2")
    bases, found = circuits.neurons(model, ["resid_post.0", "resid_post.1"]), _pairs(model, FOUND)
    effects = circuits.node_effects(model, bases, found, METRIC, steps=2)
    edges = circuits.edge_effects(model, bases, found, METRIC, effects.circuit(n=8))
    with pytest.raises(MismatchError, match="between other nodes than the circuit has"):
        circuits.edge_faithfulness(model, bases, effects.circuit(n=9), edges, found, METRIC)
    with pytest.raises(InvalidInputError, match="not both"):
        circuits.edge_faithfulness(model, bases, effects.circuit(n=8), edges, found, METRIC, n=3, threshold=0.1)
    with pytest.raises(InvalidInputError, match="everything"):
        circuits.edge_faithfulness(model, bases, effects.circuit(threshold=0.0), edges, found, METRIC)


def test_the_study_says_what_its_tables_hold() -> None:
    model = agreeing_model()
    train = circuits.behaviours.pairs("sva_simple", model, "train", 12)
    test = circuits.behaviours.pairs("sva_simple", model, "test", 8).of_one_length()
    bases = {site: sae_lens_sae("topk", d_in=D_MODEL) for site in ("mlp_out.1", "resid_post.1")}
    study = circuit_study(model, bases, train, test, METRIC, behaviour="sva_simple", counts=(5, 20), n=20, steps=2)
    section = study.section()  # refuses a headline whose numbers stand in no table
    assert section.headline is not None and section.headline.value == study.curves[ATTRIBUTION, "none", 20].value
    whole, own = study.edge_checks[ALL_EDGES], study.curves[ATTRIBUTION, "circuit", 20]
    torch.testing.assert_close(whole.kept, own.kept, atol=1e-4, rtol=1e-4)
    assert study.edge_checks[NO_EDGES].n_edges == 0 and len(study.findings()) >= 2
    with pytest.raises(InvalidInputError, match="n=7"):
        circuit_study(model, bases, train, test, METRIC, counts=(5, 20), n=7)


def test_few_pairs_call_fewer_edges_different_from_zero() -> None:
    def edges(n: int) -> circuits.Edges:
        nodes = torch.tensor([[-1, i] for i in range(40)])
        table = circuits.EdgeTable(
            upstream=nodes, downstream=nodes, effect=torch.full((40, 40), 2.1), se=torch.ones(40, 40)
        )
        return circuits.Edges(tables={("a", "b"): table}, n=n, metric="m", has_positions=False, made="")

    # Student's t: 2.365 standard errors with 7 degrees of freedom, 1.962 with 999; each excludes zero by chance in 5 %
    for n, clear, chance in ((1, 0, 0), (8, 0, 80), (1000, 1600, 80)):
        rows = dict(FoundEdges(edges=edges(n))._counts().rows)
        assert rows == {"found": clear, "expected by chance": chance}
