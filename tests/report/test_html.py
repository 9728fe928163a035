from __future__ import annotations

import html.parser
import math
import re
from pathlib import Path

import pytest

from workbench.core.stats import Estimate
from workbench.report.base import Bars, Section, Table, Text, Tokens
from workbench.report.page import Page, page_html, section_html

NASTY = "<script>alert(1)</script>\"'&\u202e\u200fא\n\t\x00\udc80</style>{{ 7*7 }}"


class Tags(html.parser.HTMLParser):
    VOID = {"meta", "br", "wbr", "link", "img", "input", "use", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def _nasty_page() -> str:
    section = Section(
        NASTY,
        (
            Text(NASTY),
            Table((NASTY,), ((NASTY,), (None,)), NASTY),
            Bars(NASTY, (NASTY,), (0.5,), NASTY, None, NASTY),
            Tokens((((NASTY, 0.5), (NASTY, None)),), NASTY),
        ),
        (NASTY,),
        {NASTY: NASTY, "n": Estimate(1.0, 0.5, 1.5, 3, NASTY, NASTY)},
    )
    return page_html(
        Page(
            title=NASTY,
            run=NASTY,
            started=NASTY,
            sections={"a": section},
            config={NASTY: [NASTY]},
            environment={NASTY: NASTY},
            notice=NASTY,
        )  # fmt: skip
    )


def test_nothing_that_a_token_holds_becomes_markup() -> None:
    page = _nasty_page()
    tags = Tags(page)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names
    assert names.count("style") == 1
    assert "49" not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)


def test_characters_that_hide_or_reorder_are_shown() -> None:
    page = _nasty_page()
    for char in ("\u202e", "\u200f", "\x00", "\udc80", "\t"):
        assert char not in page
    assert "⟨U+202E⟩" in page
    assert "א⏎⇥␀" in page
    page.encode("utf-8")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = _nasty_page()
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    for tag, attributes in Tags(page).seen:
        assert "src" not in attributes
        assert tag != "link"
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_findings_stand_above_the_steps() -> None:
    sections = {"a": Section("First", (Text("body"),), ("It works (n = 40 prompts).",))}
    page = page_html(Page(title="t", sections=sections))
    assert page.index("It works (n\u00a0=\u00a040 prompts)") < page.index("<p>body</p>")


def test_numbers_are_shown_with_interval_and_n_and_holes_as_not_available() -> None:
    estimate = Estimate(0.9412, 0.93, 0.95, 200, "bootstrap", "documents")
    rows = ((estimate,), (math.nan,), (math.inf,), (None,), (1234567,), (4.14e-10,), (5651.2,))
    page = page_html(Page(title="t", sections={"a": Section("s", (Table(("value",), rows),), (), {"bad": math.nan})}))
    assert "<b>0.941</b> <small>[0.930, 0.950]</small>" in page
    assert "<figcaption>n = 200 documents.</figcaption>" in page
    assert 'title="95% interval, bootstrap, n = 200 documents"' in page
    assert ">&lt;1e-7<" in page and ">5,650<" in page
    assert page.count('<span class="na">n/a</span>') == 4
    assert "1,234,567" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_config_and_environment_are_flat_and_complete() -> None:
    page = page_html(
        Page(title="t", config={"sae": {"k": 32}, "layers": [1, 2], "fast": False}, environment={"git": None})
    )
    for key, value in (("sae.k", "32"), ("layers", "1, 2"), ("fast", "no"), ("git", "none")):
        assert f'<th scope="row">{key}</th><td>{value}</td>' in page


def test_an_unfinished_run_says_so() -> None:
    assert 'role="status">Stopped &lt;here&gt;' in page_html(Page(title="t", notice="Stopped <here>"))
    assert 'role="status"' not in page_html(Page(title="t"))


def test_the_same_values_give_the_same_bytes() -> None:
    assert _nasty_page() == _nasty_page()


def test_a_notebook_block_styles_only_itself() -> None:
    shown = section_html(Section("s", (Text("x"),)))
    assert shown.startswith('<div class="wb-report"><style>.wb-report {')
    assert ":root" not in shown
    assert Tags(shown).open == []


@pytest.mark.parametrize("name", ["report.css", "report.html.jinja"])
def test_the_template_is_shipped_with_the_package(name: str) -> None:
    import tomllib

    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["workbench"]
    assert any((root / "workbench/report" / name) in (root / "workbench").glob(pattern) for pattern in patterns)
