"""The playground in a real browser: search, choose, write, look, stop, errors, hostile text."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.browser import Browser, running
from tests.report.feature_cards import HOSTILE, hostile_card
from tests.serve.toys import TOKEN, tiny_playground
from workbench.core.records import to_jsonable
from workbench.features.card import FeatureCard, LensToken
from workbench.interventions.intervention import Intervention
from workbench.report.features.encode import clip, pack_cards
from workbench.serve.app import playground_app
from workbench.serve.desk import Desk
from workbench.serve.guard import Guard
from workbench.serve.index import feature_index
from workbench.serve.playground import Playground

pytestmark = pytest.mark.browser

BUSY = "document.getElementById('results').getAttribute('aria-busy') === 'true'"
DONE = f"!({BUSY}) && document.querySelector('#texts .arm [data-tip]') !== null"
ERROR = "document.getElementById('error').hidden ? '' : document.getElementById('error').textContent"


class Hostile(Playground):
    """A playground whose tokens are the worst that a vocabulary can hold."""

    def shown(self, token: int) -> str:
        return clip(HOSTILE[token % len(HOSTILE)])


@contextlib.contextmanager
def serving(playground: Playground, index: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """The address of a server in a thread, and the server."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        desk = Desk()
        config = uvicorn.Config(
            playground_app(playground, Guard(TOKEN, port), desk, index), log_level="error", ws="none"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield "http" + f"://127.0.0.1:{port}/?token={TOKEN}", server
        finally:
            desk.stop_all()
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        browser.size(1400, 900)
        yield browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    playground = tiny_playground()
    with serving(playground, feature_index(playground)) as (url, _):
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    """The page freshly opened, its form as new; afterwards the console is silent and only the server was asked."""
    browser.open(url)
    browser.js("sessionStorage.clear()")
    browser.open(url)
    browser.until("document.getElementById('about').textContent.includes('layers')")
    yield browser
    assert browser.problems == []
    assert {request.partition("/api/")[0].partition("?")[0].rstrip("/") for request in browser.requests} == {
        url.partition("/?")[0]
    }


def _set(page: Browser, field: str, value: str) -> None:
    page.js(f"document.getElementById({json.dumps(field)}).value = {json.dumps(value)}")


def _choose(page: Browser, query: str) -> None:
    page.js("document.activeElement.blur()")
    page.key("/")
    page.type(query)
    page.key("Enter")


def _write(page: Browser, tokens: int = 6) -> None:
    _set(page, "max_new_tokens", str(tokens))
    page.click("#run")
    page.until(DONE)


def test_the_token_leaves_the_address_and_a_reload_needs_none(page: Browser, url: str) -> None:
    assert page.js("location.href") == url.partition("?")[0]
    assert page.js("document.cookie") == "", "the script can't read it"
    page.open(url.partition("?")[0])
    page.until("document.getElementById('about').textContent.includes('resid_post.1')")


def test_search_choose_write_and_see_all_sides(page: Browser) -> None:
    page.key("/")
    page.type("#3")
    assert page.js("[...document.querySelectorAll('#hits .id')].map((e) => e.textContent)") == ["#3"]
    page.key("Enter")
    assert page.js("document.querySelector('#chosen .id').textContent") == "#3"
    assert page.js("document.activeElement.getAttribute('aria-label')") == "Strength of feature 3"
    _choose(page, "#5")
    page.js(
        "(() => { const s = document.querySelector('#chosen-5 select'); s.value = 'clamp'; s.dispatchEvent(new Event('change')); })()"
    )
    assert page.js("document.querySelector('#chosen-5 .unit').textContent") == "activation"
    _write(page)
    titles = page.js("[...document.querySelectorAll('.arm h3')].map((e) => e.firstChild.textContent)")
    assert titles == ["Unsteered", "With the edits", "Control: random direction"]
    assert page.js(
        "[...document.querySelectorAll('.arm')].map((e) => e.querySelectorAll('.text [data-tip]').length)"
    ) == [6, 6, 6]
    assert (
        page.js("document.querySelector('#arm-steered h3 small').textContent") == "steer #3 2 × a_max, clamp #5 at 10"
    )
    rows = page.js("[...document.querySelectorAll('#edits tbody tr')].map((e) => e.textContent)")
    assert len(rows) == 3
    assert "SAEAddMax at resid_post.1" in rows[0]
    assert "SAEClamp" in rows[1]
    assert "equal norm" in rows[2]
    assert page.js("document.querySelectorAll('#arm-unsteered svg rect').length") == 12
    assert page.js("document.getElementById('error').hidden")


def test_tokens_tell_their_probabilities_on_hover_and_by_keyboard(page: Browser) -> None:
    _choose(page, "#3")
    _write(page)
    page.hover("#arm-steered [data-place='2']")
    tip = page.until("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert tip.startswith("token 3")
    for model in (
        "unsteered: log-probability",
        "with the edits: log-probability",
        "random direction: log-probability",
        "KL",
    ):
        assert model in tip
    page.js("document.querySelector('#texts [data-tip]').focus()")
    page.key("ArrowRight")
    assert page.js("document.activeElement.dataset.place") == "1"
    assert page.js("document.getElementById('tip').textContent").startswith("token 2")
    page.key("ArrowLeft")
    assert page.js("document.activeElement.dataset.place") == "0"
    page.key("Escape")
    assert page.js("document.getElementById('tip').hidden")


def test_colours_follow_the_choice(page: Browser) -> None:
    _choose(page, "#3")
    _write(page)
    colour = "getComputedStyle(document.querySelector('#arm-steered [data-place=\"1\"]')).backgroundColor"
    seen = set()
    for mode in page.js("[...document.getElementById('colour').options].map((o) => o.value)"):
        _set(page, "colour", mode)
        page.js("document.getElementById('colour').dispatchEvent(new Event('change'))")
        seen.add(page.js(colour))
        assert page.js("document.getElementById('legend').textContent") or mode == "none"
    assert len(seen) > 3
    assert "rgba(0, 0, 0, 0)" in seen


def test_the_keyboard_is_enough(page: Browser) -> None:
    page.key("/")
    assert page.js("document.activeElement.id") == "query"
    assert page.js("document.querySelectorAll('#hits [role=option]').length") == 24, "everything is offered at once"
    for _ in range(3):
        page.key("ArrowDown")
    page.key("ArrowUp")
    assert page.js("document.querySelector('#hits [aria-selected=true] .id').textContent") == "#1"
    assert page.js("document.getElementById('query').getAttribute('aria-activedescendant')") == "hit-1"
    page.key("Enter")
    assert page.js("document.querySelector('#chosen .id').textContent") == "#1"
    page.key("/")
    assert page.js("document.activeElement.type") == "number", "a slash in a field is a slash"
    _set(page, "max_new_tokens", "5")
    page.call("Input.dispatchKeyEvent", type="rawKeyDown", key="Enter", windowsVirtualKeyCode=13, modifiers=2)
    page.until(DONE)
    assert page.js("document.querySelectorAll('.arm').length") == 3


def test_a_run_stops_and_what_was_written_stays(page: Browser) -> None:
    _set(page, "max_new_tokens", "1900")
    page.click("#run")
    page.until("document.querySelectorAll('#writing-unsteered .tok').length > 3")
    assert page.js("document.getElementById('progress').value") < 0.5
    assert page.js("document.getElementById('run').disabled")
    page.click("#stop")
    page.until(f"!({BUSY})")
    assert "stopped" in page.js("document.getElementById('status').textContent")
    assert page.js("document.querySelectorAll('#writing-unsteered .tok').length") > 3
    _write(page)


def test_errors_are_told_and_the_form_and_the_texts_stay(page: Browser) -> None:
    _choose(page, "#3")
    _write(page)
    _set(page, "prompt", "")
    # A refused request is also an entry of the browser's own log.
    page.click("#run")
    page.until(ERROR)
    assert "The prompt is empty" in page.js(ERROR)
    assert page.js("document.querySelectorAll('.arm').length") == 3, "the texts of the last run are still there"
    assert page.js("document.querySelector('#chosen .id').textContent") == "#3"
    _set(page, "prompt", "Again")
    _write(page)
    assert page.js("document.getElementById('error').hidden")
    assert page.js("document.querySelector('#arm-unsteered .before').textContent") == "Again"
    assert page.problems.pop().startswith("Failed to load resource: the server responded with a status of 400")


def test_the_form_outlives_a_reload(page: Browser, url: str) -> None:
    _choose(page, "#3")
    page.js(
        "(() => { const p = document.getElementById('prompt'); p.value = 'Kept'; p.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    page.open(url)
    page.until("document.querySelector('#chosen .id') !== null")
    assert page.js("document.getElementById('prompt').value") == "Kept"
    page.click("#chosen button")
    assert page.js("document.querySelectorAll('#chosen li').length") == 0


def test_edits_are_taken_away_as_python_and_what_cannot_be_is_told(page: Browser) -> None:
    said = "document.getElementById('taken').hidden ? '' : document.getElementById('taken-text').textContent"
    _set(page, "prompt", "<b>A</b>")
    page.click("#python")
    code = page.until(said)
    assert code.startswith("import workbench as wb\n")
    assert "prompt = '<b>A</b>'" in code
    assert page.js("document.querySelectorAll('#taken b').length") == 0
    page.click("#taken-close")
    assert page.js("document.getElementById('taken').hidden")
    _choose(page, "#3")
    page.click("#save")
    page.until(ERROR)
    assert "--out FOLDER" in page.js(ERROR)
    assert page.problems.pop().startswith("Failed to load resource: the server responded with a status of 400")


def test_edits_are_downloaded_as_a_file_that_is_loaded(page: Browser, tmp_path: Path) -> None:
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    said = "document.getElementById('taken').hidden ? '' : document.getElementById('taken-text').textContent"
    _choose(page, "#3")
    page.click("#download")
    code = page.until(said)
    file = tmp_path / code.split('"')[1]
    ends = time.monotonic() + 20
    while not file.is_file() and time.monotonic() < ends:
        time.sleep(0.05)
    (edit,) = Intervention.load(file).edits
    assert edit.op.name == "SAEAddMax" and code == f'edits = wb.Intervention.load("{file.name}")'


def test_active_features_are_listed_by_token_and_chosen_by_a_press(page: Browser) -> None:
    rows = "[...document.querySelectorAll('#active tbody tr')].map((e) => e.textContent)"
    _set(page, "prompt", "Hello")
    page.click("#read")
    shown = page.until(f"document.getElementById('active').hidden ? null : {rows}")
    assert [row[0] for row in shown] == list("Hello")
    assert shown[0].endswith("left out: first token")
    assert page.js("document.querySelectorAll('#active tbody tr:nth-child(2) button').length") == 5
    first = page.js("document.querySelector('#active tr button .id').textContent")
    page.click("#active tr button")
    page.click("#active tr button")
    assert page.js("[...document.querySelectorAll('#chosen .id')].map((e) => e.textContent)") == [first]


def test_a_server_that_is_gone_is_told(browser: Browser) -> None:
    playground = tiny_playground(with_sae=False)
    with serving(playground, None) as (url, server):
        browser.open(url)
        browser.until("document.getElementById('about').textContent.includes('no SAE')")
        assert browser.js("document.getElementById('choose').hidden")
        _set(browser, "max_new_tokens", "4")
        browser.click("#run")
        browser.until(DONE)
        assert browser.js("document.querySelectorAll('.arm').length") == 1
        server.should_exit = True
        time.sleep(1.0)
    browser.click("#run")
    browser.until(ERROR)
    assert "Is `workbench serve` still running?" in browser.js(ERROR)
    assert browser.js("document.querySelectorAll('.arm').length") == 1
    assert all("ERR_" in problem for problem in browser.problems)


def test_hostile_text_is_text_everywhere(browser: Browser) -> None:
    inner = tiny_playground()
    playground = Hostile(inner.model, inner.sae)
    # A stray token of each kind promoted by feature 2, and a card of the worst.
    bad = FeatureCard(
        feature=2, frequency=0.5, max_act=1.0, n_tokens=10,
        promoted=tuple(LensToken(text, i, 1.0) for i, text in enumerate(HOSTILE)),
    )  # fmt: skip
    index = pack_cards([to_jsonable(bad), to_jsonable(hostile_card(1))]).index
    with serving(playground, index) as (url, _):
        browser.open(url)
        browser.until("document.getElementById('about').textContent.includes('layers')")
        before = browser.js("document.querySelectorAll('script, img, iframe, svg, b, a').length")
        assert browser.js("document.getElementById('suggested-why').textContent").startswith("Suggested: ")
        assert browser.js("document.querySelector('#suggested button .id').textContent") == "#1"
        browser.key("/")
        browser.type("<")
        assert browser.js("document.querySelectorAll('#hits mark').length") > 0
        assert set(browser.js("[...document.querySelectorAll('#hits mark')].map((e) => e.textContent)")) == {"<"}
        assert browser.js("document.querySelectorAll('#preview .chip').length") > 3
        browser.key("Escape")
        _choose(browser, "#2")
        assert browser.js("document.getElementById('preview').hidden")
        assert browser.js("document.querySelectorAll('#suggested button').length") == 1
        browser.click("#suggested button")
        _choose(browser, "#9")
        _set(browser, "prompt", "".join(HOSTILE[:6]))
        browser.click("#read")
        browser.until("document.querySelectorAll('#active button').length > 20")
        browser.click("#python")
        browser.until(ERROR)
        assert "made in memory" in browser.js(ERROR)
        assert browser.problems.pop().startswith("Failed to load resource")
        _write(browser, 30)
        shown = set(browser.js("[...document.querySelectorAll('.arm .tok')].map((e) => e.textContent)"))
        assert shown <= {clip(text) for text in HOSTILE}
        assert len(shown) > 2
        browser.hover("#arm-steered [data-place='1']")
        browser.until("!document.getElementById('tip').hidden")
        browser.hover("#arm-steered svg rect:nth-of-type(3)")
        after = browser.js(
            "document.querySelectorAll('script, img, iframe, b, a').length + document.querySelectorAll('svg').length - 3"
        )
        assert after == before
        assert browser.js("document.title") == "Playground · tiny-llama"
        assert browser.problems == []


def test_it_fits_a_phone_and_the_dark(page: Browser) -> None:
    page.size(390, 800, phone=True, dark=True)
    try:
        _choose(page, "#3")
        _write(page)
        assert page.js("document.documentElement.scrollWidth") <= 390
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 29)"
    finally:
        page.size(1400, 900)
