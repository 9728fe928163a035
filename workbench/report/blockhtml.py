"""One block as HTML; every string is escaped, and characters that hide are shown."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable

from markupsafe import Markup, escape

from workbench.core.numbers import Number, counted, number
from workbench.core.stats import Estimate
from workbench.report.blocks import MOST_CELLS, Bars, Block, Grid, Heat, Histogram, Lines, Scatter, Table, Text, Tokens
from workbench.report.plots import plot_svg
from workbench.report.tablehtml import table_html
from workbench.report.text import visible


@functools.singledispatch
def block_html(block: Block) -> Markup:
    """The block as an HTML element."""
    raise TypeError(f"{type(block).__name__} is no report block.")


def titled(title: str, content: Markup) -> Markup:
    """Content below its heading."""
    return Markup("<h4>{}</h4>\n{}").format(visible(title), content)


def prose(text: str) -> Markup:
    """Paragraphs; single line ends stay line ends."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part]
    lines = ("<br>".join(escape(visible(line)) for line in part.split("\n")) for part in paragraphs)
    return Markup("").join(Markup("<p>{}</p>").format(Markup(line)) for line in lines)


@block_html.register
def _(block: Text) -> Markup:
    return prose(block.text)


@block_html.register
def _(block: Table) -> Markup:
    return titled(block.name, table_html(block))


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


@block_html.register
def _(block: Heat) -> Markup:
    values = [abs(v) for grid in block.grids for row in grid.values for v in row if v is not None and math.isfinite(v)]
    largest = max(values, default=0.0) or 1.0
    n_columns = max(1, MOST_CELLS // max(1, sum(len(grid.rows) for grid in block.grids)))
    cut = [
        f"the last {n_columns} of {len(grid.columns)} columns" for grid in block.grids if len(grid.columns) > n_columns
    ]
    grids = Markup("").join(_grid(grid, n_columns, largest) for grid in block.grids)
    caption = " ".join([block.caption, *(f"Drawn: {text}." for text in dict.fromkeys(cut))]).strip()
    return _figure(Markup('<div class="heats scroll" tabindex="0">{}</div>').format(grids), block.title, caption)


def _grid(grid: Grid, n_columns: int, largest: Number) -> Markup:
    first = max(0, len(grid.columns) - n_columns)
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(visible(name)) for name in grid.columns[first:])
    rows = Markup("").join(
        Markup("<tr><th scope=row>{}</th>{}</tr>").format(
            visible(name),
            Markup("").join(
                _heat_cell(value, grid.texts[r][c] if grid.texts else "", largest)
                for c, value in enumerate(grid.values[r])
                if c >= first
            ),
        )
        for r, name in enumerate(grid.rows)
    )
    return Markup(
        '<table class="heat"><caption>{}</caption><thead><tr><th></th>{}</tr></thead><tbody>{}</tbody></table>'
    ).format(visible(grid.name), head, rows)


def _heat_cell(value: Number | None, text: str, largest: Number) -> Markup:
    if value is None or not math.isfinite(value):
        return Markup("<td>{}</td>").format(visible(text))
    side, share = "warm" if value >= 0 else "cool", round(100 * abs(value) / largest)
    return Markup('<td class={} style="--v:{}%" title="{}">{}</td>').format(side, share, number(value), visible(text))


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


def _left_out(block: Bars | Lines | Histogram | Scatter) -> str:
    """A sentence about values that a plot can't show, or nothing."""
    missing = _missing(block)
    return f"{counted(missing, 'values')} n/a, not drawn." if missing else ""


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
