"""The feature page in a real browser, opened from a file: table, search, cards, keyboard, hostile text, many rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, running
from tests.report.feature_cards import bare_card, full_card, hostile_card, many_cards
from workbench.report.features import feature_page
from workbench.report.text import visible

pytestmark = pytest.mark.browser

N = 120
ROWS = "[...document.querySelectorAll('#rows .row')].sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)"
IDS = f"{ROWS}.map((row) => Number(row.querySelector('.id').textContent))"
HEADING = "(document.querySelector('#panel h2') || {}).textContent"
READY = "document.querySelector('#panel section') !== null && !document.querySelector('#panel[aria-busy]')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "features.html"
    file.write_text(feature_page(_cards(), "Features of a test", "resid_post.1").html, encoding="utf-8")
    return file.as_uri()


def _cards() -> Iterator[dict]:
    for feature in range(N):
        yield hostile_card(feature) if feature == 5 else bare_card(feature) if feature == 6 else full_card(feature, N)


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    """The page freshly opened; afterwards nothing was said on the console, and nothing was asked of the network."""
    browser.size(1400, 860)
    browser.open(url)
    yield browser
    assert browser.problems == []
    assert {request.split("#")[0] for request in browser.requests} <= {url, "about:blank"}
    assert browser.js("document.title").endswith("Features of a test")


def _search(page: Browser, text: str) -> list[int]:
    page.js("document.getElementById('query').value = ''; document.activeElement.blur()")
    page.key("/")
    page.type(text)
    return page.js(IDS)


def _open(page: Browser, feature: int) -> None:
    page.js(f"location.hash = '#feature={feature}'")
    page.until(f"{HEADING} === 'Feature {feature}' && {READY}")


def test_the_table_shows_all_and_sorts(page: Browser) -> None:
    assert page.js("document.getElementById('found').textContent") == f"{N} features"
    assert page.js(IDS)[:8] == list(range(8))
    page.click("#head [role=columnheader]:nth-child(7) button")
    assert page.js("document.querySelector('[aria-sort=descending]').textContent") == "Output score"
    scores = {f: (full_card(f, N)["scores"] or {})["output_score"] for f in range(N) if f not in (5, 6)}
    scores[5] = hostile_card(5)["scores"]["output_score"]
    best = sorted(scores, key=lambda f: (-scores[f], f))
    assert page.js(IDS)[:10] == best[:10]
    page.click("#head [role=columnheader]:nth-child(7) button")
    assert page.js("document.querySelector('[aria-sort=ascending]').textContent") == "Output score"
    assert page.js(IDS)[:10] == best[::-1][:10]
    page.js("document.getElementById('grid').scrollTop = 1e9")
    page.until(f"{IDS}.at(-1) === 6")
    assert "sort=output_score" in page.js("location.hash")
    assert "not measured" in page.js(f"{ROWS}.at(-1).textContent")


def test_search_filters_says_how_many_and_what_is_wrong(page: Browser) -> None:
    assert (
        _search(page, "output_score>0.3")
        == [
            f
            for f in range(N)
            if f != 6 and (hostile_card(5) if f == 5 else full_card(f, N))["scores"]["output_score"] > 0.3
        ][: len(page.js(IDS))]
    )
    found = page.js("document.getElementById('found').textContent")
    assert found.endswith(f" of {N} features")
    assert _search(page, "#17") == [17]
    assert _search(page, "flag:dense #13") == [13]
    assert _search(page, "no such thing at all") == []
    assert page.js("document.querySelector('#rows .none').textContent") == "No feature fits this search."
    assert _search(page, "outputscore>1") == []
    assert "There is no field “outputscore”" in page.js("document.getElementById('found').textContent")
    assert page.js("getComputedStyle(document.getElementById('found')).color") != "rgb(91, 101, 112)"
    page.key("Escape")
    assert len(page.js(IDS)) > 10
    assert page.js("document.getElementById('query').value") == ""


def test_a_click_opens_the_card_and_back_and_forward_work(page: Browser) -> None:
    page.click("#row-3 .reads")
    page.until(f"{HEADING} === 'Feature 3' && {READY}")
    assert page.js("location.hash") == "#feature=3"
    assert page.js("document.title") == "Feature 3 · Features of a test"
    assert page.js("document.activeElement.tagName") == "H2"
    assert page.js("document.querySelector('[aria-selected=true] .id').textContent") == "3"
    page.click("#panel a[href='#feature=4']")
    page.until(f"{HEADING} === 'Feature 4' && {READY}")
    page.js("history.back()")
    page.until(f"{HEADING} === 'Feature 3' && {READY}")
    page.js("history.back()")
    page.until("document.getElementById('panel').hidden")
    page.js("history.forward()")
    page.until(f"{HEADING} === 'Feature 3' && {READY}")


def test_an_address_opens_its_card(browser: Browser, url: str) -> None:
    browser.size(1400, 860)
    browser.open(f"{url}#feature=77&q=output_score%3E0&sort=-frequency")
    browser.until(f"{HEADING} === 'Feature 77' && {READY}")
    assert browser.js("document.getElementById('query').value") == "output_score>0"
    assert browser.js("document.getElementById('sort').value") == "frequency"
    browser.until("[...document.querySelectorAll('[aria-selected=true]')].length === 1")
    browser.open(f"{url}#feature=99999")
    browser.until(f"{HEADING} === 'Feature 99999'")
    assert "is not on this page" in browser.js("document.getElementById('panel').textContent")
    assert browser.problems == []


def test_the_card_says_everything(page: Browser) -> None:
    _open(page, 3)
    text = page.js("document.getElementById('panel').textContent")
    for part in ("dense", "Tested on 80 held-out windows", "0.5 is chance", "Promoted", "Suppressed", "Decile 10", "random 0.0500: above",
                 "no more than random", "Unsteered", "Random direction, equal norm", "200,000 tokens were read", "Output score"):  # fmt: skip
        assert part in text, part
    card = full_card(3, N)
    active = sum(1 for w in card["windows"] for v in w["values"] if v)
    assert page.js("document.querySelectorAll('#panel mark').length") == active
    assert page.js("document.querySelectorAll('#panel svg rect').length") == 20
    _open(page, 6)
    text = page.js("document.getElementById('panel').textContent")
    for part in ("No explanation was made", "not measured", "No context was collected", "Neighbours were not measured", "Not steered with",
                 "No tokens were read", "distribution of activations was not measured"):  # fmt: skip
        assert part in text, part
    assert "null" not in text
    assert "NaN" not in text


def test_the_deciles_of_the_activation_fold_below_the_strongest_contexts(page: Browser) -> None:
    _open(page, 3)
    fold = "document.querySelector('#panel section details')"
    assert page.js(f"{fold}.querySelector('summary').textContent") == "By decile of the activation: 10 more contexts"
    assert page.js(f"[{fold}.open, {fold}.querySelectorAll('h4').length]") == [False, 10]
    assert page.js(f"{fold}.previousElementSibling.children.length") == 5, "the strongest are there without a click"
    last = "[...document.querySelectorAll('#panel mark')].filter((mark) => !mark.closest('details')).pop()"
    page.js(f"{last}.focus()")
    page.key("ArrowRight")
    assert page.js(f"document.activeElement === {last}"), "the keyboard does not go into what is folded"
    page.js(f"{fold}.open = true")
    page.key("ArrowRight")
    assert page.js(f"{fold}.contains(document.activeElement)")


def test_hover_and_focus_show_the_value(page: Browser) -> None:
    _open(page, 3)
    largest = max(v for w in full_card(3, N)["windows"] for v in w["values"] if v is not None)
    page.hover("#panel mark.most")
    page.until("!document.getElementById('tip').hidden")
    assert page.js("document.getElementById('tip').textContent") == f"{largest:.3g}, 100% of the largest shown"
    box = page.js(
        "(() => { const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })()"
    )
    assert box[0] >= 0
    assert box[1] >= 0
    assert box[2] <= 1400
    assert box[3] <= 860
    page.hover("#panel .left")
    page.until("document.getElementById('tip').textContent === 'no activation was recorded here'")
    page.hover("#panel h2")
    page.until("document.getElementById('tip').hidden")
    assert page.js("document.querySelectorAll('#panel mark[tabindex=\"0\"]').length") == 1, "one stop for Tab"
    page.js("document.getElementById('panel').scrollTop = 0")
    page.js(
        "(async () => { document.querySelector('#panel mark[tabindex=\"0\"]').focus();"
        " for (const _ of [1, 2, 3]) await new Promise((go) => requestAnimationFrame(go)); })()"
    )
    assert not page.js("document.getElementById('tip').hidden"), "focus scrolls, and the tip stays"
    assert page.js("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.key("ArrowRight")
    assert page.js("[...document.querySelectorAll('#panel mark')].indexOf(document.activeElement)") == 1
    assert page.js(HEADING) == "Feature 3"
    heard = page.js("document.querySelector('#panel mark.most .sr').textContent")
    assert heard.strip() == f"({largest:.3g})"


def test_the_keyboard_alone_is_enough(page: Browser) -> None:
    page.key("/")
    assert page.js("document.activeElement.id") == "query"
    page.type("output_score>=0")
    page.key("ArrowDown")
    assert page.js("document.activeElement.id") == "grid"
    page.key("ArrowDown")
    page.key("ArrowDown")
    active = "document.getElementById(document.getElementById('grid').getAttribute('aria-activedescendant'))"
    assert page.js(f"{active}.querySelector('.id').textContent") == "2"
    page.key("End")
    assert page.js(f"{active}.querySelector('.id').textContent") == str(N - 1)
    box = page.js(f"(() => {{ const b = {active}.getBoundingClientRect(); return [b.top, b.bottom]; }})()")
    assert box[0] > 100
    assert box[1] <= 861
    page.key("PageUp")
    assert 80 < int(page.js(f"{active}.querySelector('.id').textContent")) < N - 5
    page.key("Home")
    page.key("Enter")
    page.until(f"{HEADING} === 'Feature 0' && {READY}")
    page.key("ArrowRight")
    page.until(f"{HEADING} === 'Feature 1' && {READY}")
    page.key("ArrowLeft")
    page.until(f"{HEADING} === 'Feature 0' && {READY}")
    page.key("ArrowLeft")
    assert page.js(HEADING) == "Feature 0"
    page.key("Escape")
    page.until("document.getElementById('panel').hidden")
    assert page.js("document.activeElement.id") == "grid"
    assert page.js("document.getElementById('query').value") == "output_score>=0", "Escape closes the card first"


def test_hostile_text_is_text(page: Browser) -> None:
    from tests.report.feature_cards import HOSTILE

    _open(page, 5)
    chips = page.js("[...document.querySelectorAll('#panel .lens.up .chip')].map((e) => e.textContent)")
    assert chips[:9] == [visible(text) for text in HOSTILE[:9]]
    assert chips[9].startswith("longlong")
    assert chips[9].endswith("… (19600 characters more)")
    assert page.js("document.querySelectorAll('#panel script, #panel img, #rows script, #rows img').length") == 0
    assert page.js(
        "[...document.querySelectorAll('#panel .chip, #panel .text > *:not(wbr)')].every((e) => getComputedStyle(e).unicodeBidi === 'isolate')"
    )
    assert page.js("document.getElementById('panel').scrollWidth <= document.getElementById('panel').clientWidth")
    assert _search(page, '"<script>"') == [5]


def test_ten_thousand_features_scroll_with_few_rows_drawn(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "many.html"
    some = [{key: card[key] for key in ("scores", "frequency", "promoted")} for card in many_cards(50)]
    cards = (bare_card(feature) | some[feature % 50] for feature in range(10_000))
    file.write_text(feature_page(cards).html, encoding="utf-8")
    browser.size(1400, 860)
    browser.open(file.as_uri())
    assert browser.js("document.getElementById('grid').ariaRowCount") == "10001"
    drawn = []
    for share in (0, 0.3, 0.77, 1):
        browser.js(f"grid.scrollTop = {share} * (grid.scrollHeight - grid.clientHeight)")
        browser.until(f"{IDS}.includes(Math.floor({share} * 9980))")
        drawn.append(browser.js("document.querySelectorAll('#rows .row').length"))
        covered = browser.js(
            "(() => { const top = head.getBoundingClientRect().bottom, b = grid.getBoundingClientRect();"
            " return [top + 2, (top + b.bottom) / 2, b.bottom - 2].every((y) => document.elementFromPoint(300, y).closest('#rows .row')); })()"
        )
        assert covered, f"an empty stretch at {share}"
    assert max(drawn) < 60
    assert browser.js("document.querySelectorAll('*').length") < 1500
    browser.js("location.hash = '#feature=9999'")
    browser.until(f"{HEADING} === 'Feature 9999' && {READY}")
    assert _search(browser, "#4321") == [4321]
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_contrast(page: Browser, dark: bool) -> None:
    page.size(1400, 860, dark=dark)
    _open(page, 3)
    worst = page.js(_CONTRAST)
    assert worst[0] >= 4.5, worst


def test_a_phone_shows_one_thing_at_a_time(browser: Browser, url: str) -> None:
    browser.size(390, 800, phone=True)
    browser.open(url)
    assert browser.js("document.documentElement.scrollWidth") <= 390
    assert browser.js("[...document.querySelectorAll('#row-0 .num')].filter((e) => e.offsetParent).length") == 1
    browser.js("document.getElementById('row-2').click()")
    browser.until(f"{HEADING} === 'Feature 2' && {READY}")
    assert browser.js("document.getElementById('panel').getBoundingClientRect().width") == 390
    assert browser.js("document.getElementById('panel').scrollWidth") <= 390
    browser.js("document.querySelectorAll('#panel details').forEach((fold) => { fold.open = true; })")
    widths = browser.js("[...document.querySelectorAll('#panel tbody th')].map((e) => e.getBoundingClientRect().width)")
    assert min(widths) >= 80, "text is not squeezed into a few letters per line"
    browser.js("document.querySelector('#panel [aria-label=\"Close the card\"]').click()")
    browser.until("document.getElementById('panel').hidden")
    browser.js(
        "(() => { const s = document.getElementById('sort'); s.value = 'max_act'; s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.js("document.querySelector('#head .key').textContent") == "Largest activation"
    assert browser.problems == []


def test_roles_and_names(page: Browser) -> None:
    _open(page, 3)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in tree if not node.get("ignored")]
    assert {"grid", "row", "columnheader", "gridcell", "searchbox", "status", "heading", "table"} <= set(roles)
    nameless = [
        json.dumps(node["role"])
        for node in tree
        if not node.get("ignored")
        and node.get("role", {}).get("value")
        in ("button", "searchbox", "grid", "combobox", "link", "img", "columnheader")
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []


# Mean of the ground under a text is taken as the nearest opaque ancestor's, with tints laid over it.
_CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parse = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
  const light = (c) => [0, 1, 2].map((i) => c[i] / 255).map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4).reduce((s, x, i) => s + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    const over = [];
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); over.push(c); if (c[3] === 255) break; }
    return over.reduceRight((under, c) => [0, 1, 2].map((i) => c[i] * c[3] / 255 + under[i] * (1 - c[3] / 255)), [255, 255, 255]);
  };
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.offsetParent || e.matches('script, style, .sr, button:disabled') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.className + ': ' + e.textContent.slice(0, 60)];
  }
  return worst;
})()"""
