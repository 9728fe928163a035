from __future__ import annotations

import pytest

from tests.glitch.tiny_more import wordpiece
from tests.glitch.tiny_vocab import WORDS, byte_level, sentencepiece
from workbench.core.codec import FastCodec
from workbench.glitch.vocabulary.taxonomy import KINDS, kind_of, lexicon, natures, script_of, split_words
from workbench.glitch.vocabulary.tokenizer import analyse

TOKENIZER = byte_level()
VOCABULARY = analyse(FastCodec.of(TOKENIZER))
AT = TOKENIZER.token_to_id


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("emberHarbor", "word"), (" Ember", "word"), ("emberq", "letter"), ("qember", "letter"), ("\\", "character"),
        ("\\GeneratedValue", "letter_character"), ("ember harbor", "letter_character"), ("a1", "letter_character"),
        ("123", "character"), ("réalis", "special"), (" サーティ", "special"), ("<0xE2><0x82>", "byte"),
        ("a<0xE2>", "byte"), ("<0xe2>", "letter_character"), ("\n\t", "space"), ("", "empty"),
    ],
)  # fmt: skip
def test_kinds(text: str, kind: str) -> None:
    assert kind in KINDS and kind_of(text, {"ember", "harbor"}) == kind


def test_a_byte_is_a_byte_whatever_it_looks_like() -> None:
    assert kind_of("a", {"a"}, is_byte=True) == "byte" and kind_of("a", {"a"}) == "word"


def test_words_are_split_with_as_few_parts_as_possible_and_none_short() -> None:
    words = {"fire", "place", "fireplace", "mats", "the", "rapist", "therapist"}
    assert split_words("fireplaceMats", words) == ("fireplace", "Mats")
    assert split_words("therapist", words) == ("therapist",)
    assert split_words("therapists", words) == () and split_words("theFire", words) == ()


def test_scripts() -> None:
    assert [script_of(t) for t in ("ไทย", "ελλ", "한국", "かな", "1+1", "aб漢字")] == [
        "THAI", "GREEK", "HANGUL", "HIRAGANA", "none", "CJK",
    ]  # fmt: skip


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()])
def test_the_words_are_those_that_the_vocabulary_writes_with_a_space(tokenizer) -> None:  # noqa: ANN001
    vocabulary = analyse(FastCodec.of(tokenizer))
    space = tokenizer.token_to_id("Ġember") or tokenizer.token_to_id("▁ember")
    assert lexicon(vocabulary) == set(WORDS)
    assert lexicon(vocabulary, [space]) == set(WORDS) - {"ember"}


def test_without_spaces_in_the_vocabulary_words_are_the_tokens_without_a_mark() -> None:
    tokenizer = wordpiece()
    vocabulary = analyse(FastCodec.of(tokenizer))
    assert set(WORDS) <= lexicon(vocabulary) and not {"pha", "ta"} & lexicon(vocabulary)
    ids = [tokenizer.token_to_id(text) for text in ("ember", "##pha")]
    assert [nature.kind for nature in natures(vocabulary, ids).values()] == ["word", "letter"]


def test_natures_of_tokens() -> None:
    ids = [AT("ember"), AT("Ġharbor"), AT("Ġdelta"), AT("emb"), AT("Ã"), len(VOCABULARY) + 3]
    found = natures(VOCABULARY, ids, suspects=[AT("Ġharbor")])
    assert found[AT("ember")].kind == "word" and found[AT("ember")].part_of == (AT("Ġember"),)
    assert found[AT("Ġdelta")].kind == "word" and found[AT("Ġdelta")].words == ("delta",)
    # the only token that writes this word is the one under suspicion
    assert found[AT("Ġharbor")].kind == "letter" and found[AT("Ġharbor")].part_of == ()
    assert found[AT("emb")].kind == "letter" and found[AT("emb")].script == "LATIN"
    assert found[AT("emb")].part_of == (AT("embe"), AT("ember"), AT("Ġember"))
    assert found[AT("Ã")].kind == "byte" and found[AT("Ã")].script == "none"
    assert found[len(VOCABULARY) + 3].kind == "empty"


def test_a_part_is_found_inside_longer_tokens_only_and_at_most_five_times() -> None:
    raw = VOCABULARY.raw
    for i, nature in natures(VOCABULARY, range(len(VOCABULARY))).items():
        text = raw[i] or ""
        expected = [k for k in range(i + 1, len(raw)) if len(text) > 1 and text in (raw[k] or "")]
        assert list(nature.part_of) == expected[:5]
