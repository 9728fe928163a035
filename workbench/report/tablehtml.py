"""A table as HTML: n once in the caption, long tables folded, columns as wide as their texts need."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from workbench.core.numbers import NOT_AVAILABLE, number, sample_size, setting
from workbench.core.stats import Estimate
from workbench.report.blocks import Cell, Table
from workbench.report.section import Metric
from workbench.report.text import visible

ROWS_SHOWN = 10
"""A longer table is folded after so many rows."""

FEATURE_COLUMN = "feature"
"""Column whose numbers are features of the study's SAE."""

_LONG, _MIDDLE = 48, 14
"""Characters of the longest cell from which on a column is wide, or of middle width."""


def table_html(block: Table, anchors: Mapping[int, str] | None = None, feature_page: str = "") -> Markup:
    """The table below what its caption says after its name.

    Args:
        block: the table.
        anchors: ids of rows that are linked to.
        feature_page: page with the cards of the features; "" without one.
    """
    kinds = [_column_class([row[i] for row in block.rows]) for i in range(len(block.columns))]
    sizes = [_sample_sizes([row[i] for row in block.rows]) for i in range(len(block.columns))]
    head = Markup("").join(
        Markup("<th scope=col{}>{}</th>").format(kind, visible(column))
        for kind, column in zip(kinds, block.columns, strict=True)
    )
    rows = []
    for i, row in enumerate(block.rows):
        cells = [
            _td(kind, cell, with_n=len(size) > 1, page=feature_page if column == FEATURE_COLUMN else "")
            for kind, cell, size, column in zip(kinds, row, sizes, block.columns, strict=True)
        ]
        mark = Markup(' id="{}"').format(anchors[i]) if anchors and i in anchors else Markup("")
        rows.append(Markup("<tr{}>{}</tr>").format(mark, Markup("").join(cells)))
    body = Markup("").join(rows) or Markup('<tr><td colspan="{}" class="na">no rows</td></tr>').format(len(kinds))
    table = Markup('<div class="scroll" tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    more = block.caption[len(block.name) :].strip(". ")
    caption = " ".join(part for part in (more and f"{more}.", _sizes_caption(block.columns, sizes)) if part)
    below = Markup("<figcaption>{}</figcaption>").format(visible(caption)) if caption else Markup("")
    return Markup('<figure class="table">{}{}{}</figure>').format(_fold(len(rows)), table.format(head, body), below)


def cell_html(cell: Cell | Metric, with_n: bool = True) -> Markup:
    """The content of a table cell."""
    if isinstance(cell, Estimate):
        value, interval = cell.shown()
        size = Markup(" {}").format(visible(sample_size(cell.n, cell.unit))) if with_n else ""
        return Markup('<span title="{}"><b>{}</b> <small>{}{}</small></span>').format(
            f"{setting(100 * cell.level)}% interval, {visible(cell.method)}, {visible(sample_size(cell.n, cell.unit))}",
            value, interval, size,
        )  # fmt: skip
    if isinstance(cell, str):
        return escape(visible(cell))
    if cell is None or not math.isfinite(cell):
        return Markup('<span class="na">{}</span>').format(NOT_AVAILABLE)
    return escape(number(cell))


def _td(kind: Markup, cell: Cell, with_n: bool, page: str) -> Markup:
    content = cell_html(cell, with_n)
    if page and isinstance(cell, int):
        content = Markup('<a href="{}#feature={}">{}</a>').format(page, cell, content)
    return Markup("<td{}>{}</td>").format(kind, content)


def _fold(n_rows: int) -> Markup:
    if n_rows <= ROWS_SHOWN:
        return Markup("")
    return Markup('<label class="fold"><input type="checkbox"> all {} rows</label>').format(number(n_rows))


def _column_class(cells: Sequence[Cell]) -> Markup:
    given = [cell for cell in cells if cell is not None]
    if given and not any(isinstance(cell, str) for cell in given):
        return Markup(' class="num"')
    longest = max((len(cell) for cell in given if isinstance(cell, str)), default=0)
    return Markup(' class="long"' if longest > _LONG else ' class="middle"' if longest > _MIDDLE else "")


def _sample_sizes(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sample_size(cell.n, cell.unit) for cell in cells if isinstance(cell, Estimate)))


def _sizes_caption(columns: Sequence[str], sizes: Sequence[tuple[str, ...]]) -> str:
    """Once what each column was measured on: the commonest for the table, others with the names of their columns."""
    common = Counter(size[0] for size in sizes if len(size) == 1)
    if not common:
        return ""
    (usual, _), *others = common.most_common()
    parts = [usual]
    for other, _ in others:
        names = [column for column, size in zip(columns, sizes, strict=True) if size == (other,)]
        parts.append(f"{other} for {', '.join(names)}")
    return "; ".join(parts) + "."
