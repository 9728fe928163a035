"""How strings and numbers are written for people."""

from __future__ import annotations

import re
import unicodedata

from workbench.core.numbers import NOT_AVAILABLE, number
from workbench.core.stats import Estimate
from workbench.report.blocks import Cell

_PICTURES = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡", "\u00a0": "⍽"}
# category Cf holds the joiners that Persian, Indic scripts and emoji need: they shape text and hide nothing
_KEPT_FORMATS = "\u200c\u200d"


def visible(text: str) -> str:
    """The text with every character that could hide or reorder shown as a sign or its code.

    Line ends, tabs, control characters, direction marks, zero-width spaces and halves of characters are replaced;
    letters of every script stay.

    >>> visible(chr(0x202e) + "a" + chr(10) + "b")
    '⟨U+202E⟩a⏎b'
    """
    return "".join(_visible_char(char) for char in text)


def _visible_char(char: str) -> str:
    if char in _PICTURES:
        return _PICTURES[char]
    if ord(char) < 32:
        return chr(0x2400 + ord(char))
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and char not in _KEPT_FORMATS:
        return f"⟨U+{ord(char):04X}⟩"
    return char


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
