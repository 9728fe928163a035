"""The report page in a real browser: one screen of summary, tables that fold and scroll, phone, print, dark."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.report.browser import Browser, running
from workbench.core.stats import Estimate, wilson
from workbench.report.base import Bars, Headline, Says, Section, Table, Text
from workbench.report.page import Page, page_html

pytestmark = pytest.mark.browser

STEPS = ("model", "glitch", "sae", "features", "steering", "shift", "refusal")
N = 30
LONG = "a long explanation of why the judge calls this feature spurious, with the words that it is active on " * 2
SAYS = Says(*(
    f"Steering with features makes the model write their tokens {more} often than random directions of the same norm do."
    for more in ("more", "no more", "less")
))  # fmt: skip


def _section(title: str, shift: float) -> Section:
    names = ("features", "random directions of the same norm", "instruction in the prompt, no edit")
    shares = tuple(
        Estimate(v, v - 0.05, v + 0.05, 36, "bootstrap", "prompts x 6 features") for v in (0.5 + shift, 0.5, 0.4)
    )
    columns = ("arm", *(f"share of lens tokens, measure {i}" for i in range(10)))
    arms = Table(columns, tuple((name, *[share] * 10) for name, share in zip(names, shares, strict=True)), "Every arm")
    verdicts = tuple((i, wilson(1, 3 + i), LONG) for i in range(N))
    told = Headline.read(SAYS, value=(arms, names[0], columns[1]), control=(arms, names[1], columns[1]))
    blocks = (
        Text("How it was done. " * 40), Bars("Share", names, shares, "share"), arms,
        Table(("feature", "effect", "why"), verdicts, "Candidates. Judged by the statistics judge."),
    )  # fmt: skip
    findings = tuple(f"Finding {i}: {shares[0]} of the tokens are lens tokens." for i in range(8))
    return Section(title, blocks, findings, {"share": shares[0]}, told)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    sections = {step: _section(f"Step {step}", 0.2 - 0.1 * i) for i, step in enumerate(STEPS)}
    file = tmp_path_factory.mktemp("page") / "report.html"
    page = Page(title="Workbench demo: a model", sections=sections, config={"a": 1}, feature_page="features.html")
    file.write_text(page_html(page), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    browser.size(1200, 900)
    browser.open(url)
    yield browser
    assert browser.problems == []


def _box(page: Browser, selector: str) -> dict[str, float]:
    return json.loads(page.js(f"JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect())"))


def test_the_summary_fits_one_screen_with_the_navigation_above_it(page: Browser) -> None:
    assert page.js("document.querySelectorAll('.summary tbody tr').length") == len(STEPS)
    assert page.js("[...new Set([...document.querySelectorAll('.summary .badge')].map((b) => b.textContent))]") == [
        "works", "no better than its control", "fails",
    ]  # fmt: skip
    assert _box(page, "nav")["bottom"] <= _box(page, ".summary")["top"]
    assert _box(page, ".summary")["bottom"] <= 900
    assert page.js("document.documentElement.scrollHeight") < 1100 * len(STEPS)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True), (1900, False)])
def test_nothing_makes_the_page_wider_than_the_window(page: Browser, width: int, dark: bool) -> None:
    page.size(width, 900, phone=width < 500, dark=dark)
    page.js("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert _box(page, "td.long")["width"] >= 250, "a column of text is wide enough to be read"
    used = page.js("Math.max(...[...document.querySelectorAll('.scroll')].map((e) => e.getBoundingClientRect().right))")
    assert used >= 0.75 * min(width, 1472), "a wide table uses the width of the window"
    ground = page.js("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark


def test_long_tables_fold_and_the_first_column_stays(page: Browser) -> None:
    page.js("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    shown = "[...document.querySelectorAll('#step-shift figure:has(.fold) tbody tr')].filter((r) => r.offsetHeight > 0).length"
    assert page.js(shown) == 10
    page.click("#step-shift .fold input")
    assert page.js(shown) == N
    cell = "#step-shift figure.table:not(:has(.fold)) tbody td"
    before = _box(page, cell)["left"]
    page.js(f"document.querySelector({cell!r}).closest('.scroll').scrollLeft = 500")
    assert page.js(f"document.querySelector({cell!r}).closest('.scroll').scrollLeft") > 300
    assert _box(page, cell)["left"] == pytest.approx(before, abs=1)


def test_n_stands_once_in_the_caption(page: Browser) -> None:
    figure = "document.querySelector('#step-shift figure.table:not(:has(.fold))')"
    assert page.js(f"{figure}.textContent.split('n = 36').length - 1") == 1
    mixed = page.js("document.querySelector('#step-shift figure:has(.fold) tbody').textContent")
    assert "n = 3 rows" in mixed and "n = 7 rows" in mixed, "where rows differ in n, each says its own"


def test_a_number_of_the_summary_leads_to_its_row(page: Browser) -> None:
    link = page.js("document.querySelector('.summary td:nth-child(3) a').getAttribute('href')")
    shown = page.js("document.querySelector('.summary td:nth-child(3) a').textContent")
    page.click(".summary td:nth-child(3) a")
    page.until(f"location.hash === {link!r}")
    row = f"document.querySelector({link!r})"
    page.until(f"{row}.closest('details').open")
    assert shown in page.js(f"{row}.textContent") and page.js(f"{row}.getBoundingClientRect().top") < 900


def test_features_lead_to_their_cards(page: Browser) -> None:
    href = "document.querySelector('#step-shift figure:has(.fold) tbody a').getAttribute('href')"
    assert page.js(href) == "features.html#feature=0"


def test_paper_shows_what_the_screen_folds(page: Browser) -> None:
    page.call("Emulation.setEmulatedMedia", media="print")
    rows = "[...document.querySelectorAll('#step-shift figure:has(.fold) tbody tr')]"
    assert page.js(f"{rows}.filter((r) => r.offsetHeight > 0).length") == N
    assert page.js("document.querySelector('#step-shift details p').checkVisibility({contentVisibilityAuto: true})")
    page.call("Emulation.setEmulatedMedia", media="")
