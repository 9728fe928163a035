"""The one way in which numbers are written for people: three significant digits, one form of interval, plurals."""

from __future__ import annotations

import math
import re
from numbers import Integral

Number = int | float

NOT_AVAILABLE = "n/a"
"""Shown for what could not be measured: NaN, infinities, None."""

SMALLEST = 1e-7
"""Smaller sizes are shown as less than this: they are rounding errors of float32."""

EXPONENT_BELOW = 1e-4
"""Smaller sizes are shown with an exponent, as frequencies of features are."""

SMALLEST_P = 1e-3
"""Smaller probabilities and p-values are shown as less than this."""

LARGEST = 1e9
"""Larger sizes are shown with an exponent."""


def decimals_for(*values: Number) -> int:
    """Decimals that give the largest of the values three significant digits, at most six; negative means tens.

    >>> decimals_for(0.918, 0.9), decimals_for(12.3), decimals_for(1234.5), decimals_for(0.9996)
    (3, 1, -1, 2)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0:
        return 0
    return min(6, 2 - int(f"{largest:.2e}".split("e")[1]))


def number(value: Number | None, decimals: int | None = None) -> str:
    """A number with three significant digits, "n/a" if there is none; whole numbers with all their digits.

    Whole numbers get separators from six digits on: shorter ones are often ids, which are copied. A float of four
    digits or more that is whole is a count too.

    >>> number(0.12345), number(5651.2), number(1234567), number(49152), number(49152.0), number(4.14e-10)
    ('0.123', '5,650', '1,234,567', '49152', '49152', '<1e-7')
    >>> number(1.5e9), number(-0.5), number(1.2e-6)
    ('1.5e9', '−0.500', '1.2e-6')
    """
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    if isinstance(value, Integral) or (decimals is None and 1000 <= abs(value) < LARGEST and value == int(value)):
        value = int(value)
        return _minus(f"{value:,}" if abs(value) >= 100_000 else str(value))
    if value != 0 and decimals is None and abs(value) < SMALLEST:
        return f"<{_short_exponent(str(SMALLEST))}" if value > 0 else f">−{_short_exponent(str(SMALLEST))}"
    if decimals is None and value != 0 and not EXPONENT_BELOW <= abs(value) < LARGEST:
        return _minus(_short_exponent(f"{value:.3g}"))
    places = decimals_for(value) if decimals is None else decimals
    return _minus(f"{round(value, places):,.{max(0, places)}f}")


def signed(value: Number | None, decimals: int | None = None) -> str:
    """A change: the number with its sign, also a plus.

    >>> signed(0.05), signed(-2.0), signed(0.0)
    ('+0.0500', '−2.00', '0')
    """
    shown = number(value, decimals)
    return "+" + shown if value is not None and value > 0 and re.search("[1-9]", shown) and shown[0] != "<" else shown


def with_interval(value: Number, low: Number, high: Number, *, sign: bool = False) -> tuple[str, str]:
    """A value and its interval, with equal decimals unless the interval is ten times as large as the value.

    >>> with_interval(0.0365, 0.000397, 0.0708)
    ('0.0365', '[0.0004, 0.0708]')
    >>> with_interval(0.05, 0.03, math.inf, sign=True)
    ('+0.0500', '[+0.0300, ∞]')
    >>> with_interval(1.3, 0.9, 140.0)
    ('1.30', '[0.900, 140]')
    """
    write = signed if sign else number
    sizes = [abs(end) for end in (value, low, high) if math.isfinite(end)]
    largest = max(sizes, default=0.0)
    places = decimals_for(*sizes) if largest >= EXPONENT_BELOW and not 0 < 10 * abs(value) < largest else None
    shown, first, last = (_unbounded(end) or write(float(end), places) for end in (value, low, high))
    return (shown if math.isfinite(value) else NOT_AVAILABLE), f"[{first}, {last}]"


def setting(value: Number) -> str:
    """A number that somebody chose, as they would write it.

    >>> setting(3.0), setting(1.5), setting(0.00002), setting(-1)
    ('3', '1.5', '2e-5', '−1')
    """
    return _minus(_short_exponent(f"{value:g}"))


def percent(share: Number | None) -> str:
    """A share as a percentage.

    >>> percent(0.98765), percent(1.0), percent(0.0), percent(1 / 3000), percent(math.nan)
    ('98.8%', '100%', '0%', '0.0333%', 'n/a')
    """
    shown = number(None if share is None else 100 * share)
    return shown if shown == NOT_AVAILABLE else f"{shown}%"


def byte_size(n: Number) -> str:
    """The size of a file or of memory, in powers of a thousand.

    >>> byte_size(3 * 10**9), byte_size(10**8), byte_size(2340), byte_size(12)
    ('3.00 GB', '100 MB', '2.34 kB', '12 bytes')
    """
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{number(n / size)} {unit}"
    return counted(int(n), "bytes")


def p_value(p: Number | None) -> str:
    """A p-value or another probability with its sign of comparison.

    >>> "p " + p_value(4e-10), "p " + p_value(0.0321), "p " + p_value(1.0)
    ('p < 0.001', 'p = 0.032', 'p = 1')
    """
    if p is None or not math.isfinite(p):
        return NOT_AVAILABLE
    return f"< {SMALLEST_P}" if p < SMALLEST_P else f"= {p:.2g}"


def rounding_error(error: Number) -> str:
    """The size of a rounding error, of which only the power of ten matters.

    >>> rounding_error(2.53e-07), rounding_error(0.0), rounding_error(0.25)
    ('3e-7', '0', '0.2')
    """
    return _short_exponent(f"{error:.1g}")


def rounded(value: float, digits: int = 4) -> float:
    """The nearest number of so many significant digits: short in a file that holds many.

    >>> rounded(0.123456), rounded(98765.4, 2)
    (0.1235, 99000.0)
    """
    return float(f"{value:.{digits}g}")


def counted(n: int, noun: str) -> str:
    """How many of something; `noun` is a plural, and what follows "of", "x", "without" and the like is left as it is.

    >>> counted(1, "features"), counted(2, "batches"), counted(1, "rows of text"), counted(1, "prompts x 6 features")
    ('1 feature', '2 batches', '1 row of text', '1 prompt x 6 features')
    >>> counted(1, "windows without it"), counted(1, "windows to explain it from")
    ('1 window without it', '1 window to explain it from')
    >>> counted(49152, "tokens"), counted(1234567, "tokens"), counted(1, "dictionaries"), counted(1, "losses")
    ('49152 tokens', '1,234,567 tokens', '1 dictionary', '1 loss')
    """
    if n != 1:
        return f"{number(n)} {noun}"
    head, *rest = re.split(r"( (?:of|x|per|in|and|with|without|from|to|that) )", noun, maxsplit=1)
    return f"1 {singular(head)}{''.join(rest)}"


def sample_size(n: int, unit: str) -> str:
    """What an interval is over.

    >>> sample_size(40, "prompts"), sample_size(1, "rows")
    ('n = 40 prompts', 'n = 1 row')
    """
    return f"n = {counted(n, unit)}"


def singular(noun: str) -> str:
    """One of what a plural names.

    >>> [singular(noun) for noun in ("tokens", "batches", "passes", "replies", "SAEs", "series", "boxes")]
    ['token', 'batch', 'pass', 'reply', 'SAE', 'series', 'box']
    """
    if noun.endswith("series"):
        return noun
    if re.search("[^aeiou]ies$", noun):
        return noun[:-3] + "y"
    if re.search("(ss|sh|ch|x)es$", noun):
        return noun[:-2]
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else noun


def _short_exponent(shown: str) -> str:
    return re.sub(r"e([+-])0*", lambda power: "e" + power[1].strip("+"), shown)


def _unbounded(end: Number) -> str:
    return "∞" if end == math.inf else "−∞" if end == -math.inf else ""


def _minus(shown: str) -> str:
    """A leading hyphen as a minus sign, and no sign before a zero."""
    if not shown.startswith("-"):
        return shown
    return "−" + shown[1:] if re.search("[1-9]", shown) else shown[1:]
