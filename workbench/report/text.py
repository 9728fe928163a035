"""How strings and numbers are written for people."""

from __future__ import annotations

import re

from workbench.core.display import visible
from workbench.core.numbers import NOT_AVAILABLE, number
from workbench.core.stats import Estimate
from workbench.report.blocks import Cell


def sentence(text: str) -> str:
    """A visible sentence whose "n = 40" stays on one line.

    >>> sentence("true (n = 40 prompts)").count(chr(0xa0))
    2
    """
    return re.sub(r"\bn = (?=\d)", "n\u00a0=\u00a0", visible(text))


def plain_cell(cell: Cell) -> str:
    """A table cell as plain text.

    >>> plain_cell(None), plain_cell(3), plain_cell("a")
    ('n/a', '3', 'a')
    """
    if cell is None:
        return NOT_AVAILABLE
    if isinstance(cell, Estimate):
        return str(cell)
    return visible(cell) if isinstance(cell, str) else number(cell)
