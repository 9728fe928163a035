"""The picture of a circuit without a browser: where nodes are, what is left out, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

import circuits
from circuits.edges.report import FoundEdges
from circuits.graph import picture
from circuits.graph.picture import picture_of, placed
from circuits.graph.report import FoundCircuit
from tests.circuits.drawn import HOSTILE, SITES, drawn_circuit, drawn_edges
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.numbers import with_interval


@pytest.mark.parametrize("positions", [False, True])
def test_a_static_picture_holds_every_node_apart_from_the_others(positions: bool) -> None:
    circuit = drawn_circuit(40, positions=positions).with_labels({})
    html = circuit._repr_html_()
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', html)
    assert len(marks) == 4 * 39 and html.count("<polygon") == 4
    points = [(float(x), float(y)) for x, y in marks]
    assert min(abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in itertools.combinations(points, 2)) > 12
    assert [html.index(f">{site}</text>") for site in SITES] == sorted(html.index(f">{site}</text>") for site in SITES)
    drawn = picture_of(circuit.frame(), SITES, [*"abcd"] if positions else None)
    bottoms = placed(drawn)[1]
    assert bottoms == sorted(bottoms, reverse=True), "later sites are higher up"


def test_few_examples_have_the_wide_interval_of_students_t_everywhere(tmp_path: Path) -> None:
    circuit = drawn_circuit(n=3)
    edges = drawn_edges(circuit, n=3)
    node = circuit.frame().iloc[0]
    half = 4.3027 * node["se"]  # 0.975 quantile, two degrees of freedom
    _, interval = with_interval(node["effect"], node["effect"] - half, node["effect"] + half, sign=True)
    page = circuit.to_html(tmp_path / "a.html", edges).read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    assert data["nodes"]["interval"][0] == interval and page.count(interval) == 2 and interval in circuit._repr_html_()
    report = FoundCircuit(circuit=circuit, gaps={"resid_post.0": 0.0}, n=3, metric="m")
    assert report._nodes()[0][1].shown(sign=True)[1] == interval
    assert FoundEdges(edges=edges)._strongest()[0][1].shown(sign=True)[1] == data["edges"]["interval"][0]
    circuit.save(tmp_path / "c")
    assert set(circuits.load_circuit(tmp_path / "c").frame()["n"]) == {3}
    read = circuits.load_graph_json(circuit.to_graph_json(tmp_path / "g.json", edges))
    assert read.edges.n == 3 and read.circuit._repr_html_() == circuit._repr_html_()
    assert "[" not in drawn_circuit(n=1)._repr_html_().split("<title>")[1].split("</title>")[0], "one has no interval"


def test_a_folder_that_does_not_know_how_many_examples_it_is_of_is_refused(tmp_path: Path) -> None:
    file = drawn_circuit().save(tmp_path) / "circuit.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"format": 2', '"format": 1'), encoding="utf-8")
    with pytest.raises(MismatchError, match=r"format 1.*Find the circuit again"):
        circuits.load_circuit(tmp_path)


def test_labels_are_text() -> None:
    html = drawn_circuit().with_labels({"mlp_out.0/4": HOSTILE})._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html and "\u202e" not in html


def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    circuit = drawn_circuit()
    monkeypatch.setattr(picture, "MOST_NODES", 7)
    page = circuit.to_html(tmp_path / "page.html", drawn_edges(circuit)).read_text(encoding="utf-8")
    assert "the 7 strongest of 20 nodes are shown" in page and "to nodes that are not shown left out" in page


def test_wrong_input_is_refused_in_words(tmp_path: Path) -> None:
    circuit = drawn_circuit()
    other = drawn_circuit(sites=("attn_out.1", "mlp_out.1"))
    with pytest.raises(MismatchError, match="made for another circuit"):
        circuit.to_html(tmp_path / "a.html", drawn_edges(other))
    with pytest.raises(DegenerateInputError, match="lists no nodes"):
        drawn_circuit(sites=()).to_html(tmp_path / "a.html")
    with pytest.raises(InvalidInputError, match="no node is there"):
        circuit.to_html(tmp_path / "a.html", cards={"resid_post.7": "cards.html"})
    with pytest.raises(InvalidInputError, match="Say which cards belong where"):
        circuit.to_html(tmp_path / "a.html", cards="cards.html")
    assert not (tmp_path / "a.html").exists()


def test_a_link_to_a_page_is_an_address_and_nothing_else(tmp_path: Path) -> None:
    circuit = drawn_circuit(sites=("resid_post.0",))
    page = circuit.to_html(tmp_path / "a.html", cards="javascript:alert(1)").read_text(encoding="utf-8")
    assert "javascript%3Aalert" in page and '"javascript:' not in page


def test_the_headline_says_what_the_circuit_is_on(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    pairs = circuits.Pairs.of(tiny_model(), clean=["abcd", "abce"], patch=["abdd", "abde"], answers=[("g", "h")] * 2)
    circuit = drawn_circuit(positions=True)
    page = circuit.to_html(tmp_path / "a.html", pairs=pairs).read_text(encoding="utf-8")
    assert "What makes the model say “g” and not “h” behind prompts such as “abcd” (2 pairs)." in page
    assert list(pairs.clean.str_tokens[0]) == re.findall('"columns":\\[(.*?)\\]', page)[0].replace('"', "").split(",")
