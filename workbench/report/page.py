"""The report page: one file that opens anywhere, on a phone, on paper, in ten years."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from workbench.core.display import clipped
from workbench.core.numbers import counted
from workbench.report.blockhtml import block_html
from workbench.report.blocks import Block, Table, Text
from workbench.report.plots import DARK, LIGHT, colour_css, drawn_once
from workbench.report.section import Section
from workbench.report.sectionhtml import badge, number_html, section_body
from workbench.report.text import sentence, visible

if TYPE_CHECKING:
    from jinja2 import Template

_FOLDER = Path(__file__).parent

NOTEBOOK_BYTES = 120_000
"""What the blocks of a section may take in a notebook, which keeps every output that was shown."""
_NOTEBOOK_ROWS, _NOTEBOOK_TEXT = 50, 600


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report page shows.

    Attributes:
        started: UTC time in ISO form.
        notice: shown on top, for a run that is not finished.
        feature_page: page with the cards of the SAE's features, relative to this one; "" without one.
    """

    title: str
    run: str = ""
    started: str = ""
    sections: Mapping[str, Section] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    notice: str = ""
    feature_page: str = ""


def page_html(page: Page) -> str:
    """The whole page: no script, nothing loaded from elsewhere, everything escaped."""
    return _template().render(
        page=page,
        style=Markup(style_css()),
        settings=list(_flat(page.config)),
        environment=list(_flat(page.environment)),
    )


def section_html(section: Section) -> str:
    """One section for a notebook: carries its own style, changes nothing outside itself, and is bounded.

    Of a long table the first rows are shown, and of a section as many blocks as fit `NOTEBOOK_BYTES`.
    """
    style, room = style_css(scope=".wb-report"), NOTEBOOK_BYTES
    headline, left_out = section.headline, 0
    blocks: list[Block] = []
    places = () if headline is None else (headline.place, headline.control_place, headline.difference_place)
    read = {(place.table, place.row) for place in places if place is not None}
    with drawn_once():
        for block in (_shortened(block, read) for block in section.blocks):
            room -= len(block_html(block).encode())
            is_read = isinstance(block, Table) and block.name in dict(read)
            blocks += [block] if room >= 0 or is_read else []
            left_out += room < 0 and not is_read
        if left_out:
            blocks.append(Text(f"{counted(left_out, 'parts')} of this section are in section().blocks alone."))
        findings = tuple(clipped(text, _NOTEBOOK_TEXT) for text in section.findings[:_NOTEBOOK_ROWS])
        metrics = dict(itertools.islice(section.metrics.items(), _NOTEBOOK_ROWS))
        short = replace(section, blocks=tuple(blocks), findings=findings, metrics=metrics)
        body = section_body(short, 3)
    return str(Markup('<div class="wb-report"><style>{}</style>{}</div>').format(Markup(style), body))


def _shortened(block: Block, read: Set[tuple[str, str]]) -> Block:
    """A table with its first rows and those that the headline was read from; other blocks as they are."""
    if not isinstance(block, Table) or len(block.rows) <= _NOTEBOOK_ROWS:
        return block
    rows = [row for i, row in enumerate(block.rows) if i < _NOTEBOOK_ROWS or (block.name, str(row[0])) in read]
    return replace(block, rows=tuple(rows))


def style_css(scope: str = ":root") -> str:
    """The style sheet with its colours; with another scope every rule is nested in it."""
    rules = (_FOLDER / "report.css").read_text(encoding="utf-8")
    colours = (
        f"{scope} {{ {colour_css(LIGHT)} color-scheme: light dark; }}\n"
        f"@media (prefers-color-scheme: dark) {{ {scope} {{ {colour_css(DARK)} }} }}\n"
        # paper is white whatever the screen is
        f"@media print {{ {scope} {{ {colour_css(LIGHT)} color-scheme: light; }} }}\n"
    )
    # a notebook may be dark while the system is light: the block brings its own ground
    ground = "background: var(--paper); color: var(--ink); padding: 1rem; border-radius: 6px; line-height: 1.5;"
    return colours + (rules if scope == ":root" else f"{scope} {{\n{ground}\n{rules}\n}}")


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as rows of dotted key and text."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{prefix}[{i}]")
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        words = {None: "none", True: "yes", False: "no"}
        yield prefix, words.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


@functools.cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "sentence": lambda text: escape(sentence(str(text))),
        "visible": lambda text: escape(visible(str(text))),
        "section": lambda section, name, page: section_body(section, 2, name, page.feature_page),
        "badge": badge,
        "number": lambda value, place, section, name: number_html(value, place, section, name),
        "moment": _moment,
    }
    return environment.from_string((_FOLDER / "report.html.jinja").read_text(encoding="utf-8"))


def _moment(text: str) -> str:
    """An ISO time for people.

    >>> _moment("2026-01-02T03:04:05.123+00:00")
    '2026-01-02 03:04 UTC'
    """
    return f"{text[:10]} {text[11:16]} UTC" if len(text) >= 16 and text[10] == "T" else visible(text)
