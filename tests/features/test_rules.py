from __future__ import annotations

import numpy as np
import pytest

from tests.features.corpus import SITE, VOCABULARY, WORDS, Planted, corpus_store, word
from tests.tiny import tiny_tokenizer
from workbench.core.errors import DegenerateInputError
from workbench.features.card import Explanation
from workbench.features.explain import rulefit
from workbench.features.explain.examples import ExampleOptions
from workbench.features.explain.rule_explanations import RuleExplanation, explain_by_rules, score_rules
from workbench.features.explain.rulefit import RuleData, fit_rule
from workbench.features.explain.rules import (
    REACH,
    After,
    At,
    Before,
    BeginsWith,
    Both,
    InClass,
    Never,
    Ngram,
    Rule,
    TokenIn,
    TokenView,
)
from workbench.features.passes.windows import WindowOptions, collect_windows
from workbench.features.token_classes import TokenTexts

PETS = {word(" dog"), word(" cat")}
UPPER = {i + 2 for i, w in enumerate(WORDS) if w.strip()[0].isupper() and not w.strip()[1:].isupper()}
DIGITS = {i + 2 for i, w in enumerate(WORDS) if w.strip().isdigit()}

UNITS = {
    "token is one of ' dog', ' cat'": lambda ids, p: 2.0 * (ids[p] in PETS),
    "token is ' house', and within 8 tokens after ' of'": lambda ids, p: float(
        ids[p] == word(" house") and word(" of") in ids[max(0, p - 8) : p]
    ),
    "position 4 to 7": lambda ids, p: float(4 <= p < 8),
    "token is a capitalised word": lambda ids, p: 1.0 * (ids[p] in UPPER),
    "token is digits": lambda ids, p: 1.0 * (ids[p] in DIGITS),
    "token is ' tree', and directly after ' big', ' small'": lambda ids, p: float(
        ids[p] == word(" tree") and ids[p - 1] in (word(" big"), word(" small"))
    ),
    "token is ' house', and following token is digits": lambda ids, p: float(
        ids[p] == word(" house") and p + 1 < len(ids) and ids[p + 1] in DIGITS
    ),
    "directly before ' of'": lambda ids, p: float(p + 1 < len(ids) and ids[p + 1] == word(" of")),
}


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[RuleExplanation, ...], dict[int, Explanation]]:
    store = corpus_store(tmp_path_factory.mktemp("c") / "s", rows=1500)
    units = Planted(tuple(UNITS.values()))
    found = collect_windows(store, SITE, units, WindowOptions(before=12, after=6))
    rules = explain_by_rules(found, units.ids, VOCABULARY, ExampleOptions())
    return rules, score_rules(rules, VOCABULARY)


@pytest.mark.parametrize("feature", range(len(UNITS)))
def test_planted_rules_are_found_and_hold_on_documents_that_were_not_seen(
    explained: tuple[tuple[RuleExplanation, ...], dict[int, Explanation]], feature: int
) -> None:
    rules, tests = explained
    fitted = rules[feature].fitted
    assert fitted is not None
    assert (tests[feature].text, fitted.f1) == (list(UNITS)[feature], 1.0)
    assert {name: score.value for name, score in tests[feature].scores.items()} == {
        "detection": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "hard detection": 1.0, "fuzzing": 1.0,
    }  # fmt: skip
    controls = tests[feature].controls
    assert controls["empty: detection"].value == controls["empty: fuzzing"].value == 0.5
    assert controls["shuffled: detection"].low - 0.1 < 0.5 < controls["shuffled: detection"].high + 0.1
    assert controls["shuffled: fuzzing"].value < 0.6
    assert tests[feature].n_windows >= 60


def test_a_list_of_tokens_cannot_say_after(
    explained: tuple[tuple[RuleExplanation, ...], dict[int, Explanation]],
) -> None:
    conditional, position = explained[1][1].controls, explained[1][2].controls
    assert conditional["top tokens: detection"].high < 0.9
    assert position["top tokens: detection"].value < 0.6


def test_the_score_is_f1_less_the_length_of_the_rule() -> None:
    ids = np.tile([2, 3, 4, 4, 2, 5], 4)
    view = TokenView(ids, np.full((24, 8), -1), np.zeros(24, dtype=int), np.full(24, -1))
    data = RuleData(view, np.isin(ids, [2, 3]))
    fitted = fit_rule(data, VOCABULARY)
    assert fitted.rule == TokenIn((2, 3))
    assert fitted.f1 == 1.0
    assert fitted.score == pytest.approx(1 - 2 / 12), "it names two tokens, a list of all would name twelve"
    with pytest.raises(DegenerateInputError, match="none of 24"):
        fit_rule(RuleData(view, np.zeros(24, dtype=bool)), VOCABULARY)


def test_a_common_stem_is_shorter_than_a_list() -> None:
    texts = [" rune", " runner", " running", " runs", " runt", " RUN", *WORDS[:10]]
    vocabulary = TokenTexts.of_texts(texts)
    ids = np.tile(np.arange(len(texts)), 4)
    view = TokenView(ids, np.full((len(ids), 8), -1), np.tile(np.arange(4), len(texts)), np.full(len(ids), -1))
    runs = np.array([t.lower().startswith(" run") for t in texts])
    assert fit_rule(RuleData(view, runs[ids]), vocabulary).rule == BeginsWith(("run",))


def test_a_unit_without_pattern_gets_no_long_rule() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(2, len(VOCABULARY), 3000)
    before, positions = random.integers(2, len(VOCABULARY), (3000, 8)), random.integers(0, 24, 3000)
    view = TokenView(ids, before, positions, random.integers(2, len(VOCABULARY), 3000))
    fitted = fit_rule(RuleData(view, random.random(3000) < 0.02), VOCABULARY)
    assert fitted.f1 < 0.2


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (TokenIn((4,)), [0, 0, 1]),
        (After((2,), 1), [0, 1, 0]),
        (After((2,), 8), [0, 1, 1]),
        (At(1, 2), [0, 1, 0]),
        (At(1, None), [0, 1, 1]),
        (Ngram(((2, 3, 4),)), [0, 0, 1]),
        (Ngram(((3, 3), (2, 3))), [0, 1, 0]),
        (Ngram(((3, 3), (2, 4), (3, 2, 4))), [0, 0, 0]),
        (Both(TokenIn((3, 4)), After((3,), 1)), [0, 0, 1]),
        (InClass("a lower-case word", back=1), [0, 1, 1]),
        (InClass("a lower-case word", back=-1), [1, 1, 0]),
        (Before((4, len(VOCABULARY) - 1)), [0, 1, 0]),
        (Both(TokenIn((2, 3)), Before((3,))), [1, 0, 0]),
        (Never(), [0, 0, 0]),
    ],
)
def test_rules_fire_where_they_say(rule: Rule, expected: list[int]) -> None:
    before = np.full((3, 8), -1)
    before[1, 0], before[2, :2] = 2, (3, 2)
    view = TokenView(np.array([2, 3, 4]), before, np.arange(3), np.array([3, 4, -1]))
    assert rule.fires(view, VOCABULARY).tolist() == [bool(x) for x in expected]
    assert not rule.text(VOCABULARY) or rule.bits(VOCABULARY) > 0


def test_what_precedes_a_document_is_in_no_set_and_no_class() -> None:
    view = TokenView(np.array([2]), np.full((1, 8), -1), np.array([0]), np.array([-1]))
    last = len(VOCABULARY) - 1
    assert VOCABULARY.text(last) == " slow"
    assert not InClass("a lower-case word", back=1).fires(view, VOCABULARY).any(), "-1 is not the last token"
    assert not InClass("a lower-case word", back=-1).fires(view, VOCABULARY).any()
    nothing = TokenView(np.array([-1]), view.before, view.positions, view.after)
    assert not BeginsWith(("slow",)).fires(nothing, VOCABULARY).any()


def test_pieces_of_characters_are_shown_as_bytes() -> None:
    vocabulary = TokenTexts.of(tiny_tokenizer())
    assert len(vocabulary) == 258
    assert "<0xC3>" in vocabulary.texts
    assert "a" in vocabulary.texts


def test_beginnings_of_any_length_are_as_the_letters_say() -> None:
    ids = np.arange(-1, len(VOCABULARY))
    view = TokenView(ids, np.zeros((len(ids), REACH), int), np.zeros(1, int), ids)
    for prefixes in (("run",), ("r", "runn", "walke"), ("zebra",), ("", "a"), ("slowly",)):
        found = BeginsWith(prefixes).fires(view, VOCABULARY)
        assert found.tolist() == [False] + [stem.startswith(prefixes) for stem in VOCABULARY.stems]


def test_triggers_are_those_of_adding_the_best_token_one_by_one() -> None:
    rng = np.random.default_rng(5)
    for planted in ([], [3], [3, 9, 4]):
        before = rng.integers(-1, len(VOCABULARY), (600, REACH))
        active = np.isin(before, planted).any(1) ^ (rng.random(600) < 0.1)
        data = RuleData(TokenView(before[:, 0], before, np.arange(600), before[:, 0]), active)
        task = rulefit._Task(data, VOCABULARY, int(active.sum()))
        chosen: tuple[int, ...] = ()
        best = -np.inf
        while len(chosen) < rulefit.MOST_TRIGGERS:
            scored = []
            for token in np.unique(before[active]).tolist():
                if token >= 0 and token not in chosen:
                    fires = np.isin(before, (*chosen, token)).any(1)
                    bits = 3 + (len(chosen) + 1) * VOCABULARY.bits
                    scored.append((float(task.score((fires & active).sum(), fires.sum(), bits)), -token))
            score, token = max(scored)
            if score <= best:
                break
            chosen, best = (*chosen, -token), score
        assert rulefit._best_triggers(task) == tuple(sorted(chosen))
        assert not planted or set(planted) <= set(chosen)
