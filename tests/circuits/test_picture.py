"""The picture of a circuit without a browser: where nodes are, what is left out, and what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import circuits
from circuits.graph import picture
from circuits.graph.picture import picture_of, placed
from tests.circuits.drawn import HOSTILE, SITES, drawn_circuit, drawn_edges
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError


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
