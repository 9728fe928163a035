"""Feature cards as the compact data that the page reads: one index, one table of strings, packed chunks of cards."""

from __future__ import annotations

import base64
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.jsontext import Record
from workbench.core.numbers import counted, rounded
from workbench.report.features.words import CONTROLS, DETAILS, field, label, last, meaning, split_control
from workbench.report.text import visible

MAX_TEXT = 400
"""Characters of one token or text that are kept; a longer one ends with the number of missing ones."""

ABOVE = "above its controls"
"""The verdict on a score whose interval lies above those of all of its controls."""

Card = Mapping[str, Any]
"""A `FeatureCard`, or a part of one, as JSON: its fields have the types that `workbench.features.card` says."""
Number = float | int | Mapping[str, str] | None
"""A number in JSON; an infinity is `{"$float": "inf"}`."""


@dataclass(frozen=True)
class PackOptions:
    """How much of each card goes into the page.

    Attributes:
        windows: contexts per feature, the strongest of each stratum first.
        chunk: features that are packed, and unpacked by the browser, together.
    """

    windows: int = 20
    chunk: int = 50

    def __post_init__(self) -> None:
        if self.windows < 0 or self.chunk < 1:
            raise InvalidInputError(f"{self}: needs windows >= 0 and chunk >= 1.")


@dataclass(frozen=True)
class Packed:
    """The data of a page.

    Attributes:
        index: columns of the table of all features, with the strings that cards refer to by place.
        chunks: cards, `PackOptions.chunk` at a time, as base64 of deflated JSON.
    """

    index: Record  # columns of unlike types, which the script of the page reads
    chunks: tuple[str, ...]


def clip(text: str, limit: int = MAX_TEXT) -> str:
    """The text as people can see it; a long one is cut, with the number of missing characters.

    >>> clip("abcdef", limit=4)
    'abcd… (2 characters more)'
    """
    rest = len(text) - limit
    if rest <= 0:
        # printable text hides nothing, and most text is printable
        return text if text.isprintable() else visible(text)
    return f"{visible(text[:limit])}… ({counted(rest, 'characters')} more)"


def finite(value: Number, digits: int = 4) -> Number:
    """A number for JSON, rounded to some significant digits; None where nothing was measured; infinities stay tagged.

    >>> finite(0.123456), finite(float("nan")), finite(3), finite(float("inf"))
    (0.1235, None, 3, {'$float': 'inf'})
    """
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if math.isfinite(value):
        short = rounded(value, digits)
        return int(short) if short.is_integer() and abs(short) < 1e9 else short
    return None if math.isnan(value) else {"$float": "inf" if value > 0 else "-inf"}


class StringTable:
    """Strings by place, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._place: dict[str, int] = {}

    def place(self, text: str) -> int:
        """The place of the text, which is added if it is new."""
        if text not in self._place:
            self._place[text] = len(self.texts)
            self.texts.append(clip(text))
        return self._place[text]


def pack_cards(cards: Iterable[Card], options: PackOptions | None = None) -> Packed:
    """Packs the cards one chunk at a time; only the index and the strings stay in memory unpacked.

    Raises:
        DegenerateInputError: if there is no card.
        InvalidInputError: if a feature occurs twice.
    """
    options = options or PackOptions()
    index, strings, chunks = _Index(), StringTable(), []

    def packed() -> Iterator[object]:
        for card in cards:
            yield pack_card(card, strings, options.windows)
            index.add(card, strings)

    rows = packed()
    while chunk := list(itertools.islice(rows, options.chunk)):
        chunks.append(deflate(chunk))
    if not chunks:
        raise DegenerateInputError("No feature card was given, so there is nothing to show. Make some cards first.")
    return Packed(index.columns(strings) | {"chunk": options.chunk}, tuple(chunks))


def deflate(value: object) -> str:
    """JSON, deflated, in base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def pack_card(card: Card, strings: StringTable, n_windows: int) -> dict[str, object]:
    """The data of an open card, with tokens by place in the table of strings."""
    explanation = card["explanation"]
    return {
        "tokens": card["n_tokens"],
        "histogram": [[finite(x) for x in bin_] for bin_ in card["histogram"]],
        "windows": [_pack_window(window, strings) for window in spread(card["windows"], n_windows)],
        "windows_left": max(0, len(card["windows"]) - n_windows),
        **{
            side: [[strings.place(token["token"]), token["token_id"], finite(token["logit"])] for token in card[side]]
            for side in ("promoted", "suppressed")
        },
        "neighbours": [
            [n["feature"], strings.place(n["kind"]), *(finite(n[key]) for key in ("value", "jaccard", "null"))]
            for n in card["neighbours"]
        ],
        "explanation": None if explanation is None else _pack_explanation(explanation),
        "steering": [
            {key: clip(value, 2000) if isinstance(value, str) else finite(value) for key, value in example.items()}
            for example in card["steering"]
        ],
    }


def spread(windows: Sequence[Card], n: int) -> list[Card]:
    """At most n windows, taken in turn from each stratum, in their own order.

    >>> kept = spread([{"stratum": s, "at": i} for i, s in enumerate(["top", "top", "top", "decile 1"])], 2)
    >>> [w["at"] for w in kept]  # one of each, not the two strongest
    [0, 3]
    """
    if len(windows) <= n:
        return list(windows)
    turns, seen = [], Counter[str]()
    for place, window in enumerate(windows):
        turns.append((seen[window["stratum"]], place))
        seen[window["stratum"]] += 1
    return [windows[place] for place in sorted(place for _, place in sorted(turns)[:n])]


def _pack_window(window: Card, strings: StringTable) -> list[object]:
    values = window["values"]
    if len(values) != len(window["tokens"]) or not 0 <= window["peak"] < len(values):
        raise InvalidInputError(
            f"A window has {len(window['tokens'])} tokens, {len(values)} values and its peak at {window['peak']}; "
            "each token has one value and the peak is one of them. Make the card again."
        )
    active = [item for place, value in enumerate(values) if value for item in (place, finite(value, 3))]
    left = [place for place, value in enumerate(values) if value is None]
    ids = [strings.place(token) for token in window["tokens"]]
    where = [strings.place(window["stratum"]), window["row"], window["document"], window["peak"]]
    return [*where, ids, active, left]


def _pack_explanation(explanation: Card) -> dict[str, object]:
    arms, tests = _tests(explanation)
    said = badge([str(test["verdict"]) for test in tests])
    return {
        "text": clip(explanation["text"], 2000), "method": clip(explanation["method"]),
        "windows": explanation["n_windows"], "tests": tests,
        "arms": ["this explanation", *(clip(CONTROLS.get(arm, arm)) for arm in arms)],
        "badge": said, "holds": said == ABOVE,
    }  # fmt: skip


def _tests(explanation: Card) -> tuple[list[str], list[dict[str, object]]]:
    """The names of the controls, and each test: the score of the explanation, then those of the controls."""
    scores = explanation["scores"]
    controls = {split_control(key, scores): estimate for key, estimate in explanation["controls"].items()}
    arms = list(dict.fromkeys(control for control, _ in controls))
    tests = []
    for name in dict.fromkeys([*scores, *(name for _, name in controls)]):
        own, *others = (_pack_estimate(e) for e in (scores.get(name), *(controls.get((arm, name)) for arm in arms)))
        tests.append({
            "label": clip(label(name)), "meaning": meaning(name), "arms": [own, *others],
            "verdict": verdict(own, others),
        })  # fmt: skip
    return arms, tests


def badge(verdicts: Sequence[str]) -> str:
    """What the tests of an explanation say together: the weakest verdict.

    >>> badge(["above its controls", "not clearly above its controls", ""]), badge([])
    ('not clearly above its controls', 'not compared with controls')
    """
    return max(
        filter(None, verdicts), key=lambda verdict: verdict.startswith("not"), default="not compared with controls"
    )


def holds(explanation: Card | None) -> bool:
    """Whether an explanation is above its controls in every test that has one, and in one at least."""
    return explanation is not None and badge([str(test["verdict"]) for test in _tests(explanation)[1]]) == ABOVE


def verdict(score: Card | None, controls: Sequence[Card | None]) -> str:
    """Whether a score is above all of its controls, by their intervals; nothing where there is nothing to compare.

    >>> verdict({"low": 0.6, "high": 0.8}, [{"low": 0.4, "high": 0.55}, None])
    'above its controls'
    """
    highs = [control["high"] for control in controls if control is not None]
    if score is None or not highs or any(high is None for high in (score["low"], *highs)):
        return ""
    return ABOVE if score["low"] > max(highs) else "not clearly above its controls"


def _pack_estimate(estimate: Card | None) -> Card | None:
    if estimate is None:
        return None
    numbers = {key: finite(estimate[key]) for key in ("value", "low", "high", "n", "level")}
    return numbers | {"unit": clip(estimate["unit"]), "method": clip(estimate["method"])}


class _Index:
    """Columns of the table, filled row by row; a score is not measured in the rows before its first one."""

    def __init__(self) -> None:
        self.values: list[dict[str, Number]] = []
        self.rows: list[dict[str, object]] = []
        self.about: dict[str, dict[str, str]] = {}
        self.seen: set[int] = set()

    def add(self, card: Card, strings: StringTable) -> None:
        if card["feature"] in self.seen:
            raise InvalidInputError(f"Feature {card['feature']} has two cards. Give one of each feature.")
        self.seen.add(card["feature"])
        explanation = card["explanation"]
        values: dict[str, Number] = {}
        numbers = {name: card[name] for name in ("feature", "frequency", "max_act")}
        for name, value in (numbers | (card["scores"] or {})).items():
            self._put(values, "number", name, value)
        tested: Card = explanation or {"scores": {}, "controls": {}}
        for kind, key in (("test", "scores"), ("control", "controls")):
            for name, estimate in tested[key].items():
                self._put(values, kind, name, estimate["value"], tested["scores"])
        peaks = dict.fromkeys(window["tokens"][window["peak"]] for window in card["windows"])
        self.values.append(values)
        self.rows.append({
            "flags": [clip(flag) for flag in card["flags"]],
            "explanation": "" if explanation is None else clip(explanation["text"]), "holds": holds(explanation),
            "promoted": [strings.place(token["token"]) for token in card["promoted"]],
            "suppressed": [strings.place(token["token"]) for token in card["suppressed"]],
            "reads": [strings.place(token) for token in list(peaks)[:10]],
        })  # fmt: skip

    def _put(self, row: dict[str, Number], kind: str, name: str, value: Number, scores: Container[str] = ()) -> None:
        """Puts a number into a row; the first of a name defines its column."""
        control, score = split_control(name, scores) if kind == "control" else ("", name)
        key = field(f"{control or 'control'} {score}" if kind == "control" else name)
        if key not in self.about:
            if kind == "control":
                about = f"{label(score)}: {CONTROLS.get(control, control)}", f"The score {score} of this control."
            else:
                about = label(name), meaning(name)
            kind = "detail" if last(score) in DETAILS else kind
            self.about[key] = {"name": key, "label": clip(about[0]), "meaning": clip(about[1]), "kind": kind}
        row[key] = finite(value)

    def columns(self, strings: StringTable) -> dict[str, object]:
        lists = ("flags", "explanation", "holds", "promoted", "suppressed", "reads")
        values = {name: [row.get(name) for row in self.values] for name in self.about}
        return {
            "feature": values["feature"], "values": values, "columns": list(self.about.values()),
            "strings": strings.texts, **{name: [row[name] for row in self.rows] for name in lists},
        }  # fmt: skip
