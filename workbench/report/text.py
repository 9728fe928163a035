"""How strings and numbers are written for people."""

from __future__ import annotations

import math
import re
import unicodedata

from workbench.core.stats import Estimate
from workbench.report.blocks import Cell, Number

NOT_AVAILABLE = "n/a"
"""Shown for what could not be measured: NaN, infinities, None."""

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


def decimals_for(*values: Number) -> int:
    """Decimals that give the largest of the values three significant digits, at most six.

    >>> decimals_for(0.918, 0.9), decimals_for(12.3), decimals_for(1234.5)
    (3, 1, 0)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0:
        return 0
    return min(6, max(0, 2 - math.floor(math.log10(largest))))


def number(value: Number | None, decimals: int | None = None) -> str:
    """A number with three significant digits, "n/a" if there is none; whole numbers with all their digits.

    Whole numbers get separators from six digits on: shorter ones are often ids, which are copied.

    >>> number(0.12345), number(1234567), number(49152), number(float("nan")), number(0.0000012)
    ('0.123', '1,234,567', '49152', 'n/a', '1.2e-06')
    """
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    if isinstance(value, int):
        return _minus(f"{value:,}" if abs(value) >= 100_000 else str(value))
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e9) and decimals is None:
        return _minus(f"{value:.2g}")
    places = decimals_for(value) if decimals is None else decimals
    return _minus(f"{value:,.{places}f}")


def _minus(shown: str) -> str:
    """A leading hyphen as a minus sign, and no sign before a zero."""
    if not shown.startswith("-"):
        return shown
    return "−" + shown[1:] if re.search("[1-9]", shown) else shown[1:]


def sentence(text: str) -> str:
    """A visible sentence whose "n = 40" stays on one line.

    >>> sentence("true (n = 40 prompts)").count(chr(0xa0))
    2
    """
    return re.sub(r"\bn = (?=\d)", "n\u00a0=\u00a0", visible(text))


def interval(estimate: Estimate) -> tuple[str, str]:
    """Value, and its interval with n, as two strings with equal decimals.

    >>> interval(Estimate(0.5, 0.25, 0.75, 40, "Wilson", "prompts"))
    ('0.500', '[0.250, 0.750] n = 40 prompts')
    """
    places = decimals_for(estimate.value, estimate.low, estimate.high)
    value, low, high = (number(float(part), places) for part in (estimate.value, estimate.low, estimate.high))
    return value, f"[{low}, {high}] n = {number(estimate.n)} {visible(estimate.unit)}"


def plain_cell(cell: Cell) -> str:
    """A table cell as plain text.

    >>> plain_cell(None), plain_cell(3), plain_cell("a")
    ('n/a', '3', 'a')
    """
    if cell is None:
        return NOT_AVAILABLE
    if isinstance(cell, Estimate):
        return " ".join(interval(cell))
    return visible(cell) if isinstance(cell, str) else number(cell)
