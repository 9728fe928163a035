"""The page of a circuit in a real browser: its numbers are those of the tables, and everything on it works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from circuits.doctor.report import DoctorReport, judged
from circuits.graph.names import node_name
from circuits.graph.picture import shown_effect
from tests.circuits.drawn import HOSTILE, drawn_circuit, drawn_edges
from tests.report.browser import Browser, running
from workbench.core.numbers import number
from workbench.features import CardSet, FeatureCard, LensToken, Window

pytestmark = pytest.mark.browser

CIRCUIT = drawn_circuit(5, positions=True, n=3).with_labels({"1, mlp_out.0/4": HOSTILE, "0, resid_post.1/3": "plural"})
EDGES = drawn_edges(CIRCUIT, n=3)
SHOWN = "[...document.querySelectorAll('#graph .node')].map((node) => circuitPage.data.nodes.name[node.dataset.i])"


class _Source:
    def card(self, place: int) -> FeatureCard:
        window = Window((" the", " dog<b>", " ran"), (0.0, 2.0, 0.0), 1, "top", 0, 0)
        return FeatureCard(
            feature=2,
            frequency=0.1,
            max_act=2.0,
            n_tokens=100,
            windows=(window,),
            promoted=(LensToken(" cats", 5, 1.0),),
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    cards = {"resid_post.0": CardSet((2,), {}, _Source()), "attn_out.0": folder / "my cards.html"}
    return CIRCUIT.to_html(folder / "circuit.html", EDGES, cards=cards, title=f"Test {HOSTILE}").as_uri()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    browser.size(1200, 900)
    browser.open(url)
    yield browser
    assert browser.problems == []
    assert {request.split("#")[0] for request in browser.requests if request[:5] not in ("blob:", "data:")} <= {
        url,
        "about:blank",
    }
    assert browser.js("document.title") != "owned", "labels and titles are text"


def _place(page: Browser, name: str) -> int:
    return page.js(f"circuitPage.data.nodes.name.indexOf({json.dumps(name)})")


def _click(page: Browser, name: str, shift: bool = False) -> None:
    x, y = page.place(f"#node-{_place(page, name)} .shape")
    for kind in ("mousePressed", "mouseReleased"):
        page.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, modifiers=8 if shift else 0
        )


def _slide(page: Browser, which: str, value: int) -> None:
    page.js(
        f"(() => {{ const s = document.getElementById('{which}'); s.value = {value}; s.dispatchEvent(new Event('input')); }})()"
    )


def _listed(page: Browser, which: str) -> list[list[str]]:
    return page.js(
        f"[...document.querySelectorAll('#{which} tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def _rows(frame: Any, side: str = "") -> list[str]:
    columns = [frame[f"{side}{name}"] for name in ("site", "pos", "feature")]
    return [node_name(s, p, -1 if f == "error" else f) for s, p, f in zip(*columns, strict=True)]


def test_its_numbers_are_those_of_the_tables(page: Browser) -> None:
    nodes, edges = page.js("circuitPage.data.nodes"), page.js("circuitPage.data.edges")
    frame, links = CIRCUIT.frame(), EDGES.frame()
    assert nodes["name"] == _rows(frame)
    assert nodes["effect"] == frame["effect"].tolist() and nodes["se"] == frame["se"].tolist()
    texts = [shown_effect(effect, se, 3) for effect, se in zip(frame["effect"], frame["se"], strict=True)]
    assert list(zip(nodes["text"], nodes["interval"], strict=True)) == texts
    assert [nodes["name"][i] for i in edges["source"]] == _rows(links, "upstream_")
    assert [nodes["name"][i] for i in edges["target"]] == _rows(links, "downstream_")
    assert edges["effect"] == links["effect"].tolist() and edges["se"] == links["se"].tolist()
    table = page.js(
        "[...document.querySelectorAll('#all tbody tr')].map((row) => [...row.cells].slice(3, 5).map((cell) => cell.textContent))"
    )
    assert [tuple(row) for row in table] == texts
    page.hover(f"#node-{_place(page, '0, resid_post.1/3')} .shape")
    said = page.js("document.getElementById('tip').textContent")
    row = _rows(frame).index("0, resid_post.1/3")
    assert "plural" in said and " ".join(texts[row]) in said
    assert "20 nodes: 16 features and 4 errors at 4 sites." in page.js("document.querySelector('header').textContent")


def test_features_are_circles_and_errors_triangles_and_no_two_nodes_or_labels_overlap(page: Browser) -> None:
    shapes = page.js(
        "[...document.querySelectorAll('#graph .node')].map((node) => [node.querySelector('.shape').tagName, circuitPage.data.nodes.isError[node.dataset.i]])"
    )
    assert {tuple(shape) for shape in shapes} == {("circle", False), ("path", True)}
    overlaps = """(() => { const boxes = [...document.querySelectorAll('#graph .node .shape, #graph .node text')].map((e) => e.getBoundingClientRect());
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length; })()"""
    assert page.js(overlaps) == 0
    page.size(390, 844, phone=True)
    page.until("circuitPage.state.placed.narrow")
    assert page.js(overlaps) == 0
    assert page.js("document.documentElement.scrollWidth") <= 390, "the picture scrolls in its frame"


def test_the_sliders_filter_nodes_and_edges(page: Browser) -> None:
    frame = CIRCUIT.frame()
    _slide(page, "node-limit", 7)
    assert sorted(page.js(SHOWN)) == sorted(_rows(frame)[:7])
    assert (
        page.js("document.getElementById('node-said').textContent")
        == f"7 of 20, |effect| ≥ {number(abs(frame['effect'].tolist()[6]))}"
    )
    _slide(page, "node-limit", 20)
    _slide(page, "edge-limit", 10)
    assert page.js("document.getElementById('edge-said').textContent").startswith("10 of 75, |effect| ≥ ")
    segments = "[...document.querySelectorAll('.links path')].map((path) => path.getAttribute('d').match(/M/g).length).reduce((a, b) => a + b, 0)"
    assert page.js(segments) == 10
    _slide(page, "edge-limit", 0)
    assert page.js("document.querySelectorAll('.links path').length") == 0


def test_a_click_lists_and_lights_the_right_edges(page: Browser) -> None:
    links, name = EDGES.frame(), "2, resid_post.0/8"
    texts = [shown_effect(e, se, 3) for e, se in zip(links["effect"].tolist(), links["se"].tolist(), strict=True)]
    _click(page, name)
    for which, end, other in (("incoming", "downstream_", "upstream_"), ("outgoing", "upstream_", "downstream_")):
        own = [i for i, n in enumerate(_rows(links, end)) if n == name]
        expected = [[_rows(links, other)[i], *texts[i]] for i in own]
        found = [
            [
                cell.replace(f"{HOSTILE.replace(chr(0x202E), '⟨U+202E⟩')} (", "").rstrip(")") if k == 0 else cell
                for k, cell in enumerate(row)
            ]
            for row in _listed(page, which)
        ]
        found = [[row[0].replace("plural (", ""), *row[1:]] for row in found]
        assert found == expected and len(expected) == 5
    assert page.js("document.querySelectorAll('.lit path').length") == 10
    _slide(page, "edge-limit", 20)
    listed = len(_listed(page, "incoming")) + len(_listed(page, "outgoing"))
    assert listed == page.js("document.querySelectorAll('.lit path').length") < 10
    assert "hidden by the sliders" in page.js("document.getElementById('side').textContent")
    page.key("Escape")
    assert page.js("document.querySelectorAll('.lit path').length") == 0


def test_what_cards_say_is_shown_and_linked(page: Browser) -> None:
    _click(page, "0, resid_post.0/2")
    side = page.js("document.getElementById('side').textContent")
    assert " the dog<b> ran" in side and " cats" in side
    assert page.js("document.querySelector('#side mark').textContent") == " dog<b>"
    _click(page, "1, attn_out.0/3")
    assert page.js("document.querySelector('#side a').getAttribute('href')") == "my%20cards.html#feature=3"


def test_labels_and_groups_are_made_undone_kept_as_a_file_and_read_again(page: Browser, url: str) -> None:
    name = "2, resid_post.0/8"
    _click(page, name)
    page.click("#label")
    page.type("<b>bold</b>\u202e")
    page.key("Enter")
    label = "<b>bold</b>⟨U+202E⟩"
    assert page.js(f"circuitPage.kept.labels[{json.dumps(name)}]") == label
    assert label[:6] in page.js(f"document.getElementById('node-{_place(page, name)}').textContent")
    _click(page, "0, resid_post.1/3", shift=True)
    _click(page, "1, mlp_out.0/4", shift=True)
    page.click("#group-name")
    page.type("pair")
    page.key("Enter")
    group = {"name": "pair", "nodes": ["0, resid_post.1/3", "1, mlp_out.0/4"]}
    assert page.js("circuitPage.kept.groups") == [group]
    assert page.js("document.querySelectorAll('.node.group-0').length") == 2
    page.click("#undo")
    assert page.js("circuitPage.kept.groups") == []
    page.click("#undo")
    assert name not in page.js("circuitPage.kept.labels") and page.js("document.getElementById('undo').disabled")
    page.click("#redo")
    page.click("#redo")
    text = page.js("circuitPage.asJson()")
    page.open(url)
    page.js(f"circuitPage.load({json.dumps(text)})")
    assert page.js("circuitPage.kept.groups") == [group]
    assert page.js("circuitPage.kept.labels") == json.loads(text)["labels"]
    assert page.js(f"circuitPage.kept.labels[{json.dumps(name)}]") == label
    page.js('circuitPage.load(\'{"labels": {"nowhere/1": "x"}}\')')
    assert "1 of other nodes left out" in page.js("document.getElementById('status').textContent")
    page.js("circuitPage.load('no json')")
    assert "not JSON" in page.js("document.getElementById('status').textContent")


def test_the_keyboard_reaches_every_part(page: Browser) -> None:
    page.js("document.querySelector('#graph [tabindex=\"0\"]').focus()")
    first = page.js("document.activeElement.id")
    seen = {first}
    for key in ("ArrowDown", "ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.key(key)
        seen.add(page.js("document.activeElement.id"))
    assert len(seen) >= 3 and page.js("document.querySelectorAll('#graph [tabindex=\"0\"]').length") == 1
    page.key("Enter")
    assert page.js("`node-${circuitPage.state.open}` === document.activeElement.id")
    page.key(" ")
    assert page.js("circuitPage.state.chosen.size") == 1
    page.key("Escape")
    assert page.js("circuitPage.state.chosen.size") == 0


def test_the_picture_is_saved_as_svg_and_png(page: Browser) -> None:
    svg = page.js("circuitPage.asSvg()")
    assert svg.startswith("<svg") and svg.count("<circle") == 16 + 20 and "class=" not in svg and "plural" in svg
    assert page.js("circuitPage.asPng().then((blob) => [blob.type, blob.size > 5000])") == ["image/png", True]


def test_a_failed_check_is_written_across_the_picture_and_its_files(browser: Browser, tmp_path: Path) -> None:
    checks = (judged(1, "gap as given", 0.4, 0.05, "at most", f"Do not add up {HOSTILE}."), judged(6, "seed", 1.0, 0.8))
    report = DoctorReport(what="effects", checks=checks)
    browser.size(1200, 900)
    browser.open(CIRCUIT.stamped(report).to_html(tmp_path / "failed.html", EDGES).as_uri())
    mark = "FAILED: completeness"
    assert mark in browser.js("document.querySelector('#graph .watermark').textContent")
    assert browser.js("document.querySelector('#graph').lastChild.getAttribute('class')") == "watermark", "on top"
    assert browser.js("getComputedStyle(document.querySelector('.watermark text')).fill") == "rgb(192, 57, 43)"
    x, y, width = browser.js(
        "(() => { const box = document.querySelector('.watermark text').getBoundingClientRect(); return [box.x, box.y, box.width]; })()"
    )
    assert x >= 0 and y >= 0 and width > 300, "large, and inside the picture"
    svg = browser.js("circuitPage.asSvg()")
    assert mark in svg and "rgb(192, 57, 43)" in svg and "rotate(-8" in svg
    reds = """(async () => {
      const image = await createImageBitmap(await circuitPage.asPng()), canvas = document.createElement('canvas');
      canvas.width = image.width; canvas.height = image.height;
      const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
      const d = context.getImageData(0, 0, image.width, image.height).data; let n = 0;
      for (let i = 0; i < d.length; i += 4) if (d[i] > d[i + 1] + 40 && Math.abs(d[i + 1] - d[i + 2]) < 20) n++;
      return n; })()"""
    assert browser.js(reds) > 2000
    _slide(browser, "node-limit", 0)
    assert mark in browser.js("document.querySelector('#graph .watermark').textContent"), "no slider hides it"
    assert "failed 1 of 2 checks: completeness" in browser.js("document.getElementById('verdict').textContent")
    row = browser.js("[...document.querySelectorAll('#checks tr.failed td')].map((cell) => cell.textContent)")
    assert row[1:6] == ["completeness", "gap as given", "0.400", "at most 0.05", "fail"]
    assert browser.problems == [] and browser.js("document.title") != "owned"


def test_what_was_not_checked_says_so_in_small(page: Browser) -> None:
    assert "Attribution doctor: not checked." in page.js("document.getElementById('verdict').textContent")
    assert page.js("document.querySelectorAll('.watermark text').length") == 0
    assert page.js("parseFloat(getComputedStyle(document.getElementById('verdict')).fontSize)") < 16
    assert page.js("circuitPage.asSvg().includes('FAILED')") is False


def test_500_nodes_and_5000_edges_take_little_work(browser: Browser, tmp_path: Path) -> None:
    circuit = drawn_circuit(125)
    edges = drawn_edges(circuit, every=9)
    browser.size(1200, 900)
    browser.open(circuit.to_html(tmp_path / "large.html", edges).as_uri())
    assert browser.js("[circuitPage.data.nodes.name.length, circuitPage.data.edges.source.length > 5000]") == [
        500,
        True,
    ]
    _slide(browser, "edge-limit", 10_000)
    assert browser.js("document.querySelectorAll('#graph *').length") < 3 * 500 + 50, (
        "edges of one colour and width are one path"
    )
    before = browser.js("({...circuitPage.work})")
    _slide(browser, "edge-limit", 5000)
    after = browser.js("({...circuitPage.work})")
    assert (after["nodes"] - before["nodes"], after["paths"] - before["paths"]) <= (0, 8), (
        "an edge slider draws no node"
    )
    browser.hover("#node-40 .shape")
    assert browser.js("({...circuitPage.work})") == after, "the pointer draws nothing"
    _click(browser, browser.js("circuitPage.data.nodes.name[40]"))
    opened = browser.js("({...circuitPage.work})")
    degree = browser.js("document.querySelectorAll('.lit path').length")
    assert opened["nodes"] == after["nodes"] and opened["segments"] - after["segments"] == degree < 100
    assert browser.problems == []


def test_dark_and_print(page: Browser) -> None:
    page.size(1200, 900, dark=True)
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 29)"
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.js("getComputedStyle(document.querySelector('.tools')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")
