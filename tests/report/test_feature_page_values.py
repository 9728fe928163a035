"""The page's file: what is in it, what is not, and how small it is."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import re
import zlib
from typing import Any

import pytest

from tests.report.feature_cards import HOSTILE, bare_card, full_card, hostile_card, many_cards
from tests.report.test_html import Tags
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.report.features import PackOptions, card_html, feature_page
from workbench.report.features.encode import pack_cards


class Scripts(html.parser.HTMLParser):
    """The text of each script and style element, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag in ("script", "style")
        if self.inside:
            self.found.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attrs, text = self.found[-1]
            self.found[-1] = (tag, attrs, text + data)


@pytest.fixture(scope="module")
def page() -> str:
    cards = [full_card(0), hostile_card(1), bare_card(2)]
    return feature_page(cards, HOSTILE[1], HOSTILE[0], PackOptions(chunk=2)).html


def data_of(page: str) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    texts = [(a, text) for tag, a, text in Scripts(page).found if a.get("type") == "application/json"]
    index = json.loads(next(text for a, text in texts if a.get("id") == "index"))
    chunks = [json.loads(text) for a, text in texts if a.get("class") == "chunk"]
    return index, [json.loads(zlib.decompress(base64.b64decode(chunk))) for chunk in chunks]


def test_the_data_come_back(page: str) -> None:
    index, chunks = data_of(page)
    assert index["feature"] == [0, 1, 2]
    assert [len(chunk) for chunk in chunks] == [2, 1]
    assert index["chunk"] == 2
    first = full_card(0)
    assert index["values"]["output_score"][0] == pytest.approx(first["scores"]["output_score"], rel=1e-3)
    assert index["values"]["detection"][0] == pytest.approx(
        first["explanation"]["scores"]["detection"]["value"], rel=1e-3
    )
    kinds = {column["name"]: column["kind"] for column in index["columns"]}
    assert index["values"]["shuffled_detection"][0] == 0.5
    assert index["values"]["top_tokens_detection"][0] == 0.64
    assert (kinds["shuffled_detection"], kinds["detection"], kinds["precision"]) == ("control", "test", "detail")
    tests = chunks[0][0]["explanation"]
    assert tests["arms"] == [
        "this explanation",
        "another feature's explanation",
        "no explanation",
        "list of its peak tokens",
    ]
    assert [None if e is None else e["value"] for e in tests["tests"][0]["arms"]][1:] == [0.5, 0.5, 0.64]
    assert [e is None for e in tests["tests"][2]["arms"]] == [False, False, True, True], (
        "fuzzing of two controls: not measured"
    )
    assert [index["strings"][i] for i in index["promoted"][0]] == [
        t["token"].replace("\n", "⏎") for t in first["promoted"]
    ]
    peaks = [w["tokens"][w["peak"]].replace("\n", "⏎") for w in first["windows"]]
    assert [index["strings"][i] for i in index["reads"][0]] == list(dict.fromkeys(peaks))[:10]


def test_what_was_not_measured_is_null_and_never_zero(page: str) -> None:
    index, chunks = data_of(page)
    assert {name: values[2] for name, values in index["values"].items() if name != "feature"} == dict.fromkeys(
        list(index["values"])[1:]
    )
    gaps = full_card(0) | {"scores": {"output_score": math.nan}, "max_act": math.inf}
    gaps["promoted"][0]["logit"] = math.nan
    packed = pack_cards([gaps])
    assert packed.index["values"]["output_score"] == [None]
    assert packed.index["values"]["max_act"] == [{"$float": "inf"}]
    assert json.loads(zlib.decompress(base64.b64decode(packed.chunks[0])))[0]["promoted"][0][2] is None


def test_nothing_in_the_data_becomes_markup(page: str) -> None:
    tags = Tags(page)
    names = [tag for tag, _ in tags.seen]
    assert names.count("script") == 1 + 2 + 1, "index, two chunks, the program"
    assert "img" not in names
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)
    index = next(text for _, a, text in Scripts(page).found if a.get("id") == "index")
    assert not set("<>&\u2028\u2029\u202e\x00") & set(index)
    page.encode("utf-8")
    assert "<!--" not in page


def test_the_policy_allows_this_script_and_style_alone(page: str) -> None:
    policy = next(a["content"] for tag, a in Tags(page).seen if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for tag, attrs, text in Scripts(page).found:
        if attrs.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_nothing_is_loaded_and_nothing_is_evaluated(page: str) -> None:
    program = Scripts(page).found[-1][2]
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "import(",
    ):
        assert word not in program
    assert re.findall(r"https?://[^\s\"']+", program + page.split("<body>")[0]) == ["http://www.w3.org/2000/svg"]
    assert not any({"src", "href"} & attributes.keys() for _, attributes in Tags(page).seen)


def test_many_features_stay_small() -> None:
    done = feature_page(many_cards(200))
    assert done.n_features == 200
    assert done.card_bytes / 200 < 1500, "fifteen windows of 24 tokens, with all else"
    assert done.index_bytes / 200 < 400


def test_contexts_are_left_out_evenly_and_it_is_said() -> None:
    packed = pack_cards([full_card(0)], PackOptions(windows=6))
    card = json.loads(zlib.decompress(base64.b64decode(packed.chunks[0])))[0]
    strata = [packed.index["strings"][window[0]] for window in card["windows"]]
    assert strata == ["top", "decile 1", "decile 2", "decile 3", "decile 4", "decile 5"]
    assert card["windows_left"] == 9


def test_cards_that_can_not_be_shown_are_refused() -> None:
    with pytest.raises(DegenerateInputError, match="nothing to show"):
        feature_page([])
    with pytest.raises(InvalidInputError, match="Feature 3 has two cards"):
        feature_page([bare_card(3), bare_card(3)])
    broken = full_card(1)
    broken["windows"][0]["peak"] = 24
    with pytest.raises(InvalidInputError, match="peak"):
        feature_page([broken])
    with pytest.raises(InvalidInputError, match="windows"):
        PackOptions(windows=-1)


def test_the_card_for_a_notebook_is_closed_markup_without_script() -> None:
    for card in (full_card(0), hostile_card(1), bare_card(2)):
        text = card_html(card)
        tags = Tags(text)
        assert tags.open == []
        names = [tag for tag, _ in tags.seen]
        assert names[0] == "article"
        assert "script" not in names
        assert "img" not in names
        assert not any({"src", "href"} & a.keys() or any(k.startswith("on") for k in a) for _, a in tags.seen)
        text.encode("utf-8")


def test_the_card_for_a_notebook_says_everything() -> None:
    card = full_card(3)
    text = card_html(card)
    for part in ("Feature 3", "dense", "Tested on 80 held-out windows", "0.5 is chance", "Promoted", "Decile 10", "random 0.0500: above",
                 "no more than random", "Unsteered", "Random direction, equal norm", "200,000 tokens were read", "Output score"):  # fmt: skip
        assert part in text, part
    assert text.count("<mark") == sum(1 for w in card["windows"] for v in w["values"] if v)
    assert text.count("<rect") == 20
    before, fold = text.split("<details><summary>By decile of the activation: 10 more contexts</summary>")
    assert before.count("<h4>Strongest</h4>") == 1 and fold.partition("</details>")[0].count("<h4>Decile") == 10
    widest = max(float(share) for share in re.findall(r"<mark[^>]*--v: (\d+)", fold.partition("</details>")[0]))
    assert widest < 100, "one scale of colours for all contexts: the strongest one is above the fold"
    bare = card_html(bare_card(2))
    for part in ("No explanation was made", "not measured", "No context was collected", "Neighbours were not measured", "Not steered with",
                 "No tokens were read", "distribution of activations was not measured"):  # fmt: skip
        assert part in bare, part
    assert '<td class="num"></td>' not in bare


def test_the_headline_is_the_explanation_only_where_it_is_above_all_its_controls() -> None:
    card = full_card(3)
    parts = re.findall("<h3>(.*?)</h3>", card_html(card))
    assert parts[:4] == [
        "What it reads",
        "Contexts",
        "What it writes: tokens by logit, through the final norm",
        "Explanation",
    ]
    said, peaks = "token is one of", "The tokens at the peaks of its contexts."

    def headline(card: dict[str, Any]) -> str:
        return card_html(card).partition("<h3>What it reads</h3>")[2].partition("</section>")[0]

    assert said in headline(card)
    assert peaks not in headline(card)
    explanation = card["explanation"]
    controls = explanation["controls"]
    high = controls["empty: detection"] | {"high": 0.99}
    for changed in (
        {"controls": controls | {"empty: detection": high}},  # one of several controls is as good
        {"controls": {}},  # compared with nothing
        {"scores": {}, "controls": {}},  # not tested
    ):
        weak = card | {"explanation": explanation | changed}
        assert said not in headline(weak)
        assert peaks in headline(weak)
        assert said in card_html(weak).partition("<h3>Explanation</h3>")[2], "it is still there to read"
        index = feature_page([weak], "x").html.partition('"holds":[')[2]
        assert index.startswith("false")
    folded = card_html(card).partition("<summary>Tests")[2].partition("</summary>")[0]
    assert ">above its controls<" in folded
    assert "<h3>What it reads</h3>" not in card_html(bare_card(2)), "nothing is known of it"


def test_tokens_without_logits_are_listed_without_empty_bars() -> None:
    tokens = [{"token": f" t{i}", "token_id": i, "logit": math.nan} for i in range(3)]
    text = card_html(full_card(3) | {"promoted": tokens, "suppressed": []})
    promoted = text.partition("<h4>Promoted</h4>")[2].partition("</div>")[0]
    assert promoted.count("chip") == 3
    assert "bar" not in promoted
    assert "n/a" not in promoted


def test_style_of_a_card_stays_inside_it() -> None:
    style = next(text for tag, _, text in Scripts(card_html(bare_card(0))).found if tag == "style")
    rules = re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", style, flags=re.DOTALL)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", rules) for part in rule.split(",")]
    assert len(selectors) > 50
    assert [one for one in selectors if not one.startswith(".wb-card")] == []
