"""The card of one feature as static HTML; the page draws the same card in the browser."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from workbench.core.numbers import counted, number
from workbench.report.features.encode import Card, Number, StringTable, clip, finite, pack_card, spread
from workbench.report.features.words import KINDS, NOT_MEASURED, label, meaning

if TYPE_CHECKING:
    from jinja2 import Template

_N_WINDOWS = 20
_WIDTH, _HEIGHT = 560, 130


def card_body(card: Card) -> Markup:
    """Everything inside the card's frame."""
    packed = pack_card(card, StringTable(), 0)
    windows = spread(card["windows"], _N_WINDOWS)
    strongest = [window for window in windows if window["stratum"] == "top"]
    others = [window for window in windows if window["stratum"] != "top"] if strongest else []
    largest = max((_plain(value) for window in windows for value in window["values"]), default=0.0) or 1.0
    bins = [tuple(bin_) for bin_ in card["histogram"]]
    total = sum(n for _, _, n in bins)
    text = f"Histogram of {number(total)} positive activations" if bins else ""
    if bins:
        text += f" from {_num(bins[0][0])} to {_num(bins[-1][1])}"
    values = {name: card[name] for name in ("frequency", "max_act")} | dict(card["scores"] or {})
    return Markup(_template().render(
        feature=card["feature"], n_tokens=card["n_tokens"], flags=[_flag(text) for text in card["flags"]],
        explanation=packed["explanation"], steering=packed["steering"],
        numbers=[
            {"label": clip(label(name)), "value": finite(value), "meaning": meaning(name)}
            | {"share": name == "frequency"}
            for name, value in values.items()
        ],
        peaks=list(dict.fromkeys(clip(w["tokens"][w["peak"]]) for w in card["windows"]))[:10],
        promoted=_lens(card["promoted"]), suppressed=_lens(card["suppressed"]),
        windows=_windows(strongest or windows, largest), deciles=_windows(others, largest),
        deciles_text=deciles_text(len(others)), bars=bars(bins),
        histogram_text=text, is_wide=is_wide(bins),
        neighbours=[_neighbour(n) for n in card["neighbours"]],
    ))  # fmt: skip


def deciles_text(n: int) -> str:
    """What the fold below the strongest contexts says.

    >>> deciles_text(1)
    'By decile of the activation: 1 more context'
    """
    return f"By decile of the activation: {counted(n, 'more contexts')}"


def bars(bins: Sequence[tuple[float, float, int]]) -> list[dict[str, object]]:
    """Rectangles of a histogram; heights by log(1 + tokens), because counts fall off steeply.

    >>> [bar["height"] for bar in bars([(0.0, 1.0, 8), (1.0, 2.0, 2)])]  # log 3 / log 9 of the full height
    [130.0, 65.0]
    """
    bins = [bin_ for bin_ in bins if all(isinstance(x, int | float) and math.isfinite(x) for x in bin_)]
    if not bins:
        return []
    scale = math.log if is_wide(bins) else float
    low, span = scale(bins[0][0]), scale(bins[-1][1]) - scale(bins[0][0]) or 1.0
    most = max(math.log1p(n) for _, _, n in bins) or 1.0
    return [
        {
            "x": round(_WIDTH * (scale(a) - low) / span, 2),
            "width": round(max(0.5, _WIDTH * (scale(b) - scale(a)) / span - 1), 2),
            "y": round(_HEIGHT * (1 - math.log1p(n) / most), 2), "height": round(_HEIGHT * math.log1p(n) / most, 2),
            "title": f"{_num(a)} to {_num(b)}: {_num(n)} tokens", "low": a, "high": b,
        }
        for a, b, n in bins
    ]  # fmt: skip


def is_wide(bins: Sequence[tuple[float, float, int]]) -> bool:
    """Whether bins span so much that only a logarithmic axis shows them all."""
    return bool(bins) and bins[0][0] > 0 and bins[-1][1] > 20 * bins[0][0]


def _flag(text: str) -> tuple[str, str]:
    name, _, reason = text.partition(":")
    return clip(name.strip()), clip(reason.strip())


def _lens(tokens: Sequence[Card]) -> list[dict[str, object]]:
    sizes = [abs(_plain(token["logit"])) for token in tokens]
    most = max(sizes, default=0.0) or 1.0
    return [
        {"token": clip(token["token"]), "logit": finite(token["logit"]), "share": round(100 * size / most)}
        for token, size in zip(tokens, sizes, strict=True)
    ]


def _windows(windows: Sequence[Card], largest: float) -> list[tuple[str, list[dict[str, object]]]]:
    groups = itertools.groupby(windows, key=lambda window: window["stratum"])
    return [
        ("Strongest" if stratum == "top" else clip(stratum).capitalize(), [_line(window, largest) for window in group])
        for stratum, group in groups
    ]


def _line(window: Card, largest: float) -> dict[str, object]:
    tokens = []
    for place, (text, value) in enumerate(zip(window["tokens"], window["values"], strict=True)):
        peak = place == window["peak"]
        kind = "left" if value is None and not peak else "silent" if value == 0 else "mark"
        share = 50 if value is None else round(max(0.0, min(100.0, 100 * _plain(value) / largest)))
        tokens.append({
            "text": clip(text), "kind": kind, "value": value, "share": share, "most": peak,
            "ends": "\n" in text,
        })  # fmt: skip
    where = "" if window["row"] < 0 else f"; document {window['document']}, row {window['row']}"
    return {"peak": window["values"][window["peak"]], "tokens": tokens, "where": where}


def _neighbour(given: Card) -> dict[str, object]:
    value, zero = finite(given["value"]), finite(given["null"])
    verdict = ""
    if isinstance(value, int | float) and isinstance(zero, int | float):
        verdict = ": above" if value > zero else ": no more than random"
    kind = KINDS.get(given["kind"], clip(given["kind"]))
    both = {"verdict": verdict, "jaccard": finite(given["jaccard"])}
    return {"feature": given["feature"], "kind": kind, "value": value, "null": zero} | both


def _plain(value: Number) -> float:
    """A finite number to draw with; 0 where there is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _num(value: Number) -> str:
    if isinstance(value, Mapping):
        return "−∞" if value.get("$float") == "-inf" else "∞"
    if value is None or math.isnan(value):
        return NOT_MEASURED
    return number(int(value) if float(value).is_integer() and abs(value) < 1e9 else value)


def _real(value: Number) -> str:
    """A measured quantity: 3.00 beside 2.80.

    >>> _real(3), _real(2.8), _real(None)
    ('3.00', '2.80', 'not measured')
    """
    return _num(value) if value is None or isinstance(value, Mapping) or math.isnan(value) else number(float(value))


def _percent(share: float | None) -> str:
    """A share as a percentage, and below one in 100,000 as so many in a million.

    >>> _percent(0.25), _percent(2.5e-6), _percent(None)
    ('25%', '2.50 in a million', 'not measured')
    """
    if share is None:
        return NOT_MEASURED
    return f"{_num(1e6 * share)} in a million" if 0 < share < 1e-5 else f"{_num(100 * share)}%"


@functools.cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"num": _num, "real": _real, "percent": _percent}
    source = (Path(__file__).parent / "card.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)
