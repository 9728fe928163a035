"""Behaviours: words apart per split, pairs that suit any tokenizer, and how well a model does them."""

from __future__ import annotations

import functools
import re

import pandas as pd
import pytest
import torch

import circuits
from circuits import behaviours
from circuits.behaviours.kinds import agreement, greater_than
from circuits.behaviours.registry import BEHAVIOURS, SPLITS, Split
from circuits.pairs import Pairs, PromptPair, usable
from tests.circuits.tokenizers import agreeing_model, model_with, pieces_tokenizer, words_tokenizer
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError
from workbench.models.model import Model

SVA = ("sva_nounpp", "sva_rc", "sva_simple", "sva_within_rc")
VERBS = ["is", "are", "has", "have", "does", "do", "goes", "go"]


@functools.cache
def _candidates(name: str, split: Split) -> list[PromptPair]:
    return [pair for group in BEHAVIOURS[name].candidates(split) for pair in group]


def _words(text: str) -> list[str]:
    return text.replace(",", "").split()


@pytest.fixture(scope="module")
def agreeing() -> Model:
    return agreeing_model()


@pytest.mark.parametrize("name", behaviours.names())
def test_the_splits_share_no_word_that_the_answer_depends_on(name: str) -> None:
    deciding: dict[Split, set[str]] = {}
    for split in SPLITS:
        rows = _candidates(name, split)
        both = [(_words(row.clean), _words(row.patch or "")) for row in rows]
        assert all(len(clean) == len(patch) and clean != patch for clean, patch in both)
        deciding[split] = {
            word for clean, patch in both for pair in zip(clean, patch, strict=True) if pair[0] != pair[1] for word in pair
        }  # fmt: skip
        assert len({(row.clean, row.patch, row.clean_answer) for row in rows}) == len(rows), "each pair comes once"
        assert {(row.clean, row.clean_answer) for row in rows} == {(row.patch, row.patch_answer) for row in rows}, (
            "every pair also comes the other way round"
        )
    assert len(deciding["train"]) > 4 and len(deciding["test"]) > 4
    assert not deciding["train"] & deciding["test"]


def test_agreement_has_other_nouns_in_each_split_in_every_role() -> None:
    nouns = {
        split: {form for noun in (*lists.people, *lists.things) for form in (noun, agreement.plural(noun))}
        for split, lists in agreement.NOUNS.items()
    }
    assert not nouns["train"] & nouns["test"]
    for name in SVA:
        for split, other in (("train", "test"), ("test", "train")):
            said = {word for row in _candidates(name, split) for word in _words(row.clean)}
            assert said & nouns[split] and not said & nouns[other]


@pytest.mark.parametrize(
    ("name", "words", "differs_at"),
    [("sva_simple", 2, 1), ("sva_nounpp", 5, 1), ("sva_rc", 6, 1), ("sva_within_rc", 5, 4)],
)
def test_agreement_differs_in_one_word_and_the_case_names_both_numbers(name: str, words: int, differs_at: int) -> None:
    plurals = {agreement.plural(noun) for lists in agreement.NOUNS.values() for noun in (*lists.people, *lists.things)}
    for row in _candidates(name, "train"):
        clean, patch = _words(row.clean), _words(row.patch or "")
        assert [i for i in range(words) if clean[i] != patch[i]] == [differs_at] and len(clean) == words
        subject, *distractor = row.case.split("_")
        assert (
            (clean[differs_at] in plurals)
            == (subject == "plural")
            == (row.clean_answer in (" are", " have", " do", " go"))
        )
        others = [word for word in clean if word != clean[differs_at]]
        assert not distractor or any(word in plurals for word in others) == (distractor == ["plural"])
        if name == "sva_rc":
            assert clean[5].endswith("s") == (distractor == ["singular"]), (
                "the clause's verb agrees with its own subject"
            )


@pytest.mark.parametrize("name", SVA)
@pytest.mark.parametrize("split", SPLITS)
def test_pairs_suit_the_tokenizer_and_have_one_length(name: str, split: Split, agreeing: Model) -> None:
    pairs = behaviours.pairs(name, agreeing, split, n=60)
    assert len(pairs) == 60 and pairs.length is not None and pairs.patch is not None
    assert torch.equal(pairs.clean.mask, pairs.patch.mask) and pairs.clean.mask.all()
    frame = pairs.frame()
    assert set(frame["clean_answer"].str.strip()) == set(VERBS)
    asked = {(row.clean, row.patch, row.case) for row in _candidates(name, split)}
    assert set(zip(frame["clean_prefix"], frame["patch_prefix"], frame["case"], strict=True)) <= asked


def test_pairs_follow_from_the_seed_alone(agreeing: Model) -> None:
    first, again, other = (behaviours.pairs("sva_nounpp", agreeing, n=20, seed=seed).frame() for seed in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)


def test_pairs_of_which_one_prompt_is_longer_are_left_out() -> None:
    # without pieces for plurals each is its singular and an s, but man/men and woman/women are bytes of equal number
    model = agreeing_model(plurals=False)
    with pytest.raises(DegenerateInputError, match=r"16 pairs are possible.*same number.*at most n=16") as caught:
        behaviours.pairs("sva_simple", model, "test")
    assert "n=100" in str(caught.value) and "split='test'" in str(caught.value)
    pairs = behaviours.pairs("sva_simple", model, "test", n=16)
    assert {row for row in pairs.frame()["clean_prefix"]} == {"The man", "The men", "The woman", "The women"}
    assert len(set(pairs.clean.lengths.tolist())) == 2, "both lengths are needed for all 16"
    assert behaviours.pairs("sva_simple", model, "test", n=8).length is not None, "eight of one length"


def test_answers_that_are_no_token_leave_nothing() -> None:
    with pytest.raises(DegenerateInputError, match=r"0 pairs are possible.*Choose another behaviour"):
        behaviours.pairs("sva_simple", model_with(), n=5)  # bytes: " is" is three


def test_words_without_spaces_in_their_tokens_work_too() -> None:
    words = [
        word for split in SPLITS for noun in agreement.NOUNS[split].people for word in (noun, agreement.plural(noun))
    ]
    model = model_with(words_tokenizer(["The", *words, *VERBS]))
    pairs = behaviours.pairs("sva_simple", model, n=50)
    assert pairs.length == 2 and set(pairs.frame()["clean_answer"]) <= set(VERBS)


def _years(digits: int) -> pd.DataFrame:
    """Pairs for a tokenizer that cuts numbers into so many digits, from the left."""
    words = {word for split in SPLITS for word in greater_than.NOUNS[split]} | {"lasted", "from", "the", "year", "to"}
    numbers = [str(number) for number in range(10**digits)] + [f"0{number}" for number in range(10)]
    pieces = ["The", *numbers, *(f"▁{word}" for word in words)]
    return behaviours.pairs("greater_than", model_with(pieces_tokenizer(pieces, digits)), n=40).frame()


@pytest.mark.parametrize(("digits", "asked"), [(1, 1), (2, 2), (3, 1)])
def test_years_are_asked_for_as_the_tokenizer_cuts_them(digits: int, asked: int) -> None:
    frame = _years(digits)
    assert {len(answer) for answer in frame["clean_answer"]} == {asked}
    assert set(frame["clean_prefix"].str.split().str[-1].str.len()) == {3 if digits == 3 else 2}


def test_a_year_is_right_for_the_early_prompt_alone_or_lies_behind_both() -> None:
    for split in SPLITS:
        for row in _candidates("greater_than", split):
            begun, other = (int(re.findall(r"\d{4}", text)[0]) for text in (row.clean, row.patch or ""))
            end = row.clean.rsplit(" ", 1)[1]
            right, wrong = (int((end + answer).ljust(4, "5")) for answer in (row.clean_answer, row.patch_answer or ""))
            early = begun < other
            assert (row.case == "early_late") == early
            if early:
                assert begun // 10 * 10 <= right // 10 * 10 and begun < right < other < wrong
            else:
                assert other < wrong < begun < right


def test_ioi_repeats_one_name_and_asks_for_the_other() -> None:
    for row in _candidates("ioi", "test"):
        (first, second), giver = (
            re.findall(r"(?:When|After|While) (\w+) and (\w+)", row.clean)[0],
            re.findall(r", (\w+)", row.clean)[0],
        )
        assert {first, second} == {giver, row.clean_answer.strip()} and row.patch_answer == f" {giver}"
        assert (row.case == "abba") == (giver == second)


def test_unknown_names_and_numbers_are_refused(agreeing: Model) -> None:
    with pytest.raises(UnknownNameError, match="sva_simple"):
        behaviours.pairs("sva_simpel", agreeing)
    with pytest.raises(InvalidInputError, match="at least 1"):
        behaviours.pairs("sva_simple", agreeing, n=0)


def test_the_table_shows_every_behaviour() -> None:
    table = behaviours.frame().set_index("behaviour")
    assert tuple(table.index) == behaviours.names() == tuple(sorted(behaviours.names()))
    assert table.loc["sva_simple", "train"] == 24 * 2 * 4 and table[["train", "test"]].to_numpy().min() >= 100


def test_accuracy_counts_what_the_logits_say(agreeing: Model) -> None:
    pairs = behaviours.pairs("sva_nounpp", agreeing, n=70)  # more than one batch
    found = behaviours.accuracy(agreeing, pairs)
    gaps = []
    for batch in (pairs.clean, pairs.patch):
        assert batch is not None
        both = agreeing.logits(batch).gather(1, pairs.answers)
        gaps.append(both[:, 0] - both[:, 1])
    assert found.clean.value == pytest.approx(float((gaps[0] > 0).double().mean())) and found.clean.n == 70
    assert found.patch.value == pytest.approx(float((gaps[1] < 0).double().mean()))
    assert found.clean_difference.value == pytest.approx(float(gaps[0].mean()), abs=1e-4)
    assert found.patch_difference.value == pytest.approx(-float(gaps[1].mean()), abs=1e-4)
    assert not found.is_above_chance and "Not clearly above chance" in str(found)
    assert found.frame()["accuracy"].tolist() == [found.clean.value, found.patch.value]


def test_accuracy_needs_counterparts(agreeing: Model) -> None:
    alone = Pairs.of(agreeing, clean=["The king"], answers=[" is"])
    with pytest.raises(InvalidInputError, match="no counterparts"):
        behaviours.accuracy(agreeing, alone)


@pytest.mark.parametrize(
    ("name", "right", "gap"), [("sva_simple", 1.0, 3.8), ("sva_nounpp", 0.95, 2.0), ("sva_within_rc", 0.99, 4.4)]
)
def test_the_embedded_model_agrees(name: str, right: float, gap: float, embedded: Model) -> None:
    found = circuits.behaviours.accuracy(embedded, behaviours.pairs(name, embedded, "test", n=50))
    assert found.clean.value == pytest.approx(right, abs=0.03) and found.patch.value == pytest.approx(right, abs=0.03)
    assert found.clean_difference.value == pytest.approx(gap, rel=0.2) and found.is_above_chance


def test_a_pair_that_can_not_be_read_leaves_the_others(agreeing: Model) -> None:
    rows = [("The king", "The kings"), ("", "The kings"), ("The \ud800", "The kings"), ("The boys", "The boy")]
    answered, reasons = usable(agreeing, [PromptPair(a, b, " is", " are") for a, b in rows])
    assert list(answered) == [0, 3] and list(reasons) == [1, 2]
    assert answered[3].length == 2 and agreeing.tokenizer.decode(answered[3].ids) == " is are"
    assert "empty" in reasons[1] and "half a character" in reasons[2]
