"""A circuit as a graph file and as annotations: written in the form that others read, and the same when it comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import circuits
from circuits.graph.graphjson import ERRORS, FEATURE
from tests.circuits.drawn import drawn_circuit, drawn_edges
from workbench.core.errors import CorruptFileError, DegenerateInputError, MissingFileError


@pytest.mark.parametrize("positions", [False, True])
def test_a_graph_comes_back_as_it_was(positions: bool, tmp_path: Path) -> None:
    circuit = drawn_circuit(7, positions=positions)
    name = "3, resid_post.0/11" if positions else "resid_post.0/11"
    circuit = circuit.with_labels({name: "plural \u202e<b>"})
    edges = drawn_edges(circuit, every=2)
    loaded = circuits.load_graph_json(circuit.to_graph_json(tmp_path / "graph.json", edges, slug="test"))
    pd.testing.assert_frame_equal(loaded.circuit.frame(), circuit.frame())
    pd.testing.assert_frame_equal(loaded.edges.frame(), edges.frame())
    assert dict(loaded.circuit.labels) == dict(circuit.labels)
    for part in ("bases", "model_fingerprint", "n_tokens", "made"):
        assert getattr(loaded.circuit, part) == getattr(circuit, part)
    assert {k: s.d_sae for k, s in loaded.circuit.sites.items()} == {k: s.d_sae for k, s in circuit.sites.items()}


def test_the_file_has_the_fields_that_viewers_read(tmp_path: Path) -> None:
    circuit = drawn_circuit(7, positions=True)
    graph = json.loads(circuit.to_graph_json(tmp_path / "graph.json", drawn_edges(circuit)).read_text(encoding="utf-8"))
    assert {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt"} <= graph["metadata"].keys()
    assert graph["qParams"] == {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    needed = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "is_target_logit", "run_idx",
              "reverse_ctx_idx", "jsNodeId", "clerp", "influence", "activation"}  # fmt: skip
    assert len(nodes) == len(graph["nodes"]) == 29 and all(needed <= node.keys() for node in nodes.values())
    kinds = [node["feature_type"] for node in nodes.values()]
    assert (kinds.count(FEATURE), kinds.count(ERRORS), kinds.count("logit")) == (24, 4, 1)
    assert all(isinstance(node["layer"], str) for node in nodes.values())
    assert all(link["source"] in nodes and link["target"] in nodes for link in graph["links"])
    by_size = sorted((n for n in nodes.values() if n["feature_type"] != "logit"), key=lambda n: -abs(n["effect"]))
    assert [n["influence"] for n in by_size] == sorted(n["influence"] for n in by_size)
    assert by_size[-1]["influence"] == pytest.approx(1.0)


def test_a_graph_of_another_program_is_read(tmp_path: Path) -> None:
    def node(name: str, kind: str, layer: str, feature: int) -> dict[str, object]:
        return {"node_id": name, "feature_type": kind, "layer": layer, "ctx_idx": 2, "feature": feature, "clerp": ""}

    nodes = [
        node("3_17_2", FEATURE, "3", 300_017), node("0_5_2", ERRORS, "5", -1), node("E_9_2", "embedding", "E", 2),
        node("8_40_2", "logit", "8", 40),
    ]  # fmt: skip
    links = [
        {"source": "3_17_2", "target": "0_5_2", "weight": 0.5}, {"source": "E_9_2", "target": "3_17_2", "weight": 1.0},
        {"source": "0_5_2", "target": "8_40_2", "weight": 2.0},
    ]  # fmt: skip
    file = tmp_path / "graph.json"
    file.write_text(
        json.dumps({"metadata": {"slug": "s", "prompt_tokens": ["a", "b", "c"]}, "nodes": nodes, "links": links})
    )
    loaded = circuits.load_graph_json(file)
    assert list(loaded.circuit.nodes()) == [("mlp_out.3", 2, 17), ("mlp_out.5", 2, -1)]
    frame = loaded.edges.frame()
    assert frame[["upstream_site", "upstream_feature", "downstream_feature", "effect"]].to_numpy().tolist() == [
        ["mlp_out.3", 17, "error", 0.5]
    ]
    assert loaded.prompt == ("a", "b", "c") and loaded.left_out == "2 nodes and 2 links left out"


def test_a_damaged_graph_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    with pytest.raises(MissingFileError):
        circuits.load_graph_json(file)
    file.write_text('{"metadata": {}, "nodes": [{"feature_type": "cross layer transcoder"}], "links": []}')
    with pytest.raises(CorruptFileError, match="graph.json"):
        circuits.load_graph_json(file)
    file.write_text('{"metadata": {}, "nodes": [], "links": []}')
    with pytest.raises(DegenerateInputError, match="no feature"):
        circuits.load_graph_json(file)


def test_annotations_are_read_and_written_in_the_published_form(tmp_path: Path) -> None:
    circuit = drawn_circuit(5, positions=True)
    rows = [
        {"Name": "3, resid_0/11", "Annotation": "plural"}, {"Name": "attn_0/3", "Annotation": "at all positions"},
        {"Name": "1, attn_0/3", "Annotation": "at one position"}, {"Name": "mlp_0/ε", "Annotation": "left over"},
        {"Name": "resid_9/1", "Annotation": "of another circuit"}, {"Name": "0, mlp_0/1"},
    ]  # fmt: skip
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    named = circuit.annotated(file)
    assert dict(named.labels) == {
        "3, resid_post.0/11": "plural", "1, attn_out.0/3": "at one position", "0, mlp_out.0/error": "left over",
    }  # fmt: skip
    written = [
        json.loads(line)
        for line in named.save_annotations(tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {
        "Component": "resid",
        "Layer": "0",
        "Feature": "11",
        "Name": "3, resid_0/11",
        "Annotation": "plural",
        "Notes": "",
    } in written
    assert circuit.annotated(tmp_path / "out.jsonl").labels == named.labels
    page = tmp_path / "page.json"
    page.write_text(json.dumps({"labels": {"3, resid_post.0/11": "of the page"}}), encoding="utf-8")
    assert dict(circuit.annotated(page).labels) == {"3, resid_post.0/11": "of the page"}


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.jsonl", '{"Annotation": "x"}', CorruptFileError), ("a.jsonl", '{"Name": "x_1/2", "Annotation": "x"}', DegenerateInputError),
        ("a.json", "[]", CorruptFileError), ("a.json", '{"labels": 3}', CorruptFileError),
    ],
)  # fmt: skip
def test_wrong_annotations_are_refused_in_words(name: str, text: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(error, match=name):
        drawn_circuit().annotated(tmp_path / name)
