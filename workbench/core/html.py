"""How objects show themselves in a notebook: small tables that carry their own style, escaped and bounded.

Colours are those of the notebook around them, so they fit a light and a dark one; text is aligned left, numbers right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from workbench.core.display import OneLine, brief, clipped, visible
from workbench.core.numbers import counted, number
from workbench.core.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

OUTLIER = 10
"""Tokens whose size is so many times the median of those that are not 0 have the strongest colour, and do not set the
scale."""
MOST_ROWS = 20
"""Rows of a table that are shown; the caption counts the others."""
MOST_CELLS = 700
"""Cells of all heat maps that are shown together."""
_MOST_CHARACTERS, _MOST_TOKENS, _MOST_COLUMNS, _MOST_TITLE = 240, 400, 48, 48

_STYLE = Markup(
    ".wb-shown{font:13px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;text-align:left;overflow-x:auto}"
    ".wb-shown table{border-collapse:collapse;margin:.4em 0;font-size:1em;table-layout:auto;border:none}"
    ".wb-shown th,.wb-shown td,.wb-shown caption{text-align:left!important;vertical-align:top;padding:2px 16px 2px 0;"
    "white-space:pre-wrap;max-width:42em;background:none;color:inherit;border:none}"
    ".wb-shown tr{background:none!important;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 16%,transparent)!important}"
    ".wb-shown th{font-weight:600;white-space:nowrap}.wb-shown thead th,.wb-shown .muted{opacity:.7}"
    ".wb-shown caption{caption-side:top;opacity:.7;padding:0;max-width:none}"
    ".wb-shown td.num,.wb-shown th.num{text-align:right!important;font-variant-numeric:tabular-nums}"
    ".wb-shown p{margin:.2em 0;white-space:pre-wrap}.wb-shown pre{margin:.2em 0;white-space:pre-wrap;font-size:12px}"
    ".wb-shown .tokens{line-height:2}.wb-shown .tokens span{padding:.15em .1em;border-radius:3px;white-space:pre-wrap;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 30%,transparent);margin-right:1px}"
    ".wb-shown .grid{border-spacing:1px;border-collapse:separate}.wb-shown .grid tr{border:none!important}"
    ".wb-shown .grid td{padding:2px 5px;min-width:1.2em;white-space:pre;font-size:11px;border-radius:2px}"
    ".wb-shown .grid th{padding:2px 6px 2px 0;font-size:11px}"
    ".wb-shown .grids{display:flex;flex-wrap:wrap;gap:0 24px}"
)


def framed(*parts: Markup) -> str:
    """Parts of a display with the style that they need; it holds for nothing outside."""
    return str(Markup('<div class="wb-shown"><style>{}</style>{}</div>').format(_STYLE, Markup("").join(parts)))


def heading(title: str, note: str = "") -> Markup:
    """A line in bold, and what is to be said about it."""
    behind = Markup(' <span class="muted">{}</span>').format(_text(note)) if note else Markup("")
    return Markup("<p><strong>{}</strong>{}</p>").format(_text(title), behind)


def preformatted(text: str) -> Markup:
    """A text of several lines as it reads."""
    lines = text.split("\n")
    kept = [visible(clipped(line, 2 * _MOST_CHARACTERS)) for line in lines[: MOST_ROWS * 4]]
    more = [f"… {counted(len(lines) - len(kept), 'more lines')}"] if len(lines) > len(kept) else []
    return Markup("<pre>{}</pre>").format("\n".join(kept + more))


def facts(values: Mapping[str, object]) -> Markup:
    """Names with their values, one row each; those without a value are left out."""
    rows = (
        Markup("<tr><th>{}</th>{}</tr>").format(_text(name), _cell(value, left=True))
        for name, value in values.items()
        if value is not None and value != ""
    )
    return Markup("<table><tbody>{}</tbody></table>").format(Markup("").join(islice(rows, 2 * MOST_ROWS)))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, total: int | None = None, caption: str = ""
) -> Markup:
    """The first rows under their columns.

    Args:
        columns: names of the columns.
        rows: rows of values; only the first `MOST_ROWS` are read.
        total: how many rows there are; by default those that are given.
        caption: what they are.
    """
    shown = [row[:_MOST_COLUMNS] for row in islice(rows, MOST_ROWS)]
    total = total if total is not None else len(rows) if isinstance(rows, Sequence) else len(shown)
    more = [f"the first {len(shown)} of {counted(total, 'rows')}"] if total > len(shown) else []
    if len(columns) > _MOST_COLUMNS:
        more.append(f"the first {_MOST_COLUMNS} of {len(columns)} columns")
    head = Markup("").join(
        Markup("<th{}>{}</th>").format(_right(all(_is_number(row[i]) for row in shown) and bool(shown)), _text(name))
        for i, name in enumerate(columns[:_MOST_COLUMNS])
    )
    body = Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(map(_cell, row))) for row in shown)
    above = "; ".join(filter(None, [caption, *more]))
    return Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        Markup("<caption>{}</caption>").format(_text(above)) if above else Markup(""), head, body
    )


def frame_table(frame: pd.DataFrame, caption: str = "") -> Markup:
    """The first rows of a pandas table, with its labels unless they only count the rows."""
    is_labelled = frame.index.name is not None or type(frame.index).__name__ != "RangeIndex"
    names = [str(frame.index.name or "")] if is_labelled else []
    rows = [list(row)[not is_labelled :] for row in frame.head(MOST_ROWS).itertuples(name=None)]
    return table([*names, *map(str, frame.columns)], rows, total=len(frame), caption=caption)


def tokens_line(
    tokens: Sequence[str], values: Sequence[int | float] | None = None, titles: Sequence[str] = ()
) -> Markup:
    """Tokens of a text in a row, coloured by their values: orange above zero, blue below."""
    sizes = sorted(abs(value) for value in values or () if math.isfinite(value) and value)
    # an attention sink would leave all others without a colour
    limit = OUTLIER * sizes[len(sizes) // 2] if sizes else 0.0
    largest = max((size for size in sizes if size <= limit), default=1.0)
    spans = [
        Markup("<span{}{}>{}</span>").format(
            _tinted(values[i] / largest if values is not None else 0.0),
            Markup(' title="{}"').format(visible(titles[i])) if i < len(titles) else Markup(""),
            _text(token),
        )
        for i, token in enumerate(tokens[:_MOST_TOKENS])
    ]
    if len(tokens) > _MOST_TOKENS:
        spans.append(_text(f" … {len(tokens) - _MOST_TOKENS} more"))
    return Markup('<p class="tokens">{}</p>').format(Markup("").join(spans))


def grid(
    row_names: Sequence[str], column_names: Sequence[str], shares: Sequence[Sequence[int | float]],
    texts: Sequence[Sequence[str]] | None = None, titles: Sequence[Sequence[str]] | None = None, caption: str = "",
) -> Markup:  # fmt: skip
    """A heat map of at most 48 rows and columns, and of at most `MOST_CELLS` cells.

    Args:
        row_names: names of the rows.
        column_names: names of the columns.
        shares: how strongly each cell is coloured, -1 to 1; blue below zero.
        texts: what stands in each cell.
        titles: what is shown where the pointer rests.
        caption: what it is.
    """
    n_rows = min(len(row_names), _MOST_COLUMNS)
    n_columns = min(len(column_names), _MOST_COLUMNS, MOST_CELLS // max(n_rows, 1))
    left_out = len(row_names) > n_rows or len(column_names) > n_columns
    note = f"the first {n_rows} of {len(row_names)} rows and {n_columns} of {len(column_names)} columns"
    head = Markup("").join(
        Markup("<th>{}</th>").format(_text(clipped(name, 12))) for name in ("", *column_names[:n_columns])
    )
    rows = [
        Markup("<tr><th>{}</th>{}</tr>").format(
            _text(clipped(row_names[r], 24)),
            Markup("").join(
                Markup("<td{}{}>{}</td>").format(
                    _tinted(shares[r][c]),
                    Markup(' title="{}"').format(visible(clipped(titles[r][c], _MOST_TITLE))) if titles else Markup(""),
                    _text(clipped(texts[r][c], 14)) if texts else "",
                )
                for c in range(n_columns)
            ),
        )
        for r in range(n_rows)
    ]
    above = "; ".join(filter(None, [caption, note if left_out else ""]))
    return Markup(
        '<table class="grid"><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>'
    ).format(_text(above), head, Markup("").join(rows))


def grids(parts: Iterable[Markup]) -> Markup:
    """Heat maps side by side."""
    return Markup('<div class="grids">{}</div>').format(Markup("").join(parts))


def _text(text: str) -> Markup:
    return escape(visible(clipped(text, _MOST_CHARACTERS)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _right(is_right: bool) -> Markup:
    return Markup(' class="num"') if is_right else Markup("")


def _cell(value: object, left: bool = False) -> Markup:
    return Markup("<td{}>{}</td>").format(_right(_is_number(value) and not left), _shown(value))


def _shown(value: object) -> Markup:
    item: Any = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", None) == 0:
        value = item()  # of numpy or torch
    if isinstance(value, Markup):
        return value
    if isinstance(value, Estimate):
        return escape(" ".join(value.shown()))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return escape(number(value) if math.isfinite(value) else "n/a")
    return _text(value if isinstance(value, str) else brief(value, _MOST_CHARACTERS))


def _tinted(share: int | float) -> Markup:
    """The colour of a cell or token: orange above zero, blue below."""
    if not math.isfinite(share) or round(abs(share) * 100) == 0:
        return Markup("")
    colour = "#e07b39" if share > 0 else "#3b82d0"
    return Markup(' style="background:color-mix(in srgb,{} {}%,transparent)"').format(
        colour, round(min(abs(share), 1.0) * 75)
    )


class Shown(OneLine):
    """Base of results: one line in a terminal, a small table in a notebook.

    The table is `_shown_facts` and, where the class has one, the first rows of `frame`; `_shown_parts` replaces both.
    """

    def _shown_facts(self) -> Mapping[str, object]:
        """Names and values above the rows; the fields of a dataclass unless it has rows."""
        if hasattr(self, "frame") or not dataclasses.is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.repr}

    def _shown_parts(self) -> Iterable[Markup]:
        """What is shown below the heading."""
        if values := self._shown_facts():
            yield facts(values)
        if (frame := getattr(self, "frame", None)) is not None:
            yield frame_table(frame())

    def _shown_note(self) -> str:
        """What stands behind the name of the class."""
        return self._shown_line() if hasattr(self, "frame") else ""

    def _repr_html_(self) -> str:
        return framed(heading(type(self).__name__, self._shown_note()), *self._shown_parts())


class ShownText(str):
    """A text of several lines that shows itself as it reads, not with its line ends escaped."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return framed(preformatted(str(self)))
