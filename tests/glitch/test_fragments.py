from __future__ import annotations

import numpy as np

from tests.glitch.tiny_more import wordpiece
from tests.glitch.tiny_vocab import sentencepiece
from workbench.core.codec import FastCodec
from workbench.glitch.vocabulary.taxonomy import same_text, superstrings
from workbench.glitch.vocabulary.tokenizer import analyse


def test_hashing_finds_what_a_search_finds() -> None:
    rng = np.random.default_rng(0)
    made = {"".join(rng.choice([*"abé\U0001f600"], rng.integers(1, 9))) for _ in range(400)}
    raw = [*sorted(made), None, ""]
    wanted = rng.choice(len(raw), 120, replace=False).tolist()
    expected = {}
    for i in wanted:
        holders = [h for h, text in enumerate(raw) if h > i and raw[i] and text and raw[i] in text]
        if holders:
            expected[i] = tuple(holders[:3])
    assert superstrings(raw, wanted, limit=3) == expected and len(expected) > 20


def test_a_token_does_not_reach_over_the_end_of_another() -> None:
    assert superstrings(["ab", "xa", "by", "zab"], [0]) == {0: (3,)}
    assert superstrings(["ab", None], [0, 1]) == {} == superstrings([], [])


def test_tokens_with_the_same_text() -> None:
    tokenizer = sentencepiece()
    found = same_text(analyse(FastCodec.of(tokenizer)))
    assert tuple(sorted((tokenizer.token_to_id("a"), tokenizer.token_to_id("<0x61>")))) in found
    assert all(len(ids) > 1 for ids in found)


def test_pieces_that_begin_and_continue_a_word_are_no_duplicates() -> None:
    tokenizer = wordpiece()
    listed = {i for ids in same_text(analyse(FastCodec.of(tokenizer))) for i in ids}
    assert not {tokenizer.token_to_id("a"), tokenizer.token_to_id("##a")} & listed
    assert {tokenizer.token_to_id("!"), tokenizer.token_to_id("##!")} <= listed  # a sign never continues a word
