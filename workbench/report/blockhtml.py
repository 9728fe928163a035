"""One block as HTML; every string is escaped, and characters that hide are shown."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable

from markupsafe import Markup, escape

from workbench.core.stats import Estimate
from workbench.report.blocks import Bars, Block, Cell, Histogram, Lines, Metric, Number, Scatter, Table, Text, Tokens
from workbench.report.plots import plot_svg
from workbench.report.text import NOT_AVAILABLE, interval, number, visible


@functools.singledispatch
def block_html(block: Block) -> Markup:
    """The block as an HTML element."""
    raise TypeError(f"{type(block).__name__} is no report block.")


def prose(text: str) -> Markup:
    """Paragraphs; single line ends stay line ends."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part]
    lines = ("<br>".join(escape(visible(line)) for line in part.split("\n")) for part in paragraphs)
    return Markup("").join(Markup("<p>{}</p>").format(Markup(line)) for line in lines)


def cell_html(cell: Cell | Metric) -> Markup:
    """The content of a table cell."""
    if isinstance(cell, Estimate):
        value, rest = interval(cell)
        return Markup('<span title="{}"><b>{}</b> <small>{}</small></span>').format(
            f"{cell.level:.0%} interval, {visible(cell.method)}", value, rest
        )
    if isinstance(cell, str):
        return escape(visible(cell))
    missing = cell is None or not math.isfinite(cell)
    return Markup('<span class="na">{}</span>').format(NOT_AVAILABLE) if missing else escape(number(cell))


@block_html.register
def _(block: Text) -> Markup:
    return prose(block.text)


@block_html.register
def _(block: Table) -> Markup:
    numeric = [_is_numeric([row[i] for row in block.rows]) for i in range(len(block.columns))]
    kinds = [Markup(' class="num"') if flag else Markup("") for flag in numeric]
    head = _join("<th scope=col{}>{}</th>", zip(kinds, map(visible, block.columns), strict=True))
    rows = [
        Markup("<tr>{}</tr>").format(_join("<td{}>{}</td>", zip(kinds, map(cell_html, row), strict=True)))
        for row in block.rows
    ]
    body = Markup("").join(rows) or Markup('<tr><td colspan="{}" class="na">no rows</td></tr>').format(len(numeric))
    table = Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    return _figure(table.format(head, body), "", block.caption)


@block_html.register(Bars)
@block_html.register(Lines)
@block_html.register(Histogram)
@block_html.register(Scatter)
def _(block: Bars | Lines | Histogram | Scatter) -> Markup:
    left_out = _left_out(block)
    caption = " ".join(part for part in (block.caption, left_out) if part)
    # matplotlib escapes the text that it draws
    return _figure(Markup('<div class="scroll">{}</div>').format(Markup(plot_svg(block))), block.title, caption)


@block_html.register
def _(block: Tokens) -> Markup:
    values = [abs(value) for row in block.rows for _, value in row if value is not None and math.isfinite(value)]
    largest = max(values, default=0.0) or 1.0
    rows = [
        Markup("<p>{}</p>").format(Markup("").join(_token(text, value, largest) for text, value in row))
        for row in block.rows
    ]
    return _figure(Markup('<div class="tokens">{}</div>').format(Markup("").join(rows)), "", block.caption)


def _token(text: str, value: Number | None, largest: Number) -> Markup:
    # a line end is shown by its sign and then ends the line, as in the text that it comes from
    shown = Markup("{}{}").format(visible(text), Markup("<wbr>") * text.count("\n"))
    if value is None or not math.isfinite(value):
        return Markup("<span>{}</span>").format(shown)
    side = "warm" if value >= 0 else "cool"
    share = round(100 * abs(value) / largest)
    return Markup('<span class="{}" style="--v:{}%" title="{}">{}</span>').format(side, share, number(value), shown)


def _figure(content: Markup, title: str, caption: str) -> Markup:
    heading = Markup("<h4>{}</h4>").format(visible(title)) if title else Markup("")
    below = Markup("<figcaption>{}</figcaption>").format(visible(caption)) if caption else Markup("")
    return Markup("<figure>{}{}{}</figure>").format(heading, content, below)


def _join(template: str, rows: Iterable[Iterable[object]]) -> Markup:
    return Markup("").join(Markup(template).format(*row) for row in rows)


def _is_numeric(cells: list[Cell]) -> bool:
    given = [cell for cell in cells if cell is not None]
    return bool(given) and not any(isinstance(cell, str) for cell in given)


def _left_out(block: Bars | Lines | Histogram | Scatter) -> str:
    """A sentence about values that a plot can't show, or nothing."""
    missing = _missing(block)
    return f"{missing} value{'s' if missing > 1 else ''} n/a, not drawn." if missing else ""


def _missing(block: Bars | Lines | Histogram | Scatter) -> int:
    if isinstance(block, Bars):
        return _bad(value.value if isinstance(value, Estimate) else value for value in block.values)
    if isinstance(block, Lines):
        return sum(_bad(series.y) + _bad(series.x, block.log_x) for series in block.series)
    if isinstance(block, Histogram):
        return _bad(block.values, block.log_x)
    return _bad(block.x, block.log_x) + _bad(block.y)


def _bad(values: Iterable[Number], positive: bool = False) -> int:
    return sum(not math.isfinite(value) or (positive and value <= 0) for value in values)
